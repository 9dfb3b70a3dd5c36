"""Walks through a stage's micro-batch without computing it: builds the objective as training does, on made-up data.

A transformer's blocks are all alike, so that a deep prior is walked through at two depths and continued in a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workflows.config import RunConfig
from workflows.planning.footprint import Footprint, walk, without_memory
from workflows.planning.made_up import made_up_prior, made_up_vq

StageName = Literal["vq", "prior"]
STAGES: tuple[StageName, ...] = ("vq", "prior")

_SHALLOW = (2, 4)
_UNKNOWN_CLASSES = 1_000
_FLOAT = 4


@dataclass(frozen=True)
class Pictures:
    """What a plan must know of the data; None where nobody knows."""

    count: int | None
    classes: int | None

    @staticmethod
    def of(config: RunConfig) -> Pictures:
        """What the source tells without being read: everything of the bundled set, nothing of others."""
        if config.data.source != "emoji":
            return Pictures(config.data.limit, None)
        from pyarrow import parquet

        from workflows.data.sources import BUNDLED, EMOJI

        columns = parquet.ParquetFile(BUNDLED)
        rows = columns.metadata.num_rows
        classes = len(set(columns.read([EMOJI.label]).column(0).to_pylist()))
        return Pictures(min(rows, config.data.limit or rows), classes)


@dataclass(frozen=True)
class StageFootprint:
    """What a stage's model and one of its micro-batches take."""

    parameters: int
    buffer_bytes: int
    statistics_bytes: int
    """Summed over ranks once a step besides gradients (codebook statistics)."""
    micro: Footprint
    modules: int = 0
    """That hold weights of their own, each gathered by itself at ZeRO-3."""


def stage_footprint(config: RunConfig, stage: StageName, pictures: Pictures) -> StageFootprint:
    """The stage's model and micro-batch, by shape alone."""
    key = config.model_copy(update={"root": "", "seed": 0})  # what does not matter shall not miss the cache
    return _walked(key.model_dump_json(), stage, pictures)


@cache
def _walked(config_json: str, stage: StageName, pictures: Pictures) -> StageFootprint:
    config = RunConfig.model_validate_json(config_json)
    if stage == "vq":
        return _vq(config)
    depth = config.prior.model.depth
    if depth <= _SHALLOW[1]:
        return _prior(config, pictures, depth)
    low, high = (_prior(config, pictures, shallow) for shallow in _SHALLOW)
    return _continued(low, high, (depth - _SHALLOW[0]) / (_SHALLOW[1] - _SHALLOW[0]))


def _continued(low: StageFootprint, high: StageFootprint, times: float) -> StageFootprint:
    """On the line through two footprints, `times` as far from the first as the second is."""

    def along(a: float, b: float) -> float:
        return a + (b - a) * times

    def count(a: int, b: int) -> int:
        return round(along(a, b))

    one, two = low.micro, high.micro
    return StageFootprint(
        parameters=count(low.parameters, high.parameters),
        buffer_bytes=count(low.buffer_bytes, high.buffer_bytes),
        statistics_bytes=high.statistics_bytes,
        micro=Footprint(
            transient_bytes=count(one.transient_bytes, two.transient_bytes),
            growing_bytes=count(one.growing_bytes, two.growing_bytes),
            largest_parameter_bytes=two.largest_parameter_bytes,
            flops={work: along(one.flops[work], flops) for work, flops in two.flops.items()},
            moved_bytes=along(one.moved_bytes, two.moved_bytes),
            operations=count(one.operations, two.operations),
        ),
        modules=count(low.modules, high.modules),
    )


def _vq(config: RunConfig) -> StageFootprint:
    with without_memory():
        objective, inputs = made_up_vq(config, _precision(config, "vq"), torch.device("cpu"))
    sizes, dims = config.vq_config.codebook_sizes, config.vq_config.code_dims
    statistics = sum(_FLOAT * codes * (dim + 1) for codes, dim in zip(sizes, dims, strict=True))
    return _footprint(config, objective, inputs, statistics)


def _prior(config: RunConfig, pictures: Pictures, depth: int) -> StageFootprint:
    model = config.prior.model.model_copy(update={"depth": depth})
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"model": model})})
    classes = _UNKNOWN_CLASSES if pictures.classes is None else pictures.classes
    with without_memory():
        objective, inputs = made_up_prior(config, classes, _precision(config, "prior"))
    return _footprint(config, objective, inputs, 0)


def _footprint(config: RunConfig, objective: nn.Module, inputs: tuple[Any, ...], statistics: int) -> StageFootprint:
    def step() -> Tensor:
        return objective(*inputs).loss  # type: ignore[no-any-return]

    micro = walk(objective, step, on_gpu=config.compute.gpus_per_worker > 0)
    modules = sum(1 for module in objective.modules() if next(module.parameters(recurse=False), None) is not None)
    return StageFootprint(_parameters(objective), _buffers(objective), statistics, micro, modules)


def _precision(config: RunConfig, stage: StageName) -> Literal["fp32", "bf16"]:
    """As configured; `auto` is bf16 on a GPU, and on a CPU what this machine would take."""
    from workflows.training.precision import choose_precision

    chosen = (config.vq.train if stage == "vq" else config.prior.train).precision
    if chosen == "auto" and config.compute.gpus_per_worker:
        return "bf16"
    return choose_precision(chosen, torch.device("cpu"))[0]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _buffers(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
