"""Completing codes under Gaussian noise: what is known comes back, and the rest is drawn to fit."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerName, GaussianSamplerSettings
from hvqd_model.prior.completion import complete
from hvqd_model.prior.gaussian_prior import GaussianProcess
from hvqd_model.randomness import normal
from tests.small_priors import codebook_of, gaussian_settings, random_prior, some_labels
from tests.unit.test_editing import same

every_sampler = pytest.mark.parametrize("sampler", get_args(GaussianSamplerName))
SEEDS = torch.arange(4) * 7


def partly(codes: tuple[Tensor, ...]) -> list[Tensor]:
    """Nothing is unknown of the first picture, everything of the last."""
    shares = torch.tensor([0.0, 0.4, 0.7, 1.0])
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(level.shape, generator=generator) < shares[:, None, None] for level in codes]


@pytest.mark.parametrize("stagger", [0.0, 1.0])
@every_sampler
def test_known_codes_come_back_and_unknown_ones_are_drawn(sampler: GaussianSamplerName, stagger: float) -> None:
    prior, walk = random_prior(gaussian_settings(stagger=stagger)), GaussianSamplerSettings(5, sampler)
    codes = prior.sample(SEEDS + 90, steps=3)
    unknown = partly(codes)
    found = complete(prior, codes, unknown, SEEDS, settings=walk)
    for level, before, marks in zip(found, codes, unknown, strict=True):
        assert torch.equal(level[~marks], before[~marks])
    other = [torch.where(marks, 99, level) for level, marks in zip(codes, unknown, strict=True)]
    assert same(complete(prior, other, unknown, SEEDS, settings=walk), found), "what stands in a hole counts nothing"
    assert not same(complete(prior, codes, unknown, SEEDS + 9, settings=walk), found)
    nothing = [torch.zeros_like(marks) for marks in unknown]
    assert same(complete(prior, codes, nothing, SEEDS, settings=walk), codes)


@every_sampler
def test_completing_what_is_all_unknown_is_sampling(sampler: GaussianSamplerName) -> None:
    prior, labels = random_prior(gaussian_settings(stagger=0.5)), some_labels(4)
    plain = prior.sample(SEEDS, labels, steps=5, sampler=sampler, guidance=2.0)
    everything = [torch.ones_like(level, dtype=torch.bool) for level in plain]
    walk = GaussianSamplerSettings(5, sampler)
    assert same(complete(prior, plain, everything, SEEDS, labels, settings=walk, guidance=2.0), plain)


@every_sampler
def test_a_completed_picture_does_not_depend_on_what_its_neighbours_know(sampler: GaussianSamplerName) -> None:
    prior, walk = random_prior(gaussian_settings(stagger=1.0)), GaussianSamplerSettings(4, sampler)
    codes = prior.sample(SEEDS + 90, steps=3)
    unknown = [marks.roll(1, 0) for marks in partly(codes)]
    found = complete(prior, codes, unknown, SEEDS, settings=walk)
    others = [torch.cat([marks[:2], torch.ones_like(marks[2:])]) for marks in unknown]
    beside = complete(prior, codes, others, torch.cat([SEEDS[:2], SEEDS[2:] + 40]), settings=walk)
    assert same([level[:2] for level in found], [level[:2] for level in beside])


def test_known_places_walk_from_the_starts_noise_straight_to_their_codes_vectors() -> None:
    prior = random_prior(gaussian_settings(stagger=0.0))
    codes = prior.sample(SEEDS + 5, steps=2)
    unknown = [torch.zeros_like(codes[0], dtype=torch.bool), *partly(codes)[1:]]
    seen: list[tuple[Tensor, Tensor]] = []
    prior.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0][1], inputs[1][0, 1:2])))
    complete(prior, codes, unknown, SEEDS, settings=GaussianSamplerSettings(4, "ddim"))
    process = prior.process
    assert isinstance(process, GaussianProcess) and len(seen) == 4
    vectors = process.normalizer.vectors(1, codes[1].flatten(1), codebook_of(prior, 1))
    known = ~unknown[1].flatten(1)
    signal, strength = (rate.float() for rate in process.schedule.rates(seen[0][1]))
    own = (normal(SEEDS, vectors.shape[1:], "start.1").float() - signal * vectors) / strength
    for latents, time in seen:
        signal, strength = (rate.float() for rate in process.schedule.rates(time))
        torch.testing.assert_close(latents[known], (signal * vectors + strength * own)[known], rtol=1e-3, atol=1e-3)
