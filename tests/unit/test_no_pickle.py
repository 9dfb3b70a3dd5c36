"""Nothing that is read can run: no unpickling of files in the program's own code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = ("hvqd_model", "infra", "workflows", "tuning")
UNPICKLERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    # what Ray Tune and DeepSpeed can only unpickle
    "tune.Tuner.restore",
    "Tuner.restore",
    "tune.ExperimentAnalysis",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "ds_to_universal.main",
}
METHODS = {"load_checkpoint"}
"""Of whatever object: DeepSpeed's engine unpickles what it is given."""
ALLOWED = {
    "workflows/data/distributed.py": 2,  # between processes of one job, through Ray's own memory; never a file
}
"""Files with uses that are in order, and how many."""


def called(node: ast.Call) -> str:
    """The dotted name of what is called."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append({"np": "numpy", "pd": "pandas"}.get(function.id, function.id))
    return ".".join(reversed(parts))


def constant(node: ast.Call, name: str) -> object:
    """The value of a keyword argument that is written out; None without it."""
    for keyword in node.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def unpickles(node: ast.Call) -> bool:
    """Whether the call could run what a file says."""
    name = called(node)
    if name in UNPICKLERS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        return True
    if name == "torch.load":
        return constant(node, "weights_only") is not True
    if name == "numpy.load":
        return constant(node, "allow_pickle") is True
    return False


def uses(text: str) -> int:
    """How many such calls a module has."""
    return sum(isinstance(node, ast.Call) and unpickles(node) for node in ast.walk(ast.parse(text)))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import pickle\npickle.loads(x)", 1),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("np.load(f, allow_pickle=True)", 1),
        ("np.load(f)", 0),
        ("yaml.load(f, Loader=L); yaml.safe_load(f)", 1),
        ("self._engine.load_checkpoint(f); tune.Tuner.restore(f, train)", 2),
    ],
)
def test_the_reader_of_sources_sees_what_it_shall_see(text: str, count: int) -> None:
    assert uses(text) == count


def test_no_module_unpickles_a_file() -> None:
    found, modules = {}, 0
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            modules += 1
            if count := uses(path.read_text(encoding="utf-8")):
                found[path.relative_to(PROJECT).as_posix()] = count
    assert modules > 100
    assert found == ALLOWED
