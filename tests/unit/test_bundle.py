"""Bundles: what is written is loaded again, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, VQConfig, save_model
from infra.errors import InputError
from workflows.config import REFINED, SamplingSettings
from workflows.drawing.bundle import DESCRIPTION, draw_labels, load_bundle, models_digest, write_bundle
from workflows.drawing.generate import draw_images
from workflows.release.inspection import TRAINING_PACKAGES

CLASSES = ("cats", "dogs")
ROWS = (3, 1)
SAMPLING = SamplingSettings(steps=2, guidance=1.5, batch=2)


def save_models(folder: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES, codes: int = 16) -> tuple[Path, Path]:
    """The folders of a tiny tokenizer and of a prior for it."""
    torch.manual_seed(seed)
    vq = HierarchicalVQ(VQConfig(image_size=(16, 16), codebook_sizes=(codes, codes), code_dim=8, width=8))
    sizes = vq.config.codebook_sizes
    prior = HierarchicalPrior(
        PriorConfig(
            grids=vq.config.grids, codebook_sizes=sizes, code_dim=8, classes=classes, width=32, depth=1, heads=2
        ),
        vq.codebooks,
    )
    save_model(vq, folder / "vq" / "model")
    save_model(prior, folder / "prior" / "model")
    return folder / "vq" / "model", folder / "prior" / "model"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of tiny models."""
    vq, prior = save_models(tmp_path / "run")
    write_bundle(tmp_path / "bundle", vq, prior, CLASSES, ROWS, SAMPLING, {"vq": "a" * 64}, "# card\n")
    return tmp_path / "bundle"


def test_what_is_written_is_loaded_and_draws_the_same_pictures(bundle: Path, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    assert (loaded.classes, loaded.class_rows, loaded.sampling) == (CLASSES, ROWS, SAMPLING)
    assert (bundle / "README.md").read_text() == "# card\n"
    assert json.loads((bundle / DESCRIPTION).read_text())["lineage"] == {"vq": "a" * 64}
    moved = load_bundle(Path(shutil.copytree(bundle, tmp_path / "elsewhere")))
    first, second = (draw_images(one.vq, one.prior, [1, 2], [0, 1], SAMPLING) for one in (loaded, moved))
    assert np.array_equal(first, second) and moved.digest == loaded.digest


def test_a_runs_root_is_as_good_as_a_bundle(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "dataset").mkdir()
    facts = {"facts": {"class_rows": {"train": list(ROWS)}}}
    (tmp_path / "run" / "dataset" / "manifest.json").write_text(json.dumps(facts))
    root, loaded = load_bundle(tmp_path / "run"), load_bundle(bundle)
    assert (root.digest, root.classes, root.class_rows) == (loaded.digest, loaded.classes, loaded.class_rows)
    assert root.sampling is None, "a root recommends nothing; its configuration says how to sample"


def test_a_bundle_is_read_without_what_only_training_needs() -> None:
    read = "import sys, workflows.drawing.bundle, workflows.drawing.generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & set(TRAINING_PACKAGES)


def test_how_the_codes_were_made_is_known_of_a_bundle_and_of_a_root(bundle: Path, tmp_path: Path) -> None:
    assert load_bundle(bundle).refine_rounds == 0, "bundles of before do not say"
    described = json.loads((bundle / DESCRIPTION).read_text()) | {REFINED: 2}
    (bundle / DESCRIPTION).write_text(json.dumps(described))
    assert load_bundle(bundle).refine_rounds == 2
    for kind, facts in (("dataset", {"class_rows": {"train": list(ROWS)}}), ("codes", {REFINED: 1})):
        (tmp_path / "run" / kind).mkdir()
        (tmp_path / "run" / kind / "manifest.json").write_text(json.dumps({"facts": facts}))
    assert load_bundle(tmp_path / "run").refine_rounds == 1


def test_the_digest_is_that_of_both_weights(tmp_path: Path) -> None:
    vq, prior = save_models(tmp_path / "one")
    other_vq, other_prior = save_models(tmp_path / "two", seed=1)
    again = save_models(tmp_path / "three")
    digests = [models_digest(a, b) for a, b in ((vq, prior), (other_vq, prior), (vq, other_prior))]
    assert len(set(digests)) == 3 and models_digest(*again) == digests[0]


# ---- labels ----


def test_labels_come_as_often_as_in_the_data_and_from_the_seed_alone() -> None:
    rows = (600, 0, 300, 100, 0)
    seeds = list(range(4_000))
    labels = draw_labels(seeds, rows)
    counts = np.bincount(labels, minlength=5) / len(seeds)
    assert counts == pytest.approx([0.6, 0, 0.3, 0.1, 0], abs=0.03)
    assert counts[1] == counts[4] == 0
    assert draw_labels(seeds[::-1], rows) == labels[::-1] and draw_labels(seeds[7:8], rows) == labels[7:8]


def test_a_model_without_classes_is_asked_for_none() -> None:
    assert draw_labels([1, 2, 3], ()) == [-1, -1, -1]


# ---- what is refused ----


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    message = "no model at .*: neither bundle.json nor trained vq/ and prior/ folders\nhint: name a run's root"
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=message):
            load_bundle(folder)
    save_models(tmp_path)
    shutil.rmtree(tmp_path / "prior")
    with pytest.raises(InputError, match=message):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"class_rows": [1, 2]}',
        '{"class_rows": 3, "sampling": {}}',
        '{"class_rows": [3, 1], "sampling": {"stepz": 1}}',
    ],
)
def test_a_damaged_description_is_refused(content: str, bundle: Path) -> None:
    (bundle / DESCRIPTION).write_text(content)
    with pytest.raises(InputError, match=r"bundle/bundle\.json is damaged: [^\n]+\nhint: register or copy it again"):
        load_bundle(bundle)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"facts": {}}', '{"facts": {"class_rows": 1}}'])
def test_a_root_whose_dataset_is_unknown_is_refused(content: str | None, tmp_path: Path) -> None:
    save_models(tmp_path)
    (tmp_path / "dataset").mkdir()
    if content is not None:
        (tmp_path / "dataset" / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"dataset has no readable manifest, so .* unknown\nhint: `hvqd data build`"):
        load_bundle(tmp_path)


def test_models_in_the_wrong_places_are_refused(bundle: Path) -> None:
    (bundle / "vq").rename(bundle / "x")
    (bundle / "prior").rename(bundle / "vq")
    (bundle / "x").rename(bundle / "prior")
    with pytest.raises(InputError, match="does not hold a tokenizer in vq/ and a prior in prior/\nhint: export it"):
        load_bundle(bundle)


def test_a_prior_of_another_tokenizer_is_refused(bundle: Path, tmp_path: Path) -> None:
    _, other = save_models(tmp_path / "other", codes=32)
    shutil.copytree(other, bundle / "prior", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"the tokenizer and the prior at .* have different codes\nhint: train the"):
        load_bundle(bundle)


def test_a_prior_of_other_classes_is_refused(bundle: Path, tmp_path: Path) -> None:
    _, other = save_models(tmp_path / "other", classes=("a", "b", "c"))
    shutil.copytree(other, bundle / "prior", dirs_exist_ok=True)
    with pytest.raises(InputError, match="has 2 classes, the prior knows 3\nhint: train the prior on this data"):
        load_bundle(bundle)


def test_damaged_weights_are_refused(bundle: Path) -> None:
    (bundle / "vq" / "weights.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"the model at .*vq cannot be read: .*\nhint: export or copy it again"):
        load_bundle(bundle)
