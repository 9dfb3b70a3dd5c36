"""What Ray and DeepSpeed cost a training step, and what a second worker is worth.

Three trainings of the same stage stand side by side and take turns, a few steps at a time: plain torch in a process of
its own, Ray Train + DeepSpeed with one worker of two threads, and with two workers of one thread. All run the product's
loop on the `tiny` preset's batches, those under Ray through the product's launch, mailbox included. One trains while
the others wait, so what else the machine does slows them alike.
"""

from __future__ import annotations

import os
import queue
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Literal

import torch
from runner import Benchmark, Figures, Target, main, work_folder

from infra.cluster import connect, disconnect
from infra.storage import Store, open_store
from workflows.config import RunConfig
from workflows.context import Context
from workflows.loading import load_config
from workflows.training.alarms import Alarm
from workflows.training.engine import Engine
from workflows.training.loop import Record, Reporter, TrainState, train
from workflows.training.worker import MailReporter, StageName, TrainingJob, build_stage

STEPS = 5
"""Timed steps of a turn; one more before them warms the caches."""
ROUNDS = {"quick": 8, "full": 16}
START_SECONDS = 300.0
PARENTS = {"vq": ("dataset",), "prior": ("dataset", "vq", "codes")}


@dataclass(frozen=True)
class Side:
    """One of the trainings that take turns."""

    name: str
    engine: Literal["plain", "zero"]
    workers: int
    threads: int


SIDES = (Side("plain", "plain", 1, 2), Side("one_worker", "zero", 1, 2), Side("two_workers", "zero", 2, 1))


@dataclass(frozen=True)
class Turn:
    """What one side reports of its steps."""

    wall_seconds: float
    cpu_seconds: float
    """Of rank 0's process, all threads."""


@dataclass
class Nothing:
    """A reporter and checkpoints that do nothing."""

    def restore(self, engine: Engine) -> TrainState:
        """A fresh state."""
        return TrainState()

    def save(self, engine: Engine, state: TrainState) -> None:
        """Not kept."""

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Nobody is told."""

    def record(self, record: Record) -> None:
        """Nobody is told."""

    def alarm(self, alarm: Alarm) -> None:
        """Nobody is told."""

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """Nobody is told."""

    def picture(self, images_seen: int, png: bytes) -> None:
        """Nobody is told."""


@dataclass
class StopWatch:
    """Passes reports on, times the steps, and waits for its turn: the loop calls it after every step."""

    inner: Reporter
    connection: Any
    steps: int = 0
    started: tuple[float, float] = field(default=(0.0, 0.0))

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Count a step; at the end of a turn send its time and wait for the next turn's length."""
        self.inner.progress(images_seen, total, note)
        self.steps -= 1
        if self.steps == STEPS:  # the step before the timed ones is over
            self.started = time.perf_counter(), time.process_time()
        if self.steps > 0:
            return
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.connection.send((wall / STEPS, cpu / STEPS))  # plain numbers: a script's class has no name in a worker
        if images_seen < total:
            self.steps = self.connection.recv()

    def record(self, record: Record) -> None:
        """Pass it on."""
        self.inner.record(record)

    def alarm(self, alarm: Alarm) -> None:
        """Pass it on."""
        self.inner.alarm(alarm)

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """Pass it on."""
        self.inner.catch_up(history, alarms)

    def picture(self, images_seen: int, png: bytes) -> None:
        """Pass it on."""
        self.inner.picture(images_seen, png)


# ---- what the sides run ----


def run_plain(job: TrainingJob, address: tuple[str, int], key: bytes, niceness: int) -> None:
    """A process without Ray, DeepSpeed or a process group, as nice as Ray's workers are."""
    from workflows.training.plain import PlainEngine

    os.nice(max(0, niceness - os.nice(0)))
    torch.set_num_threads(job.config.compute.threads_per_worker)
    stage = build_stage(job, torch.device("cpu"))
    engine = PlainEngine(stage.objective, job.settings, torch.device("cpu"))
    train(engine, stage, Nothing(), StopWatch(Nothing(), greet("plain", address, key)))


