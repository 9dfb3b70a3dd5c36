"""The loop with the plain engine, both stages: what a run does depends on its settings and its position alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import InputError
from infra.storage import open_store
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.engine import Engine
from workflows.training.loop import StepBack, Stopped, TrainState, train
from workflows.training.plain import PlainEngine
from workflows.training.prior_stage import PriorStage
from workflows.training.stage import Position, learning_rate_at
from workflows.training.vq_stage import VQStage

AnyStage = VQStage | PriorStage
BOTH = pytest.mark.parametrize("kind", ["vq", "prior"])


def stage_of(kind: str, steps: int, weights: int = 0, codebook_start: float = 0.3, **settings: Any) -> AnyStage:
    """A stage of the kind, with fresh weights drawn from the seed `weights`."""
    if kind == "vq":
        return vq_stage(vq_settings(steps, codebook_start=codebook_start, **settings), weights, attention=False)
    return prior_stage(prior_settings(steps, **settings), weights, depth=1)


def engine_of(stage: AnyStage) -> PlainEngine:
    return PlainEngine(stage.objective, stage.settings, torch.device("cpu"))


def everything(engine: PlainEngine) -> dict[str, Tensor]:
    """Weights, buffers, their average and the optimizer's state, copied."""
    found = {f"module.{name}": tensor.clone() for name, tensor in engine.module.state_dict().items()}
    found |= {f"exported.{name}": tensor for name, tensor in engine.export().items()}
    for index, state in engine.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value.clone() for name, value in state.items()}
    return found


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class StopsAfter(Heard):
    """A reporter that stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Stop when it is time."""
        super().progress(images_seen, total, note)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@BOTH
@pytest.mark.parametrize("stopped_after", [3, 5])
def test_resume_equals_an_uninterrupted_run_to_the_bit(kind: str, stopped_after: int, tmp_path: Path) -> None:
    settings = {
        "checkpoint_every_images": 2 * GLOBAL_BATCH,
        "evaluate_every_images": 3 * GLOBAL_BATCH,
        "log_every_images": 4 * GLOBAL_BATCH,
        "ema_half_life_images": 20,
    }
    whole = engine_of(stage := stage_of(kind, 6, **settings))
    history = train(whole, stage, StoreCheckpoints(open_store(str(tmp_path / "a")), "r", 2), Heard()).history

    store = open_store(str(tmp_path / "b"))
    broken = engine_of(stage := stage_of(kind, 6, **settings))
    with pytest.raises(KeyboardInterrupt):
        train(broken, stage, StoreCheckpoints(store, "r", 2), StopsAfter(stopped_after))
    heard = Heard()
    resumed = engine_of(stage := stage_of(kind, 6, weights=1, **settings))
    state = train(resumed, stage, StoreCheckpoints(store, "r", 2), heard)

    assert_identical(everything(resumed), everything(whole))
    assert state.history == history
    assert heard.steps[0][0] == (stopped_after - stopped_after % 2 + 1) * GLOBAL_BATCH, "from the newest checkpoint"
    past = [record for records, _ in heard.past for record in records]
    assert past + heard.records == history, "a listener that heard nothing before knows all in the end"


