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
from dataclasses import dataclass

import numpy as np
from PIL import Image

from workflows.bundle import LoadedBundle, class_index, served_sampling
from workflows.config import SamplingSettings
from workflows.generate import Pictures, draw_images

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

    def draw(self, seeds: Sequence[int], labels: Sequence[int], steps: int) -> Pictures:
        """(n, H, W, 3) pictures."""
        sampling = self.sampling.model_copy(update={"steps": steps})
        return draw_images(self.bundle.vq, self.bundle.prior, seeds, labels, sampling)

    def labels(self, name: str | None, seeds: Sequence[int]) -> list[int]:
        """A class for each picture.

        Raises:
            InputError: the model does not know the class.
        """
        if name is None:
            return self.bundle.draw_labels(seeds)
        return [class_index(name, self.bundle.classes)] * len(seeds)


def try_out(model: ServedModel) -> None:
    """Draw a picture and look at it.

    Raises:
        RuntimeError: it is not of the model's size, or is all of one colour.
    """
    pictures = model.draw([_TRIAL_SEED], model.labels(None, [_TRIAL_SEED]), model.sampling.steps)
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
    label: int
    steps: int


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
        """A PNG for each item; items of one model and number of steps are drawn together."""
        found: dict[int, bytes] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault((id(item.model), item.steps), []).append(place)
        for places in groups.values():
            model, steps = items[places[0]].model, items[places[0]].steps
            seeds = [items[place].seed for place in places]
            labels = [items[place].label for place in places]
            pictures = self._draw(model, seeds, labels, steps)
            found |= {place: as_png(picture) for place, picture in zip(places, pictures, strict=True)}
        return [found[place] for place in range(len(items))]

    def _draw(self, model: ServedModel, seeds: Sequence[int], labels: Sequence[int], steps: int) -> Pictures:
        try:
            pictures = model.draw(seeds, labels, steps)
        except Exception as error:
            before = self._go_back(model, error)
            if before is None or before.bundle.classes != model.bundle.classes:
                raise
            return before.draw(seeds, labels, steps)
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
