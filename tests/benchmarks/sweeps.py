"""What the sweep benchmarks share: a root with the bundled emoji, and `hvqd tune` on it as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import work_folder

HVQD = Path(sys.executable).with_name("hvqd")
QUICK_SPACE = """
name: quick
about: The space vq on pictures of 16 x 16 and budgets of seconds.
base: {preset: integration, set: {compute.workers: 1}}
job: vq
parameters:
  sizes: {key: vq.model.codebook_sizes, choice: [16, 32, 64, 128], ordered: true, length: "2"}
  quantizer: {key: vq.model.quantizer, choice: [ema, simvq]}
  vq.model.code_dim: {choice: [4, 8, 16], ordered: true}
  vq.train.learning_rate: {log_uniform: [0.0004, 0.01]}
metrics:
  - {name: cost, direction: min, expression: 10 ** (-val_psnr / 10) + 0.004 * bits_per_pixel}
budget: {trials: 4, images: 640, min_images: 160, reduction_factor: 2}
"""


@dataclass(frozen=True)
class Searched:
    """How a sweep ended."""

    answer: dict[str, Any]
    """What `--json` printed."""
    records: list[dict[str, Any]]
    """Its trials' records, by number."""
    seconds: float

    def finals(self, metric: str = "cost") -> list[float]:
        """The metric of the trials that were trained to the end."""
        ended = [record for record in self.records if record["status"] == "finished"]
        return [record["rungs"][-1]["metrics"][metric] for record in ended]


@contextmanager
def root_with_dataset(name: str, preset: str, seed: int) -> Iterator[Path]:
    """A root of one's own whose dataset is built once a preset and seed, and linked afterwards."""
    built = work_folder("sweeps") / f"{preset}-{seed}"
    if not (built / "dataset" / "manifest.json").exists():
        options = ("--preset", preset, "--seed", str(seed), "--root", str(built), "--json")
        _run("data", "build", "emoji", *options, cwd=work_folder("sweeps"))
    folder = Path(tempfile.mkdtemp(prefix=f"hvqd-{name}-"))
    try:
        shutil.copytree(built / "dataset", folder / "root" / "dataset", copy_function=os.link)
        yield folder / "root"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def search(root: Path, space: str, name: str, *options: str) -> Searched:
    """`hvqd tune` to its end."""
    started = time.monotonic()
    answer = _run("tune", space, "--root", str(root), "--name", name, "--json", *options, cwd=root.parent)
    seconds = time.monotonic() - started
    paths = sorted((root / "tuning" / name / "trials").glob("*/record.json"))
    return Searched(answer, [json.loads(path.read_text()) for path in paths], seconds)


def quick_space(folder: Path) -> str:
    """The file of a space of seconds."""
    path = folder / "quick.yaml"
    path.write_text(QUICK_SPACE)
    return str(path)


def _run(*arguments: str, cwd: Path) -> dict[str, Any]:
    command: Sequence[str] = [str(HVQD), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value
