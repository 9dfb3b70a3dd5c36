"""What may be asked of the picture server: one JSON object, read strictly, refused with what is allowed and a hint.

Everything here is a function of the bytes that came in, so that what a stranger sends can be tried without a server.
"""

from __future__ import annotations

import difflib
import json
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

_FIELDS = ("seed", "n", "class", "steps")
_EXAMPLE = '{"seed": 7, "n": 4, "class": "flags", "steps": 16}'
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_SHOWN = 80


class BadRequest(Exception):  # noqa: N818 - it is what HTTP calls it
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, error: str, hint: str, status: int = 400) -> None:
        """Keep both lines."""
        super().__init__(error)
        self.error, self.hint, self.status = error, hint, status

    def as_json(self) -> dict[str, str]:
        """The answer's body."""
        return {"error": self.error, "hint": self.hint}


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    pictures: int
    steps: int
    body_bytes: int


@dataclass(frozen=True)
class DrawRequest:
    """What is asked for."""

    seed: int
    """Picture i is drawn from (seed, i) alone, as `hvqd sample --seed` does."""
    count: int
    label: str | None
    """Class name; None draws classes as often as the data has them."""
    steps: int | None
    """None takes what the model's makers recommend."""


def read_request(body: bytes, limits: Limits) -> DrawRequest:
    """The request in a body; an empty one asks for one picture from a seed of the server's choice.

    Raises:
        BadRequest: it is not such a request (the key, what was given, what is allowed).
    """
    if len(body) > limits.body_bytes:
        raise too_large(limits)
    value = _parsed(body) if body.strip() else {}
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {_kind(value)}", f"for example {_EXAMPLE}")
    for key in value:
        if key not in _FIELDS:
            close = difflib.get_close_matches(key[:_SHOWN], _FIELDS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"for example {_EXAMPLE}"
            raise BadRequest(f"unknown key: {key[:_SHOWN]!r} ({', '.join(_FIELDS)})", remedy)
    label = value.get("class")
    if label is not None and (not isinstance(label, str) or not label.strip() or len(label) > _SHOWN):
        shown = label[:_SHOWN] if isinstance(label, str) else _kind(label)
        raise BadRequest(f"class must be the name of a class or null: {shown!r}", "leave it out for a class by chance")
    seed = _whole(value, "seed", _SMALLEST, _LARGEST)
    steps = _whole(value, "steps", 1, limits.steps)
    count = _whole(value, "n", 1, limits.pictures)
    return DrawRequest(
        seed=secrets.randbits(63) if seed is None else seed,
        count=1 if count is None else count,
        label=label,
        steps=steps,
    )


def too_large(limits: Limits) -> BadRequest:
    """A body of more bytes than are read."""
    return BadRequest(f"the body has more than {limits.body_bytes} bytes", f"a request is as short as {_EXAMPLE}", 413)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not UTF-8", f"for example {_EXAMPLE}") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", f"for example {_EXAMPLE}") from error
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:_SHOWN]}", f"for example {_EXAMPLE}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is no JSON number", f"for example {_EXAMPLE}")


def _whole(value: dict[str, Any], key: str, low: int, high: int) -> int | None:
    found = value.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int):
        raise BadRequest(f"{key} must be a whole number from {low} to {high}, not {_kind(found)}", f"like {_EXAMPLE}")
    if not low <= found <= high:
        shown = str(found) if abs(found) < 2**70 else "one of far more digits"
        raise BadRequest(f"{key} must be from {low} to {high}: {shown}", "ask several times for more")
    return found


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        float: "a fraction",
        int: "a number",
    }
    return names.get(type(value), "null")
