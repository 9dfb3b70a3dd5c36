"""The report of a sweep: what it shows is what the records say."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import InputError
from infra.storage import open_store
from tuning.loading import space_from
from tuning.records import Rung, TrialRecord, dump_records, parse_records
from tuning.report import duration, find_sheet, sweep_page, write_sweep_report
from tuning.space import SearchSpace
from tuning.sweep import read_sweep

VOID = {"meta", "img", "br", "hr", "link", "input"}


def space() -> SearchSpace:
    values: dict[str, Any] = {
        "name": "small",
        "about": "Levels & sizes <of a tokenizer>.",
        "base": {"preset": "integration"},
        "job": "vq",
        "parameters": {
            "levels": {"choice": [1, 2], "ordered": True},
            "one": {"key": "vq.model.strides", "choice": [[8], [4]], "when": "levels == 1"},
            "two": {"key": "vq.model.strides", "choice": [[8, 4]], "when": "levels == 2"},
            "vq.model.codebook_sizes": {"log_int": [16, 64], "length": "levels"},
            "vq.train.learning_rate": {"log_uniform": [0.001, 0.01]},
        },
        "metrics": [{"name": "cost", "expression": "10 ** (-val_psnr / 10) + 0.01 * bits_per_pixel"}],
        "budget": {"trials": 16, "images": 640, "min_images": 160},
    }
    return space_from(values, "space.yaml")


def records(count: int = 16) -> list[TrialRecord]:
    """Trials whose cost follows the learning rate; every third was stopped, one failed."""
    of, generator = space(), np.random.default_rng(0)
    found = []
    for number in range(count):
        drawn = of.draw_any(generator)
        config = of.configuration(drawn)
        psnr = [10 + 400 * drawn["vq.train.learning_rate"] + images / 300 for images in of.rungs]
        rungs = tuple(
            Rung(images, of.measured({"val_psnr": value}, config)) for images, value in zip(of.rungs, psnr, strict=True)
        )
        settings = of.settings(drawn)
        if number == 5:
            found.append(TrialRecord(number, drawn, settings, "failed", (), 3.0, "the worker's <memory> ran out"))
        elif number % 3 == 1:
            found.append(TrialRecord(number, drawn, settings, "stopped", rungs[:1], 10.0))
        else:
            found.append(TrialRecord(number, drawn, settings, "finished", rungs, 40.0))
    return found


def sheet(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(content, "PNG")
    return content.getvalue()


class Balanced(HTMLParser):
    """Fails where tags do not close each other."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.anchors += [(named["href"] or "")[1:]] if tag == "a" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Closed already."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_closed_and_needs_nothing_from_elsewhere() -> None:
    page = sweep_page(space(), records(), {0: sheet(9)}, resamples=3)
    reader = Balanced()
    reader.feed(page)
    assert reader.open == []
    assert reader.anchors and set(reader.anchors) <= set(reader.ids)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 5  # curves, progress, parallel coordinates, importance, trade
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["aria-label"]
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for polyline in root.iter("polyline"):
            for point in polyline.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width and 0 <= y <= height


def test_the_page_says_what_the_records_say() -> None:
    found = records()
    page = sweep_page(space(), found, {}, resamples=3)
    best = min((r for r in found if r.status == "finished"), key=lambda r: r.rungs[-1].metrics["cost"])
    trained = sum(record.images for record in found)
    assert f"Trial {best.number} is the best: cost {best.rungs[-1].metrics['cost']:.4g}." in page
    assert f"<b>{trained:,}</b>" in page
    share = 100 * trained / (640 * 15)
    assert f"{share:.0f} % of training all of them to the end" in page
    assert "1 of 16 trials failed" in page and "the worker&#x27;s &lt;memory&gt; ran out" in page
    assert "Levels &amp; sizes &lt;of a tokenizer&gt;." in page and "<of a tokenizer>" not in page
    for record in found:
        assert f"Trial {record.number}</t" in page
    assert page.index("What mattered") < page.index('<text class="named"')
    assert "vq.train.learning_rate" in page


