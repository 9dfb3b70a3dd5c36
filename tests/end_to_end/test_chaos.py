"""Trainings that are killed and started again; the long form is tests/benchmarks/chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import Victim, copy_inputs, differences, outcome, run_disturbed
from tests.command_line import environment
from tests.conftest import FinishedRun

_SOON = 15
"""A seed that lets the kill come a moment after the first checkpoint."""


@pytest.mark.parametrize(
    ("stage", "inputs", "victim"),
    [("vq", ("dataset",), "driver"), ("prior", ("dataset", "vq", "codes"), "everything")],
)
def test_what_a_killed_training_leaves_is_gone_on_with_to_the_bit_also_in_the_tracker(
    finished_run: FinishedRun, tmp_path: Path, stage: str, inputs: tuple[str, ...], victim: Victim
) -> None:
    root = tmp_path / "run"
    copy_inputs(finished_run.root, root, inputs)
    command = ("train", stage, "--preset", "integration")
    course = run_disturbed(root, environment(tmp_path), command, stage, [victim], seed=_SOON)
    assert (course.kills, course.starts) == ([victim], 2)
    assert differences(outcome(root, stage), outcome(finished_run.root, stage)) == []
