"""Copies and left-out classes: figures and alarms."""

from __future__ import annotations

import numpy as np
import pytest

from workflows.evaluation.figures import Figure
from workflows.evaluation.judge import ClassJudge
from workflows.evaluation.novelty import coverage_figures, memorisation_figures, novelty_alarms


def distances(rng: np.random.Generator, centre: float, count: int = 400) -> np.ndarray:
    return rng.normal(centre, 1.0, count)


def memorisation(samples: np.ndarray) -> dict[str, Figure]:
    rng = np.random.default_rng(0)
    heldout, copies = distances(rng, 10.0), distances(rng, 6.0)
    nearest = {
        "nearest_train_samples": Figure(float(np.median(samples)), len(samples), (9.0, 11.0)),
        "nearest_train_reconstructions": Figure(float(np.median(heldout)), len(heldout), (8.0, 12.0)),
    }
    return nearest | memorisation_figures(nearest, samples, heldout, copies)


def test_new_samples_have_the_ratio_one_and_copies_that_of_copies() -> None:
    new, copied = (memorisation(distances(np.random.default_rng(1), centre)) for centre in (10.0, 6.0))
    assert new["memorisation_ratio"].value == pytest.approx(1, abs=0.02)
    assert new["memorisation_ratio"].interval == (9.0 / 12.0, 11.0 / 8.0)
    assert copied["memorisation_ratio"].value == pytest.approx(copied["memorisation_ratio_copies"].value, abs=0.02)
    assert new["memorised_share"].value < 0.03 and copied["memorised_share"].value > 0.9
    assert novelty_alarms(new) == []
    (alarm,) = novelty_alarms(copied)
    assert alarm.name == "memorisation" and "is nearer to 0.6" in alarm.seen
    assert alarm.text.splitlines()[1].startswith("remedy: ") and alarm.as_json()["remedy"] == alarm.remedy


def test_a_tenth_of_copies_shows_in_the_share_and_not_in_the_median() -> None:
    rng = np.random.default_rng(1)
    mixed = memorisation(np.concatenate([distances(rng, 10.0, 360), distances(rng, 6.0, 40)]))
    assert mixed["memorised_share"].value == pytest.approx(0.11, abs=0.03)
    assert mixed["memorisation_ratio"].value > 0.95


def judged(seed: int, shares: tuple[float, ...], count: int = 900) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, count, p=shares)
    features = rng.normal(size=(count, 6)).astype(np.float32)
    features[np.arange(count), labels] += 8
    return features, labels


def test_coverage_is_the_overlap_of_the_classes_and_counts_every_class() -> None:
    features, labels = judged(0, (0.4, 0.3, 0.3))
    judge = ClassJudge(features, labels, 3, ridge=0.01)
    names = ("animals", "faces", "flags")
    shown, _ = judged(1, (0.4, 0.3, 0.3))
    same, counts = coverage_figures(judge, judged(2, (0.4, 0.3, 0.3))[0], shown, names)
    assert same["class_coverage"].value == pytest.approx(1, abs=0.06) and same["class_missing"].value == 0
    assert set(counts) == set(names)
    assert sum(found["unasked"] for found in counts.values()) == 900
    lost, counts = coverage_figures(judge, judged(3, (0.0, 0.5, 0.5))[0], shown, names)
    assert lost["class_coverage"].value == pytest.approx(0.6, abs=0.05) and lost["class_missing"].value == 1
    assert counts["animals"]["unasked"] == 0 < counts["animals"]["reconstructions"]
    assert novelty_alarms(same) == novelty_alarms(lost) == []
    alone, _ = coverage_figures(judge, judged(4, (0.0, 0.0, 1.0))[0], shown, names)
    (alarm,) = novelty_alarms(alone)
    assert alarm.name == "classes left out" and "below 0.5" in alarm.seen


def test_samples_that_reach_next_to_nothing_are_a_collapse() -> None:
    figures = {"recall_samples": Figure(0.01, 400), "recall_reconstructions": Figure(0.9, 400)}
    (alarm,) = novelty_alarms(figures)
    assert alarm.name == "mode collapse" and alarm.remedy.startswith("a smaller sampling.guidance")
    assert novelty_alarms({**figures, "recall_samples": Figure(0.1, 400)}) == []
    assert novelty_alarms({}) == []
