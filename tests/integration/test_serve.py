"""`hvqd serve` over real HTTP: pictures as `hvqd sample` draws them, strangers refused, a swap that drops nothing."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.models import Registry
from tests.command_line import run_hvqd
from tests.conftest import FinishedRun
from tests.malformed_requests import MOST_BYTES, malformed_requests
from tests.served import Running, serving
from tests.services import free_ports
from tests.unit.test_drawing import map_png, save
from workflows.drawing.asking import Asked, resolve
from workflows.drawing.bundle import load_bundle, served_sampling
from workflows.drawing.generate import draw_images
from workflows.drawing.sample import seeds_for
from workflows.serving.models import as_png

_SWAP_SECONDS = 120.0
_MEMORY_BYTES = 60 * 2**20
_FLAT_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def server(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the finished run's champion, on a copy of its registry."""
    folder = tmp_path_factory.mktemp("serve")
    root, (port,) = folder / "run", free_ports(1)
    shutil.copytree(finished_run.root, root)
    settings = {"follow_seconds": 0.3, "max_body_bytes": MOST_BYTES}
    with serving(root, port, folder, finished_run.env, settings) as running:
        yield running


def test_a_request_draws_what_sample_draws_however_it_is_batched(server: Running) -> None:
    bundle = load_bundle(server.root)
    sampling = served_sampling(bundle).model_copy(update={"steps": 4})
    seeds = seeds_for(7, 5)
    label = bundle.classes.index("flags")
    expected = [as_png(image) for image in draw_images(bundle.vq, bundle.prior, seeds, [label] * 5, sampling)]
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.draw(seed=7, n=5, steps=4, **{"class": "Flags"})))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for answer in answers:
        assert [base64.b64decode(image) for image in answer["images"]] == expected
        assert (answer["version"], answer["seed"], answer["steps"], answer["class"]) == ("1", 7, 4, ["flags"] * 5)
    counted = server.metrics()
    assert counted["hvqd_pictures_total"] >= 20 and counted["hvqd_batches_total"] < counted["hvqd_pictures_total"] / 2
    free = server.draw(seed=3, n=2)
    assert free["steps"] == 4 and all(name in bundle.classes for name in free["class"])


def test_200_malformed_requests_are_refused_by_name_and_leave_the_server_as_it_was(server: Running) -> None:
    cases = list(malformed_requests())
    assert len(cases) >= 280
    server.draw(seed=1)
    replica = _replica(server)
    before = _resident_bytes(replica)
    for case in cases:
        status, body = server.ask(case.method, case.path, case.body, case.headers)
        assert status == case.status, f"{case.name}: {status} {body[:200]!r}"
        answer = json.loads(body)
        assert set(answer) == {"error", "hint"} and len(answer["error"]) > 5 and len(answer["hint"]) > 5, case.name
        assert "Traceback" not in body.decode(), case.name
    assert server.health()["status"] == "ok" and len(server.draw(seed=1)["images"]) == 1
    assert _replica(server) == replica, "the same process as before"
    assert _resident_bytes(replica) - before < _MEMORY_BYTES
    after_once = _resident_bytes(replica)
    for case in cases:
        assert server.ask(case.method, case.path, case.body, case.headers)[0] == case.status, case.name
    assert _resident_bytes(replica) - after_once < _FLAT_BYTES, "what is asked again leaves nothing behind"
    assert not Path("/tmp/owned").exists()


def test_a_swap_under_load_drops_no_request_and_a_version_that_fails_never_takes_over(
    server: Running, finished_run: FinishedRun, tmp_path: Path
) -> None:
    registry = Registry(f"sqlite:///{server.root}/mlflow.db")
    source = Path(registry.source("hvqd", "1"))
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    weights = broken / "artifacts" / "bundle" / "prior" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = registry.client.search_runs(["1"], max_results=1)[0].info.run_id
    whole = registry.create("hvqd", str(source), run, registry.tags("hvqd", "1"), "the same once more")
    bad = registry.create("hvqd", str(broken), run, {}, "half a file")
    seen: list[str] = []
    failures: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                seen.append(server.draw(seed=1, n=2)["version"])
            except (OSError, AssertionError) as error:
                failures.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    _await("a first answer", lambda: "1" in seen)
    registry.set_alias("hvqd", "champion", bad)
    _await("the refusal of the broken version", lambda: bad in server.health()["refused"])
    registry.set_alias("hvqd", "champion", whole)
    _await("the swap", lambda: server.health()["version"] == whole and whole in seen)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == [] and set(seen) == {"1", whole} and len(seen) > 5
    counted = server.metrics()
    assert (counted["hvqd_swaps_total"], counted["hvqd_returns_total"]) == (1, 0)


