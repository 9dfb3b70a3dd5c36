"""What Ray Tune is told and what it tells, without a cluster; and what a trial makes of its training's records."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import EnvironmentFailure, InputError
from infra.storage import open_store
from tests.unit.test_tuning_searcher import space
from tests.unit.test_tuning_sweep import PSNR, ledger, store_in
from tuning.ledger import Ledger, read_trials
from tuning.search import _bookkeeper, _scheduler, _search, reason
from tuning.space import SearchSpace
from tuning.trial import Place, _Watcher

CONTINUE, STOP = "CONTINUE", "STOP"
PRIOR = {"preset": "integration"}
ONE = {"prior.model.stagger": {"uniform": [0.0, 1.0]}}


def with_trials(folder: Path, curves: list[list[float]]) -> Ledger:
    """A ledger whose trials ended with these figures after 160, 320, … images; one of five rungs is whole."""
    book = ledger(store_in(folder))
    for number, curve in enumerate(curves):
        book.next_trial(len(curves))
        book.started(number)
        for place, value in enumerate(curve):
            book.rung(number, 160 * 2**place, {PSNR: value}, stopped=place == len(curve) - 1 < 2)
        book.ended(number, "stopped" if len(curve) < 3 else "finished")
    return book


def decisions(scheduler: Any, curves: Mapping[str, list[float]]) -> dict[str, list[str]]:
    """What the scheduler says to each figure of new trials, one trial after the other."""
    found: dict[str, list[str]] = {}
    for name, curve in curves.items():
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        found[name] = [
            scheduler.on_trial_result(None, trial, {"images": 160 * 2**place, "objective": value})
            for place, value in enumerate(curve)
        ]
    return found


def test_a_resumed_scheduler_decides_as_one_that_saw_the_earlier_trials(tmp_path: Path) -> None:
    earlier = {"a": [10.0, 12.0, 14.0], "b": [9.0], "c": [13.0, 14.0, 15.0]}
    later = {"d": [8.0], "e": [12.0, 11.0], "f": [14.0, 15.0, 16.0]}
    uninterrupted = _scheduler("asha", ledger(store_in(tmp_path / "empty")).space, ledger(store_in(tmp_path / "empty")))
    decisions(uninterrupted, earlier)
    book = with_trials(tmp_path / "resumed", list(earlier.values()))
    resumed = _scheduler("asha", book.space, Ledger(book.store, book.space, _NoSearcher(), "/"))
    assert decisions(resumed, later) == decisions(uninterrupted, later)
    assert decisions(resumed, {"g": [1.0]}) == {"g": [STOP]}


def test_asha_compares_at_the_rungs_of_the_space_and_minimises_if_asked(tmp_path: Path) -> None:
    book = ledger(store_in(tmp_path), metrics=[{"name": PSNR, "direction": "min"}])
    scheduler = _scheduler("asha", book.space, book)
    assert sorted(images for images, _ in scheduler._brackets[0]._rungs) == list(book.space.rungs) == [160, 320, 640]
    first, second = decisions(scheduler, {"first": [10.0], "second": [11.0]}).values()
    assert (first, second) == ([CONTINUE], [STOP])


def test_without_a_scheduler_nothing_is_stopped(tmp_path: Path) -> None:
    book = ledger(store_in(tmp_path))
    scheduler = _scheduler("none", book.space, book)
    assert scheduler.on_trial_result(None, SimpleNamespace(trial_id="x"), {"images": 160}) == CONTINUE


class _NoSearcher:
    refused: Any = None

    def propose(self, number: int) -> None:
        return None

    def tell(self, record: Any) -> None:
        """Nothing is learned."""


def test_the_bookkeeper_tells_finished_stopped_failed_and_dead_trials_apart(tmp_path: Path) -> None:
    book, numbers = ledger(store_in(tmp_path)), {}
    searcher = _search(book, 4, numbers)
    for name in "abcd":
        assert searcher.suggest(name) == {"number": len(numbers) - 1}
    assert searcher.suggest("e") == "FINISHED"
    keeper = _bookkeeper(book, numbers)

    def result(name: str, images: int, **more: Any) -> None:
        figures = {"images": images, "figures": {PSNR: 20.0}}
        keeper.on_trial_result(iteration=0, trials=[], trial=trials[name], result={**figures, **more})

    error = RuntimeError("the node went away\nand more")
    trials = {name: SimpleNamespace(trial_id=name, get_pickled_error=lambda: error) for name in numbers}
    for trial in trials.values():
        keeper.on_trial_start(iteration=0, trials=[], trial=trial)
    result("a", 160)
    result("a", 640, done=True)  # the scheduler may say stop at the last rung; the trial is whole all the same
    result("b", 160, done=True)
    keeper.on_trial_result(iteration=0, trials=[], trial=trials["c"], result={"failed": "no such file: x"})
    for name in "abc":
        keeper.on_trial_complete(iteration=0, trials=[], trial=trials[name])
    keeper.on_trial_error(iteration=0, trials=[], trial=trials["d"])
    ends = {record.number: (record.status, record.images, record.error) for record in read_trials(book.store)}
    assert ends == {
        0: ("finished", 640, None),
        1: ("stopped", 160, None),
        2: ("failed", 0, "no such file: x"),
        3: ("failed", 0, "its process died: the node went away"),
    }


def test_what_tune_keeps_of_the_ledger_is_nothing(tmp_path: Path) -> None:
    book = ledger(store_in(tmp_path))
    for part in (_search(book, 1, {}), _bookkeeper(book, {})):
        assert type(pickle.loads(pickle.dumps(part))) is object


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("no such file: x\nhint: name another"), "no such file: x"),
        (EnvironmentFailure("the disk\nis full\nhint: free some"), "the disk is full"),
        (ValueError("one\ntwo"), "ValueError: one two"),
        (InputError("no answer from http://me:secret@host/"), "no answer from http://me:***@host/"),
    ],
)
def test_why_a_trial_failed_is_said_in_a_line_without_remedy_and_secrets(error: Exception, said: str) -> None:
    assert reason(error) == said


# ---- a trial's records ----


def watcher(folder: Path, reported: int = 0, **changes: Any) -> tuple[_Watcher, list[tuple[int, Any]], list[Any]]:
    reports: list[tuple[int, Any]] = []
    mails: list[Any] = []
    searched: SearchSpace = space(budget={"images": 640, "min_images": 160}, **changes)
    store = open_store(str(folder))
    made = _Watcher(
        Place(store, store.child("tuning", "x"), searched),
        searched.resolved_base,
        lambda images, figures: reports.append((images, dict(figures))),
        lambda kind, content: mails.append((kind, content)),
        reported,
    )
    return made, reports, mails


def test_evaluations_become_rungs_but_for_the_last_which_waits_for_the_artifact(tmp_path: Path) -> None:
    heard, reports, mails = watcher(tmp_path)
    lines = [{"images": 80, "loss": 1.0}, {"images": 160, PSNR: 15.0}, {"images": 320, PSNR: 16.0, "x": 1.0}]
    for line in [*lines, {"images": 640, PSNR: 17.0}]:
        heard.hear(line)
    assert reports == [(160, {PSNR: 15.0}), (320, {PSNR: 16.0})]
    assert heard.measured() == {PSNR: 17.0}
    assert [kind for kind, _ in mails] == ["record"] * 4 and mails[0][1] == lines[0]


def test_rungs_that_an_earlier_attempt_reported_are_not_reported_again(tmp_path: Path) -> None:
    heard, reports, _ = watcher(tmp_path, reported=160)
    for images in (160, 320, 320):
        heard.hear({"images": images, PSNR: 15.0})
    assert [images for images, _ in reports] == [320]


def test_a_stage_that_the_budget_does_not_count_makes_no_rungs(tmp_path: Path) -> None:
    heard, reports, mails = watcher(tmp_path)
    heard.prefix = "vq_"
    heard.hear({"images": 160, PSNR: 15.0})
    assert reports == [] and mails == [("record", {"vq_images": 160, f"vq_{PSNR}": 15.0})]
    assert heard.measured() == {PSNR: 15.0}


def test_pictures_are_judged_at_rungs_alone_and_reported_for_the_state_that_drew_them(tmp_path: Path) -> None:
    metrics = [{"name": "val_kid_samples", "direction": "min"}]
    heard, reports, _ = watcher(tmp_path, base=PRIOR, job="prior", parameters=ONE, constraints=[], metrics=metrics)
    asked: list[int] = []

    def judge(images: int) -> tuple[int, dict[str, float]] | None:
        asked.append(images)
        return None if images > 300 else (images + 20, {"val_kid_samples": 3.0})

    heard.judge = judge
    for images in (80, 160, 240, 320, 480):
        heard.hear({"images": images, "val_bits_total": 500.0 - images})
    assert asked == [160, 320, 480]  # the rung of 320 waits for a state that can be judged
    assert reports == [(180, {"val_bits_total": 340.0, "val_kid_samples": 3.0})]


def test_codes_with_latents_lie_in_the_sweep_where_a_trial_may_ask_for_them(tmp_path: Path) -> None:
    metrics = [{"name": "val_kid_samples", "direction": "min"}]
    same = {"base": PRIOR, "job": "prior", "constraints": [], "metrics": metrics}
    noises = {"prior.model.noise": {"choice": ["absorbing", "gaussian"]}}
    mixed, _, _ = watcher(tmp_path, **same, parameters=noises)
    plain, _, _ = watcher(tmp_path, **same, parameters=ONE)
    assert mixed.place.shared["codes"].url == f"{tmp_path}/tuning/x/codes"
    assert mixed.place.shared["vq"].url == plain.place.shared["vq"].url == f"{tmp_path}/vq"
    assert plain.place.shared["codes"].url == f"{tmp_path}/codes"


def test_metrics_are_worked_out_from_figures_and_settings_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    metrics = [{"name": "cost", "direction": "min", "expression": "10 ** (-val_psnr / 10) + 0.004 * bits_per_pixel"}]
    heard, _, _ = watcher(tmp_path, metrics=metrics)
    heard.hear({"images": 160, PSNR: 20.0, "val_perceptual": math.nan})
    bits = 4 * 5 + 16 * 6  # the preset integration: 2 x 2 codes of 32, 4 x 4 of 64
    assert heard.measured() == {PSNR: 20.0, "cost": pytest.approx(0.01 + 0.004 * bits / 256)}
