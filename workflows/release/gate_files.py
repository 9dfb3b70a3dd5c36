"""Gate files: a release team's limits in YAML, kept beside the code and reviewed like it.

A key is either a gate of the settings (`hvqd config show` lists them under `gates`) with its limit, null or false to
leave it out; or the name of a gate of one's own, with a metric and what is asked of it:

    min_psnr: 22
    smoke_test: true
    sees classes: {metric: class_accuracy_samples / class_accuracy_reconstructions, at_least: 0.6}
    every level in use: {metric: min(usage_*), at_least: 0.9}

What the file does not name stays as the settings have it.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infra.errors import InputError
from workflows.config import GateSettings

_NAME = r"[A-Za-z]\w*"
_RATIO = re.compile(rf"({_NAME})\s*/\s*({_NAME})")
_EXTREME = re.compile(rf"(min|max)\(\s*({_NAME}\*)\s*\)")
_FORM = "NAME: {metric: FIGURE, at_least: NUMBER} (or at_most)"
_METRICS = "a figure, a ratio `one / other`, or min(prefix_*) or max(prefix_*)"


@dataclass(frozen=True)
class OwnGate:
    """A gate of a gate file over figures of the evaluation."""

    name: str
    metric: str
    """A figure, the ratio of two, or the smallest or largest of several."""
    at_least: float | None
    at_most: float | None

    def unmeasured(self, figures: Mapping[str, float]) -> str | None:
        """The figure that the metric needs and nobody measured."""
        if extreme := _EXTREME.fullmatch(self.metric):
            return None if fnmatch.filter(figures, extreme[2]) else extreme[2]
        ratio = _RATIO.fullmatch(self.metric)
        needed = ratio.groups() if ratio else (self.metric,)
        return next((name for name in needed if name not in figures), None)

    def value(self, figures: Mapping[str, float]) -> float | None:
        """The metric; None where it is no number."""
        if self.unmeasured(figures) is not None:
            return None
        if extreme := _EXTREME.fullmatch(self.metric):
            values = [figures[name] for name in fnmatch.filter(figures, extreme[2])]
            if not all(map(math.isfinite, values)):
                return None
            return min(values) if extreme[1] == "min" else max(values)
        if ratio := _RATIO.fullmatch(self.metric):
            above, below = (figures[name] for name in ratio.groups())
            return above / below if 0 < below < math.inf else None
        return figures[self.metric]


def read_gates(settings: GateSettings) -> tuple[GateSettings, tuple[OwnGate, ...]]:
    """The settings with what their gate file says instead, and the gates that only the file has.

    Raises:
        InputError: the file is not there or no YAML mapping; an unknown gate; a limit or a metric that cannot be one.
    """
    if settings.file is None:
        return settings, ()
    path = Path(settings.file)
    known = {name for name in GateSettings.model_fields if name != "file"}
    limits: dict[str, Any] = {}
    own: list[OwnGate] = []
    for name, value in _read(path).items():
        if name in known:
            limits[name] = value
        elif isinstance(value, dict):
            own.append(_own_gate(path, str(name), value))
        else:
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"a gate of your own is {_FORM}"
            raise InputError(f"unknown gate in {path}: {name} ({', '.join(sorted(known))})\nhint: {remedy}")
    try:
        return GateSettings.model_validate({**settings.model_dump(), **limits}), tuple(own)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        gate, message = problem["loc"][0], problem["msg"]
        raise InputError(
            f"{gate} in {path}: {message[:1].lower()}{message[1:]}, not {problem['input']!r}\n"
            "hint: `hvqd config show` documents every gate; null leaves one out"
        ) from error


def check_measured(own: Sequence[OwnGate], figures: Mapping[str, float], subject: str) -> None:
    """Refuse a gate over a figure that the evaluation does not have.

    Args:
        subject: what the figures are about, such as `version 3 of hvqd`.

    Raises:
        InputError: nobody measured it (the gate and the figure are named).
    """
    for gate in own:
        missing = gate.unmeasured(figures)
        if missing is not None:
            close = difflib.get_close_matches(missing, list(figures), n=1)
            remedy = f"did you mean {close[0]}?" if close else "`hvqd models show VERSION` lists what was measured"
            raise InputError(
                f"the gate {gate.name} asks for the figure {missing}, which nobody measured for {subject}\n"
                f"hint: {remedy}"
            )


def _own_gate(path: Path, name: str, value: dict[Any, Any]) -> OwnGate:
    unknown = set(value) - {"metric", "at_least", "at_most"}
    if unknown or "metric" not in value or not {"at_least", "at_most"} & set(value):
        raise InputError(f"the gate {name} in {path} cannot be read: {value}\nhint: {_FORM}")
    metric = " ".join(str(value["metric"]).split())
    if not any(form.fullmatch(metric) for form in (_RATIO, _EXTREME, re.compile(_NAME))):
        raise InputError(f"the gate {name} in {path} has no metric: {metric}\nhint: {_METRICS}")
    limits = {side: value.get(side) for side in ("at_least", "at_most")}
    for side, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit):
            raise InputError(f"the gate {name} in {path} must ask for a number {side}: {limit}\nhint: {_FORM}")
    return OwnGate(name, metric, limits["at_least"], limits["at_most"])


def _read(path: Path) -> dict[Any, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such gate file: {path}\nhint: docs/release.md shows one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the gate file {path}: {error}\nhint: give a YAML file") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"the gate file {path} is not valid YAML: {' '.join(str(error).split())}\nhint: docs/release.md shows one"
        ) from error
    if not isinstance(value, dict):
        given = type(value).__name__
        raise InputError(
            f"the gate file {path} must hold gates by name, not a {given}\nhint: docs/release.md shows one"
        )
    return value
