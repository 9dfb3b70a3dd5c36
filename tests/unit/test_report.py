"""The report: one file that needs no network and shows what the artifacts hold."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import write_manifest
from workflows.config import GateSettings, RunConfig, TrackingSettings
from workflows.context import Context
from workflows.evaluation.figures import PictureSet
from workflows.evaluation.grids import draw_grids
from workflows.reporting.figures import history_charts, row_images, short, ticks, usage_chart
from workflows.reporting.report import verdicts, write_report
from workflows.training.alarms import Alarm

SETS = ("real", "reconstructions", "samples", "marginals", "untrained")


COLLAPSE = Alarm("codebook collapse", 1, 2_000, "1.0% of codes used, below <0.25>", "vq.model.restart_threshold=0.05")
GRADIENTS = Alarm("exploding gradients", None, 3_000, "the norm is inf", "vq.train.learning_rate=0.0005")


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1, "n": 40}


def figures(classes: bool = True) -> dict[str, dict[str, Any]]:
    found = {
        name: figure(value)
        for name, value in {
            "psnr": 23.5,
            "psnr_prefix_1": 17.5,
            "psnr_prefix_2": 23.5,
            "ssim": 0.8,
            "rate_bits": 800.0,
            "usage_0": 0.97,
            "usage_1": 0.92,
            "perplexity_0": 700.0,
            "perplexity_1": 650.0,
            "bits_0": 7.0,
            "bits_1": 6.5,
            "bits_total": 530.0,
            "nearest_train_samples": 9.0,
            "nearest_train_heldout": 8.0,
            "memorisation_ratio": 1.1,
        }.items()
    }
    for rank, name in enumerate(SETS):
        found |= {f"kid_{name}": figure(0.1 + rank), f"recall_{name}": figure(0.9 - 0.2 * rank)}
        found |= {f"coverage_{name}": figure(0.8 - 0.2 * rank)}
    if classes:
        found |= {"class_accuracy_samples": figure(0.6), "class_shuffled_samples": figure(0.2)}
    found["fid_samples"] = {"value": 321.0, "low": None, "high": None, "n": 40}
    return found


def picture_set(classes: int) -> PictureSet:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(40) % classes if classes else np.full(40, -1)
    return PictureSet(pictures, np.zeros((40, 4), np.float32), labels, np.arange(40))


def make_root(folder: Path, classes: tuple[str, ...] = ("cats & dogs", "<b>birds</b>")) -> Context:
    """A root with finished artifacts."""
    root = Store(str(folder))
    parents: dict[str, str] = {}
    drawn = picture_set(len(classes))
    grids = draw_grids(
        drawn.pictures,
        [drawn.pictures, drawn.pictures],
        dict.fromkeys(("samples", "marginals", "untrained"), drawn),
        classes,
        drawn.pictures,
        np.arange(40),
        (np.arange(40.0), np.arange(40)),
    )
    facts: dict[str, dict[str, Any]] = {
        "dataset": {"classes": list(classes), "rows": {"train": 100, "val": 9, "test": 40}, "image_size": [16, 16]},
        "vq": {"images": 6000, "parameters": 1234567, "alarms": [COLLAPSE.as_json(), GRADIENTS.as_json()]},
        "codes": {"rows": {"train": 100, "val": 9, "test": 40}},
        "prior": {"images": 4000, "parameters": 7654321},
    }
    for kind, known in facts.items():
        store = root.child(kind)
        if kind in ("vq", "prior"):
            history = [{"images": seen, "loss": 100 / seen, "bits_0": 9 - seen / 1e4} for seen in (1000, 2000, 3000)]
            store.write_json("history.json", history)
        manifest = write_manifest(store, kind, kind, parents, known, {"seconds": 360.0, "workers": 2})
        parents = {kind: manifest.digest}
    store = root.child("evaluation")
    for name, grid in grids.items():
        store.write_bytes(name, grid.png)
    store.write_json("code_counts.json", [[5, 0, 3, 2], [1] * 300])
    measured = {
        "protocol": {"split": "test", "extractor": {"name": "EfficientNet-Lite0"}, "n": {}},
        "figures": figures(bool(classes)),
        "grids": {name: grid.layout for name, grid in grids.items()},
    }
    store.write_json("metrics.json", measured)
    write_manifest(store, "evaluation", "evaluation", parents, {}, {"seconds": 36.0, "workers": 1, "threads": 2})
    tracking = TrackingSettings(uri="http://someone:hunter2@tracking.example")
    return Context(RunConfig(root=root.url, tracking=tracking), root)


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.anchors: set[str] = set()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        if tag not in ("meta", "img", "line", "rect", "polyline", "circle"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(named)
        if named.get("id"):
            self.ids.add(str(named["id"]))
        if str(named.get("href", "")).startswith("#"):
            self.anchors.add(str(named["href"])[1:])
        else:
            self.loads += [str(named[name]) for name in ("src", "href", "data", "srcset") if named.get(name)]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "line", "rect", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[str, Page]]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_report(make_root(Path(folder)))
        assert path == str(Path(folder).resolve() / "report.html") or path == f"{folder}/report.html"
        html = Path(path).read_text()
    page = Page()
    page.feed(html)
    yield html, page


def test_the_page_loads_nothing_and_its_tags_are_balanced(written: tuple[str, Page]) -> None:
    html, page = written
    assert page.open == []
    assert len(page.loads) >= 8 and all(target.startswith("data:image/png;base64,") for target in page.loads)
    assert not {"script", "link", "iframe"} & page.tags
    assert "@import" not in html and "url(" not in html


def test_the_alarms_of_a_training_stand_with_its_curves(written: tuple[str, Page]) -> None:
    html, _ = written
    curves = html.partition('id="curves"')[2].partition("</section>")[0]
    tokenizer, prior = curves.partition("<h3>Prior</h3>")[::2]
    for part in ("codebook collapse, level 1", "2,000", "1.0% of codes used, below &lt;0.25&gt;", COLLAPSE.remedy):
        assert part in tokenizer
    for part in ("exploding gradients<", "3,000", "the norm is inf", GRADIENTS.remedy):
        assert part in tokenizer
    assert prior and "What helps" not in prior, "nothing went wrong there"


def test_every_picture_has_an_alternative_text_and_every_anchor_a_target(written: tuple[str, Page]) -> None:
    _, page = written
    assert all(image.get("alt") for image in page.images)
    assert page.anchors and page.anchors <= page.ids


def test_the_page_tells_figures_floors_intervals_and_totals(written: tuple[str, Page]) -> None:
    _, page = written
    for expected in (
        "23.5",
        "21.15 to 25.85",
        "0.1",
        "321",
        "1,234,567",
        "0.820",
        "All 7 quality gates hold",
        "FID (Eff",
    ):
        assert expected in page.text, expected
    assert re.search(r"vq\s*6\.0 min\s*2 . 1\s*6,000\s*16\.67\s*0\.200", page.text)


def test_names_from_the_data_are_escaped_and_addresses_left_out(written: tuple[str, Page]) -> None:
    html, page = written
    assert "<b>birds</b>" in page.text and "<b>birds" not in html
    assert "hunter2" not in html and "tracking.example" not in html


def test_a_model_without_classes_has_a_report_too(tmp_path: Path) -> None:
    text = Path(write_report(make_root(tmp_path, classes=()))).read_text()
    assert "an unconditional model" in text and "Samples by asked class" not in text
    assert "All 6 quality gates hold" in text


def test_a_report_needs_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished artifact at .*\nhint: make it with `hvqd evaluate`"):
        write_report(Context(RunConfig(root=str(tmp_path)), Store(str(tmp_path))))
    assert list(tmp_path.iterdir()) == []


def test_a_gate_that_does_not_hold_is_named(tmp_path: Path) -> None:
    context = make_root(tmp_path)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    metrics["figures"]["psnr"]["value"] = 12.0
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    assert "1 of 7 quality gates refuse: Reconstruction, PSNR in dB." in Path(write_report(context)).read_text()


def test_verdicts_follow_the_gates() -> None:
    found = {verdict.name: verdict for verdict in verdicts(figures(), GateSettings(max_kid_to_marginals=None))}
    assert found["KID against an untrained prior"].value == pytest.approx(2.1 / 4.1)
    assert found["KID against an untrained prior"].holds is True
    assert found["KID against independent codes"].holds is None
    assert found["Codebook usage"].value == 0.92
    assert found["Asked class, over chance"].value == pytest.approx(3)
    strict = verdicts(figures(), GateSettings(min_class_accuracy_to_chance=3.5))
    assert [verdict.name for verdict in strict if verdict.holds is False] == ["Asked class, over chance"]


@pytest.mark.parametrize(
    ("change", "refusing"),
    [
        ({"memorisation_ratio": 0.9}, "Distance to training pictures"),
        ({"coverage_samples": 0.04}, "Coverage, against reconstructions"),
    ],
)
def test_copies_and_collapse_are_no_quality_that_holds(change: dict[str, float], refusing: str) -> None:
    measured = figures() | {name: figure(value) for name, value in change.items()}
    assert [verdict.name for verdict in verdicts(measured, GateSettings()) if verdict.holds is False] == [refusing]


def test_rows_of_a_grid_come_apart_as_they_were_put_together() -> None:
    drawn = picture_set(2)
    grid = draw_grids(
        drawn.pictures,
        [drawn.pictures],
        dict.fromkeys(("samples", "marginals", "untrained"), drawn),
        ("a", "b"),
        drawn.pictures,
        np.arange(40),
        (np.arange(40.0), np.arange(40)),
    )["samples_by_class.png"]
    rows = row_images(grid.png, 2)
    for label, row in enumerate(rows):
        pixels = np.asarray(Image.open(io.BytesIO(row)))
        assert pixels.shape == (64, 12 * 66 - 2, 3)
        for place, picture in enumerate(drawn.pictures[drawn.labels == label][:12]):
            assert np.array_equal(pixels[::4, place * 66 : place * 66 + 64 : 4], picture)


def test_levels_and_phases_share_a_chart() -> None:
    history: list[dict[str, Any]] = [
        {"images": 10, "loss": 1.0, "bits_0": 5.0, "bits_1": 6.0, "note": "text"},
        {"images": 20, "loss": 0.5, "validation_loss": 0.7, "bits_0": 4.0, "bits_1": float("nan")},
    ]
    charts = history_charts(history)
    assert len(charts) == 2
    assert "training <b>0.5</b>" in charts[0] and "validation <b>0.7</b>" in charts[0]
    assert "level 0 <b>4</b>" in charts[1] and "level 1 <b>6</b>" in charts[1] and "nan" not in charts[1]


def test_a_level_keeps_its_colour_and_what_happens_once_is_no_curve() -> None:
    history: list[dict[str, Any]] = [
        {"images": 10, "codebooks_started": 2.0, "use_0": 5.0, "use_1": 6.0, "val_use_1": 7.0},
        {"images": 20, "use_0": 4.0, "use_1": 3.0, "val_use_1": 8.0, "val_psnr": 20.0},
    ]
    use, psnr = history_charts(history)
    for label, look in (("level 0", "c0"), ("level 1", "c1"), ("validation level 1", "c1 dashed")):
        assert f'<polyline class="{look}"' in use and f'<span class="key {look}">{label} <b>' in use
    assert "dashed" not in psnr, "nothing else is beside it"


def test_usage_counts_every_code() -> None:
    drawing = usage_chart([5, 0, 3, 2], "Level 0")
    assert "3 of 4 codes used" in drawing and drawing.count("<rect") == 4
    assert usage_chart([1] * 1000, "Level 1").count("<rect") == 128
    assert "0 of 2 codes used" in usage_chart([0, 0], "Level 2")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (17.2, 23.9), (-3, 3), (1e-5, 9e-5), (0, 60_000), (5, 5)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in found)


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 0.123456, 12345.6, 23.456, 1e-7)] == [
        "0",
        "0.1235",
        "12,346",
        "23.46",
        "1e-07",
    ]
