"""The network as samplers see it: predictions of the clean codes, guided by what was asked for.

One number s guides all conditions together: u + s (c - u), on log-probabilities, with c given all conditions and u
given none (Ho and Salimans, arXiv:2207.12598). A number for each condition adds up what each alone changes,
u + sum_i s_i (c_i - u): the conjunction of Liu et al., arXiv:2206.01714, eq. 11, exact where the conditions are
independent given the picture. It costs a pass for each condition; the same as the first form for a single one.

Fine levels can be guided less than coarse ones. Codes of many positions settle at once, each by itself; guided strongly
they all choose what tells the class apart best, and a face gets eyes in every cell. Coarse codes are few.

Axes: B images, M wanted positions of a level, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hvqd_model.config import CONDITIONS, PriorConfig
from hvqd_model.diffusion.guidance import guide
from hvqd_model.prior.conditions import Conditions, check_conditions, known_conditions
from hvqd_model.prior.denoiser import Denoiser

Guidance = float | Mapping[str, float]
"""One scale for all conditions together, or one for each: {"class": 3, "style": 1.5}; a condition that is not named
has 1."""
Watcher = Callable[[Sequence[Tensor]], None]
"""Is shown the (B, N) codes of the levels that are present, masks filled with the likeliest codes."""


def check_guidance(guidance: Guidance, config: PriorConfig) -> None:
    """Refuse scales that are no scales, and guidance by what the prior does not know.

    Raises:
        ValueError: a scale below 0 or not finite, an unknown condition, or guidance of an unconditional prior.
    """
    known = known_conditions(config)
    scales = dict(guidance) if isinstance(guidance, Mapping) else {"": guidance}
    for name, scale in scales.items():
        if not math.isfinite(scale) or scale < 0:
            shown = f"{name}={scale}" if name else scale
            raise ValueError(f"guidance must be at least 0: {shown}\nhint: 1 follows the class, 3 exaggerates it")
        if name and name not in known:
            raise ValueError(
                f"guidance by {name} needs a prior with that condition, and this one has "
                f"{', '.join(known) or 'none'}: {name}={scale}\nhint: leave {name} out"
            )
    if not known and not isinstance(guidance, Mapping) and guidance not in (0, 1):
        raise ValueError(
            f"guidance needs a prior with classes, and this one is unconditional: {guidance}\nhint: guidance=1"
        )


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse times that do not rise within 0 and 1."""
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval must rise within 0 and 1: {interval}\nhint: (0, 1) guides always")


def check_fine_guidance(scale: float | None) -> None:
    """Refuse what is no scale."""
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"fine_guidance must be at least 0: {scale}\nhint: 1 follows the class")


def scales_of_levels(scale: float, fine: float | None, levels: int) -> list[float]:
    """The scale of each level, coarse first: evenly from `scale` down to `fine`; a single level keeps `scale`."""
    least = scale if fine is None else min(scale, fine)
    return [scale + (least - scale) * level / max(1, levels - 1) for level in range(levels)]


def passes(conditions: Conditions, guidance: Guidance) -> list[tuple[float, Conditions]]:
    """What the network must be asked beside the unconditional prediction: scale and conditions of each pass.

    The unconditional pass is not needed when the answer is a single pass of scale 1.
    """
    if not isinstance(guidance, Mapping):
        return [] if guidance == 0 else [(float(guidance), conditions)]
    given = [name for name in CONDITIONS if conditions.part(name) is not None]
    scales = {name: float(guidance.get(name, 1.0)) for name in given}
    # A condition that is hidden for everybody says nothing: its pass would be the unconditional one.
    nobody = conditions.only()
    active = [name for name in given if scales[name] and not _equal(conditions.part(name), nobody.part(name))]
    return [(scales[name], conditions.only(name)) for name in active]


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def compose(unconditional: Tensor, guided: Sequence[tuple[float, Tensor]]) -> Tensor:
    """u + sum_i s_i (c_i - u) of any predictions that are linear in what is guided (logits, noise, clean latents)."""
    total = unconditional
    for scale, conditional in guided:
        total = total + scale * (conditional - unconditional)
    return total


