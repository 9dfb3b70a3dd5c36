"""What is trained to compare engines: each scene runs the same with any engine and says what came out.

`play` runs all of them on one rank; the tests play them once in plain torch on the full batch and once for each ZeRO
stage on two ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.storage import Store, open_store
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training import collectives
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.engine import Engine
from workflows.training.loop import Record, train
from workflows.training.plain import PlainEngine
from workflows.training.precision import Precision
from workflows.training.prior_stage import PriorStage
from workflows.training.stage import Position
from workflows.training.vq_stage import VQStage
from workflows.training.zero import ZeroEngine

Tensors = dict[str, Tensor]
AnyStage = VQStage | PriorStage

LARGE_CODEBOOKS: dict[str, dict[str, Any]] = {
    "gradient": {"quantizer": "gradient", "code_dim": 63, "codebook_sizes": (8, 161)},
    "simvq": {"quantizer": "simvq", "code_dim": 103},
}
"""Codebooks that learn by gradient, with more than the 10,000 weights below which ZeRO-3 shards nothing, and an odd
number of them: two ranks do not divide it."""
PYRAMID: dict[str, Any] = {
    "hierarchy": "pyramid",
    "quantizer": "fsq",
    "fsq_steps": ((9, 5, 5), (5, 3, 3)),
    "codebook_sizes": (225, 45),
    "rate_weight": 0.1,
    "blocks": 2,
}
"""Levels whose bits have a price, of a learned law."""
NESTED_PYRAMID: dict[str, Any] = {"hierarchy": "nested-pyramid", "blocks": 2, "level_dropout": 0.3}


@dataclass(frozen=True)
class Outcome:
    """What one rank holds after a scene."""

    exported: Tensors
    """What would be exported (the average of the weights where there is one); whole on rank 0, empty elsewhere."""
    weights: Tensors
    """The weights themselves, whole."""
    moments: Tensors
    """AdamW's first moments, whole: after one step, the clipped gradient times 1 - beta."""
    buffers: Tensors
    """This rank's own buffers, the codebooks among them."""
    history: list[Record]


@dataclass(frozen=True)
class Cast:
    """Who plays: an engine, and how the global batch is divided."""

    engine_of: Callable[[AnyStage], Engine]
    settings: dict[str, Any]
    """Of the engine, for both stages' settings."""

    def vq(self, steps: int, weights: int = 0, architecture: dict[str, Any] | None = None, **settings: Any) -> VQStage:
        """The stage to train."""
        return vq_stage(vq_settings(steps, **(self.settings | settings)), weights, **(architecture or {}))

    def prior(
        self,
        steps: int,
        weights: int = 0,
        architecture: dict[str, Any] | None = None,
        precision: Precision = "fp32",
        **settings: Any,
    ) -> PriorStage:
        """The stage to train."""
        chosen = prior_settings(steps, **(self.settings | settings))
        return prior_stage(chosen, weights, precision, **(architecture or {}))

    def train(self, stage: AnyStage) -> Outcome:
        """The outcome of training from the start to the end."""
        engine = self.engine_of(stage)
        return outcome(engine, train(engine, stage, GoOn(), Heard()).history)


def plain_cast() -> Cast:
    """One process on the full batch."""
    device = torch.device("cpu")
    return Cast(lambda stage: PlainEngine(stage.objective, stage.settings, device), {"micro_batch": GLOBAL_BATCH})


def zero_cast(zero_stage: int, micro_batch: int) -> Cast:
    """This rank of a DeepSpeed job."""
    device = torch.device("cpu")
    return Cast(
        lambda stage: ZeroEngine(stage.objective, stage.settings, device),
        {"micro_batch": micro_batch, "zero_stage": zero_stage},
    )


def outcome(engine: Engine, history: list[Record]) -> Outcome:
    """What the engine holds; called on every rank."""
    named = dict(engine.module.named_parameters())
    if isinstance(engine, ZeroEngine):
        weights = {name: engine._whole(parameter).clone() for name, parameter in named.items()}
    else:
        weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    if isinstance(engine, ZeroEngine) and engine.stage in (1, 2):
        # DeepSpeed links states to weights when the first group has stepped: the second has none by then.
        engine._engine.optimizer._hp_optimizer_states_linked = False
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    moments = {name: _moment(engine, parameter).clone() for name, parameter in trained.items()}
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return Outcome(engine.export(), weights, moments, buffers, history)


def _moment(engine: Engine, parameter: torch.nn.Parameter) -> Tensor:
    if isinstance(engine, PlainEngine):
        return engine.optimizer.state[parameter]["exp_avg"]  # type: ignore[no-any-return]
    assert isinstance(engine, ZeroEngine)
    if engine.stage == 0:
        return engine._engine.optimizer.state[parameter]["exp_avg"]  # type: ignore[no-any-return]
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, "exp_avg")  # type: ignore[no-any-return]


# ---- compared with plain torch ----


