"""Trains every configuration of a small grid and keeps its learning curves: the table that simulated sweeps replay.

    PYTHONPATH=. python tests/benchmarks/record_curves.py

The grid is `recorded/tokenizers.yaml`; each of its configurations is trained by the product's loop with the plain
engine, one thread, seed 0, and judged on held-out pictures at each rung. The result is `recorded/tokenizers.json.gz`.
Interrupted, the same command goes on; it takes about a quarter of an hour of one core.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.randomness import derive_key
from tests.benchmarks.picture_sets import PictureSet, emoji, subset
from tests.benchmarks.runner import work_folder
from tests.benchmarks.trials import CPU, Nothing
from tuning.loading import load_space
from tuning.records import Rung, TrialRecord, dump_records, parse_records
from tuning.space import Drawn, SearchSpace
from workflows.training.loop import Record, train
from workflows.training.plain import PlainEngine
from workflows.training.vq_stage import VQStage

FOLDER = Path(__file__).parent / "recorded"
SPACE, TABLE = FOLDER / "tokenizers.yaml", FOLDER / "tokenizers.json.gz"
JUDGED = 256
"""Held-out pictures."""


@dataclass
class Evaluations(Nothing):
    """Keeps the lines of the history in which something was evaluated."""

    lines: list[Record] = field(default_factory=list)

    def record(self, record: Record) -> None:
        """An evaluation, or nothing of interest."""
        if "val_psnr" in record:
            self.lines.append(record)


def main() -> None:
    """Record what has not been recorded yet, then write the table."""
    torch.set_num_threads(1)
    space = load_space(SPACE)
    combinations = list(space.grid())
    kept = work_folder("record_curves") / "trials.jsonl"
    done = {record.number: record for record in _read(kept)}
    pictures = emoji(space.resolved_base.data.image_size[0])
    pictures = PictureSet(pictures.train, subset(pictures.held_out, np.arange(JUDGED)))
    with kept.open("a") as file:
        for number, drawn in enumerate(combinations):
            if number in done:
                continue
            done[number] = record_trial(space, number, drawn, pictures)
            file.write(json.dumps(done[number].as_json()) + "\n")
            file.flush()
            print(f"{number + 1}/{len(combinations)}: {done[number].seconds:.1f} s", file=sys.stderr, flush=True)
    records = [done[number] for number in range(len(combinations))]
    TABLE.write_bytes(gzip.compress(dump_records(records).encode(), mtime=0))


def record_trial(space: SearchSpace, number: int, drawn: Drawn, pictures: PictureSet) -> TrialRecord:
    """Train one configuration to the end and keep its validation PSNR at each rung."""
    config = space.check(drawn)
    torch.manual_seed(derive_key(config.seed, "vq", "weights"))
    model = HierarchicalVQ(config.vq_config)
    stage = VQStage(model, config.vq.train, config.seed, "fp32", pictures.train, pictures.held_out)
    heard = Evaluations()
    started = time.monotonic()
    train(PlainEngine(stage.objective, config.vq.train, CPU), stage, Nothing(), heard)
    rungs = tuple(Rung(line["images"], {"val_psnr": line["val_psnr"]}) for line in heard.lines)
    seconds = round(time.monotonic() - started, 2)
    return TrialRecord(number, drawn, space.settings(drawn), "finished", rungs, seconds)


def read_table() -> list[TrialRecord]:
    """The recorded trials, with the space's metrics worked out."""
    space = load_space(SPACE)
    found = []
    for record in parse_records(gzip.decompress(TABLE.read_bytes()).decode()):
        config = space.configuration(dict(record.drawn))
        rungs = tuple(Rung(rung.images, space.measured(rung.metrics, config)) for rung in record.rungs)
        found.append(TrialRecord(record.number, record.drawn, record.settings, record.status, rungs, record.seconds))
    return found


def _read(path: Path) -> Iterator[TrialRecord]:
    """The trials of an interrupted recording; a half-written last line is no trial."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield TrialRecord.from_json(json.loads(line))
            except json.JSONDecodeError:
                return


if __name__ == "__main__":
    main()
