"""Start a function on several ranks of a gloo group and collect what each returns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
_DEADLINE_SECONDS = 600.0


def run_on_ranks(target: Callable[..., Any], folder: Path, *arguments: Any, world: int = WORLD) -> list[Any]:
    """What `target(*arguments)` returned on every one of `world` ranks, in rank order.

    The group meets in a file under `folder`, so no port is needed. A rank's error is raised here, with its traceback.
    """
    context = torch.multiprocessing.start_processes(
        _enter, args=(target, folder, arguments, world), nprocs=world, join=False, start_method="spawn"
    )
    assert context is not None
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{world} ranks did not finish {target.__name__} within {_DEADLINE_SECONDS:.0f} s")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank: int, target: Callable[..., Any], folder: Path, arguments: tuple[Any, ...], world: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(target(*arguments), folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
