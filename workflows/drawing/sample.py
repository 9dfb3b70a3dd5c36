"""`hvqd sample`: pictures as a grid or a folder, and the JSON that draws the same pictures again."""

from __future__ import annotations

import base64
import binascii
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError

from hvqd_model.prior.conditions import known_conditions
from hvqd_model.randomness import derive_key
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store, open_store
from workflows.config import RunConfig, SamplingSettings
from workflows.context import Progress
from workflows.drawing.asking import Asked, resolve
from workflows.drawing.bundle import LoadedBundle, load_bundle
from workflows.drawing.generate import Pictures, draw_images, image_grid

RECIPE = "recipe.json"
"""In a folder of pictures."""


@dataclass(frozen=True)
class SampleRequest:
    """What is asked for."""

    count: int
    """How many pictures."""
    asked: Asked
    """What they shall be, all alike."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    seed: int
    """Picture i is drawn from (seed, i) alone."""
    out: Path
    """PNG file of the grid, or a folder (a name without a suffix) of single pictures."""
    guided: bool = False
    """Whether guidance was asked for, and not left as it is recommended."""
    preview: bool = False
    """Whether to show the first pictures while they come into being."""
    workers: int = 1
    """Processes of a Ray cluster that draw; 1 draws here."""
    digest: str | None = None
    """The model that a recipe was drawn with."""

    def as_json(self, sampling: SamplingSettings) -> dict[str, Any]:
        """The recipe: all that the pictures depend on, besides the weights."""
        return {
            "count": self.count,
            **self.asked.as_json(),
            "seed": self.seed,
            "sampling": sampling.model_dump(mode="json"),
        }


def seeds_for(seed: int, count: int) -> list[int]:
    """One seed a picture."""
    return [derive_key("sample", seed, index) for index in range(count)]


def parse_guidance(text: str) -> str:
    """The setting `sampling.guidance` of `3` or `class=3,style=1.5`, as `--set` takes it.

    Raises:
        InputError: not of that form.
    """
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.partition("=") for part in parts]
    if len(parts) == 1 and "=" not in text:
        return f"sampling.guidance={text}"
    if not all(name.strip() and equals and value.strip() for name, equals, value in pairs):
        raise InputError(
            f"--guidance must be a number, or one for each condition: {text}\nhint: --guidance 3, or class=3,style=1.5"
        )
    return "sampling.guidance={" + ", ".join(f"{name.strip()}: {value.strip()}" for name, _, value in pairs) + "}"


def read_recipe(path: Path, request: SampleRequest) -> tuple[SampleRequest, SamplingSettings]:
    """The request that a recipe's file describes, with the output of another request.

    Raises:
        InputError: no such file, or not a recipe.
    """
    try:
        value = json.loads(path.read_text())
        encoded = value.get("map")
        asked = Asked(
            value["class"], value.get("style"), value.get("text"), encoded and base64.b64decode(encoded, validate=True)
        )
        sampling = SamplingSettings.model_validate(value["sampling"])
        count, seed, digest = int(value["count"]), int(value["seed"]), str(value["model"])
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}\nhint: `hvqd sample` writes one beside its pictures") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError, binascii.Error) as error:
        reason = " ".join(repr(error).split())[:200]
        raise InputError(
            f"{path} is no recipe: {reason}\nhint: `hvqd sample` writes one beside its pictures"
        ) from error
    return (
        SampleRequest(count, asked, request.model, seed, request.out, False, request.preview, request.workers, digest),
        sampling,
    )


def draw_samples(
    request: SampleRequest, config: RunConfig, progress: Progress, sampling: SamplingSettings | None = None
) -> dict[str, str]:
    """Draw the pictures and write them and their recipe.

    Args:
        sampling: other than the configuration's.

    Returns:
        The paths written: image (or folder) and recipe, and preview where one was asked for.

    Raises:
        InputError: a count or workers below one, a condition that the model does not know, no model, another model than
            the recipe's.
    """
    sampling = sampling or config.sampling
    if request.count < 1:
        raise InputError(f"-n must be at least 1: {request.count}\nhint: for example -n 16")
    if request.workers < 1:
        raise InputError(f"--workers must be at least 1: {request.workers}\nhint: 1 draws in this process")
    if request.out.suffix not in ("", ".png"):
        raise InputError(
            f"--out must be a PNG file, or a folder's name without a suffix: {request.out}\n"
            f"hint: --out {request.out.with_suffix('.png')}"
        )
    bundle = load_model_for(request, config)
    _check(request, sampling, bundle)
    seeds = seeds_for(request.seed, request.count)
    conditions = resolve(bundle, seeds, [request.asked] * request.count)
    film = None
    if request.preview:
        from workflows.drawing.film import Film

        film = Film(bundle.vq, sampling.steps, _beside(request.out, "-preview.png"))

    def report(done: int, _: int) -> None:
        progress.update(min(done, request.count), request.count, "pictures")

    images: Pictures
    if request.workers > 1:
        from workflows.drawing.draw_apart import draw_apart

        shared = open_store(config.root).child(f"drawing-{uuid.uuid4().hex}")
        images = draw_apart(bundle, seeds, conditions, sampling, request.workers, config.compute, shared, report)
    else:
        images = draw_images(bundle.vq, bundle.prior, seeds, conditions, sampling, report, film.show if film else None)
    recipe = {**request.as_json(sampling), "model": bundle.digest}
    written = _write(request, images, recipe)
    return written if film is None else {**written, "preview": film.finish(images)}


def load_model_for(request: Any, config: RunConfig) -> LoadedBundle:
    """The model that a request names, or the champion of the root, where it is fastest.

    Args:
        request: has `model`, a folder, `models:/name@alias` or None.
    """
    bundle = _load(request.model, config)
    if torch.cuda.is_available():
        bundle.vq.cuda()
        bundle.prior.cuda()
    return bundle


def _load(model: str | None, config: RunConfig) -> LoadedBundle:
    if model is not None and "models:/" not in model:
        return load_bundle(open_store(model).path)
    from workflows.pipeline import tracker_for
    from workflows.release.registry import load_version

    return load_version(tracker_for(config, open_store(config.root)), config.tracking.model_name, model)


def _check(request: SampleRequest, sampling: SamplingSettings, bundle: LoadedBundle) -> None:
    known = known_conditions(bundle.prior.config)
    scales = sampling.guidance
    if request.guided and not known and (isinstance(scales, Mapping) or scales not in (0, 1)):
        raise InputError(
            f"--guidance needs a model with conditions, and this one is unconditional: {scales}\n"
            "hint: leave --guidance out"
        )
    if request.digest is not None and request.digest != bundle.digest:
        raise InputError(
            f"the recipe was drawn with the model {request.digest[:12]}, and this is {bundle.digest[:12]}\n"
            "hint: name its folder or version with --model"
        )


# ---- what is written ----


def _beside(out: Path, ending: str) -> Path:
    return out.resolve().with_name(out.stem + ending)


def _write(request: SampleRequest, images: Pictures, recipe: Mapping[str, Any]) -> dict[str, str]:
    target = request.out.resolve()
    described = (json.dumps(recipe, indent=1) + "\n").encode()
    if request.out.suffix:
        columns = max(1, round(len(images) ** 0.5))
        grid = image_grid(images, columns, scale=max(1, 128 // images.shape[1]))
        files = {target.name: _png(grid), target.with_suffix(".json").name: described}
        folder, names = target.parent, {"image": target, "recipe": target.with_suffix(".json")}
    else:
        digits = len(str(len(images) - 1))
        files = {f"{index:0{digits}d}.png": _png(Image.fromarray(image)) for index, image in enumerate(images)}
        files[RECIPE] = described
        folder, names = target, {"folder": target, "recipe": target / RECIPE}
    try:
        store = Store(str(folder))
        for name, content in files.items():
            store.write_bytes(name, content)
    except OSError as error:
        raise EnvironmentFailure(f"cannot write {target}: {error}\nhint: choose another --out") from error
    return {name: str(path) for name, path in names.items()}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
