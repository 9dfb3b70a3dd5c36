"""Better codes by analysis and synthesis, against exhaustive searches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.codec import refinement as module
from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.refinement import refine
from hvqd_model.codec.search import nearest_codes, nearest_few
from hvqd_model.config import VQConfig

CELL = (2, 2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paint(vectors: Sequence[Tensor]) -> Tensor:
    """Each cell in the colour that is its code's vector; levels add up."""
    size = [CELL[0] * side for side in vectors[-1].shape[2:]]
    return sum((F.interpolate(level, size=size) for level in vectors), torch.zeros(()))


def smear(vectors: Sequence[Tensor]) -> Tensor:
    """The same, each pixel mixed with those around it: what a cell's best code is depends on its neighbours'."""
    return F.avg_pool2d(paint(vectors), 3, 1, 1)


def error(decode: Callable[[Sequence[Tensor]], Tensor], codebook: Tensor, codes: Tensor, images: Tensor) -> Tensor:
    """(B,) squared."""
    shown = decode([F.embedding(codes, codebook).permute(0, 3, 1, 2)]).clamp(-1, 1)
    return (shown - images).square().sum((1, 2, 3))


# ---- toys whose best codes are known ----


def test_cells_that_do_not_touch_get_the_best_code_of_all() -> None:
    codebook, images = noise(4, 3).clamp(-1, 1), noise(5, 3, 8, 12, seed=1).clamp(-1, 1)
    begun = torch.randint(0, 4, (5, 4, 6), generator=torch.Generator().manual_seed(2))
    (found,) = refine(paint, [codebook], [CELL], images, [begun], 1, [0])  # as many candidates as codes
    cells = F.avg_pool2d(images, CELL).permute(0, 2, 3, 1)
    expected = nearest_codes(cells.flatten(0, 2), codebook).view(5, 4, 6)
    assert torch.equal(found, expected) and not torch.equal(begun, expected)


def test_cells_that_depend_on_each_other_come_near_to_the_best_of_all_combinations() -> None:
    codebook, images = noise(5, 3).clamp(-1, 1), noise(30, 3, 4, 4, seed=1).clamp(-1, 1)
    combinations = torch.tensor(list(itertools.product(range(5), repeat=4))).view(-1, 2, 2)
    errors = torch.stack([error(smear, codebook, combinations, image.expand(625, 3, 4, 4)) for image in images])
    cells = F.avg_pool2d(images, CELL).permute(0, 2, 3, 1)
    begun = nearest_codes(cells.flatten(0, 2), codebook).view(30, 2, 2)
    (found,) = refine(smear, [codebook], [CELL], images, [begun], 3, [0])
    before, after = (error(smear, codebook, codes, images) for codes in (begun, found))
    assert torch.all(after <= before * (1 + 1e-6)) and torch.all(after >= errors.amin(1) * (1 - 1e-6))
    assert (after - errors.amin(1)).mean() < 0.2 * (before - errors.amin(1)).mean()
    assert torch.isclose(after, errors.amin(1)).float().mean() > 0.6


def test_all_levels_take_part() -> None:
    codebooks = [noise(6, 3), noise(6, 3, seed=3) / 4]
    images = paint(
        [F.embedding(torch.arange(6).view(1, 2, 3), codebooks[0]).permute(0, 3, 1, 2) / 2, torch.zeros(1, 3, 4, 6)]
    ).clamp(-1, 1)
    begun = [torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 4, 6, dtype=torch.int64)]
    found = refine(paint, codebooks, [(4, 4), CELL], images, begun, 3, [0, 1])
    assert [level.shape for level in found] == [level.shape for level in begun]
    assert all(not torch.equal(now, before) for now, before in zip(found, begun, strict=True))


def test_levels_that_are_not_named_keep_their_codes() -> None:
    codebooks, images = [noise(6, 3), noise(6, 3, seed=3)], noise(2, 3, 8, 8, seed=1).clamp(-1, 1)
    begun = [torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.int64)]
    for level in (0, 1):
        found = refine(paint, codebooks, [(4, 4), CELL], images, begun, 1, [level])
        assert torch.equal(found[1 - level], begun[1 - level]) and not torch.equal(found[level], begun[level])


def test_a_pictures_codes_depend_on_no_other_picture() -> None:
    codebook, images = noise(9, 3).double(), noise(7, 3, 8, 8, seed=1).double().clamp(-1, 1)
    begun = torch.randint(0, 9, (7, 4, 4), generator=torch.Generator().manual_seed(2))
    (together,) = refine(smear, [codebook], [CELL], images, [begun], 2, [0])
    for row in range(7):
        (alone,) = refine(smear, [codebook], [CELL], images[row : row + 1], [begun[row : row + 1]], 2, [0])
        assert torch.equal(alone[0], together[row])


def test_nothing_is_changed_for_a_picture_that_is_met_exactly() -> None:
    codebook = noise(6, 3).clamp(-1, 1)
    begun = torch.arange(6).view(1, 2, 3)
    images = smear([F.embedding(begun, codebook).permute(0, 3, 1, 2)])
    (found,) = refine(smear, [codebook], [CELL], images, [begun], 2, [0])
    assert torch.equal(found, begun)


