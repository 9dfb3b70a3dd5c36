"""What `hvqd tune` refuses: at once, in two lines, with status 2, before a cluster is started or anything written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from infra.storage import open_store
from tests.command_line import Finished, environment, run_hvqd
from tests.sweeps import SPACE, space_file
from tuning.identity import SweepIdentity, keep_identity
from tuning.loading import load_space


def refused(done: Finished, error: str, hint: str) -> None:
    """The command said just this, both patterns of whole lines."""
    lines = done.err.splitlines()
    assert (done.status, len(lines), done.out) == (2, 2, ""), done.err
    assert re.fullmatch(f"error: {error}", lines[0]), lines[0]
    assert re.fullmatch(f"hint: {hint}", lines[1]), lines[1]


def tune(folder: Path, *words: str, **changes: Any) -> Finished:
    """The command over the small space with changes."""
    space = space_file(folder, **changes)
    return run_hvqd("tune", space, "--root", str(folder / "root"), *words, cwd=folder, env=environment(folder))


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        (
            {"parameters": {"vq.model.codbook_sizes": {"choice": [[32, 64]]}}},
            r".*: unknown key: vq\.model\.codbook_sizes",
            r"did you mean vq\.model\.codebook_sizes\?",
        ),
        ({"parameters": {}}, r".*parameters must name at least one: none", r"`hvqd tune show vq` shows a space"),
        (
            {"constraints": ["tokens < 3"]},
            r"space small: none of 1,?000 draws is possible: tokens < 3 \(1000 times\)",
            r"widen the parameters or relax the constraint.*",
        ),
        (
            {"metrics": [{"name": "val_kid_samples"}]},
            r".*job vq does not report val_kid_samples",
            r"it reports val_psnr.*",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: str, hint: str
) -> None:
    refused(tune(tmp_path, **changes), error, hint)
    assert not (tmp_path / "root").exists()


def test_a_sweep_that_was_begun_otherwise_is_refused_with_what_differs(tmp_path: Path) -> None:
    space = load_space(space_file(tmp_path))
    keep_identity(open_store(str(tmp_path / "root")).child("tuning", "small"), SweepIdentity(space, "tpe", "asha", 0))
    wider = SPACE["parameters"] | {"vq.model.code_dim": {"choice": [8, 16, 32]}}
    said = r"the sweep at .*/tuning/small was begun otherwise: space\.parameters\.vq\.model\.code_dim\.choice was .*"
    hint = r"--name starts another sweep; --force goes on with this one, old trials beside new ones"
    refused(tune(tmp_path, "--resume", parameters=wider), said, hint)


def test_a_resume_of_nothing_names_the_sweeps_there_are(tmp_path: Path) -> None:
    (tmp_path / "root/tuning/other").mkdir(parents=True)
    said = r"there is no sweep to go on with at .*/tuning/small \(sweeps of this root: other\)"
    refused(tune(tmp_path, "--resume"), said, r"without --resume the same command begins it")
