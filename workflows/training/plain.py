"""The engine in plain torch, one process: what unit tests and the overhead benchmark measure DeepSpeed against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workflows.config import TrainSettings
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

    def state(self) -> EngineState:
        """Everything: there is one rank."""
        named = dict(self.module.named_parameters())
        averages = dict(zip(named, self.average, strict=True)) if self.average else {}
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        values: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            moments = self.optimizer.state.get(parameter, {})
            found = {"weight": parameter, "exp_avg": moments.get("exp_avg"), "exp_avg_sq": moments.get("exp_avg_sq")}
            for kind, value in (found | ({"average": averages[name]} if averages else {})).items():
                whole = torch.zeros(parameter.numel()) if value is None else value.detach().float().cpu().reshape(-1)
                values[f"{kind}/{name}"] = whole.clone()
        return EngineState(
            values,
            {name: Range(0, parameter.numel()) for name, parameter in trained.items()},
            {name: steps_of(self.optimizer, parameter) for name, parameter in trained.items()},
            trained_shapes(self.module),
            shared_state(state_buffers(self.module), {n: p for n, p in named.items() if n not in trained}),
        )

    @torch.no_grad()
    def load_state(self, saved: SavedState) -> None:
        """Everything."""
        saved.check_fits(trained_shapes(self.module))
        buffers, frozen = saved.shared()
        for name, buffer in state_buffers(self.module).items():
            buffer.copy_(buffers[name])
        has_average = bool(self.average) and saved.has("average")
        for place, (name, parameter) in enumerate(self.module.named_parameters()):
            parameter.copy_(saved.whole("weight", name) if parameter.requires_grad else frozen[name])
            if self.average:
                averaged = has_average and parameter.requires_grad
                self.average[place].copy_(saved.whole("average", name) if averaged else parameter)
            if parameter.requires_grad:
                moments = set_moments(self.optimizer, parameter, saved.steps[name])
                for kind in ("exp_avg", "exp_avg_sq"):
                    moments[kind].copy_(saved.whole(kind, name))

    def export(self) -> dict[str, Tensor]:
        """Full weights and buffers."""
        state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        if self.average:
            names = [name for name, _ in self.module.named_parameters()]
            state |= {name: tensor.clone() for name, tensor in zip(names, self.average, strict=True)}
        return state
