"""What may be asked of the picture server: one JSON object, read strictly, refused with what is allowed and a hint.

Everything here is a function of the bytes that came in, so that what a stranger sends can be tried without a server.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

from workflows.drawing.asking import Asked

_FIELDS = ("seed", "n", "class", "style", "text", "map", "steps")
_EXAMPLE = '{"seed": 7, "n": 4, "class": "flags", "steps": 16}'
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_SHOWN = 80
_LONGEST_TEXT = 500
_PNG = b"\x89PNG\r\n\x1a\n"


class BadRequest(Exception):  # noqa: N818 - it is what HTTP calls it
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, error: str, hint: str, status: int = 400) -> None:
        """Keep both lines."""
        super().__init__(error)
        self.error, self.hint, self.status = error, hint, status

    def as_json(self) -> dict[str, str]:
        """The answer's body, in characters that UTF-8 has."""
        both = {"error": self.error, "hint": self.hint}
        return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in both.items()}


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
    asked: Asked
    """Class, style, caption and label map; where nothing is said, classes come as often as the data has them."""
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
    asked = Asked(
        label=_text(value, "class", "the name of a class", "leave it out for a class by chance"),
        style=_text(value, "style", "the name of a style", "leave it out for any style"),
        text=_text(value, "text", "a caption", "leave it out, or say what there is to see", _LONGEST_TEXT),
        map_png=_png(value),
    )
    seed = _whole(value, "seed", _SMALLEST, _LARGEST)
    steps = _whole(value, "steps", 1, limits.steps)
    count = _whole(value, "n", 1, limits.pictures)
    return DrawRequest(
        seed=secrets.randbits(63) if seed is None else seed,
        count=1 if count is None else count,
        asked=asked,
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


def _text(value: dict[str, Any], key: str, what: str, hint: str, longest: int = _SHOWN) -> str | None:
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, str) or not found.strip() or len(found) > longest:
        shown = repr(found[:_SHOWN]) if isinstance(found, str) else _kind(found)
        raise BadRequest(f"{key} must be {what}, of at most {longest} characters, or null: {shown}", hint)
    try:
        found.encode()
    except UnicodeEncodeError as error:  # JSON can name halves of a character
        raise BadRequest(f"{key} has half a character: {found[:_SHOWN]!r}", hint) from error
    return found


def _png(value: dict[str, Any]) -> bytes | None:
    """The bytes of a label map."""
    found, how = value.get("map"), "encode the file of a grey PNG in base64, or leave it out"
    if found is None:
        return None
    if not isinstance(found, str):
        raise BadRequest(f"map must be a PNG in base64 or null, not {_kind(found)}", how)
    try:
        content = base64.b64decode(found, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"map is not base64: {str(error)[:_SHOWN]}", how) from error
    if not content.startswith(_PNG):
        raise BadRequest("map is no PNG", how)
    return content


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
