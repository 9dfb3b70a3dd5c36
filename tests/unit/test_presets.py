"""Every preset is whole, says what it is for, and keeps the promise that the prior is the larger model."""

from __future__ import annotations

import pytest
import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig
from workflows.config import RunConfig
from workflows.loading import config_from, load_config, preset_names, preset_path, preset_summary, to_yaml

PROMISED = ["base", "cpu", "integration", "large", "small", "tiny"]


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prior_config(config: RunConfig) -> PriorConfig:
    vq = config.vq_config
    return PriorConfig(
        **config.prior.model.model_dump(),
        grids=vq.grids,
        codebook_sizes=vq.codebook_sizes,
        code_dim=vq.code_dim,
        classes=("one", "two"),
    )


def test_the_presets_are_those_the_documentation_promises() -> None:
    assert preset_names() == PROMISED


@pytest.mark.parametrize("name", PROMISED)
def test_the_prior_is_the_larger_model(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        vq, prior = HierarchicalVQ(config.vq_config), HierarchicalPrior(prior_config(config))
    assert parameters(prior) > parameters(vq)


@pytest.mark.parametrize("name", PROMISED)
def test_a_preset_states_only_what_differs_from_the_defaults_and_says_what_it_is_for(name: str) -> None:
    config = load_config(name)
    assert config.root == f"runs/{name}"
    assert preset_path(name).read_text().startswith("# ") and len(preset_summary(name)) > 20
    assert to_yaml(config) == to_yaml(config_from(config.model_dump(mode="json")))


def test_the_small_machine_presets_have_few_enough_codes() -> None:
    assert load_config("tiny").vq_config.tokens <= 84
