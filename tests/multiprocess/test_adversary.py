"""The adversary on two gloo ranks against one: same steps, same weights on both ranks, same state after a break.

With DeepSpeed around the tokenizer, at the ZeRO stages that an adversary may be trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.storage import open_store
from tests.multiprocess.ranks import WORLD, run_on_ranks
from tests.multiprocess.scenes import Cast, FetchOnly, Outcome, outcome, plain_cast, zero_cast
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, vq_settings, vq_stage
from workflows.config import AdversarialSettings
from workflows.training import collectives
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.loop import Checkpoints, train
from workflows.training.vq_stage import VQStage

ZERO_STAGES = (0, 1, 2)
STEPS = 6
every_zero_stage = pytest.mark.parametrize("zero_stage", ZERO_STAGES)

State = dict[str, Any]


@dataclass(frozen=True)
class Fought:
    """What one rank holds after a training with an adversary."""

    tokenizer: Outcome
    adversary: State


def stage_of(cast: Cast, *, codes: bool, weights: int = 0) -> VQStage:
    """Six steps, an adversary from the third on; without codes where a rounding error must not move one."""
    settings = vq_settings(
        STEPS,
        **cast.settings,
        codebook_start=0.0,
        perceptual_weight=0.5,
        adversarial=AdversarialSettings(weight=0.5, start=0.4, width=8),
        evaluate_every_images=2 * GLOBAL_BATCH,
        checkpoint_every_images=4 * GLOBAL_BATCH,
    )
    late = settings if codes else settings.model_copy(update={"codebook_start": 0.99})
    return vq_stage(late, weights, attention=False)


def fought(cast: Cast, stage: VQStage, checkpoints: Checkpoints) -> Fought:
    """Train to the end."""
    engine = cast.engine_of(stage)
    history = train(engine, stage, checkpoints, Heard()).history
    assert stage.companion is not None
    return Fought(outcome(engine, history), stage.companion.state_dict())


@dataclass(frozen=True)
class Facts:
    """What one rank found at one ZeRO stage."""

    halves: Fought
    quarters: Fought
    """The same in two micro-batches a rank."""
    whole: Fought
    """With codes, without a break."""
    broken: Fought
    """The same after four steps, a break, and two more in a stage with other weights."""


def perceptual_alone(cast: Cast) -> Outcome:
    """Six steps without an adversary, which ZeRO-3 takes as well."""
    settings = vq_settings(STEPS, **cast.settings, codebook_start=0.99, perceptual_weight=0.5)
    return cast.train(vq_stage(settings, attention=False))


def facts(zero_stage: int, folder: Path) -> Facts:
    """Everything that the tests look at, on this rank."""
    cast, parts = zero_cast(zero_stage, GLOBAL_BATCH // 2), zero_cast(zero_stage, GLOBAL_BATCH // 4)
    halves, quarters = (fought(one, stage_of(one, codes=False), GoOn()) for one in (cast, parts))
    store = open_store(str(folder))
    stage = stage_of(cast, codes=True)
    whole = fought(cast, stage, StoreCheckpoints(store, "request", 2, stage.companion))
    collectives.barrier()
    if collectives.rank() == 0:
        store.child(f"{STEPS * GLOBAL_BATCH:012d}-w{WORLD}").delete()
    collectives.barrier()
    stage = stage_of(cast, codes=True, weights=1)
    assert stage.companion is not None
    for parameter in stage.companion.parameters:
        parameter.data.zero_()
    broken = fought(cast, stage, FetchOnly(store, "request", 2, stage.companion))
    return Facts(halves, quarters, whole, broken)


def all_facts(folder: Path) -> tuple[dict[int, Facts], Outcome]:
    """On this rank, the facts of every ZeRO stage that an adversary goes with, and ZeRO-3 with features alone."""
    sharded = perceptual_alone(zero_cast(3, GLOBAL_BATCH // 2))
    return {stage: facts(stage, folder / f"zero-{stage}") for stage in ZERO_STAGES}, sharded


@pytest.fixture(scope="module")
def plain() -> Fought:
    """One process, full batch."""
    cast = plain_cast()
    return fought(cast, stage_of(cast, codes=False), GoOn())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[int, Facts], Outcome]]:
    """What each of two ranks found; started once, because a start takes many seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    results: list[tuple[dict[int, Facts], Outcome]] = run_on_ranks(all_facts, folder, folder)
    assert len(results) == WORLD and all(set(one) == set(ZERO_STAGES) for one, _ in results)
    return results


