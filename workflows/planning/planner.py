"""What a configuration will take before it is run: memory, time, traffic, storage and cost, and what to change.

Memory. Weights, gradients and optimizer state follow from the parameters by ZeRO stage (Rajbhandari et al.,
arXiv:1910.02054, section 5; weights are float32 here, AdamW keeps two moments). Activations are walked through, not
guessed (`workflows.planning.footprint`).

Time. Each kind of operation at the share of the device's peak that the price table states, plus starting every
operation, the optimizer's pass over memory, and what crosses the wire: a reduce-scatter and an all-gather of P bytes
over N workers each send P (N - 1) / N from every worker.

Symbols: P parameters, N workers, A micro-batches that a worker accumulates a step.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from workflows.config import RunConfig, TrainSettings
from workflows.planning.footprint import Footprint
from workflows.planning.model_walk import STAGES, Pictures, StageFootprint, StageName, stage_footprint
from workflows.planning.prices import Device, Prices, Shares, read_prices
from workflows.training.heap import gives_back

GIB = 2**30
_FLOAT = 4
_BUCKET_ELEMENTS = {"cpu": 1 << 23, "gpu": 50_000_000}
"""Of DeepSpeed's reduce and gather buffers, as the engine sets them."""
_ZERO3_LIVE = 1_000_000_000
"""Parameters that DeepSpeed keeps gathered at ZeRO-3 at most (its default)."""
_GIVEN_BACK = 0.08
"""Fragments where large pieces of memory are given back at once: their small remainder, measured on a CPU."""
_CONVOLUTIONS = 1.8
"""How much more of them there are on a CPU where convolutions work, whose results have a few large sizes and which need
scratch memory of their own; measured."""
_FRESH_PAGES = 1.3
"""How much longer a CPU computes where memory is given back, so that it is new each time; measured."""
_GATHERED_MODULE_SECONDS = 4e-3
"""What gathering a module's weights twice and reducing its gradients takes under ZeRO-3 besides the bytes, on CPUs,
where nothing of it overlaps with computing; measured with DeepSpeed over gloo."""
_DEFAULT_GPU = "h100-80gb"
_PICTURE_COMPRESSION = 4.0
"""A PNG of a picture is about so much smaller than its pixels."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments, and the float32 master copy where ZeRO keeps one; 0 when they live in the host's memory."""
    average: int
    """The weights' moving average."""
    buffers: int
    """Codebooks and other constants."""
    activations: int
    exchange: int
    """Buckets on their way, at ZeRO-3 the parameters that are gathered, and what the optimizer's step computes with."""
    fragments: int
    """What the allocator holds between the pieces in use."""

    @property
    def total(self) -> int:
        """Above what the process takes without a model."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """One training."""

    stage: StageName
    parameters: int
    workers: int
    zero_stage: int
    """As DeepSpeed runs it: alone, stages 1 and 2 have nobody to share with and become 0."""
    global_batch: int
    micro_batch: int
    accumulation: int
    steps: int
    memory: Memory
    host_bytes: int
    """Of a worker's optimizer state in the host's memory."""
    flops_an_image: float
    wire_bytes: float
    """That a worker sends in a step."""
    compute_seconds: float
    exchange_seconds: float
    step_seconds: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    checkpoints: int
    """That are written; `keep_checkpoints` of them stay."""
    kept_checkpoints: int

    @property
    def hours(self) -> float:
        """Of training, checkpoints included."""
        return (self.steps * self.step_seconds + self.checkpoints * self.checkpoint_seconds) / 3600


@dataclass(frozen=True)
class Change:
    """A way to make a stage fit."""

    stage: StageName
    settings: dict[str, Any]
    """New values by dotted key."""
    memory_gib: float
    """A worker's memory with them."""
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """The whole answer."""

    device: str
    currency: str
    device_gib: float
    stages: tuple[StagePlan, ...]
    reserved_gib: float
    storage_bytes: dict[str, int]
    """Of the dataset, the codes, and what stays of checkpoints and models."""
    storage_month: float
    """Price of keeping it for a month."""
    devices: int
    other_hours: float
    """Of one device: encoding and the evaluation's pictures, which all devices share."""
    cost: float
    assumptions: tuple[str, ...]
    changes: tuple[Change, ...] = field(default=())
    problems: tuple[str, ...] = field(default=())

    @property
    def memory_gib(self) -> float:
        """The larger stage's memory of a worker, all in all."""
        return max(stage.memory.total for stage in self.stages) / GIB + self.reserved_gib

    @property
    def fits(self) -> bool:
        """Whether every stage fits a device."""
        return not self.problems

    @property
    def hours(self) -> float:
        """From the first step to the last."""
        return sum(stage.hours for stage in self.stages) + self.other_hours / self.devices

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        value = asdict(self)
        for shown, stage in zip(value["stages"], self.stages, strict=True):
            shown["memory"]["total"] = stage.memory.total
            shown["hours"] = stage.hours
        return {**value, "memory_gib": self.memory_gib, "fits": self.fits, "hours": self.hours}


