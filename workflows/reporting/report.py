"""The report: one HTML file at the root that shows what a pipeline can do, how that was measured, and what it cost.

It reads finished artifacts only and needs no network; drawings are inline, pictures are data URIs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from workflows.artifacts import Manifest, find_manifest, read_manifest
from workflows.config import GateSettings
from workflows.context import Context
from workflows.reporting.figures import short
from workflows.reporting.page import folded, page, section, table
from workflows.reporting.sections import (
    Figures,
    all_figures,
    codebooks,
    comparison,
    curves,
    neighbours,
    pictures,
    span,
    time_accounts,
)
from workflows.requests import PARENTS

NAME = "report.html"


@dataclass(frozen=True)
class Verdict:
    """One headline figure and its gate."""

    name: str
    value: float
    detail: str
    gate: str
    """What is asked, or empty when no gate is set."""
    holds: bool | None
    """None without a gate."""


def verdicts(figures: Figures, gates: GateSettings) -> list[Verdict]:
    """The headline figures against the quality floors of the configuration; figures that do not exist are left out."""

    def value(name: str) -> float | None:
        return float(figures[name]["value"]) if name in figures else None

    found: list[Verdict] = []

    def add(name: str, shown: float | None, detail: str, limit: float | None, *, at_most: bool = False) -> None:
        if shown is None:
            return
        holds = None if limit is None else (shown <= limit if at_most else shown >= limit)
        gate = "" if limit is None else f"{'at most' if at_most else 'at least'} {short(limit)}"
        found.append(Verdict(name, shown, detail, gate, holds))

    def ratio(over: str, under: str) -> float | None:
        top, bottom = value(over), value(under)
        return None if top is None or bottom is None or bottom <= 0 else top / bottom

    usages = [float(figure["value"]) for name, figure in figures.items() if name.startswith("usage_")]
    add("Reconstruction, PSNR in dB", value("psnr"), span(figures, "psnr"), gates.min_psnr)
    add("Codebook usage", min(usages, default=None), "of the level that is used least", gates.min_codebook_usage)
    kid = short(value("kid_samples") or 0)
    recognised, by_chance = (short(value(f"class_{kind}_samples") or 0) for kind in ("accuracy", "shuffled"))
    add(
        "KID against an untrained prior",
        ratio("kid_samples", "kid_untrained"),
        f"{kid} over {short(value('kid_untrained') or 0)}",
        gates.max_kid_to_untrained,
        at_most=True,
    )
    add(
        "KID against independent codes",
        ratio("kid_samples", "kid_marginals"),
        f"{kid} over {short(value('kid_marginals') or 0)}",
        gates.max_kid_to_marginals,
        at_most=True,
    )
    add(
        "Asked class, over chance",
        ratio("class_accuracy_samples", "class_shuffled_samples"),
        f"{recognised} recognised, {by_chance} by chance",
        gates.min_class_accuracy_to_chance,
    )
    covered = [short(value(f"coverage_{kind}") or 0) for kind in ("samples", "reconstructions")]
    add(
        "Coverage, against reconstructions",
        ratio("coverage_samples", "coverage_reconstructions"),
        " over ".join(covered),
        gates.min_coverage_to_reconstructions,
    )
    add(
        "Distance to training pictures",
        value("memorisation_ratio"),
        "of samples, over that of held-out reconstructions",
        gates.min_memorisation_ratio,
    )
    add("Recall of the samples", value("recall_samples"), span(figures, "recall_samples"), None)
    return found


def write_report(context: Context) -> str:
    """Write the report and say where it is, as a path or URL.

    Raises:
        InputError: there is no finished evaluation, or an artifact's manifest is damaged.
    """
    root = context.root
    read_manifest(root.child("evaluation"), "hvqd evaluate")
    manifests = {kind: found for kind in PARENTS if (found := find_manifest(root.child(kind))) is not None}
    measured = root.child("evaluation").read_json("metrics.json")
    content = page("hvqd: " + _subject(manifests), _body(context, manifests, measured)).encode()
    root.write_bytes(NAME, content)
    if context.run is not None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / NAME).write_bytes(content)
            context.run.log_file(Path(folder) / NAME)
    return str(root.path / NAME) if root.is_local else f"{root.url}/{NAME}"


def _body(context: Context, manifests: Mapping[str, Manifest], measured: Mapping[str, Any]) -> list[str]:
    figures: Figures = measured["figures"]
    evaluation = context.root.child("evaluation")
    parts = [
        _header(context, manifests),
        _headline(verdicts(figures, context.config.gates)),
        pictures(evaluation, measured),
        comparison(figures),
        codebooks(evaluation, figures),
        neighbours(evaluation, measured, figures),
        curves(context.root, manifests),
        all_figures(figures, measured["protocol"]),
        _cost(manifests),
        _lineage(context, manifests),
    ]
    return [part for part in parts if part]


# ---- parts of the page ----


def _subject(manifests: Mapping[str, Manifest]) -> str:
    facts = manifests["dataset"].facts if "dataset" in manifests else {}
    rows = sum(facts.get("rows", {}).values())
    height, width = facts.get("image_size", (0, 0))
    return f"{rows:,} pictures at {width}x{height}"


def _header(context: Context, manifests: Mapping[str, Manifest]) -> str:
    facts = manifests["dataset"].facts if "dataset" in manifests else {}
    classes = facts.get("classes", [])
    kinds = f"{len(classes)} classes ({', '.join(map(str, classes[:12]))}{', …' if len(classes) > 12 else ''})"
    version = manifests["registration"].facts.get("version") if "registration" in manifests else None
    registered = f"Version {version} of {context.config.tracking.model_name}. " if version is not None else ""
    links = (
        ("pictures", "Pictures"),
        ("comparison", "Side by side"),
        ("codebooks", "Codebooks"),
        ("neighbours", "Memorisation"),
        ("curves", "Curves"),
        ("figures", "All figures"),
        ("cost", "Time and cost"),
        ("lineage", "Lineage"),
    )
    anchors = "".join(f'<a href="#{name}">{text}</a>' for name, text in links)
    return (
        f"<header><h1>Hierarchical VQ-Diffusion on {escape(_subject(manifests))}</h1>"
        f"<p>{escape(registered)}{escape(kinds if classes else 'No classes: an unconditional model')}. "
        "Every figure is measured on the held-out test split.</p>"
        f"<nav>{anchors}</nav></header>"
    )


def _headline(found: Sequence[Verdict]) -> str:
    asked = [verdict for verdict in found if verdict.holds is not None]
    refused = [verdict.name for verdict in asked if not verdict.holds]
    if refused:
        text, tone = f"{len(refused)} of {len(asked)} quality gates refuse: {', '.join(refused)}.", "bad"
    else:
        text, tone = f"All {len(asked)} quality gates hold." if asked else "No quality gate is set.", "good"
    cards = []
    for verdict in found:
        mark = ""
        if verdict.holds is not None:
            word, colour = ("✓ holds", "good") if verdict.holds else ("✗ refuses", "bad")
            mark = f'<span class="gate {colour}-text">{word}: {escape(verdict.gate)}</span>'
        cards.append(
            f'<div class="card"><small>{escape(verdict.name)}</small><b>{short(verdict.value)}</b>'
            f"<small>{escape(verdict.detail)}</small>{mark}</div>"
        )
    return f'<p class="verdict {tone}">{escape(text)}</p><div class="cards">{"".join(cards)}</div>'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cost(manifests: Mapping[str, Manifest]) -> str:
    rows, total_seconds, total_hours = [], 0.0, 0.0
    for kind, manifest in manifests.items():
        seconds = manifest.provenance.get("seconds")
        if seconds is None:
            continue
        workers = int(manifest.provenance.get("workers", 1))
        threads = int(manifest.provenance.get("threads_per_worker", manifest.provenance.get("threads", 1)))
        images = manifest.facts.get("images") or sum((manifest.facts.get("rows") or {}).values())
        hours = seconds * workers * threads / 3600
        total_seconds, total_hours = total_seconds + seconds, total_hours + hours
        rows.append(
            [
                escape(kind),
                _duration(seconds),
                f"{workers} &times; {threads}",
                f"{images:,}" if images else "&ndash;",
                short(images / seconds) if images and seconds else "&ndash;",
                f"{hours:.3f}",
                f"{manifest.facts['parameters']:,}" if "parameters" in manifest.facts else "&ndash;",
            ]
        )
    rows.append(["Total", _duration(total_seconds), "", "", "", f"{total_hours:.3f}", ""])
    head = ["Step", "Time", "Workers &times; threads", "Images", "Images/s", "CPU-hours", "Parameters"]
    text = "Multiply the CPU-hours by your price of one. Times are of the machine that made each artifact."
    return section("cost", "Time and cost", text, table(head, rows), time_accounts(manifests))


def _lineage(context: Context, manifests: Mapping[str, Manifest]) -> str:
    rows = [
        [
            escape(kind),
            f"<code>{manifest.digest[:16]}</code>",
            ", ".join(f"{escape(parent)} <code>{digest[:8]}</code>" for parent, digest in manifest.parents.items())
            or "&ndash;",
            f"{len(manifest.files):,}",
            f"{sum(entry.bytes for entry in manifest.files.values()) / 1e6:,.1f} MB",
        ]
        for kind, manifest in manifests.items()
    ]
    licences = manifests["dataset"].facts.get("licences", []) if "dataset" in manifests else []
    settings = context.config.model_dump(mode="json", exclude={"tracking": {"uri"}})  # an address may hold a password
    listing = escape(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return section(
        "lineage",
        "Lineage",
        "A digest covers an artifact's content and its parents: equal digests mean equal results."
        + (f" Licences of the pictures: {escape(', '.join(map(str, licences)))}." if licences else ""),
        table(["Artifact", "Digest", "Made from", "Files", "Size"], rows),
        folded("Configuration", f"<pre>{listing}</pre>"),
    )
