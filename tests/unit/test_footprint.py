"""Walking through a model without computing it: bytes alive and operations, against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvqd_model.prior.attention import attend
from tests.tiny_training import code_table, prior_settings, prior_stage
from workflows.planning.footprint import walk, without_memory

BATCH, WIDTH, HIDDEN = 8, 16, 32


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, 1, bias=False))


def test_operations_of_a_linear_network_are_those_counted_by_hand() -> None:
    with without_memory():
        model = two_layers()
    found = walk(model, lambda: model(torch.zeros(BATCH, WIDTH)).sum(), on_gpu=False)
    forward = 2 * BATCH * WIDTH * HIDDEN + 2 * BATCH * HIDDEN
    # Backward: both weights' gradients, and the second layer's input's; nobody asks for the pictures' own gradient.
    backward = 2 * BATCH * WIDTH * HIDDEN + 2 * 2 * BATCH * HIDDEN
    assert found.flops == {"matrix_fp32": forward + backward}
    assert found.largest_parameter_bytes == 4 * WIDTH * HIDDEN


def test_what_is_kept_for_backward_counts_until_it_is_used() -> None:
    with without_memory():
        model = nn.Sequential(*[nn.Tanh() for _ in range(5)])
        model.append(nn.Linear(WIDTH, WIDTH, bias=False))
    inputs = torch.zeros(BATCH, WIDTH)
    found = walk(model, lambda: model[:5](model[5](inputs)).sum(), on_gpu=False)
    one = 4 * BATCH * WIDTH
    # Five results of tanh are kept; the first layer's own is not, and the gradient on its way needs one or two more.
    assert 5 * one <= found.transient_bytes <= 8 * one + 64


def test_without_gradients_kept_the_growing_peak_is_no_larger_than_activations_and_gradients() -> None:
    with without_memory():
        model = two_layers()
    found = walk(model, lambda: model(torch.zeros(BATCH, WIDTH)).sum(), on_gpu=False)
    gradients = 4 * (WIDTH * HIDDEN + HIDDEN)
    assert found.transient_bytes <= found.growing_bytes <= found.transient_bytes + gradients
    assert all(parameter.grad is None for parameter in model.parameters())


def prior_step(**architecture: object) -> tuple[nn.Module, dict[str, Tensor]]:
    settings = prior_settings(1)
    stage = prior_stage(settings, **architecture)
    table = code_table(8)
    keys = torch.arange(8)
    inputs = {
        "codes": table.batch(keys.numpy()),
        "labels": torch.zeros(8, dtype=torch.int64),
        "times": (keys.double() + 0.5) / 8,
        "keys": keys,
    }
    return stage.objective, inputs  # type: ignore[return-value]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_prior_is_walked_through_with_its_data_dependent_parts(on_gpu: bool) -> None:
    with without_memory():
        objective, inputs = prior_step(depth=2)
    assert sum(parameter.untyped_storage().device.type == "meta" for parameter in objective.parameters()) > 10
    found = walk(objective, lambda: objective(*inputs.values()).loss, on_gpu=on_gpu)
    assert found.total_flops > 0 and found.transient_bytes > 0 and found.operations > 100


@pytest.mark.parametrize("on_gpu", [False, True])
def test_checkpointing_trades_operations_for_memory(on_gpu: bool) -> None:
    found = []
    for checkpointing in (False, True):
        with without_memory():
            objective, inputs = prior_step(depth=8, width=64, activation_checkpointing=checkpointing)
        found.append(walk(objective, lambda o=objective, i=inputs: o(*i.values()).loss, on_gpu=on_gpu))
    plain, recomputed = found
    assert recomputed.transient_bytes < 0.5 * plain.transient_bytes
    assert plain.total_flops * 1.2 < recomputed.total_flops < plain.total_flops * 1.4, "a forward more, of three"


def test_fused_attention_keeps_no_scores() -> None:
    tokens, heads, width = 64, 2, 8
    found = []
    for on_gpu in (False, True):
        with without_memory():
            layer = nn.Linear(width, 3 * heads * width)

        def step(layer: nn.Linear = layer) -> Tensor:
            parts = layer(torch.zeros(1, tokens, width)).view(1, tokens, 3, heads, width).unbind(2)
            return attend(*parts).sum()

        found.append(walk(layer, step, on_gpu=on_gpu))
    scores = 4 * heads * tokens**2
    assert found[0].transient_bytes - found[1].transient_bytes > scores
    products = 2 * heads * tokens**2 * width
    shared = 2 * 2 * tokens * width * 3 * heads * width  # the linear layer, and its weight's gradient
    assert found[0].total_flops == shared + 6 * products
    assert found[1].total_flops == shared + 7 * products, "the scores once more"


def test_modules_built_afterwards_have_memory_again() -> None:
    with without_memory():
        hollow = nn.Linear(2, 2)
    whole = nn.Linear(2, 2)
    assert type(hollow.weight).__name__ == "FakeTensor"
    assert type(whole.weight) is nn.Parameter
