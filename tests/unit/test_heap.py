"""Activation checkpointing on a CPU saves what it is planned to save only where freed memory is given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path

import torch

from workflows.planning.footprint import walk
from workflows.loading import config_from
from workflows.planning.made_up import made_up_prior
from workflows.training.heap import give_back_freed_memory

torch.set_num_threads(1)


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def prior(depth):
    model = {"width": 64, "depth": depth, "heads": 4, "activation_checkpointing": True}
    train = {"images": 8, "global_batch": 8, "micro_batch": 8}
    vq = {"model": {"strides": [8, 4], "codebook_sizes": [128, 128], "width": 16}}
    config = config_from({"data": {"image_size": [64, 64]}, "vq": vq, "prior": {"model": model, "train": train}})
    return made_up_prior(config, 4, "fp32")


if sys.argv[1] == "give back":
    assert give_back_freed_memory()
objective, inputs = prior(1)
objective(*inputs).loss.backward()  # what the libraries take when they are first used
objective, inputs = prior(8)
gradients = sum(parameter.numel() * 4 for parameter in objective.parameters())
rest = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
objective(*inputs).loss.backward()
taken = resident("VmHWM") - rest
objective.zero_grad()
counted = walk(objective, lambda: objective(*inputs).loss, on_gpu=False).transient_bytes
print(taken / (counted + gradients))
"""


def taken_over_counted(how: str) -> float:
    words = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_checkpointed_step_takes_what_is_counted_when_freed_memory_is_given_back() -> None:
    kept, given_back = taken_over_counted("keep"), taken_over_counted("give back")
    assert 0.8 < given_back < 1.15, given_back
    assert given_back < 0.8 * kept, kept
