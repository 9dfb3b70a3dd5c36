"""Drawing pictures with a tokenizer and a prior, and laying pictures out in a grid.

The network always sees batches of one size, filled up where fewer are asked for, and every draw of a picture follows
from its own seed: a picture depends on no batch, order or number of other pictures.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.prior.conditions import Conditions, known_conditions
from hvqd_model.prior.guided import Guidance, Watcher
from hvqd_model.prior.prior import HierarchicalPrior
from workflows.config import SamplingSettings
from workflows.training.precision import Precision, computing_in

Pictures = NDArray[np.uint8]
"""(n, H, W, 3) RGB."""

_GAP = 2


def to_uint8(images: Tensor) -> Pictures:
    """(n, H, W, 3) pixels of (n, 3, H, W) pictures in [-1, 1], rounded; what lies outside is clipped."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def padded(values: Tensor, size: int) -> Tensor:
    """The values filled up with their first one to a fixed size."""
    if len(values) == size:
        return values
    return torch.cat([values, values[:1].expand(size - len(values), *values.shape[1:])])


@torch.no_grad()
def decode_codes(
    vq: HierarchicalVQ, codes: Sequence[NDArray[np.integer[Any]]], batch: int, precision: Precision = "fp32"
) -> Pictures:
    """(n, H, W, 3) pictures of any prefix of the levels, (n, h, w) codes each, in fixed batches."""
    count = len(codes[0])
    parts = []
    device = next(vq.parameters()).device
    for start in range(0, count, batch):
        levels = [torch.from_numpy(np.asarray(level[start : start + batch], dtype=np.int64)) for level in codes]
        with computing_in(precision, device):
            found = vq.decode(tuple(padded(level, batch).to(device) for level in levels))
        parts.append(to_uint8(found[: min(batch, count - start)]))
    return np.concatenate(parts)


@torch.no_grad()
def draw_codes(
    prior: HierarchicalPrior,
    seeds: Sequence[int],
    asked: Sequence[int] | Conditions,
    sampling: SamplingSettings,
    progress: Callable[[int, int], None] | None = None,
    watch: Watcher | None = None,
    known: Sequence[NDArray[np.integer[Any]] | None] | None = None,
) -> tuple[NDArray[np.int64], ...]:
    """(n, h, w) codes of each level.

    Args:
        seeds: one signed 64-bit number a picture.
        asked: the class of each picture, -1 for none (ignored by a prior that knows no class), or all conditions.
        progress: called with (pictures done, n).
        watch: shown the codes of the first pictures before every step; see `HierarchicalPrior.sample`.
        known: (n, h, w) codes of levels that come back unchanged, None for the others.

    Raises:
        ValueError: no picture, seeds and classes of different numbers, a condition that the prior does not know.
    """
    wanted = as_asked(prior, asked)
    if not seeds or len(seeds) != len(wanted.labels):
        raise ValueError(
            f"seeds and labels must be as many, at least one: {len(seeds)} and {len(wanted.labels)}\n"
            "hint: one seed and one class a picture"
        )
    total, batch = len(seeds), sampling.batch
    guidance = guidance_of(prior, sampling)
    device = next(prior.parameters()).device
    keys = torch.tensor(list(seeds), dtype=torch.int64)
    given = [None] * len(prior.config.grids) if known is None else [_tensor(level) for level in known]
    parts: list[list[NDArray[np.int64]]] = [[] for _ in prior.config.grids]
    for start in range(0, total, batch):
        here = min(batch, total - start)

        def report(step: int, steps: int, start: int = start, here: int = here) -> None:
            if progress is not None:
                progress(start + here * step // steps, total)

        def part(values: Tensor, start: int = start) -> Tensor:
            return padded(values[start : start + batch], batch).to(device)

        codes = prior.sample(
            part(keys),
            wanted.each(part),
            steps=sampling.steps,
            sampler=sampling.gaussian_sampler if prior.config.noise == "gaussian" else sampling.sampler,
            guidance=guidance,
            guidance_interval=sampling.guidance_interval,
            fine_guidance=sampling.fine_guidance,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            gumbel_scale=sampling.gumbel_scale,
            eta=sampling.eta,
            known=None if known is None else [None if level is None else part(level) for level in given],
            progress=report,
            watch=watch if start == 0 else None,
        )
        for level, found in zip(parts, codes, strict=True):
            level.append(found[:here].cpu().numpy())
    return tuple(np.concatenate(level) for level in parts)


def as_asked(prior: HierarchicalPrior, asked: Sequence[int] | Conditions) -> Conditions:
    """Conditions, or a class a picture as conditions; nobody's for a prior that knows no class."""
    if isinstance(asked, Conditions):
        return asked
    return Conditions(torch.tensor(list(asked) if prior.config.classes else [-1] * len(asked), dtype=torch.int64))


def _tensor(codes: NDArray[np.integer[Any]] | None) -> Tensor | None:
    return None if codes is None else torch.from_numpy(np.asarray(codes, dtype=np.int64))


def guidance_of(prior: HierarchicalPrior, sampling: SamplingSettings) -> Guidance:
    """The guidance to draw with: 1 for a prior that is told nothing."""
    if not known_conditions(prior.config):
        return 1.0
    asked = sampling.guidance
    return {str(name): weight for name, weight in asked.items()} if isinstance(asked, dict) else asked


def draw_images(
    vq: HierarchicalVQ,
    prior: HierarchicalPrior,
    seeds: Sequence[int],
    asked: Sequence[int] | Conditions,
    sampling: SamplingSettings,
    progress: Callable[[int, int], None] | None = None,
    watch: Watcher | None = None,
) -> Pictures:
    """(n, H, W, 3) pictures; see `draw_codes`."""
    return decode_codes(vq, draw_codes(prior, seeds, asked, sampling, progress, watch), sampling.batch)


def image_grid(images: Pictures, columns: int, scale: int = 1) -> Image.Image:
    """The pictures row by row, enlarged without smoothing, with thin white gaps.

    Args:
        columns: pictures in a row.
        scale: how many pixels wide a pixel becomes.

    Raises:
        ValueError: no picture, or fewer than one column or pixel.
    """
    count = len(images)
    if count < 1 or columns < 1 or scale < 1:
        raise ValueError(
            f"a grid needs pictures, columns and a scale of at least 1: {count}, {columns}, {scale}\n"
            "hint: for example columns=4, scale=2"
        )
    rows = -(-count // columns)
    height, width = images.shape[1] * scale, images.shape[2] * scale
    canvas = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas)
