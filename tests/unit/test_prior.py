"""The hierarchical prior with noise on codes: its bound, its sequence, and what training hides."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.discrete import corrupt
from hvqd_model.prior.denoiser import TokenEmbedding
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import uniform
from tests.small_priors import fresh, gradients, random_codes, random_prior, settings, some_labels, spread_times


def one_level(**changes: object) -> PriorConfig:
    return settings(grids=((4, 4),), codebook_sizes=(7,), **changes)


# The bound


NOISES: dict[str, dict[str, object]] = {
    "absorbing linear": {"schedule": "linear"},
    "absorbing cosine": {"schedule": "cosine"},
    "absorbing as a chain": {"schedule": "cosine", "loss": "kl", "diffusion_steps": 16},
    "mixed": {"noise": "mask-and-replace", "uniform_share": 0.3, "loss": "kl", "diffusion_steps": 16},
    "uniform": {"noise": "mask-and-replace", "uniform_share": 1.0, "loss": "kl", "diffusion_steps": 16},
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("stagger", [0.0, 0.5, 1.0])
def test_the_bound_of_an_untrained_prior_is_log_k_a_code(noise: dict[str, object], stagger: float) -> None:
    config = settings(grids=((4, 4), (4, 4), (4, 4)), depth=1, stagger=stagger, **noise)
    images = 512
    codes = random_codes(config, images)
    bits = fresh(config).bits(codes, some_labels(images), torch.arange(images), draws=8)
    assert len(bits) == 3
    for level, (rows, columns), size in zip(bits, config.grids, config.codebook_sizes, strict=True):
        assert level.shape == (images,) and level.dtype == torch.float64
        expected, error = rows * columns * math.log2(size), float(level.std()) / images**0.5
        assert error < 0.03 * expected
        assert float(level.mean()) == pytest.approx(expected, abs=4 * error)


def test_the_training_loss_at_power_minus_one_is_the_bound_in_nats_a_token() -> None:
    for noise in NOISES.values():
        config = settings(stagger=0.5, time_weight_power=-1.0, auxiliary_weight=0.0, **noise)
        codes, images = random_codes(config, 32), 32
        output = random_prior(config)(codes, some_labels(images), spread_times(images), torch.arange(images))
        nats = sum(
            output.metrics[f"bits_{level}"] * math.log(2) * rows * columns
            for level, (rows, columns) in enumerate(config.grids)
        )
        assert isinstance(nats, Tensor)
        torch.testing.assert_close(output.loss.double(), nats / config.tokens, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stagger", [0.0, 0.4, 1.0])
def test_one_level_equals_the_flat_model_written_out(stagger: float) -> None:
    config = one_level(stagger=stagger, label_dropout=0.0, schedule="cosine")
    prior, images = random_prior(config), 8
    codes, labels, times, keys = random_codes(config, images), some_labels(images), spread_times(8), torch.arange(8)
    output = prior(codes, labels, times, keys)

    clean = codes[0].flatten(1)
    noisy = corrupt(clean, times, uniform(keys, (16,), "noise 0"), prior.schedule, 7)
    logits = prior.denoiser([noisy], times[:, None], labels, None, [torch.arange(images * 16)])[0]
    nats = F.cross_entropy(logits, clean.flatten(), reduction="none").view(images, 16).double()
    hidden = math.pi / 2 * times  # the cosine schedule masks sin(pi t / 2)
    weight = math.pi / 2 * hidden.cos() / hidden.sin() * times ** (1 + config.time_weight_power)
    expected = (nats * (noisy == 7) * weight[:, None]).sum() / (images * 16)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)


def test_the_stagger_changes_nothing_with_one_level() -> None:
    priors = [random_prior(one_level(stagger=stagger)) for stagger in (0.0, 0.4, 1.0)]
    codes = random_codes(priors[0].config, 8)
    losses = [prior(codes, some_labels(8), spread_times(8), torch.arange(8)).loss for prior in priors]
    samples = [prior.sample(torch.arange(8), some_labels(8), steps=4)[0] for prior in priors]
    for loss, sample in zip(losses[1:], samples[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=0)
        assert torch.equal(sample, samples[0])


def test_the_loss_and_the_bound_do_not_depend_on_the_order_of_the_batch() -> None:
    config = settings(stagger=0.7, context_corruption=0.2)
    prior, images = random_prior(config).double(), 12
    codes, labels, times, keys = random_codes(config, 12), some_labels(12), spread_times(12), torch.arange(12) * 31
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    shuffled = tuple(level[order] for level in codes)
    torch.testing.assert_close(
        prior(shuffled, labels[order], times[order], keys[order]).loss, prior(codes, labels, times, keys).loss
    )
    for mixed, level in zip(
        prior.bits(shuffled, labels[order], keys[order]), prior.bits(codes, labels, keys), strict=True
    ):
        torch.testing.assert_close(mixed, level[order], rtol=1e-6, atol=0)


# Levels in and out of the sequence


def test_at_full_stagger_a_coarse_loss_has_no_gradient_to_finer_inputs() -> None:
    config = settings(stagger=1.0)
    prior, images = random_prior(config), 16
    # Times at which only level 1 is between noise and clean.
    times = spread_times(images, 0.34, 0.66)
    prior(random_codes(config, images), some_labels(images), times, torch.arange(images)).loss.backward()
    found = gradients(prior)
    finer = [name for name in found if name.startswith(("denoiser.embeddings.2", "denoiser.heads.2"))]
    coarser = [name for name in found if name.startswith("denoiser.embeddings.0")]
    assert len(finer) == 6 and len(coarser) == 3
    assert all(not found[name].any() for name in finer)
    assert all(found[name].any() for name in coarser)


def test_at_full_stagger_the_coarse_loss_is_the_same_for_any_finer_codes() -> None:
    config = settings(stagger=1.0)
    prior, images = random_prior(config), 8
    codes = random_codes(config, images)
    other = (codes[0], codes[1], (codes[2] + 1) % 6)
    times = spread_times(images, 0.34, 0.66)
    losses = [prior(given, some_labels(images), times, torch.arange(images)).loss for given in (codes, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_has_a_gradient_whatever_levels_the_batch_holds(checkpointing: bool) -> None:
    """Ranks that share the weights would wait for each other otherwise."""
    config = settings(stagger=1.0, activation_checkpointing=checkpointing)
    for low, high in ((0.67, 1.0), (0.34, 0.66), (0.0, 0.33), (0.0, 1.0)):
        prior = random_prior(config)
        output = prior(random_codes(config, 6), some_labels(6), spread_times(6, low, high), torch.arange(6))
        output.loss.backward()
        assert {name for name, _ in prior.named_parameters()} == set(gradients(prior))


def test_images_with_different_levels_in_one_pass_equal_each_image_alone() -> None:
    config = settings()
    prior, images = random_prior(config).double(), 7
    present = torch.tensor([2, 1, 3, 1, 3, 2, 2])
    codes = [level.flatten(1) for level in random_codes(config, images)]
    level_times = torch.rand(images, 3, generator=torch.Generator().manual_seed(0))
    labels = some_labels(images)
    rows = [(present > level).nonzero() * prior.sizes[level] + torch.arange(prior.sizes[level]) for level in range(3)]
    together = prior.denoiser(codes, level_times, labels, present, [level.flatten() for level in rows])
    sum(level.square().sum() for level in together).backward()  # type: ignore[union-attr]
    packed = gradients(prior)

    prior.zero_grad()
    places = [0, 0, 0]
    for image in range(images):
        count = int(present[image])
        own = [level[image : image + 1] for level in codes[:count]]
        everything = [torch.arange(size) for size in prior.sizes[:count]]
        alone = prior.denoiser(own, level_times[image][None], labels[image][None], None, everything)
        for level, logits in enumerate(alone):
            size = prior.sizes[level]
            torch.testing.assert_close(together[level][places[level] : places[level] + size], logits)
            places[level] += size
        sum(level.square().sum() for level in alone).backward()  # type: ignore[union-attr]
    assert places == [len(level) for level in together]
    unpacked = gradients(prior)
    assert packed.keys() == unpacked.keys() and len(packed) == len(list(prior.parameters()))
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, unpacked[name], msg=lambda text, name=name: f"{name}: {text}")


def test_wanted_rows_are_those_rows_of_all_logits() -> None:
    config = settings()
    prior = random_prior(config).double()
    codes = [level.flatten(1) for level in random_codes(config, 4)]
    times, labels = torch.full((4, 3), 0.5), some_labels(4)
    everything = prior.denoiser(codes, times, labels, None, [torch.arange(4 * size) for size in prior.sizes])
    wanted = torch.tensor([17, 3, 3, 30])
    some = prior.denoiser(codes, times, labels, None, [None, wanted, torch.tensor([], dtype=torch.int64)])
    torch.testing.assert_close(some[1], everything[1][wanted])
    assert some[0].shape == (0, 5) and some[2].shape == (0, 6)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        prior = random_prior(settings(stagger=0.5, activation_checkpointing=checkpointing))
        prior(random_codes(prior.config, 8), some_labels(8), spread_times(8), torch.arange(8)).loss.backward()
        found.append(gradients(prior))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)


# Precision


@pytest.mark.parametrize("cast", ["bfloat16", "to", "half"])
def test_a_cast_module_keeps_codebooks_and_rotations_exact(cast: str) -> None:
    prior = random_prior(settings())
    before = copy.deepcopy(prior)
    prior = {"bfloat16": prior.bfloat16, "half": prior.half, "to": lambda: prior.to(torch.bfloat16)}[cast]()
    embeddings = zip(prior.denoiser.embeddings, before.denoiser.embeddings, strict=True)
    for embedding, exact in embeddings:
        assert isinstance(embedding, TokenEmbedding) and isinstance(exact, TokenEmbedding)
        assert embedding.codebook.dtype == torch.float32
        assert torch.equal(embedding.codebook, exact.codebook)
    assert torch.equal(prior.denoiser.rotation, before.denoiser.rotation)
    expected = torch.float16 if cast == "half" else torch.bfloat16
    assert {parameter.dtype for parameter in prior.parameters()} == {expected}


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_gives_nearly_the_loss_of_float32(autocast: bool) -> None:
    config = settings(stagger=0.5)
    prior = fresh(config)
    arguments = (random_codes(config, 8), some_labels(8), spread_times(8), torch.arange(8))
    expected = prior(*arguments).loss
    if not autocast:
        prior = prior.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = prior(*arguments)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)
    output.loss.backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(prior).values())


def test_codebooks_travel_with_the_weights_and_rotations_do_not() -> None:
    prior = random_prior(settings())
    state = prior.state_dict()
    assert sum(name.endswith("codebook") for name in state) == 3
    assert not any("rotation" in name for name in state)
    loaded = HierarchicalPrior(prior.config)
    loaded.load_state_dict(state)
    codes = random_codes(prior.config, 4)
    for found, expected in zip(
        loaded.bits(codes, some_labels(4), torch.arange(4)),
        prior.bits(codes, some_labels(4), torch.arange(4)),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("each_dimension", [False, True])
def test_code_vectors_are_scaled_as_a_whole_or_in_each_dimension(each_dimension: bool) -> None:
    config = settings(code_scale="dimension" if each_dimension else "codebook")
    prior = random_prior(config)
    stretched = HierarchicalPrior(config)
    stretch = torch.logspace(-2, 2, prior.denoiser.embeddings[0].codebook.shape[1])
    state = prior.state_dict()
    state |= {name: value * stretch for name, value in state.items() if name.endswith("codebook")}
    stretched.load_state_dict(state)
    codes = random_codes(config, 4)
    plain, other = (model.bits(codes, some_labels(4), torch.arange(4)) for model in (prior, stretched))
    same = [torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain, other, strict=True)]
    assert all(same) if each_dimension else not any(same)


# What training hides


class Spy:
    """Keeps the inputs of a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[Any, ...]] = []
        module.register_forward_pre_hook(lambda _, inputs: self.calls.append(inputs))


