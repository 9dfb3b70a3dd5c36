"""`hvqd preflight`: try the machines that a job will run on, with the job's own configuration, before it begins.

On every node of the cluster: facts (devices, versions, clock, disk, shared memory, the root). On every worker, placed
as training places them: the same small work, the links between neighbours, an all-reduce, and one real optimizer step
of each stage. On the driver: the tracker, and whether all nodes wrote to the same root.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.cluster import connect, on_every_node
from infra.errors import EnvironmentFailure, InputError
from infra.preflight import (
    GIB,
    Finding,
    Link,
    NodeFacts,
    forget_marks,
    judge_clock,
    judge_devices,
    judge_disk,
    judge_links,
    judge_reach,
    judge_root,
    judge_shared_root,
    judge_shm,
    judge_versions,
    judge_workers,
    look,
    marks,
    reach,
)
from infra.storage import open_store
from workflows.config import RunConfig
from workflows.context import Progress
from workflows.planning.model_walk import STAGES, Pictures, StageName
from workflows.planning.planner import Plan, StagePlan, estimate
from workflows.training.elastic import bundle, could_hold

_LOOK_SECONDS = 90.0
_MEET_SECONDS = 20.0
_WORK_SECONDS = 60.0
_STEP_SECONDS = 300.0
_MESSAGE_BYTES = 4 << 20
_ROUNDS = 4


def run_preflight(config: RunConfig, expected: Mapping[str, str], progress: Progress) -> list[Finding]:
    """All findings; a check that cannot be made is a finding, too.

    Args:
        expected: versions where the job was launched; empty to compare the nodes with the driver alone.
    """
    compute = config.compute
    findings = [*_tracker(config)]
    fewest = config.fewest_workers if compute.address is not None else compute.most_workers
    try:
        # Versions are a finding here, with its node, and no reason to look no further.
        connect(compute.address, fewest * compute.threads_per_worker, compare_versions=False)
    except (EnvironmentFailure, InputError) as error:
        first, _, rest = str(error).partition("\n")
        return [*findings, Finding("cluster", "driver", "fail", first, rest.removeprefix("hint: "))]
    import ray

    workers = workers_with_room(config, could_hold(ray.nodes(), bundle(compute)))
    if workers is None:
        asked = ", ".join(f"{amount:g} {name}" for name, amount in bundle(compute).items())
        text = f"the cluster's nodes have no room for {config.fewest_workers} workers of {asked} each"
        return [*findings, Finding("workers", "all workers", "fail", text, "add nodes, or ask for less in compute")]
    config = config.model_copy(update={"compute": compute.model_copy(update={"workers": workers})})
    plan = estimate(config, advise=False, pictures=Pictures(0, 1))
    progress.say("looking at every node")
    nodes, found = _nodes(config, plan, expected)
    findings += found
    if any(finding.verdict == "fail" for finding in found if finding.check == "versions"):
        return findings  # what differs there would fail in stranger words below
    progress.say("trying the workers")
    return [*findings, *_workers(config, plan, {facts.node: facts.host for facts in nodes})]


def workers_with_room(config: RunConfig, possible: int) -> int | None:
    """The number of workers that the job would start with where so many have room; None where that is too little."""
    both = set(config.workers_for(config.vq.train)) & set(config.workers_for(config.prior.train))
    return max((count for count in both or {config.fewest_workers} if count <= possible), default=None)


# ---- the driver ----


def _tracker(config: RunConfig) -> list[Finding]:
    from workflows.pipeline import tracker_for

    try:
        tracker = tracker_for(config, open_store(config.root))
        if not tracker.is_there:
            return [Finding("tracker", "driver", "pass", "an sqlite store that the job will make")]
        started = time.monotonic()
        tracker.check_answers()
        tracker.check_writable()
    except (EnvironmentFailure, InputError) as error:
        first, _, rest = str(error).partition("\n")
        return [Finding("tracker", "driver", "fail", first, rest.removeprefix("hint: "))]
    return [Finding("tracker", "driver", "pass", f"answers and takes a run in {time.monotonic() - started:.1f} s")]


# ---- every node ----


def _nodes(config: RunConfig, plan: Plan, expected: Mapping[str, str]) -> tuple[list[NodeFacts], list[Finding]]:
    import ray

    from infra.versions import versions

    root, run, before = open_store(config.root).url, uuid.uuid4().hex[:12], time.time()
    findings: list[Finding] = []
    tasks = on_every_node(look, lambda address: (address, root, run))
    ready, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_LOOK_SECONDS)
    after, nodes = time.time(), []
    for address, task in tasks.items():
        try:
            if task not in ready:
                raise TimeoutError(f"no answer within {_LOOK_SECONDS:.0f} s")
            nodes.append(ray.get(task))
        except Exception as error:  # whatever a strange node does is a finding about it
            text = " ".join(str(error).split())[-300:]
            hint = "see its logs in /tmp/ray/session_latest/logs; the versions of its packages may differ"
            findings.append(Finding("node", address, "fail", f"{address} cannot run a task: {text}", hint))
    here, workers = versions(), config.compute.most_workers
    for facts in nodes:
        findings.append(judge_versions(expected or here, facts, "the launching machine" if expected else "the driver"))
        share = -(-workers // max(len(nodes), 1))
        findings += _node_findings(config, plan, facts, share, before, after)
    try:
        findings += judge_shared_root(nodes, marks(config.root, run))
        forget_marks(config.root, run)
    except (EnvironmentFailure, InputError):
        pass  # the root has its findings above
    return nodes, findings


def _node_findings(
    config: RunConfig, plan: Plan, facts: NodeFacts, share: int, before: float, after: float
) -> list[Finding]:
    on_gpu = config.compute.gpus_per_worker > 0
    memory = max(stage.memory.total for stage in plan.stages)
    checkpoint = max(stage.checkpoint_bytes for stage in plan.stages) / config.compute.most_workers
    trains = not on_gpu or bool(facts.gpus) or share * config.compute.most_workers == 1
    return [
        judge_clock(before, facts, after),
        judge_disk(facts, checkpoint * share),
        judge_shm(facts),
        *([judge_devices(facts, on_gpu, memory if on_gpu else memory * share)] if trains else []),
        judge_root(facts),
    ]


# ---- every worker ----


@dataclass
class Member:
    """One worker of the trial, an actor with a training worker's resources."""

    rank: int
    world: int

    def place(self) -> tuple[str, int]:
        """This node's address and a free port."""
        import ray.util

        address = str(ray.util.get_node_ip_address())
        with socket.socket() as free:
            free.bind((address, 0))
            return address, int(free.getsockname()[1])

    def listen(self, host: str, port: int, seconds: float) -> None:
        """Accept whoever comes to the meeting point for a while, so that the others can try to reach it."""
        server = socket.create_server((host, port))
        server.settimeout(seconds)

        def serve() -> None:
            with server:
                try:
                    for _ in range(self.world):
                        server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()

    def reaches(self, host: str, port: int) -> str:
        """Why the meeting point cannot be reached; empty when it can."""
        return reach(host, port, _MEET_SECONDS / 4)

    def meet(self, host: str, port: int, gpu: bool) -> None:
        """Join the process group."""
        from datetime import timedelta

        import torch.distributed as dist

        os.environ |= {"LOCAL_RANK": "0", "RANK": str(self.rank), "WORLD_SIZE": str(self.world)}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=_MEET_SECONDS),
        )

    def work(self, threads: int) -> float:
        """Seconds of the same matrix products on every worker: the best of a few, so that a hiccup is none."""
        import torch

        torch.set_num_threads(threads)
        device = _device()
        a = torch.randn(512, 512, device=device)
        took = []
        for _ in range(8):
            started = time.perf_counter()
            for _ in range(4):
                a = (a @ a).tanh()
            float(a[0, 0])
            took.append(time.perf_counter() - started)
        return min(took)

    def link(self, sender: int, receiver: int) -> tuple[float, float]:
        """Bytes a second and a small message's seconds between two ranks; the others only wait."""
        import torch
        import torch.distributed as dist

        device = _device()
        large, small = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (_MESSAGE_BYTES, 8))
        found = []
        for message in (small, large):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(_ROUNDS):
                if self.rank == sender:
                    dist.send(message, receiver)
                    dist.recv(message[:8], receiver)
                elif self.rank == receiver:
                    dist.recv(message, sender)
                    dist.send(message[:8], sender)
            found.append((time.perf_counter() - started) / _ROUNDS)
        return _MESSAGE_BYTES / max(found[1], 1e-9), found[0] / 2

    def all_reduce(self) -> float:
        """Bytes that a worker sends a second in an all-reduce of a few MiB."""
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(_MESSAGE_BYTES // 4, device=_device())
        dist.all_reduce(tensor)
        started = time.perf_counter()
        for _ in range(_ROUNDS):
            dist.all_reduce(tensor)
        float(tensor[0])
        seconds = (time.perf_counter() - started) / _ROUNDS
        return 2 * _MESSAGE_BYTES * (self.world - 1) / self.world / max(seconds, 1e-9)

    def step(self, config_json: str, stage: StageName, classes: int) -> tuple[float, bool]:
        """Seconds of one optimizer step of the configuration on made-up data, and whether it was applied."""
        import torch

        from workflows.planning.made_up import made_up_prior, made_up_vq
        from workflows.planning.planner import settings_of
        from workflows.training.precision import choose_precision
        from workflows.training.stage import place_on
        from workflows.training.zero import ZeroEngine

        config = RunConfig.model_validate_json(config_json)
        torch.set_num_threads(config.compute.threads_per_worker)
        torch.manual_seed(config.seed)
        settings, device = settings_of(config, stage), _device()
        precision, _ = choose_precision(settings.precision, device)
        if stage == "vq":
            objective, inputs = made_up_vq(config, precision, device)
        else:
            objective, inputs = made_up_prior(config, classes, precision)
        engine = ZeroEngine(objective, settings, device)
        started = time.perf_counter()
        for _ in range(settings.global_batch // (settings.micro_batch * self.world)):
            engine.backward(engine.forward(*place_on(device, *inputs)).loss)
        result = engine.step(settings.learning_rate)
        return time.perf_counter() - started, result.applied


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _workers(config: RunConfig, plan: Plan, hosts: Mapping[str, str]) -> list[Finding]:
    """What a group of workers like the training's finds; one finding for what stops it."""
    import ray

    compute = config.compute
    world, gpu = compute.most_workers, compute.gpus_per_worker > 0
    options = {"num_cpus": compute.threads_per_worker, "num_gpus": compute.gpus_per_worker, "max_restarts": 0}
    actors = [ray.remote(**options)(Member).remote(rank, world) for rank in range(world)]
    try:
        return _trial(config, plan, actors, gpu)
    except ray.exceptions.GetTimeoutError as error:
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        text = f"{world} workers did not do in time what was asked of them; free on the cluster: {free}"
        hint = "end other jobs on the cluster, or see which worker hangs in its dashboard"
        return [Finding("workers", "all workers", "fail", f"{text} {error}".strip(), hint)]
    finally:
        for actor in actors:
            ray.kill(actor)


def _trial(config: RunConfig, plan: Plan, actors: Sequence[Any], gpu: bool) -> list[Finding]:
    import ray

    world = len(actors)
    places = ray.get([actor.place.remote() for actor in actors], timeout=_WORK_SECONDS)
    names = [f"worker {rank} on {address}" for rank, (address, _) in enumerate(places)]
    seconds = ray.get([actor.work.remote(config.compute.threads_per_worker) for actor in actors], timeout=_WORK_SECONDS)
    findings = judge_workers(dict(zip(names, seconds, strict=True)))
    host, port = places[0]
    ray.get(actors[0].listen.remote(host, port, _MEET_SECONDS), timeout=_WORK_SECONDS)
    problems = ray.get([actor.reaches.remote(host, port) for actor in actors], timeout=_WORK_SECONDS)
    away = {name: problem for name, problem in zip(names, problems, strict=True) if problem}
    if away:
        return [*findings, *judge_reach(away, f"{names[0]}, port {port}")]
    _, port = ray.get(actors[0].place.remote(), timeout=_WORK_SECONDS)
    try:
        ray.get([actor.meet.remote(host, port, gpu) for actor in actors], timeout=2 * _MEET_SECONDS)
        if world > 1:
            findings += judge_links(_links(actors, names), _all_reduce(actors))
    except ray.exceptions.RayTaskError as error:
        text = " ".join(str(error.cause if hasattr(error, "cause") else error).split())[-300:]
        hint = "open all TCP ports between the nodes; NCCL_DEBUG=INFO and GLOO_SOCKET_IFNAME show and choose the way"
        return [*findings, Finding("collective", "all workers", "fail", f"the workers cannot meet: {text}", hint)]
    stages: dict[StageName, StagePlan] = {stage.stage: stage for stage in plan.stages}
    for stage in STAGES:
        findings.append(_step(config, stages[stage], actors, names))
    return findings


def _links(actors: Sequence[Any], names: Sequence[str]) -> list[Link]:
    import ray

    found = []
    for sender in range(len(actors) if len(actors) > 2 else 1):
        receiver = (sender + 1) % len(actors)
        answers = ray.get([actor.link.remote(sender, receiver) for actor in actors], timeout=_WORK_SECONDS)
        speed, seconds = answers[sender]
        found.append(Link(names[sender], names[receiver], speed, seconds))
    return found


def _all_reduce(actors: Sequence[Any]) -> float:
    import ray

    found: list[float] = ray.get([actor.all_reduce.remote() for actor in actors], timeout=_WORK_SECONDS)
    return min(found)


def _step(config: RunConfig, stage: StagePlan, actors: Sequence[Any], names: Sequence[str]) -> Finding:
    """One optimizer step of a stage on all workers."""
    import ray

    text = config.model_dump_json()
    tasks = [actor.step.remote(text, stage.stage, 1) for actor in actors]
    check = f"a step of {stage.stage}"
    hint = f"`hvqd plan` says what a worker takes ({stage.memory.total / GIB:.1f} GiB) and the least change that fits"
    failures: dict[str, str] = {}
    answers = []
    for name, task in zip(names, tasks, strict=True):
        try:
            answers.append(ray.get(task, timeout=_STEP_SECONDS))
        except (ray.exceptions.RayError, MemoryError) as error:
            failures[name] = " ".join(str(error).split())[-240:]
    if failures:
        where = next(iter(failures))
        return Finding(check, where, "fail", f"{where}: {failures[where]}", hint)
    if not all(applied for _, applied in answers):
        return Finding(
            check,
            "all workers",
            "fail",
            "its gradients are not finite",
            "set precision=fp32 to see whether bf16 is why",
        )
    slowest = max(seconds for seconds, _ in answers)
    return Finding(check, "all workers", "pass", f"{slowest:.2f} s, the first one included what is made once")
