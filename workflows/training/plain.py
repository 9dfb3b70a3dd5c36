"""The engine in plain torch, one process: what unit tests and the overhead benchmark measure DeepSpeed against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workflows.config import TrainSettings
from workflows.training.engine import StepResult, average_decay, make_optimizer

_FILE = "plain.pt"


class PlainEngine:
    """One process, nothing sharded."""

    rank, world = 0, 1

    def __init__(self, module: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        self.device, self.settings = device, settings
        self.module = module.to(device)
        self.optimizer = make_optimizer(self.module, settings, device)
        self.parameters = list(self.module.parameters())
        self.accumulation = settings.global_batch // settings.micro_batch
        self.decay = average_decay(settings)
        self.average = [p.detach().clone() for p in self.parameters] if self.decay else []

    def forward(self, *inputs: Any) -> Any:
        """The objective's output."""
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the mean's gradient."""
        (loss / self.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> StepResult:
        """Clip, step, average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in self.parameters:
            if parameter.grad is None:  # as DeepSpeed has it: what took no part still counts the step
                parameter.grad = torch.zeros_like(parameter)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip))
        applied = norm < float("inf")  # False for nan too
        if applied:
            self.optimizer.step()
            if self.average:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.decay)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm)

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Nothing is sharded; the average restarts from the edited weights."""
        edited = list(parameters)
        yield
        if edited and self.average:
            self.average = [parameter.detach().clone() for parameter in self.parameters]

    def save(self, folder: Path) -> None:
        """Everything, in one file."""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Restore it."""
        state = torch.load(folder / _FILE, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]

    def export(self) -> dict[str, Tensor]:
        """Full weights and buffers."""
        state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        if self.average:
            names = [name for name, _ in self.module.named_parameters()]
            state |= {name: tensor.clone() for name, tensor in zip(names, self.average, strict=True)}
        return state
