"""The engine in DeepSpeed: ZeRO shards optimizer state (1), also gradients (2), also parameters (3).

DeepSpeed's checkpoint holds parameters and optimizer state only. Buffers (the codebooks) and the shards of the weights'
moving average are saved and restored here, in a file of our own for each rank.

The average lives on the float32 shards that the optimizer owns, so it costs each rank its own share only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workflows.config import TrainSettings
from workflows.training import collectives
from workflows.training.engine import StepResult, average_decay, make_optimizer

_TAG = "state"
_BUCKET_ELEMENTS = 50_000_000


def _load_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # Gloo needs no help, and DeepSpeed would compile C++ on the user's machine to give it some.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


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
                return [parameter.data for parameter in self.module.parameters()]
            case 1 | 2:
                return list(self._engine.optimizer.single_partition_of_fp32_groups)
            case _:
                return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's full float32 value; called on every rank."""
        if self.stage == 0:
            return parameter.detach().float().clone()
        value: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return value.detach()

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
            state |= {name: buffer.cpu() for name, buffer in self._buffers().items()}
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
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        if self._average:
            self._average = [shard.detach().clone() for shard in self._shards()]

    # ---- state ----

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.module.named_parameters()}
        named = dict(self.module.named_buffers())
        return {name: named[name].detach() for name in self.module.state_dict() if name not in parameters}

    def _broadcast_buffers(self) -> None:
        """DeepSpeed makes parameters equal at the start, not buffers."""
        collectives.broadcast_buffers(list(self._buffers().values()))

    def save(self, folder: Path) -> None:
        """DeepSpeed's shards of this rank, and a file with buffers and average."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=False)
        torch.save({"buffers": self._buffers(), "average": self._average}, folder / f"ours-rank{self.rank}.pt")

    def load(self, folder: Path) -> None:
        """Restore this rank's part at the same world size."""
        found, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if found is None:  # DeepSpeed only warns
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        ours = torch.load(folder / f"ours-rank{self.rank}.pt", map_location=self.device, weights_only=True)
        named = dict(self.module.named_buffers())
        for name, value in ours["buffers"].items():
            named[name].copy_(value)
        self._average = ours["average"]
