"""The picture server against a bare loop: what HTTP, Ray Serve and batching cost, and whether a swap drops a request.

The model is tiny's with fresh weights, which draw as fast as trained ones, on one thread. `overhead` is how much fewer
pictures a second 48 clients get, who each ask for one picture at a time, than one process that draws batches of 16
without end; both sides take turns. Under open load requests come at random moments (a Poisson process) at 60 % of what
the server managed, whether earlier ones are answered or not; latency counts from when a request was due. Meanwhile the
alias `champion` moves to another version and back; every request must be answered.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the server and the client that the tests use, too

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, save_model
from infra.models import Registry
from infra.storage import open_store
from tests.command_line import environment
from tests.served import Running, serving
from tests.services import free_ports
from workflows.config import RunConfig
from workflows.drawing.bundle import SERVED_BATCH, write_bundle
from workflows.loading import load_config
from workflows.pipeline import tracker_for

_CLASSES = ("a", "b", "c")
_CLIENTS = 48
_LOAD = 0.6
_TURNS, _QUICK_TURNS = 4, 1
_SECONDS, _QUICK_SECONDS = 60.0, 4.0
_LOOP = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from workflows.drawing.bundle import load_bundle, served_sampling
from workflows.drawing.generate import draw_images
bundle = load_bundle(Path(sys.argv[1]))
sampling, seconds = served_sampling(bundle).model_copy(update={"steps": int(sys.argv[2])}), float(sys.argv[3])
seeds, labels = list(range(sampling.batch)), [0] * sampling.batch
draw_images(bundle.vq, bundle.prior, seeds, labels, sampling)
started, drawn = time.monotonic(), 0
while time.monotonic() - started < seconds:
    draw_images(bundle.vq, bundle.prior, seeds, labels, sampling)
    drawn += len(seeds)
print(drawn / (time.monotonic() - started))
"""


def registered(folder: Path, config: RunConfig) -> Path:
    """A root with two versions of an untrained model, the first of which is champion; returns the bundle."""
    torch.manual_seed(0)
    vq = HierarchicalVQ(config.vq_config)
    for codebook in vq.codebooks:
        codebook.normal_()
    shape = PriorConfig(
        **config.prior.model.model_dump(),
        grids=config.vq_config.grids,
        codebook_sizes=config.vq_config.codebook_sizes,
        code_dim=config.vq_config.code_dim,
        classes=_CLASSES,
    )
    save_model(vq, folder / "vq")
    save_model(HierarchicalPrior(shape, vq.codebooks), folder / "prior")
    bundle = folder / "model" / "artifacts" / "bundle"
    write_bundle(bundle, folder / "vq", folder / "prior", _CLASSES, (1, 1, 1), config.sampling, {}, "")
    (folder / "model" / "MLmodel").write_text("flavors: {}\n")
    tracker = tracker_for(config, open_store(config.root))
    registry, run = Registry(tracker.uri), tracker.run("benchmark", "register")
    for _ in range(2):
        registry.create(config.tracking.model_name, str(folder / "model"), run.run_id, {}, "")
    registry.set_alias(config.tracking.model_name, "champion", "1")
    return bundle


def bare(bundle: Path, steps: int, seconds: float, env: dict[str, str]) -> float:
    """Pictures a second of a process that does nothing else."""
    command = [sys.executable, "-c", _LOOP, str(bundle), str(steps), str(seconds)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


def closed(server: Running, steps: int, seconds: float) -> float:
    """Pictures a second of clients who ask again as soon as they are answered."""
    stop, counts = time.monotonic() + seconds, [0] * _CLIENTS

    def client(index: int) -> None:
        while time.monotonic() < stop:
            server.draw(seed=index, steps=steps)
            counts[index] += time.monotonic() < stop

    threads = [threading.Thread(target=client, args=(index,)) for index in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def opened(server: Running, steps: int, rate: float, seconds: float, seed: int, swap: Callable[[str], None]) -> Figures:
    """Latency and lost requests when requests come at random moments and the champion changes twice."""
    draw, due = random.Random(seed), 0.0
    moments = []
    while (due := due + draw.expovariate(rate)) < seconds:
        moments.append(due)
    started, latencies, lost, versions = time.monotonic(), [], [], set()

    def ask(moment: float) -> None:
        try:
            versions.add(server.draw(seed=1, steps=steps)["version"])
            latencies.append(time.monotonic() - started - moment)
        except (OSError, AssertionError) as error:
            lost.append(str(error))

    with ThreadPoolExecutor(256) as pool:
        for index, moment in enumerate(moments):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            pool.submit(ask, moment)
            if index == len(moments) // 3:
                swap("2")
            if index == 2 * len(moments) // 3:
                swap("1")
    return {
        "open_requests_a_second": rate,
        "latency_p50_seconds": float(np.percentile(latencies, 50)) if latencies else float("nan"),
        "latency_p99_seconds": float(np.percentile(latencies, 99)) if latencies else float("nan"),
        "requests": float(len(moments)),
        "dropped": float(len(lost)),
        "versions_seen": float(len(versions)),
    }


def measure(quick: bool, seed: int) -> Figures:
    """Both sides in turns, then the open load with its swaps."""
    turns, seconds = (_QUICK_TURNS, _QUICK_SECONDS) if quick else (_TURNS, _SECONDS)
    steps = 4 if quick else load_config("tiny").sampling.steps
    with tempfile.TemporaryDirectory(prefix="hvqd-serving-") as name:
        folder = Path(name)
        config = load_config("tiny", root=str(folder / "run"))
        bundle = registered(folder, config)
        env = environment(folder, {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")})
        registry = Registry(tracker_for(config, open_store(config.root)).uri)
        (port,) = free_ports(1)
        alone, served = [], []
        with serving(Path(config.root), port, folder, env, {"follow_seconds": 0.5, "threads": 1}) as server:
            closed(server, steps, 1.0)  # what is first asked waits for what is first made
            for _ in range(turns):
                alone.append(bare(bundle, steps, seconds, env))
                served.append(closed(server, steps, seconds))
            rate = float(np.median(served))
            swap = lambda version: registry.set_alias(config.tracking.model_name, "champion", version)  # noqa: E731
            found = opened(server, steps, _LOAD * rate, 4 * seconds, seed, swap)
            batches = server.metrics()
    mean = batches["hvqd_pictures_total"] / batches["hvqd_batches_total"]
    ratios = [1 - one / other for one, other in zip(served, alone, strict=True)]
    return {
        "bare_pictures_a_second": float(np.median(alone)),
        "served_pictures_a_second": rate,
        "overhead": float(np.median(ratios)),
        "mean_batch": mean,
        "largest_batch": float(SERVED_BATCH),
        **found,
    }


BENCHMARK = Benchmark(
    name="serving",
    what=__doc__ or "",
    parts={"server": measure},
    targets=(Target("overhead", "<=", 0.1), Target("dropped", "<=", 0), Target("versions_seen", ">=", 2)),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
