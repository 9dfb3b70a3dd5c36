"""`hvqd edit`, `hvqd interpolate`: what each asks for, and the sheet it writes.

Networks always see batches of one size, filled up, so that a result does not depend on how many are asked for.

Axes: n results, H x W pixels, F frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerSettings
from hvqd_model.diffusion.samplers import SamplerSettings
from hvqd_model.editing import Codes, blended, coarse_codes, inpaint, renoised, restyled_codes, scaled_back
from hvqd_model.metrics import psnr
from hvqd_model.prior.completion import complete
from hvqd_model.prior.conditions import Conditions
from hvqd_model.randomness import derive_key
from infra.errors import InputError
from workflows.config import RunConfig, SamplingSettings
from workflows.data.batches import to_input
from workflows.data.pictures import Rejected, prepare
from workflows.drawing.asking import Asked, resolve
from workflows.drawing.bundle import LoadedBundle
from workflows.drawing.generate import Pictures, decode_codes, guidance_of, padded, to_uint8
from workflows.drawing.reconstruct import write_picture
from workflows.drawing.sample import load_model_for, seeds_for
from workflows.drawing.sheets import column_sheet, to_png
from workflows.drawing.tokenizer_source import find_pictures
from workflows.encode import encode_batches

BATCH = 16
"""Pictures the networks see at once, always."""
_HOLE = (230, 60, 160)


@dataclass(frozen=True)
class EditRequest:
    """What every edit is given."""

    path: str
    """The picture."""
    asked: Asked
    """What the drawn parts shall be; an open condition stays open."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    seed: int
    count: int
    """How many results."""
    out: Path
    """PNG file of the sheet."""


@dataclass(frozen=True)
class Editor:
    """A model that changes pictures, and how it draws."""

    bundle: LoadedBundle
    sampling: SamplingSettings
    config: RunConfig

    @classmethod
    def open(cls, request: Any, config: RunConfig) -> Editor:
        """Load the model; what it cannot do is found out at once.

        Args:
            request: has `model` and `count`.
        """
        if request.count < 1:
            raise InputError(f"-n must be at least 1: {request.count}\nhint: for example -n 4")
        bundle = load_model_for(request, config)
        return cls(bundle, config.sampling, config)

    def picture(self, path: str) -> Pictures:
        """(1, H, W, 3) the picture at the model's size."""
        return find_pictures(path, self.config, self.bundle.vq.config.image_size, 1).pictures[:1]

    def codes(self, pictures: Pictures) -> Codes:
        """(n, h, w) codes of each level."""
        rounds = self.config.encode.refine_rounds
        found = encode_batches(self.bundle.vq, pictures, str(self._device), "fp32", BATCH, rounds)
        return tuple(torch.from_numpy(level.astype(np.int64)) for level in found)

    def pictures(self, codes: Sequence[Tensor]) -> Pictures:
        """(n, H, W, 3) what codes look like."""
        return decode_codes(self.bundle.vq, [level.numpy() for level in codes], BATCH)

    def completed(self, asked: Asked, seeds: list[int]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Codes]:
        """Draws unknown codes of (n, h, w) ones, all asked for alike."""
        return self.drawer(_exactly(self.bundle, seeds, asked), seeds)

    def drawer(self, given: Conditions, seeds: Sequence[int]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Codes]:
        """Draws unknown codes of (n, h, w) ones, batch by batch.

        Args:
            given: conditions of the n pictures.
        """
        keys = torch.tensor(seeds, dtype=torch.int64)
        sampling = self.sampling
        walk: SamplerSettings | GaussianSamplerSettings = SamplerSettings(
            sampling.steps, "confidence", sampling.temperature, sampling.top_k, sampling.top_p, sampling.gumbel_scale
        )
        if self.bundle.prior.config.noise == "gaussian":
            walk = GaussianSamplerSettings(sampling.steps, sampling.gaussian_sampler, sampling.eta)

        def draw(codes: Sequence[Tensor], unknown: Sequence[Tensor]) -> Codes:
            parts = []
            for first in range(0, len(keys), BATCH):

                def part(values: Tensor, first: int = first) -> Tensor:
                    return padded(values[first : first + BATCH], BATCH).to(self._device)

                found = complete(
                    self.bundle.prior,
                    [part(level) for level in codes],
                    [part(marks) for marks in unknown],
                    part(keys),
                    given.each(part),
                    settings=walk,
                    guidance=guidance_of(self.bundle.prior, sampling),
                    interval=sampling.guidance_interval,
                    fine_guidance=sampling.fine_guidance,
                )
                parts.append([level[: len(keys) - first].to(codes[0].device) for level in found])
            return tuple(torch.cat(level) for level in zip(*parts, strict=True))

        return draw

    @property
    def _device(self) -> torch.device:
        return next(self.bundle.prior.parameters()).device


def _exactly(bundle: LoadedBundle, seeds: list[int], asked: Asked) -> Conditions:
    """What is asked for and nothing else: no class is drawn for a picture that is there already."""
    given = resolve(bundle, seeds, [asked] * len(seeds))
    return given._replace(labels=torch.full_like(given.labels, -1)) if asked.label is None else given


