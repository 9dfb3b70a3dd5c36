"""The forward process on codes, its exact posterior for any stride, and the losses that follow from it.

Mask-and-replace diffusion of Gu et al., arXiv:2111.14822, at cumulative probabilities: one step keeps a code with a,
replaces it by each code with b and masks it with c; a bar over a letter (here a suffix) is the product since time 0.
Everything is O(K) a code: no transition matrix and no one-hot is ever built.

Axes: R rows (code positions of any images), K codes; index K (the last) is the mask. Logarithms are natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvqd_model.diffusion.schedules import Schedule

_TINY = 1e-300  # its logarithm, -690, stands for that of zero and keeps gradients finite


def corrupt(codes: Tensor, times: Tensor, uniforms: Tensor, schedule: Schedule, num_codes: int) -> Tensor:
    """A draw of x_t given x_0, O(1) a code.

    Args:
        codes: (B, N) int64 clean codes in [0, K).
        times: (B,) float64.
        uniforms: (B, N) float64 in (0, 1), one a code.
        schedule: the noise.
        num_codes: K.

    Returns:
        (B, N) int64 in [0, K].
    """
    kept = schedule.kept.value(times)[:, None]
    masked = schedule.masked.value(times)[:, None]
    replaced = (1 - kept - masked).clamp_min(_TINY)
    # What u has beyond kept + masked is itself uniform: it chooses the new code.
    replacement = ((uniforms - kept - masked) / replaced * num_codes).long().clamp(0, num_codes - 1)
    noisy = torch.where(uniforms < kept + masked, num_codes, replacement)
    return torch.where(uniforms < kept, codes, noisy)


@dataclass(frozen=True)
class Rates:
    """(R,) float64 probabilities at s and t and between them; `replace` is for each single code."""

    keep_s: Tensor
    replace_s: Tensor
    mask_s: Tensor
    keep_t: Tensor
    replace_t: Tensor
    mask_t: Tensor
    keep_between: Tensor
    replace_between: Tensor
    mask_between: Tensor


def rates(schedule: Schedule, s: Tensor, t: Tensor, num_codes: int) -> Rates:
    """The transition s -> t.

    Raises:
        ValueError: some s is not before its t.
    """
    if not bool((s < t).all()):
        raise ValueError("every s must be before its t\nhint: go from the later time t to the earlier s")
    keep_s, keep_t = schedule.kept.value(s), schedule.kept.value(t)
    mask_s, mask_t = schedule.masked.value(s), schedule.masked.value(t)
    keep_between = keep_t / keep_s.clamp_min(_TINY)
    unmasked_between = (1 - mask_t) / (1 - mask_s).clamp_min(_TINY)
    return Rates(
        keep_s=keep_s,
        replace_s=schedule.replaced(s) / num_codes,
        mask_s=mask_s,
        keep_t=keep_t,
        replace_t=schedule.replaced(t) / num_codes,
        mask_t=mask_t,
        keep_between=keep_between,
        replace_between=((unmasked_between - keep_between) / num_codes).clamp_min(0),
        mask_between=(1 - unmasked_between).clamp_min(0),
    )


def _log(probability: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1) logarithm, taken in float64."""
    return probability.clamp_min(_TINY).log().to(dtype)[:, None]


def copy_prior(x_t: Tensor, t: Tensor, schedule: Schedule, num_codes: int) -> Tensor:
    """(R,) float64 log((a + b)/b): what x_t itself says for x_0 = x_t, to be added to that code's logit; 0 at a mask.

    Without it the network would have to learn to copy, and the bound stays far off.
    """
    kept, replace = schedule.kept.value(t), schedule.replaced(t) / num_codes
    bonus = torch.log1p(kept / replace.clamp_min(_TINY))
    return torch.where(x_t == num_codes, 0.0, bonus)


