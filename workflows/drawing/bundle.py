"""A bundle: all that is needed to draw pictures, in one folder. What gets registered, and what `--model` may name.

vq/ and prior/ hold the two models (see hvqd_model.export); bundle.json holds the classes' names and how often the data
has them, the recommended sampling, how pictures were prepared and encoded, and what it was made from (digests, runs,
commit); config.yaml the whole configuration; README.md is the model card; evaluation.json the figures with their
protocol; samples.png a sheet of samples; requirements.lock the exact packages that it draws with; DATA_LICENCES.md
what the training pictures ask for; text/, of a model that is told captions, the encoder of captions and those that
were learned; digests.json every other file's SHA-256.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model
from hvqd_model.randomness import uniform
from infra.errors import InputError
from workflows.config import REFINED, SamplingSettings
from workflows.data.learned_text import LearnedText, load_text

DESCRIPTION = "bundle.json"
SERVED_BATCH = 16
"""Pictures that a served model draws at once, unless its sampling says less: always as many, so that a picture depends
on no other request."""
DIGESTS = "digests.json"
"""SHA-256 of every other file of a bundle, and once more of the whole folder that a version is registered with."""
_LEFT_BY_MLFLOW = "registered_model_meta"
"""Written where a model is loaded from, in a store on this machine the registered folder itself."""


@dataclass(frozen=True)
class LoadedBundle:
    """The models of a bundle, in memory."""

    vq: HierarchicalVQ
    prior: HierarchicalPrior
    classes: tuple[str, ...]
    class_rows: tuple[int, ...]
    """Training pictures of each class."""
    digest: str
    """Of both models' weights."""
    sampling: SamplingSettings | None
    """What its makers recommend."""
    text: LearnedText | None = None
    """Of a model that is told captions."""
    refine_rounds: int = 0
    """Of the codes that the prior learned (`encode.refine_rounds`); 0 for the encoder's own."""

    def draw_labels(self, seeds: Sequence[int]) -> list[int]:
        """A class for each seed, as often as the data has them; -1 for an unconditional model."""
        return draw_labels(seeds, self.class_rows)


def class_index(name: str, classes: tuple[str, ...]) -> int:
    """The index of a class by its name, in any case.

    Raises:
        InputError: the model was not trained on such a class; the nearest is named.
    """
    if not classes:
        raise InputError(f"the model was trained without classes: {name}\nhint: leave --class out")
    lowered = [option.lower() for option in classes]
    if name.lower() in lowered:
        return lowered.index(name.lower())
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.3)
    remedy = f"did you mean {classes[lowered.index(close[0])]!r}?" if close else "choose one of them"
    raise InputError(f"no such class: {name} (the model knows {', '.join(classes)})\nhint: {remedy}")


def served_sampling(bundle: LoadedBundle) -> SamplingSettings:
    """How a served model draws: as its makers recommend, in batches small enough for single requests."""
    sampling = bundle.sampling or SamplingSettings()
    return sampling.model_copy(update={"batch": min(sampling.batch, SERVED_BATCH)})


def draw_labels(seeds: Sequence[int], class_rows: Sequence[int]) -> list[int]:
    """A class for each seed, in proportion to the rows; it follows from the seed alone."""
    if sum(class_rows) == 0:
        return [-1] * len(seeds)
    edges = torch.tensor(class_rows, dtype=torch.float64).cumsum(0) / sum(class_rows)
    draws = uniform(torch.tensor(list(seeds), dtype=torch.int64), stream="class")
    labels: list[int] = torch.searchsorted(edges, draws, right=True).clamp_max(len(edges) - 1).tolist()
    return labels


