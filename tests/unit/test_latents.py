"""Latents beside the codes: what is kept, and the statistics over the training split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.errors import InputError
from infra.storage import open_store
from workflows.artifacts import Manifest
from workflows.data.latents import FACT, gathered_statistics, latent_columns, read_latents, statistics_of, write_sums
from workflows.loading import load_config
from workflows.requests import request_of

GRIDS = ((1, 2), (2, 3))
CHANNELS = (3, 2)


def some_latents(rows: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [
        (5 * level + generator.normal(size=(rows, *grid, channels))).astype(np.float32)
        for level, (grid, channels) in enumerate(zip(GRIDS, CHANNELS, strict=True))
    ]


def test_latents_come_back_from_their_columns_in_half_precision() -> None:
    latents = some_latents(4, 0)
    table = pa.table(latent_columns(latents))
    assert table.column_names == ["latents_0", "latents_1"]
    for level, found in enumerate(latents):
        read = read_latents(table, level, found.shape[1:])
        assert read.dtype == np.float16 and np.array_equal(read, found.astype(np.float16))


def test_statistics_are_those_of_all_training_shards_together(tmp_path: Path) -> None:
    notes = open_store(str(tmp_path))
    shards = {f"train-{number:05d}.parquet": some_latents(rows, number) for number, rows in enumerate((4, 7, 1))}
    for name, latents in shards.items():
        write_sums(notes, name, pa.table(latent_columns(latents)), CHANNELS)
    write_sums(notes, "val-00000.parquet", pa.table(latent_columns([9 + z for z in some_latents(3, 9)])), CHANNELS)
    found = gathered_statistics(notes, list(shards), 2)
    for level, channels in enumerate(CHANNELS):
        kept = [z[level].astype(np.float16).astype(np.float64).reshape(-1, channels) for z in shards.values()]
        together = np.concatenate(kept)
        np.testing.assert_allclose(found[level]["mean"], together.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found[level]["deviation"], together.std(0), rtol=1e-9)


def test_a_channel_that_never_moves_is_left_at_its_scale(tmp_path: Path) -> None:
    notes = open_store(str(tmp_path))
    latents = some_latents(5, 0)
    latents[1][..., 1] = 0.5
    write_sums(notes, "train-00000.parquet", pa.table(latent_columns(latents)), CHANNELS)
    deviation = gathered_statistics(notes, ["train-00000.parquet"], 2)[1]["deviation"]
    assert deviation[1] == 1.0 and deviation[0] != 1.0


def test_codes_without_latents_are_refused() -> None:
    manifest = Manifest("codes", "", {}, {})
    with pytest.raises(
        InputError, match=r"^the codes have no latents(.)*noise=gaussian(.|\n)*\nhint: run `hvqd encode`"
    ):
        statistics_of(manifest)
    kept = Manifest("codes", "", {}, {}, {FACT: [{"mean": [1.0, 2.0], "deviation": [0.5, 3.0]}]})
    ((mean, deviation),) = statistics_of(kept)
    assert mean.tolist() == [1.0, 2.0] and deviation.tolist() == [0.5, 3.0]


def test_the_switch_asks_for_other_codes_and_another_prior_and_its_settings_count_only_then() -> None:
    parents = {kind: Manifest(kind, "", {}, {}) for kind in ("dataset", "vq", "codes", "prior")}

    def requests(*changes: str) -> dict[str, str]:
        config = load_config("tiny", None, list(changes))
        return {kind: request_of(kind, config, parents) for kind in ("vq", "codes", "prior", "evaluation")}

    discrete, gaussian = requests(), requests("prior.model.noise=gaussian")
    assert {kind for kind in discrete if discrete[kind] != gaussian[kind]} == {"codes", "prior", "evaluation"}
    assert (
        requests("prior.model.gaussian.schedule=edm", "sampling.eta=0.5", "sampling.gaussian_sampler=ddim") == discrete
    )
    assert requests("prior.model.noise=gaussian", "sampling.top_k=5", "sampling.temperature=2.0") == gaussian
    assert requests("prior.model.noise=gaussian", "prior.model.code_scale=codebook") == gaussian, "not used there"
    edm = requests("prior.model.noise=gaussian", "prior.model.gaussian.schedule=edm", "sampling.eta=0.5")
    assert {kind for kind in edm if edm[kind] != gaussian[kind]} == {"prior", "evaluation"}
