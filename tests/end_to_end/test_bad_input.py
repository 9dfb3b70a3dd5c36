"""Bad input and a failing environment: two lines, the right status, nothing half-written, earlier artifacts intact."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from infra.storage import open_store
from tests.command_line import Finished, environment, on_small_disk, run_hvqd
from tests.conftest import FinishedRun
from tests.services import free_ports
from workflows.artifacts import check_files, read_manifest
from workflows.pipeline import STEPS


def _refused(done: Finished, status: int, error: str, hint: str) -> None:
    """The command ended with this status and, last, these two lines; both are patterns of whole lines."""
    lines = done.err.splitlines()
    assert done.status == status, done.err
    assert len(lines) >= 2
    assert re.fullmatch(f"error: {error}", lines[-2])
    assert re.fullmatch(f"hint: {hint}", lines[-1])
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("settings", "error", "hint"),
    [
        (
            ["data.image_size=[20,20]"],
            r"image_size must be a multiple of the coarsest stride \(8\): \[20, 20\]",
            r"image_size=\[\d+, \d+\], strides that divide \[20, 20\], or padding=edge",
        ),
        (
            ["vq.model.strides=[4,8]"],
            r"vq\.model: strides must not grow from level to level, coarse first: \[4, 8\]",
            r"for example strides=\[8,4\]",
        ),
        (
            ["prior.train.global_batch=40"],
            r"prior\.train\.global_batch must be a multiple of micro_batch x workers \(16 x 2\): 40",
            r"the nearest is prior\.train\.global_batch=(32|64)",
        ),
        (
            ["compute.workers=3"],
            r"vq\.train\.global_batch must be a multiple of micro_batch x workers \(16 x 3\): 32",
            r"the nearest is vq\.train\.global_batch=48",
        ),
        (
            ["data.validation_share=0.6", "data.test_share=0.5"],
            r"data\.validation_share \+ data\.test_share must leave something to train on: 0\.6 \+ 0\.5",
            r"0\.06 and 0\.05 are the defaults",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: list[str], error: str, hint: str, tmp_path: Path
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    done = run_hvqd("run", "--preset", "integration", *flags, cwd=tmp_path, env=environment(tmp_path))
    _refused(done, 2, error, hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "error", "hint"),
    [
        (None, r"no such configuration file: mine\.yaml", r"`hvqd config show` prints one to edit"),
        (b"vq: [unclosed", r"mine\.yaml is not valid YAML: .*line 1.*", r"`hvqd config show` prints a valid one"),
        (b"- a\n- b\n", r"mine\.yaml must hold keys and values, not a list", r"`hvqd config show` prints a valid one"),
        (b"\xff\xfe\x00\x80", r"cannot read the configuration file mine\.yaml: .*'utf-8'.*", "give a YAML file"),
        (b"vq: {train: {image: 3}}", r"unknown key: vq\.train\.image", r"did you mean vq\.train\.images\?"),
    ],
)
def test_a_bad_configuration_file_is_refused(content: bytes | None, error: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content)
    done = run_hvqd("run", "--config", "mine.yaml", cwd=tmp_path, env=environment(tmp_path))
    _refused(done, 2, error, hint)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["mine.yaml"])


# ---- the environment ----


@pytest.mark.parametrize("root", ["in-the-way", "in-the-way/run", "/proc/run"])
def test_a_root_that_cannot_be_written_is_named(root: str, tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("a file\n")
    done = run_hvqd("run", "--preset", "integration", "--root", root, cwd=tmp_path, env=environment(tmp_path))
    _refused(done, 1, rf"cannot (read|write) .*{root}.*", "choose a root that can be written")
    assert (tmp_path / "in-the-way").read_text() == "a file\n"


def test_no_ray_cluster_at_the_address_is_said_within_seconds(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    arguments = ("data", "build", "--preset", "integration", "--root", "run", "--set", f"compute.address={address}")
    done = run_hvqd(*arguments, cwd=tmp_path, env=environment(tmp_path), timeout_seconds=60)
    _refused(done, 1, rf"no Ray cluster answers at {address}: .*refused", "check compute.address, or leave it out .*")
    wrong = run_hvqd(*arguments[:-1], "compute.address=here", cwd=tmp_path, env=environment(tmp_path))
    _refused(wrong, 2, r"compute\.address must be auto, host:port .*: here", r"for example 10\.0\.0\.1:6379")
    assert not list((tmp_path / "run").glob("dataset/*"))


@pytest.mark.parametrize("spare_bytes", [300_000, 1_600_000])
def test_a_full_disk_is_reported_and_earlier_artifacts_stay_intact(
    finished_run: FinishedRun, spare_bytes: int, tmp_path: Path
) -> None:
    """The disk is full when the step is recorded, or when it writes its features."""
    root = _copy(finished_run, tmp_path, "dataset", "vq", "codes", "prior")
    done = run_hvqd(
        "evaluate",
        "--root",
        str(root),
        "--json",
        cwd=tmp_path,
        env=finished_run.env,
        within=on_small_disk(root, spare_bytes),
    )
    hint = "free some space.* earlier artifacts are intact, the same command goes on"
    assert done.status == 1, done.err
    error, remedy = done.err.splitlines()[-2:]
    assert re.fullmatch(rf"error: cannot write .*{root}/.*: (the disk is full|no space left on the device)", error)
    assert re.fullmatch(f"hint: {hint}", remedy)
    after = tmp_path / "run-after"
    assert not (after / "evaluation" / "manifest.json").exists()
    assert not list(after.rglob("*.partial"))
    for kind in ("dataset", "vq", "codes", "prior"):
        store = open_store(str(after / kind))
        check_files(store, read_manifest(store, kind), deep=True)
    again = run_hvqd("evaluate", "--root", str(after), "--json", cwd=tmp_path, env=finished_run.env).succeeded()
    assert again.answer["digest"] == finished_run.result["digests"]["evaluation"]


# ---- damaged artifacts ----


def _copy(finished_run: FinishedRun, tmp_path: Path, *kinds: str) -> Path:
    """A new root with these artifacts of the finished one."""
    root = tmp_path / "run"
    for kind in kinds:
        shutil.copytree(finished_run.root / kind, root / kind)
    shutil.copy(finished_run.root / "config.yaml", root)
    return root


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_named_with_how_to_rebuild(finished_run: FinishedRun, damage: str, tmp_path: Path) -> None:
    root = _copy(finished_run, tmp_path, "dataset")
    shard = root / "dataset" / "train-00001.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    what = rf"has {len(content) - 100} bytes instead of {len(content)}"
    if damage == "gone":
        shard.unlink()
        what = "is missing"
    done = run_hvqd("run", "--root", str(root), cwd=tmp_path, env=finished_run.env)
    remedy = rf"delete {root}/dataset/manifest\.json and run the same command again to rebuild the dataset"
    _refused(done, 2, rf"{shard} {what}", remedy)


def test_a_flipped_byte_in_a_shard_is_named_by_the_step_that_reads_it(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Following the hint then makes the same dataset as before."""
    root = _copy(finished_run, tmp_path, "dataset", "vq")
    shard = root / "dataset" / "train-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run_hvqd("encode", "--root", str(root), cwd=tmp_path, env=finished_run.env)
    error, hint = done.err.splitlines()[-2:]
    assert done.status == 2
    assert error == f"error: the shard {shard} is damaged: its digest has changed"
    assert re.fullmatch(rf"hint: delete {root}/dataset/manifest\.json and run .* to rebuild the dataset", hint)
    (root / "dataset" / "manifest.json").unlink()
    rebuilt = run_hvqd("data", "build", "--root", str(root), "--json", cwd=tmp_path, env=finished_run.env).succeeded()
    assert rebuilt.answer["digest"] == finished_run.result["digests"]["dataset"]


