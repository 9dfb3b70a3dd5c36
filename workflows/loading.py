"""Reads a run's configuration (preset, YAML file, dotted overrides over the defaults) and says clearly what is wrong.

`to_yaml` is the way back: a complete, commented YAML that can be edited and passed with --config.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hvqd_model.config import EACH, ONE
from infra.errors import InputError
from infra.secrets import mask
from infra.storage import Store
from workflows.config import RunConfig

PRESETS = Path(__file__).parent / "presets"
REMEMBERED = "config.yaml"


def preset_names() -> list[str]:
    """Names of the presets that come with hvqd."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """The first comment line of a preset: what it is for."""
    return preset_path(name).read_text().splitlines()[0].lstrip("# ").strip()


def preset_path(name: str) -> Path:
    """The preset's file.

    Raises:
        InputError: there is no preset of that name.
    """
    path = PRESETS / f"{name}.yaml"
    if not re.fullmatch(r"[\w-]+", name) or not path.is_file():
        names = preset_names()
        raise InputError(f"no such preset: {name} ({', '.join(names)})\n{_did_you_mean(name, names, '--preset ')}")
    return path


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    root: str | None = None,
    seed: int | None = None,
    below: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration from, in rising order: defaults, `below`, preset, file, `key=value` overrides, root and seed.

    Raises:
        InputError: a preset, file, key or value that is not valid, each named in the user's spelling.
    """
    values: dict[str, Any] = dict(below or {})
    if preset is not None:
        values = _merge(values, _read_yaml(preset_path(preset)))
    if file is not None:
        values = _merge(values, _read_yaml(Path(file)))
    for override in overrides:
        values = _merge(values, parse_override(override))
    if root is not None:
        values["root"] = root
    if seed is not None:
        values["seed"] = seed
    return config_from(values)


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a nested mapping.

    Raises:
        InputError: the first thing that is wrong with it.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def parse_override(text: str) -> dict[str, Any]:
    """The nested mapping of one `a.b=value`; the value is read as YAML.

    Raises:
        InputError: not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise InputError(
            f"--set takes key=value with a dotted key: {text}\nhint: for example --set vq.train.images=20000"
        )
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            f"--set {key}: the value is not valid YAML: {value}\nhint: quote it, or write a list as [8,4]"
        ) from error
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    return nested


def remember(config: RunConfig, root: Store) -> None:
    """Keep the configuration in the root, so that later commands need only --root."""
    root.write_bytes(REMEMBERED, to_yaml(masked(config)).encode())


def read_remembered(root: Store) -> dict[str, Any] | None:
    """The configuration a root remembers, as a mapping; None when it has none.

    Raises:
        InputError: the file is not a mapping in YAML.
    """
    try:
        content = root.quick().read_bytes(REMEMBERED)
    except FileNotFoundError:
        return None
    return _parse_yaml(content.decode("utf-8", "replace"), f"{root.url}/{REMEMBERED}")


def masked(config: RunConfig) -> RunConfig:
    """The configuration with stars for passwords, fit to be shown and stored."""
    return RunConfig.model_validate(_mask(config.model_dump()))


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mask(child) for key, child in value.items()}
    return mask(value) if isinstance(value, str) else value


def to_yaml(config: RunConfig, *, documented: bool = True) -> str:
    """The complete configuration as YAML, in the order of the fields, with each field's documentation as a comment."""
    return "\n".join(_yaml_lines(config, config.model_dump(mode="json"), 0, documented)) + "\n"


def _yaml_lines(model: BaseModel, values: Mapping[str, Any], depth: int, documented: bool) -> list[str]:
    indent = "  " * depth
    lines: list[str] = []
    for name, field in type(model).model_fields.items():
        if documented and field.description:
            lines.append(f"{indent}# {' '.join(field.description.split())}")
        child = getattr(model, name)
        if isinstance(child, BaseModel):
            lines += [f"{indent}{name}:", *_yaml_lines(child, values[name], depth + 1, documented)]
        else:
            text = yaml.safe_dump(values[name], default_flow_style=True, width=10_000, allow_unicode=True)
            lines.append(f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}")
    return lines


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise InputError(f"no such configuration file: {path}\nhint: `hvqd config show` prints one to edit") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration file {path}: {error}\nhint: give a YAML file") from error


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is not valid YAML: {reason}\nhint: `hvqd config show` prints a valid one") from error
    if value is not None and not isinstance(value, dict):
        given = type(value).__name__
        raise InputError(
            f"{name} must hold keys and values, not a {given}\nhint: `hvqd config show` prints a valid one"
        )
    return value or {}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        present = merged.get(key)
        merged[key] = _merge(present, value) if isinstance(present, Mapping) and isinstance(value, Mapping) else value
    return merged


def explain(
    error: ValidationError,
    model: type[BaseModel] = RunConfig,
    hint: str = "`hvqd config show` documents every key and its default",
) -> str:
    """Two lines on the first problem: the dotted key, what was given, what is allowed, and a hint.

    Args:
        model: what was being read.
        hint: what helps where the problem itself doesn't say.
    """
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"] if part not in (ONE, EACH)) or "the configuration"
    if problem["type"] == "extra_forbidden":
        parent, _, name = key.rpartition(".")
        allowed = _fields_at(problem["loc"][:-1], model)
        prefix = f"{parent}." if parent else ""
        return f"unknown key: {key}\n{_did_you_mean(name, allowed, prefix)}"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError) and "\nhint:" in str(cause):
        where = "" if key == "the configuration" else f"{key}: "
        return f"{where}{cause}"
    given = problem["input"]
    shown = repr(given) if not isinstance(given, dict) else "a group of keys"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{key}: {message}, not {shown}\nhint: {hint}"


def dotted_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every key that has a value of its own, such as vq.train.images."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _fields_at(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _did_you_mean(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    if close:
        return f"hint: did you mean {prefix}{close[0]}?"
    return f"hint: allowed are {', '.join(prefix + option for option in allowed)}"