def run_zero(name: str, address: tuple[str, int], key: bytes) -> Callable[[dict[str, Any]], None]:
    """What a Ray Train worker runs: the product's `train_worker` with a stop-watch and without checkpoints."""

    def work(loop_config: dict[str, Any]) -> None:
        from workflows.training.zero import ZeroEngine

        job: TrainingJob = loop_config["job"]
        torch.set_num_threads(job.config.compute.threads_per_worker)
        stage = build_stage(job, torch.device("cpu"))
        engine = ZeroEngine(stage.objective, job.settings, torch.device("cpu"))
        reporter: Reporter = MailReporter(loop_config["mailbox"])
        if engine.rank == 0:
            reporter = StopWatch(reporter, greet(name, address, key))
        train(engine, stage, Nothing(), reporter)

    return work


def in_process(run: Callable[..., None], *arguments: object) -> None:
    """Run a function in a new process and wait for its end."""
    process = get_context("spawn").Process(target=run, args=arguments, daemon=True)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process of {run.__name__} ended with status {process.exitcode}")


def greet(name: str, address: tuple[str, int], key: bytes) -> Connection:
    """A connection to the referee, who is told which side this is and how nice it is."""
    connection: Connection = Client(address, authkey=key)
    connection.send((name, os.nice(0)))
    return connection


# ---- the referee ----


@dataclass
class Referee:
    """Starts the sides, hands out turns, and notices when a side has failed."""

    listener: Listener
    key: bytes
    failures: queue.Queue[BaseException] = field(default_factory=queue.Queue)
    arrived: queue.Queue[Connection] = field(default_factory=queue.Queue)
    threads: list[threading.Thread] = field(default_factory=list)
    connections: dict[str, Connection] = field(default_factory=dict)

    def start(self, run: Callable[[], object]) -> tuple[str, int]:
        """Run a side in a thread and wait until its first step is done; returns its name and niceness."""
        for target in (run, lambda: self.arrived.put(self.listener.accept())):
            thread = threading.Thread(target=self._guarded, args=(target,), daemon=True)
            thread.start()
            self.threads.append(thread)
        deadline = time.monotonic() + START_SECONDS
        while self.arrived.empty():
            self._check(deadline, "a side to start")
        connection = self.arrived.get()
        name, niceness = connection.recv()
        self.connections[name] = connection
        self.receive(name)
        return name, niceness

    def turn(self, name: str, steps: int) -> Turn:
        """Let one side take some steps while the others wait."""
        self.connections[name].send(steps)
        return self.receive(name)

    def receive(self, name: str) -> Turn:
        """What a side reports next."""
        deadline = time.monotonic() + START_SECONDS
        while not self.connections[name].poll(0.2):
            self._check(deadline, f"{name} to take its steps")
        try:
            turn = Turn(*self.connections[name].recv())
        except EOFError:  # the side is gone; why is about to be known
            raise self.failures.get(timeout=START_SECONDS) from None
        return turn

    def finish(self) -> None:
        """Wait until every side has ended by itself."""
        deadline = time.monotonic() + START_SECONDS
        while any(thread.is_alive() for thread in self.threads):
            self._check(deadline, "the sides to end")

    def _guarded(self, run: Callable[[], object]) -> None:
        try:
            run()
        except BaseException as error:  # raised in the main thread
            self.failures.put(error)

    def _check(self, deadline: float, awaited: str) -> None:
        try:
            raise self.failures.get(timeout=0.1)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {START_SECONDS:.0f} s for {awaited}") from None


@contextmanager
def refereed() -> Iterator[Referee]:
    """A referee on a free loopback port, and a local Ray for the sides."""
    key = secrets.token_bytes(16)
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        connect(None, sum(side.workers * side.threads for side in SIDES))
        try:
            yield Referee(listener, key)
        finally:
            disconnect()


# ---- the benchmark ----


def preset() -> RunConfig:
    """The `tiny` preset; what is made from it here is only as good as these few images make it."""
    few = [f"{stage}.train.images=640" for stage in ("vq", "prior")]
    return load_config("tiny", None, [*few, "compute.workers=1", "compute.threads_per_worker=1"])


def prepared() -> Store:
    """A root with the preset's dataset, a tokenizer of a few steps, and the codes; made once."""
    from workflows.data.ingest import build_dataset
    from workflows.encode import encode_dataset
    from workflows.training.launch import train_vq

    root = open_store(str(work_folder("overhead") / "root"))
    for make in (build_dataset, train_vq, encode_dataset):
        make(Context(preset(), root))
    disconnect()
    return root


