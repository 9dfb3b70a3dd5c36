"""How many workers a training may have, and how many a cluster could hold."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import InputError
from workflows.loading import load_config
from workflows.training.elastic import bundle, could_hold


@pytest.mark.parametrize(
    ("workers", "allowed"),
    [("2", [2]), ("{min: 1, max: 3}", [1, 2]), ("{max: 2}", [1, 2]), ("{min: 2, max: 2}", [2])],
)
def test_the_numbers_of_workers_divide_the_global_batch(workers: str, allowed: list[int]) -> None:
    config = load_config("tiny", None, [f"compute.workers={workers}"])
    assert config.workers_for(config.vq.train) == config.workers_for(config.prior.train) == allowed
    assert (config.compute.least_workers, config.compute.most_workers) == (
        (2, 2) if workers == "2" else (1 if "min: 2" not in workers else 2, 3 if "3" in workers else 2)
    )


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("two", r"compute\.workers: .*integer.*'two'\nhint: "),
        ("0", r"compute\.workers: .*greater than or equal to 1, not 0\nhint: "),
        ("{min: 3, max: 2}", r"workers must rise from min to max: 3 to 2\nhint: \{min: 1, max: 4\}"),
        ("{min: 1}", r"compute\.workers\.max: field required"),
        ("{min: 3, max: 3}", r"global_batch must be a multiple of .*\(8 x 3\): 16\nhint: the nearest is"),
    ],
)
def test_what_cannot_work_is_refused(workers: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("tiny", None, [f"compute.workers={workers}"])


def test_a_worker_is_placed_whole_and_only_on_nodes_that_are_alive() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    nodes = [node(CPU=5.0, GPU=8.0), node(CPU=3.0), node(alive=False, CPU=64.0, GPU=8.0), node()]
    compute = load_config("tiny", None, ["compute.threads_per_worker=2"]).compute
    assert bundle(compute) == {"CPU": 2.0}
    assert could_hold(nodes, bundle(compute)) == 3
    compute = load_config("tiny", None, ["compute.threads_per_worker=2", "compute.gpus_per_worker=1"]).compute
    assert could_hold(nodes, bundle(compute)) == 2
