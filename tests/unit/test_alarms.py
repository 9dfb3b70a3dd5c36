"""Alarms: each sign alone raises its own alarm, once, with a remedy that the configuration accepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hvqd_model.config import VQConfig
from infra.storage import open_store
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, vq_settings, vq_stage
from workflows.config import TrainSettings, VQTrainSettings
from workflows.loading import load_config
from workflows.training.alarms import (
    DRIFT,
    GROWTH,
    GROWTH_OF_GRADIENTS,
    LITTLE_GAIN,
    LITTLE_MEANING,
    LOW_USE,
    Alarm,
    Watch,
    find_alarms,
)
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.loop import Record, train
from workflows.training.plain import PlainEngine

BATCH, LOG = 100, 1_000
SETTINGS = VQTrainSettings(
    images=20_000,
    global_batch=BATCH,
    micro_batch=BATCH,
    warmup_images=1_000,
    log_every_images=LOG,
    evaluate_every_images=2_000,
    checkpoint_every_images=2_000,
)
MODEL = VQConfig(image_size=(16, 16), codebook_sizes=(64, 256))
START: Record = {"images": 1_000, "codebooks_started": 2.0, "codebook_norm_0": 2.0, "codebook_norm_1": 3.0}


def watch(model: VQConfig | None = MODEL, settings: TrainSettings = SETTINGS, stage: str = "vq") -> Watch:
    return Watch(stage, settings, model)


def logged(images: int, **changes: float) -> Record:
    """A log record of a training that goes well."""
    return {
        "images": images,
        "gradient_norm": 0.2,
        **{f"alignment_{level}": 0.002 for level in (0, 1)},
        **{f"usage_{level}": 0.95 for level in (0, 1)},
        **changes,
    }


def evaluated(images: int, **changes: float) -> Record:
    """An evaluation record of a training that goes well."""
    return {
        "images": images,
        "val_psnr_mean_picture": 12.0,
        "val_psnr_prefix_1": 18.0,
        "val_psnr": 23.0,
        **{f"val_perplexity_{level}": 30.0 for level in (0, 1)},
        **{f"codebook_norm_{level}": 2.5 for level in (0, 1)},
        **changes,
    }


def history(log: dict[str, float] | None = None, evaluation: dict[str, float] | None = None) -> list[Record]:
    """A whole history; from 10,000 images on the records are changed."""
    records = [START]
    for images in range(2 * LOG, 20_001, LOG):
        late = images >= 10_000
        records.append(logged(images, **((log or {}) if late else {})))
        if images % 2_000 == 0:
            records.append(evaluated(images, **((evaluation or {}) if late else {})))
    return records


def heard(records: Sequence[Record], **parts: Any) -> list[Alarm]:
    """The alarms of a history as the loop keeps it."""
    watching = watch(**parts)
    found = []
    for record in records:
        found += watching.see(watching.completed(record))
    return found


def test_a_training_that_goes_well_raises_nothing() -> None:
    assert heard(history()) == []


@pytest.mark.parametrize(
    ("log", "evaluation", "title", "seen", "images"),
    [
        (
            {"usage_1": LOW_USE - 0.01},
            {},
            "codebook collapse, level 1",
            "24.0% of the codes used, below 0.25 of the 100.0% that even use would show",
            11_000,
        ),
        (
            {},
            {"val_psnr": 18 + LITTLE_GAIN - 0.01},
            "level without content, level 1",
            r"\+0.09 dB over the levels before it, less than 0.1",
            12_000,
        ),
        (
            {},
            {"val_psnr_prefix_1": 12 + LITTLE_MEANING - 0.1},
            "level without content, level 0",
            r"\+0.40 dB over the mean picture, less than 0.5",
            12_000,
        ),
        (
            {},
            {"val_perplexity_1": 1.2},
            "level without content, level 1",
            "perplexity 1.2 of its codes, below 1.5",
            12_000,
        ),
        (
            {"alignment_0": 0.002 * GROWTH + 0.001},
            {},
            "exploding alignment, level 0",
            "alignment loss 0.021, over 10 times the best 0.002",
            11_000,
        ),
        (
            {},
            {"codebook_norm_0": 2.0 * DRIFT + 0.1},
            "codebook drift, level 0",
            "mean norm of the codes 10.1 times that of the start, outside 1/10 to 10",
            12_000,
        ),
        (
            {},
            {"codebook_norm_1": 3.0 / DRIFT - 0.01},
            "codebook drift, level 1",
            "mean norm of the codes 0.0967 times that of the start, outside 1/10 to 10",
            12_000,
        ),
        (
            {"gradient_norm": 0.2 * GROWTH_OF_GRADIENTS + 0.1},
            {},
            "exploding gradients",
            "norm 4.1, over 20 times the median 0.2",
            11_000,
        ),
        ({"gradient_norm": float("inf")}, {}, "exploding gradients", "the norm is inf", 11_000),
    ],
)
def test_each_sign_raises_its_alarm_once_at_the_second_record_that_shows_it(
    log: dict[str, float], evaluation: dict[str, float], title: str, seen: str, images: int
) -> None:
    (alarm,) = heard(history(log, evaluation))
    assert (alarm.title, alarm.images) == (title, images)
    assert alarm.seen.replace("\\", "") == seen.replace("\\", "")
    assert alarm.text == f"alarm after {images:,} images: {title}: {alarm.seen}\nremedy: {alarm.remedy}"


@pytest.mark.parametrize(
    ("log", "evaluation"),
    [
        ({"usage_1": LOW_USE + 0.01}, {}),
        ({}, {"val_psnr": 18 + LITTLE_GAIN + 0.01}),
        ({}, {"val_psnr_prefix_1": 12 + LITTLE_MEANING + 0.1}),
        ({"alignment_0": 0.002 * GROWTH - 0.001}, {}),
        ({}, {"codebook_norm_0": 2.0 * DRIFT - 0.1}),
        ({"gradient_norm": 0.2 * GROWTH_OF_GRADIENTS - 0.1}, {}),
    ],
)
def test_nothing_is_raised_just_within_a_threshold(log: dict[str, float], evaluation: dict[str, float]) -> None:
    assert heard(history(log, evaluation)) == []


def test_a_sign_must_be_seen_twice_in_a_row() -> None:
    records = history()
    bad = [{**record, "usage_0": 0.01} if "usage_0" in record else record for record in records]
    flickering = [bad[place] if place % 4 == 0 else record for place, record in enumerate(records)]
    assert any(record != other for record, other in zip(flickering, records, strict=True))
    assert heard(flickering) == []
    assert [alarm.title for alarm in heard(bad)] == ["codebook collapse, level 0"]


def test_an_adversary_that_is_switched_off_is_said_at_once_for_it_happens_once() -> None:
    (alarm,) = heard([*history(), {"images": 21_000, "adversary_switched_off": 1.0}])
    assert (alarm.title, alarm.images) == ("adversary switched off", 21_000)
    assert alarm.seen == "the validation PSNR fell more than 1 dB below the best from before it"


def test_use_is_judged_by_what_a_window_can_show() -> None:
    # 20 pictures of 4 codes each at level 0: even use of 4,096 codes would show 80 of them at most.
    few = SETTINGS.model_copy(update={"global_batch": 20, "log_every_images": 20, "checkpoint_every_images": 20})
    model = VQConfig(image_size=(16, 16), codebook_sizes=(4_096, 256))
    records = [START, *(logged(images, usage_0=60 / 4_096) for images in range(4_000, 8_000, 20))]
    assert heard(records, model=model, settings=few) == []
    records = [START, *(logged(images, usage_0=19 / 4_096) for images in range(4_000, 8_000, 20))]
    (alarm,) = heard(records, model=model, settings=few)
    assert alarm.seen == "0.5% of the codes used, below 0.25 of the 1.9% that even use would show"


def test_what_happens_before_and_just_after_the_start_of_the_codebooks_is_no_alarm() -> None:
    before = [logged(images, usage_0=0.0, alignment_0=0.0) for images in (400, 700)]
    after = [logged(images, usage_0=0.01) for images in (1_300, 1_600, 1_900)]
    young = [evaluated(images, val_psnr=10.0, val_psnr_prefix_1=9.0) for images in (2_000, 3_000, 4_000)]
    assert heard([*before, START, *after, *young]) == []


def test_a_resumed_watch_neither_repeats_nor_loses_an_alarm() -> None:
    records = history({"usage_1": 0.01, "gradient_norm": 9.0}, {"codebook_norm_0": 50.0})
    whole = heard(records)
    assert len(whole) == 3
    completed: list[Record] = []
    first = watch()
    for record in records:
        completed.append(first.completed(record))
        first.see(completed[-1])
    for place in range(len(completed)):
        resumed = watch()
        before = find_alarms(completed[:place], resumed)
        after = []
        for record, expected in zip(records[place:], completed[place:], strict=True):
            assert resumed.completed(record) == expected
            after += resumed.see(expected)
        assert before + after == whole


def test_drift_is_the_relative_change_of_the_mean_norm_since_the_start() -> None:
    watching = watch()
    assert watching.completed(START) == START
    watching.see(START)
    found = watching.completed({"images": 5_000, "codebook_norm_0": 3.0, "codebook_norm_1": 2.4})
    assert found == {
        "images": 5_000,
        "codebook_norm_0": 3.0,
        "codebook_norm_1": 2.4,
        "codebook_drift_0": 0.5,
        "codebook_drift_1": pytest.approx(-0.2),
    }


# ---- remedies ----


def remedy(log: dict[str, float], evaluation: dict[str, float] | None = None, **architecture: Any) -> str:
    (alarm,) = heard(history(log, evaluation), model=VQConfig(**(MODEL.model_dump() | architecture)))
    return alarm.remedy


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({}, "vq.model.l2_normalize=true with vq.model.code_dim=8"),
        ({"restart_threshold": 0.0}, "vq.model.restart_threshold=0.05, which gives dead codes fresh vectors"),
        ({"quantizer": "gradient"}, "vq.model.quantizer=ema, which restarts dead codes, or simvq"),
        ({"quantizer": "simvq"}, "vq.model.l2_normalize=true"),
        ({"l2_normalize": True}, "vq.model.codebook_sizes=[64,64]"),
        ({"quantizer": "fsq"}, "vq.model.codebook_sizes=[64,64]"),
        ({"hierarchy": "pyramid", "code_dim": 8}, "vq.model.codebook_sizes=[64,64]"),
    ],
)
def test_the_remedy_for_a_collapse_fits_the_quantizer(architecture: dict[str, Any], expected: str) -> None:
    assert remedy({"usage_1": 0.01}, **architecture).startswith(expected)


def test_a_pyramid_is_never_told_to_normalize_its_vectors() -> None:
    pyramid = {"hierarchy": "pyramid", "code_dim": 8}
    assert remedy({"codebook_norm_1": 60.0}, **pyramid) == "vq.train.learning_rate=0.0005"


def test_levels_whose_bits_have_a_price_may_use_few_codes() -> None:
    few = history({"usage_1": 0.01, "alignment_1": 5.0})
    free = VQConfig(**(MODEL.model_dump() | {"quantizer": "fsq"}))
    assert {alarm.name for alarm in heard(few, model=free)} == {"codebook collapse", "exploding alignment"}
    assert heard(few, model=free.model_copy(update={"rate_weight": 0.01})) == []


def test_the_remedy_for_a_coarse_level_without_content_is_level_dropout() -> None:
    empty = {"val_psnr_prefix_1": 11.0}
    assert remedy({}, empty, level_dropout=0.0).startswith("vq.model.level_dropout=0.15, ")
    assert remedy({}, empty, level_dropout=0.15).startswith("vq.model.level_dropout=0.3, ")
    assert remedy({}, empty, level_dropout=0.5).startswith("vq.train.images=40000")
    nothing = {"val_psnr_prefix_1": 12.0, "val_psnr": 12.05}  # no level holds anything: not the coarse one's fault
    alarms = heard(history({}, nothing))
    assert [alarm.level for alarm in alarms] == [0, 1]
    assert alarms[0].remedy.startswith("vq.train.images=40000")


def test_the_remedy_for_a_fine_level_without_content_names_the_levels_that_stay() -> None:
    expected = "go without it: vq.model.strides=[8] and vq.model.codebook_sizes=[64]"
    assert remedy({}, {"val_psnr": 18.0}).endswith(expected)


def test_a_level_is_left_out_of_every_setting_that_lists_levels() -> None:
    lists = {
        "strides": ((8, 16), (4, 8), 4),
        "codebook_sizes": (64, 256, 128),
        "code_dim": (8, 16, 4),
        "quantizer": ("ema", "fsq", "gradient"),
        "fsq_steps": ((), (16, 16), ()),
        "image_size": (32, 32),
    }
    third = {"val_psnr_prefix_2": 18.0, "val_perplexity_2": 30.0}  # no better than the first level alone
    records = [{**record, **third} if "val_psnr" in record else record for record in history()]
    (alarm,) = heard(records, model=VQConfig(**(MODEL.model_dump() | lists)))
    assert alarm.level == 1
    settings = alarm.remedy.partition("go without it: ")[2].split(" and ")
    assert settings == [
        "vq.model.strides=[[8,16],4]",
        "vq.model.codebook_sizes=[64,128]",
        "vq.model.code_dim=[8,4]",
        "vq.model.quantizer=[ema,gradient]",
        "vq.model.fsq_steps=[[],[]]",
    ]
    architecture = load_config("tiny", None, settings).vq.model
    assert (architecture.levels, architecture.code_dims) == (2, (8, 4))


def test_the_remedy_for_exploding_alignment_fits_the_quantizer() -> None:
    assert remedy({"alignment_1": 1.0}).startswith("vq.model.commitment=0.5, or vq.model.l2_normalize=true")
    assert remedy({"alignment_1": 1.0}, quantizer="gradient").startswith("vq.train.learning_rate=0.0005")
    assert remedy({"alignment_1": 1.0}, l2_normalize=True) == "vq.model.commitment=0.5"


def test_any_stage_is_watched_for_exploding_gradients_and_the_remedy_names_its_settings() -> None:
    settings = TrainSettings(images=20_000, learning_rate=3e-3, warmup_images=0, precision="fp32")
    records = [
        {"images": images, "gradient_norm": 0.1 if images < 10_000 else 80.0} for images in range(0, 20_000, LOG)
    ]
    (alarm,) = heard(records, model=None, settings=settings, stage="prior")
    assert alarm.remedy == "prior.train.learning_rate=0.0015 and prior.train.warmup_images=400"
    assert alarm.as_json() == {
        "name": "exploding gradients",
        "level": None,
        "images": 11_000,
        "seen": "norm 80, over 20 times the median 0.1",
        "remedy": alarm.remedy,
    }


def test_every_setting_that_a_remedy_names_is_one_that_set_takes() -> None:
    everything = {
        "usage_1": 0.01,
        "alignment_0": 9.0,
        "gradient_norm": float("nan"),
        "adversary_switched_off": 1.0,
    }
    figures = {"val_psnr_prefix_1": 11.0, "codebook_norm_0": 50.0, "val_perplexity_1": 1.0}
    settings = [
        word.rstrip(",.")
        for architecture in ({}, {"restart_threshold": 0.0}, {"quantizer": "gradient"}, {"l2_normalize": True})
        for alarm in heard(history(everything, figures), model=VQConfig(**(MODEL.model_dump() | architecture)))
        for word in alarm.remedy.split()
        if word.startswith(("vq.", "prior."))
    ]
    assert len(set(settings)) >= 10
    pairs = {setting.split("=")[0] for setting in settings}
    assert {"vq.model.strides", "vq.model.codebook_sizes"} <= pairs
    for setting in set(settings):
        if setting.startswith("vq.model.strides"):
            continue  # goes with codebook_sizes
        together = [setting]
        if setting.startswith("vq.model.codebook_sizes") and setting.count(",") == 0:
            together.append("vq.model.strides=[8]")
        elif setting.startswith("vq.model.codebook_sizes"):
            together.append("vq.model.strides=[8,4]")
        load_config("tiny", None, ["vq.model.hierarchy=features", *together])


# ---- real trainings ----


def trained(steps: int, **architecture: Any) -> tuple[Heard, list[Record]]:
    settings = vq_settings(
        steps, codebook_start=0.1, log_every_images=5 * GLOBAL_BATCH, evaluate_every_images=10 * GLOBAL_BATCH
    )
    stage = vq_stage(settings, attention=False, **architecture)
    heard_of = Heard()
    state = train(PlainEngine(stage.objective, settings, torch.device("cpu")), stage, GoOn(), heard_of)
    return heard_of, list(state.history)


def test_a_training_whose_codebook_cannot_be_filled_raises_a_collapse() -> None:
    """No restarts, and a codebook of far more codes than twenty pictures have cells that differ."""
    told, records = trained(40, codebook_sizes=(8, 512), restart_threshold=0.0, commitment=4.0)
    assert "codebook collapse, level 1" in [alarm.title for alarm in told.alarms]
    usages = [record["usage_1"] for record in records if "usage_1" in record]
    assert usages == [
        pytest.approx(1 - record["dead_codes_1"] / 512, abs=1e-5) for record in records if "usage_1" in record
    ]


def test_a_coarse_level_without_level_dropout_carries_nothing() -> None:
    told, records = trained(120, level_dropout=0.0)
    (alarm,) = [alarm for alarm in told.alarms if alarm.title == "level without content, level 0"]
    assert alarm.remedy.startswith("vq.model.level_dropout=0.15")
    last = [record for record in records if "val_psnr" in record][-1]
    assert last["val_psnr"] > last["val_psnr_prefix_1"] + 1


def test_a_resumed_training_says_nothing_twice(tmp_path: Path) -> None:
    settings = vq_settings(40, codebook_start=0.1, log_every_images=40, checkpoint_every_images=160)

    def go_on(images: int) -> tuple[Heard, list[Record]]:
        stage = vq_stage(settings, attention=False, codebook_sizes=(8, 512), restart_threshold=0.0, commitment=4.0)
        stage.settings = settings.model_copy(update={"images": images})
        told = Heard()
        checkpoints = StoreCheckpoints(open_store(str(tmp_path / "checkpoints")), "r", 2)
        engine = PlainEngine(stage.objective, settings, torch.device("cpu"))
        return told, list(train(engine, stage, checkpoints, told).history)

    first, _ = go_on(240)
    second, records = go_on(320)
    assert second.past == [(first.records, first.alarms)], "for a listener that died before it heard the last of it"
    titles = [alarm.title for alarm in (*first.alarms, *second.alarms)]
    assert "codebook collapse, level 1" in [alarm.title for alarm in first.alarms]
    assert len(titles) == len(set(titles))
    stage = vq_stage(settings, attention=False, codebook_sizes=(8, 512), restart_threshold=0.0, commitment=4.0)
    assert titles == [alarm.title for alarm in find_alarms(records, stage.watch())]
