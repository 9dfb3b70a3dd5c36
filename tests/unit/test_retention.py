"""Ten thousand decisions about what to keep: the last good checkpoint always stays, and each rule gets what it asks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.training.catalog import Name
from workflows.training.retention import Candidate, Retention, kept

places = st.builds(
    Name,
    setbacks=st.integers(0, 2),
    images_seen=st.integers(0, 40).map(lambda step: 8 * step),
    workers=st.integers(1, 8),
    attempt=st.integers(0, 3).map(lambda number: f"{number:08x}"),
)
candidates = st.lists(
    st.builds(Candidate, place=places, score=st.none() | st.integers(-3, 3).map(float)),
    max_size=12,
    unique_by=lambda candidate: candidate.place,
)
policies = st.builds(
    Retention, last=st.integers(1, 4), best=st.integers(0, 3), every_images=st.sampled_from([0, 8, 24, 100])
)


@settings(max_examples=1000, deadline=None)
@given(candidates, policies)
def test_the_last_good_one_stays_and_each_rule_gets_what_it_asks(found: list[Candidate], policy: Retention) -> None:
    stay = kept(found, policy)
    ordered = sorted(found, key=lambda candidate: candidate.place)
    assert stay <= {candidate.place.text for candidate in found}
    assert stay >= {candidate.place.text for candidate in ordered[-policy.last :]}
    scores = sorted((c.score for c in found if c.score is not None), reverse=True)
    if policy.best and scores:
        worst = scores[: policy.best][-1]
        assert stay >= {c.place.text for c in found if c.score is not None and c.score > worst}
        assert sum(c.score is not None and c.score >= worst and c.place.text in stay for c in found) >= min(
            policy.best, len(scores)
        )
    if policy.every_images:
        reached = {c.place.images_seen // policy.every_images for c in found} - {0}
        assert {c.place.images_seen // policy.every_images for c in found if c.place.text in stay} >= reached
    most = policy.last + policy.best + (len(found) if policy.every_images else 0)
    assert len(stay) <= most


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.none() | st.floats(-5, 5)), min_size=20, max_size=20), policies)
def test_a_run_that_drops_after_every_save_never_loses_its_last_good_one(
    saves: list[tuple[int, float | None]], policy: Retention
) -> None:
    present: list[Candidate] = []
    images = 0
    for number, (steps, score) in enumerate(saves):
        images += 8 * steps
        newest = Candidate(Name(0, images, 2, f"{number:08x}"), score)
        present.append(newest)
        stay = kept(present, policy)
        present = [candidate for candidate in present if candidate.place.text in stay]
        assert newest in present
        assert kept(present, policy) == stay, "deciding again changes nothing"


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the newest checkpoint must stay: last=0\nhint: last=1"):
        Retention(last=0)


@pytest.mark.parametrize("text", ["000000000320-w2", "320-b0-w2-01234567", "manifest.json", "", "ray"])
def test_what_is_not_named_like_a_checkpoint_is_none(text: str) -> None:
    assert Name.parse(text) is None


@given(places)
def test_a_name_tells_its_place(place: Name) -> None:
    assert Name.parse(place.text) == place
