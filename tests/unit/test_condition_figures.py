"""Judges of what was asked for: right on pictures whose answer is known, at chance on shuffled requests."""

from __future__ import annotations

import numpy as np
import pytest

from workflows.evaluation.condition_figures import CaptionJudge, MapJudge, against_shuffled
from workflows.evaluation.figures import Resampling

COLOURS = np.array([[250, 250, 250], [200, 20, 20], [20, 20, 200]], dtype=np.float64)


def drawn(maps: np.ndarray, seed: int) -> np.ndarray:
    """Pictures of the maps' colours, with noise."""
    noise = np.random.default_rng(seed).normal(0, 12, (*maps.shape, 3))
    return (COLOURS[np.maximum(maps, 0)] + noise).clip(0, 255).astype(np.uint8)


def some_maps(count: int, seed: int) -> np.ndarray:
    maps = np.random.default_rng(seed).integers(0, 3, (count, 2, 2)).repeat(4, 1).repeat(4, 2).astype(np.int16)
    maps[:, 0, 0] = -1
    return maps


def test_a_map_is_read_off_the_colours_and_agreement_counts_the_labelled_pixels() -> None:
    train, maps = some_maps(40, 0), some_maps(30, 1)
    judge = MapJudge(drawn(train, 0), train, labels=4)  # a label that no picture has is never seen
    assert np.array_equal(judge.judge(drawn(maps, 2))[maps >= 0], maps[maps >= 0])
    half = maps.copy()
    half[:, :, 4:] = (half[:, :, 4:] + 1) % 3
    expected = [((m == h) & (h >= 0)).sum() / (h >= 0).sum() for m, h in zip(maps, half, strict=True)]
    np.testing.assert_allclose(judge.agreement(drawn(maps, 2), half), expected)
    assert np.isnan(judge.agreement(drawn(maps[:1], 2), np.full((1, 8, 8), -1, dtype=np.int16))).all()


def test_the_right_caption_ranks_first_and_chance_is_a_half() -> None:
    generator = np.random.default_rng(0)
    captions = generator.normal(size=(30, 6)).astype(np.float32) + 2  # all have something in common
    mix = generator.normal(size=(6, 20))
    rows = generator.integers(0, 30, 400)
    features = (captions[rows] @ mix + 0.1 * generator.normal(size=(400, 20))).astype(np.float32)
    judge = CaptionJudge(features[:300], captions[rows[:300]], ridge=1e-3)
    shares = judge.rank_shares(features[300:], captions, rows[300:])
    assert shares.mean() > 0.98
    wrong = judge.rank_shares(features[300:], captions, np.roll(rows[300:], 1))
    assert wrong.mean() == pytest.approx(0.5, abs=0.12)
    slow = []
    mean, scale = features[:300].mean(0), features[:300].std(0)
    x = ((features[:300] - mean) / scale).astype(np.float64)
    centre = captions[rows[:300]].mean(0)
    weights = np.linalg.lstsq(
        np.concatenate([x, 1e-3**0.5 * np.eye(20)]), np.concatenate([captions[rows[:300]] - centre, np.zeros((20, 6))])
    )[0]
    for feature, own in zip(features[300:310], rows[300:310], strict=True):
        guess = (feature - mean) / scale @ weights
        fits = [guess @ (c - centre) / np.linalg.norm(c - centre) for c in captions]
        slow.append(sum(fit < fits[own] for fit in fits) / 29)
    np.testing.assert_allclose(shares[:10], slow, atol=1e-9)
    same = np.repeat(captions[:1], 4, axis=0)
    assert judge.rank_shares(features[:1], same, np.array([2])).tolist() == [0.5], "a tie is half a win"


def test_shuffled_requests_are_those_of_other_concepts_each_once() -> None:
    groups = np.array(["a"] * 3 + ["b"] * 2 + ["c"] * 4 + ["d"])
    seen: list[np.ndarray] = []

    def scores(order: np.ndarray) -> np.ndarray:
        seen.append(order)
        return (groups[order] == groups).astype(np.float64)

    figures = against_shuffled("style", scores, groups, Resampling(50, 3))
    assert sorted(figures) == ["style", "style_gain", "style_shuffled"]
    assert [figures[name].value for name in sorted(figures)] == [1.0, 1.0, 0.0]
    assert seen[0].tolist() == list(range(10)) and sorted(seen[1].tolist()) == list(range(10))
    assert figures["style_gain"].interval == (1.0, 1.0)
