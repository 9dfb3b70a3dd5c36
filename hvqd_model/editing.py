"""Editing pictures through their codes: holes filled, details drawn anew, styles moved, pictures blended.

Whatever is not edited stays: untouched pixels, known codes and given levels come back bit for bit.

inpaint      the codes that a hole touches are drawn anew (cf. RePaint, arXiv:2201.09865, for codes that are masked)
upscale      the coarse levels of a small picture, with fine levels drawn
restyle      coarse levels of the content; fine ones with the statistics of a style (AdaIN, arXiv:1703.06868) and partly
             drawn anew
interpolate  codes of one picture or the other, by one draw a place for the whole series; places in dispute drawn anew

Axes: B pictures of H x W pixels, L levels (coarse first) of h x w = N codes of D dimensions, K codes, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.search import nearest_codes
from hvqd_model.randomness import uniform

Codes = tuple[Tensor, ...]
Complete = Callable[[Sequence[Tensor], Sequence[Tensor]], Codes]
"""Draws the unknown codes: (codes, unknown) of each level -> codes. See `hvqd_model.prior.completion.complete`."""


# ---- holes ----


def code_masks(vq: HierarchicalVQ, hole: Tensor, dilation: int = 1) -> tuple[Tensor, ...]:
    """(B, h, w) bool of each level: codes whose cells touch the hole, and on the finest level `dilation` more around.

    Coarser codes around the hole stay: each spans so much of a picture that few would be left to go on from.

    Args:
        hole: (B, H, W) bool.

    Raises:
        ValueError: a hole of another size than the pictures, or a negative dilation.
    """
    size = vq.config.image_size
    if tuple(hole.shape[1:]) != size or hole.dtype != torch.bool:
        raise ValueError(
            f"the hole must be (B, {size[0]}, {size[1]}) bool: {hole.dtype} {tuple(hole.shape)}\n"
            "hint: a mask of the picture's size"
        )
    if dilation < 0:
        raise ValueError(f"dilation must not be negative: {dilation}\nhint: 1 covers what the encoder has mixed in")
    below, right = (full - own for full, own in zip(vq.config.padded_size, size, strict=True))
    whole = F.pad(hole[:, None].float(), (0, right, 0, below))
    masks = [F.max_pool2d(whole, cell) for cell in vq.config.cells]
    masks[-1] = F.max_pool2d(masks[-1], 2 * dilation + 1, stride=1, padding=dilation)
    return tuple(marks[:, 0] > 0 for marks in masks)


def spread_colours(images: Tensor, hole: Tensor) -> Tensor:
    """(B, 3, H, W) pictures with the colours around the hole spread smoothly into it; nothing of the hole is looked at.

    Means of what is known on ever coarser grids, and back (pull and push). An encoder sees less of such a hole than of
    one in plain grey, so the codes around it are more nearly those of the whole picture.

    Args:
        hole: (B, H, W) bool; where all is hole, zeros.
    """
    known = (~hole)[:, None].to(images.dtype)
    return _pull_push(images.masked_fill(hole[:, None], 0.0), known)


def _pull_push(colours: Tensor, known: Tensor) -> Tensor:
    """Colours, zero where `known` is 0, with what is unknown taken from a grid of half the size."""
    if max(colours.shape[2:]) == 1:
        return colours
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    mean = F.avg_pool2d(colours, 2, ceil_mode=True) / share.clamp_min(torch.finfo(share.dtype).tiny)
    halved = _pull_push(torch.where(share > 0, mean, 0.0), (share > 0).to(known.dtype))
    spread = F.interpolate(halved, size=colours.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, colours, spread)


@torch.no_grad()
def inpaint(vq: HierarchicalVQ, images: Tensor, hole: Tensor, complete: Complete, dilation: int = 1) -> Tensor:
    """(B, 3, H, W) pictures with the hole filled; every pixel outside it is the given one, bit for bit.

    Args:
        images: (B, 3, H, W) in [-1, 1]; what stands in the hole does not matter.
        hole: (B, H, W) bool.
        complete: draws unknown codes.
        dilation: codes of the finest level around the hole that are drawn anew with it.
    """
    masks = code_masks(vq, hole, dilation)
    drawn = vq.decode(complete(vq.encode(spread_colours(images, hole)), masks))
    return torch.where(hole[:, None], drawn, images)


# ---- levels ----


@torch.no_grad()
def coarse_codes(vq: HierarchicalVQ, small: Tensor) -> Codes:
    """Codes of small pictures, (B, 3, h, w) in [-1, 1], made as large as the tokenizer's by bicubic interpolation."""
    large = F.interpolate(small, size=vq.config.image_size, mode="bicubic", align_corners=False)
    return vq.encode(large.clamp(-1, 1))


