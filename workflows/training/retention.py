"""Which checkpoints stay: the last ones, the best ones, one every so many images, and always the last good one.

Pure decisions; whoever carries them out deletes a checkpoint's manifest first, so that a half-deleted one counts no
more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workflows.training.catalog import Name


@dataclass(frozen=True)
class Retention:
    """What to keep; a checkpoint stays when any of the rules wants it."""

    last: int = 2
    """The newest so many, at least 1."""
    best: int = 0
    """So many with the best validation figure."""
    every_images: int = 0
    """The first one at or after each multiple of this; 0 for none."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"the newest checkpoint must stay: last={self.last}\nhint: last=1 or more")


@dataclass(frozen=True)
class Candidate:
    """A whole checkpoint of the training that is under way."""

    place: Name
    score: float | None
    """The larger, the better; None when nothing was measured before it."""


def kept(candidates: Iterable[Candidate], policy: Retention) -> set[str]:
    """Names of the checkpoints that stay."""
    ordered = sorted(candidates, key=lambda candidate: candidate.place, reverse=True)
    stay = {candidate.place.text for candidate in ordered[: policy.last]}
    scored = [candidate for candidate in ordered if candidate.score is not None]
    # Of equals the newer one stays: `sorted` keeps the order.
    stay |= {c.place.text for c in sorted(scored, key=lambda c: c.score or 0.0, reverse=True)[: policy.best]}
    if policy.every_images:
        first: dict[int, str] = {}
        for candidate in reversed(ordered):
            multiple = candidate.place.images_seen // policy.every_images
            if multiple:
                first.setdefault(multiple, candidate.place.text)
        stay |= set(first.values())
    return stay
