"""What all benchmarks share: flags, repeats, medians, seeds, the machine's description, JSON and docs/benchmarks.md.

A benchmark is a name, functions that return figures, and targets for some of the figures; it ends with
`sys.exit(main(BENCHMARK))`. All sides of a comparison are measured inside one function, so that a repeat is paired: a
busy machine slows all of them. The figure that counts is the median over the repeats, each with a seed of its own.

The full form goes on where it was interrupted: finished repeats lie in the cache, under a key of the code, the machine
and the arguments. When it is complete it writes its section of the page, and its repeats are forgotten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

import torch

from infra.quiet import divert_noise, switch_off_telemetry
from workflows.data.batches import cache_folder

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
PAGE_HEAD = """# Benchmarks

Every section is written by the full form of its script, the median of paired repeats; text between sections is free.
The libraries that some scripts measure against come with `make install-bench`.
"""
PACKAGES = ("hvqd_model", "infra", "workflows", "tuning", "tests/benchmarks")

Figures = dict[str, float]
Measure = Callable[[bool, int], Figures]


@dataclass(frozen=True)
class Target:
    """What a figure must show."""

    figure: str
    comparison: Literal["<=", ">="]
    value: float

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether the figure is there and on the right side; nan is on neither."""
        found = figures.get(self.figure, math.nan)
        return found <= self.value if self.comparison == "<=" else found >= self.value

    def __str__(self) -> str:
        return f"{self.comparison} {self.value:g}"


@dataclass(frozen=True)
class Benchmark:
    """What is measured, how often, and what it must show."""

    name: str
    """The script's name without suffix; also its section on the page."""
    what: str
    """The protocol in a few sentences, for the page."""
    parts: Mapping[str, Measure]
    """(quick, seed) -> figures, by part; a part of a repeat is what an interrupted run loses at most."""
    targets: tuple[Target, ...]
    repeats: int = 3
    """Of the full form; the quick form measures once."""
    quick_decides: bool = False
    """Whether the quick form is enough to say that the targets hold."""
    once: frozenset[str] = frozenset()
    """Parts that only the first repeat measures."""
    with_photographs: Callable[[Path], Mapping[str, Measure]] | None = None
    """Further parts, for photographs in the parquet file that `--photos` names; without the option their targets are
    missing."""
    of_root: Callable[[Path], Mapping[str, Measure]] | None = None
    """The same parts of the trained models that `--root` names, in place of those that the script finds or trains."""


# ---- the result ----


def medians(repeats: list[Figures]) -> Figures:
    """The median of each figure over the repeats that have it."""
    names = dict.fromkeys(name for figures in repeats for name in figures)
    return {name: statistics.median([figures[name] for figures in repeats if name in figures]) for name in names}


def verdict(benchmark: Benchmark, figures: Figures, *, quick: bool) -> bool | None:
    """Whether all targets hold; None when the quick form cannot say."""
    if quick and not benchmark.quick_decides:
        return None
    return all(target.holds(figures) for target in benchmark.targets)


def result(benchmark: Benchmark, figures: Figures, *, quick: bool) -> dict[str, object]:
    """The JSON value that the script ends with; a figure that is not finite is null."""
    return {
        "name": benchmark.name,
        "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
        "targets": {target.figure: str(target) for target in benchmark.targets},
        "holds": verdict(benchmark, figures, quick=quick),
    }


# ---- the machine ----


def machine() -> str:
    """One line: processor, cores, what it computes fast, memory, GPU, versions."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model, flags = _processor()
    fast = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AMX", "amx_bf16")) if flag in flags]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts = [f"{model}, {cores} cores ({', '.join(fast) or 'no AVX2'})", f"{memory:.0f} GiB", *gpu]
    return "; ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def _processor() -> tuple[str, set[str]]:
    """The processor's model name and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), set()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    family = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return name + family, set(fields.get("flags", "").split())


# ---- the page ----


