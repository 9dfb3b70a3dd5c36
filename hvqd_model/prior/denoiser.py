"""The denoiser: a transformer over the tokens of all levels at once.

Adaptive norms that start as the identity (adaLN-zero, arXiv:2212.09748). A token enters as a learned vector of its
index plus a projection of its frozen codebook vector. Under Gaussian noise it enters as a projection of its latent, and
what is predicted is a latent too.

Levels that are still pure noise are left out. Images with different numbers of levels run in one pass: their tokens are
packed for the linear layers, so that each parameter is used once whatever the batch holds (ZeRO-3 relies on it), and
attend image by image.

Axes: B images, N tokens of a level, D channels, H heads, K codes; index K is the mask. A bucket is the images with the
same number of levels present; T tokens are those of all buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvqd_model.config import PriorConfig
from hvqd_model.prior.attention import attend, normalize_and_turn, rotary_angles
from hvqd_model.prior.conditioning import Conditioning
from hvqd_model.prior.conditions import Conditions, as_conditions
from hvqd_model.prior.frozen import FrozenBuffers
from hvqd_model.prior.latents import LatentEmbedding, LatentHead


class TokenEmbedding(FrozenBuffers):
    """Codes of one level as vectors: a learned one of the index, a projection of the frozen code vector, the place."""

    codebook: Tensor

    def __init__(self, codebook: Tensor, positions: int, width: int, scale_each_dimension: bool) -> None:
        super().__init__()
        num_codes, code_dim = codebook.shape
        self.scale_each_dimension = scale_each_dimension
        self.index = nn.Embedding(num_codes + 1, width)  # the last row: the mask
        self.project = nn.Linear(code_dim, width, bias=False)
        # Rotary positions are relative: among masks alone nothing would tell the corner from the centre.
        self.position = nn.Embedding(positions, width)
        self.register_buffer("codebook", codebook.float().clone())
        nn.init.normal_(self.index.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    @property
    def scale(self) -> Tensor:
        """What brings the codebook to a mean square of 1, as one number or (code_dim,): its own scale is the
        tokenizer's business."""
        squares = self.codebook.square()
        return torch.rsqrt((squares.mean(0) if self.scale_each_dimension else squares.mean()) + 1e-12)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, N, D) from (B, N) codes in [0, K]."""
        num_codes = self.codebook.shape[0]
        vectors = F.embedding(codes.clamp_max(num_codes - 1), self.codebook) * self.scale
        vectors = vectors * (codes < num_codes)[..., None]  # a mask has no code vector
        places = self.position(torch.arange(codes.shape[1], device=codes.device))
        embedded: Tensor = self.index(codes) + self.project(vectors.to(self.project.weight.dtype)) + places
        return embedded


class CodeHead(nn.Module):
    """Logits of one level's codes: each code has a row of its own, and all share a map to the frozen code vectors.

    Through the shared map codes that look alike are learned together, from the first step on.
    """

    def __init__(self, width: int, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, num_codes)
        self.shared = nn.Linear(width, code_dim, bias=False)
        # The first prediction is uniform: the bound starts at log K exactly.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, vectors: Tensor) -> Tensor:
        """(R, K) logits from (R, D) features and the (K, code_dim) code vectors."""
        logits: Tensor = self.own(features) + F.linear(self.shared(features), vectors.to(features.dtype))
        return logits


@dataclass(frozen=True)
class _Bucket:
    """Images of the batch that have the same levels present."""

    images: slice
    """Their places in the batch, sorted by the number of levels present."""
    rotation: Tensor
    """(tokens, 1, 1, head_width / 2) complex rotations of their tokens."""


class Block(nn.Module):
    """Attention and MLP, each with an adaptive norm and a gate that starts closed."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1), (width // heads) ** 0.5))
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, packed: Tensor, condition: Tensor, buckets: list[_Bucket]) -> Tensor:
        """(T, D) tokens of all buckets, given the (B, D) condition.

        One tensor goes in and one comes out, however many buckets there are: ZeRO-3 counts a module's tensors, and
        ranks with other numbers of buckets would wait for each other for ever.
        """
        tokens = _split(packed, buckets)
        parts = self.modulation(condition)[:, None].chunk(6, -1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        normed = [_modulate(x, shift_1, scale_1, bucket) for x, bucket in zip(tokens, buckets, strict=True)]
        mixed = _packed(self.attention_out, self._attention(normed, buckets))
        tokens = [torch.addcmul(x, gate_1[b.images], y) for x, y, b in zip(tokens, mixed, buckets, strict=True)]
        normed = [_modulate(x, shift_2, scale_2, bucket) for x, bucket in zip(tokens, buckets, strict=True)]
        mixed = _packed(self._mlp, normed)
        return _joined([torch.addcmul(x, gate_2[b.images], y) for x, y, b in zip(tokens, mixed, buckets, strict=True)])

    def _attention(self, normed: list[Tensor], buckets: list[_Bucket]) -> list[Tensor]:
        mixed = []
        for x, bucket in zip(_packed(self.query_key_value, normed), buckets, strict=True):
            images, count, width = x.shape[0], x.shape[1], x.shape[2] // 3
            query_key = x[..., : 2 * width].view(images, count, 2, self.heads, -1)
            query, key = normalize_and_turn(query_key, bucket.rotation, self.temperature).unbind(2)
            value = x[..., 2 * width :].view(images, count, self.heads, -1)
            mixed.append(attend(query, key, value))
        return mixed

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.mlp_in(x))
        y: Tensor = self.mlp_out(hidden * hidden)  # arXiv:2109.08668; a GELU costs five times as much on a CPU
        return y


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, bucket: _Bucket) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[bucket.images], normed, 1 + scale[bucket.images])


