"""diffusers' U-Net on pixels, trained by the project's loop and sampled with DDIM: what a user of that library has.

DDPM's noise prediction on a cosine schedule of 1,000 steps, classes hidden from a tenth of the images for guidance.

Axes: B images of H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trials import PriorTrial, closest_below, weights

from hvqd_model.randomness import derive_key, split_keys, uniform
from workflows.config import TrainSettings
from workflows.data.batches import CodeTable, ImageTable, batch_indices
from workflows.drawing.generate import Pictures, to_uint8
from workflows.training.stage import ObjectiveOutput, Position

CHAIN = 1_000
SAMPLING_STEPS = 50
LABEL_DROPOUT = 0.1
BATCH = 20
"""Pictures drawn at once."""
_HEAD_WIDTH = 16
_GROUPS = 8


def unet(side: int, classes: int, width: int) -> nn.Module:
    """A U-Net of three resolutions with attention at the lowest; one class more stands for none."""
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=_GROUPS,
        attention_head_dim=_HEAD_WIDTH,
        num_class_embeds=classes + 1,
    )
    return model


def widest_unet(side: int, classes: int, most: int) -> nn.Module:
    """The widest U-Net that has at most so many weights."""
    widths = range(_HEAD_WIDTH, 257, _GROUPS)
    return unet(side, classes, closest_below(lambda width: weights(unet(side, classes, width)), widths, most))


class PixelObjective(nn.Module):
    """The mean squared error of the predicted noise."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.model, self.classes = model, classes
        self._noise: Any = DDPMScheduler(CHAIN, beta_schedule="squaredcos_cap_v2")

    def forward(self, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor) -> ObjectiveOutput:
        """The loss of (B, 3, H, W) pictures at (B,) times in [0, 1)."""
        steps = (times * CHAIN).long().clamp(0, CHAIN - 1)
        found = self.model(self._noise.add_noise(images, noise, steps), steps, class_labels=labels).sample
        loss = F.mse_loss(found, noise)
        return ObjectiveOutput(loss, {"error": loss.detach()})


class PixelTrial(PriorTrial):
    """Training on pixels as the loop sees it."""

    def __init__(
        self, model: nn.Module, settings: TrainSettings, seed: int, pictures: ImageTable, classes: int
    ) -> None:
        self.objective = PixelObjective(model, classes)  # type: ignore[assignment]
        self.settings, self.seed = settings, seed
        self.pictures, self.classes = pictures, classes
        self.train = self.validation = CodeTable(
            pictures.ids, pictures.labels, pictures.styles, pictures.groups, codes=()
        )
        self._key = derive_key(seed, "pixels")

    def batch(self, position: Position) -> tuple[Any, ...]:
        """Pictures, classes with a tenth of them hidden, low-discrepancy times and noise."""
        rows = batch_indices(len(self.pictures), self._key, position.first, position.count)
        places = torch.arange(position.first, position.first + position.count, dtype=torch.int64)
        keys = split_keys(places, self._key)
        labels = torch.from_numpy(np.asarray(self.pictures.labels[rows], dtype=np.int64))
        hidden = (uniform(keys, stream="label dropout") < LABEL_DROPOUT) | (labels < 0)
        shift = uniform(torch.tensor([position.images_seen]), stream=derive_key(self._key, "times"))
        spread = (torch.arange(position.count, dtype=torch.float64) + position.offset) / position.global_batch
        images = self.pictures.batch(rows)
        generator = torch.Generator().manual_seed(int(keys[0]))
        noise = torch.randn(images.shape, generator=generator)
        return images, torch.where(hidden, self.classes, labels), (shift + spread) % 1.0, noise


@torch.no_grad()
def draw_pixels(
    model: nn.Module,
    side: int,
    classes: int,
    seeds: list[int],
    asked: list[int],
    scale: float,
    steps: int = SAMPLING_STEPS,
) -> Pictures:
    """(n, H, W, 3) pictures by DDIM, guided unless the scale is 1."""
    from diffusers import DDIMScheduler

    parts = []
    for first in range(0, len(seeds), BATCH):
        walk: Any = DDIMScheduler(CHAIN, beta_schedule="squaredcos_cap_v2")
        walk.set_timesteps(steps)
        some = seeds[first : first + BATCH]
        x = torch.stack([torch.randn((3, side, side), generator=torch.Generator().manual_seed(seed)) for seed in some])
        labels = torch.tensor(asked[first : first + BATCH])
        nobody = torch.full_like(labels, classes)
        for step in walk.timesteps:
            noise = model(x, step, class_labels=torch.where(labels < 0, nobody, labels)).sample
            if scale != 1:
                plain = model(x, step, class_labels=nobody).sample
                noise = plain + scale * (noise - plain)
            x = walk.step(noise, step, x).prev_sample
        parts.append(to_uint8(x))
    return np.concatenate(parts)