def test_a_request_says_style_caption_and_map_where_the_model_was_trained_with_them(
    server: Running, tmp_path: Path
) -> None:
    registry = Registry(f"sqlite:///{server.root}/mlflow.db")
    folder, told = Path(shutil.copytree(registry.source("hvqd", "1"), tmp_path / "told")), save(tmp_path)
    shutil.rmtree(folder / "artifacts" / "bundle")
    shutil.copytree(told, folder / "artifacts" / "bundle")
    run = registry.client.search_runs(["1"], max_results=1)[0].info.run_id
    version = registry.create("hvqd", str(folder), run, {}, "told everything")
    registry.set_alias("hvqd", "champion", version)
    _await("the swap", lambda: server.health()["version"] == version)
    bundle, seeds = load_bundle(told), seeds_for(7, 2)
    asked = Asked("dogs", "oil", "red apple", map_png(2))
    sampling = served_sampling(bundle).model_copy(update={"steps": 2})
    expected = draw_images(bundle.vq, bundle.prior, seeds, resolve(bundle, seeds, [asked] * 2), sampling)
    answer = server.draw(seed=7, n=2, steps=2, **asked.as_json())
    assert [base64.b64decode(image) for image in answer["images"]] == [as_png(image) for image in expected]
    refused: dict[str, tuple[object, str, str]] = {
        "style": ("oils", "no such style: oils (the model knows ink, oil)", "did you mean 'oil'?"),
        "text": (" ", "text must be a caption, of at most 500 characters, or null: ' '", "leave it out, or say"),
        "map": (
            base64.b64encode(map_png(size=(8, 16))).decode(), "map must be 16 x 16 pixels: 16 x 8", "resize it without"
        ),
    }  # fmt: skip
    for key, (value, error, hint) in refused.items():
        status, body = server.ask("POST", "/draw", json.dumps({key: value}).encode())
        said = json.loads(body)
        assert (status, said["error"]) == (400, error) and said["hint"].startswith(hint)
    registry.set_alias("hvqd", "champion", "1")
    _await("the swap back", lambda: server.health()["version"] == "1")


def test_a_port_that_is_taken_and_a_registry_without_champion_are_named(
    server: Running, finished_run: FinishedRun, tmp_path: Path
) -> None:
    taken = ("serve", "--root", str(server.root), "--port", str(server.port))
    done = run_hvqd(*taken, cwd=tmp_path, env=finished_run.env)
    assert done.status == 1
    assert re.match(rf"error: cannot listen on 127\.0\.0\.1:{server.port}: .*\nhint: name another port", done.err)
    none = run_hvqd("serve", "--root", str(tmp_path / "empty"), cwd=tmp_path, env=finished_run.env)
    assert none.status == 2 and none.err.startswith("error: the model hvqd has no versions yet\nhint: `hvqd register`")


# ---- plumbing ----


def _await(what: str, holds: Any) -> None:
    deadline = time.monotonic() + _SWAP_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def _replica(server: Running) -> int:
    """The process that draws, among those that the server's Ray started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "ServeReplica:hvqd:pictures" in text and _belongs(int(path.parent.name), server.process.pid):
                return int(path.parent.name)
        except OSError:
            continue  # it has ended
    raise AssertionError("no process of the replica")


def _belongs(pid: int, session: int) -> bool:
    """Whether a process was started by this one, however far down."""
    while pid > 1:
        if pid == session:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def _resident_bytes(pid: int) -> int:
    line = next(text for text in Path(f"/proc/{pid}/status").read_text().splitlines() if text.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
