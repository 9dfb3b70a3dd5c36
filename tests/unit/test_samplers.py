"""Samplers with an oracle that knows the joint law of a few codes on two levels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.discrete import copy_prior
from hvqd_model.diffusion.samplers import SamplerName, SamplerSettings, confidence_counts, sample_codes
from hvqd_model.diffusion.schedules import Schedule, absorbing, mask_and_replace, tabulated

NOISES = {
    "absorbing linear": absorbing("linear"),
    "absorbing cosine": absorbing("cosine"),
    "mixed": mask_and_replace(0.3, "linear"),
    "uniform": mask_and_replace(1.0, "linear"),
}
SAMPLERS: tuple[SamplerName, ...] = ("ancestral", "confidence", "purity")
IMAGES = 20_000


class Oracle:
    """The exact law of each clean code given noisy codes of all levels, by summing over all clean pictures."""

    def __init__(self, sizes: Sequence[int], codebook_sizes: Sequence[int], schedule: Schedule, seed: int = 0) -> None:
        self.sizes, self.codebook_sizes, self.schedule = list(sizes), list(codebook_sizes), schedule
        per_place = [range(k) for n, k in zip(sizes, codebook_sizes, strict=True) for _ in range(n)]
        self.pictures = torch.tensor(list(itertools.product(*per_place)))  # (pictures, places)
        generator = torch.Generator().manual_seed(seed)
        self.law = (2 * torch.randn(len(self.pictures), generator=generator, dtype=torch.float64)).softmax(0)
        self.calls: list[tuple[int, list[float], float]] = []

    def index(self, codes: Sequence[Tensor]) -> Tensor:
        """(B,) which picture the clean codes of all levels are."""
        found = torch.zeros(len(codes[0]), dtype=torch.int64)
        for level, num_codes in zip(codes, self.codebook_sizes, strict=True):
            for place in range(level.shape[1]):
                found = found * num_codes + level[:, place]
        return found

    def __call__(
        self, codes: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        self.calls.append((len(codes), list(level_times), time))
        clean = self.pictures.split(self.sizes, 1)
        log_posterior = self.law.log().expand(len(codes[0]), -1)
        for level, (noisy, at) in enumerate(zip(codes, level_times, strict=True)):
            when = torch.tensor(at, dtype=torch.float64)
            kept, replaced = self.schedule.kept.value(when), self.schedule.replaced(when) / self.codebook_sizes[level]
            for place in range(noisy.shape[1]):
                is_mask = noisy[:, place, None] == self.codebook_sizes[level]
                agrees = noisy[:, place, None] == clean[level][None, :, place]
                likelihood = (kept * agrees + replaced).masked_fill(is_mask, 1.0)
                log_posterior = log_posterior + likelihood.clamp_min(1e-300).log()
        weights = log_posterior.softmax(1)
        logits: list[Tensor | None] = []
        for level, places in enumerate(wanted):
            if places is None:
                logits.append(None)
                continue
            one_hot = torch.nn.functional.one_hot(clean[level], self.codebook_sizes[level]).double()
            marginal = torch.einsum("bp,pnk->bnk", weights, one_hot).clamp_min(1e-300).log()
            logits.append(
                self._without_copy_prior(marginal, codes[level], level_times[level])
                .gather(1, places[..., None].expand(-1, -1, marginal.shape[2]))
                .float()
            )
        return logits

    def _without_copy_prior(self, marginal: Tensor, noisy: Tensor, at: float) -> Tensor:
        """A sampler of noise that replaces adds the copy prior itself."""
        if self.schedule.is_absorbing:
            return marginal
        times = torch.full((noisy.numel(),), at, dtype=torch.float64)
        bonus = copy_prior(noisy.flatten(), times, self.schedule, marginal.shape[2]).view(noisy.shape)
        own = noisy.clamp_max(marginal.shape[2] - 1)
        return marginal.scatter_add(2, own[..., None], -bonus[..., None])


def largest_deviation(oracle: Oracle, codes: Sequence[Tensor], law: Tensor | None = None) -> float:
    """In standard errors, over all pictures that are expected at least ten times."""
    law = oracle.law if law is None else law
    images = len(codes[0])
    found = torch.bincount(oracle.index(codes), minlength=len(law)).double()
    common = law * images >= 10
    assert int(common.sum()) >= 4
    return float(((found - law * images).abs() / (law * (1 - law) * images).sqrt())[common].max())


def run(
    oracle: Oracle, settings: SamplerSettings, stagger: float, images: int = IMAGES, **rest: object
) -> list[Tensor]:
    known = cast(Sequence[Tensor | None] | None, rest.get("known"))
    seeds = torch.arange(images)
    return sample_codes(oracle, oracle.sizes, oracle.codebook_sizes, seeds, oracle.schedule, stagger, settings, known)


@pytest.mark.parametrize("schedule", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("steps", [2, 6])
def test_ancestral_sampling_one_level_after_the_other_recovers_the_joint_law(schedule: Schedule, steps: int) -> None:
    """One code a level: nothing is drawn independently that is not, so few steps are exact too."""
    oracle = Oracle((1, 1), (4, 5), schedule)
    codes = run(oracle, SamplerSettings(steps, "ancestral"), stagger=1.0)
    assert largest_deviation(oracle, codes) < 3.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_recovers_the_joint_law_of_two_codes_in_turn(sampler: SamplerName) -> None:
    oracle = Oracle((1, 1), (4, 5), absorbing("cosine"))
    assert largest_deviation(oracle, run(oracle, SamplerSettings(4, sampler), stagger=1.0)) < 3.5


@pytest.mark.parametrize("schedule", NOISES.values(), ids=NOISES)
def test_ancestral_sampling_of_independent_codes_is_exact_at_any_number_of_steps(schedule: Schedule) -> None:
    oracle = Oracle((1,), (6,), schedule)
    for steps in (1, 3):
        assert largest_deviation(oracle, run(oracle, SamplerSettings(steps, "ancestral"), stagger=0.0)) < 3.5


@pytest.mark.parametrize("schedule", NOISES.values(), ids=NOISES)
def test_ancestral_sampling_of_dependent_codes_converges_to_the_joint_law(schedule: Schedule) -> None:
    oracle = Oracle((1, 2), (3, 2), schedule)
    few, many = (run(oracle, SamplerSettings(steps, "ancestral"), stagger=0.5, images=6000) for steps in (1, 60))
    assert largest_deviation(oracle, many) < 4  # about 1 / steps is left, in total variation
    assert largest_deviation(oracle, few) > 8  # and the test can see what is wrong with one step


def test_the_chain_of_a_table_is_walked_exactly() -> None:
    oracle = Oracle((1,), (6,), tabulated((1.0, 0.8, 0.4, 0.0), (0.0, 0.1, 0.3, 0.6)))
    assert largest_deviation(oracle, run(oracle, SamplerSettings(7, "ancestral"), stagger=0.0)) < 3.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_levels_come_back_bitwise_and_the_rest_follows_them(sampler: SamplerName) -> None:
    oracle = Oracle((1, 1), (4, 5), absorbing())
    for stagger in (0.0, 0.5, 1.0):
        coarse = torch.full((IMAGES, 1), 2)
        codes = run(oracle, SamplerSettings(4, sampler), stagger, known=[coarse, None])
        assert torch.equal(codes[0], coarse) and codes[0] is not coarse
        law = torch.where(oracle.pictures[:, 0] == 2, oracle.law, 0.0)
        assert largest_deviation(oracle, codes, law / law.sum()) < 3.5


def test_a_given_fine_level_is_seen_by_the_coarse_one() -> None:
    for schedule in NOISES.values():
        oracle = Oracle((1, 1), (4, 5), schedule)
        fine = torch.full((IMAGES, 1), 1)
        codes = run(oracle, SamplerSettings(4, "ancestral"), 1.0, known=[None, fine])
        assert torch.equal(codes[1], fine)
        law = torch.where(oracle.pictures[:, 1] == 1, oracle.law, 0.0)
        assert largest_deviation(oracle, codes, law / law.sum()) < 3.5


def test_confidence_counts_are_the_published_ones() -> None:
    assert confidence_counts(256, 8) == [251, 236, 212, 181, 142, 97, 49, 0]
    for positions, steps in itertools.product((1, 16, 64, 1000), (1, 3, 16, 200)):
        counts = confidence_counts(positions, steps)
        assert len(counts) == steps and counts[-1] == 0
        assert sorted(counts, reverse=True) == counts


def masks_left(oracle: Oracle, settings: SamplerSettings, stagger: float = 0.0) -> list[int]:
    """How many masks of the last level the predictor saw at each call."""
    seen: list[int] = []

    def spy(
        codes: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        counts = (codes[-1] == oracle.codebook_sizes[-1]).sum(1)
        assert len(counts.unique()) == 1
        seen.append(int(counts[0]))
        return oracle(codes, level_times, time, wanted)

    sample_codes(spy, oracle.sizes, oracle.codebook_sizes, torch.arange(5), oracle.schedule, stagger, settings)
    return seen


def test_confidence_settles_by_its_counts_whatever_the_schedule() -> None:
    for schedule in (absorbing("linear"), absorbing("cosine")):
        assert masks_left(Oracle((8,), (2,), schedule), SamplerSettings(4, "confidence")) == [
            8,
            *confidence_counts(8, 4)[:-1],
        ]


def test_purity_settles_by_the_noise_schedule() -> None:
    assert masks_left(Oracle((8,), (2,), absorbing("linear")), SamplerSettings(4, "purity")) == [8, 6, 4, 2]
    assert masks_left(Oracle((10,), (2,), absorbing("cosine")), SamplerSettings(3, "purity")) == [10, 9, 5]


def test_more_steps_than_codes_ask_the_predictor_no_more_often_than_needed() -> None:
    oracle = Oracle((3,), (2,), absorbing())
    reported: list[tuple[int, int]] = []
    codes = sample_codes(
        oracle,
        (3,),
        (2,),
        torch.arange(4),
        oracle.schedule,
        0.0,
        SamplerSettings(50),
        progress=lambda done, steps: reported.append((done, steps)),
    )
    assert len(oracle.calls) == 3
    assert reported == [(step, 50) for step in range(1, 51)]
    assert int(codes[0].max()) < 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_of_pure_noise_stay_out_of_the_sequence_at_full_stagger(sampler: SamplerName) -> None:
    oracle = Oracle((2, 2), (2, 2), absorbing())
    run(oracle, SamplerSettings(8, sampler), stagger=1.0, images=3)
    present = [count for count, _, _ in oracle.calls]
    assert present == sorted(present) and set(present) == {1, 2}
    assert all(times[0] == 0 for count, times, _ in oracle.calls if count == 2)
    if sampler == "ancestral":
        assert present == [1, 1, 1, 1, 2, 2, 2, 2]
        assert [time for _, _, time in oracle.calls] == pytest.approx([1 - step / 8 for step in range(8)])


def test_given_levels_spend_no_steps() -> None:
    oracle = Oracle((2, 2), (2, 2), absorbing())
    run(oracle, SamplerSettings(4, "ancestral"), 1.0, images=3, known=[torch.zeros(3, 2, dtype=torch.int64), None])
    assert [times for _, times, _ in oracle.calls] == [[0.0, 1.0], [0.0, 0.75], [0.0, 0.5], [0.0, 0.25]]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise", ["absorbing linear", "mixed"])
def test_an_image_depends_on_its_own_seed_alone(sampler: SamplerName, noise: str) -> None:
    oracle = Oracle((2, 3), (3, 2), NOISES[noise])
    seeds = torch.arange(64) * 7919 - 1000
    settings = SamplerSettings(6, sampler)

    def draw_with(seeds: Tensor) -> Tensor:
        return torch.cat(sample_codes(oracle, (2, 3), (3, 2), seeds, oracle.schedule, 0.5, settings), 1)

    codes = draw_with(seeds)
    assert torch.equal(draw_with(seeds), codes)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_with(seeds[order]), codes[order])
    assert torch.equal(draw_with(seeds[:7]), codes[:7])
    assert len(codes.unique(dim=0)) > 10
    assert not torch.equal(draw_with(seeds + 1), codes)


def test_low_temperature_top_1_and_small_mass_all_give_the_likeliest_code() -> None:
    oracle = Oracle((1,), (6,), absorbing())
    likeliest = int(oracle.law.argmax())
    for settings in (
        SamplerSettings(1, temperature=1e-4),
        SamplerSettings(1, top_k=1),
        SamplerSettings(1, top_p=1e-4),
        SamplerSettings(4, "ancestral", top_k=1),
    ):
        assert run(oracle, settings, 0.0, images=200)[0].unique().tolist() == [likeliest]
    for settings in (SamplerSettings(1, "ancestral", temperature=1e-4), SamplerSettings(1, "ancestral", top_k=1)):
        mixed = Oracle((1,), (6,), NOISES["mixed"])
        codes = run(mixed, settings, 0.0, images=200)[0]
        assert codes.unique().tolist() == [likeliest]


@pytest.mark.parametrize("noise", ["absorbing linear", "mixed"])
def test_truncation_sees_the_distribution_at_its_temperature(noise: str) -> None:
    """At a high temperature all six codes are about as likely, so half of the mass is three or four of them."""
    oracle = Oracle((1,), (6,), NOISES[noise])
    codes = run(oracle, SamplerSettings(1, "ancestral", temperature=100.0, top_p=0.5), 0.0, images=500)[0]
    assert 3 <= len(codes.unique()) <= 4


BAD = {
    r"steps must be at least 1: 0": {"steps": 0},
    r"sampler must be confidence, ancestral or purity: euler": {"sampler": "euler"},
    r"temperature must be above 0: 0\.0": {"temperature": 0.0},
    r"temperature must be above 0: nan": {"temperature": float("nan")},
    r"gumbel_scale must not be negative: -1": {"gumbel_scale": -1},
    r"top_k must be at least 1: 0": {"top_k": 0},
    r"top_p must be above 0 and at most 1: 2": {"top_p": 2},
}


@pytest.mark.parametrize(("message", "setting"), BAD.items(), ids=[next(iter(setting)) for setting in BAD.values()])
def test_a_setting_out_of_range_is_refused(message: str, setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{message}\nhint: "):
        SamplerSettings(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["confidence", "purity"])
def test_unmasking_noise_that_never_masks_is_refused(sampler: SamplerName) -> None:
    with pytest.raises(ValueError, match=rf"the {sampler} sampler unmasks codes(.)*\nhint: sampler=ancestral"):
        run(Oracle((1,), (3,), NOISES["uniform"]), SamplerSettings(2, sampler), 0.0, images=2)