def _repeated(codes: Sequence[Tensor], count: int) -> Codes:
    return tuple(level.expand(count, -1, -1).clone() for level in codes)


def _share(marks: Sequence[Tensor]) -> float:
    """Of all codes, those that were drawn anew."""
    return round(sum(int(level.sum()) for level in marks) / sum(level.numel() for level in marks), 4)


# ---- between two pictures ----


def interpolate(request: EditRequest, other: str, steps: int, redraw: float, config: RunConfig) -> dict[str, Any]:
    """Write a strip from one picture to another; its ends are the pictures' reconstructions, bit for bit.

    Args:
        request: with the first picture; `count` has no meaning.
        other: the second picture.
        steps, redraw: see `hvqd_model.editing.blended`.

    Returns:
        JSON values: image (path), frames, drawn (share of each frame's codes that were drawn anew).
    """
    editor = Editor.open(request, config)
    first, second = (editor.codes(editor.picture(path)) for path in (request.path, other))
    frames, disputed = blended(first, second, steps, derive_key("interpolate", request.seed), redraw)
    # The same seed for all frames: what is drawn in one stays much the same in the next.
    seeds = seeds_for(request.seed, 1) * steps
    found = editor.pictures(editor.completed(request.asked, seeds)(frames, disputed))
    titles = [("A", ""), *[(f"{frame}/{steps - 1}", "") for frame in range(1, steps - 1)], ("B", "")]
    columns = [(title, detail, found[place : place + 1]) for place, (title, detail) in enumerate(titles)]
    drawn = [_share([level[frame] for level in disputed]) for frame in range(steps)]
    return {"image": write_picture(request.out, to_png(column_sheet(columns))), "frames": steps, "drawn": drawn}


# ---- holes ----


def fill(request: EditRequest, mask: str, dilation: int, config: RunConfig) -> dict[str, Any]:
    """Write a sheet of a picture with its hole filled in several ways; every other pixel is the picture's own.

    Args:
        mask: a picture of the same size; what is lighter than half is the hole.
        dilation: see `hvqd_model.editing.code_masks`.

    Returns:
        JSON values: image (path), hole (share of the pixels).
    """
    editor = Editor.open(request, config)
    picture, hole = editor.picture(request.path), _hole(request.path, mask, editor)
    found = _filled(editor, picture, hole, dilation, request)
    shown = picture.copy()
    shown[0][hole] = _HOLE
    columns = [("picture", "", picture), ("hole", f"{hole.mean():.0%} of it", shown)]
    columns += [(f"filled {place + 1}", "", found[place : place + 1]) for place in range(request.count)]
    image = write_picture(request.out, to_png(column_sheet(columns)))
    return {"image": image, "hole": round(float(hole.mean()), 4)}


