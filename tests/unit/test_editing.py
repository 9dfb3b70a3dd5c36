"""Editing: what is not edited comes back bit for bit, and what is drawn anew follows from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig
from hvqd_model.diffusion.samplers import SamplerSettings
from hvqd_model.editing import (
    Codes,
    blended,
    coarse_codes,
    code_masks,
    inpaint,
    renoised,
    restyled_codes,
    scaled_back,
    spread_colours,
)
from hvqd_model.prior.completion import complete
from tests.unit.test_generate import models

SETTINGS = SamplerSettings(steps=4)


def fresh(stagger: float = 1.0, **changes: Any) -> tuple[HierarchicalVQ, HierarchicalPrior]:
    vq, prior = models()
    config = PriorConfig.model_validate(prior.config.model_dump() | {"stagger": stagger} | changes)
    other = HierarchicalPrior(config, vq.codebooks)
    other.load_state_dict(prior.state_dict())
    return vq, other.eval()


def some_codes(vq: HierarchicalVQ, images: int, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(size, (images, *grid), generator=generator)
        for size, grid in zip(vq.config.codebook_sizes, vq.config.grids, strict=True)
    )


def some_pictures(images: int, side: int = 16) -> Tensor:
    return torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def completing(prior: HierarchicalPrior, seeds: Tensor) -> Any:
    return lambda codes, unknown: complete(prior, codes, unknown, seeds, settings=SETTINGS)


# ---- completing codes ----


@pytest.mark.parametrize("stagger", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_completing_what_is_all_unknown_is_sampling(stagger: float, guidance: float) -> None:
    vq, prior = fresh(stagger)
    seeds, labels = torch.arange(5) * 71, torch.tensor([0, 1, 2, -1, 0])
    everything = [torch.ones_like(level, dtype=torch.bool) for level in some_codes(vq, 5)]
    found = complete(prior, some_codes(vq, 5), everything, seeds, labels, settings=SETTINGS, guidance=guidance)
    assert same(found, prior.sample(seeds, labels, steps=4, guidance=guidance))


@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_known_codes_come_back_and_unknown_ones_are_drawn(stagger: float) -> None:
    vq, prior = fresh(stagger)
    codes, seeds = some_codes(vq, 6), torch.arange(6)
    shares = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 0.5])
    unknown = [
        torch.rand(level.shape, generator=torch.Generator().manual_seed(3)) < shares[:, None, None] for level in codes
    ]
    found = complete(prior, codes, unknown, seeds, settings=SETTINGS)
    assert len(found) == 2
    for level, before, marks, size in zip(found, codes, unknown, vq.config.codebook_sizes, strict=True):
        assert torch.equal(level[~marks], before[~marks])
        assert int(level.max()) < size and int(level.min()) >= 0
    other = [torch.where(marks, 0, level) for level, marks in zip(codes, unknown, strict=True)]
    assert same(complete(prior, other, unknown, seeds, settings=SETTINGS), found), (
        "what stands in a hole counts nothing"
    )
    assert not same(complete(prior, codes, unknown, seeds + 9, settings=SETTINGS), found)
    nothing = [torch.zeros_like(marks) for marks in unknown]
    assert same(complete(prior, codes, nothing, seeds, settings=SETTINGS), codes)


def test_a_completed_picture_does_not_depend_on_what_its_neighbours_know() -> None:
    vq, prior = fresh()
    codes, seeds = some_codes(vq, 4), torch.arange(4)
    unknown = [torch.rand(level.shape, generator=torch.Generator().manual_seed(4)) < 0.6 for level in codes]
    found = complete(prior, codes, unknown, seeds, settings=SETTINGS)
    others = [torch.cat([marks[:1], torch.ones_like(marks[1:])]) for marks in unknown]
    beside = complete(prior, codes, others, torch.cat([seeds[:1], seeds[1:] + 40]), settings=SETTINGS)
    assert same([level[:1] for level in found], [level[:1] for level in beside])


def test_the_network_is_told_how_much_of_each_picture_is_masked() -> None:
    vq, prior = fresh(stagger=0.0)
    seen: list[Tensor] = []
    prior.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    codes = some_codes(vq, 2)
    unknown = [torch.zeros_like(level, dtype=torch.bool) for level in codes]
    unknown[1][0, :2] = True
    unknown[1][1] = True
    complete(prior, codes, unknown, torch.arange(2), settings=SETTINGS)
    assert seen[0].tolist() == [[0.0, 0.5], [0.0, 1.0]]
    assert len(seen) == 4 and float(seen[-1][1, 1]) < float(seen[0][1, 1])


def test_completing_asks_for_noise_with_masks_and_for_codes_of_the_prior() -> None:
    vq, prior = fresh()
    _, uniform_noise = fresh(noise="mask-and-replace", uniform_share=1.0, loss="kl")
    codes, seeds = some_codes(vq, 1), torch.arange(1)
    unknown = [torch.ones_like(level, dtype=torch.bool) for level in codes]
    with pytest.raises(
        ValueError, match=r"needs a prior whose noise masks them, and this one has noise=mask-and-r.*\nhint"
    ):
        complete(uniform_noise, codes, unknown, seeds)
    with pytest.raises(ValueError, match=r"one entry a level \(2\): 1 and 2\nhint: encode"):
        complete(prior, codes[:1], unknown, seeds)
    with pytest.raises(
        ValueError, match=r"codes of level 1 must be \(1, 4, 4\), with a bool mask .* torch\.int64 \(1, 4, 4\)\nhint"
    ):
        complete(prior, codes, [unknown[0], codes[1]], seeds)
    with pytest.raises(ValueError, match=r"codes of level 0 must be in 0\.\.15: 99\.\.99\nhint: encode"):
        complete(prior, [codes[0] * 0 + 99, codes[1]], [~unknown[0], unknown[1]], seeds)


# ---- holes ----


@pytest.mark.parametrize("dilation", [0, 1])
def test_a_code_is_masked_when_its_cell_touches_the_hole_or_on_the_finest_level_a_neighbours(dilation: int) -> None:
    vq, _ = fresh()
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[0, 5, 15] = True
    for level, (marks, cell) in enumerate(zip(code_masks(vq, hole, dilation), (8, 4), strict=True)):
        for row in range(16 // cell):
            for column in range(16 // cell):
                reach = dilation if level == 1 else 0
                near = abs(row - 5 // cell) <= reach and abs(column - 15 // cell) <= reach
                assert bool(marks[0, row, column]) == near, (level, row, column)


def test_inpainting_leaves_every_pixel_outside_the_hole_bit_for_bit() -> None:
    vq, prior = fresh()
    images, seeds = some_pictures(3), torch.arange(3)
    hole = torch.zeros(3, 16, 16, dtype=torch.bool)
    hole[:, 4:9, 6:] = True
    hole[2] = False
    found = inpaint(vq, images, hole, completing(prior, seeds))
    outside = ~hole[:, None].expand_as(images)
    assert torch.equal(found[outside], images[outside]) and torch.equal(found[2], images[2])
    assert not torch.equal(found[:2], images[:2])
    other = images.masked_fill(hole[:, None], 0.77)
    assert torch.equal(inpaint(vq, other, hole, completing(prior, seeds)), found), (
        "what stood in the hole counts nothing"
    )


@pytest.mark.parametrize("size", [(16, 16), (13, 6), (1, 5)])
def test_colours_spread_into_a_hole_from_what_is_around_it_alone(size: tuple[int, int]) -> None:
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    hole = torch.zeros(3, *size, dtype=torch.bool)
    hole[0, : size[0] // 2 + 1, 1:4] = True
    hole[1] = True
    found = spread_colours(images, hole)
    outside = ~hole[:, None].expand_as(images)
    assert torch.equal(found[outside], images[outside]) and not bool(found[1].any())
    other = images.masked_fill(hole[:, None], -0.9)
    assert torch.equal(spread_colours(other, hole), found), "what stood in the hole counts nothing"
    low, high = (images.masked_fill(hole[:, None], fill) for fill in (2.0, -2.0))
    assert float(found[0].min()) >= float(low[0].min()) and float(found[0].max()) <= float(high[0].max())
    flat = torch.full_like(images[:1], 0.25)
    torch.testing.assert_close(spread_colours(flat, hole[:1]), flat)


def test_spread_colours_go_from_one_side_of_a_hole_to_the_other() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1.0
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[:, :, 4:12] = True
    row = spread_colours(images, hole)[0, 0, 8]
    assert bool((row.diff() >= 0).all()) and 0.3 < float(row[7:9].mean()) < 0.7


def test_codes_far_from_a_hole_are_those_of_the_picture() -> None:
    vq, prior = fresh()
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[0, :2, :2] = True
    kept: list[Codes] = []

    def noticing(codes: Sequence[Tensor], unknown: Sequence[Tensor]) -> Codes:
        found = complete(prior, codes, unknown, torch.arange(1), settings=SETTINGS)
        kept.append(tuple(level[~marks] for level, marks in zip(codes, unknown, strict=True)))
        kept.append(tuple(level[~marks] for level, marks in zip(found, unknown, strict=True)))
        return found

    inpaint(vq, some_pictures(1), hole, noticing, dilation=0)
    assert same(kept[0], kept[1]) and len(kept[0][1]) == 15


def test_a_hole_of_another_size_is_refused() -> None:
    vq, _ = fresh()
    with pytest.raises(
        ValueError, match=r"the hole must be \(B, 16, 16\) bool: torch\.bool \(1, 8, 16\)\nhint: a mask"
    ):
        code_masks(vq, torch.ones(1, 8, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="dilation must not be negative: -1\nhint: 1 covers"):
        code_masks(vq, torch.ones(1, 16, 16, dtype=torch.bool), -1)


# ---- levels and styles ----


def test_upscaling_keeps_the_coarse_codes_and_a_flat_picture_comes_back_when_scaled() -> None:
    vq, prior = fresh()
    codes = coarse_codes(vq, some_pictures(2, side=8))
    found = prior.sample(torch.arange(2), steps=4, guidance=1.0, known=[codes[0], None])
    assert torch.equal(found[0], codes[0]) and not torch.equal(found[1], codes[1])
    images = some_pictures(1)
    expected = images.view(1, 3, 4, 4, 4, 4).mean((3, 5))
    torch.testing.assert_close(scaled_back(images, (4, 4)), expected)


def test_restyling_keeps_coarse_levels_and_moves_statistics_of_the_fine_ones() -> None:
    vq, _ = fresh()
    content, style = some_codes(vq, 3), some_codes(vq, 3, seed=7)
    found = restyled_codes(vq, content, style, keep=1)
    assert torch.equal(found[0], content[0]) and not torch.equal(found[1], content[1])
    assert same(restyled_codes(vq, content, content, keep=0), content), "a picture's own style changes nothing"
    codebook = vq.codebooks[1]
    own, other = (codebook[codes[1][0]].flatten(0, 1).double() for codes in (content, style))
    slow = torch.empty_like(own)
    for channel in range(own.shape[1]):
        a, b = own[:, channel], other[:, channel]
        slow[:, channel] = (a - a.mean()) / a.std(correction=0) * b.std(correction=0) + b.mean()
    nearest = (slow[:, None] - codebook.double()).square().sum(2).argmin(1)
    assert torch.equal(found[1][0].flatten(), nearest)


def test_renoising_takes_the_asked_share_and_all_below_what_it_takes() -> None:
    codes = tuple(torch.zeros(400, *grid, dtype=torch.int64) for grid in ((2, 2), (4, 4)))
    coarse, fine = renoised(codes, torch.arange(400), 0.4)
    assert float(coarse.double().mean()) == pytest.approx(0.4, abs=0.04)
    below = F.interpolate(coarse[:, None].float(), scale_factor=2)[:, 0] > 0
    assert bool(fine[below].all()) and float(fine[~below].double().mean()) == pytest.approx(0.4, abs=0.04)
    kept, only_fine = renoised(codes, torch.arange(400), 0.4, keep=1)
    assert not kept.any() and float(only_fine.double().mean()) == pytest.approx(0.4, abs=0.04)
    assert [bool(level.any()) for level in renoised(codes, torch.arange(400), 0.0)] == [False, False]
    assert [bool(level.all()) for level in renoised(codes, torch.arange(400), 1.0)] == [True, True]
    with pytest.raises(ValueError, match=r"strength must be between 0 and 1: 1\.5\nhint: "):
        renoised(codes, torch.arange(400), 1.5)


# ---- between two pictures ----


def test_the_ends_of_a_blend_are_the_two_pictures_and_nothing_is_in_dispute_there() -> None:
    vq, _ = fresh()
    first, second = some_codes(vq, 1), some_codes(vq, 1, seed=7)
    frames, disputed = blended(first, second, steps=7, key=3, redraw=1.0)
    assert same([level[:1] for level in frames], first) and same([level[-1:] for level in frames], second)
    for marks, a, b in zip(disputed, first, second, strict=True):
        assert not marks[[0, -1]].any()
        assert torch.equal(marks[3], (a != b)[0]), "in the middle all that differs"
    assert not any(marks.any() for marks in blended(first, second, 7, 3, redraw=0.0)[1])


def test_a_place_that_has_gone_over_to_the_second_picture_stays_there() -> None:
    vq, _ = fresh()
    first, second = some_codes(vq, 1), some_codes(vq, 1, seed=7)
    frames, _ = blended(first, second, steps=40, key=3)
    for level, a, b in zip(frames, first, second, strict=True):
        gone = (level == b) & (a != b)
        assert bool((gone[1:] >= gone[:-1]).all())
        assert bool(((level == a) | (level == b)).all())


def test_a_blend_of_one_step_is_refused() -> None:
    vq, _ = fresh()
    codes = some_codes(vq, 1)
    with pytest.raises(ValueError, match="steps must be at least 2, the two ends: 1\nhint: 8 is"):
        blended(codes, codes, 1, 0)
    with pytest.raises(ValueError, match=r"redraw must be between 0 and 1: -0\.1\nhint: 0\.5 is"):
        blended(codes, codes, 4, 0, redraw=-0.1)
