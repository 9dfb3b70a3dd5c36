"""The models that a picture server holds: which one draws, how the next one takes over, and how it goes back.

A request keeps the model that it began with, so that its pictures are of one version and a swap drops nothing. A new
champion is loaded and tried beside the one that draws; it takes over only when it has drawn. The one before stays until
the new one has proved itself: when a draw fails, the old one draws that request and all that follow.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from hvqd_model.prior.conditions import Conditions
from infra.errors import InputError
from workflows.config import SamplingSettings
from workflows.drawing.asking import Asked, resolve
from workflows.drawing.bundle import LoadedBundle, served_sampling
from workflows.drawing.generate import Pictures, draw_images

_log = logging.getLogger(__name__)
_PROOF_BATCHES = 20
_TRIAL_SEED = 1


@dataclass(frozen=True)
class ServedModel:
    """A version in memory."""

    version: str
    bundle: LoadedBundle
    sampling: SamplingSettings

    @classmethod
    def of(cls, version: str, bundle: LoadedBundle) -> ServedModel:
        """The version, drawing as its makers recommend."""
        return cls(version, bundle, served_sampling(bundle))

    def draw(self, seeds: Sequence[int], conditions: Conditions, steps: int) -> Pictures:
        """(n, H, W, 3) pictures."""
        sampling = self.sampling.model_copy(update={"steps": steps})
        return draw_images(self.bundle.vq, self.bundle.prior, seeds, conditions, sampling)

    def conditions(self, asked: Asked, seeds: Sequence[int]) -> Conditions:
        """What is asked of every picture, as the prior is told it.

        Raises:
            InputError: the model was not trained with it, or does not know the name.
        """
        return resolve(self.bundle, seeds, [asked] * len(seeds))

    def items(self, asked: Asked, seeds: Sequence[int], steps: int) -> list[Item]:
        """The pictures of a request.

        Raises:
            InputError: as `conditions`.
        """
        found, classes = self.conditions(asked, seeds), self.bundle.classes
        made = []
        for place, (seed, label) in enumerate(zip(seeds, found.labels.tolist(), strict=True)):
            row = found.each(lambda part, place=place: part[place : place + 1])  # type: ignore[misc]
            own = replace(asked, label=classes[label]) if label >= 0 else asked
            made.append(Item(self, seed, own, row, steps))
        return made


def try_out(model: ServedModel) -> None:
    """Draw a picture and look at it.

    Raises:
        RuntimeError: it is not of the model's size, or is all of one colour.
    """
    pictures = model.draw([_TRIAL_SEED], model.conditions(Asked(), [_TRIAL_SEED]), model.sampling.steps)
    expected = (1, *model.bundle.vq.config.image_size, 3)
    if pictures.shape != expected:
        raise RuntimeError(f"version {model.version} draws pictures of {pictures.shape}, not {expected}")
    if len(np.unique(pictures)) < 2:
        raise RuntimeError(f"version {model.version} draws a picture of a single colour")


@dataclass(frozen=True)
class Item:
    """One picture to draw."""

    model: ServedModel
    seed: int
    asked: Asked
    """By names, which another model understands, too; with the class that was drawn."""
    conditions: Conditions
    """The same for this model, a single row."""
    steps: int

    @property
    def kind(self) -> tuple[object, ...]:
        """What can be drawn together: one model, as many steps, told the same things.

        What a neighbour is told would change nothing but the rounding; a picture is the same bit for bit.
        """
        return id(self.model), self.steps, *(part is None for part in self.conditions)


def together(rows: Sequence[Conditions]) -> Conditions:
    """The conditions of several pictures that are told the same things."""
    parts = (None if column[0] is None else torch.cat(column) for column in zip(*rows, strict=True))
    return Conditions(*parts)  # type: ignore[arg-type]


class Holder:
    """The model that draws now, and how it is replaced; used by several threads."""

    def __init__(self, first: ServedModel, load: Callable[[str], ServedModel]) -> None:
        """Start with a model.

        Args:
            first: what draws until another takes over.
            load: a version in memory, by its number.
        """
        self._load = load
        self._lock = threading.Lock()
        self._current = first
        self._before: ServedModel | None = None
        self._proved = 0
        self.refused: dict[str, str] = {}
        """Why the last version that was asked for does not draw, by its number."""
        self.swaps = 0
        self.returns = 0

    @property
    def current(self) -> ServedModel:
        """The model for the next request."""
        with self._lock:
            return self._current

    def follow(self, champion: str | None) -> bool:
        """Load, try and take over the champion unless it draws already or has failed; whether it took over."""
        if champion == self.current.version:
            self.refused = {}  # whoever moves the alias away and back asks for another try
        if champion in (None, self.current.version, *self.refused):
            return False
        assert champion is not None
        try:
            model = self._load(champion)
            try_out(model)
        except Exception as error:  # whatever it is, the old one goes on drawing
            _log.exception("version %s does not take over", champion)
            self.refused = {champion: " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            return False
        with self._lock:
            self._before, self._current, self._proved = self._current, model, 0
            self.refused = {}
            self.swaps += 1
        return True

    def draw(self, items: Sequence[Item]) -> list[bytes]:
        """A PNG for each item; items of one kind are drawn together."""
        found: dict[int, bytes] = {}
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(item.kind, []).append(place)
        for places in groups.values():
            pictures = self._draw([items[place] for place in places])
            found |= {place: as_png(picture) for place, picture in zip(places, pictures, strict=True)}
        return [found[place] for place in range(len(items))]

    def _draw(self, items: Sequence[Item]) -> Pictures:
        model, steps, seeds = items[0].model, items[0].steps, [item.seed for item in items]
        try:
            pictures = model.draw(seeds, together([item.conditions for item in items]), steps)
        except Exception as error:
            before = self._go_back(model, error)
            if before is None:
                raise
            try:
                again = together([before.conditions(item.asked, [item.seed]) for item in items])
            except InputError:  # the one before was not trained with what is asked
                raise error from None
            return before.draw(seeds, again, steps)
        with self._lock:
            if model is self._current and self._before is not None:
                self._proved += 1
                if self._proved >= _PROOF_BATCHES:
                    self._before = None
        return pictures

    def _go_back(self, model: ServedModel, error: Exception) -> ServedModel | None:
        """The model that draws instead of one that failed; None when there is no other."""
        with self._lock:
            if model is not self._current:
                return self._current
            if self._before is None:
                return None
            _log.error("version %s failed, version %s draws again", model.version, self._before.version)
            self.refused = {model.version: " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            self._current, self._before = self._before, None
            self.returns += 1
            return self._current


def as_png(picture: Pictures) -> bytes:
    """The file of one (H, W, 3) picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