def test_training_hides_the_asked_share_of_labels_and_the_bound_hides_none() -> None:
    config = one_level(label_dropout=0.3, depth=1)
    prior = fresh(config)
    spy = Spy(prior.denoiser.conditioning)
    labels, images = torch.ones(2000, dtype=torch.int64), 2000
    codes = random_codes(config, images)
    prior(codes, labels, spread_times(images), torch.arange(images))
    prior.bits(codes, labels, torch.arange(images), draws=1)
    shares = [float((seen.labels == -1).double().mean()) for _, seen in spy.calls]
    assert shares[0] == pytest.approx(0.3, abs=0.04)
    assert shares[1] == 0


def test_context_corruption_replaces_clean_coarse_codes_in_training_alone() -> None:
    config = settings(grids=((4, 4), (4, 4)), codebook_sizes=(1000, 7), stagger=1.0, context_corruption=0.3)
    prior, images = fresh(config), 1000
    spy = Spy(prior.denoiser)
    codes = random_codes(config, images)
    prior(codes, some_labels(images), spread_times(images, 0.0, 0.5), torch.arange(images))
    with torch.no_grad():
        prior.bits(codes, some_labels(images), torch.arange(images), draws=1)
    changed = [(seen[0] != codes[0].flatten(1)) & (seen[0] < 1000) for seen, *_ in spy.calls]
    assert float(changed[0].double().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(changed[0].double().mean(1).max()) > 0.3  # the fraction differs from image to image
    assert not changed[1].any()
