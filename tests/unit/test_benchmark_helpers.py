"""What the tokenizer's benchmarks are built from: bits and bytes of codes, folds, and trainings that are timed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.metrics import psnr
from tests import tiny_training
from tests.benchmarks.coding import PRECISION, Table, decode, encode, size_for_bits
from tests.benchmarks.picture_sets import FOLDS, folds, photographs
from tests.benchmarks.trials import (
    Nothing,
    Trial,
    VQTrial,
    affordable,
    bits_an_image,
    closest_below,
    codebook_use,
    configured,
    encoded,
    images_per_second,
    mean_psnr,
    prior_trial,
    reconstructions,
    run,
    start_somewhere,
    tokenizer_trial,
    weights,
)
from tests.tiny_training import image_table
from workflows.training.loop import train
from workflows.training.plain import PlainEngine

TINY = (
    "data.image_size=[16,16]",
    "vq.model.strides=[8,4]",
    "vq.model.codebook_sizes=[8,16]",
    "vq.model.hierarchy=features",
    "vq.model.code_dim=8",
    "vq.model.width=16",
    "vq.model.width_multipliers=[1,2]",
    "vq.train.global_batch=8",
    "vq.train.micro_batch=4",
    "prior.train.global_batch=8",
    "prior.train.micro_batch=4",
    "prior.model.width=64",
    "prior.model.depth=1",
    "prior.model.heads=2",
)


def tiny_trial(pictures: int = 20, **changes: Callable[..., HierarchicalVQ]) -> VQTrial:
    return tokenizer_trial(configured("tiny", TINY), image_table(pictures), **changes)  # type: ignore[arg-type]


# ---- bits and bytes ----


def skewed(size: int, count: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    generator = np.random.default_rng(seed)
    return generator.choice(size, count, p=generator.dirichlet(np.full(size, 0.2)))


@pytest.mark.parametrize(("size", "count"), [(2, 1), (2, 500), (1024, 80), (4096, 300), (1, 40)])
def test_the_entropy_coder_gives_every_code_back(size: int, count: int) -> None:
    table = Table.counted(skewed(size, 4000, seed=0), size)
    codes = np.concatenate([skewed(size, count, seed=1), [0, size - 1, 0]]).tolist()  # those never seen included
    assert decode(encode([(code, table) for code in codes]), [table] * len(codes)) == codes


def test_codes_of_several_levels_share_one_string_of_bytes() -> None:
    tables = [Table.counted(skewed(size, 900, seed=size), size) for size in (8, 300)] * 20
    codes = [int(skewed(len(table.frequencies), 1, seed=place)[0]) for place, table in enumerate(tables)]
    assert decode(encode(list(zip(codes, tables, strict=True))), tables) == codes
    assert decode(encode([]), []) == []


def test_coded_codes_take_what_their_tables_say_and_less_than_two_bytes_more() -> None:
    codes = skewed(64, 500, seed=3)
    table = Table.counted(codes, 64)
    content = encode([(code, table) for code in codes.tolist()])
    bits = sum(table.bits(code) for code in codes.tolist())
    assert 0 <= len(content) - bits / 8 < 2
    shares = np.bincount(codes, minlength=64) / len(codes)
    assert bits / len(codes) == pytest.approx(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum(), rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 1000, 4096])
def test_a_table_gives_every_code_a_share_and_shares_are_in_the_order_of_the_counts(size: int) -> None:
    codes = skewed(size, 5000, seed=size)
    table = Table.counted(codes, size)
    assert sum(table.frequencies) == 1 << PRECISION
    assert min(table.frequencies) >= 1
    assert list(table.starts) == [sum(table.frequencies[:code]) for code in range(size)]
    counts = np.bincount(codes, minlength=size)
    order = np.argsort(counts, kind="stable")
    assert (np.diff(np.array(table.frequencies)[order])[np.diff(counts[order]) > 0] > 0).all()


@pytest.mark.parametrize(
    ("tokens", "bits", "size"), [(80, 800.0, 1024), (64, 800.0, 5792), (128, 800.0, 76), (9, 1.0, 2)]
)
def test_the_codebook_for_some_bits_is_the_largest_that_fits(tokens: int, bits: float, size: int) -> None:
    assert size_for_bits(tokens, bits) == size
    assert size == 2 or tokens * math.log2(size) <= bits < tokens * math.log2(size + 1)


# ---- pictures ----


def test_folds_keep_groups_whole_and_hold_out_every_group_once() -> None:
    groups = np.repeat([f"photo {number}" for number in range(16)], 5)
    found = folds(groups)
    by_group = found.reshape(16, 5)
    assert (by_group == by_group[:, :1]).all()
    assert sorted(np.bincount(by_group[:, 0], minlength=FOLDS).tolist()) == [5, 5, 6]


def test_a_group_has_the_same_fold_wherever_its_pictures_stand() -> None:
    groups = np.array([f"photo {number % 7}" for number in range(40)])
    order = np.random.default_rng(0).permutation(40)
    assert (folds(groups)[order] == folds(groups[order])).all()


def test_photographs_are_held_out_whole_and_their_pixels_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVQD_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    files = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    photos = [f"photo {number // 2}" for number in range(12)]
    pq.write_table(pa.table({"image": files, "photo": photos}), tmp_path / "photos.parquet")
    held_out = []
    for fold in range(FOLDS):
        found = photographs(tmp_path / "photos.parquet", 16, fold)
        assert len(found.train) == 8 and len(found.held_out) == 4
        assert not set(found.train.groups) & set(found.held_out.groups)
        rows = found.held_out.ids.astype(int)
        assert np.array_equal(found.held_out.images, pixels[rows])
        held_out += rows.tolist()
    assert sorted(held_out) == list(range(12))


# ---- trainings ----


def test_a_trial_trains_as_the_products_stage_does() -> None:
    trial = tiny_trial()
    stage = tiny_training.VQStage(tiny_trial().model, trial.settings, 0, "fp32", image_table(20), image_table(4))
    stage.settings = stage.settings.model_copy(update={"images": 80, "evaluate_every_images": 40})
    engine = PlainEngine(stage.objective, stage.settings, torch.device("cpu"))
    train(engine, stage, Nothing(), Nothing())
    run(trial, 80)
    state = trial.model.state_dict()
    assert len(state) > 20
    for name, expected in stage.model.state_dict().items():
        assert torch.equal(state[name], expected), name


def test_trials_are_timed_in_turns_and_every_turn_goes_on_where_the_last_one_ended() -> None:
    trials: dict[str, Trial] = {"small": tiny_trial(), "same": tiny_trial()}
    speeds = images_per_second(trials)
    assert set(speeds) == {"small", "same"}
    assert all(0 < speed < math.inf for speed in speeds.values())
    first, second = (trial.model.state_dict() for trial in trials.values())  # type: ignore[union-attr]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_affordable_images_are_whole_batches_and_enough_for_the_codebooks_to_start() -> None:
    settings = configured("tiny", TINY).vq.train
    assert affordable(10.0, 5.0, settings) == 48
    assert affordable(10.0, 0.1, settings) == 16


def test_the_mean_psnr_is_over_pictures() -> None:
    table = image_table(103)
    decoded = table.batch(slice(None)) + torch.linspace(0.01, 0.5, 103)[:, None, None, None]
    expected = np.mean([float(psnr(decoded[row, None], table.batch(slice(row, row + 1)), 2.0)) for row in range(103)])
    assert mean_psnr(decoded, table) == pytest.approx(expected)


def test_reconstructions_and_codes_are_those_of_the_trained_tokenizer() -> None:
    trial = tiny_trial(pictures=70)
    run(trial, 80)
    table = image_table(70)
    codes = trial.model.encode(table.batch(slice(None)))
    assert torch.equal(reconstructions(trial.model, table), trial.model.decode(codes))
    assert torch.equal(reconstructions(trial.model, table, 1), trial.model.decode(codes[:1]))
    for found, expected in zip(encoded(trial.model, table).codes, codes, strict=True):
        assert np.array_equal(found, expected.numpy())


def test_usage_is_of_at_least_twenty_tokens_a_code() -> None:
    model = tiny_trial().model.eval()
    start_somewhere(model)
    table = image_table(90)
    codes = model.encode(table.batch(slice(0, 40)))  # 8 codes at 4 tokens a picture need 40 pictures
    assert codebook_use(model, table) == [len(codes[0].unique()) / 8, len(codes[1].unique()) / 16]
    with pytest.raises(ValueError, match=r"usage needs 40 pictures: 39\nhint: smaller codebooks"):
        codebook_use(model, image_table(39))


def test_a_prior_that_has_learned_nothing_costs_the_logarithm_of_the_codebooks() -> None:
    tokenizer = tiny_trial().model.eval()
    start_somewhere(tokenizer)
    codes, held_out = (encoded(tokenizer, image_table(24, seed=seed)) for seed in (0, 1))
    trial = prior_trial(configured("tiny", TINY), tokenizer, codes, held_out)
    assert bits_an_image(trial) == pytest.approx(tokenizer.config.bits, rel=0.15)  # drawn noise
    before = bits_an_image(trial)
    run(trial, 400)
    assert bits_an_image(trial) < before


# ---- equal parameters ----


def test_the_closest_choice_from_below_is_the_last_that_fits() -> None:
    assert closest_below(lambda width: width * width, range(1, 100), 50) == 7
    assert closest_below(lambda width: width * width, range(1, 100), 49) == 7
    with pytest.raises(ValueError, match=r"no choice has a size of at most 3\nhint: offer a smaller one"):
        closest_below(lambda width: width * width, range(2, 9), 3)


def test_weights_are_counted_over_all_modules() -> None:
    assert weights(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 5, 3, bias=False)) == 3 * 4 + 4 + 2 * 5 * 9
