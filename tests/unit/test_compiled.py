"""Compiled blocks compute what the blocks compute, and a machine compiles where it gains by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hvqd_model.codec.encoder import ResidualBlock
from hvqd_model.prior.denoiser import Block
from tests.tiny_training import GLOBAL_BATCH, prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training.compiled import compile_blocks, should_compile
from workflows.training.stage import Position

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """torch's settings are the process's."""
    config = torch._dynamo.config
    before = config.recompile_limit, config.suppress_errors
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.suppress_errors = before


def gradients(stage: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first batch, and its gradient."""
    output = stage.objective(*stage.batch(Position(0, 0, GLOBAL_BATCH, GLOBAL_BATCH)))
    output.loss.backward()
    return float(output.loss.detach()), {
        name: parameter.grad for name, parameter in stage.objective.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("name", ["vq", "prior"])
def test_compiled_blocks_give_the_same_loss_and_gradient(name: str) -> None:
    found = []
    for compiled in (False, True):
        stage = prior_stage(prior_settings(1)) if name == "prior" else vq_stage(vq_settings(1))
        blocks = [part for part in stage.objective.modules() if isinstance(part, Block | ResidualBlock)]
        assert blocks
        if compiled:
            torch._dynamo.utils.counters.clear()
            assert compile_blocks(stage.objective, "aot_eager", strict=True) == len(blocks)
        found.append(gradients(stage))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    (loss, plain), (compiled_loss, other) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert plain.keys() == other.keys() and len(plain) > 10
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_a_block_that_cannot_be_compiled_stays_as_it_is_unless_compiling_was_asked_for() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel for this")

    torch._dynamo.register_backend(broken, name="hvqd_broken")
    stage = prior_stage(prior_settings(1))
    compile_blocks(stage.objective, "hvqd_broken")
    loss, _ = gradients(stage)
    assert loss == gradients(prior_stage(prior_settings(1)))[0]
    torch._dynamo.reset()
    stage = prior_stage(prior_settings(1))
    compile_blocks(stage.objective, "hvqd_broken", strict=True)
    with pytest.raises(Exception, match="no kernel for this"):
        gradients(stage)


def test_a_machine_compiles_only_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert should_compile("auto", CPU, 1)[0] is False
    assert should_compile("auto", GPU, 3) == (False, "ZeRO-3 gathers parameters inside of blocks")
    assert should_compile("on", CPU, 3)[0] is True
    assert should_compile("off", GPU, 0)[0] is False
    monkeypatch.setattr("workflows.training.compiled.find_spec", lambda name: object())
    for capability, expected in (((6, 1), False), ((7, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert should_compile("auto", GPU, 2)[0] is expected
    monkeypatch.setattr("workflows.training.compiled.find_spec", lambda name: None)
    assert should_compile("auto", GPU, 2)[0] is False
