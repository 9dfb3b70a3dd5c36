"""What a preset takes on more GPUs, up to 1,024: the planner's step, latencies, data, checkpoints and failures.

`python tests/benchmarks/scaling_model.py` prints the tables of docs/scaling.md. Compute and traffic are the planner's
(workflows/planning/planner.py); what it leaves out because it does not matter on a few machines is added here.

Symbols: N GPUs, C seconds that a checkpoint takes from the steps, M mean seconds between failures of the whole job,
R seconds that a restart takes, tau seconds between checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workflows.config import RunConfig
from workflows.planning.model_walk import Pictures, StageFootprint, StageName, stage_footprint
from workflows.planning.planner import StagePlan, machine_for, plan_stage, settings_of
from workflows.planning.prices import read_prices

GPUS = (32, 64, 128, 256, 512, 1024)
PICTURES = Pictures(1_281_167, 1_000)
"""As many as ImageNet's training set has."""
_BUCKET_BYTES = 4 * 50_000_000


@dataclass(frozen=True)
class Assumptions:
    """All that was not measured here."""

    hop_seconds: float = 20e-6
    """That a collective's message takes to another machine, beside its bytes: it crosses log2(N) of them."""
    gpu_hours_between_failures: float = 50_000.0
    """Of one GPU with its share of machine and network: 419 interruptions of 16,384 GPUs in 54 days, arXiv:2407.21783,
    section 3.3.4."""
    restart_seconds: float = 300.0
    """To notice a lost machine, to find or wait for another one, to start processes, and to read the checkpoint."""
    blocked_seconds: float = 2.0
    """That steps stand still for a checkpoint: the copy of a rank's share to the host's memory; the rest is written
    beside them."""
    slowest_rank: float = 1.05
    """Of N ranks the slowest decides; so much longer than the mean."""
    picture_bytes: float = 110_000.0
    """A picture of the set as it is stored, 256 x 256 in PNG."""
    decoded_bytes: float = 3 * 256 * 256
    """Of it in the machine's cache."""
    root_gb_s: float = 25.0
    """That the object store gives to all machines together."""
    decode_per_core: float = 400.0
    """Pictures a second that a CPU core decodes."""
    cores: int = 64
    """Of a machine."""


@dataclass(frozen=True)
class Projection:
    """A training on N GPUs."""

    gpus: int
    plan: StagePlan
    latency_seconds: float
    """Of a step's collectives, beside their bytes."""
    step_seconds: float
    efficiency: float
    """Images a second and GPU, over those at the smallest number of GPUs."""
    failures: float
    """Expected until the end."""
    checkpoint_every_seconds: float
    """Between checkpoints, at the best."""
    goodput: float
    """Share of all time that is steps that count."""
    start_seconds: float
    """To bring the pictures to every machine's cache, once."""
    hours: float


def messages(parameters: int, zero_stage: int, accumulation: int, layers: int) -> int:
    """Collectives of a step: one a bucket, and at ZeRO-3 at least one a layer for each gather."""
    buckets = math.ceil(4 * parameters / _BUCKET_BYTES)
    match zero_stage:
        case 0 | 1:
            return 2 * buckets
        case 2:
            return (accumulation + 1) * buckets
        case _:
            return accumulation * (2 * max(layers, buckets) + buckets)


def best_interval(blocked: float, between_failures: float) -> float:
    """Seconds between checkpoints that cost least: sqrt(2 C M) (Young, doi:10.1145/361147.361115)."""
    return math.sqrt(2 * blocked * between_failures)


def overhead(blocked: float, interval: float, between_failures: float, restart: float) -> float:
    """Share of time that checkpoints and failures take: C / tau + (tau / 2 + R) / M."""
    return blocked / interval + (interval / 2 + restart) / between_failures


