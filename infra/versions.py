"""Versions that must be the same on the driver, the head and the workers, and where they are not."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "mlflow", "pydantic", "numpy")
_ROOT = Path(__file__).resolve().parents[1]
COMMIT = "COMMIT"
"""A file beside source that travels without its repository."""
_CODE = ("hvqd_model", "infra", "workflows", "tuning")


def versions() -> dict[str, str]:
    """This process's versions: Python, the packages that talk to each other, and a digest of hvqd's own code."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).split("+")[0]  # a CPU build and a CUDA build of torch go together
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return {**found, "hvqd": code_digest()}


def code_digest() -> str:
    """Twelve digits of the digest of hvqd's own source files."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def source_commit(folder: Path = _ROOT) -> str:
    """The git commit of the source in a folder, as its repository or the file `COMMIT` tells; else `unknown`."""
    told = folder / COMMIT
    if told.is_file():
        return told.read_text().strip()
    words = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A phrase for each version that is not the expected one, with both."""
    return [
        f"{name} {found.get(name, 'none')} instead of {version}"
        for name, version in expected.items()
        if found.get(name, "none") != version
    ]
