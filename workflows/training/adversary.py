"""The tokenizer's adversary in training: a discriminator with its own small data-parallel optimizer, and its guard.

It lives outside the engine, whole on every rank: gradients are averaged over micro-batches and ranks, so that all ranks
take the same step and hold the same weights. The adaptive weight (Esser et al., arXiv:2012.09841, eq. 7) is computed
from the gradients of a whole global batch and used in the next one: within a micro-batch it would depend on how the
batch is divided.

Nothing is drawn but its first weights, which follow from the seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hvqd_model.codec.discriminator import Discriminator, adaptive_weight, adversarial_loss, discriminator_loss
from hvqd_model.randomness import derive_key
from workflows.config import VQTrainSettings
from workflows.placement import placed
from workflows.training import collectives
from workflows.training.precision import Precision
from workflows.training.stage import Evidence, learning_rate_at

_BETAS = (0.5, 0.9)


class Adversary:
    """Waits until its share of the budget, then trains against the tokenizer until the guard sends it away for good."""

    def __init__(self, settings: VQTrainSettings, seed: int, precision: Precision, device: torch.device) -> None:
        self.settings, self.precision, self.device = settings, precision, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_key(seed, "adversary", "weights"))
            network = Discriminator(settings.adversarial.width, settings.adversarial.halvings)
        self.network = placed(network, device)
        self.parameters = list(self.network.parameters())
        collectives.broadcast_buffers([parameter.data for parameter in self.parameters])
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.adversarial.learning_rate, betas=_BETAS, weight_decay=0.0
        )
        self.started = False
        self.switched_off = False
        self.best_psnr = -math.inf
        """The best validation PSNR before the start, in dB."""
        self.factor = torch.zeros((), device=device)
        """The adaptive weight of the next step; 0 in the first one."""
        self.left_out = 0
        """Steps that were not finite."""
        self._gradients: Tensor | None = None

    @property
    def is_active(self) -> bool:
        """Whether its verdicts count."""
        return self.started and not self.switched_off

    def before_step(self, images_seen: int) -> dict[str, float]:
        """Start when it is time, and forget what a step that was left out has gathered."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients = None
        if self.started or images_seen < self.settings.adversarial.start * self.settings.images:
            return {}
        self.started = True
        return {"adversary_started": 1.0}

    def loss(self, pictures: Tensor) -> Tensor:
        """The adversarial loss of (B, 3, H, W) reconstructions, not weighted."""
        with self._arithmetic():
            return adversarial_loss(self.network(pictures))

    def learn(self, evidence: Evidence) -> dict[str, Tensor]:
        """Gather a micro-batch's gradients.

        Returns:
            The discriminator's loss, and the shares of real and of reconstructed patches that it recognises.
        """
        with torch.enable_grad(), self._arithmetic():
            real, fake = self.network(evidence.real), self.network(evidence.fake)
            loss = discriminator_loss(real, fake)
        loss.backward()  # type: ignore[no-untyped-call]
        gathered = evidence.gradients.flatten().float()
        self._gradients = gathered if self._gradients is None else self._gradients + gathered
        return {
            "discriminator": loss.detach(),
            "discriminator_real": (real > 0).float().mean(),
            "discriminator_fake": (fake < 0).float().mean(),
        }

    def step(self, images_seen: int) -> dict[str, Tensor]:
        """Average what was gathered over the global batch and take a step, unless it is not finite.

        Returns:
            The share of steps left out, and the adaptive weight of the next step.
        """
        if self._gradients is None:
            return {}
        own = [parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None]
        assert len(own) == len(self.parameters)
        mean = collectives.sum_over_ranks(torch.cat([*own, self._gradients]))
        mean /= self.settings.global_batch // self.settings.micro_batch  # micro-batches of all ranks
        parts = torch.split(mean, [gradient.numel() for gradient in own] + [self._gradients.numel()])
        norm = torch.linalg.vector_norm(mean[: -self._gradients.numel()])
        finite = bool(torch.isfinite(mean).all())
        if finite:
            clip = (self.settings.gradient_clip / (norm + 1e-6)).clamp_max(1.0)
            for parameter, gradient in zip(self.parameters, parts, strict=False):
                parameter.grad = (gradient * clip).view_as(parameter)
            share = learning_rate_at(images_seen, self.settings) / self.settings.learning_rate
            self.optimizer.param_groups[0]["lr"] = self.settings.adversarial.learning_rate * share
            self.optimizer.step()
            self.factor = adaptive_weight(*parts[-1].view(2, -1))
        else:
            self.left_out += 1
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients = None
        return {
            "discriminator_left_out": torch.tensor(float(not finite), device=self.device),
            "adaptive_weight": self.factor,
        }

    def observe(self, psnr: float) -> dict[str, float]:
        """Hear of a validation PSNR in dB: remember the best before the start, go for good when it falls too far.

        A PSNR that is no number counts as fallen.
        """
        allowed = self.settings.adversarial.guard_psnr_drop
        if not self.started:
            self.best_psnr = max(self.best_psnr, psnr)
        elif not self.switched_off and not psnr >= self.best_psnr - allowed:
            self.switched_off = True
            return {"adversary_switched_off": 1.0}
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, guard and the adaptive weight."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "factor": self.factor,
            "started": self.started,
            "switched_off": self.switched_off,
            "best_psnr": self.best_psnr,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` told."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.factor = state["factor"].to(self.device)
        self.started, self.switched_off = state["started"], state["switched_off"]
        self.best_psnr, self.left_out = state["best_psnr"], state["left_out"]

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
