"""`hvqd sample`: a grid of pictures, and the JSON that draws the same grid again."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvqd_model.randomness import derive_key
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store, open_store
from workflows.bundle import LoadedBundle, class_index, load_bundle
from workflows.config import RunConfig
from workflows.context import Progress
from workflows.generate import draw_images, image_grid


@dataclass(frozen=True)
class SampleRequest:
    """What is asked for."""

    count: int
    """How many pictures."""
    label: str | None
    """Class name; None draws classes as often as the data has them."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    seed: int
    """Picture i is drawn from (seed, i) alone."""
    out: Path
    """PNG file of the grid."""

    def as_json(self, config: RunConfig) -> dict[str, Any]:
        """The recipe: all that the picture depends on, besides the weights."""
        return {
            "count": self.count,
            "class": self.label,
            "seed": self.seed,
            "sampling": config.sampling.model_dump(mode="json"),
        }


def seeds_for(seed: int, count: int) -> list[int]:
    """One seed a picture."""
    return [derive_key("sample", seed, index) for index in range(count)]


def draw_grid(request: SampleRequest, config: RunConfig, progress: Progress) -> dict[str, str]:
    """Draw the pictures and write the grid and its recipe.

    Returns:
        The paths written: image, recipe.

    Raises:
        InputError: a count below one, an unknown class, no model.
    """
    if request.count < 1:
        raise InputError(f"-n must be at least 1: {request.count}\nhint: for example -n 16")
    bundle = load_model_for(request, config)
    if request.label is None:
        labels = bundle.draw_labels(seeds_for(request.seed, request.count))
    else:
        labels = [class_index(request.label, bundle.classes)] * request.count
    total = request.count
    images = draw_images(
        bundle.vq,
        bundle.prior,
        seeds_for(request.seed, request.count),
        labels,
        config.sampling,
        progress=lambda done, _: progress.update(min(done, total), total, "pictures"),
    )
    return _write(request, config, images, bundle)


def load_model_for(request: SampleRequest, config: RunConfig) -> LoadedBundle:
    """The model that the request names, or the champion of the root."""
    if request.model is not None and "models:/" not in request.model:
        return load_bundle(open_store(request.model).path)
    from workflows.pipeline import tracker_for
    from workflows.registry import load_version

    return load_version(tracker_for(config, open_store(config.root)), config.tracking.model_name, request.model)


def _write(
    request: SampleRequest, config: RunConfig, images: np.ndarray[Any, Any], bundle: LoadedBundle
) -> dict[str, str]:
    columns = max(1, round(len(images) ** 0.5))
    buffer = io.BytesIO()
    scale = max(1, 128 // images.shape[1])
    image_grid(images, columns, scale=scale).save(buffer, "PNG")
    target = request.out.resolve()
    store = Store(str(target.parent))
    recipe = target.with_suffix(".json").name
    try:
        store.write_bytes(target.name, buffer.getvalue())
        store.write_bytes(
            recipe, (json.dumps({**request.as_json(config), "model": bundle.digest}, indent=1) + "\n").encode()
        )
    except OSError as error:
        raise EnvironmentFailure(f"cannot write {target}: {error}\nhint: choose another --out") from error
    return {"image": str(target), "recipe": str(target.with_suffix(".json"))}