def write_bundle(
    folder: Path,
    vq: Path,
    prior: Path,
    classes: Sequence[str],
    class_rows: Sequence[int],
    sampling: SamplingSettings,
    lineage: Mapping[str, str],
    card: str,
    more: Mapping[str, bytes] | None = None,
    described: Mapping[str, Any] | None = None,
) -> None:
    """Lay a bundle out in a local folder.

    Args:
        vq, prior: the models' folders, copied.
        lineage: digest of each artifact it was made from.
        card: the README.
        more: further files by name.
        described: further entries of bundle.json.
    """
    for name, source in (("vq", vq), ("prior", prior)):
        (folder / name).mkdir(parents=True)
        for file in ("weights.safetensors", "config.json"):
            (folder / name / file).write_bytes((source / file).read_bytes())
    description = {
        "classes": list(classes),
        "class_rows": list(class_rows),
        "sampling": sampling.model_dump(mode="json"),
        "lineage": dict(lineage),
        **(described or {}),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").write_text(card)
    for name, content in (more or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_digests(folder)


def write_digests(folder: Path) -> None:
    """Write a folder's list of digests."""
    (folder / DIGESTS).write_text(json.dumps(_file_digests(folder), indent=1, sort_keys=True) + "\n")


def _file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below but the list itself and what loading the folder leaves in it."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name.as_posix() not in (DIGESTS, _LEFT_BY_MLFLOW) and "__pycache__" not in name.parts:
            with path.open("rb") as file:
                found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def bundle_digest(folder: Path) -> str:
    """Of a folder's list of digests, and so of all of it."""
    return hashlib.sha256((folder / DIGESTS).read_bytes()).hexdigest()


def bundle_problems(folder: Path, expected: str | None) -> list[str]:
    """What is no longer as it was registered, a line each; empty when every byte is.

    Args:
        folder: a bundle, or the whole folder of a version.
        expected: the `bundle_digest` that the registry keeps; None for a version from before it kept one.
    """
    try:
        listed = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return [f"{DIGESTS} cannot be read: {' '.join(str(error).split())}"]
    found = _file_digests(folder)
    problems = [f"{name} is missing" for name in listed if name not in found]
    problems += [f"{name} has been changed" for name, digest in found.items() if listed.get(name, digest) != digest]
    problems += [f"{name} does not belong here" for name in found if name not in listed]
    if expected is not None and bundle_digest(folder) != expected:
        problems.append(f"{DIGESTS} is not the one that was registered")
    return sorted(problems)


def load_bundle(folder: Path) -> LoadedBundle:
    """The models of a bundle, or of a run's root that has both trained.

    Raises:
        InputError: there is none, or the two models do not belong together.
    """
    if (folder / DESCRIPTION).is_file():
        described = _described_by_bundle(folder)
        vq_folder, prior_folder, text_folder = folder / "vq", folder / "prior", folder / "text"
    elif (folder / "vq" / "model").is_dir() and (folder / "prior" / "model").is_dir():
        described = _described_by_root(folder)
        vq_folder, prior_folder, text_folder = (folder / name for name in ("vq/model", "prior/model", "prior/text"))
    else:
        raise InputError(
            f"no model at {folder}: neither {DESCRIPTION} nor trained vq/ and prior/ folders\n"
            "hint: name a run's root or a registered version's folder, or leave --model out for the champion"
        )
    vq, prior = load_model(vq_folder), load_model(prior_folder)
    if not isinstance(vq, HierarchicalVQ) or not isinstance(prior, HierarchicalPrior):
        raise InputError(f"{folder} does not hold a tokenizer in vq/ and a prior in prior/\nhint: export it again")
    if vq.config.grids != prior.config.grids or vq.config.codebook_sizes != prior.config.codebook_sizes:
        raise InputError(
            f"the tokenizer and the prior at {folder} have different codes\nhint: train the prior on this tokenizer"
        )
    known = [tensor for name, tensor in prior.state_dict().items() if name.endswith(".codebook")]
    if any(not _is_same(ours, theirs) for ours, theirs in zip(known, vq.codebooks, strict=False)):
        raise InputError(
            f"the prior at {folder} was trained on the codes of another tokenizer\nhint: train the prior on this one"
        )
    rows, classes = described["class_rows"], prior.config.classes
    if "class" not in prior.config.conditions:
        rows = []
    if len(rows) != len(classes):
        raise InputError(
            f"the data at {folder} has {len(rows)} classes, the prior knows {len(classes)}\n"
            "hint: train the prior on this data"
        )
    return LoadedBundle(
        vq=vq,
        prior=prior,
        classes=prior.config.classes,
        class_rows=tuple(rows),
        digest=models_digest(vq_folder, prior_folder),
        sampling=described["sampling"],
        text=load_text(text_folder, prior.config.text_encoder) if prior.config.text_dim else None,
        refine_rounds=described["refine_rounds"],
    )


def _is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-4)


def models_digest(vq: Path, prior: Path) -> str:
    """Of both models' weights."""
    digest = hashlib.sha256()
    for folder in (vq, prior):
        with (folder / "weights.safetensors").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _described_by_bundle(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / DESCRIPTION).read_text())
        sampling = SamplingSettings.model_validate(value["sampling"])
        rows = [int(rows) for rows in value["class_rows"]]
        return {"class_rows": rows, "sampling": sampling, REFINED: int(value.get(REFINED, 0))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(repr(error).split())
        raise InputError(f"{folder}/{DESCRIPTION} is damaged: {reason}\nhint: register or copy it again") from error


def _described_by_root(folder: Path) -> dict[str, Any]:
    try:
        rows = json.loads((folder / "dataset" / "manifest.json").read_text())["facts"]["class_rows"]["train"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/dataset has no readable manifest, so the classes' names are unknown\n"
            "hint: `hvqd data build` makes it"
        ) from error
    try:
        rounds = int(json.loads((folder / "codes" / "manifest.json").read_text())["facts"].get(REFINED, 0))
    except (OSError, ValueError, KeyError, TypeError):  # a copy may leave its codes behind
        rounds = 0
    return {"class_rows": rows, "sampling": None, REFINED: rounds}
