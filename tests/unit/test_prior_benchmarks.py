"""What the prior's benchmarks are built from: kept models and pictures, figures of drawn sets, and the pixels' peer."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where the scripts find their runner

import drawn
import peers
import pixel_diffusion
import stagger
import steps
from trials import configured, run, tokenizer_trial, weights

from hvqd_model import HierarchicalPrior
from tests.tiny_training import CLASSES, image_table
from tests.unit.test_benchmark_helpers import TINY

BY_CHANNEL = ("gaussian", {"latent_scale": "channel", "prediction": "v"})
CHANGES = (*TINY, "vq.model.level_dropout=0", "sampling.batch=8", "sampling.steps=2", "sampling.guidance=2")
STEPS = 16  # batches of 8


@pytest.fixture(scope="module")
def material() -> drawn.Material:
    """A tokenizer of two steps, and some pictures of three classes."""
    train, judged = image_table(24), image_table(12, seed=1)
    judged = replace(judged, groups=np.array([f"concept {number // 2}" for number in range(12)]))
    config = configured("tiny", CHANGES)
    trial = tokenizer_trial(config, train)
    run(trial, 16)
    return drawn.Material(config, trial.model, train, judged, CLASSES)


@pytest.fixture(scope="module")
def jury(material: drawn.Material) -> drawn.Jury:
    return drawn.Jury(material.train, material.judged, len(CLASSES))


def test_a_gaussian_prior_is_given_the_statistics_of_the_training_latents(material: drawn.Material) -> None:
    prior = material.trial(("noise", "gaussian"), BY_CHANNEL).model
    table = material.coded(material.train, with_latents=True)
    assert prior.statistics is not None and len(prior.statistics) == 2
    for statistics, latents in zip(prior.statistics, table.latents, strict=True):
        rows = torch.from_numpy(latents.astype(np.float64)).flatten(0, 2)
        torch.testing.assert_close(statistics.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.deviation.double(), rows.std(0, correction=0), rtol=1e-3, atol=1e-4)
    assert material.trial().model.statistics is None


@pytest.mark.parametrize("family", ["discrete", "gaussian"])
def test_curves_have_every_sampler_at_every_number_of_steps_and_draw_nothing_twice(
    material: drawn.Material, jury: drawn.Jury, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = () if family == "discrete" else (BY_CHANNEL,)  # which tells samplers apart before it has learned
    prior = drawn.trained(material.trial(*steps.NOISES[family], *changes), STEPS)
    asked: list[int] = []
    real = drawn.draw_images

    def counted(*given: Any) -> Any:
        asked.append(given[4].steps)
        return real(*given)

    monkeypatch.setattr(drawn, "draw_images", counted)
    curves = partial(steps.curves, family, material, prior, jury, tmp_path, material.config.sampling, (2, 16), 8)
    figures = curves()
    names = steps.SAMPLERS[family]
    assert len(names) == {"discrete": 3, "gaussian": 4}[family]
    assert asked == [2] * len(names) + [16] * len(names)
    assert set(figures) == {
        *(f"{kind}_{name}_{count}" for kind in ("kid", "kid_error") for name in names for count in (2, 16)),
        f"{family}_16_to_16",
    }
    assert figures[f"{family}_16_to_16"] == pytest.approx(1)
    assert len({figures[f"kid_{name}_{count}"] for name in names for count in (2, 16)}) > 3, "samplers differ"
    assert curves() == figures and len(asked) == 2 * len(names)


def test_every_stagger_has_its_figures_and_its_own_number_of_images(
    material: drawn.Material, jury: drawn.Jury, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagger, "speeds", lambda *_: np.array([100.0, 100.0, 150.0, 200.0]))
    figures = stagger.figures_of(material, jury, tmp_path, 16, 8, 1)
    assert [figures[f"training_images_{stagger.name_of(at)}"] for at in stagger.STAGGERS] == [16, 16, 24, 32]
    kids = [figures[f"kid_{stagger.name_of(at)}"] for at in stagger.STAGGERS]
    assert figures["preset_to_best_kid"] == pytest.approx(kids[0] / min(kids)), "the preset's stagger is 0"
    assert all(figures[f"bits_{stagger.name_of(at)}"] > 0 for at in stagger.STAGGERS)
    trained = HierarchicalPrior, tmp_path / "prior-0.5"
    assert drawn.kept_model(trained[1], trained[0], lambda: pytest.fail("kept")).config.stagger == 0.5


def test_a_lead_is_the_difference_of_two_kids_and_none_over_oneself(material: drawn.Material, jury: drawn.Jury) -> None:
    near = jury.features(material.train.images[:12])
    far = jury.features(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    lead, error = jury.lead(near, far)
    assert lead == pytest.approx(jury.kid(far)[0] - jury.kid(near)[0], rel=1e-4) and lead > 2 * error > 0
    assert jury.lead(near, near)[0] == 0
    figures = jury.figures("real", near, material.train.labels[:12])
    assert figures["class_real"] == 1, "the judge has learned from these very pictures"
    assert figures["kid_real"] < jury.kid(far)[0] and 0 <= figures["recall_real"] <= 1


def test_classes_are_asked_for_as_often_as_the_data_has_them() -> None:
    seeds, asked = drawn.requests((1, 3), 400, "name")
    assert len(set(seeds)) == 400 and 0.68 < asked.mean() < 0.82
    assert drawn.requests((1, 3), 5, "name")[0] == seeds[:5] and drawn.requests((1, 3), 5, "other")[0] != seeds[:5]


# ---- the peer on pixels ----


def test_the_peer_is_the_widest_that_has_no_more_weights() -> None:
    most = 700_000
    model = pixel_diffusion.widest_unet(16, 3, most)
    width = model.config.block_out_channels[0]  # type: ignore[union-attr]
    assert weights(model) <= most < weights(pixel_diffusion.unet(16, 3, width + 8))


def test_the_peer_trains_in_the_products_loop_and_draws_by_seed(material: drawn.Material) -> None:
    torch.manual_seed(0)
    model = pixel_diffusion.unet(16, len(CLASSES), 16)
    trial = pixel_diffusion.PixelTrial(model, material.config.prior.train, 0, material.train, len(CLASSES))
    before = [parameter.clone() for parameter in model.parameters()]
    run(trial, 16)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    together = pixel_diffusion.draw_pixels(model, 16, len(CLASSES), [5, 6, 7], [0, 1, -1], 2.0, steps=3)
    alone = pixel_diffusion.draw_pixels(model, 16, len(CLASSES), [6], [1], 2.0, steps=3)
    plain = pixel_diffusion.draw_pixels(model, 16, len(CLASSES), [7], [-1], 1.0, steps=3)
    assert together.shape == (3, 16, 16, 3)
    for found, place in ((alone, 1), (plain, 2)):
        assert np.abs(found[0].astype(int) - together[place]).max() <= 1, "a picture follows from its seed and class"


def test_the_peers_hide_a_tenth_of_the_classes(material: drawn.Material) -> None:
    trial = pixel_diffusion.PixelTrial(
        pixel_diffusion.unet(16, len(CLASSES), 16), material.config.prior.train, 0, material.train, len(CLASSES)
    )
    from workflows.training.stage import Position

    batches = [trial.batch(Position(first, 0, 8, 8)) for first in range(0, 1600, 8)]
    hidden = torch.cat([labels == len(CLASSES) for _, labels, _, _ in batches]).float().mean()
    assert 0.07 < float(hidden) < 0.13
    times = torch.sort(batches[0][2]).values
    torch.testing.assert_close(times.diff(), torch.full((7,), 1 / 8, dtype=torch.float64), msg="spread over the batch")


@pytest.mark.parametrize("name", sorted(peers.SIZES))
def test_all_sides_have_the_same_bits_a_picture(name: str) -> None:
    contest = peers.Contest(peers.SIZES[name], 0, True, Path("unused"))
    ours, flat = (contest.config(side).vq_config for side in ("ours", "flat"))
    assert (ours.levels, flat.levels) == ({"32": 2, "64": 3}[name], 1)
    assert 0.999 * ours.bits < flat.bits <= ours.bits
    assert contest.config("gaussian").vq_config == flat
    assert flat.grids[-1] == ours.grids[-1], "the finest grid is the same"