@pytest.mark.parametrize("kind", list(STEPS))
def test_a_damaged_manifest_is_named_with_how_to_rebuild(finished_run: FinishedRun, kind: str, tmp_path: Path) -> None:
    root = _copy(finished_run, tmp_path, *STEPS)
    manifest = root / kind / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    done = run_hvqd("run", "--root", str(root), "--dry-run", cwd=tmp_path, env=finished_run.env)
    remedy = rf"delete {manifest} and run the same command again to rebuild it"
    _refused(done, 2, rf"the manifest {manifest} is damaged: .*", remedy)


def test_a_manifest_that_was_edited_is_refused(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = _copy(finished_run, tmp_path, "dataset")
    manifest = root / "dataset" / "manifest.json"
    manifest.write_text(re.sub(r'"rejected": \d+', '"rejected": 9', manifest.read_text()))
    done = run_hvqd("run", "--root", str(root), "--dry-run", cwd=tmp_path, env=finished_run.env)
    _refused(done, 2, rf"the manifest {manifest} does not match its own digest", r"delete .*/manifest\.json and run .*")


# ---- drawing ----


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["-n", "0"], "-n must be at least 1: 0", "for example -n 16"),
        (["-n", "-3"], "-n must be at least 1: -3", "for example -n 16"),
        (["--class", "animal"], r"no such class: animal \(the model knows .*\)", r"did you mean 'animals & nature'\?"),
        (["--model", "nowhere"], r"no model at .*/nowhere: neither .*", r"name a run's root or .*"),
        (
            ["--model", "models:/hvqd@best"],
            "no version of the model hvqd has the alias best",
            ".* promote .*",
        ),
        (["--model", "models:/else@champion"], "no version of the model else has the alias champion", ".*"),
        (
            ["--model", "models:/hvqd/99"],
            r"the registry at .* has no version 99 of the model hvqd",
            r"`hvqd register`.*",
        ),
        (["--model", "models:/hvqd"], r"a model is named .*: models:/hvqd", r"models:/hvqd@champion"),
        (["--root", "nowhere"], r"there is no registry at sqlite:///.*/nowhere/mlflow\.db", r"name a run's root .*"),
    ],
)
def test_a_wrong_request_for_pictures_is_refused(
    finished_run: FinishedRun, arguments: list[str], error: str, hint: str, tmp_path: Path
) -> None:
    common = ("sample", "--root", str(finished_run.root), "--out", "grid.png")
    done = run_hvqd(*common, *arguments, cwd=tmp_path, env=finished_run.env)
    _refused(done, 2, error, hint)
    assert len(done.err.splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {".hvqd"}, "a log at most"


@pytest.mark.parametrize(
    ("command", "arguments", "error", "hint"),
    [
        ("reconstruct nowhere", [], r"no such picture, folder or split: nowhere \(splits are train, val, test\)", ".*"),
        ("reconstruct folder", [], r"no pictures in the folder folder", r"name a folder with files such as .*"),
        ("reconstruct folder/a.txt", [], r"no picture that can be read at folder/a\.txt: .*known format", ".*PNG.*"),
        ("reconstruct test", ["-n", "0"], "-n must be at least 1: 0", "for example -n 16"),
        ("reconstruct test", ["--levels", "0..2"], r"--levels must be .* within 1\.\.2: 0\.\.2", "1 is the coarsest.*"),
        ("reconstruct test", ["--levels", "3"], r"--levels must be .* within 1\.\.2: 3", "1 is the coarsest .*"),
        (
            "reconstruct test",
            ["--model", "nowhere"],
            r"no tokenizer at .*/nowhere: neither .*",
            "name a run's root or .*",
        ),
        ("reconstruct test", ["--model", "models:/hvqd/99"], r"the registry .* has no version 99 .*", ".*"),
        ("reconstruct test", ["--root", "nowhere"], "no tokenizer: hvqd has no champion, .*", "`hvqd train vq` .*"),
        ("codes inspect", ["--codes", "0"], "--codes must be at least 1: 0", "for example --codes 24"),
        ("codes inspect nowhere", [], "no such picture, folder or split: nowhere .*", "name a file, .*"),
    ],
)
def test_a_wrong_request_to_see_a_tokenizer_is_refused(
    finished_run: FinishedRun, command: str, arguments: list[str], error: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("no picture\n")
    given = (*command.split(), "--root", str(finished_run.root), "--out", "sheet.png", *arguments)
    done = run_hvqd(*given, cwd=tmp_path, env=finished_run.env)
    _refused(done, 2, error, hint)
    assert len(done.err.splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {".hvqd", "folder"}, "a log at most"


def test_promoting_what_is_not_there_is_refused(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = str(finished_run.root)
    done = run_hvqd("promote", "--root", root, "--version", "99", "--dry-run", cwd=tmp_path, env=finished_run.env)
    _refused(done, 2, r"the registry at .* has no version 99 of the model hvqd", r"`hvqd register` makes one; .*")
