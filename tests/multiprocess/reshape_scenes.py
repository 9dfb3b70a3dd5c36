"""A training that changes its number of ranks and its ZeRO stage on the way; what each rank holds is told to the tests.

Two ranks train and save; one rank reads that, writes it again as it is and trains on; two ranks read what the one
wrote. Beside them two ranks go on without a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.storage import open_store
from tests.multiprocess.scenes import AnyStage, Cast, Outcome, outcome
from tests.tiny_training import GLOBAL_BATCH, Heard
from workflows.training import collectives
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.engine import Engine
from workflows.training.loop import TrainState, train
from workflows.training.zero import ZeroEngine

BEFORE, AFTER = 4, 20
"""Steps before and after the change."""
CASES = {
    "prior, fp32": ("prior", "fp32"),
    "prior, bf16": ("prior", "bf16"),
    "vq, fp32": ("vq", "fp32"),
}
SOURCES = (2, 3)
"""ZeRO stages that the first two ranks train at."""


def stage_of(case: str, zero_stage: int, world: int, steps: int, seed: int) -> tuple[AnyStage, Engine]:
    """A stage with weights from the seed, some of them frozen, and its engine."""
    kind, precision = CASES[case]
    settings: dict[str, Any] = {
        "micro_batch": GLOBAL_BATCH // 2 // world,
        "zero_stage": zero_stage,
        "ema_half_life_images": 40,
        "precision": precision,
        "images": steps * GLOBAL_BATCH,
    }
    cast = Cast(lambda stage: ZeroEngine(stage.objective, stage.settings, torch.device("cpu")), settings)
    stage: AnyStage
    if kind == "vq":
        # Started early and not restarted: codes that change for a rounding error would change everything after it.
        stage = cast.vq(steps, seed, codebook_start=0.0, architecture={"restart_threshold": 0.0})
    else:
        stage = cast.prior(steps, seed)
        stage.objective.precision = precision
    parameters = list(stage.model.parameters())
    for parameter in (parameters[0], max(parameters, key=lambda found: found.numel())):
        parameter.requires_grad_(False)
    return stage, cast.engine_of(stage)


@dataclass(frozen=True)
class Passage:
    """What one rank held at the change, and the losses of the steps after it."""

    held: Outcome
    averages: dict[str, torch.Tensor]
    """Exported: the moving average; on rank 0."""
    losses: list[float]


def passage(engine: Engine, stage: AnyStage, state: TrainState, *, go_on: bool) -> Passage:
    """What the engine holds now, and the losses of the twenty steps that follow."""
    held = outcome(engine, list(state.history))
    losses: list[float] = []
    if go_on:
        history = train(engine, stage, _From(state), Heard()).history
        after = [record for record in history if record["images"] > BEFORE * GLOBAL_BATCH]
        losses = [record["loss"] for record in after if "loss" in record]
        assert len(losses) == AFTER
    return Passage(held, held.exported, losses)


@dataclass
class _From:
    """Goes on with the engine as it stands, from a given state."""

    state: TrainState

    def restore(self, engine: Engine) -> TrainState:
        """That state."""
        return self.state

    def save(self, engine: Engine, state: TrainState) -> None:
        """Nothing is kept."""


def _checkpoints(folder: Path) -> StoreCheckpoints:
    return StoreCheckpoints(open_store(str(folder)), "request", keep=2)


def first_two(folder: Path) -> dict[tuple[str, int], Passage]:
    """Train and save at each ZeRO stage, then go on undisturbed."""
    found = {}
    for case in CASES:
        for source in SOURCES:
            stage, engine = stage_of(case, source, 2, BEFORE, seed=0)
            state = train(engine, stage, _checkpoints(folder / f"{case} {source}"), Heard())
            stage.settings = stage.settings.model_copy(update={"images": (BEFORE + AFTER) * GLOBAL_BATCH})
            found[case, source] = passage(engine, stage, state, go_on=True)
    return found


def read_again(folder: Path, zero_stages: dict[int, int], written: str = "") -> dict[tuple[str, int], Passage]:
    """Read what was saved at other ZeRO stages, write it elsewhere as it is, and go on.

    Args:
        zero_stages: the stage to read at, by the stage it was written at.
        written: the name under which it is saved again; empty for not at all, and for no going on.
    """
    found = {}
    for case in CASES:
        for source, target in zero_stages.items():
            stage, engine = stage_of(case, target, collectives.world_size(), BEFORE + AFTER, seed=1)
            state = _checkpoints(folder / f"{case} {source}").restore(engine)
            assert state.images_seen == BEFORE * GLOBAL_BATCH
            if written:
                _checkpoints(folder / written / f"{case} {source}").save(engine, state)
            found[case, source] = passage(engine, stage, state, go_on=bool(written))
    return found
