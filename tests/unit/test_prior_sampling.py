"""Drawing from priors, of either kind of noise: what comes back, what it depends on, and a law that is known."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerName
from hvqd_model.diffusion.samplers import SamplerName
from hvqd_model.prior.prior import HierarchicalPrior
from tests.small_priors import GRIDS, gaussian_settings, random_codes, random_prior, settings, some_labels

SAMPLERS = get_args(SamplerName)
EVERY = [(settings, name) for name in SAMPLERS] + [(gaussian_settings, name) for name in get_args(GaussianSamplerName)]
every_sampler = pytest.mark.parametrize(("configured", "sampler"), EVERY, ids=[name for _, name in EVERY])


@every_sampler
@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_samples_are_codes_and_given_levels_come_back_bitwise(configured: Any, sampler: Any, stagger: float) -> None:
    config = configured(stagger=stagger)
    prior, images = random_prior(config), 6
    given = random_codes(config, images)
    for known in ([None] * 3, [given[0], None, None], [None, given[1], None], [given[0], given[1], None]):
        samples = prior.sample(torch.arange(images), some_labels(images), steps=5, sampler=sampler, known=known)
        for level, (sample, fixed) in enumerate(zip(samples, known, strict=True)):
            assert sample.shape == (images, *GRIDS[level]) and sample.dtype == torch.int64
            assert int(sample.min()) >= 0 and int(sample.max()) < config.codebook_sizes[level]
            assert fixed is None or torch.equal(sample, fixed)


@every_sampler
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch_neighbours(configured: Any, sampler: Any, guidance: float) -> None:
    prior = random_prior(configured(stagger=0.5))
    seeds, labels = torch.arange(10) * 991, some_labels(10)

    def sample(seeds: Tensor, labels: Tensor) -> Tensor:
        levels = prior.sample(seeds, labels, steps=6, sampler=sampler, guidance=guidance)
        return torch.cat([level.flatten(1) for level in levels], 1)

    codes = sample(seeds, labels)
    assert torch.equal(sample(seeds, labels), codes)
    assert torch.equal(sample(seeds.flip(0), labels.flip(0)), codes.flip(0))
    strangers = torch.cat([seeds[:3], seeds[3:] + 17]), torch.cat([labels[:3], labels[3:].flip(0)])
    assert torch.equal(sample(*strangers)[:3], codes[:3])
    assert not torch.equal(sample(seeds + 1, labels), codes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mask_and_replace_noise_is_sampled_too(sampler: Any) -> None:
    prior = random_prior(settings(noise="mask-and-replace", loss="kl", stagger=0.5))
    samples = prior.sample(torch.arange(4), some_labels(4), steps=6, sampler=sampler)
    assert all(int(level.max()) < size for level, size in zip(samples, prior.config.codebook_sizes, strict=True))


def test_no_label_equals_unconditional_guidance() -> None:
    prior = random_prior(settings())
    seeds = torch.arange(4)
    without = prior.sample(seeds, steps=4)
    for other in (
        prior.sample(seeds, some_labels(4), steps=4, guidance=0.0),
        prior.sample(seeds, torch.full((4,), -1), steps=4, guidance=1.0),
    ):
        assert all(torch.equal(a, b) for a, b in zip(without, other, strict=True))


def test_outside_its_interval_guidance_follows_the_class_plainly() -> None:
    prior = random_prior(settings())
    seeds, labels = torch.arange(8), some_labels(8)
    never = prior.sample(seeds, labels, steps=4, guidance=5.0, guidance_interval=(0.0, 0.0))
    plain = prior.sample(seeds, labels, steps=4, guidance=1.0)
    always = prior.sample(seeds, labels, steps=4, guidance=5.0)
    assert all(torch.equal(a, b) for a, b in zip(never, plain, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(always, plain, strict=True))


@pytest.mark.parametrize("configured", [settings, gaussian_settings])
def test_fine_levels_are_guided_less_whatever_the_noise(configured: Any) -> None:
    """Each level's codes at a scale of its own, given the same coarser ones, are those of that scale everywhere."""
    prior = random_prior(configured(stagger=1.0))
    seeds, labels = torch.arange(8), some_labels(8)
    mixed = prior.sample(seeds, labels, steps=12, guidance=5.0, fine_guidance=1.0)
    for level, scale in enumerate((5.0, 3.0, 1.0)):
        known = [codes if coarser < level else None for coarser, codes in enumerate(mixed)]
        alike = prior.sample(seeds, labels, steps=12, guidance=scale, known=known)
        # With the coarser levels given, all steps are for the rest; so compare a walk that is given them, too.
        again = prior.sample(seeds, labels, steps=12, guidance=5.0, fine_guidance=1.0, known=known)
        assert torch.equal(again[level], alike[level])
    everywhere = prior.sample(seeds, labels, steps=12, guidance=5.0)
    assert torch.equal(mixed[0], everywhere[0]) and not torch.equal(mixed[2], everywhere[2])


