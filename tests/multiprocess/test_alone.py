"""DeepSpeed with a single rank: nobody to share with, so it must be plain torch to the bit, at plain torch's price."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training.loop import train
from workflows.training.plain import PlainEngine
from workflows.training.zero import ZeroEngine, worthwhile

STEPS = 6


def trained(folder: Path) -> None:
    """Train both stages with both engines, two micro-batches a step, and leave in a file what came out."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    found: dict[str, Any] = {}
    for name, engine_type in (("plain", PlainEngine), ("zero", ZeroEngine)):
        halves: dict[str, Any] = {"micro_batch": GLOBAL_BATCH // 2, "zero_stage": 1, "ema_half_life_images": 16}
        for stage in (vq_stage(vq_settings(STEPS, **halves)), prior_stage(prior_settings(STEPS, **halves))):
            engine = engine_type(stage.objective, stage.settings, torch.device("cpu"))
            heard = Heard()
            train(engine, stage, GoOn(), heard)
            found[f"{stage.name} {name}"] = (heard.records, engine.export())
    torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def _enter(rank: int, folder: Path) -> None:
    trained(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the trainings left; in a process of its own, because DeepSpeed keeps state for the process."""
    folder = tmp_path_factory.mktemp("alone")
    torch.multiprocessing.spawn(_enter, args=(folder,), nprocs=1)
    result: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    assert len(result) == 4
    return result


@pytest.mark.parametrize("stage", ["vq", "prior"])
def test_one_rank_trains_as_plain_torch_does_to_the_bit(found: dict[str, Any], stage: str) -> None:
    (history, weights), (zero_history, zero_weights) = found[f"{stage} plain"], found[f"{stage} zero"]
    assert zero_history == history
    assert len(history) >= STEPS
    assert weights.keys() == zero_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], zero_weights[name])] == []


@pytest.mark.parametrize(
    ("world", "zero_stage", "offload", "chosen"),
    [(1, 1, False, 0), (1, 2, False, 0), (1, 3, False, 3), (1, 1, True, 1), (2, 1, False, 1), (2, 2, False, 2)],
)
def test_only_what_nobody_shares_is_left_out(world: int, zero_stage: int, offload: bool, chosen: int) -> None:
    settings = prior_settings(1, zero_stage=zero_stage, offload_optimizer=offload)
    assert worthwhile(settings, world) == settings.model_copy(update={"zero_stage": chosen})
