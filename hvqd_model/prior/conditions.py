"""What pictures are asked to be: class, style, caption and label map, any of them, a row an image.

A condition that is hidden is what the network learned to do without: class or style -1, a caption's embedding of zeros,
a label map of -1 throughout. So any subset can be given to one model, and each is guided by a weight of its own.

Axes: B images, E dimensions of a caption's embedding, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hvqd_model.config import CONDITIONS, ConditionName, PriorConfig


class Conditions(NamedTuple):
    """The conditions of some images; None for what the prior does not know."""

    labels: Tensor
    """(B,) int64 classes, -1 for none."""
    styles: Tensor | None = None
    """(B,) int64, -1 for none."""
    texts: Tensor | None = None
    """(B, E) float32 embeddings of captions, zeros for none."""
    maps: Tensor | None = None
    """(B, H, W) integers: the label of each pixel, -1 for none."""

    def part(self, name: ConditionName) -> Tensor | None:
        """The tensor of one condition."""
        return {"class": self.labels, "style": self.styles, "text": self.texts, "map": self.maps}[name]

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """The same change made to every tensor."""
        return Conditions(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def hidden(self, hide: Mapping[ConditionName, Tensor]) -> Conditions:
        """The images' conditions without those that a (B,) bool tensor marks."""
        parts = []
        for name in CONDITIONS:
            part, marks = self.part(name), hide.get(name)
            if part is not None and marks is not None:
                nothing = torch.full_like(part[:1], 0 if name == "text" else -1)
                part = torch.where(marks.view(-1, *[1] * (part.ndim - 1)), nothing, part)
            parts.append(part)
        return Conditions(*parts)  # type: ignore[arg-type]

    def only(self, *names: ConditionName) -> Conditions:
        """The images' conditions with all others hidden."""
        everybody = torch.ones(len(self.labels), dtype=torch.bool, device=self.labels.device)
        return self.hidden({name: everybody for name in CONDITIONS if name not in names})


def as_conditions(given: Tensor | Conditions) -> Conditions:
    """Classes alone as conditions."""
    return given if isinstance(given, Conditions) else Conditions(given)


def known_conditions(config: PriorConfig) -> tuple[ConditionName, ...]:
    """The conditions that a prior was trained with."""
    sizes = (len(config.classes), len(config.styles), config.text_dim, config.map_labels)
    return tuple(name for name, size in zip(CONDITIONS, sizes, strict=True) if size)


def check_conditions(given: Tensor | Conditions, images: int, config: PriorConfig) -> Conditions:
    """The conditions, found to be this prior's; values are looked at on the CPU only (elsewhere that would stall).

    Raises:
        ValueError: one that the prior does not know, or of another shape or range.
    """
    found = as_conditions(given)
    classes = f"the classes are {', '.join(config.classes) or 'none: this prior is unconditional'}"
    _check_numbers("labels", "class", found.labels, images, len(config.classes), classes)
    for name, part in zip(("style", "text", "map"), found[1:], strict=True):
        if part is not None and name not in known_conditions(config):
            raise ValueError(
                f"this prior knows no {name}: it was trained with {', '.join(known_conditions(config)) or 'nothing'}\n"
                f"hint: leave {name} out, or train a prior with it (prior.model.conditions)"
            )
    if found.styles is not None:
        styles = f"the styles are {', '.join(config.styles)}"
        _check_numbers("styles", "style", found.styles, images, len(config.styles), styles)
    if found.texts is not None and tuple(found.texts.shape) != (images, config.text_dim):
        raise ValueError(
            f"texts must be ({images}, {config.text_dim}) embeddings: {tuple(found.texts.shape)}\n"
            "hint: embed captions with the encoder that the prior was trained with"
        )
    if found.maps is not None:
        _check_maps(found.maps, images, config)
    return found


def _check_numbers(what: str, one: str, found: Tensor, images: int, count: int, remedy: str) -> None:
    bad_shape = tuple(found.shape) != (images,)
    if bad_shape or (found.device.type == "cpu" and images and not -1 <= int(found.min()) <= int(found.max()) < count):
        given = tuple(found.shape) if bad_shape else found[(found < -1) | (found >= count)].tolist()
        raise ValueError(
            f"{what} must be ({images},) numbers from -1 (no {one}) to {count - 1}: {given}\nhint: {remedy}"
        )


def _check_maps(maps: Tensor, images: int, config: PriorConfig) -> None:
    shape = (images, *config.map_size)
    if tuple(maps.shape) != shape or maps.is_floating_point():
        raise ValueError(
            f"maps must be {shape} integers: {maps.dtype} {tuple(maps.shape)}\n"
            "hint: one label a pixel, at the size of the pictures"
        )
    if maps.device.type == "cpu" and maps.numel() and not -1 <= int(maps.min()) <= int(maps.max()) < config.map_labels:
        raise ValueError(
            f"labels of maps must be from -1 (none) to {config.map_labels - 1}: {int(maps.min())}..{int(maps.max())}\n"
            "hint: use the labels that the training maps had"
        )
