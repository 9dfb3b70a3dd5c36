"""`hvqd tune` on a real cluster: how trials end, that one can be had again alone, and the jobs it can search over."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.storage import open_store
from tests.command_line import environment, run_hvqd
from tests.conftest import FinishedRun
from tests.sweeps import check_answer, check_whole, space_file, sweep_of
from tuning.ledger import read_trials
from tuning.loading import load_space
from tuning.pictures import judge_rung
from tuning.records import Status
from tuning.searcher import make_searcher
from workflows.context import Context
from workflows.loading import load_config

ENDS: dict[int, Status] = {0: "finished", 1: "failed", 2: "stopped", 3: "failed"}
EVERY_END: dict[str, Any] = {
    "base": {
        "preset": "integration",
        "set": {"compute.workers": 1, "vq.train.perceptual_network": "/nowhere/weights.pt"},
    },
    "parameters": {
        "vq.train.learning_rate": {"choice": [0.004, 1e-7]},
        "vq.train.perceptual_weight": {"choice": [0.0, 0.5]},
        "vq.model.width": {"choice": [16, 1024]},
    },
    "constraints": ["memory_gib <= 4"],
    "budget": {"trials": 8, "images": 320, "min_images": 160, "reduction_factor": 2},
}
"""The grid's draws: one that learns, one that asks for a file that is not there, one that does not learn, the like of
the second; and of each a sibling that needs 10 GiB."""


def dataset_of(finished: FinishedRun, root: Path, *more: str) -> Path:
    """A root with the finished run's dataset, and further artifacts."""
    for kind in ("dataset", *more):
        shutil.copytree(finished.root / kind, root / kind)
    return root


