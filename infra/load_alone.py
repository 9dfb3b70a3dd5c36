"""Loads a registered model as a stranger would, draws a picture twice, and says how that went, as one JSON object.

Run by path (`python -P infra/load_alone.py FOLDER MODULE…`), so that it imports nothing of this project but what
travels with the model. The modules named after the folder are those that should not have been needed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlflow.pyfunc
import pandas as pd


def _peak_bytes() -> int:
    """Largest memory of this process; resource.getrusage would count what its parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Print seconds to load, seconds of the second picture, both pictures, peak memory, and unwanted modules."""
    folder, unwanted = sys.argv[1], sys.argv[2:]
    started = time.monotonic()
    model = mlflow.pyfunc.load_model(folder)
    loaded = time.monotonic()
    rows = pd.DataFrame({"seed": [1]})
    first = model.predict(rows)["image"][0]
    begun = time.monotonic()
    second = model.predict(rows)["image"][0]
    found = {
        "load_seconds": loaded - started,
        "latency_seconds": time.monotonic() - begun,
        "memory_bytes": _peak_bytes(),
        "pictures": [first, second],
        "unwanted": [name for name in unwanted if name in sys.modules],
    }
    print(json.dumps(found))  # noqa: T201


main()
