"""The table of devices and prices that a plan reckons with; users replace it by a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from hvqd_model.config import Settings
from infra.errors import InputError

BUNDLED = Path(__file__).resolve().parents[2] / "infra" / "deploy" / "prices.yaml"


class Device(Settings):
    """One GPU, or one CPU core."""

    memory_gib: float = Field(gt=0)
    """Its memory; of a CPU core, its share of the machine's."""
    fp32_tflops: float = Field(gt=0)
    """Peak of fp32 matrix products, in 10^12 operations a second."""
    bf16_tflops: float = Field(gt=0)
    """Peak of bf16 matrix products, dense."""
    memory_gb_s: float = Field(gt=0)
    """Memory bandwidth, 10^9 bytes a second."""
    link_gb_s: float = Field(gt=0)
    """To a neighbour in the same machine, one way."""
    network_gb_s: float = Field(gt=0)
    """To another machine, one way, this device's share."""
    launch_us: float = Field(gt=0)
    """Microseconds that starting an operation takes."""
    fragments: float = Field(ge=0)
    """Memory that its allocator holds between the pieces in use, as a share of what a step allocates and frees."""
    reserved_gib: float = Field(ge=0)
    """What a process takes of the memory before any model: context, communication, workspaces."""
    per_node: int = Field(ge=1)
    """Devices in a machine."""
    hour: float = Field(ge=0)
    """Price of an hour."""


class Shares(Settings):
    """What part of the peaks a training reaches."""

    matrix: float = Field(gt=0, le=1)
    """Of matrix products."""
    convolution: float = Field(gt=0, le=1)
    """Of convolutions."""
    memory: float = Field(gt=0, le=1)
    """Of the memory bandwidth."""


class Prices(Settings):
    """The whole table."""

    currency: str = "USD"
    """Of all prices."""
    storage_gib_month: float = Field(ge=0)
    """Price of keeping a GiB for a month."""
    shares: Shares
    """What part of the peaks is reached."""
    devices: Mapping[str, Device]
    """Devices by name."""

    def device(self, name: str) -> Device:
        """The named device.

        Raises:
            InputError: the table has none of that name.
        """
        if name not in self.devices:
            known = ", ".join(self.devices)
            raise InputError(
                f"no such device in the price table: {name} ({known})\n"
                "hint: choose one of them, or give a table of your own with --prices"
            )
        return self.devices[name]


def read_prices(path: Path | None = None) -> Prices:
    """The table of a file, or the one that comes with hvqd.

    Raises:
        InputError: the file cannot be read, or is no such table.
    """
    path = path or BUNDLED
    hint = f"hint: copy {BUNDLED} and change the copy"
    try:
        value: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the price table {path}: {error}\n{hint}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the price table {path} is not valid YAML: {' '.join(str(error).split())}\n{hint}") from error
    try:
        return Prices.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the table"
        raise InputError(f"the price table {path}: {key}: {problem['msg'].lower()}\n{hint}") from error
