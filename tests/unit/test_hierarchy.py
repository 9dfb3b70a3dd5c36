"""The tokenizer: codes and pictures there and back, for every way its levels depend on each other."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hvqd_model.codec.hierarchy import HierarchicalVQ, VQOutput
from hvqd_model.codec.losses import pixel_loss, ssim
from hvqd_model.codec.quantizer import merge_statistics
from hvqd_model.codec.search import nearest_codes
from hvqd_model.config import VQConfig

HIERARCHIES = ("features", "residual", "nested", "pyramid", "nested-pyramid")
STRIDES = {1: (2,), 2: (8, 2), 3: (8, 4, 2), 4: (8, 4, 2, 1)}
SIZES = (5, 6, 7, 8)
KEYS = torch.arange(4)


def settings(levels: int = 2, **changes: object) -> VQConfig:
    base: dict[str, object] = {
        "strides": STRIDES[levels],
        "codebook_sizes": SIZES[:levels],
        "code_dim": 4,
        "width": 8,
        "width_multipliers": (1, 2),
        "image_size": (16, 8),
    }
    if "pyramid" in str(changes.get("hierarchy")):  # a pixel has three numbers, and how long vectors are matters there
        base["code_dim"] = 3
        changes.pop("l2_normalize", None)
    return VQConfig.model_validate(base | changes)


def some_images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1


def fresh(config: VQConfig) -> HierarchicalVQ:
    """A tokenizer whose every weight matters: nothing is zero, nothing is the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HierarchicalVQ(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def started(config: VQConfig) -> HierarchicalVQ:
    """The same with its codebooks fitted to the features of some pictures, in the order of training."""
    return copy.deepcopy(_started(config))


@functools.cache
def _started(config: VQConfig) -> HierarchicalVQ:
    model = fresh(config)
    with torch.no_grad():
        for level in model.start_order:
            model.start_codebook(level, model(some_images(), KEYS).vectors[level], level)
    return model


def state(model: HierarchicalVQ) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def assert_equal_codes(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for level, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"level {level}"


# Round trips


def assert_codes_decode_to_the_direct_path(model: HierarchicalVQ, images: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        direct = model(images, torch.arange(len(images)))
    codes = model.encode(images)
    assert_equal_codes(codes, direct.codes)
    assert float((direct.reconstruction.abs() < 1).float().mean()) > 0.8, "clamped pixels would show nothing"
    assert torch.equal(model.decode(codes), direct.reconstruction.clamp(-1, 1))


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
@pytest.mark.parametrize("levels", STRIDES)
def test_codes_decode_to_the_direct_path_to_the_bit(levels: int, hierarchy: str) -> None:
    config = settings(levels, hierarchy=hierarchy)
    model = started(config)
    assert_codes_decode_to_the_direct_path(model, some_images())
    codes = model.encode(some_images())
    assert [tuple(level.shape) for level in codes] == [(4, *grid) for grid in config.grids]
    assert all(level.dtype == torch.int64 and len(level.unique()) > 1 for level in codes)


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "gradient"},
        {"quantizer": "simvq", "l2_normalize": True},
        {"estimator": "rotation", "l2_normalize": True},
        {"attention": False, "blocks": 2},
    ],
)
def test_the_round_trip_holds_for_every_quantizer(hierarchy: str, changes: dict[str, object]) -> None:
    assert_codes_decode_to_the_direct_path(started(settings(hierarchy=hierarchy, **changes)), some_images())


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_the_round_trip_holds_in_bf16(hierarchy: str) -> None:
    model = started(settings(3, hierarchy=hierarchy)).bfloat16()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.bool}
    assert_codes_decode_to_the_direct_path(model, some_images())
    assert model.decode(model.encode(some_images())).dtype == torch.float32


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_any_prefix_decodes_and_every_level_counts(hierarchy: str) -> None:
    model = started(settings(4, hierarchy=hierarchy)).eval()
    codes = model.encode(some_images())
    pictures = [model.decode(codes[:count]) for count in range(1, 5)]
    for picture in pictures:
        assert picture.shape == (4, 3, 16, 8) and picture.dtype == torch.float32
        assert float(picture.abs().max()) <= 1
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(pictures, 2))
    for level, size in enumerate(SIZES):
        changed = [found.clone() for found in codes]
        changed[level][0, 0, 0] = (changed[level][0, 0, 0] + 1) % size
        # In a nested pyramid the finest level that is given says all.
        given = level + 1 if hierarchy == "nested-pyramid" else len(SIZES)
        again = model.decode(changed[:given])
        assert not torch.equal(again[0], pictures[given - 1][0]), f"level {level} is not read"
        torch.testing.assert_close(again[1:], pictures[given - 1][1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_a_pictures_codes_do_not_depend_on_its_batch(hierarchy: str) -> None:
    model = started(settings(3, hierarchy=hierarchy)).eval()
    together = model.encode(some_images())
    for place in range(4):
        assert_equal_codes(model.encode(some_images()[place : place + 1]), [found[place, None] for found in together])


def test_no_pictures_are_no_codes_and_back() -> None:
    model = started(settings(3)).eval()
    codes = model.encode(some_images()[:0])
    assert [tuple(found.shape) for found in codes] == [(0, *grid) for grid in model.config.grids]
    assert model.decode(codes).shape == (0, 3, 16, 8)


# How levels depend on each other


def vectors_of(output: VQOutput, config: VQConfig, level: int) -> Tensor:
    """(B, D, h, w) what a level quantized."""
    return output.vectors[level].view(-1, *config.grids[level], config.code_dim).permute(0, 3, 1, 2)


def code_vectors(model: HierarchicalVQ, output: VQOutput, level: int) -> Tensor:
    """(B, D, h, w) the code vectors that a level chose."""
    return F.embedding(output.codes[level], model.codebooks[level]).permute(0, 3, 1, 2)


def direct_path(model: HierarchicalVQ) -> VQOutput:
    with torch.no_grad():
        output: VQOutput = model.eval()(some_images(), KEYS)
    return output


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_every_level_takes_the_nearest_codes_of_its_own_codebook(hierarchy: str) -> None:
    model = started(settings(3, hierarchy=hierarchy))
    output = direct_path(model)
    assert len(output.vectors) == 3
    for level, vectors in enumerate(output.vectors):
        assert torch.equal(nearest_codes(vectors, model.codebooks[level]), output.codes[level].flatten())


def test_residual_levels_quantize_what_the_coarser_ones_left_over() -> None:
    config = settings(3, hierarchy="residual")
    model = started(config)
    output = direct_path(model)
    finest = config.grids[-1]
    spread = [F.interpolate(code_vectors(model, output, level), size=finest) for level in range(3)]
    latent = vectors_of(output, config, 2) + spread[0] + spread[1]
    for level in range(3):
        rest = latent - sum(spread[:level], torch.zeros(()))
        expected = F.avg_pool2d(rest, config.strides[level] // config.strides[-1])
        torch.testing.assert_close(vectors_of(output, config, level), expected, rtol=0, atol=1e-5)


def test_nested_coarse_codes_are_a_function_of_the_finer_codes_alone() -> None:
    config = settings(3, hierarchy="nested")
    model = started(config)
    output = direct_path(model)
    for level in range(2):
        expected = model.projections[level](code_vectors(model, output, level + 1))
        torch.testing.assert_close(vectors_of(output, config, level), expected.detach(), rtol=1e-5, atol=1e-5)


def test_finer_features_are_quantized_beside_what_the_coarser_codes_decode_to() -> None:
    model = started(settings(3, hierarchy="features"))
    before = direct_path(model)
    model._quantizer(1).embedding.mul_(2)
    after = direct_path(model)
    assert [torch.equal(a, b) for a, b in zip(after.vectors, before.vectors, strict=True)] == [True, True, False]


def test_codebooks_start_in_the_order_in_which_levels_depend_on_each_other() -> None:
    orders = {hierarchy: fresh(settings(3, hierarchy=hierarchy)).start_order for hierarchy in HIERARCHIES}
    down = [0, 1, 2]
    assert orders == {
        "features": down,
        "residual": down,
        "nested": down[::-1],
        "pyramid": down,
        "nested-pyramid": down[::-1],
    }
    for hierarchy, order in orders.items():
        model = fresh(settings(3, hierarchy=hierarchy))
        fitted: dict[int, Tensor] = {}
        for level in order:
            fitted[level] = direct_path(model).vectors[level]
            model.start_codebook(level, fitted[level], 0)
            assert [model.started(one) for one in range(3)] == [one in fitted for one in range(3)]
        for level, vectors in enumerate(direct_path(model).vectors):
            assert torch.equal(vectors, fitted[level]), "a later start must not move what an earlier one was fitted to"


# Training


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_the_loss_is_the_pictures_error_and_each_levels_alignment(hierarchy: str) -> None:
    model = started(settings(hierarchy=hierarchy, pixel_loss="l1+l2", ssim_weight=0.3, commitment=0.5)).eval()
    output = direct_path(model)
    alignment = [
        0.5 * F.mse_loss(found, F.embedding(codes.flatten(), book))
        for found, codes, book in zip(output.vectors, output.codes, model.codebooks, strict=True)
    ]
    error = pixel_loss(output.reconstruction, some_images(), "l1+l2")
    similarity = ssim((output.reconstruction + 1) / 2, (some_images() + 1) / 2, 1.0)  # SSIM is of pixels from 0 up
    expected = (error + 0.3 * (1 - similarity)).mean()
    assert output.metrics.keys() == {"pixel", "alignment_0", "alignment_1"}
    torch.testing.assert_close(output.metrics["pixel"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.metrics["alignment_0"], alignment[0])
    torch.testing.assert_close(output.metrics["alignment_1"], alignment[1])
    torch.testing.assert_close(output.loss, expected + alignment[0] + alignment[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "simvq"])
def test_every_weight_learns(hierarchy: str, quantizer: str) -> None:
    model = started(settings(3, hierarchy=hierarchy, quantizer=quantizer, level_dropout=0.5)).train()
    model(some_images(16), torch.arange(16)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert len(gradients) > (15 if "pyramid" in hierarchy else 40)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_a_codebook_learns_only_from_contexts_that_encoding_can_meet(hierarchy: str) -> None:
    """With features a level is quantized beside the decoded coarser ones: without them it must not be learned from."""
    model = started(settings(4, hierarchy=hierarchy, level_dropout=0.7)).train()
    keys = torch.arange(32)
    images = some_images(32)
    output = model(images, keys)
    with torch.no_grad():
        whole = model.eval()(images, keys)
    kept = model.train()._kept_levels(keys)
    assert kept is not None and set(kept.tolist()) == {1, 2, 3, 4}
    for level, statistics in enumerate(output.statistics):
        met = kept >= level if hierarchy == "features" else torch.ones(32, dtype=torch.bool)
        expected = torch.bincount(whole.codes[level][met].flatten(), minlength=SIZES[level]).float()
        assert torch.equal(statistics.counts, expected), f"level {level}"


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_forward_changes_nothing_and_repeats_itself(hierarchy: str) -> None:
    model = started(settings(3, hierarchy=hierarchy, level_dropout=0.5)).train()
    before, random = state(model), torch.get_rng_state()
    first, second = (model(some_images(), KEYS) for _ in range(2))
    first.loss.backward()
    assert_same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first.reconstruction, second.reconstruction) and torch.equal(first.loss, second.loss)


def test_a_step_under_activation_checkpointing_is_one_update() -> None:
    def after_a_step(recomputed: bool) -> dict[str, Tensor]:
        model = started(settings(3, level_dropout=0.5, restart_threshold=0.5)).train()
        calls: list[Tensor] = []
        found: list[VQOutput] = []

        def loss(images: Tensor) -> Tensor:
            calls.append(images)
            found.append(model(images, KEYS))
            return found[-1].loss

        images = some_images().requires_grad_()
        (checkpoint(loss, images, use_reentrant=False) if recomputed else loss(images)).backward()
        assert len(calls) == 1 + recomputed
        model.update(found[0].statistics, 1)
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return state(model) | gradients

    assert_same(after_a_step(recomputed=True), after_a_step(recomputed=False))


def test_until_their_start_levels_pass_features_through_and_learn_nothing() -> None:
    model = fresh(settings(3)).train()
    before = state(model)
    output = model(some_images(), KEYS)
    assert [float(output.metrics[f"alignment_{level}"]) for level in range(3)] == [0, 0, 0]
    metrics = model.update(output.statistics, 0)
    assert [float(metrics[f"restarts_{level}"]) for level in range(3)] == [0, 0, 0]
    assert_same(state(model), before)
    output.loss.backward()
    assert bool(model.encoder.stem.weight.grad.any())


def test_an_update_moves_each_level_by_its_own_statistics_and_reports_its_use() -> None:
    model = started(settings(2, codebook_decay=0.5, restart_threshold=0.0)).train()
    before, output = [book.clone() for book in model.codebooks], model(some_images(), KEYS)
    metrics = model.update(output.statistics, 0)
    assert metrics.keys() == {"perplexity_0", "restarts_0", "perplexity_1", "restarts_1"}
    for level, size in enumerate(SIZES[:2]):
        codes, vectors = output.codes[level].flatten(), output.vectors[level]
        counts = torch.tensor([float((codes == code).sum()) for code in range(size)])
        sums = torch.stack([vectors[codes == code].sum(0) for code in range(size)])
        even = len(codes) / size
        expected = (before[level] * even + sums) / (even + counts)[:, None]
        torch.testing.assert_close(model.codebooks[level], expected, rtol=1e-4, atol=1e-5)
        entropy = -sum(p * p.log() for p in counts[counts > 0] / len(codes))
        torch.testing.assert_close(metrics[f"perplexity_{level}"], torch.as_tensor(entropy).exp())


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_accumulated_micro_batches_move_the_codebooks_like_one_batch(hierarchy: str) -> None:
    config = settings(3, hierarchy=hierarchy, restart_threshold=0.9, codebook_decay=0.5)
    whole, parts = started(config).train(), started(config).train()
    at_once = whole(some_images(), KEYS).statistics
    halves = [parts(some_images()[rows], KEYS[rows]).statistics for rows in (slice(0, 1), slice(1, 4))]
    merged = tuple(merge_statistics(one, other) for one, other in zip(*halves, strict=True))
    for one, other in zip(merged, at_once, strict=True):
        assert torch.equal(one.counts, other.counts)
        assert torch.equal(one.candidate_priorities, other.candidate_priorities)
    restarts = [model.update(found, 5)["restarts_2"] for model, found in ((whole, at_once), (parts, merged))]
    assert restarts[0] == restarts[1] > 0
    for level in range(3):
        torch.testing.assert_close(parts.codebooks[level], whole.codebooks[level], rtol=1e-5, atol=1e-5)


# Level dropout


def prefixes_seen(model: HierarchicalVQ, keys: Tensor) -> list[int]:
    """How many levels each picture's decoder saw in training, read off the reconstructions of one picture."""
    image = some_images(1)
    codes = model.eval().encode(image)
    choices = torch.cat([model.decode(codes[:count]) for count in range(1, len(codes) + 1)])
    with torch.no_grad():
        seen = model.train()(image.expand(len(keys), -1, -1, -1), keys).reconstruction.clamp(-1, 1)
    distances = (seen[:, None] - choices[None]).abs().flatten(2).amax(2)
    assert float(distances.min(1).values.max()) < 1e-4, "a picture that no prefix decodes to"
    assert int((distances < 1e-4).sum()) == len(keys), "prefixes that look the same"
    return [int(place) + 1 for place in distances.argmin(1)]


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_level_dropout_decodes_prefixes_and_is_keyed_by_the_picture(hierarchy: str) -> None:
    model = started(settings(3, hierarchy=hierarchy, level_dropout=0.5))
    keys = torch.arange(100, 196)
    together = prefixes_seen(model, keys)
    counts = [together.count(levels) for levels in (1, 2, 3)]
    assert 12 <= counts[0] <= 36 and 12 <= counts[1] <= 36 and 33 <= counts[2] <= 63  # 2.8 deviations of 24, 24, 48
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert prefixes_seen(model, keys[order]) == [together[place] for place in order]
    assert prefixes_seen(model, keys[5:7]) == together[5:7]


@pytest.mark.parametrize(("dropout", "levels", "expected"), [(1.0, 2, {1}), (1.0, 3, {1, 2}), (0.0, 3, {3})])
def test_level_dropout_is_sure_or_never(dropout: float, levels: int, expected: set[int]) -> None:
    assert set(prefixes_seen(started(settings(levels, level_dropout=dropout)), torch.arange(16))) == expected


def test_levels_are_dropped_in_training_alone_and_never_from_one_level() -> None:
    single = started(settings(1, level_dropout=1.0))
    assert prefixes_seen(single, torch.arange(4)) == [1] * 4
    assert_codes_decode_to_the_direct_path(started(settings(3, level_dropout=1.0)), some_images())


# Bad inputs


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (2, 3, 16, 16), (2, 1, 16, 8), (3, 16, 8), (0,)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    model = started(settings())
    uses: list[Any] = [model.encode, lambda images: model(images, KEYS)]
    for use in uses:
        with pytest.raises(ValueError) as caught:
            use(torch.zeros(shape))
        assert str(caught.value) == f"images must be (B, 3, 16, 8): {shape}\nhint: resize the pictures to 16 x 8"


def test_a_tokenizer_without_codebooks_does_not_encode() -> None:
    model = fresh(settings())
    with pytest.raises(ValueError, match=r"^level 0 has no codebook yet\nhint: train the tokenizer further$"):
        model.encode(some_images())
    model.start_codebook(0, torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), 0)
    with pytest.raises(ValueError, match=r"^level 1 has no codebook yet\nhint: train the tokenizer further$"):
        model.encode(some_images())


def test_codes_that_are_not_the_tokenizers_are_refused() -> None:
    model = started(settings()).eval()
    coarse, fine = model.encode(some_images(2))
    usual = r"\nhint: pass what encode returns, or its first levels$"
    wrong: list[tuple[list[Tensor], str]] = [
        ([], rf"^codes must have 1 to 2 levels, coarse first: 0{usual}"),
        ([coarse, fine, fine], rf"^codes must have 1 to 2 levels, coarse first: 3{usual}"),
        ([fine], rf"^codes of level 0 must be int64 of shape \(2, 2, 1\): torch.int64 \(2, 8, 4\){usual}"),
        ([coarse, fine[:1]], rf"^codes of level 1 must be int64 of shape \(2, 8, 4\): torch.int64 \(1, 8, 4\){usual}"),
        ([coarse.int()], rf"^codes of level 0 must be int64 of shape \(2, 2, 1\): torch.int32 \(2, 2, 1\){usual}"),
        ([torch.tensor(3)], rf"^codes of level 0 must be int64 of shape \(2, 1\): torch.int64 \(\){usual}"),
    ]
    mask = r"\nhint: a prior's mask is no code; sample until every code is settled$"
    for value, low, high in ((5, 0, 5), (-1, -1, 0)):
        bad = torch.zeros_like(coarse)
        bad[1, 1, 0] = value
        wrong.append(([bad, fine], rf"^codes of level 0 must be in 0\.\.4: {low}\.\.{high}{mask}"))
    wrong.append(([coarse, torch.full_like(fine, 6)], rf"^codes of level 1 must be in 0\.\.5: 6\.\.6{mask}"))
    for codes, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.decode(codes)


def test_two_tokenizers_of_one_seed_are_equal_and_copies_are_independent() -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(HierarchicalVQ(settings(3)))
    assert_same(state(built[0]), state(built[1]))
    changed = copy.deepcopy(built[0])
    changed.start_codebook(0, torch.ones(9, 4), 0)
    assert not built[0].started(0) and changed.started(0)