def on_gpus(config: RunConfig, gpus: int, *, weak: bool) -> RunConfig:
    """On so many workers: the global batch grows with them (weak), or stays; a GPU has one picture at least."""
    values = config.model_dump(mode="json")
    for stage in ("vq", "prior"):
        train = values[stage]["train"]
        if weak:
            train["global_batch"] = train["global_batch"] * gpus // config.compute.most_workers
        else:
            train["micro_batch"] = min(train["micro_batch"], max(1, train["global_batch"] // gpus))
            train["global_batch"] = max(train["global_batch"], gpus)
    values["compute"]["workers"] = gpus
    return RunConfig.model_validate(values)


def footprint(config: RunConfig, stage: StageName) -> StageFootprint:
    """Of one micro-batch, however many workers there are: walked through once for each size."""
    values = config.model_dump(mode="json")
    values["compute"]["workers"] = 1
    for train in (values["vq"]["train"], values["prior"]["train"]):
        train["global_batch"] = train["micro_batch"]
    return stage_footprint(RunConfig.model_validate(values), stage, PICTURES)


def project(
    config: RunConfig,
    stage: StageName,
    gpus: Sequence[int] = GPUS,
    *,
    weak: bool = True,
    assumed: Assumptions | None = None,
    device: str = "h100-80gb",
) -> list[Projection]:
    """The stage's training on each number of GPUs."""
    assumed = assumed or Assumptions()
    found: list[Projection] = []
    for count in gpus:
        here = on_gpus(config, count, weak=weak)
        settings = settings_of(here, stage)
        machine = machine_for(here, read_prices(), device, assumed.root_gb_s)
        plan = plan_stage(here, stage, footprint(here, stage), machine)
        layers = here.prior.model.depth if stage == "prior" else 0
        hops = math.log2(count)
        latency = messages(plan.parameters, plan.zero_stage, plan.accumulation, layers) * hops * assumed.hop_seconds
        step = max(plan.compute_seconds * assumed.slowest_rank, plan.exchange_seconds + latency)
        between = assumed.gpu_hours_between_failures * 3600 / count
        interval = best_interval(assumed.blocked_seconds, between)
        lost = overhead(assumed.blocked_seconds, interval, between, assumed.restart_seconds)
        machines = math.ceil(count / machine.device.per_node)
        pictures = PICTURES.count or 0
        reading = pictures * assumed.picture_bytes * machines / (assumed.root_gb_s * 1e9)
        start = max(reading, pictures / (assumed.decode_per_core * assumed.cores))
        seconds = plan.steps * step / (1 - lost) + start
        rate = settings.global_batch / step / count
        first = found[0] if found else None
        base = first.plan.global_batch / first.step_seconds / first.gpus if first else rate
        found.append(
            Projection(
                gpus=count,
                plan=plan,
                latency_seconds=latency,
                step_seconds=step,
                efficiency=rate / base,
                failures=seconds / between,
                checkpoint_every_seconds=interval,
                goodput=1 - lost,
                start_seconds=start,
                hours=seconds / 3600,
            )
        )
    return found


def table(found: Sequence[Projection]) -> str:
    """For docs/scaling.md."""
    lines = [
        "| GPUs | batch | computing | sending | latency | step | images/s | efficiency | failures | checkpoint every "
        "| goodput | first start | hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        plan = row.plan
        cells = [
            f"{row.gpus:,}",
            f"{plan.global_batch:,}",
            f"{plan.compute_seconds:.2f} s",
            f"{plan.exchange_seconds:.2f} s",
            f"{row.latency_seconds:.3f} s",
            f"{row.step_seconds:.2f} s",
            f"{plan.global_batch / row.step_seconds:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.failures:.1f}",
            f"{row.checkpoint_every_seconds / 60:.0f} min",
            f"{row.goodput:.1%}",
            f"{row.start_seconds / 60:.0f} min",
            f"{row.hours:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from workflows.loading import load_config

    large = load_config("large")
    for stage_name, grows in (("vq", True), ("prior", True), ("prior", False)):
        how = "the batch grows with the GPUs" if grows else "the batch stays"
        print(f"{stage_name}, {how}\n\n{table(project(large, stage_name, weak=grows))}\n")  # type: ignore[arg-type]
