"""Requests that no picture server can answer, as strangers send them: (name, method, path, body, headers, status)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from tests.pictures import encoded

MOST_BYTES = 2_000


@dataclass(frozen=True)
class Malformed:
    """One request, and how it is to be refused."""

    name: str
    body: bytes = b""
    status: int = 400
    method: str = "POST"
    path: str = "/draw"
    headers: dict[str, str] = field(default_factory=dict)


_INJECTIONS = (
    "'; DROP TABLE model_versions; --", "{{7*7}}", "${jndi:ldap://x/a}", "../../etc/passwd",
    "<script>alert(1)</script>",
    "$(touch /tmp/owned)", "`id`", "%00", "a\x00b", "__import__('os').system('id')", "\r\nX-Injected: 1", "😀" * 20,
    "flags\n", "models:/hvqd/1", "-1", "NaN", "none of these", "a" * 81, " ", "",
)  # fmt: skip
_VALUES: tuple[object, ...] = (
    True, False, 1.5, 1e300, "7", "NaN", [], [1], {}, {"a": 1}, [[[]]], -(2**63) - 1, 2**63, 10**400, "", "1e3", -0.5,
)  # fmt: skip
_COUNTS: tuple[object, ...] = (0, -1, 65, 10**9, 2**63, 1.0, "4", [4], True, {"n": 1}, 1e9, -(10**30))
_BODIES: dict[str, bytes] = {
    "half an object": b'{"seed": 7',
    "no quotes": b"{seed: 7}",
    "single quotes": b"{'seed': 7}",
    "two objects": b'{"seed": 7}{"seed": 8}',
    "a comment": b'{"seed": 7} // seven',
    "a trailing comma": b'{"seed": 7,}',
    "a list": b"[7]",
    "a number": b"7",
    "a text": b'"seed"',
    "true": b"true",
    "null": b"null",
    "not utf-8": b'{"class": "\xff\xfe"}',
    "utf-16": '{"seed": 7}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"seed": 7}',
    "zeros": b"\x00" * 64,
    "a form": b"seed=7&n=4",
    "xml": b"<draw><seed>7</seed></draw>",
    "yaml": b"seed: 7\nn: 4\n",
    "a png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "nan": b'{"seed": NaN}',
    "infinity": b'{"seed": Infinity}',
    "minus infinity": b'{"n": -Infinity}',
    "nan elsewhere": b'{"class": [NaN]}',
    "hexadecimal": b'{"seed": 0x7}',
    "leading zeros": b'{"seed": 007}',
    "a number of 5,000 digits": b'{"seed": ' + b"9" * 1_900 + b"}",
    "deep lists": b"[" * 1_900,
    "deep lists in a key": b'{"seed": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep objects": b'{"a":' * 380 + b"1" + b"}" * 10,
}


_PNG = encoded(Image.new("L", (8, 8)))
_HEADER = _PNG[:16] + (200_000).to_bytes(4, "big") * 2 + _PNG[24:]
_MAPS: dict[str, str] = {
    "not base64": "not base64!",
    "half a code": "iVBORw0KGgo",
    "nothing": "",
    "a text": base64.b64encode(b"a text").decode(),
    "a pickle": base64.b64encode(_BODIES["a pickle"]).decode(),
    "a GIF": base64.b64encode(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;").decode(),
    "a path": "file:///etc/passwd",
    "a PNG's first bytes": base64.b64encode(_PNG[:8]).decode(),
    "half a PNG": base64.b64encode(_PNG[: len(_PNG) // 2]).decode(),
    "a PNG of another size": base64.b64encode(_PNG).decode(),
    "a PNG of 40 billion pixels": base64.b64encode(_HEADER).decode(),
    "a colour PNG": base64.b64encode(encoded(Image.new("RGB", (8, 8)))).decode(),
}
"""None is a map that a model could be told: for each it has to know what is wrong, or that it knows no maps."""


def malformed_requests() -> Iterator[Malformed]:
    """Every one of them, more than 280; those with a style, a caption or a map are not for models that know these."""
    for name, body in _BODIES.items():
        yield Malformed(name, body)
    for value in _VALUES:
        for key in ("seed", "steps", "n"):
            if isinstance(value, int) and not isinstance(value, bool) and key != "seed":
                continue  # numbers have their own list below
            yield Malformed(f"{key} is {str(value)[:20]}", json.dumps({key: value}).encode())
        for key in ("class", "style", "text", "map"):
            if not isinstance(value, str) or key == "map":
                yield Malformed(f"{key} is {str(value)[:20]}", json.dumps({key: value}).encode())
    for count in _COUNTS:
        yield Malformed(f"n is {count}", json.dumps({"n": count}).encode())
        yield Malformed(f"steps are {count}", json.dumps({"steps": count if count != 65 else 101}).encode())
    for text in _INJECTIONS:
        yield Malformed(f"class is {text[:20]!r}", json.dumps({"class": text}).encode())
        yield Malformed(f"the key is {text[:20]!r}", json.dumps({text: 1}).encode())
        yield Malformed(f"seed is {text[:20]!r}", json.dumps({"seed": text}).encode())
        yield Malformed(f"style is {text[:20]!r}", json.dumps({"style": text}).encode())
    for key in ("class", "style", "text"):
        yield Malformed(f"{key} has half a character", json.dumps({key: "flags \ud83d"}).encode())
        yield Malformed(f"{key} is long", json.dumps({key: "flags " * 90}).encode())
    yield Malformed("the key has half a character", json.dumps({"\udc00": 1}).encode())
    yield Malformed("a caption for a model without", b'{"text": "red apple"}')
    for name, content in _MAPS.items():
        yield Malformed(f"the map is {name}", json.dumps({"map": content}).encode())
    unknown = ("sead", "Seed", "SEED", "count", "Style", "caption", "maps", "guidance", "model", "__class__", "seed ")
    for key in unknown:
        yield Malformed(f"unknown key {key}", json.dumps({key: 1}).encode())
    for bytes_more in (1, 1_000, 100_000, 5_000_000):
        yield Malformed(f"{bytes_more} bytes too many", b" " * (MOST_BYTES + bytes_more), status=413)
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        yield Malformed(f"{method} /draw", method=method, status=405)
    for method in ("POST", "PUT", "DELETE"):
        for path in ("/health", "/metrics"):
            yield Malformed(f"{method} {path}", method=method, path=path, status=405)
    for path in ("/", "/drawn", "/draw/7", "/invocations", "/../draw", "/%2e%2e/etc/passwd", "/.git/config", "/DRAW"):
        yield Malformed(f"no such path {path}", path=path, status=404)
