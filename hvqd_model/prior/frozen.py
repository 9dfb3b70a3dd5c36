"""Modules whose buffers keep their precision: codebooks, positions and statistics are facts, not weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class FrozenBuffers(nn.Module):
    """A module whose floating-point buffers stay float32 when its weights are cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenBuffers:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
