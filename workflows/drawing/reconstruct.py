"""`hvqd reconstruct`: what each prefix of the levels keeps of some pictures, as a sheet and in dB.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hvqd_model import HierarchicalVQ
from hvqd_model.metrics import psnr
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from workflows.config import RunConfig
from workflows.data.batches import to_input
from workflows.drawing.generate import Pictures, decode_codes
from workflows.drawing.sheets import prefix_name, prefix_sheet, to_png
from workflows.drawing.tokenizer_source import find_pictures, find_tokenizer
from workflows.encode import encode_batches
from workflows.training.precision import Precision, choose_precision

BATCH = 16
"""Pictures the network sees at once, always."""


@dataclass(frozen=True)
class ReconstructRequest:
    """What is asked for."""

    path: str
    """A picture, a folder of pictures, or a split of the root's dataset."""
    levels: str | None
    """`2`, or `1..3`: which prefixes; None for all."""
    count: int
    """How many pictures at most."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of encoder and decoder."""
    out: Path
    """PNG file of the sheet."""

    def as_json(self) -> dict[str, Any]:
        """The plan."""
        return {**vars(self), "out": str(self.out)}


def parse_levels(text: str | None, levels: int) -> range:
    """The numbers of levels that prefixes shall have, 1 for the coarsest alone.

    Args:
        text: `2` or `1..2`; None for all.
        levels: how many the tokenizer has.

    Raises:
        InputError: not of that form, or not within the tokenizer's levels.
    """
    if text is None:
        return range(1, levels + 1)
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= levels:
        raise InputError(
            f"--levels must be a number or a rising range within 1..{levels}: {text}\n"
            f"hint: 1 is the coarsest level alone, 1..{levels} shows every prefix"
        )
    return range(first, last + 1)


def reconstructed(
    model: HierarchicalVQ,
    pictures: Pictures,
    prefixes: range,
    precision: Precision,
    batch: int = BATCH,
    refine_rounds: int = 0,
) -> list[Pictures]:
    """(n, H, W, 3) what each prefix of the levels keeps of (n, H, W, 3) pictures."""
    device = next(model.parameters()).device
    codes = encode_batches(model, pictures, str(device), precision, batch, refine_rounds)
    return [decode_codes(model, codes[:count], batch, precision) for count in prefixes]


def reconstruct(request: ReconstructRequest, config: RunConfig) -> dict[str, Any]:
    """Write the sheet.

    Returns:
        JSON values: image (path), model, precision, levels (each with its PSNR in dB and its bits a picture), pictures
        (each with its PSNR of every prefix) and rejected.

    Raises:
        InputError: no such tokenizer, level or picture.
        EnvironmentFailure: the sheet cannot be written.
    """
    named = find_tokenizer(request.model, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = named.model.to(device)
    prefixes = parse_levels(request.levels, model.config.levels)
    found = find_pictures(request.path, config, model.config.image_size, request.count)
    precision, _ = choose_precision(request.precision, device)
    rounds = config.encode.refine_rounds
    results = reconstructed(model, found.pictures, prefixes, precision, refine_rounds=rounds)
    sheet = prefix_sheet(found.pictures, list(zip(prefixes, results, strict=True)))
    originals = to_input(found.pictures)
    decibels = torch.stack([psnr(to_input(result), originals, 2.0) for result in results])
    bits = [
        math.prod(grid) * math.log2(size)
        for grid, size in zip(model.config.grids, model.config.codebook_sizes, strict=True)
    ]
    return {
        "image": write_picture(request.out, to_png(sheet)),
        "model": named.name,
        "precision": precision,
        "levels": [
            {
                "levels": count,
                "name": prefix_name(count),
                "psnr": round(float(row.mean()), 3),
                "bits": sum(bits[:count]),
            }
            for count, row in zip(prefixes, decibels, strict=True)
        ],
        "pictures": [
            {"name": name, "psnr": [round(float(value), 3) for value in column]}
            for name, column in zip(found.names, decibels.T, strict=True)
        ],
        "rejected": list(found.rejected),
    }


def as_text(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"left out  {line}" for line in result["rejected"]]
    lines += [
        f"{row['name']:<12} {row['psnr']:6.2f} dB   {row['bits']:,.0f} bits a picture" for row in result["levels"]
    ]
    return "\n".join([f"{len(result['pictures'])} pictures by {result['model']}", *lines, result["image"]])


def write_picture(out: Path, png: bytes) -> str:
    """Write a PNG, whole or not at all; returns its path.

    Raises:
        EnvironmentFailure: it cannot be written.
    """
    target = out.resolve()
    try:
        Store(str(target.parent)).write_bytes(target.name, png)
    except OSError as error:
        raise EnvironmentFailure(f"cannot write {target}: {error}\nhint: choose another --out") from error
    return str(target)
