"""Models as folders: there and back to the bit, and what is said of a folder that holds no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, VQConfig, load_model, save_model
from hvqd_model.export import CONFIG, WEIGHTS, Model

VQ = VQConfig(strides=(8, 4), codebook_sizes=(5, 6), code_dim=4, width=8, width_multipliers=(1, 2), image_size=(16, 8))
PRIOR = PriorConfig(
    grids=VQ.grids, codebook_sizes=(5, 6), code_dim=4, classes=("Zebra", "Äpfel"), width=16, depth=1, heads=2
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokenizer(seed: int = 0) -> HierarchicalVQ:
    torch.manual_seed(seed)
    model = HierarchicalVQ(VQ)
    for level in range(2):
        model.start_codebook(level, normal(20, 4, seed=level), seed)
    return model


def prior(seed: int = 0) -> HierarchicalPrior:
    torch.manual_seed(seed)
    return HierarchicalPrior(PRIOR, [normal(5, 4), normal(6, 4, seed=1)])


MAKERS: list[Callable[[], Model]] = [tokenizer, prior]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("make", MAKERS)
def test_a_saved_model_comes_back_to_the_bit_in_evaluation_mode(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make().train()
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert type(loaded) is type(model) and loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    assert not any(module.training for module in loaded.modules())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]


def test_a_loaded_tokenizer_gives_the_same_codes_and_pictures(tmp_path: Path) -> None:
    model, images = tokenizer().eval(), normal(3, 3, 16, 8).clamp(-1, 1)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, HierarchicalVQ)
    codes = model.encode(images)
    for found, expected in zip(loaded.encode(images), codes, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(loaded.decode(codes), model.decode(codes))


def test_a_loaded_prior_gives_the_same_samples(tmp_path: Path) -> None:
    model, seeds = prior().eval(), torch.arange(3)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, HierarchicalPrior)
    labels = torch.tensor([0, 1, -1])
    for found, expected in zip(loaded.sample(seeds, labels), model.sample(seeds, labels), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("make", MAKERS)
def test_equal_models_give_equal_bytes_and_other_models_others(make: Callable[..., Model], tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path / "one")
    save_model(make(), tmp_path / "two")
    save_model(load_model(tmp_path / "one"), tmp_path / "copy of a copy")
    save_model(model, tmp_path / "other order", dict(reversed(model.state_dict().items())))
    save_model(make(1), tmp_path / "another")
    for name in (WEIGHTS, CONFIG):
        first = (tmp_path / "one" / name).read_bytes()
        for folder in ("two", "copy of a copy", "other order"):
            assert (tmp_path / folder / name).read_bytes() == first, f"{folder}/{name}"
    assert (tmp_path / "another" / CONFIG).read_bytes() == (tmp_path / "one" / CONFIG).read_bytes()
    assert (tmp_path / "another" / WEIGHTS).read_bytes() != (tmp_path / "one" / WEIGHTS).read_bytes()


def test_a_given_state_is_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    model, average = prior(), prior(1).state_dict()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path, average)
    assert_same(load_model(tmp_path).state_dict(), average)
    assert_same(model.state_dict(), own)


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    save_model(tokenizer(), tmp_path)
    save_model(prior(), tmp_path)
    assert_same(load_model(tmp_path).state_dict(), prior().state_dict())


@pytest.mark.parametrize("make", MAKERS)
def test_loading_draws_from_no_global_generator(make: Callable[[], Model], tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_configuration_is_readable_json(tmp_path: Path) -> None:
    save_model(prior(), tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    assert described["kind"] == "HierarchicalPrior"
    assert described["config"]["grids"] == [[2, 1], [4, 2]]
    assert PriorConfig.model_validate(described["config"]) == PRIOR
    assert set(load_file(tmp_path / WEIGHTS)) == set(prior().state_dict())


# What is no model


def rewrite(folder: Path, **changes: object) -> None:
    described = json.loads((folder / CONFIG).read_text())
    described["config"].update(changes)
    (folder / CONFIG).write_text(json.dumps(described))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.stem.bias"]
    save_file(weights, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


MISSING = r"\nhint: a model is a folder with weights\.safetensors and config\.json$"
DAMAGED = r"\nhint: export or copy it again$"
FOREIGN = r" \(HierarchicalVQ, HierarchicalPrior\)\nhint: point at a folder that save_model wrote$"
INVALID = r"\nhint: export the model again$"
UNFIT = r"\nhint: export or copy the model again$"

WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, rf"^no model at \S+: config\.json is missing{MISSING}"),
    "no configuration": (
        lambda folder: (folder / CONFIG).unlink(),
        rf"^no model at \S+: config\.json is missing{MISSING}",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        rf"^no model at \S+: weights\.safetensors is missing{MISSING}",
    ),
    "weights are a folder": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        rf"^the model at \S+ cannot be read: .+{DAMAGED}",
    ),
    "empty weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        rf"^the model at \S+ cannot be read: .*header.*{DAMAGED}",
    ),
    "foreign weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"PK\x03\x04" * 100),
        rf"^the model at \S+ cannot be read: .*header.*{DAMAGED}",
    ),
    "half the weights": (truncate, rf"^the model at \S+ cannot be read: .*incomplete.*{DAMAGED}"),
    "half the configuration": (
        lambda folder: (folder / CONFIG).write_text('{"kind": '),
        rf"^the model at \S+ cannot be read: Expecting value: line 1 column 10 .*{DAMAGED}",
    ),
    "no text": (
        lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"),
        rf"^the model at \S+ cannot be read: 'utf-8' codec can't decode.*{DAMAGED}",
    ),
    "a list": (
        lambda folder: (folder / CONFIG).write_text("[]"),
        rf"^\S+config\.json describes no model of ours: kind=None{FOREIGN}",
    ),
    "another library's": (
        lambda folder: (folder / CONFIG).write_text('{"model_type": "bert"}'),
        rf"^\S+config\.json describes no model of ours: kind=None{FOREIGN}",
    ),
    "another kind": (
        lambda folder: (folder / CONFIG).write_text('{"kind": "VQGAN", "config": {}}'),
        rf"^\S+config\.json describes no model of ours: kind=VQGAN{FOREIGN}",
    ),
    "a kind that is no name": (
        lambda folder: (folder / CONFIG).write_text('{"kind": []}'),
        rf"^\S+config\.json describes no model of ours: kind=\[\]{FOREIGN}",
    ),
    "no settings": (
        lambda folder: (folder / CONFIG).write_text('{"kind": "HierarchicalVQ"}'),
        rf"^\S+config\.json is not valid: config: Input should be a valid dictionary.*{INVALID}",
    ),
    "settings that are refused": (
        lambda folder: rewrite(folder, strides=[8, 3]),
        rf"^\S+config\.json is not valid: config: .*each of strides must be a multiple of the next: \[8, 3\]{INVALID}",
    ),
    "settings of another version": (
        lambda folder: rewrite(folder, width="wide", colour="red"),
        rf"^\S+config\.json is not valid: config\.width: .*integer.*; config\.colour: Extra inputs.*{INVALID}",
    ),
    "another model's settings": (
        lambda folder: rewrite(folder, code_dim=5),
        rf"^the weights at \S+ do not fit their configuration: .*size mismatch for decoder\.joins.*{UNFIT}",
    ),
    "a weight too few": (
        drop_a_weight,
        rf"^the weights at \S+ do not fit their configuration: .*Missing key.*\"encoder\.stem\.bias\".*{UNFIT}",
    ),
    "another model's weights": (
        lambda folder: shutil.copy(folder.parent / "prior" / WEIGHTS, folder),
        rf"^the weights at \S+ do not fit their configuration: .*Missing key.*Unexpected key.*{UNFIT}",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_without_a_good_model_is_named_in_two_lines(case: str, tmp_path: Path) -> None:
    save_model(tokenizer(), tmp_path / "model")
    save_model(prior(), tmp_path / "prior")
    spoil, message = WRONG[case]
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_a_file_in_place_of_the_folder_is_no_model(tmp_path: Path) -> None:
    save_model(tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=rf"^no model at \S+weights\.safetensors: config\.json is missing{MISSING}"):
        load_model(tmp_path / WEIGHTS)
