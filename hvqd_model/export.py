"""Models as folders: `weights.safetensors` and the `config.json` that rebuilds the model around them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig, VQConfig
from hvqd_model.prior.prior import HierarchicalPrior

Model = HierarchicalVQ | HierarchicalPrior
WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def model_files(model: Model, state: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], str]:
    """What a model's folder holds: its weights by name, and the text of its config.json."""
    state = model.state_dict() if state is None else state
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = {"kind": type(model).__name__, "config": model.config.model_dump(mode="json")}
    return weights, json.dumps(config, indent=1, sort_keys=True) + "\n"


def save_model(model: Model, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model to a local folder; equal models give equal bytes.

    Args:
        model: what to save.
        folder: made when it does not exist.
        state: weights to save instead of the model's own, such as their moving average.
    """
    weights, config = model_files(model, state)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(config)


def load_model(folder: Path) -> Model:
    """The model of a local folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged, or the weights are not the configuration's or not finite.
    """
    try:
        described = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"no model at {folder}: {CONFIG if not (folder / CONFIG).is_file() else WEIGHTS} is missing\n"
            f"hint: a model is a folder with {WEIGHTS} and {CONFIG}"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the model at {folder} cannot be read: {error}\nhint: export or copy it again") from error
    model = _build(described, folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the weights at {folder} do not fit their configuration: {reason}\nhint: export or copy the model again"
        ) from error
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(
            f"the weights at {folder} are not all finite: {broken[0]}\n"
            "hint: the training went wrong, see its alarms; train again with a lower learning rate"
        )
    return model.eval()


def _build(described: object, folder: Path) -> Model:
    kinds = {"HierarchicalVQ": _build_vq, "HierarchicalPrior": _build_prior}
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(described, dict) or not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{folder / CONFIG} describes no model of ours: kind={kind} ({', '.join(kinds)})\n"
            "hint: point at a folder that save_model wrote"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are about to be replaced
            return kinds[kind](described.get("config"))
    except ValidationError as error:
        reason = "; ".join(
            ".".join(["config", *map(str, wrong["loc"])]) + ": " + wrong["msg"].splitlines()[0]
            for wrong in error.errors()
        )
        raise ValueError(f"{folder / CONFIG} is not valid: {reason}\nhint: export the model again") from error


def _build_vq(config: object) -> Model:
    return HierarchicalVQ(VQConfig.model_validate(config))


def _build_prior(config: object) -> Model:
    return HierarchicalPrior(PriorConfig.model_validate(config))