def section(benchmark: Benchmark, repeats: list[Figures], facts: Mapping[str, str]) -> str:
    """The benchmark's part of the page: protocol, facts, and a table with the spread of the repeats."""
    targets = {target.figure: target for target in benchmark.targets}
    found = medians(repeats)
    lines = [f"## {benchmark.name}", "", benchmark.what, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| figure | median | lowest | highest | target | holds |", "|---|---|---|---|---|---|"]
    for name, value in found.items():
        spread = [figures[name] for figures in repeats if name in figures]
        target = targets.get(name)
        holds = "" if target is None else "yes" if target.holds(found) else "no"
        cells = [f"`{name}`", *(f"{number:.4g}" for number in (value, min(spread), max(spread)))]
        lines.append(f"| {' | '.join([*cells, str(target or ''), holds])} |")
    lines += [f"| `{name}` | missing | | | {target} | no |" for name, target in targets.items() if name not in found]
    return "\n".join(lines)


def with_section(page: str, name: str, text: str) -> str:
    """The page with one benchmark's section replaced, or added at the end; all else stays as it was.

    Raises:
        ValueError: the page has only one of the section's two markers.
    """
    begin, end = f"<!-- benchmark {name} -->", f"<!-- end of benchmark {name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if found_begin and found_end:
        return before + block + after
    if found_begin or end in page:
        raise ValueError(
            f"the page must have both markers of the section {name} in their order, or none: {begin} … {end}\n"
            "hint: remove what is left of the section; it is written again"
        )
    return f"{page.rstrip()}\n\n{block}\n"


def update_page(path: Path, name: str, text: str) -> None:
    """Replace one section of the page's file, which is whole at any time."""
    page = path.read_text(encoding="utf-8") if path.exists() else PAGE_HEAD
    write_whole(path, with_section(page, name, text))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    scratch = Path(file.name)
    scratch.chmod(0o644)
    scratch.replace(path)


# ---- the repeats ----


def work_folder(name: str) -> Path:
    """Where a benchmark keeps what it prepares and what it has measured so far."""
    folder = cache_folder() / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def code_digest() -> str:
    """Digest of the packages and the benchmarks, as they lie on the disk."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Parts:
    """Finished parts of the repeats, a file each."""

    folder: Path
    key: str

    def get(self, part: str, repeat: int, measure: Callable[[], Figures]) -> Figures:
        """The part's figures, measured now unless that has been done."""
        path = self.folder / f"{self.key}-{part}-{repeat}.json"
        if path.exists():
            found: Figures = json.loads(path.read_text())
            return found
        figures = measure()
        write_whole(path, json.dumps(figures))
        return figures

    def forget(self) -> None:
        """Remove the parts of this key and of any other code."""
        for path in self.folder.glob("*.json"):
            path.unlink()


def measure_repeats(benchmark: Benchmark, parts: Parts, seed: int, *, quick: bool, log: TextIO) -> list[Figures]:
    """The figures of every repeat; parts that are there already are not measured again."""
    repeats = 1 if quick else benchmark.repeats
    found: list[Figures] = []
    for repeat in range(repeats):
        figures: Figures = {}
        for part, measure in benchmark.parts.items():
            if repeat and part in benchmark.once:
                continue
            started = time.monotonic()
            figures |= parts.get(part, repeat, lambda measure=measure, repeat=repeat: measure(quick, seed + repeat))
            seconds = time.monotonic() - started
            print(f"{benchmark.name}: repeat {repeat + 1}/{repeats}, {part}: {seconds:.0f} s", file=log, flush=True)
        found.append(figures)
    return found


def main(benchmark: Benchmark, arguments: list[str] | None = None) -> int:
    """Run a benchmark as a script: 0 when its targets hold or the quick form cannot say, 1 when they do not."""
    parser = argparse.ArgumentParser(prog=f"{benchmark.name}.py", description=benchmark.what)
    parser.add_argument("--quick", action="store_true", help="measure once and briefly; the page stays as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, last")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first repeat")
    parser.add_argument("--fresh", action="store_true", help="forget what was prepared and measured before")
    if benchmark.with_photographs:
        parser.add_argument("--photos", type=Path, metavar="PATH", help="parquet file of photographs: image, photo")
    if benchmark.of_root:
        parser.add_argument("--root", type=Path, metavar="PATH", help="a finished run's root: its models are measured")
    options = parser.parse_args(arguments)
    photos: Path | None = getattr(options, "photos", None)
    root: Path | None = getattr(options, "root", None)
    if benchmark.of_root and root:
        if not (root / "prior" / "manifest.json").is_file():
            parser.error(f"--root must be a folder with a trained prior: {root}")
        benchmark = replace(benchmark, parts=benchmark.of_root(root))
    if benchmark.with_photographs and photos:
        if not photos.is_file():
            parser.error(f"--photos must name a parquet file: {photos}")
        benchmark = replace(benchmark, parts={**benchmark.parts, **benchmark.with_photographs(photos)})
    switch_off_telemetry()
    if options.fresh:
        shutil.rmtree(work_folder(benchmark.name))
    folder = work_folder(benchmark.name)
    described = machine()
    given = f"{options.quick} {options.seed} {photos and (photos.resolve(), photos.stat().st_size)}"
    given += f" {root.resolve()} {(root / 'prior' / 'manifest.json').read_text()}" if root else ""
    key = hashlib.sha256(f"{code_digest()} {described} {given}".encode()).hexdigest()[:16]
    parts = Parts(folder / ("quick" if options.quick else "full"), key)
    if options.quick:
        parts.forget()
    streams = divert_noise(folder / "log.txt")
    try:
        repeats = measure_repeats(benchmark, parts, options.seed, quick=options.quick, log=streams.err)
    except Exception:
        traceback.print_exc(file=streams.err)
        print(f"{benchmark.name}: failed; see also {folder / 'log.txt'}", file=streams.err)
        return 1
    figures = medians(repeats)
    if not options.quick:
        words = [f"--seed {options.seed}"] * bool(options.seed) + ["--photos PATH"] * bool(photos)
        words += ["--root PATH"] * bool(root)
        command = " ".join([f"python tests/benchmarks/{benchmark.name}.py", *words])
        facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": described, "command": f"`{command}`"}
        facts["repeats"] = str(len(repeats))
        update_page(PAGE, benchmark.name, section(benchmark, repeats, facts))
    parts.forget()
    answer = result(benchmark, figures, quick=options.quick)
    print(json.dumps(answer) if options.json else _text(benchmark, figures, answer), file=streams.out, flush=True)
    return 1 if answer["holds"] is False else 0


def _text(benchmark: Benchmark, figures: Figures, answer: Mapping[str, object]) -> str:
    targets = {target.figure: f"  (target {target})" for target in benchmark.targets}
    lines = [f"{name:<40} {value:>10.4g}{targets.get(name, '')}" for name, value in figures.items()]
    holds = {True: "holds", False: "does not hold", None: "the quick form cannot say"}[answer["holds"]]
    return "\n".join([*lines, f"{benchmark.name}: {holds}"])
