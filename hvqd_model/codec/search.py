"""Searches in a set of code vectors: the nearest ones of each vector, and the centres to begin with.

Axes: N vectors, D dimensions, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvqd_model.randomness import derive_key, uniform

_CHUNK_ELEMENTS = 1 << 21  # distances computed at once: 8 MiB in fp32, still in the cache when they are searched
_BLOCK = 64


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N,) index of the nearest code of each vector, the lowest index among equals; in chunks of rows.

    Args:
        vectors: (N, D).
        codebook: (K, D).
    """
    found = [_lowest(each) for each in _distances(vectors, codebook)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=vectors.device)


def nearest_few(vectors: Tensor, codebook: Tensor, count: int) -> Tensor:
    """(N, count) indices of the nearest codes of each vector, the nearest first; in chunks of rows.

    Args:
        vectors: (N, D).
        codebook: (K, D).
        count: at most K.
    """
    found = [torch.topk(each, count, largest=False).indices for each in _distances(vectors, codebook)]
    return torch.cat(found) if found else torch.zeros(0, count, dtype=torch.int64, device=vectors.device)


def _distances(vectors: Tensor, codebook: Tensor) -> Iterator[Tensor]:
    """Squared distances of some rows of vectors after others to all codes, (rows, K), less the vectors' own norms."""
    codebook = codebook.float()
    norms = codebook.square().sum(1)
    elements = _CHUNK_ELEMENTS if vectors.device.type == "cpu" else 8 * _CHUNK_ELEMENTS  # fewer launches
    for chunk in torch.split(vectors, max(1, elements // len(codebook))):
        yield torch.addmm(norms, chunk.float(), codebook.t(), alpha=-2)


def _lowest(distances: Tensor) -> Tensor:
    """(N,) the place of each row's smallest of (N, K) distances, the first among equals: what argmin says.

    First the block, then the place in it: torch finds a minimum several times faster than where it stands.
    """
    if distances.shape[1] % _BLOCK:
        return torch.argmin(distances, dim=1)
    blocks = distances.view(len(distances), distances.shape[1] // _BLOCK, _BLOCK)
    block = torch.argmin(blocks.amin(2), dim=1)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    return block * _BLOCK + torch.argmin(inside, dim=1)


def _spread_choice(vectors: Tensor, count: int, stream: int) -> Tensor:
    """(count,) indices of vectors, each drawn in proportion to its squared distance from those drawn before.

    k-means++ (Arthur and Vassilvitskii, SODA 2007): from an even choice, Lloyd's iterations leave some clusters with
    two centres and others without, for good.
    """
    items = torch.arange(count, device=vectors.device)
    draws = uniform(items, (1,), stream)
    weights = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    norms = vectors.square().sum(1)
    distances = torch.full_like(norms, torch.inf)
    chosen = torch.zeros_like(items)
    for place in range(count):
        cumulative = weights.cumsum(0)
        drawn = torch.searchsorted(cumulative, draws[place] * cumulative[-1], right=True).clamp_max(len(vectors) - 1)
        chosen[place] = drawn[0]
        # One product with a matrix that is there: subtracting first would write all vectors anew each time.
        near = torch.addmv(norms + norms[drawn], vectors, vectors[drawn[0]], alpha=-2)
        distances = torch.minimum(distances, near.clamp_min_(0).index_fill_(0, drawn, 0))
        weights = distances.double()
    return chosen


def kmeans(vectors: Tensor, clusters: int, key: int, iterations: int = 10) -> Tensor:
    """(clusters, D) centres by Lloyd's iterations from a spread choice of vectors; deterministic in the key.

    An empty cluster moves to the vector that is farthest from its centre. With fewer vectors than clusters, the rest
    are vectors with a little noise.
    """
    vectors = vectors.float()
    if clusters <= len(vectors):
        centres = vectors[_spread_choice(vectors, clusters, derive_key("kmeans", key))]
    else:
        centres = vectors[torch.arange(clusters, device=vectors.device) % len(vectors)]
        noise = uniform(torch.arange(clusters, device=vectors.device), (vectors.shape[1],), derive_key("noise", key))
        centres += ((noise - 0.5) * 1e-3 * vectors.std()).float()
    for _ in range(iterations):
        indices = nearest_codes(vectors, centres)
        counts = torch.bincount(indices, minlength=clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, indices, vectors)
        moved = sums / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0).squeeze(1)
        if len(empty) and len(vectors) >= clusters:
            distances = (vectors - centres[indices]).square().sum(1)
            moved[empty] = vectors[torch.argsort(distances, descending=True, stable=True)[: len(empty)]]
        else:
            moved[empty] = centres[empty]
        centres = moved
    return centres
