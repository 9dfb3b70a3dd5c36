"""Reads a search space (one of the ready ones or a YAML file) over its base configuration, and says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from infra.errors import InputError
from tuning.groups import Base
from tuning.parameters import Parameter
from tuning.space import SearchSpace
from workflows.loading import explain, load_config

SPACES = Path(__file__).parent / "spaces"
_TRIED_DRAWS = 32
_HINT = "`hvqd tune show vq --yaml` prints a space to edit"


def space_names() -> list[str]:
    """The spaces that come with hvqd."""
    return sorted(path.stem for path in SPACES.glob("*.yaml"))


def space_path(name_or_path: str | Path) -> Path:
    """The space's file.

    Raises:
        InputError: neither a ready space nor a file.
    """
    path = Path(name_or_path)
    if re.fullmatch(r"[\w-]+", str(name_or_path)) and (SPACES / f"{name_or_path}.yaml").is_file():
        return SPACES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise InputError(
            f"no such search space: {name_or_path} (ready ones are {', '.join(space_names())})\n"
            "hint: give one of these names, or a YAML file"
        )
    return path


def load_space(
    name_or_path: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
) -> SearchSpace:
    """A ready space by its name, or one of a file, over its base.

    Args:
        preset, config: in the place of those of the space's base.
        overrides: `key=value`, over the space's `base.set`.

    Raises:
        InputError: whatever is wrong with it.
    """
    path = space_path(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}\nhint: {_HINT}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, not {type(values).__name__}\nhint: {_HINT}")
    return space_from(values, str(path), preset=preset, config=config, overrides=overrides, seed=seed)


def space_from(
    values: Mapping[str, Any],
    where: str,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
) -> SearchSpace:
    """A space of a nested mapping; see `load_space`.

    Raises:
        InputError: whatever is wrong with it.
    """
    base = _read(Base, values.get("base") or {}, f"{where}: base")
    if preset is not None or config is not None:
        base = base.model_copy(update={"preset": preset, "config": None if config is None else str(config)})
    kept = [f"{key}={_yaml(value)}" for key, value in base.set.items()]
    resolved = load_config(base.preset, base.config, [*kept, *overrides], seed=seed)
    given = values.get("parameters") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: parameters must be a group of names, not {given!r}\nhint: {_HINT}")
    parameters = {name: _read(Parameter, value, f"{where}: parameters.{name}") for name, value in given.items()}
    whole = {**values, "base": base, "parameters": parameters, "resolved_base": resolved}
    space: SearchSpace = _read(SearchSpace, whole, where)
    generator = np.random.default_rng(0)
    for _ in range(_TRIED_DRAWS):
        space.settings(space.draw_any(generator))  # parameters that set one key show here
    space.draw(generator, memory=None)
    return space


def _read(model: type[Any], value: Any, where: str) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, model, _HINT)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