@pytest.fixture(scope="module")
def ranks(found: list[tuple[dict[int, Facts], Outcome]]) -> list[dict[int, Facts]]:
    """The facts of each rank, by ZeRO stage."""
    return [facts for facts, _ in found]


def assert_identical(one: State, other: State) -> None:
    """To the bit, all of a nested state."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_identical(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@every_zero_stage
@pytest.mark.parametrize("divided", ["halves", "quarters"])
def test_a_divided_batch_trains_adversary_and_tokenizer_as_the_whole_does(
    plain: Fought, ranks: list[dict[int, Facts]], zero_stage: int, divided: str
) -> None:
    start = stage_of(plain_cast(), codes=False).companion
    assert start is not None
    for found in ranks:
        parts: Fought = getattr(found[zero_stage], divided)
        for name, expected in plain.adversary["network"].items():
            torch.testing.assert_close(parts.adversary["network"][name], expected, rtol=0, atol=2e-5)
        moved = plain.adversary["network"]["layers.0.weight"] - start.network.state_dict()["layers.0.weight"]
        assert float(moved.abs().max()) > 1e-4, "it has learned"
        assert math.isclose(parts.adversary["factor"], plain.adversary["factor"], rel_tol=1e-3)
        for name, expected in plain.tokenizer.weights.items():
            torch.testing.assert_close(parts.tokenizer.weights[name], expected, rtol=0, atol=1e-4)
        metrics = {"perceptual", "adversarial", "adaptive_weight", "discriminator"}
        last, expected_last = parts.tokenizer.history[-2], plain.tokenizer.history[-2]
        assert metrics <= last.keys()
        for name in metrics:
            assert math.isclose(last[name], expected_last[name], rel_tol=1e-3, abs_tol=1e-5), name


@every_zero_stage
def test_both_ranks_hold_the_same_adversary_to_the_bit(ranks: list[dict[int, Facts]], zero_stage: int) -> None:
    one, other = (found[zero_stage] for found in ranks)
    for name in ("halves", "quarters", "whole", "broken"):
        assert_identical(getattr(one, name).adversary, getattr(other, name).adversary)
    assert one.whole.adversary["started"] and float(one.whole.adversary["factor"]) > 0


@every_zero_stage
def test_resume_equals_an_uninterrupted_run_to_the_bit(ranks: list[dict[int, Facts]], zero_stage: int) -> None:
    for found in ranks:
        whole, broken = found[zero_stage].whole, found[zero_stage].broken
        assert_identical(broken.adversary, whole.adversary)
        for part in ("weights", "moments", "buffers"):
            assert_identical(getattr(broken.tokenizer, part), getattr(whole.tokenizer, part))
        assert broken.tokenizer.history == whole.tokenizer.history


def test_features_judge_under_zero_3_as_they_do_in_plain_torch(
    found: list[tuple[dict[int, Facts], Outcome]],
) -> None:
    expected = perceptual_alone(plain_cast())
    for _, sharded in found:
        for name, value in expected.weights.items():
            torch.testing.assert_close(sharded.weights[name], value, rtol=0, atol=1e-4)
        last, expected_last = sharded.history[-2], expected.history[-2]
        assert math.isclose(last["perceptual"], expected_last["perceptual"], rel_tol=1e-4)
