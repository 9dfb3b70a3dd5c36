"""What is asked of a model in its user's words (names, captions, a map's file) as the conditions of its prior.

Axes: n pictures of H x W pixels, U captions of E dimensions.
"""

from __future__ import annotations

import base64
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hvqd_model.prior.conditions import Conditions, known_conditions
from infra.errors import InputError
from workflows.data.label_maps import NO_LABEL, fitted_map
from workflows.drawing.bundle import LoadedBundle, class_index

_NO_PICTURE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises about bytes that are no picture, or half of one."""
_LEAST_SIMILARITY = 0.3
"""Cosine below which a caption has nothing to do with any that the prior has learned."""


@dataclass(frozen=True)
class Asked:
    """What one picture shall be; None leaves a condition open."""

    label: str | None = None
    """Name of a class."""
    style: str | None = None
    """Name of a style."""
    text: str | None = None
    """A caption."""
    map_png: bytes | None = None
    """A PNG with one byte a pixel: the label map."""

    @property
    def leaves_class_open(self) -> bool:
        """Whether a class may be drawn: a caption or a map says itself what there is to see."""
        return self.label is None and self.text is None and self.map_png is None

    def as_json(self) -> dict[str, Any]:
        """For a recipe: all of it, the map in base64."""
        encoded = None if self.map_png is None else base64.b64encode(self.map_png).decode()
        return {"class": self.label, "style": self.style, "text": self.text, "map": encoded}


def resolve(bundle: LoadedBundle, seeds: Sequence[int], asked: Sequence[Asked]) -> Conditions:
    """The conditions of (n,) pictures.

    Where nothing says what to show, a class is drawn as often as the data has it; it follows from the seed alone.

    Raises:
        InputError: a condition that the model was not trained with, a name it does not know (the nearest is named), or
            a map that does not fit.
    """
    labels = [
        class_index(one.label, bundle.classes) if one.label is not None else (drawn if one.leaves_class_open else -1)
        for one, drawn in zip(asked, bundle.draw_labels(list(seeds)), strict=True)
    ]
    styles = texts = maps = None
    if any(one.style is not None for one in asked):
        names = bundle.prior.config.styles
        found = [-1 if one.style is None else style_index(one.style, names) for one in asked]
        styles = torch.tensor(found, dtype=torch.int64)
    if any(one.text is not None for one in asked):
        texts = torch.from_numpy(_embedded(bundle, [one.text for one in asked]))
    if any(one.map_png is not None for one in asked):
        maps = torch.from_numpy(np.stack([_map(bundle, one.map_png) for one in asked]))
    return Conditions(torch.tensor(labels, dtype=torch.int64), styles, texts, maps)


def style_index(name: str, styles: tuple[str, ...]) -> int:
    """The index of a style by its name, in any case.

    Raises:
        InputError: the model was not trained on such a style; the nearest is named.
    """
    if not styles:
        raise InputError(
            f"the model was trained without styles: {name}\n"
            "hint: leave --style out, or train a prior with prior.model.conditions=[class,style]"
        )
    lowered = [option.lower() for option in styles]
    if name.lower() in lowered:
        return lowered.index(name.lower())
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.3)
    remedy = f"did you mean {styles[lowered.index(close[0])]!r}?" if close else "choose one of them"
    raise InputError(f"no such style: {name} (the model knows {', '.join(styles)})\nhint: {remedy}")


def nearest_caption(bundle: LoadedBundle, vector: NDArray[np.float32]) -> tuple[str, float] | None:
    """The training caption that is most like one with this (E,) vector, and its cosine; None where none are known."""
    if bundle.text is None or not len(bundle.text.captions):
        return None
    cosines = bundle.text.embeddings.astype(np.float32) @ vector
    best = int(cosines.argmax())
    return bundle.text.captions[best], float(cosines[best])


def _embedded(bundle: LoadedBundle, captions: Sequence[str | None]) -> NDArray[np.float32]:
    """(n, E) vectors, zeros for None; each distinct caption is looked at once."""
    given = sorted({text for text in captions if text is not None})
    if not bundle.prior.config.text_dim or bundle.text is None:
        raise InputError(
            f"the model was trained without captions: {given[0]}\n"
            "hint: leave --text out, or train a prior with prior.model.conditions=[class,text]"
        )
    if not all(text.strip() for text in given):
        raise InputError("--text must have a word: it is empty\nhint: for example --text 'red apple'")
    vectors = dict(zip(given, bundle.text.encoder(given), strict=True))
    for text, vector in vectors.items():
        near = nearest_caption(bundle, vector)
        if near is not None and near[1] < _LEAST_SIMILARITY:
            raise InputError(
                f"the model has learned no caption like {text!r} (cosine {near[1]:.2f}, at least {_LEAST_SIMILARITY})\n"
                f"hint: the nearest is {near[0]!r}"
            )
    nothing = np.zeros(bundle.prior.config.text_dim, dtype=np.float32)
    return np.stack([nothing if text is None else vectors[text] for text in captions])


def _map(bundle: LoadedBundle, content: bytes | None) -> NDArray[np.int16]:
    """(H, W) labels at the size the prior knows, -1 for none."""
    config = bundle.prior.config
    if content is None:
        return np.full(config.map_size, -1, dtype=np.int16)
    if "map" not in known_conditions(config):
        raise InputError(
            "the model was trained without label maps\n"
            "hint: leave --map out, or train a prior with prior.model.conditions=[class,map]"
        )
    height, width = bundle.vq.config.image_size
    try:
        image = Image.open(io.BytesIO(content))  # the header alone: what is too large is never inflated
    except _NO_PICTURE as error:
        raise InputError(f"--map is no picture: {_reason(error)}\nhint: save it as a grey or palette PNG") from error
    if image.mode not in ("L", "P", "1"):
        raise InputError(
            f"--map must have one byte a pixel, the label: mode {image.mode}\nhint: save it as a grey or palette PNG"
        )
    if image.size != (width, height):
        raise InputError(
            f"--map must be {width} x {height} pixels: {image.size[0]} x {image.size[1]}\n"
            "hint: resize it without smoothing (nearest neighbour)"
        )
    try:
        labels = np.asarray(image).astype(np.int64)
    except _NO_PICTURE as error:
        raise InputError(f"--map is damaged: {_reason(error)}\nhint: save it again") from error
    strangers = sorted(set(np.unique(labels).tolist()) - set(range(config.map_labels)) - {NO_LABEL})
    if strangers:
        raise InputError(
            f"--map must have labels 0 to {config.map_labels - 1} ({NO_LABEL} for none): {strangers[0]}\n"
            "hint: use the labels of the training maps"
        )
    return fitted_map(content, config.map_size)


def _reason(error: BaseException) -> str:
    """The error's words without the buffer that Pillow names."""
    return " ".join(str(error).partition(" <_io")[0].split())[:80]


def read_map(path: Path) -> bytes:
    """A label map's file as a PNG.

    Raises:
        InputError: there is none, or it is no picture.
    """
    try:
        content = path.read_bytes()
        Image.open(io.BytesIO(content)).load()
    except FileNotFoundError as error:
        raise InputError(f"no such label map: {path}\nhint: name a grey PNG of the pictures' size") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the label map {path} cannot be read: {reason}\nhint: name a grey PNG") from error
    return content
