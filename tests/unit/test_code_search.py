"""Nearest codes, and k-means, which starts codebooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvqd_model.codec import search as module
from hvqd_model.codec.codebooks import make_quantizer
from hvqd_model.codec.search import kmeans, nearest_codes
from tests.small_quantizers import ema, keys, normal, whole


def reference_nearest(vectors: Tensor, codebook: Tensor) -> list[int]:
    """The first code at the least squared distance, one pair at a time."""
    distances = [[sum((a - b) ** 2 for a, b in zip(v, e, strict=True)) for e in codebook.tolist()] for v in vectors]
    return [row.index(min(row)) for row in distances]


@pytest.mark.parametrize("codes", [2, 7, 33])
def test_nearest_codes_equal_a_loop_and_ties_go_to_the_lowest_index(codes: int) -> None:
    vectors, codebook = whole(60, 2, largest=3), whole(codes, 2, seed=1, largest=3)
    expected = reference_nearest(vectors, codebook)
    ties = sum(row.eq(row.min()).sum() > 1 for row in torch.cdist(vectors, codebook))
    assert ties > 0, "the case must have ties"
    assert nearest_codes(vectors, codebook).tolist() == expected


def test_the_lowest_of_equal_codes_wins_wherever_they_stand() -> None:
    for codes in range(2, 40):
        assert nearest_codes(normal(9, 5), normal(1, 5, seed=1).expand(codes, -1)).tolist() == [0] * 9


@pytest.mark.parametrize("codes", [64, 192, 1024, 63, 200])  # whole blocks, and what is no multiple of a block
def test_the_smallest_distance_found_in_blocks_is_where_argmin_finds_it(codes: int) -> None:
    distances = whole(300, codes, seed=3, largest=2)  # most rows have their smallest value in several blocks
    distances[0] = torch.inf
    distances[1, 5 * codes // 6 :] = torch.nan
    distances[2] = torch.nan
    distances[3] = -torch.inf
    assert torch.equal(module._lowest(distances), torch.argmin(distances, dim=1))


def test_nearest_codes_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = whole(50, 3), whole(20, 3, seed=1)
    at_once = nearest_codes(vectors, codebook)
    for elements in (1, 20, 60, 147, 20 * 49):  # one row at a time, whole rows, a remainder, all but one
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        assert torch.equal(nearest_codes(vectors, codebook), at_once)


def test_a_codebook_larger_than_a_chunk_is_searched_row_by_row() -> None:
    side = 1 << 10  # at 2^20 codes a chunk is two rows
    codebook = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    vectors = torch.tensor([[0.0, 3.0], [77.0, 1.0], [1023.0, 1023.0], [-4.0, 5.0], [512.0, 0.0]])
    assert nearest_codes(vectors, codebook).tolist() == [3, 77 * side + 1, side * side - 1, 5, 512 * side]


@pytest.mark.parametrize("codes", [4, 128])
def test_no_vectors_have_no_codes(codes: int) -> None:
    found = nearest_codes(torch.zeros(0, 3), whole(codes, 3))
    assert found.shape == (0,) and found.dtype == torch.int64


def test_distances_are_computed_in_fp32() -> None:
    codebook = torch.tensor([[1.0], [1.001]])  # equal in bf16
    assert nearest_codes(torch.tensor([[1.0]], dtype=torch.bfloat16), codebook).tolist() == [0]
    quantizer = ema(codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(torch.tensor([[1.0], [1.0009]]), keys(2)).indices.tolist() == [0, 1]


# k-means


def blobs(count: int, members: int, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Far centres on a grid, and vectors close around them, in random order."""
    centres = 10 * torch.stack([torch.arange(count) % 5, torch.arange(count) // 5, *torch.zeros(dim - 2, count)], 1)
    vectors = (centres[:, None] + 0.1 * normal(count, members, dim, seed=seed)).flatten(0, 1)
    return centres, vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("key", range(5))
def test_separated_blobs_become_a_centre_each(key: int) -> None:
    centres, vectors = blobs(15, 12, seed=key)
    found = kmeans(vectors, 15, key)
    owner = torch.cdist(vectors, centres).argmin(1)
    means = torch.stack([vectors[owner == blob].mean(0) for blob in range(15)])
    nearest = torch.cdist(means, found).argmin(1)
    assert sorted(nearest.tolist()) == list(range(15))
    torch.testing.assert_close(found[nearest], means, rtol=0, atol=1e-5)


def test_a_started_codebook_finds_the_blobs_and_stays_there() -> None:
    centres, vectors = blobs(10, 20)
    quantizer = make_quantizer("ema", 10, 4)
    quantizer.start(vectors, 1)
    for step in range(20):
        quantizer.update(quantizer(vectors, keys(200)).statistics, step)
    distances = torch.cdist(centres, quantizer.codebook)
    assert sorted(distances.argmin(1).tolist()) == list(range(10))
    assert float(distances.min(1).values.max()) < 0.1


def test_kmeans_is_deterministic_in_its_key_and_draws_from_no_global_generator() -> None:
    vectors, random = normal(50, 3), torch.get_rng_state()
    assert torch.equal(kmeans(vectors, 7, 1), kmeans(vectors, 7, 1))
    assert not torch.equal(kmeans(vectors, 7, 1), kmeans(vectors, 7, 2))
    assert torch.equal(torch.get_rng_state(), random)


def test_kmeans_of_as_many_vectors_as_clusters_is_the_vectors() -> None:
    vectors = normal(8, 3)
    found = kmeans(vectors, 8, 0)
    assert sorted(torch.cdist(vectors, found).argmin(1).tolist()) == list(range(8))
    torch.testing.assert_close(torch.cdist(vectors, found).min(1).values, torch.zeros(8), rtol=0, atol=1e-3)


def test_kmeans_centres_are_the_means_of_what_is_nearest() -> None:
    vectors = blobs(4, 30)[1]
    found = kmeans(vectors, 6, 0, iterations=50)
    owner = torch.tensor(reference_nearest(vectors, found))
    for cluster in range(6):
        torch.testing.assert_close(found[cluster], vectors[owner == cluster].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_vectors_than_clusters_give_centres_beside_each(count: int) -> None:
    vectors = normal(count, 4)
    found = kmeans(vectors, 10, 0)
    assert len(found.unique(dim=0)) > count
    assert float(torch.cdist(found, vectors).min(1).values.max()) < 1e-2
    assert len(set(torch.cdist(found, vectors).argmin(1).tolist())) == count


def test_equal_vectors_give_finite_centres() -> None:
    assert torch.equal(kmeans(torch.ones(20, 3), 5, 0), torch.ones(5, 3))
