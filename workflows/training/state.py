"""What a training holds, in a form that knows of no workers: ranges of flat float32 values, by parameter and offset.

Every trained parameter has values of its own size under the names of KINDS, in row-major order. A rank owns one range
of each parameter (or none), the same for all kinds; the ranges of all ranks cover every parameter exactly once. Whoever
reads asks for any range and gets it from the files that hold parts of it, so that a state written by n workers at one
ZeRO stage is read by m workers at any other, and the same numbers come back to the bit.

What is whole on every rank (buffers, the codebooks among them, and frozen weights) is written once. Files are
safetensors and JSON; nothing in them can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")
"""The parameter itself, AdamW's two moments, and the weights' moving average where there is one."""
_BUFFER, _FROZEN = "buffer/", "frozen/"


@dataclass(frozen=True)
class Range:
    """Some of a parameter's elements, counted from the first in row-major order."""

    start: int
    length: int


@dataclass(frozen=True)
class EngineState:
    """One rank's share of an engine's state; the tensors are copies on the CPU that no step changes."""

    values: dict[str, Tensor]
    """kind/parameter -> (length,) float32 of this rank's range."""
    ranges: dict[str, Range]
    """The range that this rank owns, by parameter."""
    steps: dict[str, int]
    """AdamW's steps so far, by parameter of which this rank owns something."""
    shapes: dict[str, tuple[int, ...]]
    """Of every trained parameter."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """buffer/name and frozen/name -> what is whole on every rank; empty but on rank 0."""

    @property
    def bytes(self) -> int:
        """Memory that the copies take."""
        return sum(tensor.nbytes for tensor in (*self.values.values(), *self.shared.values()))


def shared_state(buffers: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what is whole everywhere, under the names it has in files."""
    named = {f"{_BUFFER}{name}": value for name, value in buffers.items()}
    named |= {f"{_FROZEN}{name}": value for name, value in frozen.items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)


@dataclass(frozen=True)
class Part:
    """One file of a state: what it holds."""

    file: str
    ranges: Mapping[str, Range]
    """By parameter."""


class SavedState:
    """A state in files, read range by range; only what is asked for is fetched."""

    def __init__(
        self,
        parts: Iterable[Part],
        shared: str,
        steps: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        fetch: Callable[[str], Path],
    ) -> None:
        """`fetch` makes a named file available locally, `shared` names the one of buffers and frozen weights."""
        self.steps, self.shapes, self._shared, self._fetch = dict(steps), dict(shapes), shared, fetch
        self._places: dict[str, list[tuple[Range, str]]] = {}
        for part in parts:
            for name, found in part.ranges.items():
                self._places.setdefault(name, []).append((found, part.file))
        for places in self._places.values():
            places.sort(key=lambda place: place[0].start)
        self._files = ExitStack()
        self._open: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[SavedState]:
        """Files that were opened are closed in the end."""
        with self._files:
            yield self
        self._open.clear()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._files.enter_context(safetensors.safe_open(str(self._fetch(name)), "pt"))
        return self._open[name]

    def has(self, kind: str) -> bool:
        """Whether values of this kind were written; a state has them for all parameters or for none."""
        name, places = next(iter(self._places.items()))
        return f"{kind}/{name}" in set(self._file(places[0][1]).keys())

    def read(self, kind: str, name: str, wanted: Range) -> Tensor:
        """(length,) float32 values of one parameter.

        Raises:
            ValueError: the files do not hold all of them.
        """
        found = torch.empty(wanted.length)
        filled, end = 0, wanted.start + wanted.length
        for held, file in self._places.get(name, []):
            low, high = max(held.start, wanted.start), min(held.start + held.length, end)
            if low < high:
                values = self._file(file).get_slice(f"{kind}/{name}")[low - held.start : high - held.start]
                found[low - wanted.start : high - wanted.start] = values
                filled += high - low
        if filled != wanted.length:
            raise ValueError(f"the state holds {filled} of {wanted.length} elements of {kind} of {name}")
        return found

    def shared(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Buffers and frozen weights, by name."""
        file = self._file(self._shared)
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        buffers = {name.removeprefix(_BUFFER): value for name, value in found.items() if name.startswith(_BUFFER)}
        frozen = {name.removeprefix(_FROZEN): value for name, value in found.items() if name.startswith(_FROZEN)}
        return buffers, frozen

    def whole(self, kind: str, name: str) -> Tensor:
        """One parameter in its shape."""
        shape = self.shapes[name]
        count = 1
        for side in shape:
            count *= side
        return self.read(kind, name, Range(0, count)).view(shape)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError when the state is of a model with other parameters."""
        if dict(shapes) != self.shapes:
            differing = sorted(
                name for name in {*shapes, *self.shapes} if shapes.get(name) != self.shapes.get(name, None)
            )
            raise ValueError(
                f"the state is of another model: {differing[0]} is {self.shapes.get(differing[0])} in it and "
                f"{shapes.get(differing[0])} here"
            )


# ---- plain values with tensors among them ----


def split_tensors(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A state of nested dictionaries, lists and plain values as JSON, with its tensors apart.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def walk(item: Any) -> Any:
        match item:
            case Tensor():
                name = f"{len(tensors):06d}"
                tensors[name] = item.detach().cpu().clone().contiguous()
                return {"tensor": name}
            case dict():
                return {"dict": [[walk(key), walk(child)] for key, child in item.items()]}
            case list():
                return {"list": [walk(child) for child in item]}
            case tuple():
                return {"tuple": [walk(child) for child in item]}
            case None | bool() | int() | float() | str():
                return item
        raise TypeError(f"a state holds tensors and plain values, not {type(item).__name__}")

    return walk(value), tensors


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors`."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {join_tensors(key, tensors): join_tensors(child, tensors) for key, child in items}
        case {"list": items}:
            return [join_tensors(child, tensors) for child in items]
        case {"tuple": items}:
            return tuple(join_tensors(child, tensors) for child in items)
    return value
