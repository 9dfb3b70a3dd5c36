"""What stage 1 lets one see while it trains: use of the codebooks, norms, pictures; none of it changes a number."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hvqd_model.codec.quantizer import CodebookStatistics
from infra.storage import open_store
from tests.said import Said
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, vq_settings, vq_stage
from workflows.config import RunConfig
from workflows.context import Context
from workflows.training.alarms import Alarm
from workflows.training.codebook_use import CodebookUse, window_start
from workflows.training.launch import Desk
from workflows.training.loop import Record, train
from workflows.training.plain import PlainEngine
from workflows.training.vq_stage import VQStage


def statistics(codes: Sequence[int], size: int = 10) -> CodebookStatistics:
    """Of some codes, without vectors."""
    counts = torch.bincount(torch.tensor(codes, dtype=torch.int64), minlength=size).float()
    return CodebookStatistics(counts, torch.zeros(size, 1), torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))


def plain(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def test_use_is_counted_over_the_steps_of_a_window() -> None:
    settings, use = vq_settings(100, log_every_images=3 * GLOBAL_BATCH), CodebookUse()
    steps = [[0, 1, 1], [1, 2], [7], [3], [3], [4, 4, 5, 5]]
    found = [plain(use.add([statistics(codes)], step * GLOBAL_BATCH, settings)) for step, codes in enumerate(steps)]
    assert [bool(figures) for figures in found] == [False, False, True, False, False, True]
    counts = np.array([1, 3, 1, 1])
    share = counts / counts.sum()
    assert found[2] == pytest.approx(
        {"usage_0": 0.4, "dead_codes_0": 6.0, "window_perplexity_0": np.exp(-(share * np.log(share)).sum())}
    )
    assert found[5] == pytest.approx({"usage_0": 0.3, "dead_codes_0": 7.0, "window_perplexity_0": 3.0})


@pytest.mark.parametrize(("log", "checkpoint", "batch"), [(24, 56, 8), (30, 100, 8), (8, 8, 8), (100, 7, 8), (5, 3, 8)])
def test_a_window_begins_where_an_interval_does(log: int, checkpoint: int, batch: int) -> None:
    settings = vq_settings(100, log_every_images=log, checkpoint_every_images=checkpoint)
    begun = 0
    for after in range(batch, 100 * batch, batch):
        assert window_start(after, settings) == begun
        if any((after - batch) // interval != after // interval for interval in (log, checkpoint)):
            begun = after


def test_a_level_without_codes_has_no_use() -> None:
    settings, use = vq_settings(1), CodebookUse()
    found = plain(use.add([statistics([]), statistics([1])], 0, settings))
    assert set(found) == {"usage_1", "dead_codes_1", "window_perplexity_1"}


def trained(steps: int = 12, **settings: Any) -> tuple[VQStage, PlainEngine, Heard, list[Record]]:
    chosen = vq_settings(
        steps,
        codebook_start=0.25,
        evaluate_every_images=3 * GLOBAL_BATCH,
        log_every_images=2 * GLOBAL_BATCH,
        **settings,
    )
    stage, told = vq_stage(chosen, attention=False), Heard()
    engine = PlainEngine(stage.objective, chosen, torch.device("cpu"))
    return stage, engine, told, list(train(engine, stage, GoOn(), told).history)


def test_norms_are_those_of_the_model_and_of_the_validation_pictures() -> None:
    stage, engine, _, history = trained()
    last = history[-1]
    images = stage.validation.batch(np.arange(6))
    engine.module.eval()
    with torch.no_grad():
        output = stage.model(images, torch.zeros(6, dtype=torch.int64))
    for level, (codebook, codes) in enumerate(zip(stage.model.codebooks, output.codes, strict=True)):
        assert last[f"codebook_norm_{level}"] == pytest.approx(float(codebook.norm(dim=1).mean()), rel=1e-4)
        first = next(record for record in history if "codebooks_started" in record)[f"codebook_norm_{level}"]
        assert last[f"codebook_drift_{level}"] == pytest.approx(last[f"codebook_norm_{level}"] / first - 1, abs=1e-5)
        # A batch of 8 of 6 pictures: the first two count twice.
        taken = torch.arange(8) % 6
        norms = codebook[codes[taken].flatten()].norm(dim=1).mean()
        vectors = output.vectors[level].view(6, -1, output.vectors[level].shape[1])[taken].norm(dim=2).mean()
        assert last[f"val_code_norm_{level}"] == pytest.approx(float(norms), rel=1e-4)
        assert last[f"val_vector_norm_{level}"] == pytest.approx(float(vectors), rel=1e-4)


def test_the_mean_picture_is_what_no_code_is_worth() -> None:
    stage, _, _, history = trained()
    pictures = stage.validation.images.astype(np.float64)
    errors = [((picture - pictures.mean(0)) ** 2).mean() for picture in pictures]
    expected = np.mean([10 * np.log10(255**2 / error) for error in errors])
    assert history[-1]["val_psnr_mean_picture"] == pytest.approx(expected, rel=1e-5)


def test_every_evaluation_with_codebooks_shows_a_sheet_of_fixed_pictures() -> None:
    stage, engine, told, history = trained()
    evaluated = [record["images"] for record in history if "val_psnr" in record]
    assert [images for images, _ in told.pictures] == evaluated == [n * GLOBAL_BATCH for n in (6, 9, 12)]
    sheet = Image.open(io.BytesIO(told.pictures[-1][1])).convert("RGB")
    # Six pictures of 16 x 16, six-fold, below a header: the first column are the originals.
    cells = np.asarray(sheet)[40:, 4:100].reshape(6, 100, 96, 3)[:, :96]
    np.testing.assert_array_equal(cells[:, ::6, ::6], stage.validation.images)
    engine.module.eval()
    with torch.no_grad():
        stage.evaluate(engine)
    assert stage.picture == told.pictures[-1][1], "the same every time"


def test_the_sheet_does_not_depend_on_the_micro_batch() -> None:
    stage, engine, told, _ = trained()
    stage.settings = stage.settings.model_copy(update={"micro_batch": 4})
    engine.module.eval()
    with torch.no_grad():
        stage.evaluate(engine)
    one, other = (np.asarray(Image.open(io.BytesIO(png or b""))) for png in (told.pictures[-1][1], stage.picture))
    assert np.abs(one.astype(int) - other)[40:, :300].max() <= 1


def test_a_dataset_without_validation_pictures_has_no_sheet() -> None:
    stage = vq_stage(vq_settings(1))
    stage.validation = stage.validation.__class__(
        *(getattr(stage.validation, name)[:0] for name in ("ids", "labels", "styles", "groups", "captions", "images"))
    )
    engine = PlainEngine(stage.objective, stage.settings, torch.device("cpu"))
    assert (stage.evaluate(engine), stage.picture) == ({}, None)


def test_looking_changes_no_number() -> None:
    """Weights and codebooks of a run that evaluates and logs often are those of a run that does so once."""
    often = trained()
    chosen = vq_settings(12, codebook_start=0.25, log_every_images=1_000_000)
    stage = vq_stage(chosen, attention=False)
    seldom = PlainEngine(stage.objective, chosen, torch.device("cpu"))
    train(seldom, stage, GoOn(), Heard())
    ours, theirs = often[1].export(), seldom.export()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---- the driver's side ----


ALARM = Alarm("codebook collapse", 1, 8_000, "0.2% of the codes used", "vq.model.restart_threshold=0.05")


def test_the_driver_says_an_alarm_once_however_often_a_restarted_worker_raises_it(tmp_path: Path) -> None:
    said = Said()
    root = open_store(str(tmp_path))
    desk = Desk(Context(RunConfig(), root, said), root.child("vq"))
    assert desk.show([("alarm", ALARM), ("record", {"images": 8_000, "loss": 1.0})]) == 1
    assert desk.show([("alarm", ALARM)]) == 0
    assert said.lines == [f"  {line}" for line in ALARM.text.splitlines()]
    assert [line.split(":")[0].strip() for line in said.lines] == ["alarm after 8,000 images", "remedy"]


def test_the_driver_keeps_the_latest_picture_beside_the_artifact(tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    desk = Desk(Context(RunConfig(), root, Said()), root.child("vq"))
    assert desk.show([("picture", (16, b"one")), ("picture", (32, b"two"))]) == 0
    assert root.child("vq").files() == {"pictures/latest.png": 3}
    assert root.child("vq").read_bytes("pictures/latest.png") == b"two"
