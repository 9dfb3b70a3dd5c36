"""Keeps the outside systems quiet: no telemetry, and their output in a log file instead of the user's terminal.

Ray, DeepSpeed and MLflow print through Python, through C++ and from child processes. The one thing they share is the
process's file descriptors 1 and 2, so those are pointed at the log; what is meant for the user goes to copies of them.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def switch_off_telemetry() -> None:
    """Set the environment that stops usage statistics and chatter; call before the systems are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Streams:
    """The user's own streams, while everything else writes to the log."""

    out: TextIO
    err: TextIO


def divert_noise(log: Path) -> Streams:
    """Point file descriptors 1 and 2, and logging, at a log file; return the user's real streams.

    Args:
        log: the file, appended to; its folder is made.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    err = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    return Streams(out, err)
