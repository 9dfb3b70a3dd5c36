"""The engine in DeepSpeed: ZeRO shards optimizer state (1), also gradients (2), also parameters (3).

DeepSpeed's own checkpoints are not used: they are pickles, bound to a number of ranks, and its universal ones lose
buffers (the codebooks) and frozen weights. The state is read off the shards and written to them (see `state.py`).

The average lives on the float32 shards that the optimizer owns, so it costs each rank its own share only.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflows.config import TrainSettings
from workflows.training import collectives
from workflows.training.engine import (
    StepResult,
    average_decay,
    make_optimizer,
    set_moments,
    state_buffers,
    steps_of,
    trained_shapes,
)
from workflows.training.state import EngineState, Range, SavedState, shared_state

_BUCKET_ELEMENTS = 50_000_000


def _load_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _without("mlflow"):  # for its autotuner, which nothing here uses: a second of every worker's start
        import deepspeed
        import deepspeed.ops

    # Gloo needs no help, and DeepSpeed would compile C++ on the user's machine to give it some.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let a package count as not installed while another one is loaded, unless it is loaded already."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def worthwhile(settings: TrainSettings, world: int) -> TrainSettings:
    """The settings with the ZeRO stage that pays: alone, a rank has nobody to share state and gradients with."""
    alone = world == 1 and settings.zero_stage in (1, 2) and not settings.offload_optimizer
    return settings.model_copy(update={"zero_stage": 0}) if alone else settings


def zero_config(settings: TrainSettings, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage. Precision is the objective's business (autocast), weights are float32."""
    bucket = min(_BUCKET_ELEMENTS, 1 << 23 if not torch.cuda.is_available() else _BUCKET_ELEMENTS)
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = 10_000
    return {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.global_batch // (settings.micro_batch * world),
        "gradient_clipping": settings.gradient_clip if settings.zero_stage > 0 else 0.0,  # 0: see ZeroEngine.step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


class ZeroEngine:
    """One rank's DeepSpeed engine; the process group is there already."""

    def __init__(self, module: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        self._deepspeed = _load_deepspeed()
        self.rank, self.world = collectives.rank(), collectives.world_size()
        settings = worthwhile(settings, self.world)
        self.device, self.stage, self._clip = device, settings.zero_stage, settings.gradient_clip
        module = module.to(device)
        self._engine, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, settings, device),
            config=zero_config(settings, self.world),
            dist_init_required=False,
        )
        if self.world == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # nobody to reduce with
        self.module: nn.Module = self._engine.module
        self._broadcast_buffers()
        self._decay = average_decay(settings)
        self._average = [shard.detach().clone() for shard in self._shards()] if self._decay else []

    # ---- a step ----

    def forward(self, *inputs: Any) -> Any:
        """The objective's output; ZeRO-3 gathers parameters inside."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate; DeepSpeed divides by the number of micro-batches."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch and moves nothing: DeepSpeed wants a step after each

    def step(self, learning_rate: float) -> StepResult:
        """Reduce, clip, step, average."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            # Without ZeRO DeepSpeed would take a step that is not finite, and it tells no norm.
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
            applied = math.isfinite(norm)
            if not applied:
                self._engine.zero_grad()  # AdamW passes over what has no gradient
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            applied = bool(self._engine.was_step_applied())
        if applied and self._average:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._shards(), 1 - self._decay)
        return StepResult(applied, norm)

    # ---- whole weights ----

    def _shards(self) -> list[Tensor]:
        """The float32 weights that this rank's optimizer owns."""
        match self.stage:
            case 0:
                return [parameter.data for parameter in self._trained()]
            case 1 | 2:
                return list(self._engine.optimizer.single_partition_of_fp32_groups)
            case _:
                return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's full float32 value; called on every rank."""
        if not parameter.requires_grad:  # no optimizer knows of it
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                return parameter.detach().float().clone()
        if self.stage == 0:
            return parameter.detach().float().clone()
        value: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return value.detach()

    def _set_whole(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a parameter's full float32 value where the optimizer keeps it; called on every rank."""
        if self.stage < 3:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            return
        # DeepSpeed's own function fails where the ranks do not divide the values: the last shard is padded.
        shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        first = self.rank * shard.numel()
        own = value.flatten()[first : first + shard.numel()]
        padded = F.pad(own, (0, shard.numel() - own.numel()))
        self._deepspeed.utils.safe_set_local_fp32_param(parameter, padded)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The optimizer's shards hold the average for a while."""
        shards = self._shards()
        live = [shard.detach().clone() for shard in shards]
        try:
            with torch.no_grad():
                for shard, average in zip(shards, self._average, strict=True):
                    shard.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for shard, value in zip(shards, live, strict=True):
                    shard.copy_(value)

    def export(self) -> dict[str, Tensor]:
        """Full weights and buffers, on the CPU of rank 0; an empty mapping elsewhere."""
        state: dict[str, Tensor] = {}
        with self._averaged() if self._average else nullcontext():
            for name, parameter in self.module.named_parameters():
                value = self._whole(parameter)
                if self.rank == 0:
                    state[name] = value.cpu()
        if self.rank == 0:
            state |= {name: buffer.clone().cpu() for name, buffer in state_buffers(self.module).items()}
        return state

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Parameters are whole inside, and what was written reaches the optimizer's shards and the average."""
        edited = list(parameters)
        if not edited:
            yield
            return
        gathered = self._deepspeed.zero.GatheredParameters(edited, modifier_rank=0, enabled=self.stage == 3)
        with gathered:
            yield
            values = [parameter.detach().float().clone() for parameter in edited]
        if self.stage > 0:
            for parameter, value in zip(edited, values, strict=True):
                self._set_whole(parameter, value)
        if self._average:
            self._average = [shard.detach().clone() for shard in self._shards()]

    # ---- state ----

    def _broadcast_buffers(self) -> None:
        """DeepSpeed makes parameters equal at the start, not buffers."""
        collectives.broadcast_buffers(list(state_buffers(self.module).values()))

    def _adamw(self) -> torch.optim.Optimizer:
        """The optimizer that holds the moments of `_shards`."""
        found: torch.optim.Optimizer = self._engine.optimizer if self.stage == 0 else self._engine.optimizer.optimizer
        return found

    def _keys(self) -> list[Tensor]:
        """What the optimizer keeps its moments under, in the order of `_shards`."""
        return list(self._trained()) if self.stage == 0 else self._shards()

    def _owned(self) -> dict[str, _Owned]:
        """Where this rank's ranges of the trained parameters lie in its shards."""
        found: dict[str, _Owned] = {}
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        for place, (name, parameter) in enumerate(trained):
            match self.stage:
                case 0:
                    found[name] = _Owned(Range(0, parameter.numel()), place, 0)
                case 1 | 2:
                    piece = parameter._hp_mapping  # type: ignore[attr-defined]
                    if piece is not None:
                        here, there = piece.lp_fragment_address, piece.hp_fragment_address
                        found[name] = _Owned(Range(here.start, here.numel), piece.param_group_index, there.start)
                case _:
                    zero = self._engine.optimizer
                    shard, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                    start = length * zero._get_param_partition_rank(parameter)
                    own = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
                    if own > 0:  # the last ranks may hold nothing but padding
                        found[name] = _Owned(Range(start, own), shard, offset)
        return found

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if not p.requires_grad}

    def state(self) -> EngineState:
        """This rank's ranges; without ZeRO every rank has everything and hands out its share of each parameter."""
        shards, keys, adamw, owned = self._shards(), self._keys(), self._adamw(), self._owned()
        values: dict[str, Tensor] = {}
        ranges: dict[str, Range] = {}
        for name, place in owned.items():
            moments = adamw.state.get(keys[place.shard], {})
            sources = {"weight": shards[place.shard], **{kind: moments.get(kind) for kind in ("exp_avg", "exp_avg_sq")}}
            if self._average:
                sources["average"] = self._average[place.shard]
            share = _share(place.range.length, self.rank, self.world) if self.stage == 0 else None
            if share is not None and share.length == 0:
                continue
            ranges[name] = share or place.range
            first = place.offset if share is None else share.start
            for kind, source in sources.items():
                length = ranges[name].length
                values[f"{kind}/{name}"] = (
                    torch.zeros(length)
                    if source is None
                    else source.detach().reshape(-1)[first : first + length].float().cpu().clone()
                )
        frozen = self._frozen()
        with self._deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=self.stage == 3 and bool(frozen)):
            shared = shared_state(state_buffers(self.module), frozen) if self.rank == 0 else {}
        steps = {name: steps_of(adamw, keys[owned[name].shard]) for name in ranges}
        return EngineState(values, ranges, steps, trained_shapes(self.module), shared)

    @torch.no_grad()
    def load_state(self, saved: SavedState) -> None:
        """Each rank reads the ranges that it owns; DeepSpeed's copies of the weights follow from them."""
        saved.check_fits(trained_shapes(self.module))
        if self.stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()
        shards, keys, adamw, owned = self._shards(), self._keys(), self._adamw(), self._owned()
        has_average = bool(self._average) and saved.has("average")
        for name, place in owned.items():
            moments = set_moments(adamw, keys[place.shard], saved.steps[name])
            for kind, shard in (("weight", shards[place.shard]), *((k, moments[k]) for k in ("exp_avg", "exp_avg_sq"))):
                place.write(shard, saved.read(kind, name, place.range))
            if has_average:
                place.write(self._average[place.shard], saved.read("average", name, place.range))
        if self._average and not has_average:
            self._average = [shard.detach().clone() for shard in shards]
        match self.stage:
            case 0:
                pass
            case 1 | 2:
                self._engine.optimizer.update_lp_params()
            case _:
                for whole, part in zip(self._engine.optimizer.fp16_partitioned_groups_flat, shards, strict=True):
                    whole.data.copy_(part.data)
                self._engine.optimizer.checkpoint_event_epilogue()
        buffers, frozen = saved.shared()
        for name, buffer in state_buffers(self.module).items():
            buffer.copy_(buffers[name])
        kept = self._frozen()
        with self._deepspeed.zero.GatheredParameters(
            list(kept.values()), modifier_rank=0, enabled=self.stage == 3 and bool(kept)
        ):
            for name, parameter in kept.items():
                if self.stage < 3 or self.rank == 0:
                    parameter.copy_(frozen[name])


@dataclass(frozen=True)
class _Owned:
    """A range of a parameter and where it lies."""

    range: Range
    shard: int
    offset: int
    """In the flattened shard."""

    def write(self, shard: Tensor, values: Tensor) -> None:
        """Overwrite the range, however the shard lies in memory."""
        if values.numel() == shard.numel():
            shard.data.copy_(values.view(shard.shape))
        else:
            shard.data[self.offset : self.offset + values.numel()].copy_(values)


def _share(count: int, rank: int, world: int) -> Range:
    """One rank's part of what all ranks have."""
    start, end = rank * count // world, (rank + 1) * count // world
    return Range(start, end - start)
