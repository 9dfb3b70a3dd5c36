"""The hierarchical prior under Gaussian noise: its loss, its sequence, its snapping and its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import GaussianScheduleName, PriorConfig, VQConfig
from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerName
from hvqd_model.export import load_model, save_model
from hvqd_model.prior.gaussian_prior import GaussianProcess
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import normal
from tests.small_priors import (
    GRIDS,
    codebook_of,
    fresh,
    gaussian_settings,
    gradients,
    random_latents,
    random_prior,
    refusal,
    some_labels,
    spread_times,
    statistics,
)

SAMPLERS: tuple[GaussianSamplerName, ...] = get_args(GaussianSamplerName)

# ---- the loss ----


@pytest.mark.parametrize("stagger", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", get_args(GaussianScheduleName))
def test_a_network_that_says_nothing_has_the_loss_1_for_epsilon(stagger: float, schedule: str) -> None:
    config = gaussian_settings(stagger=stagger, depth=1, gaussian={"schedule": schedule, "prediction": "epsilon"})
    images = 512
    output = fresh(config)(
        random_latents(config, images), some_labels(images), spread_times(images), torch.arange(images)
    )
    assert float(output.loss) == pytest.approx(1, abs=0.03)
    for level, (rows, columns) in enumerate(GRIDS):
        numbers = images * rows * columns * config.code_dims[level] / (1 + 2 * stagger)
        assert float(output.metrics[f"error_{level}"]) == pytest.approx(1, abs=4 * (2 / numbers) ** 0.5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_network_that_says_nothing_has_the_loss_1_for_normalised_latents(prediction: str) -> None:
    config = gaussian_settings(depth=1, gaussian={"prediction": prediction})
    output = fresh(config)(random_latents(config, 512), some_labels(512), spread_times(512), torch.arange(512))
    assert float(output.loss) == pytest.approx(1, abs=0.03)


def test_a_level_is_divided_by_its_largest_deviation_or_channel_by_channel() -> None:
    config = gaussian_settings(gaussian={"latent_scale": "level"})
    by_level, by_channel = fresh(config).process, fresh(gaussian_settings()).process
    assert isinstance(by_level, GaussianProcess) and isinstance(by_channel, GaussianProcess)
    for level, (mean, deviation) in enumerate(statistics(config)):
        latents = mean + deviation * normal(torch.arange(4000), (len(mean),), "latents")
        alike = by_channel.normalizer.normalized(level, latents).std(0)
        torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=0.05)
        found = by_level.normalizer.normalized(level, latents)
        torch.testing.assert_close(found.std(0), deviation / deviation.max(), rtol=0.05, atol=0)
        assert float(found.mean(0).abs().max()) < 0.05


@pytest.mark.parametrize("stagger", [0.0, 0.4, 1.0])
def test_one_level_equals_the_flat_model_written_out(stagger: float) -> None:
    config = gaussian_settings(
        grids=((4, 4),),
        codebook_sizes=(7,),
        code_dim=(3,),
        stagger=stagger,
        label_dropout=0.0,
        gaussian={"schedule": "cosine", "zero_terminal_snr": True, "prediction": "v", "min_snr_gamma": 5.0},
    )
    prior, images = random_prior(config), 8
    latents, labels, times, keys = random_latents(config, 8), some_labels(8), spread_times(8), torch.arange(8)
    output = prior(latents, labels, times, keys)

    ((mean, deviation),) = statistics(config)
    clean = ((latents[0] - mean) / deviation).flatten(1, 2).double()
    noise = normal(keys, (16, 3), "noise 0")
    signal = torch.cos((times + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    strength = (1 - signal**2).sqrt()
    a, s = signal[:, None, None], strength[:, None, None]
    predicted = prior.denoiser(
        [(a * clean + s * noise).float()], times[:, None], labels, None, [torch.arange(images * 16)]
    )[0].view(images, 16, 3)
    error = (predicted - (a * noise - s * clean)).square().mean((1, 2))
    ratio = signal**2 / strength**2
    expected = (error * ratio.clamp_max(5.0) / (ratio + 1)).mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)


def test_the_loss_and_the_errors_do_not_depend_on_the_order_of_the_batch() -> None:
    config = gaussian_settings(stagger=0.7, context_corruption=0.2)
    prior, images = random_prior(config), 12
    latents, labels, times, keys = random_latents(config, 12), some_labels(12), spread_times(12), torch.arange(12) * 31
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    shuffled = tuple(level[order] for level in latents)
    loss, mixed = prior(latents, labels, times, keys).loss, prior(shuffled, labels[order], times[order], keys[order])
    torch.testing.assert_close(mixed.loss, loss)
    errors = prior.errors(latents, labels, keys)
    assert len(errors) == 3
    for level, found in zip(errors, prior.errors(shuffled, labels[order], keys[order]), strict=True):
        assert level.shape == (images,) and level.dtype == torch.float64
        torch.testing.assert_close(found, level[order], rtol=1e-4, atol=1e-5)


def test_the_errors_are_those_of_training_without_its_weights() -> None:
    config = gaussian_settings(stagger=0.5, label_dropout=0.0, gaussian={"min_snr_gamma": 5.0})
    prior, images = random_prior(config), 400
    latents, labels, keys = random_latents(config, images), some_labels(images), torch.arange(images)
    trained = [prior(latents, labels, spread_times(images), keys + 1000 * turn).metrics for turn in range(4)]
    errors = prior.errors(latents, labels, keys, draws=4)
    for level in range(3):
        mean = sum(float(metrics[f"error_{level}"]) for metrics in trained) / 4
        assert mean == pytest.approx(float(errors[level].mean()), rel=0.05)


# ---- levels in and out of the sequence ----


def test_at_full_stagger_a_coarse_loss_has_no_gradient_to_finer_inputs() -> None:
    config = gaussian_settings(stagger=1.0)
    prior, images = random_prior(config), 16
    times = spread_times(images, 0.34, 0.66)  # only level 1 is between noise and clean
    latents = tuple(level.requires_grad_() for level in random_latents(config, images))
    prior(latents, some_labels(images), times, torch.arange(images)).loss.backward()
    assert latents[2].grad is None or not latents[2].grad.any()
    assert latents[1].grad is not None and bool(latents[1].grad.any())
    found = gradients(prior)
    finer = [name for name in found if name.startswith(("denoiser.embeddings.2", "denoiser.heads.2"))]
    coarser = [name for name in found if name.startswith("denoiser.embeddings.0")]
    assert len(finer) == 5 and len(coarser) == 3
    assert all(not found[name].any() for name in finer)
    assert all(found[name].any() for name in coarser)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_has_a_gradient_whatever_levels_the_batch_holds(checkpointing: bool) -> None:
    """Ranks that share the weights would wait for each other otherwise."""
    config = gaussian_settings(stagger=1.0, activation_checkpointing=checkpointing)
    for low, high in ((0.67, 1.0), (0.34, 0.66), (0.0, 0.33), (0.0, 1.0)):
        prior = random_prior(config)
        output = prior(random_latents(config, 6), some_labels(6), spread_times(6, low, high), torch.arange(6))
        output.loss.backward()
        assert {name for name, _ in prior.named_parameters()} == set(gradients(prior))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        prior = random_prior(gaussian_settings(stagger=0.5, activation_checkpointing=checkpointing))
        prior(random_latents(prior.config, 8), some_labels(8), spread_times(8), torch.arange(8)).loss.backward()
        found.append(gradients(prior))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def seen_by(prior: HierarchicalPrior, call: Any) -> list[Sequence[Tensor]]:
    """The latents that the network was shown."""
    seen: list[Sequence[Tensor]] = []
    hook = prior.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    call()
    hook.remove()
    return seen


def test_a_clean_level_is_shown_as_the_vectors_of_its_codes() -> None:
    config = gaussian_settings(stagger=1.0)
    prior, images = fresh(config), 6
    latents = random_latents(config, images)
    keys, times = torch.arange(images), spread_times(images, 0.0, 0.3)
    (shown,) = seen_by(prior, lambda: prior(latents, some_labels(images), times, keys))
    for level in (0, 1):
        mean, deviation = statistics(config)[level]
        vectors = shown[level] * deviation + mean
        distances = torch.cdist(vectors, codebook_of(prior, level))
        assert float(distances.amin(2).max()) < 1e-5
        nearest = torch.cdist(latents[level].flatten(1, 2), codebook_of(prior, level)).argmin(2)
        assert torch.equal(distances.argmin(2), nearest)
    assert (
        float(torch.cdist(shown[2] * statistics(config)[2][1] + statistics(config)[2][0], codebook_of(prior, 2)).min())
        > 1e-4
    )


def test_context_corruption_replaces_clean_codes_in_training_alone() -> None:
    config = gaussian_settings(
        grids=((4, 4), (4, 4)), codebook_sizes=(1000, 7), code_dim=(3, 3), stagger=1.0, context_corruption=0.3, depth=1
    )
    prior, images = fresh(config), 500
    latents, keys, times = random_latents(config, images), torch.arange(images), spread_times(images, 0.0, 0.5)

    def changed(call: Any) -> Tensor:
        shown = seen_by(prior, call)[0][0]
        mean, deviation = statistics(config)[0]
        nearest = torch.cdist(latents[0].flatten(1, 2), codebook_of(prior, 0)).argmin(2)
        return torch.cdist(shown * deviation + mean, codebook_of(prior, 0)).argmin(2) != nearest

    replaced = changed(lambda: prior(latents, some_labels(images), times, keys)).double()
    assert float(replaced.mean()) == pytest.approx(0.15, abs=0.015)
    still = gaussian_settings(**{**config.model_dump(), "context_corruption": 0.0})
    prior.process.config = still
    assert not changed(lambda: prior(latents, some_labels(images), times, keys)).any()


# ---- snapping ----


@pytest.mark.parametrize(
    "architecture",
    [
        {"hierarchy": "features"},
        {"hierarchy": "residual"},
        {"hierarchy": "nested"},
        {"l2_normalize": True},
        {"quantizer": "gradient"},
        {"quantizer": "simvq"},
        {"quantizer": "fsq", "codebook_sizes": (64, 64)},
    ],
    ids=str,
)
def test_latents_snap_to_the_codes_that_the_tokenizer_gives(architecture: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base: dict[str, Any] = {"codebook_sizes": (16, 32), "code_dim": 6, "width": 8, "width_multipliers": (1, 2)}
    vq = HierarchicalVQ(VQConfig(**(base | architecture), image_size=(16, 16))).eval()
    for level in vq.start_order:
        vq.start_codebook(level, torch.randn(400, vq.config.code_dims[level]), 0)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    codes, latents = vq.encode_with_latents(images)
    for found, expected in zip(codes, vq.encode(images), strict=True):
        assert torch.equal(found, expected)
    config = gaussian_settings(
        grids=vq.config.grids, codebook_sizes=vq.config.codebook_sizes, code_dim=vq.config.code_dims, depth=1
    )
    means = [LatentStatistics(z.mean((0, 1, 2)), z.std((0, 1, 2)) + 0.1) for z in latents]
    prior = HierarchicalPrior(config, vq.codebooks, means)
    assert isinstance(prior.process, GaussianProcess)
    for level, (z, expected) in enumerate(zip(latents, codes, strict=True)):
        assert z.shape == (5, *vq.config.grids[level], vq.config.code_dims[level]) and z.dtype == torch.float32
        normalized = prior.process.normalizer.normalized(level, z.flatten(1, 2))
        snapped = prior.process.normalizer.snapped(level, normalized, vq.codebooks[level])
        assert torch.equal(snapped, expected.flatten(1))


# ---- samples ----


@pytest.mark.parametrize(
    "gaussian", [{"zero_terminal_snr": True}, {"schedule": "edm"}, {"prediction": "epsilon"}], ids=str
)
def test_every_kind_of_noise_is_sampled(gaussian: dict[str, Any]) -> None:
    prior = random_prior(gaussian_settings(gaussian=gaussian, stagger=0.5))
    for sampler in SAMPLERS:
        samples = prior.sample(torch.arange(4), some_labels(4), steps=3, sampler=sampler)
        assert all(int(level.max()) < size for level, size in zip(samples, prior.config.codebook_sizes, strict=True))


def test_without_a_name_the_sampler_is_the_solver() -> None:
    prior = random_prior(gaussian_settings())
    found, expected = (prior.sample(torch.arange(4), steps=4, sampler=sampler) for sampler in (None, "dpm-solver++"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_watcher_is_shown_codes_of_the_levels_that_are_present() -> None:
    prior, shown = random_prior(gaussian_settings(stagger=1.0)), []
    prior.sample(torch.arange(3), steps=6, sampler="ddim", watch=lambda codes: shown.append([*codes]))
    assert [len(codes) for codes in shown] == [1, 1, 2, 2, 3, 3]
    for codes in shown:
        for level, found in enumerate(codes):
            assert found.shape == (3, prior.sizes[level]) and found.dtype == torch.int64
            assert int(found.max()) < prior.config.codebook_sizes[level]


def test_a_toy_joint_is_learned_and_recovered_by_every_sampler() -> None:
    """coarse is -1 or 1 by class; a fine latent is -coarse or, with probability 0.2, coarse; both a little blurred."""
    torch.manual_seed(0)
    config = PriorConfig(
        noise="gaussian", grids=((1, 1), (2, 2)), codebook_sizes=(2, 2), code_dim=1, classes=("a", "b"), width=32,
        depth=2, heads=2, stagger=0.5, label_dropout=0.2,
    )  # fmt: skip
    ends = torch.tensor([[-1.0], [1.0]])
    deviation = LatentStatistics(torch.zeros(1), torch.ones(1))
    prior = HierarchicalPrior(config, [ends, ends], [deviation, deviation])
    optimizer = torch.optim.AdamW(prior.parameters(), 4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    steps, images = 300, 64
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        labels = torch.randint(2, (images,))
        coarse = torch.where(torch.rand(images) < 0.9, labels, 1 - labels) * 2.0 - 1
        fine = torch.where(torch.rand(images, 2, 2) < 0.8, -1.0, 1.0) * coarse[:, None, None]
        latents = coarse[:, None, None, None], fine[..., None]
        latents = tuple(level + 0.05 * torch.randn_like(level) for level in latents)
        times = (torch.rand((), dtype=torch.float64) + torch.arange(images) / images) % 1
        loss = prior(latents, labels, times, torch.randint(2**40, (images,))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    count = 1000
    labels = torch.arange(count) % 2
    for sampler in SAMPLERS:
        coarse_codes, fine_codes = prior.sample(torch.arange(count), labels, steps=40, sampler=sampler, guidance=1.0)
        follows = (coarse_codes[:, 0, 0] == labels).double()
        opposite = (fine_codes != coarse_codes).double()
        # Three standard errors, and what so short a training leaves.
        assert float(follows.mean()) == pytest.approx(0.9, abs=3 * (0.09 / count) ** 0.5 + 0.04), sampler
        assert float(opposite.mean()) == pytest.approx(0.8, abs=3 * (0.16 / count / 4) ** 0.5 + 0.04), sampler
        assert float(opposite.flatten(1).prod(1).mean()) == pytest.approx(0.8**4, abs=0.09), sampler


# ---- the model as a folder, and in low precision ----


def test_statistics_travel_with_the_model(tmp_path: Any) -> None:
    prior = random_prior(gaussian_settings())
    save_model(prior, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, HierarchicalPrior) and isinstance(loaded.process, GaussianProcess)
    names = [name for name in prior.state_dict() if name.startswith("process.normalizer.")]
    assert len(names) == 6
    for level, (mean, deviation) in enumerate(statistics(prior.config)):
        found = loaded.process.normalizer.statistics(level)
        assert torch.equal(found.mean, mean) and torch.equal(found.deviation, deviation)
    codes = [model.sample(torch.arange(3), steps=3) for model in (prior.eval(), loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_a_cast_module_keeps_statistics_and_codebooks_exact() -> None:
    prior = random_prior(gaussian_settings()).bfloat16()
    assert {buffer.dtype for name, buffer in prior.named_buffers() if "rotation" not in name} == {torch.float32}
    assert {parameter.dtype for parameter in prior.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_gives_nearly_the_loss_of_float32(autocast: bool) -> None:
    config = gaussian_settings(stagger=0.5)
    prior = random_prior(config)
    arguments = (random_latents(config, 16), some_labels(16), spread_times(16), torch.arange(16))
    expected = prior(*arguments).loss
    if not autocast:
        prior = prior.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = prior(*arguments)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0)
    output.loss.backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(prior).values())


# ---- refusals ----


def test_what_is_not_this_priors_is_refused() -> None:
    prior = fresh(gaussian_settings())
    latents, labels, keys = random_latents(prior.config, 2), some_labels(2), torch.arange(2)
    with refusal(r"latents of level 1 must be floating, of shape \(2, 2, 4, 2\): torch\.float32 \(2, 2, 4, 3\)"):
        prior((latents[0], torch.zeros(2, 2, 4, 3), latents[2]), labels, spread_times(2), keys)
    with refusal(r"latents of level 0 must be floating, of shape \(2, 1, 2, 3\): torch\.int64"):
        prior.errors((latents[0].long(), *latents[1:]), labels, keys)
    with refusal("draws must be at least 1: 0"):
        prior.errors(latents, labels, keys, draws=0)
    with refusal("bits are a bound of noise on codes, and noise=gaussian gives none"):
        prior.bits(latents, labels, keys)
    with refusal("the sampler of Gaussian noise must be ddpm, ddim, dpm-solver\\+\\+ or heun: confidence"):
        prior.sample(keys, labels, sampler="confidence")
    discrete = HierarchicalPrior(gaussian_settings(noise="absorbing"))
    with refusal("errors are of predicted latents, and noise=absorbing is on codes"):
        discrete.errors(latents, labels, keys)
    with refusal("sampler must be confidence, ancestral or purity: ddim"):
        discrete.sample(keys, labels, sampler="ddim")


def test_statistics_that_do_not_fit_are_refused() -> None:
    config = gaussian_settings()
    good = statistics(config)
    with refusal(
        r"latent statistics must be a mean and a deviation of \[3, 2, 4\] channels a level: \[\(3,\), \(3,\)\]"
    ):
        HierarchicalPrior(config, statistics=good[:1])
    flat = [LatentStatistics(good[0].mean, torch.zeros(3)), *good[1:]]
    with refusal(r"latent deviations of level 0 must be above 0 and finite: 0\.0"):
        HierarchicalPrior(config, statistics=flat)
