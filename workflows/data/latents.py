"""The latents behind the codes, for a Gaussian prior: columns beside the codes, and their statistics.

Latents are kept as float16, which is far finer than the codes they snap to. Mean and deviation of every channel are
taken over what is kept of the training split: sums by shard, added up in the shards' order, so that neither workers nor
interruptions change them.

Axes: n rows, L levels of h x w = N positions, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from hvqd_model.prior.latents import LatentStatistics
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import Manifest

FACT = "latents"
"""The manifest's fact with mean and deviation of every level."""
_LEAST = 1e-6


def latent_columns(latents: Sequence[NDArray[np.floating[Any]]]) -> dict[str, pa.Array]:
    """latents_0 …: the (n, h, w, C) latents of each level, a list a row."""
    columns = {}
    for level, found in enumerate(latents):
        flat = pa.array(found.astype(np.float16).reshape(-1))
        columns[f"latents_{level}"] = pa.FixedSizeListArray.from_arrays(flat, found[0].size)
    return columns


def read_latents(table: pa.Table, level: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """(n, h, w, C) latents of one level.

    Args:
        shape: (h, w, C).
    """
    flat: NDArray[np.float16] = pc.list_flatten(table[f"latents_{level}"]).to_numpy()
    return flat.reshape(-1, *shape)


def write_sums(notes: Store, name: str, table: pa.Table, channels: Sequence[int]) -> None:
    """Note a shard's sums beside its parts."""
    sums = []
    for level, count in enumerate(channels):
        rows = pc.list_flatten(table[f"latents_{level}"]).to_numpy().reshape(-1, count).astype(np.float64)
        sums.append({"rows": len(rows), "sum": rows.sum(0).tolist(), "squares": np.square(rows).sum(0).tolist()})
    notes.write_json(_note(name), sums)


def gathered_statistics(notes: Store, names: Sequence[str], levels: int) -> list[dict[str, list[float]]]:
    """Mean and deviation of every level's channels, from the notes of the training shards."""
    noted = [notes.read_json(_note(name)) for name in names]
    statistics = []
    for level in range(levels):
        rows = sum(sums[level]["rows"] for sums in noted)
        total = np.sum([sums[level]["sum"] for sums in noted], axis=0)
        squares = np.sum([sums[level]["squares"] for sums in noted], axis=0)
        mean = total / rows
        deviation = np.sqrt(np.maximum(squares / rows - np.square(mean), 0))
        deviation = np.where(deviation < _LEAST, 1.0, deviation)  # a channel that never moves needs no scale
        statistics.append({"mean": mean.tolist(), "deviation": deviation.tolist()})
    return statistics


def statistics_of(manifest: Manifest) -> list[LatentStatistics]:
    """The statistics that codes were encoded with.

    Raises:
        InputError: the codes have no latents.
    """
    if FACT not in manifest.facts:
        raise InputError(
            "the codes have no latents, and prior.model.noise=gaussian learns from them\n"
            "hint: run `hvqd encode` with prior.model.noise=gaussian first"
        )
    return [
        LatentStatistics(torch.tensor(level["mean"]), torch.tensor(level["deviation"]))
        for level in manifest.facts[FACT]
    ]


def _note(name: str) -> str:
    return f"sums-{name}.json"