def test_a_lattices_cells_are_all_cells_once() -> None:
    for shape in ((1, 1), (2, 5), (4, 4), (7, 3)):
        counts = torch.zeros(1, *shape)
        for lattice in module._lattices(counts):
            counts[lattice] += 1
        assert torch.equal(counts, torch.ones(1, *shape))


def test_what_lies_around_a_cell_is_summed_also_where_padding_was_cut_off() -> None:
    errors = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0))  # of a picture padded to 8 x 6
    found = module._around(errors, (2, 3), (4, 2))
    expected = torch.zeros(2, 4, 2)
    for row, column in itertools.product(range(4), range(2)):
        rows, columns = slice(max(0, 2 * (row - 1)), 2 * (row + 2)), slice(max(0, 3 * (column - 1)), 3 * (column + 2))
        expected[:, row, column] = errors[:, rows, columns].sum((1, 2))
    torch.testing.assert_close(found * (9 * 2 * 3), expected)


def test_the_nearest_few_are_the_first_of_all_in_order_of_distance() -> None:
    vectors, codebook = noise(40, 3), noise(17, 3, seed=1)
    found = nearest_few(vectors, codebook, 5)
    assert torch.equal(found, torch.cdist(vectors, codebook).argsort(1)[:, :5])
    assert torch.equal(found[:, 0], nearest_codes(vectors, codebook))


# ---- tokenizers ----

CASES: dict[str, dict[str, object]] = {
    "features": {},
    "residual": {"hierarchy": "residual"},
    "nested": {"hierarchy": "nested"},
    "pyramid": {"hierarchy": "pyramid"},
    "nested pyramid": {"hierarchy": "nested-pyramid"},
    "fsq": {"quantizer": "fsq", "codebook_sizes": (8, 27), "code_dim": 3},
    "simvq": {"quantizer": "simvq"},
    "unit sphere": {"l2_normalize": True},
    "padded": {"image_size": (13, 11), "padding": "edge"},
    "cells that are not square": {"strides": ((8, 4), (2, 2))},
    "one level": {"strides": (2,), "codebook_sizes": (16,)},
}


def tokenizer(changes: dict[str, object]) -> HierarchicalVQ:
    """Untrained, its codebooks fitted to some pictures."""
    base: dict[str, object] = {"strides": (8, 2), "codebook_sizes": (8, 16), "code_dim": 4, "width": 8}
    config = VQConfig.model_validate(base | {"width_multipliers": (1, 2), "image_size": (16, 8)} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HierarchicalVQ(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for level in model.start_order:
                model.start_codebook(level, model(pictures(config), torch.arange(4)).vectors[level], level)
    return model


def pictures(config: VQConfig) -> Tensor:
    return torch.rand(4, 3, *config.image_size, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.mark.parametrize("case", CASES)
def test_refined_codes_decode_nearer_and_never_farther(case: str) -> None:
    model = tokenizer(CASES[case])
    images = pictures(model.config)
    codes, refined = model.encode(images), model.encode(images, refine_rounds=2)

    def errors(found: Sequence[Tensor]) -> Tensor:
        return (model.decode(found) - images).square().sum((1, 2, 3))

    before, after = errors(codes), errors(refined)
    assert torch.all(after <= before * (1 + 1e-5)) and after.mean() < 0.99 * before.mean()
    more = errors(model.encode(images, refine_rounds=4))
    assert torch.all(more <= after * (1 + 1e-5))


@pytest.mark.parametrize("case", CASES)
def test_refined_codes_are_the_nearest_ones_of_their_latents(case: str) -> None:
    model = tokenizer(CASES[case])
    images = pictures(model.config)
    before, old = model.encode_with_latents(images)
    codes, latents = model.encode_with_latents(images, refine_rounds=1)
    assert any(not torch.equal(now, then) for now, then in zip(codes, before, strict=True))
    for level, (found, behind) in enumerate(zip(codes, latents, strict=True)):
        nearest = nearest_codes(behind.flatten(0, 2), model.codebooks[level])
        assert torch.equal(nearest.view_as(found), found)
        same = found == before[level]
        assert torch.equal(behind[same], old[level][same])


def test_nested_coarse_codes_stay() -> None:
    model = tokenizer(CASES["nested"])
    images = pictures(model.config)
    (coarse, fine), (kept, changed) = model.encode(images), model.encode(images, refine_rounds=1)
    assert torch.equal(coarse, kept) and not torch.equal(fine, changed)


def test_no_rounds_are_the_encoders_codes_and_no_pictures_none() -> None:
    model = tokenizer({})
    images = pictures(model.config)
    for plain, none in zip(model.encode(images), model.encode(images, refine_rounds=0), strict=True):
        assert torch.equal(plain, none)
    assert [len(level) for level in model.encode(images[:0], refine_rounds=1)] == [0, 0]


def test_rounds_below_zero_are_refused() -> None:
    model = tokenizer({})
    with pytest.raises(ValueError, match=r"^refine_rounds must be at least 0: -1\nhint: "):
        model.encode(pictures(model.config), refine_rounds=-1)


def test_weights_get_no_gradients_and_nothing_is_changed() -> None:
    model = tokenizer({})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode(pictures(model.config), refine_rounds=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
