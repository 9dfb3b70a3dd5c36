"""Units of work spread over a Ray cluster: the only place that knows Ray Data.

A unit's worker writes its result itself and answers with a small summary, so nothing large ever travels to the driver,
and what is finished stays finished when the job is killed. Units are drawn from their iterator a window at a time: the
driver's memory does not grow with their number.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from infra.cluster import connect, offered
from infra.errors import EnvironmentFailure, InputError
from workflows.config import ComputeSettings

Summary = dict[str, Any]

_WINDOW = 4096
"""Units in the hands of Ray at once; starting the next window costs seconds."""


class UnitWorker(Protocol):
    """Does units one after the other; made once a process."""

    def __call__(self, unit: Any, /) -> Summary:
        """Do one unit and say what came of it."""


class _Guarded:
    """A worker whose errors for the user come back as they are, not wrapped three times."""

    def __init__(self, make: Callable[[], UnitWorker]) -> None:
        self._make = make
        self._worker: UnitWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._worker is None:
                self._worker = self._make()
            return _answer(self._worker(pickle.loads(row["unit"][0])))
        except (InputError, EnvironmentFailure) as error:
            return _answer(error)


def _answer(value: Summary | Exception) -> dict[str, Any]:
    """One row of one opaque column: Ray Data guesses the types of anything else."""
    return {"answer": np.array([pickle.dumps(value)], dtype=object)}


def map_units(
    make: Callable[[], UnitWorker], units: Iterable[Any], compute: ComputeSettings, *, on_gpus: bool = False
) -> Iterator[Summary]:
    """Do all units, in any order, and hand over their summaries as they come.

    Args:
        make: makes a worker in its process; what it closes over travels there.
        units: small descriptions of the work.
        compute: the cluster. As many workers start as the job has CPUs, or GPUs with `on_gpus`, at most one a unit.
        on_gpus: give each worker a GPU, where the job uses GPUs.

    Raises:
        InputError, EnvironmentFailure: what a worker met, in its own words.
    """
    waiting = iter(units)
    while window := list(itertools.islice(waiting, _WINDOW)):
        yield from _map_window(make, window, compute, on_gpus and compute.gpus_per_worker > 0)


def _map_window(
    make: Callable[[], UnitWorker], units: list[Any], compute: ComputeSettings, on_gpus: bool
) -> Iterator[Summary]:
    # Raised from here, so that the traceback holds nothing that still runs: a thread of Ray Data that asks the cluster
    # after the process has left it ends the process, with a status of its own.
    failure = yield from _until_failure(make, units, compute, on_gpus)
    if failure is not None:
        raise failure


def _until_failure(
    make: Callable[[], UnitWorker], units: list[Any], compute: ComputeSettings, on_gpus: bool
) -> Generator[Summary, None, Exception | None]:
    """The summaries up to the first failure, which is returned."""
    fewest = compute.least_workers if compute.address is not None else compute.most_workers
    connect(compute.address, fewest * compute.threads_per_worker)
    # An elastic job may find less than it would take at most; actors without a place would be waited for.
    cpus = min(compute.most_workers * compute.threads_per_worker, int(offered().get("CPU", 1)))
    gpus = min(compute.most_workers, int(offered().get("GPU", 0)))
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Guarded,
        fn_constructor_args=(make,),
        batch_size=1,
        batch_format="numpy",
        zero_copy_batch=False,
        num_cpus=1,
        num_gpus=1 if on_gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(len(units), gpus if on_gpus else cpus))),
    )
    # Answers are small: nothing is fetched ahead, in a thread that may outlive what it fetches for.
    for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for content in batch["answer"]:
            answer: Summary | Exception = pickle.loads(content)
            if isinstance(answer, Exception):
                return answer
            yield answer
    return None
