"""How long a checkpoint makes training stand still: written in the background, against synchronous save and upload.

A prior of about eight million weights (its state is four times as large) trains in one process with its root on an S3
server of this machine. Both sides take the same number of steps between checkpoints; `blocked_share` is the time that
training stands still for a checkpoint, over that of synchronous saving. Steps beside an upload are slower where the
processor is shared: `slower_share` is the loss, over the synchronous checkpoint, so that nothing is hidden.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))

from infra.storage import Store, renew
from tests.services import seaweedfs
from tests.tiny_training import GLOBAL_BATCH, Heard, prior_settings, prior_stage
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.ledger import Ledger
from workflows.training.loop import train
from workflows.training.plain import PlainEngine


def cost(store: Store, *, background: bool, checkpoints: int, steps: int, width: int) -> tuple[float, float, float]:
    """Seconds blocked a checkpoint (all but the last, which is always waited for), seconds a step, and megabytes."""
    settings = prior_settings(
        checkpoints * steps, checkpoint_every_images=steps * GLOBAL_BATCH, ema_half_life_images=1000
    )
    stage = prior_stage(settings, width=width, depth=4)
    engine = PlainEngine(stage.objective, settings, torch.device("cpu"))
    kept = StoreCheckpoints(store, "cost", keep=1, background=background)
    blocked: list[float] = []

    class Timed:
        """Notes what each save takes."""

        def restore(self, engine: Any) -> Any:
            return kept.restore(engine)

        def save(self, engine: Any, state: Any) -> None:
            started = time.monotonic()
            kept.save(engine, state)
            blocked.append(time.monotonic() - started)

    ledger = Ledger()
    train(engine, stage, Timed(), Heard(), ledger=ledger)
    kept.finish()
    megabytes = engine.state().bytes / 1e6
    return statistics.mean(blocked), ledger.seconds["steps"] / (checkpoints * steps), megabytes


def measure(quick: bool, seed: int) -> Figures:
    """Both sides, one after the other."""
    checkpoints, steps, width = (3, 8, 192) if quick else (8, 30, 384)
    with tempfile.TemporaryDirectory(prefix="hvqd-cost-") as name, seaweedfs(Path(name)) as server:
        os.environ.update(server.env)
        renew()  # another server than the last repeat's
        root = Store(f"s3://{server.bucket}/cost-{seed}")
        sides = {}
        for side, background in (("synchronous", False), ("background", True)):
            sides[side] = cost(
                root.child(side), background=background, checkpoints=checkpoints, steps=steps, width=width
            )
        (waits, step, megabytes), (stands, slower, _) = sides["synchronous"], sides["background"]
        return {
            "blocked_share": stands / waits,
            "blocked_seconds_synchronous": waits,
            "blocked_seconds_background": stands,
            "slower_share": max(0.0, slower - step) * steps / waits,
            "step_seconds_synchronous": step,
            "step_seconds_background": slower,
            "state_megabytes": megabytes,
        }


BENCHMARK = Benchmark(
    name="checkpoint_cost",
    what=__doc__ or "",
    parts={"cost": measure},
    targets=(Target("blocked_share", "<=", 0.15),),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
