"""The two models' configurations: everything needed to rebuild a model from its folder.

An *architecture* is what a researcher chooses; a *config* adds what follows from the data or from the other model
(picture size, classes, code grids), so that no value has to be stated twice.

Levels are listed coarse first everywhere: entry 0 is the coarsest.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class VQArchitecture(Settings):
    """The hierarchical tokenizer: encoder, quantizers and decoder."""

    strides: tuple[int, ...] = (8, 4)
    """Pixels a code spans at each level, coarse first; each a power of two and a multiple of the next."""
    codebook_sizes: tuple[int, ...] = (1024, 1024)
    """Codes in each level's codebook."""
    code_dim: int = Field(64, ge=1)
    """Dimensions of a code vector."""
    hierarchy: Literal["features", "residual", "nested"] = "features"
    """How levels depend on each other: VQ-VAE-2 features, residual over scales (VAR), coarse codes nested in fine."""
    quantizer: Literal["ema", "gradient", "simvq"] = "ema"
    """How a codebook learns."""
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    """The gradient through the quantizer."""
    l2_normalize: bool = False
    """Whether codes and features live on the unit sphere."""
    commitment: float = Field(0.25, ge=0)
    """Weight beta of |z - sg(e)|^2."""
    codebook_decay: float = Field(0.99, gt=0, lt=1)
    """Decay g of the EMA codebook, once an optimizer step."""
    restart_threshold: float = Field(0.05, ge=0)
    """A code used less than this share of the expected use is restarted; 0 never restarts."""
    level_dropout: float = Field(0.15, ge=0, le=1)
    """Probability, a picture, that only a prefix of the levels is decoded in training."""
    width: int = Field(32, ge=8, multiple_of=4)
    """Channels at the image's (unshuffled) resolution; a multiple of 4, the heads of the decoder's attention."""
    width_multipliers: tuple[int, ...] = (1, 3, 3)
    """Channel factors per halving after the pixel-unshuffle; the last repeats for deeper stages."""
    blocks: int = Field(1, ge=1)
    """Residual blocks a stage."""
    attention: bool = True
    """Self-attention at the coarsest grid of the decoder."""
    pixel_loss: Literal["l1", "l2", "l1+l2"] = "l2"
    """Reconstruction loss, in pixels."""
    ssim_weight: float = Field(0.0, ge=0)
    """Weight of 1 - SSIM in the loss."""

    @property
    def levels(self) -> int:
        """How many levels of codes."""
        return len(self.strides)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= len(self.strides) <= 5:
            raise ValueError(
                f"strides must name 1 to 5 levels: {list(self.strides)}\nhint: strides=[8,4] gives two levels"
            )
        if len(self.codebook_sizes) != len(self.strides):
            raise ValueError(
                f"codebook_sizes must have one entry a level ({len(self.strides)}): {list(self.codebook_sizes)}\n"
                f"hint: codebook_sizes={[self.codebook_sizes[0] if self.codebook_sizes else 1024] * len(self.strides)}"
            )
        if any(size < 2 for size in self.codebook_sizes):
            raise ValueError(
                f"codebook_sizes must be at least 2 each: {list(self.codebook_sizes)}\nhint: 1024 is a good start"
            )
        if not self.width_multipliers or any(multiplier < 1 for multiplier in self.width_multipliers):
            raise ValueError(
                f"width_multipliers must be one or more, each at least 1: {list(self.width_multipliers)}\n"
                "hint: width_multipliers=[1,3,3]"
            )
        if any(stride < 1 or stride & (stride - 1) for stride in self.strides):
            raise ValueError(f"strides must be powers of two: {list(self.strides)}\nhint: for example strides=[8,4]")
        if any(coarse <= fine for coarse, fine in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"strides must fall from level to level, coarse first: {list(self.strides)}\n"
                "hint: for example strides=[8,4]"
            )
        return self


class VQConfig(VQArchitecture):
    """A tokenizer for pictures of one size."""

    image_size: tuple[int, int] = (32, 32)
    """Height and width of the pictures, in pixels."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each level's codes, coarse first."""
        height, width = self.image_size
        return tuple((height // stride, width // stride) for stride in self.strides)

    @property
    def tokens(self) -> int:
        """Codes an image, all levels together."""
        return sum(rows * columns for rows, columns in self.grids)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        coarsest = self.strides[0]
        if any(side < coarsest or side % coarsest for side in self.image_size):
            fit = [max(coarsest, side // coarsest * coarsest) for side in self.image_size]
            raise ValueError(
                f"image_size must be a multiple of the coarsest stride ({coarsest}): {list(self.image_size)}\n"
                f"hint: image_size={fit}, or strides that divide {list(self.image_size)}"
            )
        return self


class PriorArchitecture(Settings):
    """The diffusion prior over the codes: its noise and its denoiser."""

    noise: Literal["absorbing", "mask-and-replace"] = "absorbing"
    """Codes are masked, or masked and replaced by random codes (science: VQ-Diffusion)."""
    uniform_share: float = Field(0.1, ge=0, le=1)
    """With mask-and-replace: the share of the corrupted tokens that are replaced, not masked, at the end of time."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the kept share falls over time."""
    stagger: float = Field(0.0, ge=0, le=1)
    """0 denoises all levels together, 1 coarse before fine, between them they overlap."""
    context_corruption: float = Field(0.0, ge=0, lt=1)
    """Training replaces up to this fraction of clean coarse codes, against surprises when sampling."""
    loss: Literal["simplified", "kl"] = "simplified"
    """The absorbing bound's cross-entropy on masked codes, or the KL of posteriors plus auxiliary cross-entropy."""
    time_weight_power: float = Field(-0.3, ge=-1, le=0)
    """Training weight t^power of the simplified loss; -1 is the true bound, which evaluation always reports."""
    auxiliary_weight: float = Field(0.001, ge=0)
    """Weight of the cross-entropy on clean codes beside the KL."""
    diffusion_steps: int = Field(100, ge=1)
    """Steps of the chain whose bound loss=kl is; sampling may use fewer."""
    width: int = Field(128, ge=16)
    """Channels of the transformer."""
    depth: int = Field(6, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the transformer's."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that training hides the class, for guidance."""
    activation_checkpointing: bool = False
    """Recompute blocks in backward to save memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width must be a multiple of 4 x heads ({4 * self.heads}), for 2-D rotary positions: {self.width}\n"
                f"hint: width={max(1, round(self.width / (4 * self.heads))) * 4 * self.heads}"
            )
        if self.loss == "simplified" and self.noise != "absorbing":
            raise ValueError(
                "loss=simplified is the bound of absorbing noise only\nhint: set noise=absorbing, or loss=kl"
            )
        return self


class PriorConfig(PriorArchitecture):
    """A prior for the codes of one tokenizer."""

    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of each level's codes, coarse first."""
    codebook_sizes: tuple[int, ...]
    """Codes in each level's codebook."""
    code_dim: int
    """Dimensions of the tokenizer's code vectors, which the denoiser reads beside the indices."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty for an unconditional prior."""

    @property
    def tokens(self) -> int:
        """Codes an image, all levels together."""
        return sum(rows * columns for rows, columns in self.grids)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.grids or len(self.grids) != len(self.codebook_sizes):
            raise ValueError(
                "grids and codebook_sizes must have one entry a level: "
                f"{len(self.grids)} and {len(self.codebook_sizes)}\n"
                "hint: take both from the tokenizer's configuration"
            )
        return self
