"""Alarms: what a training's records say is going wrong, and the setting that mends it.

A `Watch` reads the history record by record and keeps nothing else, so a resumed run knows what was said before and
says it no second time. An alarm is raised once a run, when its sign was seen in PATIENCE records in a row.

codebook collapse       the share of codes used in a window (see `codebook_use`) is below LOW_USE of what even use of as
                        many codes would show
level without content   a level's codes add less than LITTLE_GAIN dB to the levels before it, the coarsest less than
                        LITTLE_MEANING dB to the mean picture; or on validation pictures they are worth fewer than
                        FEW_CODES (perplexity)
exploding alignment     vectors are further from their codes, GROWTH times what the best record since the start shows
codebook drift          the mean norm of the codes has grown or shrunk DRIFT times since the codebook's start
exploding gradients     the gradient's norm is GROWTH_OF_GRADIENTS times its median so far and above the clipping norm,
                        or is no number
adversary switched off  its guard sent it away (see `adversary`); said at once, for it happens once

Levels whose bits have a price (`rate_weight`) are to use few codes, and their loss is no distance: of them, neither use
nor alignment is an alarm.

Codebooks are looked at from SETTLING of the budget after their start, what levels hold from MATURITY of the budget
after it: until then there is little to be seen anywhere.
"""

from __future__ import annotations

import math
import statistics
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvqd_model.config import VQConfig
from workflows.config import TrainSettings, VQTrainSettings
from workflows.training.codebook_use import window_start

PATIENCE = 2
"""Records in a row that must show a sign."""
SETTLING = 0.05
MATURITY = 0.2
LOW_USE = 0.25
FEW_CODES = 1.5
LITTLE_GAIN = 0.1
LITTLE_MEANING = 0.5
GROWTH = 10.0
DRIFT = 10.0  # the finest level of a nested pyramid settles at 5.5 times its start, and shows pictures well
GROWTH_OF_GRADIENTS = 20.0
_GRADIENTS_BEFORE = 5

