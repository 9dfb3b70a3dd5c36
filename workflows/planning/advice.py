"""The least change that makes a stage fit: tried in the order of what it costs, and the cheapest that is enough taken.

A smaller micro-batch only accumulates more and changes no result. A higher ZeRO stage sends more. Activation
checkpointing computes forward twice. Offloading moves the optimizer's state over the bus in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from workflows.config import RunConfig
from workflows.planning.model_walk import Pictures, StageName, stage_footprint
from workflows.planning.planner import GIB, Change, Machine, machine_room, plan_stage, settings_of

Settings = dict[str, Any]


def least_change(config: RunConfig, stage: StageName, pictures: Pictures, machine: Machine) -> Change | None:
    """The fewest settings, and among equally many those that cost least, with which the stage fits; None if none do."""
    kinds, room = _kinds(config, stage), machine_room(machine, config)

    def tried(settings: Settings) -> Change | None:
        changed = changed_config(config, settings)
        plan = plan_stage(changed, stage, stage_footprint(changed, stage, pictures), machine)
        if plan.memory.total > room:
            return None
        return Change(stage, settings, plan.memory.total / GIB + machine.device.reserved_gib, plan.step_seconds)

    if not kinds or tried({key: value for kind in kinds for key, value in kind[-1].items()}) is None:
        return None  # not even everything at once
    for size in range(1, len(kinds) + 1):
        for settings in _combined(kinds, size):
            if (found := tried(settings)) is not None:
                return found
    return None


def changed_config(config: RunConfig, settings: Settings) -> RunConfig:
    """The configuration with values at dotted keys."""
    value = config.model_dump(mode="json")
    for key, given in settings.items():
        *path, last = key.split(".")
        group = value
        for part in path:
            group = group[part]
        group[last] = given
    return RunConfig.model_validate(value)


def _combined(kinds: list[list[Settings]], size: int) -> Iterator[Settings]:
    """Settings that change `size` kinds of things: cheap kinds first, each in rising strength."""
    for chosen in combinations(kinds, size):
        merged: list[Settings] = [{}]
        for kind in chosen:
            merged = [{**before, **settings} for before in merged for settings in kind]
        yield from merged


def _kinds(config: RunConfig, stage: StageName) -> list[list[Settings]]:
    """What can be changed, the cheapest kind first; of each kind the values in rising strength."""
    settings, prefix = settings_of(config, stage), f"{stage}.train"
    smaller, micro = [], settings.micro_batch
    while micro % 2 == 0:
        micro //= 2
        smaller.append({f"{prefix}.micro_batch": micro})
    stages = [{f"{prefix}.zero_stage": zero} for zero in range(settings.zero_stage + 1, 4)]
    if stage == "vq" and config.vq.train.adversarial.weight:
        stages = [change for change in stages if change[f"{prefix}.zero_stage"] < 3]
    kinds = [smaller, stages if config.compute.most_workers > 1 else []]
    if stage == "prior" and not config.prior.model.activation_checkpointing:
        kinds.append([{"prior.model.activation_checkpointing": True}])
    if not settings.offload_optimizer and settings.zero_stage > 0:
        kinds.append([{f"{prefix}.offload_optimizer": True}])
    return [kind for kind in kinds if kind]
