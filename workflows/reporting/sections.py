"""The report's sections on what was measured: pictures, comparison, codebooks, memorisation, curves, all figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from infra.storage import Store
from workflows.artifacts import Manifest
from workflows.reporting.figures import history_charts, short, usage_chart
from workflows.reporting.page import captioned, folded, picture_rows, section, table
from workflows.training.ledger import MEANING

Figures = Mapping[str, Mapping[str, Any]]
"""The figures of metrics.json."""

_SETS = ("real", "reconstructions", "samples", "marginals", "untrained")
_COMPARED = (
    ("kid", "KID", "lower is better"),
    ("fid", "FID (EfficientNet-Lite0)", "lower is better; small sets raise it"),
    ("recall", "Recall", "higher is better"),
    ("coverage", "Coverage", "higher is better"),
    ("density", "Density", "1 is like real; above it, prototypes"),
    ("class_accuracy", "Asked class recognised", "higher is better"),
    ("class_shuffled", "The same with the classes shuffled", "chance"),
)
_MEANINGS = {
    "psnr": "PSNR, all levels (dB)",
    "ssim": "SSIM, all levels",
    "rate_bits": "Rate: bits of an image's codes, uncompressed",
    "bits_total": "Bits of an image's codes under the prior (upper bound)",
    "class_majority": "Share of the largest class",
    "nearest_train_samples": "Distance to the nearest training picture, samples (median)",
    "nearest_train_heldout": "The same for held-out real pictures",
    "nearest_train_reconstructions": "The same for held-out reconstructions",
    "nearest_train_copies": "The same for reconstructed training pictures: what copies would show",
    "memorisation_ratio": "Samples over held-out reconstructions: 1 is as new as those",
    "memorisation_ratio_copies": "What that ratio would be for copies",
    "memorised_share": "Share of samples nearer to a training picture than 1 % of held-out reconstructions",
    "class_coverage": "Overlap of the classes of samples that nobody asked a class of with those of the data",
    "class_missing": "Classes that such samples leave out",
}
_LEVELS = {
    "usage": "Codes used",
    "perplexity": "Perplexity of the codes",
    "bits": "Bits a code under the prior",
    "error": "Error of the predicted latents",
}


def pictures(store: Store, measured: Mapping[str, Any]) -> str:
    grids = measured["grids"]
    parts = [
        "<h3>Held-out pictures, and what each prefix of the levels keeps</h3>",
        picture_rows(
            store.read_bytes("reconstructions.png"),
            grids["reconstructions.png"]["rows"],
            "Reconstructions of test pictures",
        ),
    ]
    if "samples_by_class.png" in grids:
        parts += [
            "<h3>Samples by asked class</h3>",
            picture_rows(store.read_bytes("samples_by_class.png"), grids["samples_by_class.png"]["rows"], "Samples"),
        ]
    else:
        parts += ["<h3>Samples</h3>", captioned(store.read_bytes("samples.png"), "Samples, not selected")]
    baselines = (
        captioned(store.read_bytes("marginals.png"), "Baseline: codes drawn independently of each other"),
        captioned(store.read_bytes("untrained.png"), "Baseline: an untrained prior"),
    )
    parts += ["<h3>What the prior has to beat</h3>", f'<div class="pair">{"".join(baselines)}</div>']
    text = "None of these pictures was selected: they are the first ones, or evenly spread over the split."
    return section("pictures", "Pictures", text, *parts)


def _cell(figures: Figures, name: str) -> str:
    if name not in figures:
        return "&ndash;"
    between = span(figures, name)
    return short(float(figures[name]["value"])) + (f"<small>{between}</small>" if between else "")


def span(figures: Figures, name: str) -> str:
    figure = figures.get(name, {})
    if figure.get("low") is None:
        return ""
    return f"{short(float(figure['low']))} to {short(float(figure['high']))}"


def comparison(figures: Figures) -> str:
    rows = []
    for prefix, name, note in _COMPARED:
        if any(f"{prefix}_{kind}" in figures for kind in _SETS):
            cells = [_cell(figures, f"{prefix}_{kind}") for kind in _SETS]
            rows.append([f"{escape(name)}<small>{escape(note)}</small>", *cells])
    counts = [figures[f"kid_{kind}"]["n"] if f"kid_{kind}" in figures else None for kind in _SETS]
    rows.append(["Pictures", *(f"{count:,}" if count is not None else "&ndash;" for count in counts)])
    text = (
        "Against the test pictures, under one protocol. <b>Real</b> is the floor that a perfect model would reach; "
        "<b>reconstructions</b> are the tokenizer's ceiling for every sample; <b>marginals</b> draw each code "
        "independently. "
        "High class accuracy with low recall means prototypes; the same with shuffled classes is chance. "
        "Small print: 95 % intervals over concepts."
    )
    head = ["", "Real", "Reconstructions", "Samples", "Marginals", "Untrained"]
    return section("comparison", "Side by side", text, table(head, rows, highlight=3))


def codebooks(store: Store, figures: Figures) -> str:
    counts = store.read_json("code_counts.json")
    charts = [
        usage_chart(
            level,
            f"Level {index}: usage {short(100 * figures[f'usage_{index}']['value'])} %, "
            f"perplexity {short(figures[f'perplexity_{index}']['value'])}",
        )
        for index, level in enumerate(counts)
    ]
    under = "; the prior's Gaussian noise bounds no code length."
    if "bits_total" in figures:
        under = f" and {short(figures['bits_total']['value'])} under the prior."
    text = (
        "How often each code occurs in the whole encoded dataset; level 0 is the coarsest. "
        f"An image's codes take {short(figures['rate_bits']['value'])} bits as they are{under}"
    )
    return section("codebooks", "Codebooks", text, f'<div class="charts">{"".join(charts)}</div>')


def neighbours(store: Store, measured: Mapping[str, Any], figures: Figures) -> str:
    parts = [
        f"{_MEANINGS[name]}: <b>{short(figures[name]['value'])}</b> ({span(figures, name) or 'no interval'})"
        for name in ("nearest_train_samples", "nearest_train_reconstructions", "nearest_train_heldout")
        if name in figures
    ]
    text = (
        "A model that memorises draws pictures closer to the training pictures than held-out pictures are. "
        "The first two rows show the samples that come closest to a training picture. " + "; ".join(parts) + "."
    )
    grid = measured["grids"]["nearest.png"]["rows"]
    return section(
        "neighbours", "Memorisation", text, picture_rows(store.read_bytes("nearest.png"), grid, "Nearest neighbours")
    )


def curves(root: Store, manifests: Mapping[str, Manifest]) -> str:
    parts = []
    for kind, name in (("vq", "Tokenizer"), ("prior", "Prior")):
        try:
            charts = history_charts(root.child(kind).read_json("history.json")) if kind in manifests else []
        except FileNotFoundError:
            charts = []
        alarms = manifests[kind].facts.get("alarms", []) if kind in manifests else []
        if charts or alarms:
            parts += [f"<h3>{name}</h3>", _alarms(alarms), f'<div class="charts">{"".join(charts)}</div>']
    return section("curves", "Training curves", "Against images seen; the last value stands in the legend.", *parts)


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> str:
    """What went wrong in a training, and what helps; nothing when nothing did."""
    if not alarms:
        return ""
    rows = [
        [
            escape(alarm["name"] if alarm["level"] is None else f"{alarm['name']}, level {alarm['level']}"),
            f"{alarm['images']:,}",
            f'<span class="text">{escape(alarm["seen"])}</span>',
            f'<span class="text">{escape(alarm["remedy"])}</span>',
        ]
        for alarm in alarms
    ]
    drawn = table(["Alarm", "After images", "What was seen", "What helps"], rows)
    drawn = drawn.replace('<th scope="col">What', '<th scope="col" class="wrap">What')
    return drawn.replace('<td><span class="text">', '<td class="wrap"><span class="text">')


def _meaning(name: str) -> str:
    stem, _, level = name.rpartition("_")
    if stem == "psnr_prefix":
        return "PSNR, coarsest level alone (dB)" if level == "1" else f"PSNR, first {level} levels (dB)"
    if stem in _LEVELS:
        return f"{_LEVELS[stem]}, level {level}"
    for prefix, meaning, _ in _COMPARED:
        if name.startswith(prefix + "_") and name.removeprefix(prefix + "_") in _SETS:
            return f"{meaning}, {name.removeprefix(prefix + '_')}"
    return _MEANINGS.get(name, name)


def all_figures(figures: Figures, protocol: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{escape(_meaning(name))}<small><code>{escape(name)}</code></small>",
            short(float(figure["value"])),
            span(figures, name) or "&ndash;",
            f"{figure['n']:,}",
        ]
        for name, figure in figures.items()
    ]
    shown = {key: value for key, value in protocol.items() if key != "n"}
    protocol_rows = (
        [
            escape(key.replace("_", " ")),
            f'<span class="text">{escape(value if isinstance(value, str) else json.dumps(value))}</span>',
        ]
        for key, value in shown.items()
    )
    return section(
        "figures",
        "All figures and their protocol",
        "What travels with every figure: how it was made, from how many pictures, and how sure it is.",
        folded(f"{len(rows)} figures", table(["", "Value", "95 % interval", "Pictures"], rows)),
        folded("Protocol", table(["", "How"], protocol_rows).replace("<td>", '<td class="wrap">')),
    )


def time_accounts(manifests: Mapping[str, Manifest]) -> str:
    """Where the trainings' time went: seconds of each account, and the share that was steps which count."""
    books = {kind: m.provenance["goodput"] for kind, m in manifests.items() if "goodput" in m.provenance}
    if not books:
        return ""
    rows = []
    for account, meaning in MEANING.items():
        seconds = [float(found["seconds"].get(account, 0.0)) for found in books.values()]
        if any(value >= 0.05 for value in seconds):
            rows.append([escape(meaning[:1].upper() + meaning[1:]), *(f"{value:,.1f}" for value in seconds)])
    rows.append(["All", *(f"{float(found['wall_seconds']):,.1f}" for found in books.values())])
    rows.append(["Share of steps that count", *(f"{float(found['goodput']):.1%}" for found in books.values())])
    return "<h3>Where the trainings' time went, in seconds</h3>" + table(["Account", *map(escape, books)], rows)
