"""How often does the no-regression gate refuse a version that is as good as the champion, and let a worse one through?

A pool of pictures is drawn from one trained model (that of `--root`; else tiny's, from `runs/tiny` if it has been run,
otherwise trained here), and their features taken once. A trial draws the champion's evaluation and the new version's
from the pool, 2,000 pictures each and no picture in both, and resamples the test concepts; then it asks
`max_kid_regression` at its default, 10 %. Versions that are worse by a known amount have a share of pictures of
independent codes among theirs, such that over the whole pool their KID is larger by 10, 20 or 30 %. `standard_error` is
what the gate itself states; `too_unsure` is the share of comparisons that `max_kid_regression_error` would refuse
whatever they show.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from runner import REPOSITORY, Benchmark, Figures, Target, main, work_folder

sys.path.insert(0, str(REPOSITORY))

from hvqd_model import HierarchicalVQ
from hvqd_model.metrics import KidParts, kid_difference
from hvqd_model.randomness import derive_key
from infra.storage import open_store
from workflows.artifacts import read_manifest
from workflows.config import EvaluationSettings, GateSettings, RunConfig
from workflows.data.batches import CodeTable, ImageTable
from workflows.drawing.bundle import draw_labels, load_bundle
from workflows.drawing.generate import decode_codes, draw_images
from workflows.evaluation.features import FeatureExtractor
from workflows.loading import config_from, load_config, read_remembered

_POOL, _QUICK_POOL = 6_000, 600
_MARGINALS, _QUICK_MARGINALS = 2_000, 300
_TRIALS, _QUICK_TRIALS = 1_000, 200
_TRIALS_AT_ONCE = 250
_RESAMPLES = 400
_WORSE = (0.1, 0.2, 0.3)
_QUICK_PICTURES = 200
_AT_ONCE = 500


@dataclass(frozen=True)
class Pool:
    """Features of one model's pictures, of pictures of independent codes, and of the test pictures."""

    samples: NDArray[np.float32]
    marginals: NDArray[np.float32]
    test: NDArray[np.float32]
    groups: NDArray[np.str_]


def trained_root() -> Path:
    """A finished run of tiny: the user's own, or one trained for this."""
    own = REPOSITORY / "runs" / "tiny"
    if (own / "evaluation" / "manifest.json").is_file():
        return own
    root = work_folder("gate_power") / "tiny"
    if not (root / "evaluation" / "manifest.json").is_file():
        command = [str(Path(sys.executable).with_name("hvqd")), "run", "--preset", "tiny", "--root", str(root)]
        subprocess.run(command, check=True, cwd=work_folder("gate_power"))
    return root


