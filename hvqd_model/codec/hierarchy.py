"""The hierarchical tokenizer: pictures to several levels of codes and back.

Five ways for levels to depend on each other, one decoder for the first three:

features  top-down: the finer level quantizes its features together with what the coarser levels decode to (VQ-VAE-2,
          arXiv:1906.00446).
residual  one latent at the finest grid; each level quantizes what the coarser levels left over, pooled to its grid
          (VAR, arXiv:2404.02905, without its shared codebook).
nested    the finest level quantizes its own features; each coarser level is computed from the quantized finer one, so
          its codes are a function of the finer codes.
pyramid   each level codes the picture that the coarser levels leave over, by linear transforms (`codec.pyramid`): the
          nearest pictures for their bytes, but codes without a meaning of their own.
nested-pyramid
          the same transforms, but the finest level codes the whole picture, and each coarser one what the finer one
          shows: coarse codes are a function of the finer ones and take nothing from them.

Level dropout (training only) shows some pictures to the decoder without their finer levels, so that coarse codes mean
something by themselves and every prefix decodes.

Axes: B pictures, L levels (coarse first) of h x w = N codes, K codes a level, D dimensions of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.codec.codebooks import make_quantizer
from hvqd_model.codec.decoder import Decoder
from hvqd_model.codec.encoder import Encoder, factors, ratio, shrink, stage_cells, stage_channels
from hvqd_model.codec.losses import pixel_loss, ssim
from hvqd_model.codec.pyramid import Pyramid
from hvqd_model.codec.quantizer import CodebookStatistics, Quantized, Quantizer
from hvqd_model.codec.refinement import refine
from hvqd_model.config import VQConfig
from hvqd_model.randomness import derive_key, split_keys, uniform

LevelCodes = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class VQOutput:
    """What a training step returns."""

    reconstruction: Tensor
    """(B, 3, H, W) float32."""
    codes: tuple[Tensor, ...]
    """(B, h, w) int64 of each level."""
    vectors: tuple[Tensor, ...]
    """(B N, D) float32 of each level before quantization, detached: what k-means starts from."""
    loss: Tensor
    """Scalar."""
    metrics: dict[str, Tensor]
    """Detached scalars: pixel (mean reconstruction loss, dropped levels and SSIM included), alignment_0 …"""
    statistics: tuple[CodebookStatistics, ...]
    """Of each level, for `update` after merging."""


class HierarchicalVQ(nn.Module):
    """Encoder, quantizers and decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        if config.is_pyramid:
            self.pyramid = Pyramid(config)
        else:
            self.encoder = Encoder(config)
            self.decoder = Decoder(config)
            self.projections = self._projections()
        self.quantizers = nn.ModuleList(
            make_quantizer(
                kind,
                codes,
                dim,
                commitment=config.commitment,
                estimator=config.estimator,
                normalize=config.l2_normalize,
                decay=config.codebook_decay,
                restart_threshold=config.restart_threshold,
                steps=config.steps[level],
                bounded=config.is_pyramid,
                bit_cost=config.rate_weight * prod(config.grids[level]) / prod(config.image_size),
            )
            for level, (kind, codes, dim) in enumerate(
                zip(config.quantizers, config.codebook_sizes, config.code_dims, strict=True)
            )
        )

    def _projections(self) -> nn.ModuleList:
        """From each level's input to its vectors before quantization."""
        config = self.config
        channels = dict(zip(stage_cells(config), stage_channels(config), strict=True))
        widths = [channels[cell] for cell in config.cells]
        if config.hierarchy == "features":
            inputs = [widths[0], *(2 * width for width in widths[1:])]
        else:
            inputs = [*config.code_dims[1:], widths[-1]]
        return nn.ModuleList(
            self._projection(level, count, dim)
            for level, (count, dim) in enumerate(zip(inputs, config.code_dims, strict=True))
        )

    def _projection(self, level: int, channels: int, dim: int) -> nn.Module:
        """From a level's input to its vectors before quantization."""
        config = self.config
        if config.hierarchy == "nested" and level < config.levels - 1:
            # From the quantized finer grid down to this one.
            width = max(stage_channels(config))
            steps: list[nn.Module] = []
            for factor in factors(ratio(config.cells[level], config.cells[level + 1])):
                steps += [shrink(width if steps else channels, width, factor, even_kernel=4), nn.SiLU()]
            return nn.Sequential(*steps, nn.Conv2d(width if steps else channels, dim, 3, padding=1))
        if config.hierarchy == "residual" and level < config.levels - 1:
            return nn.Identity()
        return nn.Conv2d(channels, dim, 1)

    # ---- training ----

    def forward(self, images: Tensor, keys: Tensor) -> VQOutput:
        """The training objective; pure, see `update`.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            keys: (B,) int64; level dropout and restart candidates follow from a picture's key.

        Raises:
            ValueError: pictures of another size.
        """
        self._check_images(images)
        kept = self._kept_levels(keys)
        quantized, x = self._walk(images, keys, kept)
        reconstruction = self._cut(self.pyramid.finish(x, kept) if self.config.is_pyramid else self.decoder.finish(x))
        error = pixel_loss(reconstruction, images, self.config.pixel_loss)
        if self.config.ssim_weight:
            error = error + self.config.ssim_weight * (1 - ssim(reconstruction + 1, images + 1, data_range=2.0))
        alignment = torch.stack([level.loss for level in quantized])
        metrics = {"pixel": error.detach().mean()}
        metrics |= {f"alignment_{index}": level.loss.detach() for index, level in enumerate(quantized)}
        return VQOutput(
            reconstruction=reconstruction,
            codes=self._grids([level.indices for level in quantized]),
            vectors=tuple(level.vectors for level in quantized),
            loss=error.mean() + alignment.sum(),
            metrics=metrics,
            statistics=tuple(level.statistics for level in quantized),
        )

    def _kept_levels(self, keys: Tensor) -> Tensor | None:
        """(B,) how many levels each picture's decoder sees, 1 to L; None for all."""
        levels, dropout = self.config.levels, self.config.level_dropout
        if not self.training or dropout == 0 or levels == 1:
            return None
        draws = uniform(keys, (2,), "level dropout")
        prefix = 1 + (draws[:, 1] * (levels - 1)).long().clamp_max(levels - 2)
        return torch.where(draws[:, 0] < dropout, prefix, levels)

    def _walk(
        self, images: Tensor, keys: Tensor | None, kept: Tensor | None, *, decode: bool = True
    ) -> tuple[list[Quantized], Tensor]:
        """Quantize every level and decode, in the order that the hierarchy needs.

        Args:
            keys: (B,) the pictures' keys; None when nothing is to be learned from them.
            kept: (B,) how many levels the decoder sees; None for all.
            decode: whether the second result, what `finish` of the decoder or the pyramid is to end, is wanted.
        """
        if self.config.is_pyramid:
            return self._through_the_pyramid(images, keys, kept)
        features = self.encoder(self._padded(images))
        if self.config.hierarchy == "features":
            quantized: list[Quantized] = []

            def top_down(level: int, x: Tensor) -> Tensor:
                source = features[level] if level == 0 else torch.cat([features[level], x], 1)
                # Below a level that a picture lacks the context is one that encoding never sees.
                counted = None if kept is None or level < 2 else kept >= level
                quantized.append(self._quantize(level, self.projections[level](source), keys, counted))
                return self._to_grid(quantized[level].values, level)

            x = self._decode_levels(len(images), self.config.levels, top_down, kept, finish=decode)
            return quantized, x
        quantized = (
            self._nested(features, keys) if self.config.hierarchy == "nested" else self._residual(features, keys)
        )
        if not decode:
            return quantized, images
        grids = [self._to_grid(level.values, index) for index, level in enumerate(quantized)]
        return quantized, self._decode_levels(len(images), self.config.levels, lambda level, _: grids[level], kept)

    def _through_the_pyramid(
        self, images: Tensor, keys: Tensor | None, kept: Tensor | None
    ) -> tuple[list[Quantized], Tensor]:
        found: dict[int, Quantized] = {}

        def quantize(level: int, z: Tensor) -> Tensor:
            found[level] = self._quantize(level, z, keys)
            return self._to_grid(found[level].values, level)

        shown: Tensor = self.pyramid(self._padded(images).float(), quantize, kept)
        return [found[level] for level in range(self.config.levels)], shown

    def _nested(self, features: list[Tensor], keys: Tensor | None) -> list[Quantized]:
        finest = self.config.levels - 1
        found = [self._quantize(finest, self.projections[finest](features[-1]), keys)]
        for level in range(finest - 1, -1, -1):
            finer = self._to_grid(found[0].values, level + 1).to(features[0].dtype)
            found.insert(0, self._quantize(level, self.projections[level](finer), keys))
        return found

    def _residual(self, features: list[Tensor], keys: Tensor | None) -> list[Quantized]:
        finest = self.config.levels - 1
        rest = self.projections[finest](features[-1]).float()
        found = []
        for level, grid in enumerate(self.config.grids):
            found.append(self._quantize(level, F.adaptive_avg_pool2d(rest, grid), keys))
            values = self._to_grid(found[level].values, level)
            rest = rest - F.interpolate(values, size=self.config.grids[finest], mode="nearest")
        return found

    def _quantize(self, level: int, z: Tensor, keys: Tensor | None, counted: Tensor | None = None) -> Quantized:
        """Quantize (B, D, h, w) features; `counted` (B,) says which pictures teach the codebook, None for all."""
        vectors, quantizer = z.permute(0, 2, 3, 1).flatten(0, 2), self._quantizer(level)
        if keys is None:
            alone: Quantized = quantizer(vectors, None)
            return alone
        count = z.shape[2] * z.shape[3]
        places = torch.arange(count, dtype=torch.int64, device=z.device).repeat(len(z))
        level_keys = split_keys(keys, f"candidates {level}").repeat_interleave(count)
        rows = None if counted is None else counted.repeat_interleave(count)
        quantized: Quantized = quantizer(vectors, split_keys(level_keys, places), rows)
        return quantized

    def _decode_levels(
        self, pictures: int, levels: int, codes: LevelCodes, kept: Tensor | None = None, *, finish: bool = True
    ) -> Tensor:
        """The decoder's features at the finest stage, with `codes(level, features before)` for the first `levels`.

        Without `finish` the walk ends when the last codes are known.
        """
        x = self.decoder.start(pictures, self.config.grids[0])
        for level in range(self.config.levels):
            x = self.decoder.approach(x, level)
            given = codes(level, x) if level < levels else None
            if not finish and level == self.config.levels - 1:
                return x
            present = None if kept is None or level == 0 else kept > level
            x = self.decoder.join(x, given, present, level)
        return self.decoder.approach(x, self.config.levels)

    @property
    def last_weight(self) -> Tensor:
        """The weight of the last layer that every pixel passes."""
        weight: Tensor = (self.pyramid if self.config.is_pyramid else self.decoder).out.weight
        return weight

    # ---- codebooks ----

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """(K, D) float32 of each level."""
        return tuple(self._quantizer(level).codebook.detach() for level in range(self.config.levels))

    @property
    def start_order(self) -> list[int]:
        """The levels in the order in which their codebooks start: each depends on the ones before it."""
        order = list(range(self.config.levels))
        return order[::-1] if self.config.is_nested else order

    def start_codebook(self, level: int, vectors: Tensor, key: int) -> None:
        """Begin quantizing a level, with a codebook fitted to (N, D) vectors; deterministic in the key."""
        self._quantizer(level).start(vectors, key)

    def started(self, level: int) -> bool:
        """Whether a level quantizes; until then its features pass through."""
        return bool(self._quantizer(level).started)

    @torch.no_grad()
    def update(self, statistics: Sequence[CodebookStatistics], key: int) -> dict[str, Tensor]:
        """Move the codebooks, once an optimizer step, by statistics merged over micro-batches and ranks.

        Returns:
            Scalars by level: perplexity_0 of this step's codes, restarts_0.
        """
        metrics: dict[str, Tensor] = {}
        for level, found in enumerate(statistics):
            restarts = self._quantizer(level).update(found, derive_key(key, level))
            share = found.counts / found.counts.sum().clamp_min(1)
            metrics[f"perplexity_{level}"] = torch.exp(-torch.xlogy(share, share).sum())
            metrics[f"restarts_{level}"] = restarts
        return metrics

    # ---- use ----

    @torch.no_grad()
    def encode(self, images: Tensor, refine_rounds: int = 0) -> tuple[Tensor, ...]:
        """(B, h, w) int64 codes of each level, coarse first, from (B, 3, H, W) pictures in [-1, 1].

        Args:
            images: the pictures.
            refine_rounds: passes over all codes that look for better ones with the decoder (`codec.refinement`); each
                costs some sixty decodings a level.

        Raises:
            ValueError: pictures of another size, rounds below 0, or a tokenizer whose codebooks have not started.
        """
        return self.encode_with_latents(images, refine_rounds)[0]

    @torch.no_grad()
    def encode_with_latents(
        self, images: Tensor, refine_rounds: int = 0
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The codes as `encode` gives them, and the (B, h, w, D) float32 latents that they are the nearest codes of.

        The latent of a code that refinement has changed is the code's own vector.

        Raises:
            ValueError: pictures of another size, rounds below 0, or a tokenizer whose codebooks have not started.
        """
        self._check_images(images)
        if refine_rounds < 0:
            raise ValueError(f"refine_rounds must be at least 0: {refine_rounds}\nhint: 0 takes the encoder's codes")
        for level in range(self.config.levels):
            if not self.started(level):
                raise ValueError(f"level {level} has no codebook yet\nhint: train the tokenizer further")
        if len(images) == 0:  # convolutions do not know how to
            shapes = list(zip(self.config.grids, self.config.code_dims, strict=True))
            none = tuple(torch.zeros(0, *grid, dtype=torch.int64, device=images.device) for grid, _ in shapes)
            return none, tuple(torch.zeros(0, *grid, dim, device=images.device) for grid, dim in shapes)
        quantized, _ = self._walk(images, None, None, decode=False)
        codes = self._grids([level.indices for level in quantized])
        latents = tuple(level.vectors.view(*found.shape, -1) for level, found in zip(quantized, codes, strict=True))
        if refine_rounds == 0:
            return codes, latents
        # Nested coarse codes say little that the finer ones do not: changed for a trifle, they would say nothing.
        finest = self.config.levels - 1
        levels = [finest] if self.config.is_nested else range(self.config.levels)
        refined = refine(self._decode_vectors, self.codebooks, self.config.cells, images, codes, refine_rounds, levels)
        return refined, tuple(
            torch.where((now == before)[..., None], latent, self._quantizer(level).lookup(now))
            for level, (now, before, latent) in enumerate(zip(refined, codes, latents, strict=True))
        )

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) float32 pictures in [-1, 1], from (B, h, w) codes of any prefix of the levels.

        Raises:
            ValueError: codes that are not this tokenizer's.
        """
        self._check_codes(codes)
        vectors = [
            self._to_grid(self._quantizer(level).lookup(found.flatten()), level) for level, found in enumerate(codes)
        ]
        return self._decode_vectors(vectors).clamp(-1, 1)

    def _decode_vectors(self, vectors: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) float32 pictures from (B, D, h, w) code vectors of any prefix of the levels."""
        if self.config.is_pyramid:
            return self._cut(self.pyramid.decode(vectors))
        x = self._decode_levels(len(vectors[0]), len(vectors), lambda level, _: vectors[level])
        return self._cut(self.decoder.finish(x))

    def _padded(self, images: Tensor) -> Tensor:
        """(B, 3, H', W') whose sides the coarsest stride divides: the last row and column repeated."""
        height, width = self.config.padded_size
        below, right = height - images.shape[2], width - images.shape[3]
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _cut(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) without the padding."""
        height, width = self.config.image_size
        return pictures if pictures.shape[2:] == (height, width) else pictures[..., :height, :width]

    def _check_images(self, images: Tensor) -> None:
        expected = (3, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, expected))}): {tuple(images.shape)}\n"
                f"hint: resize the pictures to {self.config.image_size[0]} x {self.config.image_size[1]}"
            )

    def _check_codes(self, codes: Sequence[Tensor]) -> None:
        if not 1 <= len(codes) <= self.config.levels:
            raise ValueError(
                f"codes must have 1 to {self.config.levels} levels, coarse first: {len(codes)}\n"
                "hint: pass what encode returns, or its first levels"
            )
        for level, found in enumerate(codes):
            shape = (*codes[0].shape[:1], *self.config.grids[level])
            size = self.config.codebook_sizes[level]
            if tuple(found.shape) != shape or found.dtype != torch.int64:
                raise ValueError(
                    f"codes of level {level} must be int64 of shape {shape}: {found.dtype} {tuple(found.shape)}\n"
                    "hint: pass what encode returns, or its first levels"
                )
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < size:
                raise ValueError(
                    f"codes of level {level} must be in 0..{size - 1}: {int(found.min())}..{int(found.max())}\n"
                    "hint: a prior's mask is no code; sample until every code is settled"
                )

    def _quantizer(self, level: int) -> Quantizer:
        quantizer = self.quantizers[level]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _to_grid(self, values: Tensor, level: int) -> Tensor:
        """(B, D, h, w) from (B N, D)."""
        rows, columns = self.config.grids[level]
        return values.view(-1, rows, columns, values.shape[1]).permute(0, 3, 1, 2)

    def _grids(self, indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(found.view(-1, *grid) for found, grid in zip(indices, self.config.grids, strict=True))
