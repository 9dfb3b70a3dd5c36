"""A look at a version's files: a byte that changed, a foreign tokenizer, a card without lineage are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.test_bundle import CLASSES, ROWS, SAMPLING, save_models
from workflows.drawing.bundle import DESCRIPTION, DIGESTS, bundle_digest, write_bundle, write_digests
from workflows.release.environment_lock import locked
from workflows.release.inspection import LINEAGE, draw_alone, integrity_problem, licence_problem, lineage_problem
from workflows.release.registry import BUNDLE_PATH, BUNDLE_TAG, FILES_TAG

DIGEST_OF = {kind: f"{index}" * 64 for index, kind in enumerate(LINEAGE)}
CARD = "# card\n" + "\n".join(f"- {kind}: `{digest}`" for kind, digest in DIGEST_OF.items())
TAGS = {f"hvqd.digest.{kind}": digest for kind, digest in DIGEST_OF.items()}
MORE = {"evaluation.json": b"{}", "requirements.lock": b"torch==1\n", "samples.png": b"png", "DATA_LICENCES.md": b"MIT"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    vq, prior = save_models(folder / "run")
    write_bundle(folder / "model" / BUNDLE_PATH, vq, prior, CLASSES, ROWS, SAMPLING, DIGEST_OF, CARD, MORE)
    (folder / "model" / "code" / "workflows").mkdir(parents=True)
    (folder / "model" / "code" / "workflows" / "bundle.py").write_text("x = 1\n")
    (folder / "model" / "MLmodel").write_text("flavors: {}\n")
    write_digests(folder / "model")
    return folder / "model"


@pytest.fixture
def version(made: Path, tmp_path: Path) -> Path:
    """A version's folder: the bundle, the code that draws with it, and MLflow's own file."""
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def bundle(version: Path) -> Path:
    return version / BUNDLE_PATH


def kept(version: Path) -> dict[str, str]:
    """What the registry keeps of it."""
    return {BUNDLE_TAG: bundle_digest(version / BUNDLE_PATH), FILES_TAG: bundle_digest(version)}


def test_a_changed_byte_in_any_file_is_named(version: Path) -> None:
    tags = kept(version)
    assert integrity_problem(version, tags) is None
    files = sorted(path for path in version.rglob("*") if path.is_file())
    assert len(files) == 14
    for path in files:
        name, content = path.relative_to(version).as_posix().removeprefix(f"{BUNDLE_PATH}/"), path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            problem = integrity_problem(version, tags)
            assert problem is not None and name in problem, f"byte {place} of {name}: {problem}"
        path.unlink()
        assert name in str(integrity_problem(version, tags)), f"{name} is gone"
        path.write_bytes(content)
    for place, name in ((version / BUNDLE_PATH, "extra.pkl"), (version, "code/sitecustomize.py")):
        (place / name).write_bytes(b"x")
        assert integrity_problem(version, tags) == f"{name} does not belong here"
        (place / name).unlink()


def test_what_loading_leaves_in_a_folder_on_this_machine_is_no_change(version: Path) -> None:
    tags = kept(version)
    (version / "registered_model_meta").write_text("model_name: hvqd\n")
    (version / "code" / "workflows" / "__pycache__").mkdir()
    (version / "code" / "workflows" / "__pycache__" / "bundle.cpython-311.pyc").write_bytes(b"x")
    assert integrity_problem(version, tags) is None


def test_digests_that_were_rewritten_along_with_a_file_are_not_the_registered_ones(version: Path, bundle: Path) -> None:
    tags = kept(version)
    (bundle / "README.md").write_text("another card")
    listed = json.loads((bundle / DIGESTS).read_text())
    import hashlib

    listed["README.md"] = hashlib.sha256(b"another card").hexdigest()
    (bundle / DIGESTS).write_text(json.dumps(listed))
    write_digests(version)
    assert integrity_problem(version, tags) == "; ".join([f"{DIGESTS} is not the one that was registered"] * 2)


def test_a_prior_of_another_tokenizer_is_named(tmp_path: Path) -> None:
    """Of the same shape: only its codebooks tell."""
    import torch
    from safetensors.torch import load_file, save_file

    vq, prior = save_models(tmp_path / "run")
    weights = load_file(prior / "weights.safetensors")
    name = next(name for name in weights if name.endswith(".codebook"))
    weights[name] = torch.randn(weights[name].shape)
    save_file(weights, prior / "weights.safetensors")
    write_bundle(tmp_path / BUNDLE_PATH, vq, prior, CLASSES, ROWS, SAMPLING, DIGEST_OF, CARD)
    problem = integrity_problem(tmp_path, {})
    assert problem is not None and "was trained on the codes of another tokenizer" in problem


def test_lineage_must_be_told_alike_by_registry_bundle_and_card(bundle: Path) -> None:
    assert lineage_problem(bundle, TAGS, CARD) is None
    without = {tag: text for tag, text in TAGS.items() if not tag.endswith(("codes", "prior"))}
    assert lineage_problem(bundle, without, CARD) == "the registry does not name its codes, prior"
    other = {**TAGS, "hvqd.digest.vq": "f" * 64}
    assert lineage_problem(bundle, other, CARD) == f"{DESCRIPTION} names another vq: {DIGEST_OF['vq']}"
    assert (
        lineage_problem(bundle, TAGS, "") == "the registry's card has no lineage: the dataset 000000000000 is missing"
    )
    (bundle / "README.md").write_text("# card\n")
    assert "README.md has no lineage: the dataset 000000000000" in str(lineage_problem(bundle, TAGS, CARD))
    (bundle / DESCRIPTION).write_text("{")
    assert str(lineage_problem(bundle, TAGS, CARD)).startswith("the bundle does not say: JSONDecodeError")


def test_licences_must_be_stated_and_allowed() -> None:
    tags = {"hvqd.licences": '["MIT", "CC-BY-4.0"]'}
    assert licence_problem(tags, ("MIT", "CC-BY-4.0", "Apache-2.0")) is None
    assert licence_problem(tags, ("MIT",)) == "not allowed: CC-BY-4.0 (allowed are MIT)"
    for nothing in ({}, {"hvqd.licences": "[]"}):
        assert licence_problem(nothing, ("MIT",)) == "the source of the training pictures states no licence"


def test_a_folder_that_does_not_load_is_named(tmp_path: Path) -> None:
    problem, found = draw_alone(tmp_path)
    assert (
        problem is not None and problem.startswith("it does not load and draw by itself (status 1): ") and found == {}
    )
    assert "MLmodel" in problem


def test_the_lock_names_exact_versions_of_everything_that_is_needed_and_no_training_package() -> None:
    lock = locked()
    names = {line.partition("==")[0] for line in lock}
    assert all(line.partition("==")[2] for line in lock) and len(names) == len(lock)
    assert {"torch", "mlflow", "safetensors", "typing-extensions", "sympy", "pydantic-core"} <= names
    assert not names & {"ray", "deepspeed", "s3fs", "typer", "efficientnet-lite-pytorch"}
    assert locked(["pydantic"]) == [line for line in lock if line.partition("==")[0] in {
        "annotated-types", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection"
    }]  # fmt: skip
