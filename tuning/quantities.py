"""What a configuration costs, worked out before anything runs: tokens, bits, parameters and memory.

These are the derived quantities of a space's constraints and metrics; memory is the planner's estimate, the rest exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorArchitecture, PriorConfig, VQConfig
from hvqd_model.prior.prior import HierarchicalPrior
from tuning.reported import Job, StageName
from workflows.config import RunConfig, TrainSettings, VQTrainSettings

MEANINGS = {
    "levels": "levels of codes",
    "tokens": "codes an image",
    "bits": "bits of an image's codes, uncompressed",
    "pixels": "pixels of a picture",
    "bits_per_pixel": "bits over pixels",
    "parameters_millions": "trained numbers of the larger model that the job trains, in millions",
    "memory_gib": "estimated memory of one worker, in GiB",
}
MemoryEstimate = Callable[[RunConfig, Job], float]
"""GiB of one worker while it trains."""


@dataclass(frozen=True)
class Quantities:
    """The derived quantities of one configuration, each worked out when it is asked for."""

    config: RunConfig
    job: Job
    memory: MemoryEstimate
    _known: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """One of `MEANINGS`."""
        if name not in self._known:
            self._known[name] = self._work_out(name)
        return self._known[name]

    def _work_out(self, name: str) -> float:
        vq = self.config.vq_config
        match name:
            case "levels":
                return vq.levels
            case "tokens":
                return vq.tokens
            case "bits":
                return vq.bits
            case "pixels":
                return math.prod(vq.image_size)
            case "bits_per_pixel":
                return vq.bits / math.prod(vq.image_size)
            case "parameters_millions":
                return max(parameters(self.config, stage) for stage in stages(self.job)) / 1e6
            case "memory_gib":
                return self.memory(self.config, self.job)
        raise KeyError(name)


def stages(job: Job) -> tuple[StageName, ...]:
    """The trainings of a job."""
    match job:
        case "vq" | "prior":
            return (job,)
        case "joint":
            return ("vq", "prior")
    raise ValueError(f"no such job: {job}")


def parameters(config: RunConfig, stage: StageName) -> int:
    """Trained numbers of a stage's model."""
    vq = config.vq_config
    return _vq_parameters(vq) if stage == "vq" else _prior_parameters(vq, config.prior.model)


@functools.lru_cache(maxsize=1024)
def _vq_parameters(vq: VQConfig) -> int:
    with _weightless():
        return _count(HierarchicalVQ(vq))


@functools.lru_cache(maxsize=1024)
def _prior_parameters(vq: VQConfig, architecture: PriorArchitecture) -> int:
    config = PriorConfig(
        **architecture.model_dump(), grids=vq.grids, codebook_sizes=vq.codebook_sizes, code_dim=vq.code_dims
    )
    with _weightless():
        return _count(HierarchicalPrior(config))


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules built inside have parameters without memory.

    Not `torch.device("meta")`: that takes small computations along, and some of those load half of torch's compiler.
    """

    def without_memory(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return None if value is None else nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        with _NoNoise():
            yield
    finally:
        hook.remove()


class _NoNoise(TorchFunctionMode):
    """Leaves out what fills weights with normal noise: without memory it means nothing, and loads torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def estimate_memory(config: RunConfig, job: Job) -> float:
    """GiB of one worker while it trains, by the planner: states by ZeRO stage, activations as a walk finds them."""
    return max(_stage_memory(_bare(config, stage).model_dump_json(), stage) for stage in stages(job))


def _bare(config: RunConfig, stage: StageName) -> RunConfig:
    """The configuration without all that a step's memory does not depend on, so that alike trials are one case."""
    kept = {"micro_batch", "zero_stage", "offload_optimizer", "precision", "ema_half_life_images"}
    kept |= {"global_batch", "adversarial", "perceptual_weight"}
    plain = RunConfig()
    mine: VQTrainSettings | TrainSettings = config.vq.train if stage == "vq" else config.prior.train
    default: VQTrainSettings | TrainSettings = plain.vq.train if stage == "vq" else plain.prior.train
    train = default.model_copy(update={name: getattr(mine, name) for name in kept if hasattr(mine, name)})
    parts: dict[str, Any] = {"data": plain.data.model_copy(update={"image_size": config.data.image_size})}
    parts |= {"compute": config.compute.model_copy(update={"address": None})}
    parts["vq"] = config.vq.model_copy(update={"train": train if stage == "vq" else plain.vq.train})
    parts["prior"] = config.prior.model_copy(update={"train": train}) if stage == "prior" else plain.prior
    return plain.model_copy(update=parts)


@functools.cache
def _stage_memory(config_json: str, stage: StageName) -> float:
    from workflows.planning.model_walk import Pictures, stage_footprint
    from workflows.planning.planner import GIB, machine_for, plan_stage
    from workflows.planning.prices import read_prices

    config = RunConfig.model_validate_json(config_json)
    machine = machine_for(config, read_prices(), None, 1.0)
    walked = stage_footprint(config, stage, Pictures.of(config))
    return plan_stage(config, stage, walked, machine).memory.total / GIB + machine.device.reserved_gib


def explain(names: Mapping[str, Any]) -> str:
    """Name = value, for a message."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in names.items()}
    return ", ".join(f"{name}={text}" for name, text in shown.items())
