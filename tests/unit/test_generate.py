"""Drawing pictures: each depends on its seed, its class and the weights alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, VQConfig
from hvqd_model.randomness import normal
from workflows.config import SamplingSettings
from workflows.drawing.generate import decode_codes, draw_codes, draw_images, image_grid, to_uint8

CLASSES = ("cats", "dogs", "birds")


def models(classes: tuple[str, ...] = CLASSES) -> tuple[HierarchicalVQ, HierarchicalPrior]:
    """A tokenizer and a prior whose every weight is random (fresh zero-initialised outputs would hide the labels)."""
    torch.manual_seed(0)
    vq = HierarchicalVQ(VQConfig(image_size=(16, 16), codebook_sizes=(16, 32), code_dim=8, width=8))
    for level in vq.start_order:
        keys = torch.arange(64)
        vq.start_codebook(level, normal(keys, (8,), f"vectors {level}").float(), key=level)
    config = PriorConfig(
        grids=vq.config.grids,
        codebook_sizes=vq.config.codebook_sizes,
        code_dim=8,
        classes=classes,
        width=32,
        depth=1,
        heads=2,
    )
    prior = HierarchicalPrior(config, vq.codebooks)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(0, 0.2)
    return vq.eval(), prior.eval()


SAMPLING = SamplingSettings(steps=3, batch=4)
SEEDS = [11, -12, 13, 14, 15, 2**62, -17]
LABELS = [0, 1, 2, 0, -1, 1, 2]


def test_a_picture_is_the_same_alone_and_among_others_in_any_order() -> None:
    vq, prior = models()
    together = draw_images(vq, prior, SEEDS, LABELS, SAMPLING)
    assert together.shape == (7, 16, 16, 3) and together.dtype == np.uint8
    assert len({picture.tobytes() for picture in together}) == 7
    for index, (seed, label) in enumerate(zip(SEEDS, LABELS, strict=True)):
        assert np.array_equal(draw_images(vq, prior, [seed], [label], SAMPLING)[0], together[index])
    backwards = draw_images(vq, prior, SEEDS[::-1], LABELS[::-1], SAMPLING)
    assert np.array_equal(backwards[::-1], together)


def test_the_class_and_the_seed_matter() -> None:
    _, prior = models()
    first = draw_codes(prior, [1], [0], SAMPLING)
    assert any((a != b).any() for a, b in zip(first, draw_codes(prior, [1], [1], SAMPLING), strict=True))
    assert any((a != b).any() for a, b in zip(first, draw_codes(prior, [2], [0], SAMPLING), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 5},
        {"sampler": "ancestral"},
        {"guidance": 1.0},
        {"guidance_interval": [0.5, 1.0]},
        {"fine_guidance": 1.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_p": 0.05},
        {"gumbel_scale": 30.0},
    ],
)
def test_every_sampling_setting_matters(change: dict[str, object]) -> None:
    _, prior = models()
    before = SamplingSettings(steps=6, batch=4)
    changed = SamplingSettings.model_validate(before.model_dump() | change)
    first, second = (draw_codes(prior, SEEDS, LABELS, sampling) for sampling in (before, changed))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("interval", [[0.6, 0.5], [-0.1, 1.0], [0.0, 1.5]])
def test_an_interval_that_does_not_rise_within_0_and_1_is_refused(interval: list[float]) -> None:
    with pytest.raises(ValueError, match=r"guidance_interval must rise within 0 and 1: .*\nhint: \[0, 1\] guides"):
        SamplingSettings.model_validate({"guidance_interval": interval})


def test_codes_are_codes() -> None:
    _, prior = models()
    coarse, fine = draw_codes(prior, SEEDS, LABELS, SAMPLING)
    assert (coarse.shape, fine.shape) == ((7, 2, 2), (7, 4, 4))
    assert coarse.min() >= 0 and coarse.max() < 16 and fine.min() >= 0 and fine.max() < 32


def test_a_prior_without_classes_is_drawn_without_guidance() -> None:
    vq, prior = models(classes=())
    plain = SAMPLING.model_copy(update={"guidance": 1.0})
    expected = draw_images(vq, prior, SEEDS, [-1] * 7, plain)
    assert np.array_equal(draw_images(vq, prior, SEEDS, LABELS, SAMPLING), expected)


def test_progress_rises_to_the_number_of_pictures() -> None:
    vq, prior = models()
    seen: list[tuple[int, int]] = []
    draw_images(vq, prior, SEEDS, LABELS, SAMPLING, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (7, 7) and {total for _, total in seen} == {7}


def test_decoding_in_fixed_batches_equals_decoding_each_prefix_at_once() -> None:
    vq, prior = models()
    codes = draw_codes(prior, SEEDS, LABELS, SAMPLING)
    for levels in (1, 2):
        with torch.no_grad():
            whole = to_uint8(vq.decode(tuple(torch.from_numpy(level) for level in codes[:levels])))
        found = decode_codes(vq, codes[:levels], batch=3).astype(int)
        assert np.abs(found - whole).max() <= 1  # another batch size may round differently


def test_no_picture_and_unequal_lists_are_refused() -> None:
    vq, prior = models()
    with pytest.raises(ValueError, match="seeds and labels must be as many, at least one: 0 and 0\nhint: "):
        draw_images(vq, prior, [], [], SAMPLING)
    with pytest.raises(ValueError, match="seeds and labels must be as many, at least one: 2 and 1\nhint: "):
        draw_images(vq, prior, [1, 2], [0], SAMPLING)
    with pytest.raises(ValueError, match="labels must be"):
        draw_images(vq, prior, [1], [3], SAMPLING)


def test_pixels_are_rounded_and_clipped() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5, 1 / 127.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_pixels_make_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert np.array_equal(to_uint8(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1), pixels.numpy())


def test_a_grid_shows_every_picture_enlarged_with_white_gaps() -> None:
    pictures = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3) // 2
    grid = np.asarray(image_grid(pictures, columns=3, scale=2))
    assert grid.shape == (2 * 8 + 2, 3 * 12 + 2 * 2, 3)
    for index in range(5):
        top, left = index // 3 * 10, index % 3 * 14
        assert np.array_equal(grid[top : top + 8 : 2, left : left + 12 : 2], pictures[index])
        assert np.array_equal(grid[top + 1 : top + 8 : 2, left + 1 : left + 12 : 2], pictures[index])
    assert (grid[8:10] == 255).all() and (grid[:, 12:14] == 255).all() and (grid[10:, 28:] == 255).all()


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid needs pictures, columns and a scale of at least 1: 0, 4, 1\nhint: "):
        image_grid(np.zeros((0, 4, 4, 3), dtype=np.uint8), columns=4)
