"""Roots that others can write to: no file in one can run, and no secret gets into one."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.storage import Store, open_store
from tests.command_line import environment, run_hvqd
from tests.conftest import FinishedRun

# ---- bombs ----


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)


def bombs(mark: Path) -> dict[str, bytes]:
    """The bomb in each wrapping that some reader could undo."""
    as_torch, as_array = io.BytesIO(), io.BytesIO()
    torch.save({"weights": Bomb(mark)}, as_torch)
    np.save(as_array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return {"pickle": pickle.dumps(Bomb(mark)), "torch": as_torch.getvalue(), "array": as_array.getvalue()}


def test_the_bombs_are_live(tmp_path: Path) -> None:
    for name, content in bombs(tmp_path / "mark").items():
        with suppress(Exception):
            match name:
                case "pickle":
                    pickle.loads(content)
                case "torch":
                    torch.load(io.BytesIO(content), weights_only=False)
                case "array":
                    np.load(io.BytesIO(content), allow_pickle=True)
        assert (tmp_path / "mark").exists(), name
        (tmp_path / "mark").unlink()


WEIGHTS = (".safetensors", ".npy")


def readers(root: Store) -> Iterator[Callable[[], object]]:
    """Everything that reads files of a root, apart from what starts a cluster."""
    from hvqd_model.export import load_model
    from workflows.artifacts import check_files, find_manifest
    from workflows.context import Context
    from workflows.data.batches import CodeTable, ImageTable
    from workflows.loading import config_from, read_remembered
    from workflows.pipeline import plan
    from workflows.release.journal import Journal
    from workflows.reporting.report import write_report
    from workflows.training.checkpoint import StoreCheckpoints
    from workflows.training.inspection import find_checkpoints, garbage
    from workflows.training.plain import PlainEngine
    from workflows.training.worker import TrainingJob, build_stage

    def config() -> Any:
        return config_from({**(read_remembered(root) or {}), "root": root.url})

    def tables() -> None:
        for kind, table in (("dataset", ImageTable), ("codes", CodeTable)):
            manifest = find_manifest(root.child(kind))
            assert manifest is not None
            with suppress(Exception):
                check_files(root.child(kind), manifest)
            for split in ("train", "val", "test"):
                table.open(root.child(kind), manifest, split)  # type: ignore[attr-defined]

    def restore(stage: Any) -> None:
        saved = [each.saved for each in find_checkpoints(root, stage) if each.saved is not None]
        job = TrainingJob(stage, config(), root, saved[0].request)
        built = build_stage(job, torch.device("cpu"))
        engine = PlainEngine(built.objective, job.settings, torch.device("cpu"))
        StoreCheckpoints(root.child(stage, "checkpoints"), job.request, 9).restore(engine)

    yield lambda: plan(config(), root)
    yield tables
    for stage in ("vq", "prior"):
        yield lambda stage=stage: load_model(Path(root.url) / stage / "model")
        yield lambda stage=stage: restore(stage)
        yield lambda stage=stage: find_checkpoints(root, stage, thorough=True)
        yield lambda stage=stage: garbage(config(), root, stage)
    yield lambda: write_report(Context(config(), root))
    yield lambda: Journal(root.child("audit", "hvqd"), "hvqd").entries()


def test_no_file_of_a_root_can_run_anything(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(name: str) -> Path:
        monkeypatch.setenv("HVQD_CACHE", str(tmp_path / f"{name}-cache"))
        shutil.copytree(finished_run.root, tmp_path / name, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db"))
        return tmp_path / name

    whole = list(readers(open_store(str(fresh("whole")))))
    assert len(whole) == 12
    for read in whole:
        read()  # each of them reads what is there
    mark = tmp_path / "mark"
    for wrapping, content in bombs(mark).items():
        # A tensor file or an array that is wrapped as such is the likeliest to be undone by mistake; text is not.
        for suffix in (".parquet", ".safetensors", ".npy", ".json", ".yaml") if wrapping == "pickle" else WEIGHTS:
            root = fresh(f"{wrapping}{suffix}")
            cache = Path(os.environ["HVQD_CACHE"])
            if suffix == ".npy":  # arrays lie in the machine's cache alone, once they have been read
                for read in readers(open_store(str(root))):
                    read()
            files = [path for place in (root, cache) for path in place.rglob(f"*{suffix}") if path.is_file()]
            assert files, suffix
            for path in files:
                path.write_bytes(content)
            for read in readers(open_store(str(root))):
                with suppress(Exception):
                    read()
                assert not mark.exists(), f"{wrapping} in {suffix}"
            shutil.rmtree(root)


# ---- secrets ----

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE1234",
    "AWS_SECRET_ACCESS_KEY": "fakeSecretKey0123456789",
    "AWS_SESSION_TOKEN": "fakeSessionToken0123456789",
    "MLFLOW_TRACKING_PASSWORD": "fakeTrackingPassword0123",
    "RAY_AUTH_TOKEN": "fakeRayToken0123456789",
    "HVQD_TEST_DB": "fakeUrlPassword0123456789",
}


def written(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below folders."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()


def test_no_secret_is_in_anything_that_a_training_writes_or_says(tmp_path: Path) -> None:
    cwd, root = tmp_path / "cwd", tmp_path / "run"
    cwd.mkdir()
    env = environment(tmp_path, SECRETS)
    settings = ("--preset", "integration", "--root", str(root), "--set", "data.limit=100", "--set", "compute.workers=1")
    short = ("--set", "vq.train.images=96", "--set", "vq.train.checkpoint_every_images=32")
    built = run_hvqd("data", "build", *settings, cwd=cwd, env=env).succeeded()
    trained = run_hvqd("train", "vq", *settings, *short, "--debug", cwd=cwd, env=env).succeeded()
    url = f"http://me:{SECRETS['HVQD_TEST_DB']}@127.0.0.1:9/store"
    failed = run_hvqd(
        "train", "vq", *settings, *short, "--seed", "5", "--set", f"tracking.uri={url}", "--debug", cwd=cwd, env=env
    )
    assert failed.status == 1
    assert "me:***@127.0.0.1:9" in failed.err
    files = list(written(root, cwd, tmp_path / "cache"))
    assert sum(path.suffix == ".safetensors" for path, _ in files) >= 3, "checkpoints and the model"
    assert sum("logs" in path.parts for path, _ in files) >= 1
    said = [(Path(name), text.encode()) for name, text in (("out", failed.out), ("err", failed.err))]
    said += [(Path(name), text.encode()) for name, text in (("trained", trained.err), ("built", built.err))]
    for name, secret in SECRETS.items():
        assert [str(path) for path, content in [*files, *said] if secret.encode() in content] == [], name
