"""The hierarchical prior: its bound, its sequence, its attention and its samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.discrete import corrupt
from hvqd_model.prior.attention import attend, normalize_and_turn, rotary_angles
from hvqd_model.prior.denoiser import TokenEmbedding
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import uniform

GRIDS = ((1, 2), (2, 4), (4, 4))
CLASSES = ("animals", "faces", "flags")


def settings(**changes: object) -> PriorConfig:
    base: dict[str, object] = {
        "grids": GRIDS,
        "codebook_sizes": (5, 7, 6),
        "code_dim": 3,
        "classes": CLASSES,
        "width": 16,
        "depth": 2,
        "heads": 2,
    }
    return PriorConfig.model_validate(base | changes)


def one_level(**changes: object) -> PriorConfig:
    return settings(grids=((4, 4),), codebook_sizes=(7,), **changes)


def fresh(config: PriorConfig) -> HierarchicalPrior:
    """A prior as training starts it: its first prediction is uniform."""
    torch.manual_seed(0)
    return HierarchicalPrior(config, [torch.randn(size, config.code_dim) for size in config.codebook_sizes])


def random_prior(config: PriorConfig) -> HierarchicalPrior:
    """A prior whose every weight matters: nothing is zero, nothing is the identity."""
    prior = fresh(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return prior


def random_codes(config: PriorConfig, images: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(size, (images, *grid), generator=generator)
        for size, grid in zip(config.codebook_sizes, config.grids, strict=True)
    )


def some_labels(images: int) -> Tensor:
    return torch.arange(images) % 4 - 1


def spread_times(images: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * (torch.arange(images, dtype=torch.float64) + 0.5) / images


def gradients(prior: HierarchicalPrior) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in prior.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


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


# Attention


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 6, 3, 2, 8, generator=generator, dtype=torch.float64)
    angles = rotary_angles([(1, 2), (2, 2)], 8)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return wide[:, :, :2].requires_grad_(), rotation, torch.tensor([[2.0], [3.0]], dtype=torch.float64).requires_grad_()


def plain_normalize_and_turn(query_key: Tensor, rotation: Tensor, temperature: Tensor) -> Tensor:
    unit = query_key / query_key.norm(dim=-1, keepdim=True)
    pairs = unit.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    cosine, sine = rotation.real, rotation.imag
    even = pairs[..., 0] * cosine - pairs[..., 1] * sine
    odd = pairs[..., 0] * sine + pairs[..., 1] * cosine
    turned = torch.stack([even, odd], -1).flatten(-2)
    return turned * torch.stack([temperature, torch.ones_like(temperature)])


def test_the_written_out_gradient_of_normalised_queries_passes_gradcheck() -> None:
    query_key, rotation, temperature = attention_inputs()
    assert torch.autograd.gradcheck(lambda x, scale: normalize_and_turn(x, rotation, scale), (query_key, temperature))


def test_normalised_queries_and_their_gradients_equal_plain_autograd() -> None:
    query_key, rotation, temperature = attention_inputs()
    outward = torch.randn(2, 6, 2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = (
        function(query_key, rotation, temperature) for function in (normalize_and_turn, plain_normalize_and_turn)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, :, 1].norm(dim=-1), torch.ones(2, 6, 2, dtype=torch.float64))
    inputs = (query_key, temperature)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, outward), torch.autograd.grad(expected, inputs, outward)
    )


def test_attention_with_and_without_gradients_is_the_same_softmax() -> None:
    query, key, value = torch.randn(3, 2, 6, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.einsum("bnhw,bmhw->bhnm", query, key).softmax(-1)
    expected = torch.einsum("bhnm,bmhw->bnhw", scores, value).flatten(2)
    torch.testing.assert_close(attend(query, key, value), expected)
    with torch.no_grad():
        torch.testing.assert_close(attend(query, key, value), expected)


def test_a_rotated_product_depends_on_the_displacement_alone() -> None:
    angles = rotary_angles([(4, 4)], 16)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    one = torch.randn(1, 1, 2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = normalize_and_turn(one.expand(1, 16, 2, 1, 16), rotation, torch.ones(1, 1, dtype=torch.float64))
    query, key = turned[0, :, :, 0].unbind(1)
    products = (query @ key.T).view(4, 4, 4, 4)  # from (row, column) to (row, column)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[3, 3, 0, 1], products[3, 2, 0, 0])
    assert not torch.isclose(products[0, 0, 1, 2], products[0, 0, 2, 1])


def test_a_coarse_cell_lies_at_the_middle_of_its_fine_cells() -> None:
    angles = rotary_angles([(2, 3), (4, 12)], 8)
    coarse, fine = angles[:6].view(2, 3, 4), angles[6:].view(4, 12, 4)
    torch.testing.assert_close(fine.view(2, 2, 3, 4, 4).mean((1, 3)), coarse)


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


# Samples


SAMPLERS = ["confidence", "ancestral", "purity"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_samples_are_codes_and_given_levels_come_back_bitwise(sampler: Any, stagger: float) -> None:
    config = settings(stagger=stagger)
    prior, images = random_prior(config), 6
    given = random_codes(config, images)
    for known in ([None] * 3, [given[0], None, None], [None, given[1], None], [given[0], given[1], None]):
        samples = prior.sample(torch.arange(images), some_labels(images), steps=5, sampler=sampler, known=known)
        for level, (sample, fixed) in enumerate(zip(samples, known, strict=True)):
            assert sample.shape == (images, *GRIDS[level]) and sample.dtype == torch.int64
            assert int(sample.min()) >= 0 and int(sample.max()) < config.codebook_sizes[level]
            assert fixed is None or torch.equal(sample, fixed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch_neighbours(sampler: Any, guidance: float) -> None:
    prior = random_prior(settings(stagger=0.5))
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


# Refusals


def refusal(message: str) -> Any:
    return pytest.raises(ValueError, match=rf"{message}(.|\n)*\nhint: \S")


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
