"""A plan as people read it: what fits, what it takes, and what to change."""

from __future__ import annotations

from workflows.planning.planner import GIB, Plan, StagePlan
from workflows.tables import aligned

_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "average": "moving average",
    "buffers": "codebooks",
    "activations": "activations",
    "exchange": "buckets, gathered weights",
    "fragments": "between allocations",
}


def plan_text(plan: Plan) -> str:
    """Tables of the stages, then storage, hours and cost, then what does not fit and the least change that does."""
    names = [stage.stage for stage in plan.stages]
    rows = [["", *names]]
    rows += [[label, *cells] for label, cells in _facts(plan.stages)]
    memory = [[f"memory a worker, GiB of {plan.device_gib:g} ({plan.device})", *[""] * len(names)]]
    for name, label in _MEMORY.items():
        memory.append([f"  {label}", *(f"{getattr(stage.memory, name) / GIB:.2f}" for stage in plan.stages)])
    memory.append(["  the process without a model", *[f"{plan.reserved_gib:.2f}"] * len(names)])
    memory.append(["  together", *(f"{stage.memory.total / GIB + plan.reserved_gib:.2f}" for stage in plan.stages)])
    stored = ", ".join(f"{name} {_bytes(size)}" for name, size in plan.storage_bytes.items() if size)
    total = sum(plan.storage_bytes.values())
    lines = [
        aligned([*rows, *memory]),
        "",
        f"storage   {_bytes(total)}: {stored} ({plan.storage_month:.2f} {plan.currency} a month)",
        f"time      {_hours(plan.hours)}, encoding and evaluation included",
        f"cost      {plan.cost:,.2f} {plan.currency} for {plan.devices} x {plan.device}",
        *(f"assumed   {text}" for text in plan.assumptions),
        "",
    ]
    return "\n".join([*lines, *_verdict(plan)])


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return ["it fits"]
    lines = [f"does not fit: {problem}" for problem in plan.problems]
    for change in plan.changes:
        settings = " ".join(f"--set {key}={_value(value)}" for key, value in change.settings.items())
        lines.append(f"least change: {settings}  ({change.memory_gib:.1f} GiB, {change.step_seconds:.3g} s a step)")
    unfit = {problem.split()[0] for problem in plan.problems} - {change.stage for change in plan.changes}
    lines += [
        f"no change of {stage} fits: it takes more workers, or a device with more memory" for stage in sorted(unfit)
    ]
    return lines


def _facts(stages: tuple[StagePlan, ...]) -> list[tuple[str, list[str]]]:
    return [
        ("parameters", [f"{stage.parameters:,}" for stage in stages]),
        ("workers, ZeRO stage", [f"{stage.workers}, {stage.zero_stage}" for stage in stages]),
        (
            "batch = micro x accumulated x workers",
            [f"{s.global_batch} = {s.micro_batch} x {s.accumulation} x {s.workers}" for s in stages],
        ),
        ("steps", [f"{stage.steps:,}" for stage in stages]),
        ("GFLOP an image, forward and backward", [f"{stage.flops_an_image / 1e9:.4g}" for stage in stages]),
        ("sent by a worker, a step", [_bytes(stage.wire_bytes) for stage in stages]),
        ("a step: computing", [f"{stage.compute_seconds:.3g} s" for stage in stages]),
        ("a step: sending", [f"{stage.exchange_seconds:.3g} s" for stage in stages]),
        ("training", [_hours(stage.hours) for stage in stages]),
        (
            "checkpoint",
            [f"{_bytes(s.checkpoint_bytes)}, {s.checkpoint_seconds:.2g} s, {s.checkpoints} times" for s in stages],
        ),
    ]


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
