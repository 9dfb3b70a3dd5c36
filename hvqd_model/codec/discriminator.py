"""The adversary of the tokenizer: a small network that tells real patches from reconstructed ones, and its losses.

Patches: Isola et al., arXiv:1611.07004, section 3.2.2. Hinge losses: Lim and Ye, arXiv:1705.02894. The adaptive weight:
Esser et al., arXiv:2012.09841, eq. 7.

Group normalisation in place of batch statistics: a picture's verdict depends on that picture alone, so that a batch may
be divided over micro-batches and ranks.

Axes: B pictures of H x W pixels, h x w patches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUP_CHANNELS = 8
_LARGEST_WEIGHT = 1e4


class Discriminator(nn.Module):
    """Verdicts on overlapping patches: positive where a patch looks real."""

    def __init__(self, width: int, halvings: int) -> None:
        """Fresh weights.

        Args:
            width: channels after the first halving, a multiple of 8; each further one doubles them, up to 8 times.
            halvings: how often the resolution is halved, at least once; a verdict's patch is 12, 26, 54 … pixels wide.
        """
        super().__init__()
        channels = [width * min(2**stage, 8) for stage in range(halvings)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            layers += _block(nn.Conv2d(before, after, 4, 2, 1, bias=False))
        layers += _block(nn.Conv2d(channels[-1], channels[-1], 3, 1, 1, bias=False))
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, h, w) float32 verdicts on (B, 3, H, W) pictures in [-1, 1]."""
        verdicts: Tensor = self.layers(pictures.contiguous(memory_format=torch.channels_last))
        return verdicts[:, 0].float()


def _block(convolution: nn.Conv2d) -> list[nn.Module]:
    channels = convolution.out_channels
    return [convolution, nn.GroupNorm(channels // _GROUP_CHANNELS, channels), nn.LeakyReLU(0.2)]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss, 2 when undecided: mean max(0, 1 - real) + mean max(0, 1 + fake), of (B, h, w) verdicts."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """What the tokenizer lowers, -mean of (B, h, w) verdicts on its pictures."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """The factor that makes the adversarial gradient as long as the reconstruction's, at most 10,000.

    Args:
        reconstruction, adversarial: gradients of both losses with respect to the decoder's last layer, of one shape.
    """
    lengths = [torch.linalg.vector_norm(gradient.float()) for gradient in (reconstruction, adversarial)]
    weight: Tensor = lengths[0] / (lengths[1] + 1e-6)
    return weight.clamp(0, _LARGEST_WEIGHT)
