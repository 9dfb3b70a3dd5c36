"""Preflight's verdicts: planted facts, and the finding that names the right node."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.preflight import (
    GIB,
    MIB,
    Finding,
    Gpu,
    Link,
    NodeFacts,
    RootFacts,
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
    try_root,
    worst,
)
from workflows.config import RunConfig
from workflows.launching.preflight import _node_findings, _tracker, workers_with_room
from workflows.launching.preflight_text import preflight_text
from workflows.loading import load_config
from workflows.planning.planner import Plan, estimate

VERSIONS = {"python": "3.11", "ray": "2.9.0", "torch": "2.6.0"}
A, B = "10.0.0.1", "10.0.0.2"


def healthy(node: str = A, **changes: Any) -> NodeFacts:
    """A machine with nothing wrong."""
    facts = NodeFacts(
        node=node,
        host=f"host-{node}",
        versions=VERSIONS,
        driver="550.54",
        cuda="12.4",
        gpus=(Gpu("H100", 70 * GIB, 80 * GIB), Gpu("H100", 60 * GIB, 80 * GIB)),
        cpus=16,
        free_memory_bytes=64 * GIB,
        clock=1_000.0,
        disk_free_bytes=100 * GIB,
        disk_folder="/tmp",
        shm_free_bytes=8 * GIB,
        root=RootFacts("s3://bucket/run", write_mb_s=100.0, read_mb_s=200.0, list_seconds=0.01, mark="mark-1"),
    )
    return replace(facts, **changes)


def judged(facts: NodeFacts) -> list[Finding]:
    """Every verdict on a node, at the limits that the tests plant faults against."""
    return [
        judge_versions(VERSIONS, facts, "the driver"),
        judge_clock(999.0, facts, 1_001.0),
        judge_disk(facts, 10 * GIB),
        judge_shm(facts),
        judge_devices(facts, True, 40 * GIB),
        judge_root(facts),
        *judge_shared_root([facts], ["mark-1"]),
    ]


FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "wrong version": (
        {"versions": {**VERSIONS, "ray": "2.8.0"}},
        "versions",
        "fail",
        "10.0.0.2 has ray 2.8.0 instead of 2.9.0 (the driver has the latter)",
    ),
    "no torch": ({"versions": {"python": "3.11", "ray": "2.9.0"}}, "versions", "fail", "torch none instead of 2.6.0"),
    "clock a little off": ({"clock": 1_011.0}, "clock", "warn", "the clock of 10.0.0.2 is 10 s off the driver's"),
    "clock behind": ({"clock": 899.0}, "clock", "fail", "is 100 s off"),
    "full disk": (
        {"disk_free_bytes": GIB},
        "disk",
        "fail",
        "1.0 GiB free in /tmp of 10.0.0.2, a checkpoint on its way takes 10.00 GiB",
    ),
    "narrow disk": ({"disk_free_bytes": 15 * GIB}, "disk", "warn", "15.0 GiB free"),
    "no shared memory to speak of": (
        {"shm_free_bytes": 64 * MIB},
        "shared memory",
        "fail",
        "0.06 GiB free in /dev/shm of 10.0.0.2",
    ),
    "too little shared memory": ({"shm_free_bytes": 512 * MIB}, "shared memory", "warn", "0.50 GiB free in /dev/shm"),
    "CPU build": ({"gpus": (), "cuda": ""}, "devices", "fail", "sees no GPU on 10.0.0.2: torch is a CPU build"),
    "no driver": ({"gpus": (), "driver": ""}, "devices", "fail", "driver missing, torch's CUDA 12.4"),
    "a GPU that another job fills": (
        {"gpus": (Gpu("H100", 70 * GIB, 80 * GIB), Gpu("H100", 2 * GIB, 80 * GIB))},
        "devices",
        "fail",
        "2 x H100, 2.0 GiB free, driver 550.54 on 10.0.0.2, a worker takes about 40.0 GiB",
    ),
    "unwritable root": (
        {"root": RootFacts("/runs/x", problem="cannot write /runs/x: denied\nhint: chmod it")},
        "root",
        "fail",
        "from 10.0.0.2: cannot write /runs/x: denied",
    ),
    "slow root": (
        {"root": RootFacts("s3://bucket/run", write_mb_s=3.0, read_mb_s=90.0, mark="mark-1")},
        "root",
        "warn",
        "write 3 MB/s, read 90 MB/s",
    ),
    "a root of its own": (
        {"root": RootFacts("/runs/x", write_mb_s=100.0, read_mb_s=100.0, mark="mark-2")},
        "shared root",
        "fail",
        "what 10.0.0.2 writes to /runs/x is not seen by the driver",
    ),
}


def test_a_healthy_node_passes_everything() -> None:
    findings = judged(healthy())
    assert [(finding.check, finding.where, finding.verdict) for finding in findings] == [
        (check, A, "pass") for check in ("versions", "clock", "disk", "shared memory", "devices", "root")
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_the_only_finding_and_on_its_node(fault: str) -> None:
    changes, check, verdict, text = FAULTS[fault]
    findings = [*judged(healthy(A)), *judged(healthy(B, **changes))]
    bad = [finding for finding in findings if finding.verdict != "pass"]
    assert [(finding.check, finding.where, finding.verdict) for finding in bad] == [(check, B, verdict)]
    assert text in bad[0].what
    assert bad[0].hint
    assert worst(findings) == verdict


def test_the_hint_of_an_unwritable_root_is_the_stores_own() -> None:
    assert judge_root(healthy(root=RootFacts("/x", problem="cannot write\nhint: chmod it"))).hint == "chmod it"


def test_a_node_without_gpus_is_judged_by_its_memory_when_training_is_on_cpus() -> None:
    facts = healthy(B, gpus=(), cuda="", driver="")
    assert judge_devices(facts, False, 10 * GIB).verdict == "pass"
    found = judge_devices(facts, False, 100 * GIB)
    assert (found.verdict, found.where) == ("warn", B)
    assert "its workers take about 100.0 GiB" in found.what


@pytest.mark.parametrize("workers", [2, 3, 4, 64])
@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "pass"), (2.0, "warn"), (4.0, "fail")])
def test_a_slow_worker_is_named_with_how_much_slower_it_is(workers: int, factor: float, verdict: str) -> None:
    seconds = {f"worker {rank} on 10.0.0.{rank}": 0.1 for rank in range(workers)}
    slow = f"worker {workers - 1} on 10.0.0.{workers - 1}"
    findings = judge_workers({**seconds, slow: 0.1 * factor})
    assert [finding.where for finding in findings] == list(seconds)
    assert [finding.verdict for finding in findings] == ["pass"] * (workers - 1) + [verdict]
    if verdict != "pass":
        assert findings[-1].what.startswith(f"{slow} takes {factor:.1f} times as long as the others")


def test_one_worker_alone_is_not_slow() -> None:
    assert [finding.verdict for finding in judge_workers({"worker 0 on here": 9.0})] == ["pass"]


def test_two_slow_workers_of_four_are_both_named() -> None:
    findings = judge_workers({"a": 0.1, "b": 0.1, "c": 1.0, "d": 1.0})
    assert [finding.verdict for finding in findings] == ["pass", "pass", "fail", "fail"]


def test_a_slow_link_is_named_by_its_two_ends() -> None:
    links = [Link("a", "b", 1e9, 1e-3), Link("b", "c", 1e8, 1e-3), Link("c", "a", 1e9, 3e-3)]
    ring, slow = judge_links(links, 5e8)
    assert (ring.verdict, ring.what) == ("pass", "all-reduce at 500 MB/s a worker, 1.00 ms a message")
    assert (slow.where, slow.verdict) == ("b - c", "warn")
    assert slow.what == "the link from b to c is slow: 100 MB/s, others 1000"
    assert judge_links([], 0.0) == []


def test_a_blocked_port_is_a_finding_on_the_worker_that_cannot_pass() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, nobody listens: connections are refused
        port = taken.getsockname()[1]
        problem = reach("127.0.0.1", port, 1.0)
        taken.listen()
        assert reach("127.0.0.1", port, 1.0) == ""
    assert "refused" in problem
    (found,) = judge_reach({"worker 1 on 10.0.0.2": problem}, f"worker 0 on 10.0.0.1, port {port}")
    assert (found.where, found.verdict) == ("worker 1 on 10.0.0.2", "fail")
    assert f"cannot reach worker 0 on 10.0.0.1, port {port}" in found.what


# ---- facts of this machine ----


def test_a_look_at_this_machine_leaves_one_mark_under_the_root_and_forgetting_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    facts = look("here", str(root), "run1")
    assert facts.root.problem == ""
    assert min(facts.root.write_mb_s, facts.root.read_mb_s) > 0
    assert facts.versions["ray"] != "none" and facts.cpus >= 1 and facts.free_memory_bytes > 0
    assert 0 < facts.disk_free_bytes <= shutil.disk_usage(facts.disk_folder).total
    assert marks(str(root), "run1") == (facts.root.mark,)
    other = try_root(str(tmp_path / "elsewhere"), "run1")
    own = replace(facts, node=B, root=other)
    assert [finding.where for finding in judge_shared_root([facts, own], marks(str(root), "run1"))] == [B]
    forget_marks(str(root), "run1")
    assert list(root.rglob("*")) == []


def test_a_root_that_cannot_be_written_is_a_problem_in_two_lines(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    facts = try_root(str(tmp_path / "file" / "root"), "run1")
    found = judge_root(healthy(B, root=facts))
    assert (found.verdict, found.where) == ("fail", B)
    assert found.what.startswith(f"from {B}: ") and str(tmp_path / "file") in found.what
    assert found.hint and "\n" not in found.hint
    assert (facts.write_mb_s, facts.mark) == (0.0, "")


def tiny(tracker: str, folder: Path) -> RunConfig:
    return load_config("integration", None, [f"tracking.uri={tracker}"], str(folder / "root"))


def test_a_dead_tracker_is_a_failure_of_the_driver(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (found,) = _tracker(tiny(address, tmp_path))
    assert (found.check, found.where, found.verdict) == ("tracker", "driver", "fail")
    assert address in found.what and found.hint


@pytest.mark.parametrize(
    ("workers", "room", "tried"),
    [("2", 2, 2), ("2", 9, 2), ("2", 1, None), ("{min: 1, max: 8}", 1, 1), ("{min: 1, max: 8}", 3, 2)],
)
def test_an_elastic_job_is_tried_with_the_most_workers_that_have_room_and_divide_its_batch(
    workers: str, room: int, tried: int | None, tmp_path: Path
) -> None:
    settings = [f"{stage}.train.{size}" for stage in ("vq", "prior") for size in ("global_batch=64", "micro_batch=32")]
    config = load_config("integration", None, [f"compute.workers={workers}", *settings], str(tmp_path / "root"))
    assert workers_with_room(config, room) == tried


def test_a_nodes_findings_follow_the_plan_of_the_configuration(tmp_path: Path) -> None:
    config = load_config("integration", None, ["compute.workers=2"], str(tmp_path / "root"))
    plan: Plan = estimate(config, advise=False)
    checkpoint = max(stage.checkpoint_bytes for stage in plan.stages)
    memory = max(stage.memory.total for stage in plan.stages)
    facts = healthy(B, gpus=(), disk_free_bytes=int(checkpoint) - 1, free_memory_bytes=int(2 * memory) - 1)
    bad = {
        finding.check: finding.verdict
        for finding in _node_findings(config, plan, facts, 2, 999.0, 1_001.0)
        if finding.verdict != "pass"
    }
    assert bad == {"disk": "fail", "devices": "warn"}, "both workers on this node"
    halves = _node_findings(config, plan, facts, 1, 999.0, 1_001.0)
    assert {finding.check: finding.verdict for finding in halves if finding.verdict != "pass"} == {"disk": "warn"}


def test_the_table_has_a_hint_below_what_is_wrong_and_hides_secrets() -> None:
    findings = [
        Finding("disk", A, "pass", "room", "not shown"),
        Finding("tracker", "driver", "fail", "no answer at\nhttp://me:hunter2@tracker", "start it"),
    ]
    assert preflight_text(findings).splitlines() == [
        "pass  disk     10.0.0.1  room",
        "fail  tracker  driver    no answer at http://me:***@tracker",
        "      hint: start it",
    ]
    assert (worst(findings), worst(findings[:1]), worst([])) == ("fail", "pass", "pass")
