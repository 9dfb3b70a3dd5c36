"""A stage's objective with fresh weights and made-up inputs of the right shape: to walk through, to try a machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig
from hvqd_model.prior.prior import HierarchicalPrior
from workflows.config import RunConfig
from workflows.training.precision import Precision


def made_up_vq(config: RunConfig, precision: Precision, device: torch.device) -> tuple[nn.Module, tuple[Any, ...]]:
    """The tokenizer's objective with all codebooks started, and the inputs of one micro-batch."""
    from workflows.training.judges import build_judges
    from workflows.training.vq_stage import VQObjective

    settings = config.vq.train
    model = HierarchicalVQ(config.vq_config)
    judges = build_judges(settings, 0, precision, device)
    for quantizer in model.quantizers:
        quantizer.started = torch.tensor(True)  # the codebooks' start is a small part of a training
    if judges.adversary is not None:
        judges.adversary.started = True
        judges.adversary.factor = torch.ones((), device=device)
    objective = VQObjective(model, precision, judges).train()
    return objective, (
        torch.zeros(settings.micro_batch, 3, *config.data.image_size),
        torch.arange(settings.micro_batch),
    )


def made_up_prior(config: RunConfig, classes: int, precision: Precision) -> tuple[nn.Module, tuple[Any, ...]]:
    """The prior's objective, and the inputs of one micro-batch with its times spread evenly.

    Of the conditions only the class is there: the others' networks are small beside the prior.
    """
    from workflows.training.prior_stage import PriorObjective

    vq, batch = config.vq_config, config.prior.train.micro_batch
    prior_config = PriorConfig(
        **config.prior.model.model_dump(),
        grids=vq.grids,
        codebook_sizes=vq.codebook_sizes,
        code_dim=vq.code_dims,
        classes=tuple(map(str, range(classes))),
    )
    objective = PriorObjective(HierarchicalPrior(prior_config), precision).train()
    codes: tuple[torch.Tensor, ...] = tuple(torch.zeros(batch, *grid, dtype=torch.int64) for grid in vq.grids)
    if config.prior.model.noise == "gaussian":
        codes = tuple(torch.randn(batch, *grid, dim) for grid, dim in zip(vq.grids, vq.code_dims, strict=True))
    labels = torch.zeros(batch, dtype=torch.int64)
    times = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    return objective, (codes, labels, times, torch.arange(batch))
