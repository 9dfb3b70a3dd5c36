"""Grids of codes of every shape: strides that are not square or no powers of two, and pictures that need padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.codec.encoder import Cell, Encoder, fold, stage_cells, unfold
from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import VQConfig

HIERARCHIES = ("features", "residual", "nested", "pyramid", "nested-pyramid")
SHAPES: list[tuple[dict[str, object], list[Cell]]] = [
    ({"strides": (8, 4), "image_size": (16, 24)}, [(2, 2), (4, 4), (8, 8)]),
    ({"strides": (12, 3), "image_size": (24, 12)}, [(3, 3), (6, 6), (12, 12)]),
    ({"strides": (4, 4), "image_size": (16, 8)}, [(2, 2), (4, 4)]),
    ({"strides": (8, 4, 4), "codebook_sizes": (6, 12, 8), "image_size": (16, 8)}, [(2, 2), (4, 4), (8, 8)]),
    ({"strides": (5,), "codebook_sizes": (6,), "image_size": (15, 10)}, [(5, 5)]),
    ({"strides": (10, 1), "image_size": (20, 10)}, [(1, 1), (2, 2), (10, 10)]),
    ({"strides": ((8, 2), (4, 1)), "image_size": (16, 6)}, [(2, 1), (4, 1), (8, 2)]),
    ({"strides": ((4, 12), (4, 6)), "image_size": (8, 24)}, [(2, 2), (4, 6), (4, 12)]),
    ({"strides": (8, 4), "image_size": (13, 9), "padding": "edge"}, [(2, 2), (4, 4), (8, 8)]),
    ({"strides": ((6, 4), 2), "image_size": (7, 5), "padding": "edge"}, [(2, 2), (6, 4)]),
]


def config_of(changes: dict[str, object], **more: object) -> VQConfig:
    base: dict[str, object] = {"codebook_sizes": (6, 7), "code_dim": 3, "width": 8, "width_multipliers": (1, 2)}
    return VQConfig.model_validate(base | changes | more)


def pictures_of(config: VQConfig, count: int = 3) -> Tensor:
    return torch.rand(count, 3, *config.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def started(config: VQConfig) -> HierarchicalVQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HierarchicalVQ(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for level in model.start_order:
                model.start_codebook(level, model(pictures_of(config), torch.arange(3)).vectors[level], level)
    return model.eval()


@pytest.mark.parametrize("cell", [(1, 1), (2, 2), (1, 3), (2, 1), (3, 2)])
def test_folding_puts_each_cells_pixels_into_channels_and_back(cell: Cell) -> None:
    rows, columns = cell
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    folded = fold(images, cell)
    assert folded.shape == (2, 3 * rows * columns, 6 // rows, 6 // columns)
    for channel in range(3):
        for row in range(rows):
            for column in range(columns):
                found = folded[:, (channel * rows + row) * columns + column]
                assert torch.equal(found, images[:, channel, row::rows, column::columns])
    assert torch.equal(unfold(folded, cell), images)


@pytest.mark.parametrize(("changes", "cells"), SHAPES)
def test_stages_grow_by_a_prime_factor_an_axis(changes: dict[str, object], cells: list[Cell]) -> None:
    config = config_of(changes)
    assert stage_cells(config) == cells
    assert set(config.cells) <= set(cells)


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
@pytest.mark.parametrize("changes", [changes for changes, _ in SHAPES])
def test_codes_of_every_shape_decode_to_the_direct_path(changes: dict[str, object], hierarchy: str) -> None:
    config = config_of(changes, hierarchy=hierarchy)
    model, images = started(config), pictures_of(config)
    with torch.no_grad():
        direct = model(images, torch.arange(3))
    codes = model.encode(images)
    height, width = config.padded_size
    assert [tuple(found.shape[1:]) for found in codes] == [(height // r, width // c) for r, c in config.cells]
    assert direct.reconstruction.shape == images.shape
    assert torch.equal(model.decode(codes), direct.reconstruction.clamp(-1, 1))
    for count in range(1, config.levels + 1):
        assert model.decode(codes[:count]).shape == images.shape


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
@pytest.mark.parametrize("changes", [changes for changes, _ in SHAPES])
def test_every_weight_learns_whatever_the_shape(changes: dict[str, object], hierarchy: str) -> None:
    config = config_of(changes, hierarchy=hierarchy, level_dropout=0.5)
    model = started(config).train()
    model(pictures_of(config, 16), torch.arange(16)).loss.backward()
    dead = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert dead == []


def test_padding_repeats_the_last_row_and_column() -> None:
    config = config_of({"strides": (8, 4), "image_size": (13, 9), "padding": "edge"})
    model, images = started(config), pictures_of(config)
    wide = torch.cat([images, images[..., -1:].expand(-1, -1, -1, 7)], 3)
    whole = torch.cat([wide, wide[:, :, -1:].expand(-1, -1, 3, -1)], 2)
    expected = Encoder.forward(model.encoder, whole)
    found = model.encoder(model._padded(images))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_no_loss_looks_at_padding() -> None:
    config = config_of({"strides": (8, 4), "image_size": (13, 9), "padding": "edge", "commitment": 0.0})
    model, images = started(config), pictures_of(config)
    output = model(images, torch.arange(3))
    torch.testing.assert_close(output.loss, F.mse_loss(output.reconstruction, images))


def test_pictures_that_need_no_padding_are_the_same_with_and_without_the_policy() -> None:
    changes: dict[str, object] = {"strides": (8, 4), "image_size": (16, 24)}
    one, other = (started(config_of(changes, padding=padding)) for padding in ("refuse", "edge"))
    images = pictures_of(one.config)
    assert torch.equal(one.decode(one.encode(images)), other.decode(other.encode(images)))


def test_levels_may_differ_in_kind_and_dimension() -> None:
    config = config_of(
        {"strides": (8, 4, 2), "codebook_sizes": (6, 12, 8), "image_size": (16, 8)},
        quantizer=("ema", "fsq", "simvq"),
        code_dim=(3, 9, 5),
        fsq_steps=((), (4, 3), ()),
    )
    assert config.code_dims == (3, 2, 5)
    for hierarchy in ("features", "nested"):
        model = started(config.model_copy(update={"hierarchy": hierarchy}))
        assert [tuple(book.shape) for book in model.codebooks] == [(6, 3), (12, 2), (8, 5)]
        images = pictures_of(config)
        with torch.no_grad():
            direct = model(images, torch.arange(3)).reconstruction
        assert torch.equal(model.decode(model.encode(images)), direct.clamp(-1, 1))