def draw_pool(root: Path, count: int, marginals: int) -> Pool:
    """Draw and look at the pictures; what has been drawn lies in the cache."""
    store = open_store(str(root))
    config = config_from(read_remembered(store) or load_config("tiny").model_dump(mode="json"))
    bundle, dataset = load_bundle(root), read_manifest(store.child("dataset"), "hvqd data build")
    features = FeatureExtractor(config.evaluation.feature_size)
    kept = work_folder("gate_power") / f"pool-{bundle.digest[:12]}"
    kept.mkdir(exist_ok=True)

    def part(name: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        path = kept / f"{name}.npy"
        if not path.is_file():
            scratch = kept / f"{name}.partial.npy"
            np.save(scratch, make())
            scratch.replace(path)
        return np.asarray(np.load(path), dtype=np.float32)

    def drawn(start: int, end: int) -> NDArray[np.float32]:
        seeds = [derive_key("gate power", index) for index in range(start, end)]
        labels = draw_labels(seeds, bundle.class_rows)
        return features(draw_images(bundle.vq, bundle.prior, seeds, labels, config.sampling))

    starts = range(0, count, _AT_ONCE)
    chunks = [
        part(f"samples-{a}-{min(a + _AT_ONCE, count)}", lambda a=a: drawn(a, min(a + _AT_ONCE, count))) for a in starts
    ]
    images = ImageTable.open(store.child("dataset"), dataset, "test")
    return Pool(
        np.concatenate(chunks),
        part(f"marginals-{marginals}", lambda: features(_marginals(root, config, bundle.vq, marginals))),
        part("test", lambda: features(np.asarray(images.images))),
        np.asarray(images.groups),
    )


def _marginals(root: Path, config: RunConfig, vq: HierarchicalVQ, count: int) -> NDArray[np.uint8]:
    """Pictures whose codes come from a training picture each, independently of one another."""
    store = open_store(str(root))
    table = CodeTable.open(store.child("codes"), read_manifest(store.child("codes"), "hvqd encode"), "train")
    rng = np.random.default_rng(0)
    codes = []
    for level in table.codes:
        flat = np.asarray(level).reshape(len(level), -1)
        rows = rng.integers(0, len(flat), (count, flat.shape[1]))
        codes.append(flat[rows, np.arange(flat.shape[1])].reshape(count, *level.shape[1:]).astype(np.int64))
    return decode_codes(vq, codes, config.sampling.batch)


# ---- trials ----


class Kernels:
    """KID's kernel between all pictures of a pool, computed once; rows are samples first, then marginals."""

    def __init__(self, pool: Pool) -> None:
        pictures = torch.from_numpy(np.concatenate([pool.samples, pool.marginals])).double()
        test = torch.from_numpy(pool.test).double()
        self.samples, self.marginals = len(pool.samples), len(pool.marginals)
        names, groups = np.unique(pool.groups, return_inverse=True)
        self.among = torch.empty(len(pictures), len(pictures), dtype=torch.float32)
        for start in range(0, len(pictures), _AT_ONCE):
            self.among[start : start + _AT_ONCE] = _kernel(pictures[start : start + _AT_ONCE], pictures).float()
        self.level = float(self.among.mean(dtype=torch.float64))
        """Taken off, so that sums in single precision keep the digits that a KID is made of."""
        self.among -= self.level
        across = _kernel(pictures, test)
        blocks = torch.zeros(len(pictures), len(names), dtype=torch.float64)
        self.blocks = blocks.index_add_(1, torch.from_numpy(groups), across)
        """(n, G) sum of the kernel with the test pictures of each concept."""
        self.counts = tuple(np.bincount(groups).tolist())
        inner = _kernel(test, test)
        self.test_within = float((inner.sum() - inner.diagonal().sum()) / (len(test) * (len(test) - 1)))

    def parts(self, rows: NDArray[np.int64]) -> KidParts:
        """What `hvqd_model.metrics.kid_parts` gives for these pictures."""
        return self.parts_of(rows[None])[0]

    def parts_of(self, sets: NDArray[np.int64]) -> list[KidParts]:
        """The same for each of (T, n) sets: one product with the kernel instead of a look-up a pair."""
        chosen = torch.from_numpy(sets)
        trials, count = chosen.shape
        marks = torch.zeros(trials, len(self.among)).scatter_(1, chosen, 1.0)
        row = (marks @ self.among).gather(1, chosen).double() - self.among.diagonal()[chosen].double()
        row = row / (count - 1) + self.level
        across = marks.double() @ self.blocks / count
        seen = self.blocks.sum(1)[chosen] / sum(self.counts)
        spread = (2 * (row - seen)).std(1) / count**0.5
        return [
            KidParts(within=float(within), across=tuple(one.tolist()), counts=self.counts, set_error=float(error))
            for within, one, error in zip(row.mean(1), across, spread, strict=True)
        ]

    def kid(self, parts: KidParts) -> float:
        """The KID of a set of which these are the parts."""
        return self.test_within + parts.within - 2 * sum(parts.across) / sum(parts.counts)

    def worse_share(self, growth: float) -> float:
        """Share of marginals in a mixture whose KID, over the whole pool, is larger by this growth."""
        everything = np.arange(self.samples + self.marginals)
        one, other = (self.kid(self.parts(rows)) for rows in np.split(everything, [self.samples]))
        # KID is a squared distance of mean embeddings; with s and m those of the two sets, seen from the test set's,
        # |(1-a) s + a m|^2 = (1-a)^2 |s|^2 + 2a(1-a) s.m + a^2 |m|^2.
        mean = float(self.among[: self.samples, self.samples :].double().mean()) + self.level
        seen = [
            float(part.mean(0).sum()) / sum(self.counts) for part in self.blocks.split([self.samples, self.marginals])
        ]
        inner = mean - sum(seen) + self.test_within
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            found = (1 - share) ** 2 * one + 2 * share * (1 - share) * inner + share**2 * other
            low, high = (share, high) if found < one * (1 + growth) else (low, share)
        return share


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def trials(
    kernels: Kernels, samples: int, share: float, count: int, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Growth of the KID that each comparison shows, and its stated standard error."""
    found: list[tuple[float, float]] = []
    for start in range(0, count, _TRIALS_AT_ONCE):
        drawn = [_drawn(kernels, samples, share, rng) for _ in range(min(_TRIALS_AT_ONCE, count - start))]
        new, old = (kernels.parts_of(np.stack(sets)) for sets in zip(*drawn, strict=True))
        for parts in zip(new, old, strict=True):
            before = kernels.kid(parts[1])
            again = _resampled(list(parts), rng)
            difference, error = kid_difference(again[0], again[1], _RESAMPLES, seed=0)
            found.append((difference / before, error / before))
    return found


def _drawn(
    kernels: Kernels, samples: int, share: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pictures of a new version, a share of them worse, and of the champion; none is in both."""
    order = rng.permutation(kernels.samples)
    replaced = rng.binomial(samples, share)
    worse = kernels.samples + rng.choice(kernels.marginals, replaced, replace=False)
    return np.concatenate([order[samples : 2 * samples - replaced], worse]), order[:samples]


def _resampled(parts: list[KidParts], rng: np.random.Generator) -> list[KidParts]:
    """The same comparison on concepts drawn with replacement, the same for both."""
    chosen = rng.integers(0, len(parts[0].counts), len(parts[0].counts))
    return [
        KidParts(
            one.within,
            tuple(one.across[index] for index in chosen),
            tuple(one.counts[index] for index in chosen),
            one.set_error,
        )
        for one in parts
    ]


def rates(pool: Pool, samples: int, count: int, seed: int) -> Figures:
    """How often the gates of the comparison refuse, for versions as good and for worse ones."""
    gates = GateSettings()
    limit, unsure = gates.max_kid_regression, gates.max_kid_regression_error
    assert limit is not None and unsure is not None
    rng, kernels = np.random.default_rng(seed), Kernels(pool)
    figures: Figures = {"samples": float(samples), "trials": float(count)}
    errors: list[float] = []
    for growth in (0.0, *_WORSE):
        share = kernels.worse_share(growth) if growth else 0.0
        found = trials(kernels, samples, share, count, rng)
        refused = float(np.mean([value > limit for value, _ in found]))
        errors += [error for _, error in found] if not growth else []
        name = f"caught_{growth * 100:.0f}_percent_worse" if growth else "false_refusals"
        figures[name] = refused
        figures[f"spread_{growth * 100:.0f}"] = float(np.std([value for value, _ in found]))
    figures["standard_error"] = float(np.median(errors))
    figures["too_unsure"] = float(np.mean([error > unsure for error in errors]))
    return figures


def measure(quick: bool, seed: int) -> Figures:
    """The rates at the default number of samples; quickly, of a stand-in that has learned nothing."""
    if quick:
        return rates(_stand_in(), _QUICK_PICTURES, _QUICK_TRIALS, seed)
    return measure_root(trained_root(), quick, seed)


def measure_root(root: Path, quick: bool, seed: int) -> Figures:
    """The rates of one trained model, at the default number of samples."""
    return rates(draw_pool(root, _POOL, _MARGINALS), EvaluationSettings().samples, _TRIALS, seed)


def _stand_in() -> Pool:
    """Features of nobody's pictures: two clouds at known distances from a third, to try the machinery."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1.0, 0.2, 64)

    def cloud(count: int, shift: float) -> NDArray[np.float32]:
        return (rng.normal(size=(count, 64)) * scale + shift).astype(np.float32)

    return Pool(cloud(_QUICK_POOL, 0.4), cloud(_QUICK_MARGINALS, 0.8), cloud(200, 0.0), np.arange(200).astype(str))


BENCHMARK = Benchmark(
    name="gate_power",
    what=__doc__ or "",
    parts={"rates": measure},
    targets=(Target("false_refusals", "<=", 0.05), Target("caught_20_percent_worse", ">=", 0.95)),
    repeats=1,
    of_root=lambda root: {"rates": partial(measure_root, root)},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