Record = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong."""

    name: str
    level: int | None
    """The level it concerns, 0 the coarsest; None for the training as a whole."""
    images: int
    """When it was raised."""
    seen: str
    """The value and the threshold."""
    remedy: str
    """The setting to change, in the user's spelling."""

    @property
    def title(self) -> str:
        """What it is, with its level."""
        return self.name if self.level is None else f"{self.name}, level {self.level}"

    @property
    def text(self) -> str:
        """Two lines for the console."""
        return f"alarm after {self.images:,} images: {self.title}: {self.seen}\nremedy: {self.remedy}"

    def as_json(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        return {
            "name": self.name,
            "level": self.level,
            "images": self.images,
            "seen": self.seen,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class _Sign:
    """What one record says about one alarm."""

    name: str
    level: int | None
    is_bad: bool
    seen: str
    remedy: str
    patience: int = PATIENCE


class Watch:
    """Reads a history as it grows."""

    def __init__(self, stage: str, settings: TrainSettings, model: VQConfig | None) -> None:
        """`stage` is the group of the settings, vq or prior; `model` is the tokenizer in training, if it is one."""
        self.stage, self.settings, self.model = stage, settings, model
        self._started: float | None = None
        self._first_norms: dict[int, float] = {}
        self._best_alignments: dict[int, float] = {}
        self._gradients: list[float] = []
        self._streaks: dict[tuple[str, int | None], int] = {}
        self._raised: set[tuple[str, int | None]] = set()

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with what follows from those before: codebook_drift_0 …, the relative change of the mean norm."""
        drifts = {
            f"codebook_drift_{level}": record[f"codebook_norm_{level}"] / first - 1
            for level, first in self._first_norms.items()
            if f"codebook_norm_{level}" in record and first > 0
        }
        return {**record, **drifts}

    def see(self, record: Record) -> list[Alarm]:
        """The alarms that the next record of the history raises."""
        self._remember_start(record)
        found = []
        for sign in self._signs(record):
            key = (sign.name, sign.level)
            self._streaks[key] = self._streaks.get(key, 0) + 1 if sign.is_bad else 0
            if self._streaks[key] >= sign.patience and key not in self._raised:
                self._raised.add(key)
                found.append(Alarm(sign.name, sign.level, int(record["images"]), sign.seen, sign.remedy))
        return found

    def _remember_start(self, record: Record) -> None:
        if "codebooks_started" in record:
            self._started = record["images"]
            for level in range(self.model.levels if self.model else 0):
                if f"codebook_norm_{level}" in record:
                    self._first_norms[level] = record[f"codebook_norm_{level}"]

    def _signs(self, record: Record) -> Iterator[_Sign]:
        if "gradient_norm" in record:
            yield self._gradient(record["gradient_norm"])
        if record.get("adversary_switched_off"):
            yield self._adversary()
        if self.model is None or self._started is None:
            return
        for level in range(self.model.levels):
            aligned = f"alignment_{level}" in record and not self._priced(level)
            if aligned and self._began(record) >= self._started:
                yield self._alignment(level, record[f"alignment_{level}"])
        age = (record["images"] - self._started) / self.settings.images
        for level in range(self.model.levels):
            if age >= SETTLING:
                yield from self._codebook(level, record)
            if age >= MATURITY and "val_psnr_mean_picture" in record:
                yield self._content(level, record)

    def _began(self, record: Record) -> int:
        return window_start(int(record["images"]), self.settings)

    def _priced(self, level: int) -> bool:
        """Whether the loss holds what a level's bits cost."""
        assert self.model is not None
        return self.model.quantizers[level] == "fsq" and self.model.rate_weight > 0

    @property
    def _may_normalize(self) -> bool:
        """Whether the unit sphere is a remedy that is left."""
        assert self.model is not None
        return not self.model.l2_normalize and not self.model.is_pyramid

    # ---- the signs ----

    def _gradient(self, norm: float) -> _Sign:
        known, median = len(self._gradients), statistics.median(self._gradients or [0.0])
        if not math.isfinite(norm):
            is_bad, seen = True, f"the norm is {norm}"
        else:
            is_bad = (
                known >= _GRADIENTS_BEFORE
                and norm > GROWTH_OF_GRADIENTS * median
                and norm > self.settings.gradient_clip
            )
            seen = f"norm {norm:.3g}, over {GROWTH_OF_GRADIENTS:g} times the median {median:.3g}"
            insort(self._gradients, norm)
        remedy = f"{self.stage}.train.learning_rate={self.settings.learning_rate / 2:g}"
        if self.settings.warmup_images < 0.02 * self.settings.images:
            remedy += f" and {self.stage}.train.warmup_images={math.ceil(0.02 * self.settings.images)}"
        if self.settings.precision != "fp32":
            remedy += f", or {self.stage}.train.precision=fp32 if it is bf16 now"
        return _Sign("exploding gradients", None, is_bad, seen, remedy)

    def _adversary(self) -> _Sign:
        assert isinstance(self.settings, VQTrainSettings)
        adversarial = self.settings.adversarial
        seen = f"the validation PSNR fell more than {adversarial.guard_psnr_drop:g} dB below the best from before it"
        remedy = f"vq.train.adversarial.weight={adversarial.weight / 2:g}"
        if adversarial.start < 0.75:
            remedy += ", or vq.train.adversarial.start=0.75"
        return _Sign("adversary switched off", None, True, seen, remedy, patience=1)

    def _alignment(self, level: int, value: float) -> _Sign:
        assert self.model is not None
        best = self._best_alignments.get(level, value)
        is_bad = not math.isfinite(value) or value > GROWTH * best > 0
        if math.isfinite(value):
            self._best_alignments[level] = min(best, value)
        if self.model.quantizers[level] == "ema":
            remedy = f"vq.model.commitment={2 * self.model.commitment or 0.25:g}"
        else:
            remedy = f"vq.train.learning_rate={self.settings.learning_rate / 2:g}"
        if self._may_normalize:
            remedy += ", or vq.model.l2_normalize=true, which keeps vectors and codes at one length"
        seen = f"alignment loss {value:.3g}, over {GROWTH:g} times the best {best:.3g}"
        return _Sign("exploding alignment", level, is_bad, seen, remedy)

    def _codebook(self, level: int, record: Record) -> Iterator[_Sign]:
        assert self.model is not None and self._started is not None
        name, size = "codebook collapse", self.model.codebook_sizes[level]
        if f"usage_{level}" in record and not self._priced(level):
            images = record["images"] - max(self._began(record), self._started)
            even = _even_use(size, images * math.prod(self.model.grids[level]))
            usage = record[f"usage_{level}"]
            seen = f"{usage:.1%} of the codes used, below {LOW_USE:g} of the {even:.1%} that even use would show"
            yield _Sign(name, level, usage < LOW_USE * even, seen, self._remedy_for_collapse(level))
        if f"codebook_drift_{level}" in record and not self.model.l2_normalize:
            drift = record[f"codebook_drift_{level}"]
            seen = f"mean norm of the codes {1 + drift:.3g} times that of the start, outside 1/{DRIFT:g} to {DRIFT:g}"
            is_bad = not 1 / DRIFT <= 1 + drift <= DRIFT
            remedy = f"vq.train.learning_rate={self.settings.learning_rate / 2:g}"
            if self._may_normalize:
                remedy = "vq.model.l2_normalize=true, which keeps vectors and codes at one length"
            yield _Sign("codebook drift", level, is_bad, seen, remedy)

    def _remedy_for_collapse(self, level: int) -> str:
        model = self.model
        assert model is not None
        kind = model.quantizers[level]
        if kind == "gradient":
            return "vq.model.quantizer=ema, which restarts dead codes, or simvq, which moves all codes together"
        if kind == "ema" and model.restart_threshold == 0:
            return "vq.model.restart_threshold=0.05, which gives dead codes fresh vectors"
        if kind != "fsq" and self._may_normalize:
            return "vq.model.l2_normalize=true with vq.model.code_dim=8"
        sizes = [max(2, size // 4) if place == level else size for place, size in enumerate(model.codebook_sizes)]
        return f"vq.model.codebook_sizes={_listed(sizes)}" + (" and vq.model.fsq_steps=[]" if model.fsq_steps else "")

    def _content(self, level: int, record: Record) -> _Sign:
        assert self.model is not None
        quality = [record[f"val_psnr_prefix_{count}"] for count in range(1, self.model.levels)] + [record["val_psnr"]]
        if level:
            gain, least, than = quality[level] - quality[level - 1], LITTLE_GAIN, "the levels before it"
        else:
            gain, least, than = quality[0] - record["val_psnr_mean_picture"], LITTLE_MEANING, "the mean picture"
        variety = record[f"val_perplexity_{level}"]
        if variety < FEW_CODES:
            seen = f"perplexity {variety:.3g} of its codes, below {FEW_CODES:g}"
        else:
            seen = f"{gain:+.2f} dB over {than}, less than {least:g}"
        is_bad = variety < FEW_CODES or gain < least
        others_hold = quality[-1] - quality[0] >= LITTLE_GAIN
        return _Sign("level without content", level, is_bad, seen, self._remedy_for_content(level, others_hold))

    def _remedy_for_content(self, level: int, others_hold: bool) -> str:
        model = self.model
        assert model is not None
        if level == 0 and others_hold and model.level_dropout < 0.5:
            dropout = min(0.5, 2 * model.level_dropout or 0.15)
            return f"vq.model.level_dropout={dropout:g}, which has more pictures decoded from coarse levels alone"
        longer = f"vq.train.images={2 * self.settings.images}"
        if level == 0:
            return f"{longer}, or vq.train.learning_rate={self.settings.learning_rate / 2:g}"
        settings = []
        for name in ("strides", "codebook_sizes", "code_dim", "quantizer", "fsq_steps"):
            entries = getattr(model, name)
            if isinstance(entries, tuple) and entries:
                rest = [entry for place, entry in enumerate(entries) if place != level]
                settings.append(f"vq.model.{name}={_listed(rest)}")
        return f"{longer}, or go without it: {' and '.join(settings)}"


def find_alarms(history: Iterable[Record], watch: Watch) -> list[Alarm]:
    """All alarms of a history, in order, by a watch that has seen nothing yet."""
    return [alarm for record in history for alarm in watch.see(record)]


def _even_use(size: int, draws: float) -> float:
    """The expected share of a codebook that so many even draws use."""
    return -math.expm1(draws * math.log1p(-1 / size))


def _listed(values: Sequence[Any]) -> str:
    return "[" + ",".join(_listed(value) if isinstance(value, tuple) else str(value) for value in values) + "]"
