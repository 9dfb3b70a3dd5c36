"""Who judges a reconstruction beyond its pixels: features of a network that knows pictures, and an adversary.

Each judge is differentiated with respect to the reconstruction alone; the way from there to the weights is walked once,
by the engine. Judges are no part of the objective's module, so that nothing shards, saves or exports them.

Axes: B pictures of H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvqd_model.codec.hierarchy import VQOutput
from hvqd_model.codec.losses import with_gradient
from hvqd_model.codec.perceptual import FeatureNetwork, perceptual_distance
from workflows.config import VQTrainSettings
from workflows.evaluation.feature_network import FeatureMaps
from workflows.training.adversary import Adversary
from workflows.training.precision import Precision
from workflows.training.stage import Evidence


@dataclass(frozen=True)
class Verdict:
    """What the judges add to the tokenizer's own loss."""

    loss: Tensor
    """Scalar, the tokenizer's own included."""
    metrics: dict[str, Tensor]
    """Detached scalars: perceptual, adversarial; those that apply."""
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Judges:
    """The judges of a training; by default none."""

    features: FeatureNetwork | None = None
    """Frozen feature maps; None without a perceptual loss."""
    perceptual_weight: float = 0.0
    adversary: Adversary | None = None
    adversarial_weight: float = 0.0

    def judge(self, images: Tensor, output: VQOutput, last_layer: Tensor) -> Verdict:
        """The verdict on a training step's reconstruction.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            output: the tokenizer's, with its graph.
            last_layer: the decoder's last weights, which no loss but the reconstruction's touches.
        """
        adversary = self.adversary if self.adversary is not None and self.adversary.is_active else None
        if self.features is None and adversary is None:
            return Verdict(output.loss, {})
        pictures = output.reconstruction.detach().requires_grad_()
        value, gradient = torch.zeros((), device=images.device), torch.zeros_like(pictures)
        metrics: dict[str, Tensor] = {}
        if self.features is not None:
            distance = self.distance(pictures, images)
            gradient = self.perceptual_weight * torch.autograd.grad(distance, pictures)[0]
            value = self.perceptual_weight * distance.detach()
            metrics["perceptual"] = distance.detach()
        evidence = None
        if adversary is not None:
            adversarial = adversary.loss(pictures)
            (push,) = torch.autograd.grad(adversarial, pictures)
            pull = torch.autograd.grad(output.loss, last_layer, retain_graph=True)[0]
            pull = pull + _at_layer(output.reconstruction, last_layer, gradient)
            gradients = torch.stack([pull, _at_layer(output.reconstruction, last_layer, push)]).flatten(1)
            evidence = Evidence(images, pictures.detach(), gradients)
            weight = self.adversarial_weight * adversary.factor
            gradient, value = gradient + weight * push, value + weight * adversarial.detach()
            metrics["adversarial"] = adversarial.detach()
        loss = output.loss + with_gradient(value, output.reconstruction, gradient)
        return Verdict(loss, metrics, evidence)

    def distance(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """The mean perceptual distance of (B, 3, H, W) pictures from targets; gradients reach the pictures only."""
        assert self.features is not None
        with torch.no_grad():
            maps = self.features(targets)
        return perceptual_distance(self.features(pictures), maps).mean()


def _at_layer(reconstruction: Tensor, last_layer: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to the last layer, from the one with respect to the reconstruction."""
    found: Tensor = torch.autograd.grad(reconstruction, last_layer, gradient, retain_graph=True)[0]
    return found


def build_judges(settings: VQTrainSettings, seed: int, precision: Precision, device: torch.device) -> Judges:
    """The judges that the settings ask for.

    Raises:
        InputError: a named file with weights of the feature network cannot be used.
    """
    weight = settings.adversarial.weight
    return Judges(
        features=FeatureMaps(device, settings.perceptual_network) if settings.perceptual_weight else None,
        perceptual_weight=settings.perceptual_weight,
        adversary=Adversary(settings, seed, precision, device) if weight else None,
        adversarial_weight=weight,
    )
