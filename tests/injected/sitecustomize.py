"""Faults of a training, injected from outside: Python loads this file at its start where the folder is on PYTHONPATH.

`HVQD_TEST_FAULT` names one, as JSON: its kind, the image from which on it happens, and a file that marks that it has
happened, so that it happens once. The product knows nothing of it: the batches of the tokenizer's training are wrapped
when their module has been loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "workflows.training.vq_stage"


def _wrapped(batch: Any, fault: dict[str, Any]) -> Any:
    mark, first = Path(fault["mark"]), int(fault["images"])

    def wrapper(self: Any, position: Any) -> Any:
        found = batch(self, position)
        if position.images_seen < first:
            return found
        chief = position.offset == 0
        match fault["kind"]:
            case "not finite":  # for so many images, on all ranks
                if not mark.exists():
                    found[0].fill_(float("nan"))
                    if chief and position.images_seen >= int(fault["last"]):
                        mark.touch()
            case "stuck":  # one rank, while the others wait for it
                if not chief and not mark.exists():
                    mark.touch()
                    time.sleep(3600)
            case "slow":  # one rank, as long as there is no mark
                if not chief and not mark.exists():
                    time.sleep(float(fault["seconds"]))
            case kind:
                raise ValueError(f"no such fault: {kind}")
        return found

    return wrapper


class _Injector(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module as ever, then wraps its batches."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module's own specification, with this loader in its place."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As ever."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As ever, and the wrapping."""
        self._loader.exec_module(module)
        stage = module.VQStage  # type: ignore[attr-defined]
        stage.batch = _wrapped(stage.batch, json.loads(os.environ["HVQD_TEST_FAULT"]))


if "HVQD_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Injector())
