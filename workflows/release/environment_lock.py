"""The exact packages of this environment that a bundle needs: what `pip install -r` makes the same environment from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERVED = ("torch", "numpy", "safetensors", "pydantic", "pyyaml", "pillow", "pandas", "mlflow")
"""What a registered model imports."""


def locked(names: Sequence[str] = SERVED) -> list[str]:
    """`name==version` of these packages and of everything they need here, in the order of their names.

    Raises:
        PackageNotFoundError: one of the named is not installed.
    """
    found: dict[str, str] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found and not wanted.extras:
            continue
        found[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            extras = wanted.extras or {""}
            applies = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
            if applies and canonicalize_name(needed.name) not in found:
                todo.append(needed)
    return [f"{name}=={version}" for name, version in sorted(found.items())]