class GuidedPredictor:
    """Guided logits at the wanted positions."""

    def __init__(
        self,
        denoiser: Denoiser,
        images: int,
        given: Tensor | Conditions | None,
        guidance: Guidance,
        interval: tuple[float, float],
        watch: Watcher | None = None,
        fine_guidance: float | None = None,
    ) -> None:
        """Check what is asked for.

        Args:
            given: classes or conditions; None for none at all.
            fine_guidance: the most that the finest level is guided; see `scales_of_levels`.
            watch: shown the present state before every step.

        Raises:
            ValueError: guidance, interval or conditions that the prior does not allow.
        """
        check_guidance(guidance, denoiser.config)
        check_interval(interval)
        check_fine_guidance(fine_guidance)
        if given is not None:
            given = check_conditions(given, images, denoiser.config)
        self.denoiser, self.interval, self.watch = denoiser, interval, watch
        levels = len(denoiser.sizes)
        plain, guided = ([], []) if given is None else (passes(given, 1.0), passes(given, guidance))
        self.plain = [(scales_of_levels(scale, None, levels), told) for scale, told in plain]
        self.guided = [(scales_of_levels(scale, fine_guidance, levels), told) for scale, told in guided]
        self.apart = isinstance(guidance, Mapping)

    def __call__(
        self,
        codes: Sequence[Tensor],
        level_times: Sequence[float | Tensor],
        time: float,
        wanted: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """(B, M, K) logits a level; see `hvqd_model.diffusion.samplers.Predictor`.

        Args:
            level_times: a number for all images, or (B,).
        """
        asked = self.guided if self.interval[0] <= time <= self.interval[1] else self.plain
        logits = self._guided(codes, level_times, asked, wanted)
        if self.watch is not None:
            self.watch(_likeliest(codes, wanted, logits))
        return logits

    def _guided(
        self,
        codes: Sequence[Tensor],
        level_times: Sequence[float | Tensor],
        asked: Sequence[tuple[list[float], Conditions]],
        wanted: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        found = [(scales, self._network(codes, level_times, conditions, wanted)) for scales, conditions in asked]
        joint = asked is self.plain or not self.apart
        if joint and found and set(found[0][0]) == {1}:
            return found[0][1]
        # Passes of the same size, not one of twice: whether guidance acts must not change a row's rounding.
        nobody = Conditions(torch.full((len(codes[0]),), -1, dtype=torch.int64, device=codes[0].device))
        unconditional = self._network(codes, level_times, nobody, wanted)
        mixed: list[Tensor | None] = []
        for level, own in enumerate(unconditional):
            others = [(scales[level], x) for scales, logits in found if (x := logits[level]) is not None]
            if own is None or not others:
                mixed.append(own)
            elif joint:
                mixed.append(guide(others[0][1], own, others[0][0]))
            else:
                # The sum, for a single condition too: what an image is not told adds exactly nothing, so that it does
                # not depend on what its neighbours are told.
                mixed.append(compose(own, others))
        return mixed

    def _network(
        self,
        codes: Sequence[Tensor],
        level_times: Sequence[float | Tensor],
        conditions: Conditions,
        wanted: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        images, device = len(conditions.labels), conditions.labels.device
        missing = len(self.denoiser.sizes) - len(level_times)  # levels not present are pure noise
        columns = [torch.as_tensor(t, dtype=torch.float64, device=device) for t in [*level_times, *[1.0] * missing]]
        at = torch.stack([column.expand(images) for column in columns], 1)
        rows = [
            None
            if places is None
            else (torch.arange(images, device=places.device)[:, None] * level.shape[1] + places).reshape(-1)
            for level, places in zip(codes, wanted, strict=True)
        ]
        logits = self.denoiser(codes, at, conditions, None, rows)
        return [
            None if places is None else scores.float().view(images, places.shape[1], -1)
            for scores, places in zip(logits, wanted, strict=True)
        ]


def _likeliest(
    codes: Sequence[Tensor], wanted: Sequence[Tensor | None], logits: Sequence[Tensor | None]
) -> list[Tensor]:
    """The codes with masks replaced by the likeliest code, level by level as far as every mask was looked at."""
    shown: list[Tensor] = []
    for level, places, scores in zip(codes, wanted, logits, strict=True):
        if places is not None and scores is not None:
            num_codes = scores.shape[2]
            guesses = torch.where(level.gather(1, places) == num_codes, scores.argmax(2), level.gather(1, places))
            level = level.scatter(1, places, guesses)
        shown.append(level)
    return shown
