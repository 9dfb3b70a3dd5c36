"""Ten thousand decisions about what to keep: the last good checkpoint always stays, and each rule gets what it asks."""

from __future__ import annotations

import random
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import Store
from workflows.artifacts import MANIFEST
from workflows.config import RunConfig
from workflows.training.catalog import Name, Saved
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.inspection import delete_checkpoint, garbage
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


SAVES, RUNS = 100, 100


@settings(max_examples=RUNS, deadline=None)
@given(st.integers(0, 1 << 32).map(random.Random), policies)
def test_runs_that_drop_after_every_save_and_lose_some_to_damage_never_drop_their_last_good_one(
    chance: random.Random, policy: Retention
) -> None:
    """Ten thousand checkpoints in all."""
    present: list[Candidate] = []
    images = setbacks = 0
    for number in range(SAVES):
        images += 8 * chance.randint(1, 3)
        if chance.random() < 0.05 and present:  # back to some checkpoint that is there
            setbacks, images = setbacks + 1, chance.choice(present).place.images_seen
        newest = Candidate(Name(setbacks, images, 2, f"{number:08x}"), chance.choice([None, chance.uniform(-5, 5)]))
        present.append(newest)
        good = [each for each in present if each is newest or chance.random() < 0.9]
        stay = kept(good, policy)
        assert newest.place.text in stay
        assert {each.place.text for each in sorted(good, key=lambda each: each.place)[-policy.last :]} <= stay
        present = [candidate for candidate in good if candidate.place.text in stay]
        assert kept(present, policy) == stay, "deciding again changes nothing"


def saved(place: Name, request: str, score: float | None) -> Saved:
    """A checkpoint without files."""
    setbacks = [{"images": 8, "to": 0}] * place.setbacks
    return Saved(place.text, request, place.images_seen, [], setbacks, {}, {}, {}, {}, {}, score=score)


@settings(max_examples=50, deadline=None)
@given(candidates, st.integers(0, 1 << 32).map(random.Random), policies)
def test_what_is_cleared_away_on_a_disk_never_includes_the_newest_good_one_of_any_settings(
    found: list[Candidate], chance: random.Random, policy: Retention
) -> None:
    """Damaged, unfinished and foreign ones lie between the good ones."""
    with tempfile.TemporaryDirectory() as name:
        root = Store(name)
        store = root.child("vq", "checkpoints")
        good: dict[str, list[Name]] = {}
        bad = set()
        for candidate in found:
            folder, request = store.child(candidate.place.text), chance.choice(["one", "other"])
            match chance.choice(["good", "good", "damaged", "unfinished"]):
                case "good":
                    good.setdefault(request, []).append(candidate.place)
                    folder.write_json(MANIFEST, saved(candidate.place, request, candidate.score).as_json())
                case "damaged":
                    bad.add(candidate.place.text)
                    folder.write_bytes(MANIFEST, b"{}")
                case _:
                    bad.add(candidate.place.text)
                    folder.write_bytes("rank-00000.safetensors", b"half")
        newest = {max(places).text for places in good.values()}
        doomed = garbage(RunConfig(), root, "vq")
        assert newest.isdisjoint(each.name for each in doomed)
        assert bad <= {each.name for each in doomed}
        for each in doomed:
            delete_checkpoint(root, each)
        assert newest <= set(store.children())
        if "one" in good:  # a training saves, and tidies up after it
            place = Name(max(good["one"]).setbacks, max(good["one"]).images_seen + 8, 1, "ffffffff")
            writer = StoreCheckpoints(store, "one", policy)
            store.child(place.text).write_json(MANIFEST, saved(place, "one", None).as_json())
            writer._drop_old(saved(place, "one", None))
            left = store.children()
            assert place.text in left and len(left) >= min(policy.last, 2)
            assert bad.isdisjoint(left)


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the newest checkpoint must stay: last=0\nhint: last=1"):
        Retention(last=0)


@pytest.mark.parametrize("text", ["000000000320-w2", "320-b0-w2-01234567", "manifest.json", "", "ray"])
def test_what_is_not_named_like_a_checkpoint_is_none(text: str) -> None:
    assert Name.parse(text) is None


@given(places)
def test_a_name_tells_its_place(place: Name) -> None:
    assert Name.parse(place.text) == place
