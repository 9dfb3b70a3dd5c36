"""How pictures come into being: a sheet with a column a step, written anew as sampling goes on.

What a step shows is what the model would say now: settled codes, and the likeliest ones for the rest, of the levels
that have begun. The coarse level alone is a picture, so there is something to see early.

Axes: n pictures of H x W pixels, codes of each level (B, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from infra.errors import EnvironmentFailure
from infra.storage import Store
from workflows.drawing.generate import Pictures, decode_codes
from workflows.drawing.sheets import column_sheet, to_png

_PICTURES, _COLUMNS = 6, 8


class Film:
    """The first pictures of a sampling, at some of its steps."""

    def __init__(self, vq: HierarchicalVQ, steps: int, target: Path) -> None:
        """Begin.

        Args:
            steps: of the sampling.
            target: PNG file, written after every shown step.
        """
        self._vq, self._steps, self._target = vq, steps, target
        self._shown = set(np.linspace(1, steps, min(steps, _COLUMNS)).round().astype(int).tolist())
        self._step = 0
        self._frames: list[tuple[str, str, Pictures]] = []

    def show(self, codes: Sequence[Tensor]) -> None:
        """The state before a step settles its codes; see `hvqd_model.prior.guided.Watcher`."""
        self._step += 1
        if self._step not in self._shown:
            return
        known = []
        for level, (found, grid) in enumerate(zip(codes, self._vq.config.grids, strict=False)):
            if int(found.max()) >= self._vq.config.codebook_sizes[level]:
                break
            known.append(found[:_PICTURES].reshape(-1, *grid).cpu().numpy())
        if known:
            pictures = decode_codes(self._vq, known, _PICTURES)
            levels = "level 1" if len(known) == 1 else f"levels 1-{len(known)}"
            self._frames.append((f"step {self._step}/{self._steps}", levels, pictures))
            self._write()

    def finish(self, images: Pictures) -> str:
        """Add the pictures themselves; returns the path of the sheet."""
        self._frames.append(("result", "", images[:_PICTURES]))
        self._write()
        return str(self._target)

    def _write(self) -> None:
        rows = min(len(found) for *_, found in self._frames)
        sheet = column_sheet([(title, detail, found[:rows]) for title, detail, found in self._frames])
        try:
            Store(str(self._target.parent)).write_bytes(self._target.name, to_png(sheet))
        except OSError as error:
            raise EnvironmentFailure(f"cannot write {self._target}: {error}\nhint: choose another --out") from error
