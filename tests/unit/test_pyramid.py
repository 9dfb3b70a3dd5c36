"""The pyramid of pictures: its transforms, what each level codes, and what codes of quantizer fsq cost there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import fft, stats
from torch import Tensor

from hvqd_model.codec.codebooks import DEAD_ZONE, FSQQuantizer, laplace_bits, make_quantizer
from hvqd_model.codec.encoder import Cell
from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.pyramid import COLOURS, PatchTransform, cosines
from hvqd_model.codec.quantizer import merge_statistics
from hvqd_model.config import VQConfig
from hvqd_model.metrics import psnr

CELLS: list[Cell] = [(1, 1), (2, 2), (4, 4), (3, 2), (1, 4)]


def settings(**changes: object) -> VQConfig:
    base: dict[str, object] = {
        "hierarchy": "pyramid",
        "strides": (8, 4),
        "quantizer": "fsq",
        "fsq_steps": ((65, 17, 17), (9, 5, 5, 3)),
        "codebook_sizes": (65 * 17 * 17, 9 * 5 * 5 * 3),
        "width": 8,
        "image_size": (16, 24),
    }
    return VQConfig.model_validate(base | changes)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def started(config: VQConfig, *, shaken: float = 0.0) -> HierarchicalVQ:
    """A tokenizer that rounds; with weights that are off their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HierarchicalVQ(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * shaken)
    for level in model.start_order:
        model.start_codebook(level, torch.zeros(1, config.code_dims[level]), 0)
    return model


# ---- transforms ----


@pytest.mark.parametrize("cell", CELLS)
def test_all_cosines_of_a_cell_are_an_orthonormal_basis_that_begins_with_its_mean_brightness(cell: Cell) -> None:
    found = cosines(cell, 3 * math.prod(cell)).flatten(1)
    torch.testing.assert_close(found @ found.T, torch.eye(len(found)), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], torch.full_like(found[0], len(found) ** -0.5), rtol=1e-3, atol=0)
    again = cosines(cell, 5, len(found) - 2).flatten(1)
    assert torch.equal(again[:2], found[-2:]) and torch.equal(again[2:4], found[: len(again) - 2][:2])


def test_cosines_are_those_of_the_discrete_cosine_transform() -> None:
    rows = fft.dct(np.eye(4), axis=0, norm="ortho")
    columns = fft.dct(np.eye(6), axis=0, norm="ortho")
    every = np.einsum("kx,ry,cz->krcxyz", np.eye(3), rows, columns).reshape(72, 3, 4, 6)
    colours = torch.linalg.qr(torch.tensor(COLOURS, dtype=torch.float64).T)[0].T.numpy()
    reference = np.einsum("kx,rcxyz->krcxyz", colours, every.reshape(3, 4, 6, 3, 4, 6)[0][..., :1, :, :])
    products = np.abs(cosines((4, 6), 72).flatten(1).double().numpy() @ reference.reshape(72, 72).T)
    np.testing.assert_allclose(np.sort(products, 1)[:, -1], 1, atol=2e-3)  # each is one of them


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("fsq", [True, False])
def test_at_the_start_all_coefficients_of_a_cell_are_the_picture(cell: Cell, fsq: bool) -> None:
    count = 3 * math.prod(cell)
    transform = PatchTransform(cell, count, 0, (5,) * count if fsq else ())
    pictures = noise(2, 3, 6 * cell[0], 5 * cell[1])
    coefficients = transform(pictures)
    assert coefficients.shape == (2, count, 6, 5)
    torch.testing.assert_close(transform(coefficients, inverse=True), pictures)


def test_patches_overlap_once_they_have_learned_to() -> None:
    transform = PatchTransform((4, 4), 6, 0, ())
    with torch.no_grad():
        transform.analysis.add_(0.1)
        transform.synthesis.add_(0.1)
        pictures = torch.zeros(1, 3, 12, 12)
        pictures[..., 4:8, 4:8] = noise(3, 4, 4)
        seen = transform(pictures)
        added = transform(seen[..., 1:2, 1:2], inverse=True)
    assert int((seen.abs().sum(1) > 0).sum()) == 9, "the eight cells around see half of it"
    assert added.shape == (1, 3, 4, 4), "what reaches over the edge is cut off"


# ---- levels ----


def test_a_level_codes_what_the_coarser_pictures_leave_over() -> None:
    config = settings()
    model, images = started(config, shaken=0.05).eval(), noise(3, 3, 16, 24)
    with torch.no_grad():
        output = model(images, torch.arange(3))
        rest = images
        for level, (codes, vectors) in enumerate(zip(output.codes, output.vectors, strict=True)):
            expected = model.pyramid.analyse(level, rest).permute(0, 2, 3, 1).clamp(-1, 1)
            torch.testing.assert_close(vectors.view_as(expected), expected)
            chosen = model._quantizer(level).lookup(codes).permute(0, 3, 1, 2)
            rest = rest - model.pyramid.synthesise(level, chosen)
        torch.testing.assert_close(output.reconstruction, model.pyramid.finish(images - rest))