@dataclass(frozen=True)
class Machine:
    """What the work runs on."""

    name: str
    device: Device
    shares: Shares
    storage_gb_s: float = 1.0
    """Between a worker and the root."""


def machine_for(config: RunConfig, prices: Prices, device: str | None, storage_gb_s: float) -> Machine:
    """The named device, or the usual one for the configuration's kind of workers."""
    name = device or (_DEFAULT_GPU if config.compute.gpus_per_worker else "cpu")
    return Machine(name, prices.device(name), prices.shares, storage_gb_s)


def estimate(
    config: RunConfig,
    *,
    prices: Prices | None = None,
    device: str | None = None,
    storage_gb_s: float = 1.0,
    pictures: Pictures | None = None,
    advise: bool = True,
) -> Plan:
    """The plan of a configuration; nothing is read from its root and nothing is computed.

    Args:
        prices: the table; None for the one that comes with hvqd.
        device: its name in the table; None for `cpu` or an H100, as the configuration asks for.
        storage_gb_s: bandwidth between a worker and the root, 10^9 bytes a second.
        pictures: how many pictures and classes there are; None takes what the source tells without being read.
        advise: look for the least change when something does not fit.

    Raises:
        InputError: no such device.
    """
    prices = prices or read_prices()
    pictures = pictures or Pictures.of(config)
    machine = machine_for(config, prices, device, storage_gb_s)
    footprints = {stage: stage_footprint(config, stage, pictures) for stage in STAGES}
    stages = tuple(plan_stage(config, stage, footprints[stage], machine) for stage in STAGES)
    room = machine_room(machine, config)
    problems = tuple(_problem(stage, room, machine) for stage in stages if stage.memory.total > room)
    changes: tuple[Change, ...] = ()
    if problems and advise:
        from workflows.planning.advice import least_change

        wanting = [stage.stage for stage in stages if stage.memory.total > room]
        changes = tuple(
            change for name in wanting if (change := least_change(config, name, pictures, machine)) is not None
        )
    storage = _storage(config, stages, pictures)
    other = _other_hours(config, footprints, machine, pictures)
    devices = config.compute.most_workers * (1 if config.compute.gpus_per_worker else config.compute.threads_per_worker)
    cost = machine.device.hour * (devices * sum(stage.hours for stage in stages) + other)
    return Plan(
        device=machine.name,
        currency=prices.currency,
        device_gib=_device_gib(machine, config),
        stages=stages,
        reserved_gib=machine.device.reserved_gib,
        storage_bytes=storage,
        storage_month=sum(storage.values()) / GIB * prices.storage_gib_month,
        devices=devices,
        other_hours=other,
        cost=cost,
        assumptions=_assumptions(config, machine, pictures),
        changes=changes,
        problems=problems,
    )