def add_copy_prior(logits: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """(R, K) logits plus the copy prior at each row's own code (out of place)."""
    num_codes = logits.shape[1]
    bonus = copy_prior(x_t, t, schedule, num_codes).to(logits.dtype)
    return logits.scatter_add(1, x_t.clamp_max(num_codes - 1)[:, None], bonus[:, None])


def _log_posterior_codes(log_p0: Tensor, x_t: Tensor, between: Rates) -> Tensor:
    """(R, K) log P(x_s = j), without the mask's column."""
    num_codes = log_p0.shape[1]
    dtype = log_p0.dtype
    is_mask = (x_t == num_codes)[:, None]
    own = x_t.clamp_max(num_codes - 1)[:, None]
    # x_t = i: r_k = p_k / (a_t [k = i] + b_t); at a mask r = p and R = 1, so both cases share one line below.
    log_other = torch.where(is_mask, 0.0, _log(between.replace_t, dtype))
    log_own = torch.where(is_mask, 0.0, _log(between.keep_t + between.replace_t, dtype))
    log_r = (log_p0 - log_other).scatter_add(1, own, log_other - log_own)
    log_total = torch.where(is_mask, 0.0, torch.logsumexp(log_r, 1, keepdim=True))
    log_source = torch.logaddexp(log_r + _log(between.keep_s, dtype), log_total + _log(between.replace_s, dtype))
    log_step = torch.where(
        is_mask,
        _log(between.mask_between, dtype) - _log(between.mask_t, dtype),
        _log(between.replace_between, dtype),
    )
    log_stay = _log(between.keep_between + between.replace_between, dtype)
    return (log_source + log_step).scatter_add(1, own, torch.where(is_mask, 0.0, log_stay - log_step))


def posterior(log_p0: Tensor, x_t: Tensor, s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Log-probabilities of the codes at an earlier time, log P(x_s | x_t) for a soft prediction of x_0.

    Args:
        log_p0: (R, K) normalised log-probabilities of the clean codes given x_t.
        x_t: (R,) noisy codes in [0, K].
        s, t: (R,) float64 times, 0 <= s < t <= 1.
        schedule: the noise.

    Returns:
        (R, K + 1), normalised; the last column is the mask.

    Raises:
        ValueError: s is not before t.
    """
    num_codes = log_p0.shape[1]
    between = rates(schedule, s, t, num_codes)
    codes = _log_posterior_codes(log_p0, x_t, between)
    is_mask = x_t == num_codes
    stay = _log(between.mask_s, log_p0.dtype) - _log(between.mask_t, log_p0.dtype)
    zero = torch.full_like(stay, float("-inf"))
    mask = torch.where(is_mask[:, None] & (between.mask_s > 0)[:, None], stay, zero)
    both = torch.cat([codes, mask], 1)
    # Without replacement a code that is not masked is the clean one: the general line would divide by zero.
    certain = ~is_mask & (between.replace_t <= 0)
    one_hot = torch.full_like(both, float("-inf")).scatter_(1, x_t[:, None], 0.0)
    return torch.where(certain[:, None], one_hot, both)


def posterior_kl(log_p0: Tensor, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """(R,) KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats; at s = 0 it is -log p(x_0 | x_t).

    The exact posterior q has at most three different values a row, so only p costs O(K).

    Args:
        log_p0: (R, K) normalised log-probabilities of the clean codes given x_t.
        x_0: (R,) clean codes.
        x_t: (R,) noisy codes in [0, K].
        s, t: (R,) float64 times, 0 <= s < t <= 1.
        schedule: the noise.
    """
    num_codes = log_p0.shape[1]
    between = rates(schedule, s, t, num_codes)
    log_p = _log_posterior_codes(log_p0, x_t, between)
    is_mask = x_t == num_codes
    own = torch.where(is_mask, x_0, x_t)  # a mask has no code of its own: its row has two values only
    differs = own != x_0

    likelihood = between.replace_t + torch.where(differs, 0.0, between.keep_t)
    step = torch.where(is_mask, between.mask_between / between.mask_t.clamp_min(_TINY), between.replace_between)
    step = step / torch.where(is_mask, 1.0, likelihood.clamp_min(_TINY))
    stay = torch.where(is_mask, step, (between.keep_between + between.replace_between) / likelihood.clamp_min(_TINY))
    q_other = step * between.replace_s
    q_clean = torch.where(differs, step, stay) * (between.keep_s + between.replace_s)
    q_own = torch.where(differs, stay * between.replace_s, 0.0)

    log_clean = log_p.gather(1, x_0[:, None])[:, 0].double()
    log_own = log_p.gather(1, own[:, None])[:, 0].double()
    log_others = log_p.sum(1).double() - log_clean - torch.where(differs, log_own, 0.0)
    others = num_codes - 1 - differs.double()
    entropy = others * torch.xlogy(q_other, q_other) + torch.xlogy(q_clean, q_clean) + torch.xlogy(q_own, q_own)
    kl = entropy - q_other * log_others - q_clean * log_clean - q_own * log_own
    # Without replacement an unmasked code is certain on both sides.
    return torch.where(~is_mask & (between.replace_t <= 0), 0.0, kl)
