"""The heap of a CPU training: kept memory is not asked for again, given-back memory leaves what was planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workflows.loading import load_config
from workflows.planning.advice import changed_config
from workflows.training.heap import gives_back

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


STEPS = """
import ctypes
import resource
import sys

from workflows.training.heap import keep_freed_memory

PR_SET_THP_DISABLE = 41  # prctl.h; where the kernel gives 2 MiB at a fault, faults do not count pages
PIECE, PIECES, ROUNDS = 12 << 20, 20, 4
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
assert libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
if sys.argv[1] == "keep":
    assert keep_freed_memory()


def step():  # as activations: they stay until the last is there. Not tensors: their small parts may pin the heap's end
    pieces = [libc.malloc(PIECE) for _ in range(PIECES)]
    for piece in pieces:
        libc.memset(piece, 1, PIECE)
    while pieces:
        libc.free(pieces.pop())


step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(ROUNDS):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / (ROUNDS * PIECES * PIECE))
"""


def test_kept_memory_is_not_asked_for_again() -> None:
    def share_of_pages_that_were_new(how: str) -> float:
        words = [sys.executable, "-c", STEPS, how]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert share_of_pages_that_were_new("keep") < 0.1 < 0.5 < share_of_pages_that_were_new("as ever")


def test_only_checkpointed_priors_on_a_cpu_give_back() -> None:
    plain = load_config("integration")
    checkpointed = changed_config(plain, {"prior.model.activation_checkpointing": True})
    on_gpus = changed_config(checkpointed, {"compute.gpus_per_worker": 1})
    assert gives_back(checkpointed, "prior")
    assert not any(gives_back(config, "vq") for config in (plain, checkpointed, on_gpus))
    assert not any(gives_back(config, "prior") for config in (plain, on_gpus))
