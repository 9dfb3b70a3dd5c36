"""What engines share: which weights decay, how fast the average moves, and what DeepSpeed is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.prior.prior import HierarchicalPrior
from tests.tiny_training import prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training.engine import average_decay, make_optimizer, parameter_groups
from workflows.training.zero import zero_config


def both_models() -> tuple[HierarchicalVQ, HierarchicalPrior]:
    return vq_stage(vq_settings(1)).model, prior_stage(prior_settings(1)).model


def test_matrices_and_convolutions_decay_and_vectors_scales_and_embeddings_do_not() -> None:
    module = nn.ModuleDict(
        {"linear": nn.Linear(3, 4), "conv": nn.Conv2d(2, 3, 3), "norm": nn.LayerNorm(4), "table": nn.Embedding(5, 4)}
    )
    scales = nn.Parameter(torch.ones(6, 1))  # one scale a head, shaped to broadcast
    module.register_parameter("scales", scales)
    decayed, kept = parameter_groups(module, 0.5)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == {"linear.weight", "conv.weight"}
    assert len(decayed["params"]) + len(kept["params"]) == len(names) == 8


def test_every_weight_of_both_models_is_in_one_group_and_has_an_axis_to_shard() -> None:
    for model in both_models():
        groups = parameter_groups(model, 0.1)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped)) == len(list(model.parameters())) > 20
        assert min(parameter.ndim for parameter in model.parameters()) == 1


def test_frozen_weights_are_in_no_group_and_empty_groups_are_left_out() -> None:
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    groups = parameter_groups(module, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert groups[0]["params"] == [module.bias]


def test_the_optimizer_takes_its_rates_from_the_settings() -> None:
    settings = prior_settings(1, learning_rate=0.25, betas=(0.5, 0.75), weight_decay=0.125)
    optimizer = make_optimizer(nn.Linear(2, 2), settings, torch.device("cpu"))
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.25, (0.5, 0.75), 0.125),
        (0.25, (0.5, 0.75), 0.0),
    ]


def test_after_its_half_life_the_average_keeps_half_of_what_it_was() -> None:
    settings = prior_settings(1, ema_half_life_images=40)  # five steps of 8
    assert average_decay(settings) ** 5 == pytest.approx(0.5)
    assert average_decay(prior_settings(1)) == 0.0


@pytest.mark.parametrize(("micro", "world", "accumulation"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_deepspeed_is_told_how_the_global_batch_is_divided(micro: int, world: int, accumulation: int) -> None:
    config = zero_config(prior_settings(1, micro_batch=micro), world)
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["train_batch_size"] == micro * world * accumulation == 8


def test_deepspeed_is_told_the_zero_stage_and_where_the_optimizer_lives() -> None:
    for stage in (0, 1, 2, 3):
        zero = zero_config(prior_settings(1, zero_stage=stage), 2)["zero_optimization"]
        assert zero["stage"] == stage
        assert ("stage3_param_persistence_threshold" in zero) == (stage == 3)
        assert "offload_optimizer" not in zero
    offloaded = zero_config(prior_settings(1, zero_stage=2, offload_optimizer=True), 2)["zero_optimization"]
    assert offloaded["offload_optimizer"]["device"] == "cpu"