STEPS = ((65, 17, 17), (9, 5, 5, 3), (15, 9, 5))
NESTED: dict[str, object] = {
    "hierarchy": "nested-pyramid",
    "strides": (8, 4, 4),
    "fsq_steps": STEPS,
    "codebook_sizes": tuple(math.prod(steps) for steps in STEPS),
}


def test_each_level_of_a_nested_pyramid_shows_the_whole_picture_and_codes_what_the_finer_one_shows() -> None:
    model, images = started(settings(**NESTED), shaken=0.05).eval(), noise(3, 3, 16, 24)
    with torch.no_grad():
        output = model(images, torch.arange(3))
        picture = images
        for level in (2, 1, 0):
            expected = model.pyramid.analyse(level, picture).permute(0, 2, 3, 1).clamp(-1, 1)
            torch.testing.assert_close(output.vectors[level].view_as(expected), expected)
            chosen = model._quantizer(level).lookup(output.codes[level]).permute(0, 3, 1, 2)
            picture = model.pyramid.synthesise(level, chosen)
            kept = torch.full((3,), level + 1)
            shown = model.pyramid.finish(picture, kept)
            torch.testing.assert_close(model.decode(output.codes[: level + 1]), shown.clamp(-1, 1))
            other = [torch.zeros_like(found) for found in output.codes[:level]]
            assert torch.equal(model.decode([*other, output.codes[level]]), model.decode(output.codes[: level + 1]))
        torch.testing.assert_close(
            output.reconstruction,
            model.pyramid.finish(
                model.pyramid.synthesise(2, model._quantizer(2).lookup(output.codes[2]).permute(0, 3, 1, 2))
            ),
        )


def test_coarse_levels_of_a_nested_pyramid_take_nothing_from_the_finer_ones() -> None:
    """A picture shown by a coarse level teaches that level and what cleans it, and no other."""
    model, images = started(settings(**NESTED, level_dropout=1.0), shaken=0.05).train(), noise(40, 3, 16, 24)
    keys = torch.arange(40)
    kept = model._kept_levels(keys)
    assert kept is not None and set(kept.tolist()) == {1, 2}
    for level in (0, 1):
        chosen = kept == level + 1
        output = model(images[chosen], keys[chosen])
        (output.reconstruction - images[chosen]).square().mean().backward()
        learned = [one for one, transform in enumerate(model.pyramid.transforms) if bool(transform.analysis.grad.any())]
        assert learned == [level]
        rows = model.pyramid.level_shift.weight.grad.any(1).tolist()
        assert rows == [one == level for one in range(3)]
        model.zero_grad()


def test_pictures_come_through_before_anything_is_learned() -> None:
    """Steps of .6 leave an error of their twelfth square, and a little more where fewer coefficients are kept."""
    config = settings(strides=(4,), fsq_steps=((9,) * 5,), codebook_sizes=(9**5,), code_dim=5)
    smooth = torch.nn.functional.interpolate(noise(8, 3, 4, 4), size=(16, 24), mode="bicubic").clamp(-1, 1)
    model = started(config).eval()
    coarse = float(psnr(model.decode(model.encode(smooth)), smooth, 2.0).mean())
    unquantized = {"quantizer": "ema", "fsq_steps": (), "codebook_sizes": (8,), "code_dim": 3 * 4 * 4}
    untouched = HierarchicalVQ(settings(strides=(4,), **unquantized))
    assert coarse > 18
    with torch.no_grad():
        torch.testing.assert_close(untouched(smooth, torch.arange(8)).reconstruction, smooth)


