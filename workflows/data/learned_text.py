"""The encoder of captions and the captions that a prior has learned, in one folder beside its weights.

A model that is told captions carries both, so that it can be used where neither the encoder is installed nor the data
at hand.

Axes: U captions of E dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import InputError
from workflows.data.text_encoder import FILES, TextEncoder, encoder_digest, encoder_folder

CAPTIONS = "captions.npz"
_MOST_CAPTIONS = 20_000


@dataclass(frozen=True)
class LearnedText:
    """What a prior knows of captions."""

    encoder: TextEncoder
    captions: tuple[str, ...]
    """Distinct training captions, evenly chosen where there are very many; empty where they were not kept."""
    embeddings: NDArray[np.float16]
    """(U, E)"""


def write_text(folder: Path, encoder: Path, captions: tuple[str, ...], embeddings: NDArray[Any]) -> None:
    """Lay both out in a local folder.

    Args:
        encoder: folder of the encoder.
        captions: U distinct captions.
        embeddings: (U, E).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes((encoder / name).read_bytes())
    worded = [place for place, text in enumerate(captions) if text.strip()]
    chosen = worded[:: -(-len(worded) // _MOST_CAPTIONS)] if worded else []
    np.savez(
        folder / CAPTIONS,
        captions=np.array([captions[place] for place in chosen], dtype=np.str_),
        embeddings=np.asarray(embeddings)[chosen].astype(np.float16),
    )


def load_text(folder: Path, digest: str) -> LearnedText:
    """What lies in a folder; where there is none, the installed encoder without captions.

    Args:
        digest: of the encoder that the prior was trained with.

    Raises:
        InputError: the encoder is another one, or a file is damaged.
    """
    place = folder if folder.is_dir() else encoder_folder(None)
    found = encoder_digest(place)
    if found != digest:
        raise InputError(
            f"the text encoder at {place} is not the one that the prior was trained with: {found[:12]}, not "
            f"{digest[:12]}\nhint: register the model again, or name its run's root"
        )
    captions: tuple[str, ...] = ()
    embeddings = np.zeros((0, 0), dtype=np.float16)
    if (folder / CAPTIONS).is_file():
        try:
            with np.load(folder / CAPTIONS, allow_pickle=False) as kept:
                captions, embeddings = tuple(kept["captions"].tolist()), kept["embeddings"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / CAPTIONS} is damaged: {error}\nhint: register or copy it again") from error
    return LearnedText(TextEncoder(place), captions, embeddings)
