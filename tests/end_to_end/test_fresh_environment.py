"""A version in an environment that has nothing but what its own lock names: the same picture, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import FinishedRun

_SCRIPT = (
    "import importlib.util, json, sys, mlflow.pyfunc, pandas\n"
    "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
    "images = list(model.predict(pandas.DataFrame({'seed': [1, 2, 3]}))['image'])\n"
    "names = ('ray', 'deepspeed', 's3fs', 'botocore', 'typer', 'workflows', 'hvqd_model')\n"
    "print(json.dumps([images, [name for name in names if importlib.util.find_spec(name)]]))\n"
)


def _drawn(python: Path, source: str, folder: Path) -> tuple[list[str], list[str]]:
    """Three pictures, and which packages of ours and of training there are."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [str(python), "-c", _SCRIPT, source],
        cwd=folder,
        env={**kept, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    images, names = json.loads(done.stdout.splitlines()[-1])
    return images, names


@pytest.mark.long
def test_the_lock_alone_is_enough_and_the_pictures_are_the_same(finished_run: FinishedRun, tmp_path: Path) -> None:
    source = MlflowClient(f"sqlite:///{finished_run.root}/mlflow.db").get_model_version("hvqd", "1").source
    lock = Path(source) / "artifacts" / "bundle" / "requirements.lock"
    assert "torch==" in lock.read_text() and "ray==" not in lock.read_text()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", "-r", str(lock)]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=1_800, check=False)
    assert installed.returncode == 0, installed.stderr
    checked = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, f"the lock leaves something out: {checked.stdout}"
    fresh, there = _drawn(python, source, tmp_path)
    assert there == ["workflows", "hvqd_model"], "our own packages travel with the version, the others are not there"
    own, _ = _drawn(Path(sys.executable), source, tmp_path)
    assert fresh == own and len(set(fresh)) > 1
