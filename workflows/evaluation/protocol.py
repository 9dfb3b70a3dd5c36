"""Evaluation protocols as files: what two figures must have in common before anybody compares them.

A protocol names the data by its digest, how many pictures are drawn and from which seeds, the sampler, its steps and
guidance, and the feature network with the digest of its weights. `digest` is that of the whole description which
evaluation/metrics.json carries; it is checked before a picture is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from hvqd_model.config import Settings
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import Manifest, read_manifest
from workflows.config import EvaluationSettings, RunConfig, SamplingSettings
from workflows.loading import explain

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_HEAD = """# How versions of a model are judged; only figures of one protocol are compared.
# `hvqd evaluate --model VERSION --protocol THIS_FILE` judges a version by it.
"""


class ExtractorPin(Settings):
    """The feature network."""

    name: str
    """What it is called."""
    weights_sha256: Digest
    """Of its weights."""


class Protocol(Settings):
    """One version of how models are judged."""

    format: Literal[1] = 1
    """Of this file."""
    name: str = Field(min_length=1)
    """For people."""
    dataset: Digest
    """Digest of the dataset, whose test split is the reference."""
    evaluation: EvaluationSettings
    """How many pictures, and from which seed."""
    sampling: SamplingSettings
    """How they are drawn."""
    extractor: ExtractorPin
    """What KID, recall and the class judge see them with."""
    digest: Digest
    """Of the whole description, which comes with every figure."""

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with this protocol's way of judging."""
        return config.model_copy(update={"evaluation": self.evaluation, "sampling": self.sampling})

    def overrides(self) -> list[str]:
        """The same as `--set` arguments."""
        parts = {"evaluation": self.evaluation, "sampling": self.sampling}
        return [f"{name}={part.model_dump_json()}" for name, part in parts.items()]

    def as_yaml(self) -> str:
        """The file's text."""
        return _HEAD + yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)

    def check_dataset(self, manifest: Manifest, url: str) -> None:
        """Raises InputError when a dataset is not the one that the protocol names."""
        if manifest.digest != self.dataset:
            raise InputError(
                f"the protocol {self.name} judges on the dataset {self.dataset[:12]}, {url} is {manifest.digest[:12]}\n"
                "hint: name a root that has the protocol's dataset"
            )

    def check_digest(self, digest: str, extractor: str) -> None:
        """Raises InputError when what would be measured here is something else.

        Args:
            digest: of the description of what would be measured.
            extractor: digest of the weights of the feature network that is here.
        """
        if extractor != self.extractor.weights_sha256:
            raise InputError(
                f"the protocol {self.name} sees with {self.extractor.name} of {self.extractor.weights_sha256[:12]}, "
                f"here are weights {extractor[:12]}\nhint: install the feature network that the protocol names"
            )
        if digest != self.digest:
            raise InputError(
                f"the protocol {self.name} is {self.digest[:12]}, this version of hvqd would measure {digest[:12]}\n"
                "hint: figures would not be comparable: use the version that the protocol was written with, or make a "
                "new protocol (`hvqd protocol`) and judge the champion by it, too"
            )


def read_protocol(path: Path) -> Protocol:
    """The protocol of a file.

    Raises:
        InputError: no such file, no YAML mapping, or a key or value that is not valid.
    """
    made = "hint: `hvqd protocol --root ROOT` writes one"
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such protocol: {path}\n{made}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the protocol {path}: {' '.join(str(error).split())}\n{made}") from error
    if not isinstance(value, dict):
        raise InputError(f"the protocol {path} must hold keys and values, not a {type(value).__name__}\n{made}")
    try:
        return Protocol.model_validate(value)
    except ValidationError as error:
        raise InputError(f"the protocol {path}: {explain(error, Protocol, made.removeprefix('hint: '))}") from error


def protocol_of(config: RunConfig, root: Store, name: str) -> Protocol:
    """The protocol by which a root's finished evaluation was made.

    Raises:
        InputError: there is no evaluation, or it was made with other settings than the configuration's.
    """
    from workflows.pipeline import state_of

    read_manifest(root.child("evaluation"), "hvqd evaluate")
    state, manifest = state_of("evaluation", config, root)
    if manifest is None:
        raise InputError(
            f"the evaluation at {root.url} is {state}: these settings would judge otherwise\n"
            "hint: `hvqd evaluate` judges by them"
        )
    described = root.child("evaluation").read_json("metrics.json")["protocol"]
    extractor = described["extractor"]
    return Protocol(
        name=re.sub(r"\s+", " ", name),
        dataset=manifest.parents["dataset"],
        evaluation=config.evaluation,
        sampling=config.sampling,
        extractor=ExtractorPin(name=extractor["name"], weights_sha256=extractor["weights_sha256"]),
        digest=manifest.facts["protocol_digest"],
    )
