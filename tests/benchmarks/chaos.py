"""Twenty short trainings of both stages, each killed −9 at random moments, then started again by the same command.

Killed are a worker, the driver alone, everything at once, everything while a checkpoint is unfinished, and everything
while a file is being written. Counted are the runs that do not end with the weights, codebooks, optimizer state, models
and metric history (in the root and in the tracker, without gaps and double points) of the undisturbed run, to the bit.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

from runner import REPOSITORY, Benchmark, Figures, Target, main, work_folder

sys.path.insert(0, str(REPOSITORY))  # the chaos that the tests use, too

from tests.chaos import STAGES, VICTIMS, copy_inputs, differences, outcome, run_disturbed
from tests.command_line import environment, run_hvqd

_RUNS, _PARTS, _QUICK_RUNS = 20, 10, 1
_SETTINGS = ("--preset", "integration", "--set", "vq.train.images=1280", "--set", "prior.train.images=1280")
_OFTEN = ("--set", "vq.train.checkpoint_every_images=160", "--set", "prior.train.checkpoint_every_images=160")
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_INPUTS = {"vq": ("dataset",), "prior": ("dataset", "vq", "codes")}


def undisturbed(folder: Path) -> tuple[Path, dict[str, str]]:
    """The root of a run without kills, made once, and the environment of all."""
    env = environment(folder, _ONE_THREAD)
    root = folder / "whole"
    for command in (("data", "build"), ("train", "vq"), ("encode",), ("train", "prior")):
        run_hvqd(*command, *_SETTINGS, *_OFTEN, "--root", str(root), "--json", cwd=folder, env=env).succeeded()
    return root, env


def measure(part: int, quick: bool, seed: int) -> Figures:
    """Runs, kills, starts and violations of one part."""
    runs = (_QUICK_RUNS if part == 0 else 0) if quick else _RUNS // _PARTS
    kills = starts = violations = 0
    if runs:
        folder = work_folder("chaos") / f"{os.getpid()}"
        folder.mkdir(exist_ok=True)
        whole, env = (
            undisturbed(folder)
            if not (folder / "whole").exists()
            else (folder / "whole", environment(folder, _ONE_THREAD))
        )
        expected = {stage: outcome(whole, stage) for stage in STAGES}
    for number in range(runs):
        chance = random.Random(10_000 * seed + 100 * part + number)
        for stage in STAGES:
            with tempfile.TemporaryDirectory(prefix="hvqd-chaos-") as scratch:
                root = Path(scratch) / "run"
                copy_inputs(whole, root, _INPUTS[stage])
                victims = chance.sample(VICTIMS, 2)
                command = ("train", stage, *_SETTINGS, *_OFTEN)
                try:
                    course = run_disturbed(root, env, command, stage, victims, chance.randrange(1 << 30))
                    kills, starts = kills + len(course.kills), starts + course.starts
                    different = differences(outcome(root, stage), expected[stage])
                    assert not different, f"another outcome after {course.kills}: {different}"
                except AssertionError as error:
                    violations += 1
                    print(f"part {part}, run {number}, {stage}, {victims}: {error}", file=sys.stderr)
    found = {"runs": float(runs), "kills": float(kills), "starts": float(starts), "violations": float(violations)}
    return {f"{name}_{part}": value for name, value in found.items()}


BENCHMARK = Benchmark(
    name="chaos",
    what=__doc__ or "",
    parts={f"runs {part}": partial(measure, part) for part in range(_PARTS)},
    targets=tuple(Target(f"violations_{part}", "<=", 0) for part in range(_PARTS)),
    repeats=1,
    quick_decides=False,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