def plan_stage(config: RunConfig, stage: StageName, walked: StageFootprint, machine: Machine) -> StagePlan:
    """One stage's plan from what its micro-batch takes."""
    settings = settings_of(config, stage)
    workers = config.compute.most_workers
    accumulation = settings.global_batch // (settings.micro_batch * workers)
    on_gpu = _on_gpu(config)
    zero = effective_stage(settings, workers)
    compute, exchange = _step_times(config, stage, walked, machine)
    steps = math.ceil(settings.images / settings.global_batch)
    # On GPUs what is sent overlaps with backward; on CPUs the same cores do both.
    step = max(compute, exchange) if on_gpu else compute + exchange
    copies = 4 if settings.ema_half_life_images else 3
    memory = memory_of(settings, walked, workers, on_gpu=on_gpu)
    checkpoint = copies * _FLOAT * walked.parameters + walked.buffer_bytes
    return StagePlan(
        stage=stage,
        parameters=walked.parameters,
        workers=workers,
        zero_stage=zero,
        global_batch=settings.global_batch,
        micro_batch=settings.micro_batch,
        accumulation=accumulation,
        steps=steps,
        memory=replace(memory, fragments=_fragments(config, stage, machine, memory)),
        host_bytes=3 * _FLOAT * walked.parameters // workers if settings.offload_optimizer else 0,
        flops_an_image=walked.micro.total_flops / settings.micro_batch,
        wire_bytes=wire_bytes(walked.parameters, walked.statistics_bytes, workers, zero, accumulation),
        compute_seconds=compute,
        exchange_seconds=exchange,
        step_seconds=step,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / workers / (machine.storage_gb_s * 1e9),
        checkpoints=max(1, settings.images // settings.checkpoint_every_images),
        kept_checkpoints=settings.keep_checkpoints,
    )


def settings_of(config: RunConfig, stage: StageName) -> TrainSettings:
    """The stage's optimisation."""
    return config.vq.train if stage == "vq" else config.prior.train


def _on_gpu(config: RunConfig) -> bool:
    return config.compute.gpus_per_worker > 0


def effective_stage(settings: TrainSettings, workers: int) -> int:
    """The ZeRO stage that the engine runs."""
    from workflows.training.zero import worthwhile

    return int(worthwhile(settings, workers).zero_stage)


def _fragments(config: RunConfig, stage: StageName, machine: Machine, memory: Memory) -> int:
    """Bytes that the allocator holds between the pieces in use.

    On a CPU what is freed is kept (`workflows.training.heap`): the few large pieces of a step's end find no room among
    the many that activations leave, and come on top. A checkpointed prior gives all back.
    """
    if _on_gpu(config):  # buckets find their old place again
        share = machine.device.fragments * memory.activations
    elif gives_back(config, stage):
        share = _GIVEN_BACK * (memory.activations + memory.exchange)
    else:
        more = _CONVOLUTIONS if stage == "vq" else 1.0
        share = machine.device.fragments * more * memory.activations + memory.exchange
    return round(share)


def memory_of(settings: TrainSettings, walked: StageFootprint, workers: int, *, on_gpu: bool) -> Memory:
    """A worker's bytes at the peak of a step, by ZeRO stage, without fragments.

    ZeRO 1 and 2 keep whole weights and a master copy of the own part; ZeRO-3 keeps both in parts, and gathers what it
    computes with.
    """
    zero = effective_stage(settings, workers)
    whole = _FLOAT * walked.parameters
    part = -(-whole // workers)
    bucket = min(_BUCKET_ELEMENTS["gpu" if on_gpu else "cpu"] * _FLOAT, whole)
    averaged = settings.ema_half_life_images > 0
    accumulates = settings.global_batch > settings.micro_batch * workers
    # With nothing accumulated yet, gradients grow while activations go.
    grows = zero < 2 and not accumulates
    activations = walked.micro.growing_bytes - whole if grows else walked.micro.transient_bytes
    match zero:
        case 0:
            weights, gradients, optimizer, exchange = whole, whole, 2 * whole, 0 if workers == 1 else bucket
        case 1:
            weights, gradients, optimizer, exchange = whole, whole, 3 * part, 2 * bucket + part
        case 2:
            weights, gradients, optimizer, exchange = whole, 2 * part, 3 * part, 2 * bucket
        case _:
            gathered = _FLOAT * min(walked.parameters, _ZERO3_LIVE)
            gathered = max(gathered, walked.micro.largest_parameter_bytes)
            weights, gradients, optimizer, exchange = part, 2 * part, 3 * part, gathered + 2 * bucket
    if settings.offload_optimizer and zero > 0:
        optimizer = 0
    if not on_gpu:  # there AdamW is no single kernel
        exchange += part if zero else whole
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=(part if zero else whole) if averaged else 0,
        buffers=walked.buffer_bytes,
        activations=max(activations, 0),
        exchange=exchange,
        fragments=0,
    )


def wire_bytes(parameters: int, statistics: int, workers: int, zero: int, accumulation: int) -> float:
    """Bytes that a worker sends in a step; every one receives as many.

    ZeRO 0 and 1 reduce and gather once a step, ZeRO-2 reduces after every micro-batch, ZeRO-3 also gathers the weights
    for each forward and each backward.
    """
    share = (workers - 1) / workers
    unit = _FLOAT * parameters * share
    match zero:
        case 0 | 1:
            sent = 2 * unit
        case 2:
            sent = (accumulation + 1) * unit
        case _:
            sent = 3 * accumulation * unit
    return sent + 2 * statistics * share


def _step_times(config: RunConfig, stage: StageName, walked: StageFootprint, machine: Machine) -> tuple[float, float]:
    """Seconds of a step's computing, and of what it sends."""
    settings, workers, on_gpu = settings_of(config, stage), config.compute.most_workers, _on_gpu(config)
    zero = effective_stage(settings, workers)
    accumulation = settings.global_batch // (settings.micro_batch * workers)
    part = walked.parameters if zero == 0 else walked.parameters / workers
    copies = 7 + (3 if settings.ema_half_life_images else 0)  # AdamW reads four and writes three, the average 2 + 1
    bandwidth = machine.device.memory_gb_s * 1e9 * machine.shares.memory
    optimizer = copies * _FLOAT * part / bandwidth
    if settings.offload_optimizer:
        optimizer += 2 * _FLOAT * part / (machine.device.link_gb_s * 1e9)
    longer = _FRESH_PAGES if gives_back(config, stage) else 1.0
    compute = accumulation * longer * micro_seconds(walked.micro, machine) + optimizer
    sent = wire_bytes(walked.parameters, walked.statistics_bytes, workers, zero, accumulation)
    across = workers > machine.device.per_node
    speed = machine.device.network_gb_s if across else machine.device.link_gb_s
    gathered = accumulation * walked.modules if zero == 3 and workers > 1 and not on_gpu else 0
    return compute, sent / (speed * 1e9) + gathered * _GATHERED_MODULE_SECONDS


def micro_seconds(micro: Footprint, machine: Machine) -> float:
    """Seconds of one micro-batch, forward and backward."""
    device, shares = machine.device, machine.shares
    speeds = {
        "matrix_fp32": device.fp32_tflops * shares.matrix,
        "matrix_bf16": device.bf16_tflops * shares.matrix,
        "convolution_fp32": device.fp32_tflops * shares.convolution,
        "convolution_bf16": device.bf16_tflops * shares.convolution,
    }
    computing = sum(flops / (speeds[work] * 1e12) for work, flops in micro.flops.items())
    moving = micro.moved_bytes / (device.memory_gb_s * 1e9 * shares.memory)
    return computing + moving + micro.operations * device.launch_us * 1e-6


def machine_room(machine: Machine, config: RunConfig) -> float:
    """Bytes that a worker's model may take."""
    return (_device_gib(machine, config) - machine.device.reserved_gib) * GIB


def _device_gib(machine: Machine, config: RunConfig) -> float:
    threads = 1 if config.compute.gpus_per_worker else config.compute.threads_per_worker
    return machine.device.memory_gib * threads


def _problem(stage: StagePlan, room: float, machine: Machine) -> str:
    return (
        f"{stage.stage} needs {stage.memory.total / GIB:.1f} GiB a worker, {machine.name} leaves {room / GIB:.1f} GiB"
    )


def _storage(config: RunConfig, stages: tuple[StagePlan, ...], pictures: Pictures) -> dict[str, int]:
    height, width = config.data.image_size
    codes = _FLOAT * config.vq_config.tokens
    kept = {
        f"{stage.stage} checkpoints": stage.checkpoint_bytes * min(stage.kept_checkpoints, stage.checkpoints)
        for stage in stages
    }
    models = {f"{stage.stage} model": _FLOAT * stage.parameters for stage in stages}
    count = pictures.count or 0
    dataset = int(count * 3 * height * width / _PICTURE_COMPRESSION)
    return {"dataset": dataset, "codes": count * codes, **kept, **models}


def _other_hours(
    config: RunConfig, footprints: dict[StageName, StageFootprint], machine: Machine, pictures: Pictures
) -> float:
    """Of one device, to encode every picture and draw the evaluation's samples.

    A forward is a third of a training step's work.
    """
    encode = micro_seconds(footprints["vq"].micro, machine) / 3 / config.vq.train.micro_batch
    draw = micro_seconds(footprints["prior"].micro, machine) / 3 / config.prior.train.micro_batch
    passes = config.sampling.steps * (1 if config.sampling.guidance in (0, 1) else 2)
    samples = config.evaluation.samples + config.evaluation.baseline_samples
    return ((pictures.count or 0) * encode + samples * passes * draw) / 3600


def _assumptions(config: RunConfig, machine: Machine, pictures: Pictures) -> tuple[str, ...]:
    shares = machine.shares
    found = [
        f"{shares.matrix:.0%} of peak in matrix products, {shares.convolution:.0%} in convolutions, "
        f"{shares.memory:.0%} of the memory bandwidth",
        "what is sent overlaps with computing" if config.compute.gpus_per_worker else "nothing is sent while computing",
        f"{machine.storage_gb_s:g} GB/s between a worker and the root",
    ]
    if pictures.count is None:
        found.append("the number of pictures is unknown: give it with --pictures for dataset, codes and encoding")
    if set(config.prior.model.conditions) - {"class"}:
        found.append("conditions other than the class are left out: their networks are small beside the prior")
    if pictures.classes is None:
        found.append("the number of classes is unknown: 1,000 are assumed")
    return tuple(found)


def with_this_machine(prices: Prices, threads: int) -> Prices:
    """The table with one more device, `here`: a CPU core of this machine, measured at the moment."""
    import os

    import torch

    from workflows.planning.calibration import calibrate

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / (os.cpu_count() or 1)
        device, shares = calibrate(memory, prices.device("cpu").hour)
    finally:
        torch.set_num_threads(before)
    return prices.model_copy(update={"shares": shares, "devices": {**prices.devices, "here": device}})