def test_fine_guidance_is_an_upper_bound_and_a_single_level_is_guided_in_full() -> None:
    prior, seeds, labels = random_prior(settings()), torch.arange(8), some_labels(8)
    for guidance in (0.0, 1.0, 2.0):
        bounded = prior.sample(seeds, labels, steps=4, guidance=guidance, fine_guidance=2.0)
        plain = prior.sample(seeds, labels, steps=4, guidance=guidance)
        assert all(torch.equal(a, b) for a, b in zip(bounded, plain, strict=True))
    flat = random_prior(settings(grids=((4, 4),), codebook_sizes=(7,)))
    found = (flat.sample(seeds, labels, steps=4, guidance=4.0, fine_guidance=fine)[0] for fine in (None, 1.0))
    assert torch.equal(*found)


def test_a_toy_joint_is_learned_and_recovered() -> None:
    """coarse follows the class; each fine code is f(coarse), or with probability 0.2 any other code."""
    torch.manual_seed(0)
    config = PriorConfig(
        grids=((1, 1), (2, 2)), codebook_sizes=(4, 4), code_dim=2, classes=("a", "b"), width=32, depth=2, heads=2,
        stagger=0.5,
    )  # fmt: skip
    prior = HierarchicalPrior(config, [torch.randn(4, 2), torch.randn(4, 2)])
    optimizer = torch.optim.AdamW(prior.parameters(), 4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    steps, images = 250, 64

    def draw(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        labels = torch.randint(2, (count,))
        coarse = (labels * 2 + (torch.rand(count) < 0.25).long())[:, None, None]
        follows = torch.rand(count, 2, 2) < 0.8
        return labels, (coarse, (3 - coarse + torch.randint(1, 4, (count, 2, 2)) * ~follows) % 4)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        labels, codes = draw(images)
        times = (torch.rand((), dtype=torch.float64) + torch.arange(images) / images) % 1
        loss = prior(codes, labels, times, torch.randint(2**40, (images,))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    count = 2000
    labels = torch.arange(count) % 2
    coarse, fine = prior.sample(torch.arange(count), labels, steps=32, sampler="ancestral", guidance=1.0)
    assert float((coarse[:, 0, 0] // 2 == labels).double().mean()) > 0.98
    assert float((coarse % 2).double().mean()) == pytest.approx(0.25, abs=0.06)
    agreement = (fine == 3 - coarse).double()
    assert float(agreement.mean()) == pytest.approx(0.8, abs=0.05)
    # Given the coarse code the four fine ones are independent.
    assert float(agreement.flatten(1).prod(1).mean()) == pytest.approx(0.8**4, abs=0.07)
    # The true code length: 1 bit would be the class; coarse costs h(.25), fine h(.2) + .2 log2 3 each.
    labels, codes = draw(count)
    bits = prior.bits(codes, labels, torch.arange(count), draws=16)
    assert float(bits[0].mean()) == pytest.approx(0.811, abs=0.12)
    assert float(bits[1].mean()) == pytest.approx(4 * (0.722 + 0.2 * math.log2(3)), rel=0.06)