def compared_scenes(cast: Cast) -> dict[str, Outcome]:
    """Every scene whose outcome must not depend on the engine, by name."""
    scenes = {
        "prior, one step": cast.prior(1),
        "prior, twenty steps": cast.prior(20, ema_half_life_images=40),
        "prior, twenty steps in bf16": cast.prior(20, precision="bf16", ema_half_life_images=40),
        "prior, levels apart": cast.prior(4, architecture={"stagger": 1.0}),
        "gaussian prior, one step": cast.prior(1, architecture={"noise": "gaussian", "stagger": 1.0}),
        # Between 0 and 1 ranks hold images of one level, of both, or of either, and must not lose step over it.
        "gaussian prior, twenty steps": cast.prior(
            20, architecture={"noise": "gaussian", "stagger": 0.5}, ema_half_life_images=40
        ),
        # Codebooks from k-means at once, and no restarts: the gradient with the codes given.
        "vq, one step": cast.vq(1, architecture={"restart_threshold": 0.0}, codebook_start=0),
        "pyramid, one step": cast.vq(1, architecture=PYRAMID, codebook_start=0),
        # Not every rank holds a picture of every level, and none may wait for the gradient of one.
        "nested pyramid, one step": cast.vq(1, architecture=NESTED_PYRAMID, codebook_start=0),
        # Without codes: a code that changes for a rounding error would change everything after it.
        "vq, twenty steps": cast.vq(20, codebook_start=0.99, ema_half_life_images=40),
    }
    for kind, architecture in LARGE_CODEBOOKS.items():
        scenes[f"{kind} codebook"] = cast.vq(
            3, architecture=architecture, codebook_start=0.3, ema_half_life_images=40, evaluate_every_images=24
        )
    outcomes = {name: cast.train(stage) for name, stage in scenes.items()}
    return outcomes | {"poisoned": poisoned(cast)[1]}


class Poisoned(VQStage):
    """Stage 1 whose second step meets a picture that is not a number, in the last micro-batch of the last rank."""

    def __init__(self, stage: VQStage) -> None:
        self.__dict__.update(stage.__dict__)

    def batch(self, position: Position) -> tuple[Any, ...]:
        """The stage's batch, with one bad picture."""
        images, keys = super().batch(position)
        if position.images_seen == GLOBAL_BATCH and position.offset + position.count == GLOBAL_BATCH:
            images[-1] = torch.nan
        return images, keys


def poisoned(cast: Cast) -> tuple[list[Outcome], Outcome]:
    """Before and after a step with a bad picture, and after a good one that follows."""
    stage = cast.vq(1, codebook_start=0, ema_half_life_images=40)
    engine = cast.engine_of(stage)
    moments = []
    for step in range(3):
        part = Poisoned(stage)
        part.settings = stage.settings.model_copy(update={"images": (step + 1) * GLOBAL_BATCH})
        state = train(engine, part, GoOn(step * GLOBAL_BATCH), Heard())
        moments.append(outcome(engine, state.history))
    return moments[:2], moments[2]


# ---- compared with itself ----


def resumed(cast: Cast, stage_of: Callable[[int], AnyStage], folder: Path) -> tuple[Outcome, Outcome]:
    """After six steps without a break, and after three, a break and three more, in an engine with other weights.

    Each rank fetches only its own files and rank 0's, as from an object store.
    """
    store = open_store(str(folder))
    stage = stage_of(0)
    engine = cast.engine_of(stage)
    history = train(engine, stage, StoreCheckpoints(store, "request", keep=2), Heard()).history
    whole = outcome(engine, history)
    middle, newest = store.children()
    for name, step in ((middle, 3), (newest, 6)):
        assert name.startswith(f"{step * GLOBAL_BATCH:012d}-b0-w{engine.world}-")
    collectives.barrier()
    if engine.rank == 0:
        store.child(newest).delete()
    collectives.barrier()
    stage = stage_of(1)
    engine = cast.engine_of(stage)
    fetching = FetchOnly(Store(f"local://{folder}"), "request", keep=2)
    history = train(engine, stage, fetching, Heard()).history
    return whole, outcome(engine, history)


class FetchOnly(StoreCheckpoints):
    """Goes on from a checkpoint and writes none."""

    def save(self, engine: Engine, state: Any) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Facts:
    """What one rank found at one ZeRO stage."""

    compared: dict[str, Outcome]
    """Two ranks, half of the batch each."""
    accumulated: dict[str, Outcome]
    """The same in two micro-batches a rank."""
    fifty_steps: Outcome
    around_poison: list[Outcome]
    resumed: dict[str, tuple[Outcome, Outcome]]
    recomputed: tuple[Outcome, Outcome]
    """Without and with activation checkpointing."""


def facts(zero_stage: int, folder: Path) -> Facts:
    """Everything that the tests look at, on this rank."""
    cast, halves = zero_cast(zero_stage, GLOBAL_BATCH // 2), zero_cast(zero_stage, GLOBAL_BATCH // 4)
    breaks = {"checkpoint_every_images": 3 * GLOBAL_BATCH, "ema_half_life_images": 40}
    accumulated = {
        "prior, twenty steps": halves.train(halves.prior(20, ema_half_life_images=40)),
        "vq, one step": halves.train(halves.vq(1, architecture={"restart_threshold": 0.0}, codebook_start=0)),
    }
    restless = {"restart_threshold": 0.9, "codebook_decay": 0.8, "attention": False, "width_multipliers": (1,)}
    return Facts(
        compared=compared_scenes(cast),
        accumulated=accumulated,
        fifty_steps=cast.train(cast.vq(50, architecture=restless, codebook_start=0.1)),
        around_poison=poisoned(cast)[0],
        resumed={
            "vq": resumed(cast, lambda seed: cast.vq(6, seed, codebook_start=0.3, **breaks), folder / "vq"),
            "prior": resumed(cast, lambda seed: cast.prior(6, seed, **breaks), folder / "prior"),
        },
        recomputed=(
            cast.train(cast.prior(3)),
            cast.train(cast.prior(3, architecture={"activation_checkpointing": True})),
        ),
    )


def all_facts(folder: Path) -> dict[int, Facts]:
    """The facts of every ZeRO stage, on this rank."""
    return {stage: facts(stage, folder / f"zero-{stage}") for stage in range(4)}
