"""A training's state in files: any range of any parameter comes back as it was, however ranks had divided it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workflows.training.state import Part, Range, SavedState, join_tensors, split_tensors, write_tensors

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": ()}


def values_of(kind: str) -> dict[str, Tensor]:
    """Each element of each parameter has a value of its own."""
    first = {"weight": 0.0, "average": 1000.0}[kind]
    return {name: first + torch.arange(math.prod(shape)) for name, shape in SHAPES.items()}


def written(folder: Path, cuts: dict[str, list[int]], ranks: int) -> SavedState:
    """The state in one file a rank; `cuts` are where a parameter's ranges end."""
    parts = []
    for rank in range(ranks):
        ranges, tensors = {}, {}
        for name, ends in cuts.items():
            start, end = ([0, *ends][rank], ends[rank])
            if start < end:
                ranges[name] = Range(start, end - start)
                for kind in ("weight", "average"):
                    tensors[f"{kind}/{name}"] = values_of(kind)[name][start:end].clone()
        write_tensors(folder / f"{rank}.safetensors", tensors)
        parts.append(Part(f"{rank}.safetensors", ranges))
    write_tensors(folder / "shared.safetensors", {"buffer/b": torch.tensor([1, 2]), "frozen/f": torch.ones(2)})
    return SavedState(parts, "shared.safetensors", dict.fromkeys(SHAPES, 3), SHAPES, lambda name: folder / name)


@st.composite
def divided(draw: st.DrawFn) -> tuple[int, dict[str, list[int]]]:
    """Ranks, and where each rank's range of each parameter ends; ranges may be empty."""
    ranks = draw(st.integers(1, 5))
    cuts = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        cuts[name] = [*sorted(draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))), size]
    return ranks, cuts


@settings(max_examples=60, deadline=None)
@given(divided(), st.data())
def test_any_range_comes_back_as_it_was_however_it_was_divided(
    tmp_path_factory: pytest.TempPathFactory, division: tuple[int, dict[str, list[int]]], data: st.DataObject
) -> None:
    saved = written(tmp_path_factory.mktemp("state"), division[1], division[0])
    with saved.opened():
        for name, shape in SHAPES.items():
            start = data.draw(st.integers(0, math.prod(shape)))
            length = data.draw(st.integers(0, math.prod(shape) - start))
            for kind in ("weight", "average"):
                whole = values_of(kind)[name]
                assert torch.equal(saved.read(kind, name, Range(start, length)), whole[start : start + length])
                assert torch.equal(saved.whole(kind, name), whole.view(shape))


def test_buffers_keep_their_types_and_what_was_not_written_is_not_there(tmp_path: Path) -> None:
    with written(tmp_path, {name: [math.prod(shape)] for name, shape in SHAPES.items()}, 1).opened() as saved:
        buffers, frozen = saved.shared()
        assert (buffers["b"].dtype, buffers["b"].tolist(), frozen["f"].tolist()) == (torch.int64, [1, 2], [1, 1])
        assert (saved.has("average"), saved.has("exp_avg")) == (True, False)


def test_a_hole_is_an_error_and_not_a_zero(tmp_path: Path) -> None:
    saved = written(tmp_path, {"vector": [4, 4, 11]}, 3)
    without = SavedState([Part("0.safetensors", {"vector": Range(0, 4)})], "", {}, SHAPES, lambda name: tmp_path / name)
    with saved.opened():
        assert saved.read("weight", "vector", Range(2, 5)).tolist() == [2, 3, 4, 5, 6]
    with without.opened(), pytest.raises(ValueError, match="holds 2 of 5 elements of weight of vector"):
        without.read("weight", "vector", Range(2, 5))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES | {"vector": (12,)}, r"another model: vector is \(11,\) in it and \(12,\) here"),
        ({"matrix": (7, 5)}, r"another model: scalar is \(\) in it and None here"),
        (SHAPES | {"more": (1,)}, r"another model: more is None in it and \(1,\) here"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path: Path, shapes: dict[str, Any], message: str) -> None:
    saved = SavedState([], "", {}, SHAPES, lambda name: tmp_path / name)
    saved.check_fits(SHAPES)
    with pytest.raises(ValueError, match=message):
        saved.check_fits(shapes)


def test_nested_states_come_back_through_json(tmp_path: Path) -> None:
    import json

    state = {
        "weights": {"a": torch.arange(3), "b": [torch.ones(2, 2), None, True]},
        7: (1, 2.5, -math.inf),
        "text": "tensor",
    }
    plain, tensors = split_tensors(state)
    found = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert found.keys() == state.keys()
    assert found[7] == state[7] and found["text"] == "tensor"
    assert torch.equal(found["weights"]["a"], torch.arange(3))
    assert torch.equal(found["weights"]["b"][0], torch.ones(2, 2)) and found["weights"]["b"][1:] == [None, True]


def test_what_is_neither_tensor_nor_plain_is_refused() -> None:
    with pytest.raises(TypeError, match="tensors and plain values, not object"):
        split_tensors({"a": [object()]})
