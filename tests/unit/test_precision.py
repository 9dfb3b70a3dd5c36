"""Which arithmetic is chosen, and the reason that is logged with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from workflows.training.precision import choose_precision, computing_in

CPU = torch.device("cpu")


@pytest.mark.parametrize("setting", ["fp32", "bf16"])
def test_what_is_configured_is_taken(setting: Literal["fp32", "bf16"]) -> None:
    assert choose_precision(setting, CPU) == (setting, "as configured")
    assert choose_precision(setting, torch.device("cuda")) == (setting, "as configured")


def test_a_processor_computes_in_bf16_only_with_matrix_units() -> None:
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else False
    expected = (
        ("bf16", "the processor has AMX") if has_amx else ("fp32", "without AMX bf16 is many times slower on a CPU")
    )
    assert choose_precision("auto", CPU) == expected


def test_layers_compute_in_what_was_chosen_and_weights_stay_as_they_are() -> None:
    layer = torch.nn.Linear(4, 4)
    found = {}
    for precision in ("fp32", "bf16"):
        with computing_in(precision, CPU):
            found[precision] = layer(torch.ones(1, 4)).dtype
    assert found == {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert layer.weight.dtype == torch.float32