def test_training_makes_codes_cheaper_where_bits_cost_something() -> None:
    def after_training(rate_weight: float) -> tuple[float, float]:
        model = started(settings(rate_weight=rate_weight)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        images = torch.nn.functional.interpolate(noise(16, 3, 6, 8), size=(16, 24), mode="bicubic").clamp(-1, 1)
        for _ in range(60):
            output = model(images, torch.arange(16))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        shares = [torch.bincount(codes.flatten()).float() / codes.numel() for codes in output.codes]
        bits = sum(
            -float(torch.xlogy(share, share).sum()) / math.log(2) * codes[0].numel()
            for share, codes in zip(shares, output.codes, strict=True)
        )
        return bits, float(output.metrics["pixel"].detach())

    (free, near), (dear, far) = after_training(1e-9), after_training(0.5)
    assert dear < 0.8 * free and far > near


# ---- what codes cost ----


@pytest.mark.parametrize("width", [0.05, 0.3, 1.0, 20.0])
def test_bits_are_those_of_a_laplace_distribution(width: float) -> None:
    distances = torch.linspace(-6 * width - 0.7, 6 * width + 0.7, 41, dtype=torch.float64)[:, None]
    law = stats.laplace(scale=width)
    far = np.abs(distances.numpy())
    expected = -np.log2(law.sf(far - 0.5) - law.sf(far + 0.5))
    found = laplace_bits(distances, torch.tensor([width], dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_bits_and_their_gradients_are_finite_far_out_and_for_narrow_laws() -> None:
    distances = torch.tensor([[0.0], [0.4999], [0.5], [3.0], [64.0]]).requires_grad_()
    widths = torch.tensor([0.02]).requires_grad_()
    bits = laplace_bits(distances, widths)
    bits.sum().backward()
    assert distances.grad is not None and widths.grad is not None
    assert all(torch.isfinite(found).all() for found in (bits, distances.grad, widths.grad))
    assert torch.all(bits.detach().flatten().diff() >= 0)


def rounding(bit_cost: float, *steps: int) -> FSQQuantizer:
    made = make_quantizer("fsq", math.prod(steps), len(steps), steps=steps, bounded=True, bit_cost=bit_cost)
    assert isinstance(made, FSQQuantizer)
    made.start(torch.zeros(1, len(steps)), 0)
    return made


def test_the_loss_is_what_the_codes_would_cost_and_counts_only_what_it_is_told_to() -> None:
    quantizer, vectors = rounding(0.25, 5, 9), noise(40, 2).requires_grad_()
    with torch.no_grad():
        quantizer.log_width.copy_(torch.tensor([-0.5, 0.5]))
    counted = torch.arange(40) % 4 > 0
    bits = laplace_bits(vectors.detach() * torch.tensor([2.0, 4.0]), torch.tensor([-0.5, 0.5]).exp()).sum(1)
    for chosen, expected in ((None, bits.mean()), (counted, bits[counted].sum() / 40)):
        loss = quantizer(vectors, torch.arange(40), chosen).loss
        torch.testing.assert_close(loss.detach(), 0.25 * expected)
        (gradient,) = torch.autograd.grad(loss, vectors)
        assert bool((gradient != 0).any())
    assert not rounding(0.0, 5, 9)(vectors, torch.arange(40)).loss.detach()


def test_values_are_rounded_towards_the_middle_only_where_bits_cost_something() -> None:
    values = torch.linspace(-1, 1, 201)[:, None]
    middle = 2  # of 5 steps
    for cost, zone in ((0.0, 0.0), (1.0, DEAD_ZONE)):
        places = rounding(cost, 5).assign(values) - middle
        near = values[:, 0].abs() * middle
        sure = (near - zone - near.round() + 0.5).abs() > 0.02
        expected = values[:, 0].sign() * ((near - zone).clamp_min(0) + 0.5).floor()
        assert torch.equal(places[sure].float(), expected[sure]) and int(sure.sum()) > 150


def test_vectors_in_the_interval_are_clipped_and_not_squashed() -> None:
    vectors = torch.tensor([[-7.0], [-0.9], [0.26], [1.4]])
    assert rounding(0.0, 9).prepare(vectors)[:, 0].tolist() == pytest.approx([-1, -0.9, 0.26, 1])


def test_a_grid_of_many_codes_keeps_no_sums() -> None:
    """A million codes of seven dimensions would be 28 MB a level and micro-batch, for nothing."""
    quantizer = rounding(0.0, 15, 15, 9, 9, 7, 7)
    parts = [quantizer(noise(50, 6, seed=seed), torch.arange(50)).statistics for seed in range(2)]
    together = merge_statistics(*parts)
    assert together.sums.shape == (893_025, 0) and float(together.counts.sum()) == 100


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantizer": "ema", "fsq_steps": (), "rate_weight": 0.1},
            "rate_weight must be 0 without a level of quantizer fsq, whose steps it spares: 0.1\n"
            "hint: set quantizer=fsq, or leave rate_weight out",
        ),
        (
            {"quantizer": "ema", "fsq_steps": (), "code_dim": 8, "l2_normalize": True},
            "l2_normalize must be false with hierarchy=pyramid, where the length of a vector is the contrast of a "
            "patch: true\nhint: leave l2_normalize out",
        ),
        (
            {"quantizer": "ema", "fsq_steps": (), "strides": (8, 4), "code_dim": 64},
            "code_dim of level 1 must be at most 48 with hierarchy=pyramid, the numbers in a patch of 4 x 4 pixels: "
            "64\nhint: code_dim=16",
        ),
        (
            {"hierarchy": "nested-pyramid", "level_dropout": 0.0},
            "level_dropout must be above 0 with hierarchy=nested-pyramid, whose coarse levels learn from nothing else: "
            "0\nhint: level_dropout=0.1",
        ),
    ],
)
def test_what_a_pyramid_cannot_do_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings(**changes)
    assert message in str(caught.value)
