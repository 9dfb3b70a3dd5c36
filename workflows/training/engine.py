"""What the loop asks of the machinery that differentiates, reduces and steps: one process's view of a training job.

`zero.py` answers with DeepSpeed, `plain.py` with torch alone; the loop cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workflows.config import TrainSettings
from workflows.training.state import EngineState, SavedState


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    applied: bool
    """False when the gradients were not finite and the step was left out."""
    gradient_norm: float
    """Before clipping."""


class Engine(Protocol):
    """One rank's engine around an objective module."""

    rank: int
    world: int
    device: torch.device
    module: nn.Module
    """The objective; its parameters may be sharded outside `forward`."""

    def forward(self, *inputs: Any) -> Any:
        """The objective's output, ready for `backward`."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; the mean over micro-batches and ranks is what counts."""

    def step(self, learning_rate: float) -> StepResult:
        """End the global batch: reduce, clip, step, and move the weights' average."""

    def editing(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it the parameters are whole and may be overwritten with the same values on all ranks.

        The weights' average restarts from what was written: this happens once, early.
        """

    def state(self) -> EngineState:
        """Copies of this rank's share of the state; called on every rank."""

    def load_state(self, saved: SavedState) -> None:
        """Go on from a state that any number of ranks wrote at any ZeRO stage; called on every rank.

        Raises:
            ValueError: it is of another model.
        """

    def export(self) -> dict[str, Tensor]:
        """Full float32 weights (their moving average when there is one) and buffers; called on every rank."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and convolutions decay, vectors, scales and embeddings do not."""
    embeddings = {
        id(parameter) for part in module.modules() if isinstance(part, nn.Embedding) for parameter in part.parameters()
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            matrix = sum(side > 1 for side in parameter.shape) >= 2 and id(parameter) not in embeddings
            (decayed if matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused where torch can."""
    return torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=device.type in ("cpu", "cuda"),
    )


def average_decay(settings: TrainSettings) -> float:
    """Decay, an optimizer step, of the weights' moving average; 0 for none."""
    if settings.ema_half_life_images == 0:
        return 0.0
    return float(0.5 ** (settings.global_batch / settings.ema_half_life_images))


def trained_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that are trained, by name; what ZeRO-3 has taken apart counts whole."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def state_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, by name."""
    parameters = {name for name, _ in module.named_parameters()}
    named = dict(module.named_buffers())
    return {name: named[name].detach() for name in module.state_dict() if name not in parameters}


def set_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> dict[str, Tensor]:
    """AdamW's state of a parameter, made now if it has taken no step, with its count of steps set.

    Moments that are there already stay the same tensors: DeepSpeed keeps views of them.
    """
    state: dict[str, Tensor] = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"].fill_(steps)
    return state


def steps_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """How many steps AdamW has taken with a parameter."""
    return int(optimizer.state[parameter]["step"]) if parameter in optimizer.state else 0
