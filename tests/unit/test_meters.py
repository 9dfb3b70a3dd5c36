"""What a training tells the exporter, and that the dashboard asks for that and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from workflows.training.meters import METERS, TAGS, Meters, meters_for, nowhere

DASHBOARD = Path(__file__).parents[2] / "infra" / "deploy" / "docker" / "grafana" / "training.json"


@dataclass
class Exporter:
    """Remembers the last value of each gauge and device."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)
    tags: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, name: str, value: float, tags: dict[str, str]) -> None:
        assert name in METERS
        assert tuple(tags) == TAGS
        self.values[name, tags["device"]] = value
        self.tags.append(tags)


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_that_of_the_last_half_minute_and_falls_while_the_training_stands_still() -> None:
    exporter, clock = Exporter(), Clock()
    meters = Meters("vq", "s3://bucket/run", 0, exporter, clock)
    for second in range(120):
        clock.now += 1
        meters.step(1000 + 64 * second if second < 60 else 1000 + 64 * 60 + 8 * (second - 60), 10_000)
    meters.publish()
    assert exporter.values["hvqd_images_per_second", ""] == pytest.approx(8, rel=0.01)
    assert exporter.values["hvqd_images_seen", ""] == 1000 + 64 * 60 + 8 * 59
    assert exporter.values["hvqd_images_planned", ""] == 10_000
    clock.now += 300
    meters.publish()
    assert exporter.values["hvqd_images_per_second", ""] < 1


def test_what_is_not_known_is_not_exported() -> None:
    exporter = Exporter()
    meters = Meters("prior", "runs/a", 3, exporter)
    meters.publish()
    assert {name for name, _ in exporter.values} == {"hvqd_memory_bytes"}
    assert exporter.values["hvqd_memory_bytes", "host"] > 1e7
    meters.loss, meters.checkpoint_age = 0.25, lambda: 12.5
    meters.publish()
    assert exporter.values["hvqd_loss", ""] == 0.25
    assert exporter.values["hvqd_checkpoint_age_seconds", ""] == 12.5
    assert {tags["rank"] for tags in exporter.tags} == {"3"}


def test_the_driver_tells_what_its_books_say() -> None:
    exporter = Exporter()
    Meters("vq", "runs/a", None, exporter).tell_times({"goodput": 0.75, "restarts": 2})
    assert exporter.values == {("hvqd_goodput_ratio", ""): 0.75, ("hvqd_restarts", ""): 2.0}
    assert exporter.tags[0]["rank"] == "driver"


def test_nothing_is_told_where_nobody_scrapes() -> None:
    assert meters_for(None, "vq", "runs/a", 0).set is nowhere
    assert meters_for("ray://head:10001", "vq", "runs/a", None).set is nowhere


# ---- the dashboard ----


def queries(value: Any) -> Iterator[str]:
    """Every query of a dashboard: of its panels and of its variables."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key in ("expr", "definition"):
                yield child
            elif key == "query" and isinstance(child, dict):
                yield child["query"]
            else:
                yield from queries(child)
    elif isinstance(value, list):
        for child in value:
            yield from queries(child)


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported_and_every_metric_is_shown(dashboard: Any) -> None:
    found = list(queries(dashboard))
    assert len(found) >= 14
    names = [re.findall(r"\b(ray_\w+)", query) for query in found]
    assert all(names), "a query without a metric"
    assert {name for several in names for name in several} == {f"ray_{name}" for name in METERS}


def test_the_dashboard_selects_and_groups_by_labels_that_metrics_have(dashboard: Any) -> None:
    found = list(queries(dashboard))
    selected = {label for query in found for label in re.findall(r"[{,]\s*(\w+)=~?", query)}
    grouped = {label for query in found for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(", ")}
    shown = {label for panel in dashboard["panels"] for label in re.findall(r"{{(\w+)}}", json.dumps(panel["targets"]))}
    assert selected == {"root", "stage", "device"}
    assert grouped == shown == {"root", "stage", "rank"}
    assert (selected | grouped) <= set(TAGS)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {name for query in found for name in re.findall(r"\$(\w+)", query)} == variables


def test_panels_do_not_overlap_and_take_their_data_from_the_provisioned_source(dashboard: Any) -> None:
    cells: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 10
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"prometheus"}
    assert "uid: prometheus" in (DASHBOARD.parent / "datasource.yaml").read_text()
