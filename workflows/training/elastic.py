"""How many workers a training starts with: as many as divide its global batch and as the cluster has room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from workflows.config import ComputeSettings
from workflows.training.patience import Warnings

_ROOM_SECONDS = 10.0
_PAUSE_SECONDS = 5.0
_GROWTH_SECONDS = 10.0


def bundle(compute: ComputeSettings) -> dict[str, float]:
    """What one worker asks of the cluster."""
    gpus = {"GPU": float(compute.gpus_per_worker)} if compute.gpus_per_worker else {}
    return {"CPU": float(compute.threads_per_worker), **gpus}


def could_hold(nodes: Sequence[dict[str, Any]], asked: dict[str, float]) -> int:
    """How many workers fit on the nodes that are alive, were they empty."""
    return sum(
        int(min(node["Resources"].get(name, 0.0) // count for name, count in asked.items()))
        for node in nodes
        if node["Alive"]
    )


def has_room(workers: int, compute: ComputeSettings, seconds: float = _ROOM_SECONDS) -> bool:
    """Whether so many workers can be placed now: their places are reserved for a moment."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    places = placement_group([bundle(compute)] * workers)
    try:
        ready, _ = ray.wait([places.ready()], timeout=seconds)
        return bool(ready)
    finally:
        remove_placement_group(places)


def choose_workers(allowed: Sequence[int], compute: ComputeSettings, say: Callable[[str], None]) -> int:
    """The number of workers to start with; waits until there is room for the smallest.

    Args:
        allowed: rising; a single one is taken as it is, and Ray waits for its place.
    """
    if len(allowed) == 1:
        return allowed[0]
    import ray

    warnings = Warnings()
    while True:
        possible = could_hold(ray.nodes(), bundle(compute))
        for workers in reversed(allowed):
            if workers <= possible and has_room(workers, compute):
                return workers
        line = warnings.say(f"  waiting for machines: there is room for {possible} workers, {allowed[0]} are needed")
        if line is not None:
            say(line)
        time.sleep(_PAUSE_SECONDS)


class Growth:
    """Notices that there is room for more workers than train now."""

    def __init__(self, allowed: Sequence[int], workers: int, compute: ComputeSettings) -> None:
        self._larger = [count for count in allowed if count > workers]
        self._workers, self._compute = workers, compute
        self._looked = time.monotonic()

    def target(self) -> int | None:
        """A larger number of workers that there is room for; looked up now and then."""
        if not self._larger or time.monotonic() - self._looked < _GROWTH_SECONDS:
            return None
        self._looked = time.monotonic()
        import ray

        possible = could_hold(ray.nodes(), bundle(self._compute))
        for count in reversed(self._larger):
            if count <= possible and has_room(count - self._workers, self._compute, seconds=2.0):
                return count
        return None