def scaled_back(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) means over the pixels that each small pixel covers."""
    return F.interpolate(images, size=size, mode="area")


# ---- styles ----


def restyled_codes(vq: HierarchicalVQ, content: Codes, style: Codes, keep: int) -> Codes:
    """The content's codes, from level `keep` on with the mean and deviation of the style's vectors, requantized.

    AdaIN on code vectors, channel by channel: (z - mean_c) / std_c * std_s + mean_s.

    Args:
        content, style: (B, h, w) of each level.
        keep: how many coarse levels stay as they are.
    """
    levels = list(content[:keep])
    for level in range(keep, len(content)):
        codebook = vq.codebooks[level]
        own, other = (codebook[codes[level]].flatten(1, 2) for codes in (content, style))  # (B, N, D)
        normed = (own - own.mean(1, keepdim=True)) / own.std(1, keepdim=True, correction=0).clamp_min(1e-6)
        moved = normed * other.std(1, keepdim=True, correction=0) + other.mean(1, keepdim=True)
        levels.append(nearest_codes(moved.flatten(0, 1), codebook).view_as(content[level]))
    return tuple(levels)


def renoised(codes: Codes, keys: Tensor, strength: float, keep: int = 0) -> tuple[Tensor, ...]:
    """(B, h, w) bool of each level: a share of the codes from level `keep` on, and all that lie below a chosen one.

    Raises:
        ValueError: a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1: {strength}\nhint: 0.3 to 0.7 changes some of a picture")
    masks: list[Tensor] = []
    for level, found in enumerate(codes):
        chosen = (uniform(keys, tuple(found.shape[1:]), f"renoise {level}") < strength) & (level >= keep)
        if masks and level > keep:
            above = F.interpolate(masks[-1][:, None].float(), size=found.shape[1:], mode="nearest")[:, 0] > 0
            chosen = chosen | above
        masks.append(chosen)
    return tuple(masks)


# ---- between two pictures ----


def blended(first: Codes, second: Codes, steps: int, key: int, redraw: float = 0.5) -> tuple[Codes, Codes]:
    """Codes of the frames between two pictures, and which of them are in dispute.

    A place takes the second picture's code as soon as the weight passes its own uniform number, which all frames and
    levels' cells share: once taken it stays. Of the places where the pictures differ, those whose number is within
    redraw x min(weight, 1 - weight) of the weight are in dispute: none at the ends, most in the middle.

    Args:
        first, second: (1, h, w) of each level.
        steps: F, frames including both ends, at least 2.
        key: of the uniform numbers.
        redraw: 0 draws nothing anew, 1 all differing places of the middle frame.

    Returns:
        (F, h, w) codes of each level, and (F, h, w) bool of each level.

    Raises:
        ValueError: fewer than 2 steps, or redraw outside 0 to 1.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, the two ends: {steps}\nhint: 8 is a good start")
    if not 0 <= redraw <= 1:
        raise ValueError(f"redraw must be between 0 and 1: {redraw}\nhint: 0.5 is a good start")
    weights = torch.linspace(0, 1, steps, dtype=torch.float64).view(-1, 1, 1)
    margin = redraw * torch.minimum(weights, 1 - weights)
    coarse = first[0].shape[1:]
    numbers = uniform(torch.tensor([key]), tuple(coarse), "blend")  # one a coarse cell: what belongs together moves so
    frames, disputed = [], []
    for a, b in zip(first, second, strict=True):
        own = F.interpolate(numbers[:, None], size=a.shape[1:], mode="nearest")[:, 0]
        frames.append(torch.where(own < weights, b, a))
        disputed.append((a != b) & ((own - weights).abs() < margin))
    return tuple(frames), tuple(disputed)
