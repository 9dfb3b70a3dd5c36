"""What a prior cannot work with is named before anything is computed: codes and tokenizers that do not belong together,
weights that are no numbers, and settings out of range."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvqd_model import HierarchicalPrior, save_model
from infra.errors import InputError
from infra.storage import Store, open_store
from tests.unit.test_drawing import SAMPLING, save
from tests.unit.test_generate import models
from workflows.artifacts import Manifest, write_manifest
from workflows.context import Context
from workflows.drawing.bundle import load_bundle, write_bundle
from workflows.evaluation.evaluate import evaluate
from workflows.loading import load_config
from workflows.training.launch import train_prior


def put(root: Store, kind: str, content: str, **parents: Manifest | str) -> Manifest:
    """An artifact of one file."""
    store = root.child(kind)
    store.write_bytes("content", content.encode())
    digests = {name: found if isinstance(found, str) else found.digest for name, found in parents.items()}
    return write_manifest(store, kind, kind, digests)


@pytest.mark.parametrize(("command", "work"), [("train prior", train_prior), ("evaluate", evaluate)])
def test_codes_of_another_tokenizer_are_refused(command: str, work: Callable[[Context], Any], tmp_path: Path) -> None:
    """As when a tokenizer has been trained anew and `hvqd encode` has been forgotten."""
    root = open_store(str(tmp_path))
    dataset = put(root, "dataset", "pictures")
    earlier = put(root, "vq", "an earlier tokenizer", dataset=dataset)
    codes = put(root, "codes", "its codes", dataset=dataset, vq=earlier)
    if command == "evaluate":
        put(root, "prior", "their prior", codes=codes)
    later = put(root, "vq", "another tokenizer", dataset=dataset)
    expected = (
        rf"^codes/ was made from another vq/ \({earlier.digest[:12]}\) than the one that is there "
        rf"\({later.digest[:12]}\)\nhint: run `hvqd encode` again$"
    )
    with pytest.raises(InputError, match=expected):
        work(Context(load_config("integration"), root))
    assert not root.child("prior").exists("lease"), "no training has begun"


def test_a_prior_of_earlier_codes_is_not_judged(tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    dataset = put(root, "dataset", "pictures")
    vq = put(root, "vq", "a tokenizer", dataset=dataset)
    put(root, "codes", "codes", dataset=dataset, vq=vq)
    put(root, "prior", "a prior", codes="0" * 64)
    with pytest.raises(InputError, match=r"^prior/ was made from another codes/ \(000000000000\) .*\nhint: run `hvqd "):
        evaluate(Context(load_config("integration"), root))


def test_a_prior_of_another_tokenizer_draws_nothing(tmp_path: Path) -> None:
    vq, prior = models()
    others = [codebook + 1 for codebook in vq.codebooks]
    stranger = HierarchicalPrior(prior.config, others)
    save_model(vq, tmp_path / "made" / "vq")
    save_model(stranger, tmp_path / "made" / "prior")
    folders = (tmp_path / "made" / "vq", tmp_path / "made" / "prior")
    rows = (1,) * len(prior.config.classes)
    write_bundle(tmp_path / "bundle", *folders, prior.config.classes, rows, SAMPLING, {}, "# card\n")
    with pytest.raises(InputError, match=r"was trained on the codes of another tokenizer\nhint: train the prior on"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("model", ["vq", "prior"])
def test_a_bundle_with_weights_that_are_no_numbers_draws_nothing(model: str, tmp_path: Path) -> None:
    weights = save(tmp_path) / model / "weights.safetensors"
    found = load_file(weights)
    name = next(name for name, value in found.items() if value.ndim == 2 and "codebook" not in name)
    found[name][0, 0] = torch.nan
    save_file(found, weights)
    with pytest.raises(ValueError, match=rf"are not all finite: {name}\nhint: the training went wrong"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling.steps=0", r"sampling\.steps.*greater than or equal to 1"),
        ("sampling.guidance=-1", r"sampling\.guidance.*greater than or equal to 0"),
        ("sampling.guidance={colour: 2}", r"sampling\.guidance.*colour"),
        ("sampling.sampler=euler", r"sampling\.sampler.*confidence.*ancestral.*purity"),
        ("sampling.temperature=0", r"sampling\.temperature.*greater than 0"),
        ("prior.model.uniform_share=1.5", r"prior\.model\.uniform_share.*less than or equal to 1"),
        ("prior.model.stagger=2", r"prior\.model\.stagger.*less than or equal to 1"),
        ("prior.model.noise=mask-and-replace", "loss=simplified is the bound of absorbing noise only"),
        ("prior.model.conditions=[colour]", r"prior\.model\.conditions.*class.*style.*text.*map"),
    ],
)
def test_settings_out_of_range_are_named_with_what_is_allowed(setting: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        load_config("tiny", overrides=[setting])
    assert re.search(message, " ".join(str(refused.value).split())), str(refused.value)
    assert "\nhint: " in str(refused.value)
