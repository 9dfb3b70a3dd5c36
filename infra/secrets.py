"""Keeps passwords out of what is shown, logged or stored."""

from __future__ import annotations

import re

_IN_URL = re.compile(r"(://[^/:@\s]*):[^/@\s]+@")
_ASSIGNED = re.compile(r"(?i)\b([\w-]*(?:secret|password|passwd|token|api_?key)[\w-]*)(\s*[=:]\s*)[^\s,;&]+")


def mask(text: str) -> str:
    """The text with passwords in URLs and assigned secrets replaced by stars."""
    return _ASSIGNED.sub(r"\1\2***", _IN_URL.sub(r"\1:***@", text))
