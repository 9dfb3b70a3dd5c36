"""Keeps passwords out of what is shown, logged or stored."""

from __future__ import annotations

import re

_NAME = r"[\w-]*(?:secret|passw(?:or)?d|api[_-]?key|access[_-]?key|signature|(?<![a-z])token(?![a-z]))[\w-]*"
_IN_URL = re.compile(r"(://[^/:@\s]*):[^/\s]+@")
_ASSIGNED = re.compile(rf"(?i)((?<![\w-]){_NAME}\s*[=:]\s*)(?!\s)[^\s,;&\"']+")
_QUOTED = re.compile(rf"(?i)((?<![\w-]){_NAME}[\"']?\s*[=:]\s*([\"']))(?:\\.|(?!\2).)*(?=\2)")
_HEADER = re.compile(r"(?i)(authorization[\"']?\s*[=:]\s*[\"']?\w+\s+)[^\s,;\"']+")
_AWS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")


_WHOLE_NAME = re.compile(rf"(?i){_NAME}")


def names_a_secret(name: str) -> bool:
    """Whether a variable's name speaks of a secret: what `mask` hides the values of."""
    return _WHOLE_NAME.fullmatch(name) is not None


def mask(text: str) -> str:
    """The text with stars for what must stay secret.

    That is passwords in URLs, values assigned to names that speak of a secret, a password, an access key or a token
    (`tokens` and `tokenizer` do not), authorization headers, and AWS access key ids.
    """
    for pattern, shown in (
        (_IN_URL, r"\1:***@"),
        (_QUOTED, r"\1***"),
        (_ASSIGNED, r"\1***"),
        (_HEADER, r"\1***"),
        (_AWS_KEY_ID, "***"),
    ):
        text = pattern.sub(shown, text)
    return text
