"""Using a promoted model: `hvqd sample`, MLflow and its server draw the same pictures, and the report is whole."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.command_line import run_hvqd
from tests.conftest import FinishedRun
from tests.services import free_ports
from workflows.drawing.bundle import load_bundle
from workflows.drawing.generate import draw_images
from workflows.drawing.sample import seeds_for
from workflows.loading import load_config

_SIDE, _SCALE, _GAP = 16, 8, 2
_SERVE_SECONDS = 180.0
_SEED = 3


@pytest.fixture(scope="module")
def champion_pictures(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """(16, H, W, 3) pictures that the champion draws for the seed, read off the grid."""
    folder = tmp_path_factory.mktemp("sample")
    _sample(finished_run, folder, "-n", "16", "--seed", str(_SEED))
    return _pictures(folder / "grid.png", 16, columns=4)


def test_a_folder_draws_the_champions_pictures_however_many_are_asked_for(
    finished_run: FinishedRun, champion_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    _sample(finished_run, tmp_path, "-n", "5", "--seed", str(_SEED), "--model", str(finished_run.root))
    np.testing.assert_array_equal(_pictures(tmp_path / "grid.png", 5, columns=2), champion_pictures[:5])
    assert len(np.unique(champion_pictures.reshape(16, -1), axis=0)) > 8, "pictures differ from each other"


def test_the_recipe_beside_a_grid_draws_it_again(finished_run: FinishedRun, tmp_path: Path) -> None:
    asked = ("--class", "Flags", "-n", "4", "--seed", "5", "--steps", "3", "--guidance", "2", "--sampler", "ancestral")
    answer = _sample(finished_run, tmp_path, *asked)
    recipe = json.loads(Path(answer["recipe"]).read_text())
    expected = {
        "sampler": "ancestral",
        "steps": 3,
        "guidance": 2.0,
        "guidance_interval": [0.0, 1.0],
        "fine_guidance": None,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "gumbel_scale": 1.0,
        "gaussian_sampler": "dpm-solver++",
        "eta": 0.0,
        "batch": 16,
    }
    assert (recipe["class"], recipe["count"], recipe["seed"], recipe["sampling"]) == ("Flags", 4, 5, expected)
    (tmp_path / "again").mkdir()
    settings = [
        part for name, value in recipe["sampling"].items() for part in ("--set", f"sampling.{name}={json.dumps(value)}")
    ]
    again = ("--class", recipe["class"], "-n", str(recipe["count"]), "--seed", str(recipe["seed"]), *settings)
    repeated = _sample(finished_run, tmp_path / "again", *again)
    assert Path(repeated["image"]).read_bytes() == Path(answer["image"]).read_bytes()
    assert json.loads(Path(repeated["recipe"]).read_text()) == recipe


def test_mlflow_loads_the_champion_without_pickle_and_draws_the_same_pictures(
    finished_run: FinishedRun, champion_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    """In a fresh process that knows nothing of this project but the registry's address."""
    script = (
        "import json, sys, mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model('models:/hvqd@champion')\n"
        "frame = model.predict(pandas.DataFrame({'seed': json.loads(sys.argv[1])}))\n"
        "print(json.dumps(list(frame['image'])))\n"
    )
    seeds = seeds_for(_SEED, 3)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(seeds)],
        cwd=tmp_path,
        env=_mlflow_environment(finished_run),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    images = [_decoded(text) for text in json.loads(done.stdout.splitlines()[-1])]
    np.testing.assert_array_equal(np.stack(images), champion_pictures[:3])


def test_mlflow_serves_the_champion(
    finished_run: FinishedRun, champion_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    (first,) = seeds_for(_SEED, 1)
    bundle, seeds = load_bundle(finished_run.root), list(range(16))
    sampling = load_config("integration").sampling
    by_class = [
        draw_images(bundle.vq, bundle.prior, seeds, [label] * len(seeds), sampling)
        for label in range(len(bundle.classes))
    ]
    assert len(np.unique(np.stack(by_class).reshape(len(by_class), -1), axis=0)) > 1, "the class matters"
    with _served(finished_run, tmp_path) as address:
        drawn = _invoke(address, {"dataframe_split": {"columns": ["seed"], "data": [[first]]}})
        asked = [[name, seed] for name in ("Flags", "symbols") for seed in seeds]
        served = _invoke(address, {"dataframe_split": {"columns": ["class", "seed"], "data": asked}})
        with pytest.raises(urllib.error.HTTPError, match="HTTP Error 400"):
            _invoke(address, {"dataframe_split": {"columns": ["seed"], "data": [["no number"]]}})
    np.testing.assert_array_equal(_decoded(drawn[0]["image"]), champion_pictures[0])
    expected = [by_class[bundle.classes.index(name)] for name in ("flags", "symbols")]
    np.testing.assert_array_equal(np.stack([_decoded(row["image"]) for row in served]), np.concatenate(expected))


def test_the_report_holds_all_it_shows_in_one_file(finished_run: FinishedRun) -> None:
    text = Path(finished_run.result["report"]).read_text()
    page = _Page()
    page.feed(text)
    assert len([address for address in page.addresses if address.startswith("data:image/")]) >= 5
    assert [address for address in page.addresses if not address.startswith(("data:", "#"))] == []
    assert "@import" not in text
    assert all(digest[:12] in text for digest in finished_run.result["digests"].values()), "lineage"


# ---- plumbing ----


class _Page(HTMLParser):
    """Collects the addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag points to; a link that only a click follows is no fetch."""
        fetched = {"src", "srcset", "data", "poster", "href", "xlink:href"} - ({"href"} if tag == "a" else set())
        self.addresses += [value or "" for name, value in attrs if name in fetched]


def _sample(finished: FinishedRun, folder: Path, *more: str) -> dict[str, Any]:
    arguments = ("sample", "--root", str(finished.root), "--out", "grid.png", "--json", *more)
    return run_hvqd(*arguments, cwd=folder, env=finished.env).succeeded().answer


def _pictures(grid: Path, count: int, columns: int) -> NDArray[np.uint8]:
    """(count, H, W, 3) pictures cut out of a grid, one pixel for each of its blocks."""
    pixels, step = np.asarray(Image.open(grid).convert("RGB")), _SIDE * _SCALE + _GAP
    corners = [(index // columns * step, index % columns * step) for index in range(count)]
    cells = [pixels[top : top + _SIDE * _SCALE, left : left + _SIDE * _SCALE] for top, left in corners]
    return np.stack([cell[::_SCALE, ::_SCALE] for cell in cells])


def _decoded(text: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def _mlflow_environment(finished: FinishedRun) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {
        **{name: value for name, value in finished.env.items() if name != "PYTHONPATH"},
        "PATH": f"{bin_folder}{os.pathsep}{finished.env.get('PATH', '')}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{finished.root}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "DO_NOT_TRACK": "true",
    }


@contextmanager
def _served(finished: FinishedRun, folder: Path) -> Iterator[str]:
    """The address of `mlflow models serve` for the champion, once it answers."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/hvqd@champion"]
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=_mlflow_environment(finished),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _SERVE_SECONDS
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, f"no answer: {log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _invoke(address: str, content: dict[str, Any]) -> list[dict[str, str]]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        predictions: list[dict[str, str]] = json.load(response)["predictions"]
    return predictions
