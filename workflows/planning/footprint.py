"""What one micro-batch of an objective takes, found by walking through it without computing: bytes, operations, time.

The model's weights are fake tensors (shapes without memory), while pictures, codes and keys are real: what depends on
data (which codes are masked, which levels are present) happens as in training, and everything that touches a weight
only says how large its result would be. So a model of any size is walked through in seconds on any machine.

Two numbers of memory come out: the most bytes alive at once besides weights and gradients, and the same with gradients
that stay. The CPU's allocator and the libraries' own scratch memory are not seen here; the planner adds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from hvqd_model.prior.attention import always_fused

Work = Literal["matrix_fp32", "matrix_bf16", "convolution_fp32", "convolution_bf16", "memory"]

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 4),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 10),
}
"""Fused attention, which keeps its inputs, its result and a number a row, as on a GPU: the query's place among the
arguments, and operations in units of tokens^2 x channels; backward computes the scores anew."""


@dataclass
class Footprint:
    """What one micro-batch takes, forward and backward."""

    transient_bytes: int = 0
    """The most bytes alive at once besides weights and gradients: activations and what is between them."""
    growing_bytes: int = 0
    """The same with the gradients that have been produced so far."""
    largest_parameter_bytes: int = 0
    """Of one parameter, which ZeRO cannot gather in pieces."""
    flops: dict[Work, float] = field(default_factory=dict)
    """Floating-point operations by the unit that does them."""
    moved_bytes: float = 0.0
    """Bytes read and written by operations that compute little."""
    operations: int = 0
    """Kernels started."""

    @property
    def total_flops(self) -> float:
        """Of all units."""
        return sum(self.flops.values())


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules built inside have floating-point weights without memory; what is no weight is computed as ever."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or isinstance(value, FakeTensor):
            return value
        return nn.Parameter(mode.from_tensor(value.detach()), requires_grad=value.requires_grad)

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        if value is None or isinstance(value, FakeTensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        return mode.from_tensor(value)

    hooks = [
        register_module_parameter_registration_hook(parameter),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(buffer),  # type: ignore[arg-type]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def walk(module: nn.Module, step: Callable[[], Tensor], *, on_gpu: bool) -> Footprint:
    """The footprint of one forward and backward.

    Args:
        module: built inside `without_memory`; its parameters' gradients are told apart from what is transient.
        step: computes the loss on real inputs.
        on_gpu: whether the model shall take the paths that it takes on a GPU (fused attention).
    """
    ledger = _Ledger([*module.parameters(), *module.buffers()])
    hooks = [
        parameter.register_post_accumulate_grad_hook(ledger.take_gradient)  # type: ignore[no-untyped-call]
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    with ExitStack() as stack:
        stack.enter_context(ledger)
        if on_gpu:
            stack.enter_context(_on_gpu())
        step().backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    sizes = [parameter.numel() * parameter.element_size() for parameter in module.parameters()]
    ledger.footprint.largest_parameter_bytes = max(sizes, default=0)
    return ledger.footprint


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation: what it computes, and which storages it brings to life."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.footprint = Footprint()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self._gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _bincount(*args, **kwargs) if func is torch.ops.aten.bincount.default else func(*args, **kwargs)
        results = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        for tensor in results:
            self._see(tensor)
        self._count(func, args, kwargs, out, results)
        return out

    def take_gradient(self, parameter: Tensor) -> None:
        """A gradient is complete: it is no longer transient, and DeepSpeed decides what becomes of it."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None
        self._note_peak()

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self._bytes += size
        weakref.finalize(storage, self._forget, key)
        self._note_peak()

    def _forget(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)

    def _note_peak(self) -> None:
        footprint = self.footprint
        footprint.transient_bytes = max(footprint.transient_bytes, self._bytes)
        footprint.growing_bytes = max(footprint.growing_bytes, self._bytes + self._gradients)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        packet = func._overloadpacket
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if packet in _FUSED:
            query, key = args[_FUSED[packet][0]], args[_FUSED[packet][0] + 1]
            self._add_flops("matrix", query.dtype, _FUSED[packet][1] * float(query.numel()) * key.shape[-2])
            self.footprint.operations += 1
        elif packet in flop_registry:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
            kind: Literal["matrix", "convolution"] = "convolution" if packet in _CONVOLUTIONS else "matrix"
            self._add_flops(kind, results[0].dtype, flops)
            self.footprint.operations += 1
        elif not func.is_view and results and packet is not torch.ops.aten.detach:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *results])
            self.footprint.moved_bytes += moved
            self.footprint.operations += 1

    def _add_flops(self, kind: Literal["matrix", "convolution"], dtype: torch.dtype, flops: float) -> None:
        half = dtype in (torch.bfloat16, torch.float16)
        work: Work
        match kind, half:
            case "matrix", False:
                work = "matrix_fp32"
            case "matrix", True:
                work = "matrix_bf16"
            case "convolution", False:
                work = "convolution_fp32"
            case _:
                work = "convolution_bf16"
        self.footprint.flops[work] = self.footprint.flops.get(work, 0.0) + flops


def _bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """Counts by value; of fake values only the shape, which codes below `minlength` give."""
    if not isinstance(values, FakeTensor) and not isinstance(weights, FakeTensor):
        return torch.ops.aten.bincount.default(values, weights, minlength)  # type: ignore[no-any-return]
    kind = torch.int64 if weights is None else torch.float64
    return torch.empty(minlength, dtype=kind)


@contextmanager
def _on_gpu() -> Iterator[None]:
    token = always_fused.set(True)
    try:
        yield
    finally:
        always_fused.reset(token)