def test_trials_finish_fail_are_stopped_or_refused_and_one_alone_is_the_same_to_the_bit(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root, env = dataset_of(finished_run, tmp_path / "root"), environment(tmp_path)
    space = space_file(tmp_path, **EVERY_END)
    options = ("--searcher", "grid", "--max-concurrent", "1", "--root", str(root), "--json")
    done = run_hvqd("tune", space, *options, cwd=tmp_path, env=env).succeeded()
    check_answer(done.answer, ENDS)
    records = check_whole(root, ENDS)
    assert done.answer["refused"] == {"memory_gib <= 4": 4}
    assert [record.images for record in records] == [320, 0, 160, 0]
    for record in (records[1], records[3]):
        assert record.error is not None and "/nowhere/weights.pt" in record.error and "\n" not in record.error
    assert done.answer["best"]["trial"] == 0
    assert re.search(r"trial +2 +stopped early +160/320 images", done.err)
    assert "<html" in Path(done.answer["report"]).read_text()[:200]

    alone = dataset_of(finished_run, tmp_path / "alone")
    trial = root / "tuning/small/trials/0000"
    best = str(root / "tuning/small/best.yaml")
    again = ("train", "vq", "--config", str(trial / "trial.yaml"), "--root", str(alone), "--json")
    run_hvqd(*again, cwd=tmp_path, env=env).succeeded()
    digests = [hashlib.sha256((folder / "vq/model/weights.safetensors").read_bytes()) for folder in (trial, alone)]
    assert digests[0].hexdigest() == digests[1].hexdigest()
    histories = [json.loads((folder / "vq/history.json").read_text()) for folder in (trial, alone)]
    assert histories[0] == histories[1]
    last = {name: value for line in histories[1] for name, value in line.items() if name.startswith("val_")}
    assert last.items() <= dict(records[0].rungs[-1].metrics).items()
    dry = run_hvqd("train", "vq", "--config", best, "--root", str(alone), "--dry-run", "--json", cwd=tmp_path, env=env)
    assert "current" in json.dumps(dry.succeeded().answer)


@pytest.mark.long
def test_a_sweep_begins_with_what_a_former_one_knew(finished_run: FinishedRun, tmp_path: Path) -> None:
    root, env = dataset_of(finished_run, tmp_path / "root"), environment(tmp_path)
    space = space_file(tmp_path, budget={"trials": 8, "images": 320, "min_images": 160})
    options = ("--scheduler", "none", "--root", str(root), "--json")
    run_hvqd("tune", space, *options, "--trials", "2", cwd=tmp_path, env=env).succeeded()
    former = read_trials(sweep_of(root))
    warm = ("--name", "warm", "--trials", "1", "--warm-from", sweep_of(root).url)
    run_hvqd("tune", space, *options, *warm, cwd=tmp_path, env=env).succeeded()
    (record,) = read_trials(sweep_of(root, "warm"))
    cold = make_searcher("tpe", load_space(space), 0).propose(0)
    assert cold == former[0].drawn != record.drawn
    assert record.drawn not in [trial.drawn for trial in former]
    assert json.loads((root / "tuning/warm/warm.json").read_text())[1]["drawn"] == former[1].drawn
    nothing = ("--name", "other", "--warm-from", str(root))
    refused = run_hvqd("tune", space, *options, *nothing, cwd=tmp_path, env=env)
    assert refused.status == 2 and "none of the 0 trials that ended" in refused.err


PRIORS: dict[str, Any] = {
    "job": "prior",
    "base": {"preset": "integration", "set": {"compute.workers": 1, "sampling.steps": 2}},
    "parameters": {
        "prior.model.noise": {"choice": ["absorbing", "gaussian"]},
        "sampling.guidance": {"choice": [2.0]},
    },
    "metrics": [{"name": "val_kid_samples", "direction": "min"}],
    "budget": {"trials": 2, "images": 640, "min_images": 320, "rung_samples": 16},
}


@pytest.mark.long
def test_pictures_at_a_rung_are_those_of_its_checkpoint_and_the_last_one_waits_for_the_end(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = dataset_of(finished_run, tmp_path / "root", "vq", "codes", "prior")
    context = Context(load_config(None, finished_run.root / "config.yaml", [], str(root)), open_store(str(root)))
    space = load_space(space_file(tmp_path, **PRIORS))
    assert space.judges_pictures and space.needs_latents and space.rungs == (320, 640)
    judged = judge_rung(context, space, 320)
    assert judged is not None and judged[0] == 320
    assert judged[1].keys() == {"val_kid_samples", "val_recall_samples"}
    assert judge_rung(context, space, 320) == judged
    assert (root / "samples.png").exists()
    assert judge_rung(context, space, 321) is None
    shutil.rmtree(next(root.glob("prior/checkpoints/000000000320-*")))
    assert judge_rung(context, space, 320) is None, "only the last one is left"


@pytest.mark.long
def test_priors_are_compared_by_their_pictures_also_at_rungs_and_gaussian_ones_beside_the_others(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root, env = dataset_of(finished_run, tmp_path / "root", "vq", "codes"), environment(tmp_path)
    before = (root / "codes/manifest.json").read_bytes()
    space = space_file(tmp_path, **PRIORS)
    options = ("--searcher", "grid", "--scheduler", "none", "--root", str(root), "--json")
    done = run_hvqd("tune", space, *options, cwd=tmp_path, env=env).succeeded()
    ends: dict[int, Status] = {0: "finished", 1: "finished"}
    check_answer(done.answer, ends)
    records = check_whole(root, ends)
    assert [record.drawn["prior.model.noise"] for record in records] == ["absorbing", "gaussian"]
    for record in records:
        assert [rung.images for rung in record.rungs] == [320, 640]
        assert all({"val_kid_samples", "val_recall_samples"} <= set(rung.metrics) for rung in record.rungs)
        assert "val_kid_reconstructions" in record.rungs[-1].metrics
        assert (root / f"tuning/small/trials/{record.number:04d}/samples.png").read_bytes()[:4] == b"\x89PNG"
    assert (root / "codes/manifest.json").read_bytes() == before
    assert json.loads((root / "tuning/small/codes/manifest.json").read_text())["facts"]["latents"]


@pytest.mark.long
def test_a_joint_trial_is_a_tokenizer_and_a_prior_on_it_and_stops_at_the_priors_rungs(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root, env = dataset_of(finished_run, tmp_path / "root"), environment(tmp_path)
    parameters = {
        "vq.model.codebook_sizes": {"choice": [[32, 64], [16, 128]]},
        "prior.train.learning_rate": {"choice": [0.003]},
    }
    joint = PRIORS | {"job": "joint", "parameters": parameters, "constraints": ["100 <= bits <= 200"]}
    space = space_file(tmp_path, **joint)
    options = ("--searcher", "grid", "--max-concurrent", "1", "--root", str(root), "--json")
    done = run_hvqd("tune", space, *options, cwd=tmp_path, env=env).succeeded()
    records = read_trials(sweep_of(root))
    worse = (
        "stopped" if records[1].value("val_kid_samples", 320) > records[0].value("val_kid_samples", 320) else "finished"
    )
    ends: dict[int, Status] = {0: "finished", 1: worse}
    check_answer(done.answer, ends)
    check_whole(root, ends)
    known = {"val_psnr", "val_bits_total", "val_kid_samples", "val_kid_reconstructions"}
    assert known <= records[0].rungs[-1].metrics.keys()
    assert [rung.images for rung in records[0].rungs] == [320, 640]
    assert (root / "tuning/small/trials/0000/codes/manifest.json").exists()
