"""Whether samples are copies, and whether they leave something out: figures, and alarms with a remedy.

Memorisation. Samples and held-out reconstructions both went through the tokenizer, so only their distances to the
nearest training picture can be compared; what copies would show is measured on reconstructed training pictures.
Coverage. Pictures that nobody asked a class of are counted by the class that the judge sees in them, beside held-out
reconstructions, whose blur misleads the judge alike.

Axes: n pictures of a set, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workflows.evaluation.figures import Figure
from workflows.evaluation.judge import ClassJudge

QUANTILE = 0.01
"""Of held-out reconstructions lie as near to a training picture as what counts as a near copy."""
FEW = 0.2
"""A class is missing when it is drawn less often than this share of what held-out reconstructions show."""
LEAST_OVERLAP = 0.5
LEAST_RECALL = 0.03
"""Of what reconstructions reach."""


@dataclass(frozen=True)
class EvaluationAlarm:
    """Something that is wrong with the samples."""

    name: str
    seen: str
    """The figures and what they should be."""
    remedy: str
    """The setting to change, in the user's spelling."""

    @property
    def text(self) -> str:
        """Two lines for the console."""
        return f"alarm: {self.name}: {self.seen}\nremedy: {self.remedy}"

    def as_json(self) -> dict[str, str]:
        """Its entry in metrics.json."""
        return {"name": self.name, "seen": self.seen, "remedy": self.remedy}


def memorisation_figures(
    figures: Mapping[str, Figure],
    samples: NDArray[np.float64],
    reconstructions: NDArray[np.float64],
    copies: NDArray[np.float64],
) -> dict[str, Figure]:
    """How near samples come to training pictures, relative to pictures that cannot have been copied.

    memorisation_ratio is 1 for samples as new as held-out reconstructions, and memorisation_ratio_copies for copies.
    Its interval takes the unfavourable ends of both medians, so it is rather too wide.

    Args:
        figures: with nearest_train_samples and nearest_train_reconstructions.
        samples, reconstructions, copies: (n,) distances to the nearest training picture.
    """
    above, below = figures["nearest_train_samples"], figures["nearest_train_reconstructions"]
    interval = None
    if above.interval is not None and below.interval is not None and below.interval[0] > 0:
        interval = above.interval[0] / below.interval[1], above.interval[1] / below.interval[0]
    near = float(np.quantile(reconstructions, QUANTILE))
    found = {
        "memorised_share": Figure(float((samples < near).mean()), len(samples)),
        "nearest_train_copies": Figure(float(np.median(copies)), len(copies)),
    }
    if below.value > 0:
        found["memorisation_ratio"] = Figure(above.value / below.value, len(samples), interval)
        found["memorisation_ratio_copies"] = Figure(float(np.median(copies)) / below.value, len(copies))
    return found


def coverage_figures(
    judge: ClassJudge, unasked: NDArray[np.float32], reconstructions: NDArray[np.float32], classes: Sequence[str]
) -> tuple[dict[str, Figure], dict[str, dict[str, int]]]:
    """How the classes of pictures that nobody asked for agree with the data, and the counts of each class.

    class_coverage is the overlap of both distributions: 1 when equal, 0 when nothing is shared. class_missing is how
    many classes are drawn less than FEW as often as held-out reconstructions show them.

    Args:
        unasked: (n, D) features of pictures drawn without a class.
        reconstructions: (n, D) features of held-out reconstructions.
    """
    counts = {
        name: np.bincount(judge.judge(features), minlength=judge.classes)
        for name, features in (("unasked", unasked), ("reconstructions", reconstructions))
    }
    drawn, shown = (counts[name] / counts[name].sum() for name in ("unasked", "reconstructions"))
    table = {name: {kind: int(found[number]) for kind, found in counts.items()} for number, name in enumerate(classes)}
    figures = {
        "class_coverage": Figure(float(np.minimum(drawn, shown).sum()), len(unasked)),
        "class_missing": Figure(float((drawn < FEW * shown).sum()), len(unasked)),
    }
    return figures, table


def novelty_alarms(figures: Mapping[str, Figure]) -> list[EvaluationAlarm]:
    """What the figures say is wrong; figures that are not there say nothing."""
    value = {name: figure.value for name, figure in figures.items()}
    alarms = []
    ratio, copies = value.get("memorisation_ratio"), value.get("memorisation_ratio_copies")
    if ratio is not None and copies is not None and copies < 1 and ratio < (1 + copies) / 2:
        seen = f"memorisation_ratio {ratio:.3g} is nearer to {copies:.3g}, what copies show, than to 1"
        remedy = "a smaller prior.train.images, more pictures, or a smaller prior.model.width"
        alarms.append(EvaluationAlarm("memorisation", seen, remedy))
    overlap = value.get("class_coverage")
    if overlap is not None and overlap < LEAST_OVERLAP:
        seen = f"class_coverage {overlap:.3g} of pictures drawn without a class, below {LEAST_OVERLAP:g}"
        alarms.append(EvaluationAlarm("classes left out", seen, "a larger prior.train.images"))
    recall, reach = value.get("recall_samples"), value.get("recall_reconstructions")
    if recall is not None and reach and recall < LEAST_RECALL * reach:
        seen = f"recall {recall:.3g} of samples, below {LEAST_RECALL:g} of the reconstructions' {reach:.3g}"
        remedy = "a smaller sampling.guidance, or a larger sampling.gumbel_scale or sampling.temperature"
        alarms.append(EvaluationAlarm("mode collapse", seen, remedy))
    return alarms


def described() -> dict[str, Any]:
    """How these figures are made; they joined the protocol's later and change none of them."""
    return {
        "memorisation_ratio": "nearest_train_samples over nearest_train_reconstructions; its interval takes the "
        "unfavourable ends of both",
        "memorisation_ratio_copies": "the same for reconstructions of training pictures: what copies would show",
        "memorised_share": f"samples nearer to a training picture than {QUANTILE:.0%} of held-out reconstructions",
        "class_coverage": "overlap of the classes that the judge sees in pictures drawn without a class and in "
        "held-out reconstructions",
        "class_missing": f"classes drawn less than {FEW:g} times as often as held-out reconstructions show them",
    }
