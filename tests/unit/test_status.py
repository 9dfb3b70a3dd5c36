"""The state of a pipeline, read from nothing but the files of its root."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.errors import InputError
from infra.storage import Store
from tests.command_line import environment, run_hvqd
from workflows.artifacts import write_manifest
from workflows.config import RunConfig
from workflows.loading import load_config, remember
from workflows.requests import request_of
from workflows.status import PipelineState, StepState, pipeline_state, status_text


@pytest.fixture
def root(tmp_path: Path) -> Store:
    """A root with a finished dataset and a tokenizer on its way."""
    store, config = Store(str(tmp_path / "root")), load_config("integration")
    remember(config, store)
    dataset = store.child("dataset")
    dataset.write_bytes("train-00000.parquet", b"rows")
    write_manifest(dataset, "dataset", request_of("dataset", config, {}), {}, provenance={"seconds": 3.0})
    moment = (datetime.now(UTC) - timedelta(seconds=90)).isoformat(timespec="seconds")
    for images, history in ((160, [{"images": 160, "loss": 0.5}]), (320, [{"images": 320, "loss": 0.25}])):
        checkpoint = {"images_seen": images, "history": history, "written_at": moment}
        store.child("vq", "checkpoints", f"{images:012d}-w1").write_json("manifest.json", checkpoint)
    store.child("vq", "checkpoints", f"{480:012d}-w1").write_bytes("rank0.pt", b"half")
    return store


def config() -> RunConfig:
    return load_config("integration")


def by_kind(state: PipelineState) -> dict[str, StepState]:
    return {step.kind: step for step in state.steps}


def test_finished_begun_and_missing_steps_are_told_apart(root: Store) -> None:
    state = pipeline_state(config(), root)
    assert {step.kind: step.state for step in state.steps} == {
        "dataset": "current",
        "vq": "under way",
        "codes": "missing",
        "prior": "missing",
        "evaluation": "missing",
        "registration": "missing",
    }
    assert state.next_command == f"hvqd train vq --root {root.url}"
    assert state.champion is None


def test_the_newest_complete_checkpoint_tells_how_far_and_how_old(root: Store) -> None:
    found = by_kind(pipeline_state(config(), root))["vq"].checkpoint
    assert found is not None
    assert (found.images_seen, found.last, found.unfinished) == (320, {"loss": 0.25}, 1)
    assert found.age_seconds is not None and 90 <= found.age_seconds < 600
    text = status_text(pipeline_state(config(), root))
    assert "checkpoint at 320 of 640 images (50%)" in text
    assert "loss 0.25" in text


def test_a_step_of_other_settings_is_stale(root: Store) -> None:
    other = config().model_copy(update={"data": config().data.model_copy(update={"resize": "pad"})})
    assert by_kind(pipeline_state(other, root))["dataset"].state == "stale"


def test_a_damaged_step_is_named_and_the_others_are_shown(root: Store) -> None:
    (root.path / "dataset" / "train-00000.parquet").write_bytes(b"other rows")
    state = pipeline_state(config(), root)
    assert by_kind(state)["dataset"].state == "damaged"
    assert "damaged   " in status_text(state) and "train-00000.parquet has 10 bytes instead of 4" in status_text(state)


def test_a_tracking_server_keeps_the_champion_to_itself(root: Store) -> None:
    tracking = config().tracking.model_copy(update={"uri": "http://user:secret@mlflow:5000"})
    state = pipeline_state(config().model_copy(update={"tracking": tracking}), root)
    assert state.champion is None
    assert "http://user:***@mlflow:5000 keeps the journal" in state.champion_from


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no pipeline at .*\nhint: name the root of a run"):
        pipeline_state(config(), Store(str(tmp_path)))


def test_the_command_reads_a_root_by_the_settings_it_remembers_and_writes_nothing(root: Store, tmp_path: Path) -> None:
    before = root.files()
    env = environment(tmp_path, {"HVQD_LOGS": str(tmp_path / "logs")})
    done = run_hvqd("status", str(root.path), "--json", cwd=tmp_path, env=env).succeeded()
    answer = json.loads(done.out.splitlines()[-1])
    assert {step["kind"]: step["state"] for step in answer["steps"]}["vq"] == "under way"
    assert answer["next"] == f"hvqd train vq --root {root.url}"
    assert root.files() == before
