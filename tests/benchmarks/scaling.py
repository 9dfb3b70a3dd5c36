"""What 1,024 ranks cost beside computing: bookkeeping run at that size in one process, and the traffic model fitted.

Every part is the product's own code, told that there are 1,024 ranks: the checkpoint's files, receipts and manifest
(shapes of the `large` prior, cut by ZeRO-3; the tensors themselves are one element long), the data order, what goes
through the driver's mailbox, and a rendezvous of 1,024 clients at torch's store. `growth` is the exponent between a
quarter of the ranks and all of them: 1 is linear.
"""

from __future__ import annotations

import json
import math
import pickle
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # spawned ranks import this script by its path

from infra.storage import Store
from tests.multiprocess.ranks import run_on_ranks
from workflows.data.batches import batch_indices
from workflows.training.catalog import Saved, read_saved
from workflows.training.checkpoint import StoreCheckpoints, _Share
from workflows.training.ledger import Ledger
from workflows.training.loop import TrainState
from workflows.training.mailbox import Mailbox
from workflows.training.state import EngineState, Range
from workflows.training.watchdog import Heart, Watchdog

RANKS, QUARTER = 1024, 256
PICTURES = 1_281_167
GLOBAL_BATCH = 16 * RANKS
WIDTH, DEPTH = 2304, 40
_CLIENT_THREADS = 64


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def growth(at: Callable[[int], Figures]) -> Figures:
    """Figures at all ranks, and the exponent of each between a quarter of them and all."""
    quarter, whole = at(QUARTER), at(RANKS)
    exponents = {
        f"growth_{name}": math.log(whole[name] / quarter[name]) / math.log(RANKS / QUARTER)
        for name in whole
        if quarter[name] > 0
    }
    return whole | exponents


# ---- checkpoints ----


def shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a prior like that of the preset `large`, by name."""
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (1000, WIDTH), "head.weight": (WIDTH, 64)}
    for block in range(depth):
        parts = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
        parts |= {"modulation": (6 * WIDTH, WIDTH), "temperature": (24, 1)}
        for name, shape in parts.items():
            found[f"model.denoiser.blocks.{block}.{name}.weight"] = shape
            found[f"model.denoiser.blocks.{block}.{name}.bias"] = shape[:1]
    return found


def share(rank: int, ranks: int, depth: int) -> _Share:
    """A rank's part under ZeRO-3, which cuts every parameter into as many pieces as there are ranks."""
    ranges: dict[str, Range] = {}
    whole = shapes(depth)
    for name, shape in whole.items():
        size = math.prod(shape)
        piece = -(-size // ranks)
        start = rank * piece
        if start < size:
            ranges[name] = Range(start, min(piece, size - start))
    values = {f"weight/{name}": torch.zeros(1) for name in list(ranges)[:1]}
    state = EngineState(values, ranges, dict.fromkeys(ranges, 1000), whole, {"buffer/codebook": torch.zeros(8)})
    from workflows.training.catalog import Name

    return _Share(Name(0, 1_000_000, ranks, "0123abcd"), rank, state, None, {}, TrainState(1_000_000))


def checkpoint(depth: int, ranks: int) -> Figures:
    """Rank 0's part of writing a checkpoint, and every rank's part of reading it."""
    with tempfile.TemporaryDirectory(prefix="hvqd-scaling-") as folder:
        kept = StoreCheckpoints(Store(folder), "request", keep=2)
        place = kept.store.child(share(0, ranks, depth).place.text)
        one = timed(lambda: kept._write_files(place, share(1, ranks, depth)))
        for rank in range(2, ranks):
            kept._write_files(place, share(rank, ranks, depth))
        chief = share(0, ranks, depth)
        write = timed(lambda: kept._write(chief))
        found: list[Saved | None] = []
        read = timed(lambda: found.append(read_saved(kept.store, chief.place.text)))
        saved = found[0]
        assert saved is not None and len(saved.files) == ranks + 1
        sent = pickle.dumps(saved)
        locate = timed(lambda: saved.state(lambda name: Path(folder) / name))
        manifest = len(json.dumps(saved.as_json()))
    return {
        "checkpoint_seconds_rank_0": write,
        "checkpoint_seconds_other_rank": one,
        "checkpoint_read_seconds": read + locate,
        "checkpoint_manifest_megabytes": manifest / 1e6,
        "checkpoint_broadcast_megabytes": len(sent) / 1e6,
    }


# ---- data order ----


def data_order(ranks: int) -> Figures:
    """What all ranks of a step ask for, and what one of them needs for it."""
    unit = GLOBAL_BATCH // ranks
    mine = [timed(partial(batch_indices, PICTURES, 7, 5 * GLOBAL_BATCH + rank * unit, unit)) for rank in range(ranks)]
    rows = np.concatenate([batch_indices(PICTURES, 7, 5 * GLOBAL_BATCH + rank * unit, unit) for rank in range(ranks)])
    whole = batch_indices(PICTURES, 7, 5 * GLOBAL_BATCH, GLOBAL_BATCH)
    assert np.array_equal(rows, whole) and len(set(rows.tolist())) == GLOBAL_BATCH, "each picture once"
    return {"order_seconds_a_rank": statistics.median(mine)}


# ---- what the driver hears ----


def driver(ranks: int) -> Figures:
    """A second of training as the driver hears it: a pulse from every rank, and its conclusions."""
    heard: list[object] = []
    heart = Heart(heard.append, 0, Ledger())
    pulses = [pickle.dumps(("pulse", heart.pulse())) for _ in range(3)]
    mailbox, dog = Mailbox(), Watchdog(600.0, 2.0)

    def second() -> None:
        for rank in range(ranks):
            kind, pulse = pickle.loads(pulses[0])
            object.__setattr__(pulse, "rank", rank)
            mailbox.put((kind, pulse))
        for _ in range(3):  # the driver looks every 0.3 s
            for _, pulse in mailbox.take():
                dog.hear(pulse)
            assert dog.hung() == ""
            dog.slow()

    second()
    seconds = statistics.median(timed(second) for _ in range(5))
    assert len(dog.pulses) == ranks
    return {"driver_seconds_a_second": seconds, "driver_kilobytes_a_second": ranks * len(pulses[0]) / 1e3}


# ---- rendezvous ----


def rendezvous(ranks: int) -> Figures:
    """All ranks meet at torch's store as a process group does: each tells its address and reads its peers' count."""
    server = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    failures: list[BaseException] = []

    def clients(first: int) -> None:
        try:
            stores = [
                dist.TCPStore("127.0.0.1", server.port, ranks, is_master=False, wait_for_workers=False)
                for _ in range(first, min(first + _CLIENT_THREADS, ranks))
            ]
            for rank, store in enumerate(stores, first):
                store.set(f"address-{rank}", f"10.0.{rank // 256}.{rank % 256}:1234")
                store.add("arrived", 1)
            store = stores[0]
            while store.add("arrived", 0) < ranks:
                time.sleep(0.01)
            for rank in range(first, min(first + _CLIENT_THREADS, ranks)):
                store.get(f"address-{(rank + 1) % ranks}")
        except BaseException as error:  # raised in the main thread
            failures.append(error)

    def meet() -> None:
        threads = [threading.Thread(target=clients, args=(first,)) for first in range(0, ranks, _CLIENT_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    seconds = timed(meet)
    if failures:
        raise failures[0]
    return {"rendezvous_seconds": seconds}


# ---- the traffic model ----


def _reduced(sizes: list[int]) -> list[float]:
    """Median seconds of an all-reduce of so many floats."""
    found = []
    for size in sizes:
        tensor = torch.ones(size)
        dist.all_reduce(tensor)
        seconds = []
        for _ in range(9):
            dist.barrier()
            seconds.append(timed(partial(dist.all_reduce, tensor)))
        found.append(statistics.median(seconds))
    return found


def traffic(quick: bool, seed: int) -> Figures:
    """Seconds = latency + 2 (N - 1) / N bytes / bandwidth, fitted to all-reduces of two gloo ranks, and its error."""
    sizes = [1 << power for power in (range(10, 20, 3) if quick else range(10, 24, 2))]
    with tempfile.TemporaryDirectory(prefix="hvqd-scaling-") as folder:
        seconds = np.array(run_on_ranks(_reduced, Path(folder), sizes, world=2)[0])
    sent = np.array([4.0 * size for size in sizes])  # of two ranks each sends all bytes once
    weights = 1 / seconds  # relative errors count
    design = np.stack([np.ones_like(sent), sent], 1)
    (latency, slope), *_ = np.linalg.lstsq(design * weights[:, None], seconds * weights, rcond=None)
    errors = np.abs(design @ np.array([latency, slope]) / seconds - 1)
    return {
        "gloo_latency_microseconds": 1e6 * float(latency),
        "gloo_gigabytes_a_second": 1e-9 / float(slope),
        "gloo_median_error": float(np.median(errors)),
        "gloo_largest_error": float(errors.max()),
    }


def measured(part: Callable[[int], Figures]) -> Callable[[bool, int], Figures]:
    """A part as the runner calls it."""
    return lambda quick, seed: growth(part)


BENCHMARK = Benchmark(
    name="scaling",
    what=__doc__ or "",
    parts={
        "checkpoint": lambda quick, seed: growth(partial(checkpoint, 4 if quick else DEPTH)),
        "order": measured(data_order),
        "driver": measured(driver),
        "rendezvous": measured(rendezvous),
        "traffic": traffic,
    },
    targets=(
        Target("growth_checkpoint_seconds_rank_0", "<=", 1.15),
        Target("growth_checkpoint_read_seconds", "<=", 1.15),
        Target("growth_checkpoint_manifest_megabytes", "<=", 1.05),
        Target("growth_order_seconds_a_rank", "<=", 1.0),
        Target("growth_driver_seconds_a_second", "<=", 1.15),
        Target("driver_seconds_a_second", "<=", 0.5),
        Target("growth_rendezvous_seconds", "<=", 1.15),
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
