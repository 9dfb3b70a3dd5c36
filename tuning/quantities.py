"""What a configuration costs, worked out before anything runs: tokens, bits, parameters and memory.

These are the derived quantities of a space's constraints and metrics; memory is an estimate, the rest is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorArchitecture, PriorConfig, VQConfig
from hvqd_model.prior.prior import HierarchicalPrior
from tuning.reported import Job
from workflows.config import RunConfig, TrainSettings

MEANINGS = {
    "levels": "levels of codes",
    "tokens": "codes an image",
    "bits": "bits of an image's codes, uncompressed",
    "pixels": "pixels of a picture",
    "bits_per_pixel": "bits over pixels",
    "parameters_millions": "trained numbers of the larger model that the job trains, in millions",
    "memory_gib": "estimated memory of one worker, in GiB",
}
_GIB = 2**30
MemoryEstimate = Callable[[RunConfig, Job], float]
"""GiB of one worker while it trains."""


@dataclass(frozen=True)
class Quantities:
    """The derived quantities of one configuration, each worked out when it is asked for."""

    config: RunConfig
    job: Job
    memory: MemoryEstimate

    def __getitem__(self, name: str) -> float:
        """One of `MEANINGS`."""
        vq = self.config.vq_config
        match name:
            case "levels":
                return vq.levels
            case "tokens":
                return vq.tokens
            case "bits":
                return bits(vq)
            case "pixels":
                return math.prod(vq.image_size)
            case "bits_per_pixel":
                return bits(vq) / math.prod(vq.image_size)
            case "parameters_millions":
                return max(parameters(self.config, stage) for stage in stages(self.job)) / 1e6
            case "memory_gib":
                return self.memory(self.config, self.job)
        raise KeyError(name)


def stages(job: Job) -> tuple[Any, ...]:
    """The trainings of a job."""
    return ("vq", "prior") if job == "joint" else (job,)


def bits(vq: VQConfig) -> float:
    """Bits of an image's codes as they are: log2 of the codebook size for each code."""
    return sum(rows * columns * math.log2(size) for (rows, columns), size in zip(vq.grids, vq.codebook_sizes, strict=True))


def parameters(config: RunConfig, stage: str) -> int:
    """Trained numbers of a stage's model."""
    return _vq_parameters(config.vq_config) if stage == "vq" else _prior_parameters(config.vq_config, config.prior.model)


@functools.lru_cache(maxsize=1024)
def _vq_parameters(vq: VQConfig) -> int:
    with torch.device("meta"):  # nothing is allocated
        return _count(HierarchicalVQ(vq))


@functools.lru_cache(maxsize=1024)
def _prior_parameters(vq: VQConfig, architecture: PriorArchitecture) -> int:
    with torch.device("meta"):
        codebooks = [torch.empty(size, dim) for size, dim in zip(vq.codebook_sizes, vq.code_dims, strict=True)]
        config = PriorConfig(
            **architecture.model_dump(),
            grids=vq.grids,
            codebook_sizes=vq.codebook_sizes,
            code_dim=vq.code_dims,
        )
        return _count(HierarchicalPrior(config, codebooks))


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def estimate_memory(config: RunConfig, job: Job) -> float:
    """GiB of one worker while it trains: model states by ZeRO stage, and activations. It leaves the libraries out.

    Model states are 16 bytes a parameter (weights and gradient, AdamW's two moments and its fp32 copy), of which ZeRO
    shards 0, 8 to 12, or all (Rajbhandari et al., arXiv:1910.02054, section 5). Activations are the larger maps that
    backward needs; good to a factor of about two.
    """
    return max(_stage_memory(config, stage) for stage in stages(job))


def _stage_memory(config: RunConfig, stage: str) -> float:
    train: TrainSettings = config.vq.train if stage == "vq" else config.prior.train
    count, workers = parameters(config, stage), config.compute.workers
    sharded = {0: 0, 1: 8, 2: 12, 3: 16}[train.zero_stage]
    states = count * (16 - sharded + sharded / workers)
    number = 2 if train.precision == "bf16" else 4
    activations = _vq_activations(config) if stage == "vq" else _prior_activations(config)
    return (states + train.micro_batch * activations * number) / _GIB


def _vq_activations(config: RunConfig) -> float:
    """Numbers kept for an image's backward: about ten maps a residual block, twice (encoder and decoder)."""
    vq = config.vq_config
    height, width = vq.padded_size
    total, stage = 0.0, 0
    while height * width > 0 and stage <= len(vq.width_multipliers) + 8:
        multiplier = vq.width_multipliers[min(stage, len(vq.width_multipliers) - 1)]
        total += 2 * 10 * vq.blocks * vq.width * multiplier * (height // 2) * (width // 2)
        height, width, stage = height // 2, width // 2, stage + 1
        if height < vq.grids[0][0] or width < vq.grids[0][1]:
            break
    return total


def _prior_activations(config: RunConfig) -> float:
    """Numbers kept for an image's backward: about 16 + 2 x mlp_ratio vectors a block, attention weights, and logits."""
    model, vq = config.prior.model, config.vq_config
    block = vq.tokens * model.width * (16 + 2 * model.mlp_ratio) + model.heads * vq.tokens**2
    logits = sum(rows * columns * size for (rows, columns), size in zip(vq.grids, vq.codebook_sizes, strict=True))
    depth = 1 if model.activation_checkpointing else model.depth
    return depth * block + (model.depth * vq.tokens * model.width if model.activation_checkpointing else 0) + 3 * logits


def explain(names: Mapping[str, Any]) -> str:
    """Name = value, for a message."""
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in names.items())
