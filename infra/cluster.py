"""The Ray cluster a job runs on: an existing one, or a local one that lives as long as the job.

A local cluster is always a new one: a bare `ray.init` would attach to any cluster it finds on the machine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra.errors import EnvironmentFailure, InputError
from infra.quiet import switch_off_telemetry
from infra.versions import differences, versions

_ANSWER_SECONDS = 10.0
_JOIN_SECONDS = 60.0
"""A cluster that answers is joined in a second or two, by a busy machine in up to half a minute."""
_VERSIONS_SECONDS = 60.0
_OBJECT_STORE_BYTES = 1 << 30
_asked_ahead: dict[str, Any] = {}
"""Tasks of the connected cluster's nodes that will tell their versions, until somebody waits for them."""


def connect(address: str | None, cpus: int, *, compare_versions: bool = True) -> None:
    """Attach to the cluster at `address`, or start a local one; nothing happens when this process has one.

    Args:
        address: host:port, ray://host:port, `auto`, or None for a local cluster.
        cpus: how many CPUs the job's workers ask for. A local cluster offers at least that many, whatever the
            machine has, so that two workers also run on one core.
        compare_versions: whether every node of an existing cluster must have this process's versions.

    Raises:
        EnvironmentFailure: no cluster answers at the address, or a node of it has other versions.
        InputError: the cluster has fewer CPUs than the job asks for.
    """
    switch_off_telemetry()
    import ray

    if ray.is_initialized() and not _asked_ahead:
        return
    if address is None:
        # Workers of a local cluster inherit this process's environment, credentials included.
        os.environ.pop("RAY_ADDRESS", None)
        try:
            with _own_signals():
                ray.init(
                    address="local",
                    num_cpus=max(cpus, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level="warning",
                )
        except Exception as error:  # Ray raises nothing more special
            if "timed out during startup" not in str(error):
                raise
            raise EnvironmentFailure(
                "Ray did not start on this machine in the 30 s that it gives itself\n"
                "hint: the machine is busy beyond measure; with less beside it the same command goes on where it stood"
            ) from error
        return
    if not ray.is_initialized():
        _join(address)
    tasks = dict(_asked_ahead)
    _asked_ahead.clear()
    offered = int(ray.cluster_resources().get("CPU", 0))
    if offered < cpus:
        ray.shutdown()
        raise InputError(
            f"the cluster at {address} has {offered} CPUs, the job's workers ask for {cpus}\n"
            f"hint: compute.workers x compute.threads_per_worker must be at most {offered}"
        )
    if compare_versions:
        try:
            _compare_versions(tasks or on_every_node(versions, lambda _: ()))
        except EnvironmentFailure:
            ray.shutdown()
            raise


def connect_ahead(address: str | None) -> None:
    """Join an existing cluster before there is work for it, and ask its nodes for their versions.

    Processes then start there while this one still loads its own libraries; `connect` waits for the answers.

    Raises:
        EnvironmentFailure: no cluster answers at the address.
    """
    switch_off_telemetry()
    import ray

    if address is None or ray.is_initialized():
        return
    _join(address)
    _asked_ahead.update(on_every_node(versions, lambda _: ()))


def _join(address: str) -> None:
    import ray

    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address  # set in jobs of Slurm and of Ray
    if address != "auto" or named.rpartition(":")[2].isdigit():
        _check_answers(named)
    _within(_JOIN_SECONDS, lambda: ray.init(address=address, log_to_driver=False, logging_level="warning"), address)


def on_every_node(function: Callable[..., Any], arguments: Callable[[str], tuple[Any, ...]]) -> dict[str, Any]:
    """A task of this function on every living node, without CPUs of its own, by the node's address.

    Args:
        arguments: of the task, from the node's address.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(function)
    tasks = {}
    for node in ray.nodes():
        if node["Alive"]:
            address, place = str(node["NodeManagerAddress"]), NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = remote.options(scheduling_strategy=place, max_retries=0)
            tasks[address] = options.remote(*arguments(address))
    return tasks


def _compare_versions(tasks: Mapping[str, Any]) -> None:
    """Whether every node has this process's versions; one that does not answer in time is left to what follows.

    The processes that answer stay, and do the job's first work.

    Args:
        tasks: that answer, by the nodes' addresses.
    """
    import ray

    here = versions()
    ready, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_VERSIONS_SECONDS)
    found = []
    for address, task in tasks.items():
        if task not in ready:
            logging.getLogger(__name__).warning("%s did not tell its versions in time", address)
            continue
        try:
            others = differences(here, ray.get(task))
        except ray.exceptions.RayError as error:
            raise EnvironmentFailure(
                f"the node {address} cannot run a task: {' '.join(str(error).split())[-300:]}\n"
                "hint: see its logs in /tmp/ray/session_latest/logs; the versions of its packages may differ"
            ) from error
        if others:
            found.append(f"{address} has {', '.join(others)}")
    if found:
        raise EnvironmentFailure(
            f"nodes have other versions than the driver on {ray.util.get_node_ip_address()}: {'; '.join(found)}\n"
            "hint: install the same lock everywhere, ship the code (ship_code), or use one image"
        )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray replaces it by one that ends the job without a word."""
    on_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if on_main else None
    yield
    if before is not None:
        signal.signal(signal.SIGTERM, before)


def disconnect() -> None:
    """Leave the cluster; a local one stops."""
    import ray

    _asked_ahead.clear()
    if ray.is_initialized():
        ray.shutdown()


def offered() -> dict[str, float]:
    """What the connected cluster has in all: CPU, GPU, memory in bytes, …"""
    import ray

    return dict(ray.cluster_resources())


def available() -> dict[str, float]:
    """What nobody uses of it now."""
    import ray

    return dict(ray.available_resources())


@dataclass(frozen=True)
class Reservation:
    """A placement group: resources that a job has set aside for its workers."""

    group: str
    """Its id, hexadecimal."""
    job: str
    """The id of the job that made it, hexadecimal."""
    job_is_dead: bool
    maker_is_dead: bool
    """Whether the process that made it is gone. Ray keeps the group until the job has ended as well, although nobody
    can use it any more."""
    cpus: float
    """CPUs that it keeps from others."""


def reservations() -> list[Reservation]:
    """The placement groups of the connected cluster that are not removed; those meant to outlive their job left out.

    Read from the cluster's own table, because Ray's State API is part of the dashboard, which takes ten processes and
    half a minute to start on a small machine.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    found = [PlacementGroupTableData.FromString(entry) for entry in table]
    return [
        Reservation(
            group.placement_group_id.hex(),
            group.creator_job_id.hex(),
            group.creator_job_dead,
            bool(group.creator_actor_id.strip(b"\xff")) and group.creator_actor_dead,
            sum(bundle.unit_resources.get("CPU", 0.0) for bundle in group.bundles),
        )
        for group in found
        if group.state != PlacementGroupTableData.REMOVED and not group.is_detached
    ]


def own_job() -> str:
    """The id of this process's job on the connected cluster."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


def free(reservation: Reservation) -> None:
    """Give back what a placement group keeps; nothing happens when it is gone."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(reservation.group)))


def _check_answers(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(
            f"compute.address must be auto, host:port or ray://host:port: {address}\nhint: for example 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS / 2).close()
    except OSError as error:
        raise _no_answer(address, str(error)) from error
    if not address.startswith("ray://"):  # something listens; whether it is a cluster's head
        _within(_ANSWER_SECONDS, lambda: ask_head(address), address)


def ask_head(address: str) -> None:
    """Ask a cluster's head for its name, and take the token in the user's home if, and only if, it wants one.

    Every local cluster leaves a token there, which `ray start` then takes and asks for. Ray's drivers take it only
    where they find a cluster by themselves; and against a cluster without tokens they would refuse its calls back, so
    that the first actor dies without a reason.

    Raises:
        ray.exceptions.RayError, RuntimeError: nobody answers, or the head wants another token.
    """
    from ray._private.authentication import authentication_token_setup
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init`
        GcsClient(address=address)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def _within(seconds: float, call: Callable[[], object], address: str) -> None:
    """Run a call that may hang, and give up on it."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _no_answer(address, f"no answer within {seconds:.0f} s")
    if failures:
        raise _no_answer(address, str(failures[0])) from failures[0]


def _no_answer(address: str, reason: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"no Ray cluster answers at {address}: {' '.join(reason.split())}\n"
        "hint: check compute.address, or leave it out to start a local cluster"
    )
