"""Two ranks, then one, then two, at changing ZeRO stages: the state is the same to the bit, and training agrees."""

from __future__ import annotations

import pytest
import torch

from tests.multiprocess.ranks import run_on_ranks
from tests.multiprocess.reshape_scenes import CASES, SOURCES, Passage, first_two, read_again
from tests.multiprocess.scenes import Tensors

Passages = dict[tuple[str, int], Passage]
EVERY = pytest.mark.parametrize(("case", "source"), [(case, source) for case in CASES for source in SOURCES])


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Passages]:
    """What rank 0 held before the changes and after each."""
    folder = tmp_path_factory.mktemp("reshape")
    places = {name: tmp_path_factory.mktemp(name) for name in ("two", "one", "swapped", "again")}
    return {
        "two": run_on_ranks(first_two, places["two"], folder)[0],
        # ZeRO-2 on two to ZeRO-1 on one (which shares nothing, and becomes 0); ZeRO-3 on two to ZeRO-3 on one.
        "one": run_on_ranks(read_again, places["one"], folder, {2: 1, 3: 3}, "by-one", world=1)[0],
        "swapped": run_on_ranks(read_again, places["swapped"], folder, {2: 3, 3: 2}, "by-two")[0],
        "again": run_on_ranks(read_again, places["again"], folder / "by-one", {2: 2, 3: 1})[0],
    }


def assert_identical(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 0
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@EVERY
@pytest.mark.parametrize("after", ["one", "swapped", "again"])
def test_the_state_is_the_same_to_the_bit_whoever_reads_it(
    passages: dict[str, Passages], case: str, source: int, after: str
) -> None:
    before, now = passages["two"][case, source], passages[after][case, source]
    for part in ("weights", "buffers", "exported"):
        assert_identical(getattr(now.held, part), getattr(before.held, part))
    assert now.held.history == before.held.history
    frozen = [name for name in before.held.weights if name not in before.held.moments]
    assert len(frozen) == 2
    moments = before.held.moments
    assert_identical({name: now.held.moments[name] for name in moments}, moments)
    assert max(float(moment.abs().max()) for moment in moments.values()) > 0, "there is something to lose"
    assert any(not torch.equal(before.averages[name], before.held.weights[name]) for name in moments)


@EVERY
@pytest.mark.parametrize("after", ["one", "swapped"])
def test_the_losses_of_twenty_steps_agree_with_those_of_an_undisturbed_run(
    passages: dict[str, Passages], case: str, source: int, after: str
) -> None:
    undisturbed, changed = passages["two"][case, source].losses, passages[after][case, source].losses
    assert len(changed) == 20
    assert max(abs(a - b) for a, b in zip(changed, undisturbed, strict=True)) < 1e-3
    assert max(undisturbed) - min(undisturbed) > 1e-2, "the losses move by more than what is allowed"
