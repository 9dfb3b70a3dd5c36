"""The house rules, read from the imports: arrows point downwards, and each outside system has one home."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("hvqd_model", "infra", "workflows", "tuning")
BELOW = {
    "hvqd_model": {"hvqd_model"},
    "infra": {"infra"},
    "workflows": {"workflows", "hvqd_model", "infra"},
    "tuning": {"tuning", "workflows", "hvqd_model", "infra"},
}
FRONT_DOOR = ("workflows/cli.py", "workflows/commands/")
SCIENCE_MAY_IMPORT = {"torch", "numpy", "safetensors", "pydantic", "hvqd_model", "scipy"}
HOMES = {
    "deepspeed": ("workflows/training/zero.py",),
    "mlflow": ("infra/tracking.py", "infra/models.py", "infra/load_alone.py", "workflows/release/served_model.py"),
    "ray.train": ("workflows/training/launch.py", "workflows/training/worker.py"),
    "ray.data": ("workflows/data/distributed.py", "workflows/training/launch.py"),  # Ray Train's coordinator
    "ray.serve": ("workflows/serving/app.py",),
    "ray.tune": ("tuning/search.py",),
    "fsspec": ("infra/storage.py",),
    "s3fs": ("infra/storage.py",),
    "pyarrow.fs": ("infra/storage.py",),
}


def imports_by_file() -> dict[str, set[str]]:
    """Every absolute module name that each source file of the packages imports, wherever the import stands."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            names: set[str] = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    module = node.module or ""
                    names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
            found[path.relative_to(REPOSITORY).as_posix()] = names
    return found


def test_arrows_point_downwards() -> None:
    files = imports_by_file()
    assert len(files) >= 10
    wrong = [
        f"{file} imports {name}"
        for file, names in files.items()
        if not file.startswith(FRONT_DOOR)
        for name in names
        if (top := name.split(".")[0]) in PACKAGES and top not in BELOW[file.split("/")[0]]
    ]
    assert wrong == []


def test_the_science_imports_nothing_but_the_science() -> None:
    import sys

    files = {file: names for file, names in imports_by_file().items() if file.startswith("hvqd_model/")}
    assert len(files) >= 3
    allowed = SCIENCE_MAY_IMPORT | set(sys.stdlib_module_names) | {"__future__"}
    wrong = [
        f"{file} imports {name}" for file, names in files.items() for name in names if name.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_each_outside_system_has_one_home() -> None:
    wrong = [
        f"{file} imports {name}"
        for file, names in imports_by_file().items()
        for name in names
        for system, homes in HOMES.items()
        if (name == system or name.startswith(system + ".")) and file not in homes
    ]
    assert wrong == []