@BOTH
def test_a_finished_run_does_nothing_when_started_again(kind: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = engine_of(stage := stage_of(kind, 2))
    state = train(first, stage, StoreCheckpoints(store, "r", 2), Heard())
    heard = Heard()
    again = engine_of(stage := stage_of(kind, 2, weights=1))
    assert train(again, stage, StoreCheckpoints(store, "r", 2), heard) == state
    assert (heard.steps, heard.records) == ([], [])
    assert_identical(again.export(), first.export())


@BOTH
def test_the_order_and_the_draws_do_not_depend_on_how_a_batch_is_divided(kind: str) -> None:
    stage = stage_of(kind, 1)
    whole = stage.batch(Position(images_seen=16, offset=0, count=8, global_batch=8))
    parts = [stage.batch(Position(images_seen=16, offset=first, count=2, global_batch=8)) for first in (0, 2, 4, 6)]
    for index, expected in enumerate(whole):
        if isinstance(expected, tuple):
            joined = tuple(torch.cat([part[index][level] for part in parts]) for level in range(len(expected)))
        else:
            joined = (torch.cat([part[index] for part in parts]),)
            expected = (expected,)
        assert all(torch.equal(a, b) for a, b in zip(joined, expected, strict=True))


@BOTH
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulated_micro_batches_train_as_the_whole_batch_does(kind: str, micro_batch: int) -> None:
    # Before any code is chosen: a rounding error must not move a code.
    found = []
    for size in (GLOBAL_BATCH, micro_batch):
        engine = engine_of(stage := stage_of(kind, 1, codebook_start=0.99, micro_batch=size))
        history = train(engine, stage, GoOn(), Heard()).history
        moments = {name: engine.optimizer.state[p]["exp_avg"] for name, p in engine.module.named_parameters()}
        found.append((moments, history[0]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert found[1][1]["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-5)


def test_times_of_a_global_batch_are_evenly_spread_and_move_from_step_to_step() -> None:
    stage = stage_of("prior", 1)
    times = [stage.batch(Position(seen, 0, 8, 8))[2] for seen in (0, 8)]
    for found in times:
        torch.testing.assert_close(found.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))
        assert 0 <= float(found.min()) <= float(found.max()) < 1
    assert not torch.equal(times[0].sort().values, times[1].sort().values)


@pytest.mark.parametrize(("share", "step"), [(0.0, 0), (0.5, 3), (0.4, 3)])
def test_codebooks_start_once_at_their_share_of_the_budget(share: float, step: int) -> None:
    engine = engine_of(stage := stage_of("vq", 6, codebook_start=share))
    history = train(engine, stage, GoOn(), Heard()).history
    started = [record["images"] for record in history if "codebooks_started" in record]
    assert started == [step * GLOBAL_BATCH]
    alignments = [record["alignment_1"] for record in history if "alignment_1" in record]
    assert [value > 0 for value in alignments] == [False] * step + [True] * (6 - step)
    assert all(stage.model.started(level) for level in range(2))


def test_the_average_restarts_from_the_weights_when_codebooks_are_written() -> None:
    stage = vq_stage(vq_settings(4, codebook_start=0.5, ema_half_life_images=400), quantizer="gradient")
    engine = engine_of(stage)
    stage.settings = stage.settings.model_copy(update={"images": 2 * GLOBAL_BATCH, "codebook_start": 0.99})
    train(engine, stage, GoOn(), Heard())
    with engine.editing(()):
        pass
    assert not torch.equal(engine.average[0], engine.parameters[0])
    stage.settings = stage.settings.model_copy(update={"codebook_start": 0.0})
    assert stage.before_step(engine, 2 * GLOBAL_BATCH)["codebooks_started"] == 2
    assert all(torch.equal(average, weight) for average, weight in zip(engine.average, engine.parameters, strict=True))
    assert stage.before_step(engine, 3 * GLOBAL_BATCH) == {}


class BadPicture(VQStage):
    """Stage 1 whose fourth step meets a picture that is not a number."""

    def batch(self, position: Position) -> tuple[Any, ...]:
        """One bad picture."""
        images, keys = super().batch(position)
        if position.images_seen == 3 * GLOBAL_BATCH:
            images[0] = torch.inf
        return images, keys


def test_a_step_that_is_not_finite_is_left_out_and_the_next_one_is_taken() -> None:
    good = stage_of("vq", 6, ema_half_life_images=20)
    assert isinstance(good, VQStage)
    stage = BadPicture(good.model, good.settings, good.seed, "fp32", good.train, good.validation)
    engine = engine_of(stage)
    states = []
    heard = Heard()
    for step in (3, 4, 5):
        stage.settings = good.settings.model_copy(update={"images": step * GLOBAL_BATCH, "codebook_start": 0})
        train(engine, stage, GoOn((step - 1) * GLOBAL_BATCH if step > 3 else 0), heard)
        states.append(everything(engine))
    assert stage.model.started(1)
    assert_identical(states[1], states[0])
    changed = [name for name in states[2] if not torch.equal(states[2][name], states[1][name])]
    assert {name.split(".")[0] for name in changed} == {"module", "exported", "optimizer"}
    assert "module.model.quantizers.1.embedding" in changed
    notes = [note for _, _, note in heard.steps]
    assert "left out" in notes[3] or "loss nan" in notes[3]
    assert all(torch.isfinite(value).all() for value in states[2].values())


@BOTH
def test_records_come_at_their_intervals_and_at_the_end(kind: str) -> None:
    settings = {"log_every_images": 2 * GLOBAL_BATCH, "evaluate_every_images": 3 * GLOBAL_BATCH}
    engine = engine_of(stage := stage_of(kind, 7, checkpoint_every_images=4 * GLOBAL_BATCH, **settings))
    heard, kept = Heard(), GoOn()
    state = train(engine, stage, kept, heard)
    logged = [record["images"] // GLOBAL_BATCH for record in heard.records if "loss" in record]
    evaluated = [
        record["images"] // GLOBAL_BATCH for record in heard.records if any(name.startswith("val_") for name in record)
    ]
    assert (logged, evaluated) == ([2, 4, 6, 7], [3, 6, 7])
    assert [images // GLOBAL_BATCH for images in kept.saved] == [4, 7]
    assert heard.records == state.history
    assert [images for images, _, _ in heard.steps] == [step * GLOBAL_BATCH for step in range(1, 8)]
    assert all(total == 7 * GLOBAL_BATCH for _, total, _ in heard.steps)


@BOTH
def test_a_budget_that_is_no_multiple_of_the_batch_ends_after_the_step_that_passes_it(kind: str) -> None:
    engine = engine_of(stage := stage_of(kind, 1, images=GLOBAL_BATCH + 1))
    heard = Heard()
    assert train(engine, stage, GoOn(), heard).images_seen == 2 * GLOBAL_BATCH
    assert heard.steps[-1][:2] == (GLOBAL_BATCH + 1, GLOBAL_BATCH + 1)


@BOTH
def test_evaluation_changes_nothing_and_repeats_itself(kind: str) -> None:
    engine = engine_of(stage := stage_of(kind, 3))
    train(engine, stage, GoOn(), Heard())
    before = everything(engine)
    figures = []
    for _ in range(2):
        engine.module.eval()
        with torch.no_grad():
            figures.append(stage.evaluate(engine))
        engine.module.train()
    assert figures[0] == figures[1]
    expected = {"val_psnr", "val_psnr_prefix_1", "val_psnr_mean_picture"} | {
        f"{name}_{level}"
        for name in ("val_perplexity", "val_vector_norm", "val_code_norm", "codebook_norm")
        for level in (0, 1)
    }
    assert figures[0].keys() == (expected if kind == "vq" else {"val_bits_0", "val_bits_1", "val_bits_total"})
    assert_identical(everything(engine), before)


class FailsToSave(GoOn):
    """A store that is full."""

    def save(self, engine: Engine, state: TrainState) -> None:
        """The disk is full."""
        raise OSError("no space left")


def test_what_checkpoints_raise_is_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(stage := stage_of("prior", 1))
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="no space left"):
        train(engine, stage, FailsToSave(), Heard())


# ---- stopped in between ----


@BOTH
@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(kind: str, stop_after: int, tmp_path: Path) -> None:
    settings = {
        "checkpoint_every_images": 4 * GLOBAL_BATCH,
        "evaluate_every_images": 6 * GLOBAL_BATCH,
        "log_every_images": 3 * GLOBAL_BATCH,
        "ema_half_life_images": 20,
    }
    whole = engine_of(stage := stage_of(kind, 8, **settings))
    history = train(whole, stage, StoreCheckpoints(open_store(str(tmp_path / "a")), "r", 2), Heard()).history

    store, asked = open_store(str(tmp_path / "b")), [0] * (stop_after - 1) + [7]
    stage = stage_of(kind, 8, **settings)
    with pytest.raises(Stopped, match="stopped by order 7") as stopped:
        train(engine_of(stage), stage, StoreCheckpoints(store, "r", 2), Heard(), pending_order=lambda: asked.pop(0))
    assert stopped.value.order == 7
    heard = Heard()
    resumed = engine_of(stage := stage_of(kind, 8, weights=1, **settings))
    state = train(resumed, stage, StoreCheckpoints(store, "r", 2), heard)
    assert heard.steps[0][0] == (stop_after + 1) * GLOBAL_BATCH, "nothing is done again"
    assert_identical(everything(resumed), everything(whole))
    assert state.history == history


# ---- a run of non-finite steps ----


class Explodes(VQStage):
    """Stage 1 whose pictures are no numbers from a step on, unless the learning rate has been lowered often enough."""

    from_step = 5
    until_setbacks = 99

    def __init__(self, stage: VQStage) -> None:
        self.__dict__.update(stage.__dict__)
        self.seen_rates: list[float] = []

    def batch(self, position: Position) -> tuple[Any, ...]:
        """Bad pictures."""
        images, keys = super().batch(position)
        if position.images_seen >= self.from_step * GLOBAL_BATCH and self.setbacks < self.until_setbacks:
            images[0] = torch.nan
        return images, keys

    setbacks = 0


def exploding(until_setbacks: int, folder: Path, checkpoint_every: int = 2) -> tuple[Explodes, Any, StoreCheckpoints]:
    """The stage, how to step back from it, and its checkpoints."""
    good = stage_of("vq", 12, checkpoint_every_images=checkpoint_every * GLOBAL_BATCH, codebook_start=0.0)
    assert isinstance(good, VQStage)
    stage = Explodes(good)
    stage.until_setbacks = until_setbacks
    kept = StoreCheckpoints(open_store(str(folder)), "r", 10)

    def restore(engine: Engine, before: int | None) -> TrainState:
        stage.setbacks += 1
        return kept.step_back(engine, before)

    return stage, StepBack(after_steps=3, at_most=2, factor=0.5, restore=restore), kept


def test_a_run_of_bad_steps_leads_back_to_the_newest_checkpoint_with_half_the_learning_rate(tmp_path: Path) -> None:
    stage, rule, kept = exploding(1, tmp_path)
    engine, heard = engine_of(stage), Heard()
    state = train(engine, stage, kept, heard, step_back=rule)
    assert state.images_seen == 12 * GLOBAL_BATCH
    assert state.setbacks == [{"images": 8 * GLOBAL_BATCH, "to": 4 * GLOBAL_BATCH}]
    rates = {record["images"] // GLOBAL_BATCH: record["learning_rate"] for record in state.history if "loss" in record}
    assert list(rates) == list(range(1, 13)), "no gap and no double point"
    undisturbed = [learning_rate_at((step - 1) * GLOBAL_BATCH, stage.settings) for step in rates]
    expected = [rate * (1 if step <= 4 else 0.5) for step, rate in zip(rates, undisturbed, strict=True)]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-5)
    assert any("stepped back: 3 steps in a row were not finite before image 64" in note for _, _, note in heard.steps)
    assert all(torch.isfinite(value).all() for value in everything(engine).values())


def test_a_setback_that_did_not_help_leads_further_back_and_a_restart_remembers_it(tmp_path: Path) -> None:
    stage, rule, kept = exploding(2, tmp_path)
    state = train(engine_of(stage), stage, kept, Heard(), step_back=rule)
    assert [entry["to"] // GLOBAL_BATCH for entry in state.setbacks] == [4, 2]
    again = train(engine_of(stage), stage, kept, Heard(), step_back=rule)
    assert again.setbacks == state.setbacks


def test_after_so_many_setbacks_the_training_stops_with_the_reason(tmp_path: Path) -> None:
    stage, rule, kept = exploding(99, tmp_path)
    with pytest.raises(
        InputError,
        match=r"training vq stopped at a learning rate of 0\.000\d+: 3 steps in a row were not finite before image .*, "
        r"after 2 setbacks\nhint: lower vq\.train\.learning_rate or .*precision=fp32",
    ):
        train(engine_of(stage), stage, kept, Heard(), step_back=rule)


def test_without_a_checkpoint_to_go_back_to_the_training_stops_with_the_reason(tmp_path: Path) -> None:
    stage, rule, kept = exploding(99, tmp_path, checkpoint_every=100)
    with pytest.raises(InputError, match=r"and there is no checkpoint to go back to\nhint: "):
        train(engine_of(stage), stage, kept, Heard(), step_back=rule)
