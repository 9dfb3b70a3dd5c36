"""Seeing the tokenizer of a finished run: sheets of prefixes and of codes, pictures and speed of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvqd_model import HierarchicalVQ, load_model
from infra.storage import open_store
from infra.tracking import open_tracker
from tests.command_line import run_hvqd
from tests.conftest import FinishedRun
from tests.pictures import encoded, noise, write_files
from workflows.artifacts import read_manifest
from workflows.data.batches import CodeTable, ImageTable

_SIDE, _GAP, _HEADER = 96, 4, 40


def _asked(finished: FinishedRun, folder: Path, *arguments: str) -> dict[str, Any]:
    common = ("--root", str(finished.root), "--out", "sheet.png", "--json")
    return run_hvqd(*arguments, *common, cwd=folder, env=finished.env).succeeded().answer


def test_the_test_split_is_reconstructed_as_the_evaluation_found(finished_run: FinishedRun, tmp_path: Path) -> None:
    figures = json.loads((finished_run.root / "evaluation" / "metrics.json").read_text())["figures"]
    answer = _asked(finished_run, tmp_path, "reconstruct", "test", "-n", "100000", "--precision", "fp32")
    assert len(answer["pictures"]) == figures["psnr"]["n"]
    found = {row["levels"]: row["psnr"] for row in answer["levels"]}
    expected = {1: figures["psnr_prefix_1"]["value"], 2: figures["psnr"]["value"]}
    assert found == pytest.approx(expected, abs=0.02)
    assert answer["model"] == "models:/hvqd@champion"


def test_pictures_of_any_size_are_reconstructed_by_a_folder_or_a_version(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    write_files(tmp_path / "mine", {"a.png": encoded(noise(0, 90, 40)), "b/c.jpg": encoded(noise(1, 20, 33), "JPEG")})
    arguments = ("reconstruct", "mine", "--levels", "2")
    champion = _asked(finished_run, tmp_path, *arguments)
    sheet = np.asarray(Image.open(champion["image"]))
    assert sheet.shape == (_HEADER + 2 * (_SIDE + _GAP), 3 * (_SIDE + _GAP) + _GAP, 3)
    for model in (str(finished_run.root), str(finished_run.root / "vq" / "model"), "models:/hvqd/1"):
        again = _asked(finished_run, tmp_path, *arguments, "--model", model)
        assert again["model"] == model
        np.testing.assert_array_equal(np.asarray(Image.open(again["image"])), sheet)


def test_a_root_without_a_champion_shows_its_own_tokenizer(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    for kind in ("dataset", "vq"):
        shutil.copytree(finished_run.root / kind, root / kind)
    shutil.copy(finished_run.root / "config.yaml", root)
    given = ("reconstruct", "val", "--root", str(root), "--out", "sheet.png", "--json")
    answer = run_hvqd(*given, cwd=tmp_path, env=finished_run.env).succeeded().answer
    assert answer["model"] == f"{root}/vq"
    assert not (root / "mlflow.db").exists(), "looking makes no store"


def test_the_codes_of_the_whole_dataset_are_inspected_with_the_use_that_was_encoded(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    answer = _asked(finished_run, tmp_path, "codes", "inspect", "test", "-n", "100000", "--codes", "5")
    shards = sorted((finished_run.root / "codes").glob("test-*.parquet"))
    assert shards
    for row in answer["levels"]:
        codes = np.concatenate(
            [pq.read_table(shard)[f"codes_{row['level']}"].combine_chunks().flatten().to_numpy() for shard in shards]
        )
        counts = np.bincount(codes, minlength=row["codebook_size"])
        assert row["used"] == pytest.approx((counts > 0).sum(), abs=2), "batches of another size may tip a picture"
        assert row["codes"] == len(codes)
        assert row["most_used"][0]["count"] == pytest.approx(counts.max(), abs=3)
    assert Image.open(answer["image"]).size[0] > 400


def test_a_training_leaves_its_pictures_beside_the_artifact_and_in_its_run(finished_run: FinishedRun) -> None:
    folder = open_store(str(finished_run.root)).child("vq")
    assert folder.read_bytes("pictures/latest.png")[:4] == b"\x89PNG"
    manifest = read_manifest(folder, "hvqd train vq")
    assert not [name for name in manifest.files if name.startswith("pictures/")], "no digest covers them"
    assert isinstance(manifest.facts["alarms"], list)
    tracker = open_tracker(None, "hvqd", open_store(str(finished_run.root)))
    experiment = tracker.client.get_experiment_by_name("hvqd").experiment_id
    (run,) = tracker.client.search_runs([experiment], "tags.`hvqd.step` = 'vq'")
    history = folder.read_json("history.json")
    evaluated = sorted({int(record["images"]) for record in history if "val_psnr" in record})
    assert evaluated
    names = [item.path for item in tracker.client.list_artifacts(run.info.run_id, "pictures")]
    assert names == [f"pictures/images-{images:012d}.png" for images in evaluated]
    levels = {name.rpartition("_")[2] for record in history for name in record if name.startswith("usage_")}
    assert levels == {"0", "1"}
    assert {"usage_0", "dead_codes_1", "codebook_norm_0", "val_code_norm_1"} <= set(run.data.metrics)


def _before_encoding(finished: FinishedRun, root: Path) -> None:
    """A copy of the run whose codes have to be made again."""
    for kind in ("dataset", "vq", "codes"):
        shutil.copytree(finished.root / kind, root / kind)
    shutil.copy(finished.root / "config.yaml", root)
    (root / "codes" / "manifest.json").unlink()


def test_encoding_says_how_fast_it_was_and_computes_as_asked(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    _before_encoding(finished_run, root)
    given = ("encode", "--root", str(root), "--json")
    auto = run_hvqd(*given, cwd=tmp_path, env=finished_run.env).succeeded()
    assert auto.answer["digest"] == finished_run.result["digests"]["codes"]
    provenance = read_manifest(open_store(str(root)).child("codes"), "hvqd encode").provenance
    speed = f"{provenance['images_per_second_per_process']:,.0f} images/s a process in {provenance['precision']}"
    assert speed in auto.err
    rough = run_hvqd(*given, "--precision", "bf16", cwd=tmp_path, env=finished_run.env).succeeded()
    assert "images/s a process in bf16" in rough.err
    assert rough.answer["digest"] != auto.answer["digest"]


def test_refined_codes_are_stored_and_decode_nearer_to_the_pictures(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    _before_encoding(finished_run, root)
    given = ("encode", "--root", str(root), "--set", "encode.refine_rounds=1", "--json")
    refined = run_hvqd(*given, cwd=tmp_path, env=finished_run.env).succeeded()
    assert refined.answer["digest"] != finished_run.result["digests"]["codes"]
    vq, store = load_model(root / "vq" / "model"), open_store(str(root))
    assert isinstance(vq, HierarchicalVQ)
    images = ImageTable.open(store.child("dataset"), read_manifest(store.child("dataset"), "hvqd data build"), "test")
    errors = []
    for folder in (open_store(str(finished_run.root)), store):
        codes = CodeTable.open(folder.child("codes"), read_manifest(folder.child("codes"), "hvqd encode"), "test")
        assert list(codes.ids) == list(images.ids)
        shown = vq.decode([torch.from_numpy(np.asarray(level)).long() for level in codes.codes])
        errors.append((shown - images.batch(slice(0, len(images)))).square().mean((1, 2, 3)))
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert (errors[1] < errors[0]).float().mean() > 0.9, "by little: the tokenizer has hardly learned anything"
