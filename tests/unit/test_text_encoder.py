"""Captions as vectors: what the published model gives, and each caption on its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infra.errors import InputError
from workflows.data.text_encoder import FILES, TextEncoder, encoder_digest, encoder_folder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """The installed encoder."""
    return TextEncoder(encoder_folder(None))


def test_similarities_are_those_of_the_sentence_transformers_documentation(encoder: TextEncoder) -> None:
    """sbert.net, "Sentence Transformer", quickstart: all-MiniLM-L6-v2 on these three sentences."""
    vectors = encoder(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=2e-4)


def test_a_caption_has_the_same_vector_alone_and_among_others(encoder: TextEncoder) -> None:
    captions = ["red apple", "a very long caption " * 20, "", "flag: Germany", "puppy"] * 9
    seen: list[tuple[int, int]] = []
    together = encoder(captions, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (45, 45)
    for place in (0, 1, 3, 4):
        assert np.array_equal(encoder([captions[place]])[0], together[place])
    assert np.array_equal(encoder(captions[::-1])[::-1], together)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 0, 1, 1] * 9, atol=1e-6)


def test_the_digest_is_that_of_all_it_depends_on(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(name.encode())
    before = encoder_digest(tmp_path)
    digests = {before}
    for name in FILES:
        (tmp_path / name).write_bytes(b"another one")
        digests.add(encoder_digest(tmp_path))
    assert len(digests) == 4


def test_another_folder_can_be_named_and_a_wrong_one_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(encoder_folder(None), folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.5.output.LayerNorm.bias"] = weights["encoder.layer.5.output.LayerNorm.bias"] + 1
    save_file(weights, folder / "model.safetensors")
    other = TextEncoder(encoder_folder(str(folder)))
    assert other.digest != encoder.digest
    assert not np.allclose(other(["puppy"]), encoder(["puppy"]))

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            TextEncoder(encoder_folder(str(folder)))(["puppy"])

    del weights["encoder.layer.3.output.dense.weight"]
    save_file(weights, folder / "model.safetensors")
    refused(r"has no weights 'encoder\.layer\.3\.output\.dense\.weight'\nhint: name the folder of a BERT")
    (folder / "tokenizer.json").write_text("{")
    refused(r"the tokenizer at .* cannot be read: .*\nhint: copy it again")
    (folder / "model.safetensors").write_bytes(b"x")
    refused(r"the text encoder at .* cannot be read: .*\nhint: copy it again")
    shutil.copy(encoder_folder(None) / "model.safetensors", folder)
    shutil.copy(encoder_folder(None) / "tokenizer.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    refused(r"must be of model_type bert: t5\nhint: name a BERT sentence encoder")
    (folder / "config.json").unlink()
    refused(r"no text encoder at .*: config\.json is missing\nhint: name a local folder with config\.json, ")
