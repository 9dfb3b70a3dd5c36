"""Walks through a stage's micro-batch without computing it: builds the objective as training does, on made-up data.

A transformer's blocks are all alike, so that a deep prior is walked through at two depths and continued in a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig
from hvqd_model.prior.prior import HierarchicalPrior
from workflows.config import RunConfig
from workflows.footprint import Footprint, walk, without_memory

StageName = Literal["vq", "prior"]

_SHALLOW = (2, 4)
_UNKNOWN_CLASSES = 1_000
_FLOAT = 4


@dataclass(frozen=True)
class Pictures:
    """What a plan must know of the data; None where nobody knows."""

    count: int | None
    classes: int | None

    @staticmethod
    def of(config: RunConfig) -> Pictures:
        """What the source tells without being read: everything of the bundled set, nothing of others."""
        if config.data.source != "emoji":
            return Pictures(config.data.limit, None)
        from pyarrow import parquet

        from workflows.data.sources import BUNDLED, EMOJI

        columns = parquet.ParquetFile(BUNDLED)
        rows = columns.metadata.num_rows
        classes = len(set(columns.read([EMOJI.label]).column(0).to_pylist()))
        return Pictures(min(rows, config.data.limit or rows), classes)


@dataclass(frozen=True)
class StageFootprint:
    """What a stage's model and one of its micro-batches take."""

    parameters: int
    buffer_bytes: int
    statistics_bytes: int
    """Summed over ranks once a step besides gradients (codebook statistics)."""
    micro: Footprint


def stage_footprint(config: RunConfig, stage: StageName, pictures: Pictures) -> StageFootprint:
    """The stage's model and micro-batch, by shape alone."""
    key = config.model_copy(update={"root": "", "seed": 0})  # what does not matter shall not miss the cache
    return _walked(key.model_dump_json(), stage, pictures)


@cache
def _walked(config_json: str, stage: StageName, pictures: Pictures) -> StageFootprint:
    config = RunConfig.model_validate_json(config_json)
    if stage == "vq":
        return _vq(config)
    depth = config.prior.model.depth
    if depth <= _SHALLOW[1]:
        return _prior(config, pictures, depth)
    low, high = (_prior(config, pictures, shallow) for shallow in _SHALLOW)
    return _continued(low, high, (depth - _SHALLOW[0]) / (_SHALLOW[1] - _SHALLOW[0]))


def _continued(low: StageFootprint, high: StageFootprint, times: float) -> StageFootprint:
    """On the line through two footprints, `times` as far from the first as the second is."""

    def along(a: float, b: float) -> float:
        return a + (b - a) * times

    def count(a: int, b: int) -> int:
        return round(along(a, b))

    one, two = low.micro, high.micro
    return StageFootprint(
        parameters=count(low.parameters, high.parameters),
        buffer_bytes=count(low.buffer_bytes, high.buffer_bytes),
        statistics_bytes=high.statistics_bytes,
        micro=Footprint(
            transient_bytes=count(one.transient_bytes, two.transient_bytes),
            growing_bytes=count(one.growing_bytes, two.growing_bytes),
            largest_parameter_bytes=two.largest_parameter_bytes,
            flops={work: along(one.flops[work], flops) for work, flops in two.flops.items()},
            moved_bytes=along(one.moved_bytes, two.moved_bytes),
            operations=count(one.operations, two.operations),
        ),
    )


def _vq(config: RunConfig) -> StageFootprint:
    from workflows.training.judges import build_judges
    from workflows.training.vq_stage import VQObjective

    settings, on_gpu = config.vq.train, config.compute.gpus_per_worker > 0
    with without_memory():
        model = HierarchicalVQ(config.vq_config)
        judges = build_judges(settings, 0, "fp32", torch.device("cpu"))
    for quantizer in model.quantizers:
        quantizer.started = torch.tensor(True)  # the codebooks' start is a small part of a training
    if judges.adversary is not None:
        judges.adversary.started = True
        judges.adversary.factor = torch.ones(())
    objective = VQObjective(model, _precision(config, "vq"), judges).train()
    images = torch.zeros(settings.micro_batch, 3, *config.data.image_size)
    keys = torch.arange(settings.micro_batch)

    def step() -> Tensor:
        return objective(images, keys).loss  # type: ignore[no-any-return]

    micro = walk(objective, step, on_gpu=on_gpu)
    sizes, dims = config.vq_config.codebook_sizes, config.vq_config.code_dims
    statistics = sum(_FLOAT * codes * (dim + 1) for codes, dim in zip(sizes, dims, strict=True))
    return StageFootprint(_parameters(model), _buffers(model), statistics, micro)


def _prior(config: RunConfig, pictures: Pictures, depth: int) -> StageFootprint:
    from workflows.training.prior_stage import PriorObjective

    settings, on_gpu = config.prior.train, config.compute.gpus_per_worker > 0
    vq = config.vq_config
    classes = _UNKNOWN_CLASSES if pictures.classes is None else pictures.classes
    prior_config = PriorConfig(
        **{**config.prior.model.model_dump(), "depth": depth},
        grids=vq.grids,
        codebook_sizes=vq.codebook_sizes,
        code_dim=vq.code_dims,
        classes=tuple(map(str, range(classes))),
    )
    with without_memory():
        model = HierarchicalPrior(prior_config)
    objective = PriorObjective(model, _precision(config, "prior")).train()
    batch = settings.micro_batch
    codes = tuple(torch.zeros(batch, *grid, dtype=torch.int64) for grid in vq.grids)
    labels = torch.zeros(batch, dtype=torch.int64)
    times = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch

    def step() -> Tensor:
        return objective(codes, labels, times, torch.arange(batch)).loss  # type: ignore[no-any-return]

    return StageFootprint(_parameters(model), _buffers(model), 0, walk(objective, step, on_gpu=on_gpu))


def _precision(config: RunConfig, stage: StageName) -> Literal["fp32", "bf16"]:
    """As configured; `auto` is bf16 on a GPU, and on a CPU what this machine would take."""
    from workflows.training.precision import choose_precision

    chosen = (config.vq.train if stage == "vq" else config.prior.train).precision
    if chosen == "auto" and config.compute.gpus_per_worker:
        return "bf16"
    return choose_precision(chosen, torch.device("cpu"))[0]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _buffers(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