def _joined(tokens: list[Tensor]) -> Tensor:
    """(T, D) from every bucket's (b, N, D), one after the other."""
    flat = [x.flatten(0, 1) for x in tokens]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(packed: Tensor, buckets: list[_Bucket]) -> list[Tensor]:
    """Each bucket's (b, N, D) from (T, D)."""
    shapes = [(bucket.images.stop - bucket.images.start, len(bucket.rotation)) for bucket in buckets]
    parts = torch.split(packed, [images * count for images, count in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _packed(layer: Callable[[Tensor], Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """Apply a layer to every bucket's tokens in one call."""
    if len(tokens) == 1:
        return [layer(tokens[0])]
    out = layer(torch.cat([x.flatten(0, 1) for x in tokens]))
    parts = torch.split(out, [x.shape[0] * x.shape[1] for x in tokens])
    return [part.view(x.shape[0], x.shape[1], -1) for part, x in zip(parts, tokens, strict=True)]


class Denoiser(FrozenBuffers):
    """Logits of the clean codes, or what is predicted of the latents, at the wanted positions of every level."""

    rotation: Tensor

    def __init__(self, config: PriorConfig, codebooks: Sequence[Tensor]) -> None:
        super().__init__()
        self.config = config
        self.sizes = [rows * columns for rows, columns in config.grids]
        width = config.width
        self.conditioning = Conditioning(config)
        tokens = partial(TokenEmbedding, scale_each_dimension=config.code_scale == "dimension")
        embedding = LatentEmbedding if config.noise == "gaussian" else tokens
        self.embeddings = nn.ModuleList(
            embedding(codebook, size, width) for codebook, size in zip(codebooks, self.sizes, strict=True)
        )
        hidden = round(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, config.heads, hidden) for _ in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.heads = nn.ModuleList(
            LatentHead(width, dim) if config.noise == "gaussian" else CodeHead(width, size, dim)
            for size, dim in zip(config.codebook_sizes, config.code_dims, strict=True)
        )
        angles = rotary_angles(config.grids, width // config.heads)
        rotation = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("rotation", rotation.to(torch.complex64), persistent=False)
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)

    def forward(
        self,
        codes: Sequence[Tensor],
        level_times: Tensor,
        given: Tensor | Conditions,
        present: Tensor | None,
        rows: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """(R, K) logits a level of `rows`; under Gaussian noise (R, code_dim).

        Args:
            codes: (B, N) int64 of each level in [0, K]; only the leading levels that some image has present. Under
                Gaussian noise (B, N, code_dim) normalised latents.
            level_times: (B, L) of all levels.
            given: (B,) int64 classes, -1 for none, or all conditions.
            present: (B,) int64, how many leading levels an image has in its sequence; None for all of `codes`.
            rows: (R,) int64 of each level, wanted positions among the level's B x N, of images that have it present;
                None where the level's head is not needed at all.
        """
        order, starts = _sort_by_presence(present, len(codes))
        place = None
        if order is not None:
            codes, level_times = [level[order] for level in codes], level_times[order]
            given = as_conditions(given).each(lambda part: part[order])
            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        condition, own_times, maps = self.conditioning(level_times, given)
        tokens, buckets = self._embed(codes, own_times, maps, starts)
        packed = _joined(tokens)
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                packed = checkpoint(block, packed, condition, buckets, use_reentrant=False, preserve_rng_state=False)
            else:
                packed = block(packed, condition, buckets)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, -1)
        features = [
            _modulate(x, shift, scale, bucket) for x, bucket in zip(_split(packed, buckets), buckets, strict=True)
        ]
        return self._read_out(features, starts, place, rows)

    def _embed(
        self, codes: Sequence[Tensor], own_times: Tensor, maps: Sequence[Tensor], starts: list[int]
    ) -> tuple[list[Tensor], list[_Bucket]]:
        """Each bucket's tokens; images are sorted, so a level is present from `starts[level]` on."""
        embedded = [
            self.embeddings[level](codes[level][start:]) + own_times[start:, level, None]
            for level, start in enumerate(starts)
        ]
        if maps:
            embedded = [x + places[start:] for x, places, start in zip(embedded, maps, starts, strict=False)]
        ends = [*starts[1:], len(codes[0])]
        tokens, buckets = [], []
        for last, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if start == end:
                continue
            parts = [embedded[level][start - starts[level] : end - starts[level]] for level in range(last + 1)]
            tokens.append(torch.cat(parts, 1))
            rotation = self.rotation[: sum(self.sizes[: last + 1]), None, None]
            buckets.append(_Bucket(slice(start, end), rotation))
        # A level that no image has adds nothing, but its weights take part: ranks that share them stay in step.
        absent = [embedded[level].sum() for level, start in enumerate(starts) if start == len(codes[0])]
        if absent:
            tokens[0] = tokens[0] + torch.stack(absent).sum()
        return tokens, buckets

    def _read_out(
        self, features: list[Tensor], starts: list[int], place: Tensor | None, rows: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Logits of the wanted rows only: the heads are the widest layers."""
        logits = []
        first = 0
        for level, start in enumerate(starts):
            size = self.sizes[level]
            wanted = rows[level]
            if wanted is not None:
                having = [x[:, first : first + size] for x in features if x.shape[1] > first]
                flat = torch.cat([features[0].new_zeros(0, size, self.config.width), *having]).flatten(0, 1)
                if place is not None:
                    wanted = (place[wanted // size] - start) * size + wanted % size
                logits.append(self._predicted(level, flat[wanted]))
            else:
                sizes = self.config.code_dims if self.config.noise == "gaussian" else self.config.codebook_sizes
                logits.append(features[0].new_zeros(0, sizes[level]))
            first += size
        return logits

    def _predicted(self, level: int, features: Tensor) -> Tensor:
        """(R, K) logits, or (R, code_dim), from (R, D) features."""
        embedding, head = self.embeddings[level], self.heads[level]
        if isinstance(embedding, TokenEmbedding):
            vectors = embedding.codebook * (embedding.scale * embedding.codebook.shape[1] ** -0.5)
            logits: Tensor = head(features, vectors)
            return logits
        predicted: Tensor = head(features)
        return predicted


def _sort_by_presence(present: Tensor | None, levels: int) -> tuple[Tensor | None, list[int]]:
    """An order of the images by levels present, and for each level the first sorted image that has it."""
    if present is None:
        return None, [0] * levels
    counts = torch.bincount(present, minlength=levels + 1).tolist()
    starts = [sum(counts[: level + 1]) for level in range(levels)]
    if starts[-1] == 0:
        return None, starts
    return torch.argsort(present, stable=True), starts