def test_the_cost_adds_up() -> None:
    page = sweep_page(space(), records(), {}, resamples=3)
    cost = page[page.index('<section id="cost">') :]
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th>(.*?)</tr>", cost[: cost.index("</section>")])
    found = {name: [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", cells)] for name, cells in rows}
    parts = [found[name] for name in ("trained to the end", "stopped early", "failed")]
    assert sum(int(part[0]) for part in parts) == int(found["Total"][0]) == 16
    images = [int(part[1].replace(",", "")) for part in parts]
    assert sum(images) == int(found["Total"][1].replace(",", ""))
    hours = sum(record.seconds for record in records()) * 2 / 3600  # the base has two workers of a thread
    assert float(found["Total"][4]) == pytest.approx(hours, abs=0.006)


def test_a_sweep_without_a_result_still_has_a_page() -> None:
    for found in ([], [TrialRecord(0, {}, {}, "failed", error="no memory")], [TrialRecord(0, {}, {}, "waiting")]):
        page = sweep_page(space(), found, {}, resamples=3)
        Balanced().feed(page)
        assert "No trial has a value of cost" in page
        assert "Too little to say" in page


def test_a_trial_of_another_space_has_its_place_in_the_tables_only() -> None:
    strange = TrialRecord(99, {"gone": 3}, {}, "finished", (Rung(640, {"cost": 0.5}),), 1.0)
    page = sweep_page(space(), [*records(), strange], {}, resamples=3)
    assert "Trial 99</t" in page and "gone 3" in page


def test_the_report_takes_the_most_telling_picture_of_each_of_the_best(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "tuning" / "small"))
    ordered = sorted(
        (r for r in records() if r.status == "finished"), key=lambda record: record.rungs[-1].metrics["cost"]
    )
    for place, record in enumerate(ordered[:2]):
        folder = store.child("trials", f"{record.number:04d}")
        folder.write_bytes("vq/pictures/latest.png", sheet(place))
        if place == 0:
            folder.write_bytes("samples.png", sheet(100))
    assert find_sheet(store.child("trials", f"{ordered[0].number:04d}")) == sheet(100)
    assert find_sheet(store.child("trials", f"{ordered[1].number:04d}")) == sheet(1)
    assert find_sheet(store.child("trials", f"{ordered[2].number:04d}")) is None
    path = write_sweep_report(store, space(), records(), store.child("trials"))
    assert path == str(tmp_path / "tuning" / "small" / "report.html")
    page = Path(path).read_text()
    assert page.count("<img") == 2


def test_a_sweep_on_a_root_can_be_read_and_reported_at_any_time(tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    store = root.child("tuning", "small")
    store.write_json("space.json", space().model_dump(mode="json"))
    for record in records()[:3]:
        store.child("trials", f"{record.number:04d}").write_json("record.json", record.as_json())
    sweep = read_sweep(root, "small")
    assert sweep.space == space()
    assert [record.as_json() for record in sweep.records] == [record.as_json() for record in records()[:3]]
    assert "3 trials" in Path(sweep.write_report()).read_text()
    with pytest.raises(
        InputError, match=r"no such sweep: .*/tuning/big \(there: small\)\nhint: give the sweep's --root"
    ):
        read_sweep(root, "big")
    store.write_json("space.json", {"name": 3})
    with pytest.raises(InputError, match=r"space.json cannot be read: .*\nhint: another version of hvqd wrote it"):
        read_sweep(root, "small")


def test_records_come_back_as_they_were() -> None:
    assert parse_records(dump_records(records())) == parse_records(dump_records(parse_records(dump_records(records()))))
    again = parse_records(dump_records(records()))
    assert [record.as_json() for record in again] == [record.as_json() for record in records()]
    assert again[0].value("cost") == records()[0].value("cost")
    assert again[0].value("cost", 200) == again[0].rungs[0].metrics["cost"]
    assert again[0].value("cost", 100) is None
    assert TrialRecord(0, {}, {}, rungs=(Rung(5, {"cost": float("inf")}),)).value("cost") is None


def test_times_are_in_a_readers_units() -> None:
    assert [duration(seconds) for seconds in (3, 300, 9000)] == ["3 s", "5.0 min", "2.5 h"]
