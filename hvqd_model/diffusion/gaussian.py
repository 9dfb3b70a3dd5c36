"""Gaussian noise on latents: what a network can predict, the way from one prediction to another, and loss weights.

x_t = a x_0 + s e with a^2 + s^2 = 1. The network predicts e, x_0, or v = a e - s x_0 (Salimans and Ho,
arXiv:2202.00512, section 4), so x_0 = a x - s v and e = s x + a v. All formulas are linear in the prediction: guiding
it is guiding x_0.

Axes: tensors of any shapes that broadcast; a and s are float64 or python numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvqd_model.config import Prediction

_TINY = 1e-12


def add_noise(clean: Tensor, noise: Tensor, signal: Tensor, strength: Tensor) -> Tensor:
    """x_t = a x_0 + s e, in the precision of the clean latents."""
    return (signal * clean + strength * noise).to(clean.dtype)


def target(prediction: Prediction, clean: Tensor, noise: Tensor, signal: Tensor, strength: Tensor) -> Tensor:
    """What the network should say."""
    match prediction:
        case "epsilon":
            return noise
        case "x0":
            return clean
        case "v":
            return signal * noise - strength * clean
    raise _unknown(prediction)


def to_clean(
    prediction: Prediction, output: Tensor, noisy: Tensor, signal: Tensor | float, strength: Tensor | float
) -> Tensor:
    """x_0 that a prediction means; without any signal an epsilon means nothing finite."""
    match prediction:
        case "epsilon":
            return (noisy - strength * output) / signal
        case "x0":
            return output
        case "v":
            return signal * noisy - strength * output
    raise _unknown(prediction)


def to_noise(
    prediction: Prediction, output: Tensor, noisy: Tensor, signal: Tensor | float, strength: Tensor | float
) -> Tensor:
    """The noise that a prediction means; without any noise an x_0 means nothing finite."""
    match prediction:
        case "epsilon":
            return output
        case "x0":
            return (noisy - signal * output) / strength
        case "v":
            return strength * noisy + signal * output
    raise _unknown(prediction)


def loss_weight(prediction: Prediction, signal: Tensor, strength: Tensor, gamma: float | None) -> Tensor:
    """The weight of the squared error of what is predicted: 1, or min-SNR-gamma (Hang et al., arXiv:2303.09556).

    The latter is min(SNR, gamma) on x_0, whatever is predicted: over SNR for e, over SNR + 1 for v.
    """
    if gamma is None:
        return torch.ones_like(signal)
    power, noise = signal.square(), strength.square()
    match prediction:
        case "epsilon":
            return (gamma * noise / power.clamp_min(_TINY)).clamp_max(1.0)
        case "x0":
            return (power / noise.clamp_min(_TINY)).clamp_max(gamma)
        case "v":
            return torch.minimum(power, gamma * noise)
    raise _unknown(prediction)


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"prediction must be epsilon, x0 or v: {prediction}\nhint: v is a good start")
