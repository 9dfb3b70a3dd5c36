"""What a prior refuses to learn from, to judge and to draw: each error names what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hvqd_model.prior.prior import HierarchicalPrior
from tests.small_priors import fresh, random_codes, refusal, settings, some_labels, spread_times


def test_codebooks_of_another_tokenizer_are_refused() -> None:
    config = settings()
    with refusal(r"codebooks must have the shapes \[\(5, 3\), \(7, 3\), \(6, 3\)\]: \[\(5, 3\)\]"):
        HierarchicalPrior(config, [torch.zeros(5, 3)])


def call_all(prior: HierarchicalPrior, codes: Sequence[Tensor], labels: Tensor) -> list[Any]:
    keys, times = torch.arange(2), spread_times(2)
    return [lambda: prior(codes, labels, times, keys), lambda: prior.bits(codes, labels, keys)]


def test_codes_that_are_not_this_priors_are_refused() -> None:
    prior = fresh(settings())
    codes, labels = random_codes(prior.config, 2), some_labels(2)
    bad = {
        r"codes must have one entry a level \(3\): 2": codes[:2],
        r"codes of level 1 must be int64 of shape \(2, 2, 4\): torch\.int64 \(2, 8\)": (
            codes[0],
            codes[1].flatten(1),
            codes[2],
        ),
        r"codes of level 0 must be int64 of shape \(2, 1, 2\): torch\.float32": (codes[0].float(), *codes[1:]),
        r"codes of level 2 must be in 0\.\.5: 6\.\.6": (*codes[:2], torch.full_like(codes[2], 6)),
        r"codes of level 2 must be in 0\.\.5: -1\.\.-1": (*codes[:2], torch.full_like(codes[2], -1)),
    }
    for message, given in bad.items():
        for call in call_all(prior, given, labels):
            with refusal(message):
                call()


def test_labels_that_are_not_this_priors_are_refused() -> None:
    prior = fresh(settings())
    codes = random_codes(prior.config, 2)
    for labels, shown in ((torch.tensor([0, 3]), r"\[3\]"), (torch.tensor([-2, 0]), r"\[-2\]")):
        message = rf"labels must be \(2,\) numbers from -1 \(no class\) to 2: {shown}\nhint: the classes are animals"
        for call in [*call_all(prior, codes, labels), lambda given=labels: prior.sample(torch.arange(2), given)]:
            with pytest.raises(ValueError, match=message):
                call()
    with refusal(r"labels must be \(2,\) numbers from -1 \(no class\) to 2: \(3,\)"):
        prior.sample(torch.arange(2), torch.tensor([0, 1, 2]))


def test_sampling_settings_out_of_range_are_refused() -> None:
    prior = fresh(settings())
    codes = random_codes(prior.config, 2)
    bad: dict[str, dict[str, Any]] = {
        r"guidance must be at least 0: -1\.0": {"guidance": -1.0},
        r"guidance must be at least 0: nan": {"guidance": math.nan},
        r"guidance_interval must rise within 0 and 1: \(0\.6, 0\.4\)": {"guidance_interval": (0.6, 0.4)},
        r"guidance_interval must rise within 0 and 1: \(0\.0, 2\.0\)": {"guidance_interval": (0.0, 2.0)},
        r"fine_guidance must be at least 0: -0\.5": {"fine_guidance": -0.5},
        r"fine_guidance must be at least 0: nan": {"fine_guidance": math.nan},
        r"known must have one entry a level \(3\): 1": {"known": [None]},
        r"codes of level 1 must be int64 of shape \(2, 2, 4\)": {"known": [None, codes[0], None]},
        r"every level is given": {"known": codes},
        r"steps must be at least 1: 0": {"steps": 0},
    }
    for message, setting in bad.items():
        with refusal(message):
            prior.sample(torch.arange(2), some_labels(2), **setting)


def test_guidance_on_an_unconditional_prior_is_refused() -> None:
    prior = fresh(settings(classes=()))
    with refusal(r"guidance needs a prior with classes, and this one is unconditional: 3\.0"):
        prior.sample(torch.arange(2))
    assert len(prior.sample(torch.arange(2), guidance=1.0, steps=2)) == 3


def test_a_bound_of_no_draws_is_refused() -> None:
    prior = fresh(settings())
    with refusal(r"draws must be at least 1: 0"):
        prior.bits(random_codes(prior.config, 2), some_labels(2), torch.arange(2), draws=0)
