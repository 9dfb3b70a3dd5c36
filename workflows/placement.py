"""Puts a network's weights where and as convolutions want them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

_Network = TypeVar("_Network", bound=nn.Module)


def placed(network: _Network, device: torch.device | str) -> _Network:
    """The network itself on the device, its kernels channels last.

    Not `Module.to`, which does not move weights without memory, as a plan has them (`workflows.planning.footprint`).
    """
    for tensor in (*network.parameters(), *network.buffers()):
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        tensor.data = tensor.data.to(device, memory_format=layout)
    return network
