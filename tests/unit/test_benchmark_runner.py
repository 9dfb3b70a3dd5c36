"""The benchmarks' runner: medians, verdicts, repeats that survive an interruption, and the page."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from tests.benchmarks.runner import (
    PAGE_HEAD,
    Benchmark,
    Figures,
    Parts,
    Target,
    machine,
    main,
    measure_repeats,
    medians,
    result,
    section,
    update_page,
    verdict,
    with_section,
)


def a_benchmark(**changes: object) -> Benchmark:
    base: dict[str, object] = {
        "name": "speed",
        "what": "How fast it is.",
        "parts": {"all": lambda quick, seed: {"ratio": float(seed)}},
        "targets": (Target("ratio", "<=", 1.05), Target("rate", ">=", 0.9)),
    }
    return Benchmark(**(base | changes))  # type: ignore[arg-type]


def test_a_median_is_taken_over_the_repeats_that_have_the_figure() -> None:
    assert medians([{"a": 3.0}, {"a": 1.0, "b": 5.0}, {"a": 2.0, "b": 7.0}]) == {"a": 2.0, "b": 6.0}


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({"ratio": 1.05, "rate": 0.9}, True),
        ({"ratio": 1.0501, "rate": 0.9}, False),
        ({"ratio": 1.05, "rate": 0.8999}, False),
        ({"ratio": math.nan, "rate": 0.9}, False),
        ({"ratio": 1.0}, False),
    ],
)
def test_a_full_run_holds_when_every_target_is_there_and_met(figures: Figures, holds: bool) -> None:
    assert verdict(a_benchmark(), figures, quick=False) is holds


def test_a_quick_run_decides_only_where_the_benchmark_says_so() -> None:
    met = {"ratio": 1.0, "rate": 1.0}
    assert verdict(a_benchmark(), met, quick=True) is None
    assert verdict(a_benchmark(quick_decides=True), met, quick=True) is True
    assert verdict(a_benchmark(quick_decides=True), {}, quick=True) is False


def test_the_result_is_plain_json_whatever_was_measured() -> None:
    text = json.dumps(result(a_benchmark(), {"ratio": math.inf, "rate": 1.0}, quick=False), allow_nan=False)
    assert json.loads(text) == {
        "name": "speed",
        "figures": {"ratio": None, "rate": 1.0},
        "targets": {"ratio": "<= 1.05", "rate": ">= 0.9"},
        "holds": False,
    }


def test_every_repeat_has_a_seed_of_its_own_and_the_quick_form_measures_once(tmp_path: Path) -> None:
    full = measure_repeats(a_benchmark(), Parts(tmp_path, "full"), 7, quick=False, log=io.StringIO())
    quick = measure_repeats(a_benchmark(), Parts(tmp_path, "quick"), 7, quick=True, log=io.StringIO())
    assert full == [{"ratio": 7.0}, {"ratio": 8.0}, {"ratio": 9.0}]
    assert quick == [{"ratio": 7.0}]


def test_an_interrupted_run_goes_on_with_the_parts_that_are_missing(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []

    def measure(name: str, seed: int) -> Figures:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((name, seed))
        return {name: float(seed)}

    benchmark = a_benchmark(
        parts={"one": lambda quick, seed: measure("one", seed), "two": lambda quick, seed: measure("two", seed)},
        repeats=2,
    )
    with pytest.raises(KeyboardInterrupt):
        measure_repeats(benchmark, Parts(tmp_path, "key"), 0, quick=False, log=io.StringIO())
    done, measured = list(measured), []
    repeats = measure_repeats(benchmark, Parts(tmp_path, "key"), 0, quick=False, log=io.StringIO())
    assert done == [("one", 0), ("two", 0), ("one", 1)]
    assert measured == [("two", 1)]
    assert repeats == [{"one": 0.0, "two": 0.0}, {"one": 1.0, "two": 1.0}]


def test_a_part_that_is_measured_once_is_in_the_first_repeat_alone(tmp_path: Path) -> None:
    benchmark = a_benchmark(
        parts={"often": lambda quick, seed: {"a": float(seed)}, "once": lambda quick, seed: {"b": float(seed)}},
        once=frozenset({"once"}),
    )
    found = measure_repeats(benchmark, Parts(tmp_path, "key"), 4, quick=False, log=io.StringIO())
    assert found == [{"a": 4.0, "b": 4.0}, {"a": 5.0}, {"a": 6.0}]


def test_photographs_that_are_not_there_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = a_benchmark(with_photographs=lambda path: {})
    with pytest.raises(SystemExit) as stopped:
        main(benchmark, ["--photos", str(tmp_path / "none.parquet")])
    assert stopped.value.code == 2
    assert "--photos must name a parquet file" in capsys.readouterr().err


def test_parts_of_other_code_or_arguments_are_not_taken(tmp_path: Path) -> None:
    assert Parts(tmp_path, "old").get("all", 0, lambda: {"a": 1.0}) == {"a": 1.0}
    assert Parts(tmp_path, "new").get("all", 0, lambda: {"a": 2.0}) == {"a": 2.0}
    Parts(tmp_path, "new").forget()
    assert list(tmp_path.iterdir()) == []


def test_a_section_shows_the_median_its_spread_and_what_is_missing() -> None:
    repeats = [{"ratio": 1.0}, {"ratio": 1.25}, {"ratio": 0.5}]
    lines = section(a_benchmark(), repeats, {"date": "today", "machine": "a fast one"}).splitlines()
    assert lines[0] == "## speed"
    assert {"How fast it is.", "- date: today", "- machine: a fast one"} <= set(lines)
    assert lines[-2:] == ["| `ratio` | 1 | 0.5 | 1.25 | <= 1.05 | yes |", "| `rate` | missing | | | >= 0.9 | no |"]


def test_a_section_is_replaced_in_its_place_and_everything_else_stays() -> None:
    page = with_section(with_section("# Page\n\nby hand\n", "one", "old"), "two", "other")
    page = page.replace("<!-- benchmark two -->", "between, by hand\n\n<!-- benchmark two -->")
    assert with_section(page, "one", "new") == page.replace("old", "new")
    assert page.count("<!-- benchmark") == 2


@pytest.mark.parametrize("left", ["<!-- benchmark one -->", "<!-- end of benchmark one -->"])
def test_a_page_with_half_a_section_is_refused(left: str) -> None:
    with pytest.raises(ValueError, match=r"both markers of the section one in their order(.|\n)*\nhint: remove"):
        with_section(f"# Page\n{left}\n", "one", "new")


def test_the_page_is_made_when_there_is_none_and_nothing_else_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "benchmarks.md"
    update_page(path, "one", "first")
    update_page(path, "one", "second")
    assert path.read_text().startswith(PAGE_HEAD.strip())
    assert "second" in path.read_text()
    assert "first" not in path.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_the_machine_is_described_in_one_line() -> None:
    description = machine()
    assert "\n" not in description
    for expected in ("cores", "GiB", "torch", "Python"):
        assert expected in description