def job_of(stage: StageName, side: Side, root: Store, folder: Path, steps: int, seed: int) -> TrainingJob:
    """A side's training with the preset's settings, in a root of its own that links to the prepared one."""
    own = folder / side.name
    own.mkdir()
    for kind in PARENTS[stage]:
        (own / kind).symlink_to(Path(root.url) / kind)
    settings = getattr(load_config("tiny"), stage).train
    changes = [
        f"{stage}.train.images={steps * settings.global_batch}",
        f"{stage}.train.evaluate_every_images=1000000000",
        f"{stage}.train.checkpoint_every_images=1000000000",
        f"compute.workers={side.workers}",
        f"compute.threads_per_worker={side.threads}",
        *(["vq.train.codebook_start=0"] if stage == "vq" else []),
    ]
    return TrainingJob(stage, load_config("tiny", None, changes, seed=seed), open_store(str(own)), "overhead")


def measure(stage: StageName, quick: bool, seed: int) -> Figures:
    """The figures of one stage."""
    from workflows.training.launch import run_job

    root = prepared()
    rounds = ROUNDS["quick" if quick else "full"]
    steps = 1 + rounds * (STEPS + 1) + 1
    niceness = 0
    turns: dict[str, list[Turn]] = {side.name: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="hvqd-overhead-") as scratch, refereed() as referee:
        address = referee.listener.address
        for side in reversed(SIDES):  # plain torch last: it is made as nice as Ray's workers
            job = job_of(stage, side, root, Path(scratch), steps, seed)
            if side.engine == "zero":
                start = partial(run_job, job, Context(job.config, job.root), run_zero(side.name, address, referee.key))
                _, niceness = referee.start(start)
            else:
                referee.start(partial(in_process, run_plain, job, address, referee.key, niceness))
        for number in range(rounds):
            for side in SIDES if number % 2 else reversed(SIDES):
                turns[side.name].append(referee.turn(side.name, STEPS + 1))
        for side in SIDES:  # the last step evaluates; it is not timed
            referee.turn(side.name, 1)
        referee.finish()
    return summary(stage, turns, getattr(preset(), stage).train.global_batch)


def summary(stage: StageName, turns: dict[str, list[Turn]], global_batch: int) -> Figures:
    """Medians over the rounds; ratios are taken within a round."""
    rounds = list(zip(turns["plain"], turns["one_worker"], turns["two_workers"], strict=True))
    middle = statistics.median
    return {
        f"{stage}_step_time_ratio": middle(one.wall_seconds / plain.wall_seconds for plain, one, _ in rounds),
        f"{stage}_cpu_time_ratio": middle(one.cpu_seconds / plain.cpu_seconds for plain, one, _ in rounds),
        f"{stage}_two_workers_speed_ratio": middle(one.wall_seconds / two.wall_seconds for _, one, two in rounds),
        **{
            f"{stage}_images_per_second_{side.name}": global_batch / middle(t.wall_seconds for t in turns[side.name])
            for side in SIDES
        },
    }


BENCHMARK = Benchmark(
    name="overhead",
    what=(
        "Steps of the `tiny` preset's two stages by plain torch (one process of two threads), by Ray Train + DeepSpeed "
        "with one worker of two threads, and with two workers of one thread. The three stand side by side and take "
        "turns of a few steps, so that a busy machine slows them alike; ratios are taken within a round of turns, and "
        "the median over the rounds is a repeat's figure. Starting and the codebooks' k-means are not timed; data, "
        "optimizer, metrics, logging and progress reports are. `cpu_time_ratio` compares the processes' CPU time. One "
        "worker has nobody to share with, so DeepSpeed runs there without ZeRO; two workers run ZeRO-1."
    ),
    parts={
        "vq": lambda quick, seed: measure("vq", quick, seed),
        "prior": lambda quick, seed: measure("prior", quick, seed),
    },
    targets=(
        Target("vq_step_time_ratio", "<=", 1.05),
        Target("prior_step_time_ratio", "<=", 1.05),
        Target("vq_two_workers_speed_ratio", ">=", 0.9),
        Target("prior_two_workers_speed_ratio", ">=", 0.9),
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
