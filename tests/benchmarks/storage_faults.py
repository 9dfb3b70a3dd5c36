"""A training with its root on S3 behind a proxy that breaks a fifth of all requests, then is away for a minute.

Faults are 503, SlowDown, resets, delays, bodies cut in the middle and answers that get lost after the server has done
what was asked. The run must complete with the model, history and state of the same training on a local root, to the
bit, and may say no more than one line a minute about it (`warnings_a_minute`, those of all its processes).
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))

from infra.storage import Store
from tests.command_line import environment, run_hvqd, start_hvqd
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.services import seaweedfs

_SHARE, _OUTAGE_SECONDS = 0.2, 60.0
_QUICK_SHARE, _QUICK_OUTAGE_SECONDS = 0.2, 15.0
_DEADLINE_SECONDS = 1500.0


def outcome(root: Store) -> dict[str, Any]:
    """What must not depend on the root."""
    newest = max(name for name in root.child("vq", "checkpoints").children() if name.startswith("0"))
    saved = root.child("vq", "checkpoints", newest).read_json("manifest.json")
    return {
        "files": root.child("vq").read_json("manifest.json")["files"],
        "history": root.child("vq").read_json("history.json"),
        "state": {name: entry["sha256"] for name, entry in saved["files"].items()},
    }


def _outage_after_checkpoint(direct: Store, proxy: FaultProxy, seconds: float, ended: threading.Event) -> None:
    """Begin the outage when the first checkpoint is complete."""
    checkpoints = direct.child("vq", "checkpoints")
    while not ended.wait(0.5):
        if any(checkpoints.child(name).exists("manifest.json") for name in checkpoints.children()):
            proxy.begin_outage(seconds)
            return


def measure(quick: bool, seed: int) -> Figures:
    """Seconds, requests, faults, warnings, and what differs from the local run."""
    images = 960 if quick else 6400
    short = ("--set", f"vq.train.images={images}", "--set", f"vq.train.checkpoint_every_images={images // 6}")
    settings = ("--preset", "integration", *short, "--set", "compute.workers=1", "--seed", str(seed))
    share = _QUICK_SHARE if quick else _SHARE
    outage = _QUICK_OUTAGE_SECONDS if quick else _OUTAGE_SECONDS
    with tempfile.TemporaryDirectory(prefix="hvqd-faults-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        env = environment(folder, {"OMP_NUM_THREADS": "1"})
        local = folder / "local"
        for command in (("data", "build"), ("train", "vq")):
            run_hvqd(*command, *settings, "--root", str(local), "--json", cwd=folder, env=env).succeeded()
        with seaweedfs(folder / "s3") as server:
            host, port = server.endpoint.removeprefix("http://").split(":")
            with fault_proxy(host, int(port), seed) as proxy:
                import os

                os.environ.update(server.env)
                root = f"s3://{server.bucket}/run"
                direct = Store(root)
                Store(f"{root}/dataset").upload_folder(local / "dataset")
                broken = {**env, **server.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
                ended = threading.Event()
                watcher = threading.Thread(target=_outage_after_checkpoint, args=(direct, proxy, outage, ended))
                proxy.share = share
                started = time.monotonic()
                process = start_hvqd("train", "vq", *settings, "--root", root, "--json", cwd=folder, env=broken)
                watcher.start()
                out, err = process.communicate(timeout=_DEADLINE_SECONDS)
                seconds = time.monotonic() - started
                ended.set()
                watcher.join()
                completed = process.returncode == 0
                if not completed:
                    print(f"status {process.returncode}\n{out}\n{err}", file=sys.stderr)
                differing = float("nan")
                if completed:
                    one, other = outcome(Store(str(local))), outcome(direct)
                    differing = float(sum(one[key] != other[key] for key in one))
                said = len(re.findall(r"could not .* trying again", err))
        faults = sum(count for kind, count in proxy.seen.items() if kind not in ("passed", "outage", "refused"))
        return {
            "completed": float(completed),
            "differing": differing,
            "seconds": seconds,
            "requests": float(sum(proxy.seen.values())),
            "faults": float(faults),
            "requests_in_the_outage": float(proxy.seen["outage"]),
            "warnings": float(said),
            "warnings_a_minute": said / max(seconds / 60, 1.0),
        }


BENCHMARK = Benchmark(
    name="storage_faults",
    what=__doc__ or "",
    parts={"training": measure},
    targets=(
        Target("completed", ">=", 1),
        Target("differing", "<=", 0),
        Target("warnings_a_minute", "<=", 1),
        Target("requests_in_the_outage", ">=", 1),
        Target("warnings", ">=", 1),
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
