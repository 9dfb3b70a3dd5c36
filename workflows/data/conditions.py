"""What a prior is told about the pictures it learns: styles, captions and label maps, beside the codes' classes.

Codes carry classes and styles; captions and maps come from the dataset that the codes were made from, row for row.
Every distinct caption is embedded once a machine: the vectors lie in the cache, under the digest of the encoder.

Axes: N rows, U distinct captions of E dimensions, H x W pixels.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hvqd_model.config import ConditionName, VQConfig
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import Manifest
from workflows.data.batches import Array, CodeTable, cached_entry, decoded_split
from workflows.data.columns import ConditionColumns
from workflows.data.label_maps import fitted_map


@dataclass(frozen=True)
class Captions:
    """The distinct captions of some rows, and their vectors."""

    texts: tuple[str, ...]
    """U, sorted."""
    rows: Array
    """(N,) int64, the caption of each row."""
    embeddings: Array
    """(U, E) float32."""


@dataclass(frozen=True)
class ConditionSource:
    """Where a root's conditions come from."""

    dataset_store: Store
    dataset: Manifest
    vq: VQConfig
    names: tuple[ConditionName, ...]
    """What the prior is told."""
    text_encoder: str | None
    """Folder of the encoder of captions; None for the installed one."""
    device: str = "cpu"

    def columns(self, split: str, codes: CodeTable) -> ConditionColumns | None:
        """What the rows of a split's codes are beside their class; None when the prior is told classes alone.

        Raises:
            InputError: the codes are not this dataset's.
        """
        if not set(self.names) - {"class"}:
            return None
        styles, captions, maps = None, None, None
        if "style" in self.names:
            numbers = {name: number for number, name in enumerate(self.dataset.facts["styles"])}
            styles = np.array([numbers.get(str(style), -1) for style in codes.styles], dtype=np.int64)
        if "text" in self.names or "map" in self.names:
            rows, found = self._rows(split)
            if rows["id"].to_pylist() != codes.ids.tolist():
                raise InputError(
                    f"the rows of codes/{split} are not those of dataset/{split}\n"
                    "hint: delete the codes' manifest.json and run `hvqd encode` again"
                )
            if "text" in self.names:
                captions = self._embedded([text or "" for text in rows["caption"].to_pylist()])
            maps = found[0] if "map" in self.names else None
        if captions is None:
            return ConditionColumns(styles, None, None, maps)
        return ConditionColumns(styles, captions.rows, captions.embeddings, maps)

    def captions(self, split: str) -> Captions:
        """The captions of a split."""
        rows, _ = self._rows(split)
        return self._embedded([text or "" for text in rows["caption"].to_pylist()])

    def keep_text(self, store: Store) -> None:
        """Put the encoder, and the captions that training saw, beside the prior that was told them."""
        from workflows.data.learned_text import write_text
        from workflows.data.text_encoder import encoder_folder

        learned = self.captions("train")
        with tempfile.TemporaryDirectory(prefix="hvqd-text-") as scratch:
            write_text(Path(scratch), encoder_folder(self.text_encoder), learned.texts, learned.embeddings)
            store.upload_folder(Path(scratch))

    def described(self, train: ConditionColumns | None) -> dict[str, Any]:
        """The fields of a PriorConfig that say what the prior is told.

        Args:
            train: the training split's columns.

        Raises:
            InputError: the data has none of a condition that the prior shall be told.
        """
        fields: dict[str, Any] = {}
        if "class" in self.names:
            fields["classes"] = tuple(self.dataset.facts["classes"])
        if "style" in self.names:
            fields["styles"] = self._some("style", tuple(self.dataset.facts["styles"]))
        if "text" in self.names:
            assert train is not None and train.embeddings is not None
            self._some("text", train.embeddings.any())
            fields |= {"text_dim": train.embeddings.shape[1], "text_encoder": self._encoder_digest()}
        if "map" in self.names:
            assert train is not None and train.maps is not None
            largest = max((int(part.max()) for part in np.array_split(train.maps, 64) if part.size), default=-1)
            fields |= {"map_labels": self._some("map", largest + 1), "map_size": self.vq.padded_size}
        return fields

    def _some(self, name: str, found: Any) -> Any:
        if not found:
            what = {"style": "a style", "text": "a caption", "map": "a label map"}[name]
            raise InputError(
                f"prior.model.conditions names {name}, but no training picture has {what}: {list(self.names)}\n"
                "hint: leave it out, or give the pictures one (parquet columns style, caption, seg) and run "
                "`hvqd data build`"
            )
        return found

    def _rows(self, split: str) -> tuple[pa.Table, list[Array]]:
        """The split's describing columns and, where the prior is told them, its label maps."""
        if "map" not in self.names:

            def nothing(arrays: Sequence[Array], table: pa.Table, first: int) -> None:
                return None

            return self._decoded(split, [], nothing, "captions")
        height, width = self.vq.padded_size

        def fill(arrays: Sequence[Array], table: pa.Table, first: int) -> None:
            for row, encoded in enumerate(table["seg"], first):
                arrays[0][row] = fitted_map(encoded.as_py(), (height, width))

        return self._decoded(split, [((height, width), np.dtype(np.int16))], fill, f"maps {height} x {width}")

    def _decoded(
        self,
        split: str,
        shapes: list[tuple[tuple[int, ...], np.dtype[Any]]],
        fill: Callable[[Sequence[Array], pa.Table, int], None],
        variant: str,
    ) -> tuple[pa.Table, list[Array]]:
        return decoded_split(self.dataset_store, self.dataset, split, shapes, fill, with_captions=True, variant=variant)

    def _embedded(self, captions: list[str]) -> Captions:
        texts, rows = np.unique(np.array(captions, dtype=np.str_), return_inverse=True)
        key = hashlib.sha256("\n".join([self._encoder_digest(), *texts]).encode()).hexdigest()

        def make(folder: Path) -> None:
            from workflows.data.text_encoder import TextEncoder, encoder_folder

            encoder = TextEncoder(encoder_folder(self.text_encoder), self.device)
            np.save(folder / "embeddings.npy", encoder(texts.tolist()))

        folder = cached_entry(key, make)
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        return Captions(tuple(texts.tolist()), rows.astype(np.int64), embeddings)

    def _encoder_digest(self) -> str:
        from workflows.data.text_encoder import encoder_digest, encoder_folder

        return encoder_digest(encoder_folder(self.text_encoder))