def _filled(
    editor: Editor, picture: Pictures, hole: NDArray[np.bool_], dilation: int, request: EditRequest
) -> Pictures:
    """(n, H, W, 3) the picture with its hole filled."""
    device = next(editor.bundle.vq.parameters()).device
    images = to_input(picture).expand(BATCH, -1, -1, -1).to(device)
    holes = torch.from_numpy(hole).expand(BATCH, -1, -1).to(device)
    seeds = seeds_for(request.seed, -(-request.count // BATCH) * BATCH)
    parts = [
        to_uint8(inpaint(editor.bundle.vq, images, holes, editor.completed(request.asked, some), dilation))
        for some in (seeds[first : first + BATCH] for first in range(0, len(seeds), BATCH))
    ]
    return np.concatenate(parts)[: request.count]


def _hole(path: str, mask: str, editor: Editor) -> NDArray[np.bool_]:
    """(H, W) where a mask's picture is lighter than half, through the same geometry as its picture."""
    size = editor.bundle.vq.config.image_size
    picture, found = _opened(path), _opened(mask)
    if picture.size != found.size:
        raise InputError(
            f"--mask must be as large as the picture, {picture.size[0]} x {picture.size[1]}: "
            f"{found.size[0]} x {found.size[1]}\nhint: draw the hole in white on a black picture of that size"
        )
    labels = io.BytesIO()
    found.convert("L").point(lambda value: 255 if value > 127 else 0).save(labels, "PNG")
    settings = editor.config.data.model_copy(update={"image_size": size})
    try:
        prepared = prepare(Path(path).read_bytes(), labels.getvalue(), settings)
    except Rejected as reason:
        raise InputError(f"{path} and {mask} do not fit: {reason}\nhint: save the picture anew as PNG") from reason
    assert prepared.seg_png is not None
    hole = np.asarray(Image.open(io.BytesIO(prepared.seg_png))) > 127
    if not hole.any():
        raise InputError(f"--mask has no hole: nothing in {mask} is lighter than half\nhint: draw the hole in white")
    return hole


def _opened(path: str) -> Image.Image:
    """A local picture's file, upright.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"no such picture: {path}\nhint: name a local file, such as a PNG") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read: {reason}\nhint: name a picture, such as a PNG") from error
    return ImageOps.exif_transpose(image)


# ---- levels and styles ----


def enlarge(request: EditRequest, keep: int | None, config: RunConfig) -> dict[str, Any]:
    """Write a sheet of a small picture made as large as the model's: its coarse levels stay, the fine ones are drawn.

    Args:
        keep: coarse levels that stay; None for all but the finest.

    Returns:
        JSON values: image (path), kept (levels that stay), psnr_scaled_back (dB of each result scaled back to the
        small picture).
    """
    editor = Editor.open(request, config)
    vq = editor.bundle.vq
    small = _small(request.path, vq.config.image_size)
    keep = kept_levels(keep, vq.config.levels)
    x = to_input(small)
    device = next(vq.parameters()).device
    codes = [level[:1].cpu() for level in coarse_codes(vq, x.expand(BATCH, -1, -1, -1).to(device))]
    unknown = [torch.full_like(level, place >= keep, dtype=torch.bool) for place, level in enumerate(codes)]
    count = request.count
    draw = editor.completed(request.asked, seeds_for(request.seed, count))
    found = editor.pictures(draw(_repeated(codes, count), [marks.expand(count, -1, -1) for marks in unknown]))
    plain = np.asarray(Image.fromarray(small[0]).resize(vq.config.image_size[::-1], Image.Resampling.BICUBIC))[None]
    back = scaled_back(to_input(found), (small.shape[1], small.shape[2]))
    decibels = [round(float(value), 2) for value in psnr(back, x.expand_as(back), 2.0)]
    columns = [("small", f"{small.shape[2]} x {small.shape[1]}", _as_large(small, plain)), ("bicubic", "", plain)]
    columns += [(f"drawn {place + 1}", f"{decibels[place]:.1f} dB", found[place : place + 1]) for place in range(count)]
    image = write_picture(request.out, to_png(column_sheet(columns)))
    return {"image": image, "kept": keep, "psnr_scaled_back": decibels}


def restyle(
    request: EditRequest, like: str | None, strength: float, keep: int | None, config: RunConfig
) -> dict[str, Any]:
    """Write a sheet of a picture in another style: coarse levels stay, fine ones are moved or drawn anew.

    Args:
        like: a picture whose fine-level statistics are taken; None takes none.
        strength: share of the fine codes that are drawn anew.
        keep: coarse levels that stay as they are, bit for bit; None for all but the finest.

    Returns:
        JSON values: image (path), kept (levels that stay), drawn (share of the codes that were drawn anew).
    """
    if like is None and request.asked.style is None:
        raise InputError(
            "a style is needed: neither --like nor --style is given\n"
            "hint: --like PICTURE takes a picture's style, --style NAME one that the model has learned"
        )
    editor = Editor.open(request, config)
    keep = kept_levels(keep, editor.bundle.vq.config.levels)
    picture, count = editor.picture(request.path), request.count
    content = editor.codes(picture)
    columns = [("picture", "", picture), ("codes", "", editor.pictures(content))]
    codes = content
    if like is not None:
        other = editor.picture(like)
        codes = restyled_codes(editor.bundle.vq, content, editor.codes(other), keep)
        columns += [("like", "", other), ("statistics", "moved", editor.pictures(codes))]
    seeds = seeds_for(request.seed, count)
    unknown = renoised(_repeated(codes, count), torch.tensor(seeds), strength, keep)
    found = editor.pictures(editor.completed(request.asked, seeds)(_repeated(codes, count), unknown))
    columns += [(f"result {place + 1}", "", found[place : place + 1]) for place in range(count)]
    image = write_picture(request.out, to_png(column_sheet(columns)))
    return {"image": image, "kept": keep, "drawn": _share(unknown)}


def kept_levels(keep: int | None, levels: int) -> int:
    """How many coarse levels stay; None asks for all but the finest.

    Raises:
        InputError: none would, or all; the model may have but one.
    """
    if levels == 1:
        raise InputError("the model has one level of codes: none is coarse\nhint: choose a model with more levels")
    if keep is None:
        return levels - 1
    if not 1 <= keep < levels:
        raise InputError(
            f"--keep must be between 1 and {levels - 1}, the coarse levels that stay: {keep}\n"
            "hint: 1 keeps the coarsest level alone"
        )
    return keep


def _small(path: str, size: tuple[int, int]) -> Pictures:
    """(1, h, w, 3) a picture smaller than the model's, of the same shape."""
    image = _opened(path).convert("RGB")
    height, width = size
    if image.size[0] >= width or image.size[1] >= height:
        raise InputError(
            f"the picture must be smaller than the model's {width} x {height}: {image.size[0]} x {image.size[1]}\n"
            "hint: `hvqd reconstruct` shows what the model makes of a large one"
        )
    if image.size[0] * height != image.size[1] * width:
        raise InputError(
            f"the picture must have the model's shape, {width} to {height}: {image.size[0]} x {image.size[1]}\n"
            "hint: crop it"
        )
    return np.asarray(image)[None]


def _as_large(small: Pictures, large: Pictures) -> Pictures:
    """The small picture's pixels as blocks, as large as another picture."""
    height, width = large.shape[1:3]
    return np.asarray(Image.fromarray(small[0]).resize((width, height), Image.Resampling.NEAREST))[None]
