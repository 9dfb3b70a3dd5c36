"""The two models' configurations: everything needed to rebuild a model from its folder.

An *architecture* is what a researcher chooses; a *config* adds what follows from the data or from the other model
(picture size, classes, code grids), so that no value has to be stated twice.

Levels are listed coarse first everywhere: entry 0 is the coarsest.
"""

from __future__ import annotations

from math import log2, prod
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


T = TypeVar("T")
ONE, EACH = "one", "each"
"""Tags of the two forms, in the place that a validation error names."""


def _form(value: object) -> str:
    return EACH if isinstance(value, list | tuple) else ONE


# With a tag for each form, an error speaks of the form that was given and not of both.
OneOrEach = Annotated[Annotated[T, Tag(ONE)] | Annotated[tuple[T, ...], Tag(EACH)], Discriminator(_form)]
"""One value for all levels, or a list with one a level."""
Count = Annotated[int, Field(ge=1)]
Stride = Annotated[Annotated[Count, Tag(ONE)] | Annotated[tuple[Count, Count], Tag(EACH)], Discriminator(_form)]
"""Pixels, the same for rows and columns or one each."""
QuantizerKind = Literal["ema", "gradient", "simvq", "fsq"]
ConditionName = Literal["class", "style", "text", "map"]
CONDITIONS: tuple[ConditionName, ...] = ("class", "style", "text", "map")
"""What a prior can be told about a picture, in this order everywhere."""
GaussianScheduleName = Literal["linear", "scaled-linear", "cosine", "sigmoid", "edm"]
Prediction = Literal["epsilon", "x0", "v"]
_MOST_STEPS = 8


def even_steps(size: int, otherwise: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The most even factors of a codebook size, largest first, as few as can be with none above 8.

    More steps a dimension than about 8 are seldom all used; fewer than 5 lose against more dimensions
    (arXiv:2309.15505, section 3.2).

    Args:
        otherwise: the answer where a prime factor above 8 leaves none.

    Raises:
        ValueError: there is none, and no `otherwise`.
    """

    def search(rest: int, count: int, largest: int) -> tuple[int, ...] | None:
        if count == 0:
            return () if rest == 1 else None
        found = [
            (step, *more)
            for step in range(min(largest, rest), 1, -1)
            if rest % step == 0 and (more := search(rest // step, count - 1, step)) is not None
        ]
        return min(found, key=lambda steps: (steps[0] - steps[-1], steps), default=None)

    for count in range(1, size.bit_length() + 1):
        if _MOST_STEPS**count >= size and (found := search(size, count, _MOST_STEPS)) is not None:
            return found
    if otherwise is not None:
        return otherwise
    raise ValueError(f"no factors up to {_MOST_STEPS}: {size}\nhint: a power of two always has some")


def _plain(value: object) -> object:
    """As a user writes it: lists, not tuples."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class VQArchitecture(Settings):
    """The hierarchical tokenizer: encoder, quantizers and decoder."""

    strides: tuple[Stride, ...] = (8, 4)
    """Pixels a code spans at each level, coarse first, each a multiple of the next (or its equal: two levels on one
    grid); [rows, columns] if not square."""
    codebook_sizes: tuple[int, ...] = (1024, 1024)
    """Codes in each level's codebook."""
    code_dim: OneOrEach[Count] = 64
    """Dimensions of a code vector, one number or one a level; quantizer fsq takes its own (see fsq_steps)."""
    hierarchy: Literal["features", "residual", "nested", "pyramid", "nested-pyramid"] = "features"
    """How levels depend on each other: VQ-VAE-2 features, residual over scales (VAR), coarse codes nested in fine, a
    pyramid, in which a level codes the picture that the coarser ones leave over by linear transforms, or one whose
    finest level codes the whole picture and a coarser one what the finer one shows of it."""
    quantizer: OneOrEach[QuantizerKind] = "ema"
    """How a codebook learns, one kind or one a level: ema, gradient, simvq, or fsq (a fixed grid, no codebook)."""
    fsq_steps: tuple[tuple[int, ...], ...] = ()
    """Quantizer fsq: steps of each dimension, for each level (empty for levels of another kind); they multiply to the
    level's codebook size. Left out, they are chosen as even as can be, at most 8 a dimension."""
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    """The gradient through the quantizer."""
    l2_normalize: bool = False
    """Whether codes and features live on the unit sphere (not for quantizer fsq, whose grid is fixed)."""
    commitment: float = Field(0.25, ge=0)
    """Weight beta of |z - sg(e)|^2."""
    codebook_decay: float = Field(0.97, gt=0, lt=1)
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
    rate_weight: float = Field(0.0, ge=0)
    """Quantizer fsq: weight in the loss of the bits a pixel that the codes would cost under a simple entropy coder."""
    ssim_weight: float = Field(0.0, ge=0)
    """Weight of 1 - SSIM in the loss."""
    padding: Literal["refuse", "edge"] = "refuse"
    """Pictures that the coarsest stride does not divide: refuse them, or repeat their last row and column until it
    does (decoding cuts the repetition off, and no loss looks at it)."""

    @property
    def levels(self) -> int:
        """How many levels of codes."""
        return len(self.strides)

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of pixels that a code spans, of each level."""
        return tuple((side, side) if isinstance(side, int) else side for side in self.strides)

    @property
    def is_pyramid(self) -> bool:
        """Whether levels code pictures by linear transforms instead of features."""
        return self.hierarchy in ("pyramid", "nested-pyramid")

    @property
    def is_nested(self) -> bool:
        """Whether coarse codes are a function of the finer ones."""
        return self.hierarchy in ("nested", "nested-pyramid")

    @property
    def quantizers(self) -> tuple[QuantizerKind, ...]:
        """The kind of each level's quantizer."""
        return (self.quantizer,) * self.levels if isinstance(self.quantizer, str) else self.quantizer

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Of each level: the steps a dimension of quantizer fsq; empty for other kinds."""
        given = self.fsq_steps or ((),) * self.levels
        return tuple(
            (steps or even_steps(size)) if kind == "fsq" else ()
            for kind, steps, size in zip(self.quantizers, given, self.codebook_sizes, strict=True)
        )

    @property
    def code_dims(self) -> tuple[int, ...]:
        """Dimensions of each level's code vectors."""
        dims = (self.code_dim,) * self.levels if isinstance(self.code_dim, int) else self.code_dim
        return tuple(len(steps) or dim for steps, dim in zip(self.steps, dims, strict=True))

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
        self._check_strides()
        self._check_quantizers()
        return self

    def _check_strides(self) -> None:
        for coarse, fine in zip(self.cells, self.cells[1:], strict=False):
            if any(a < b for a, b in zip(coarse, fine, strict=True)):
                raise ValueError(
                    f"strides must not grow from level to level, coarse first: {_plain(self.strides)}\n"
                    "hint: for example strides=[8,4]"
                )
            if any(a % b for a, b in zip(coarse, fine, strict=True)):
                raise ValueError(
                    f"each of strides must be a multiple of the next: {_plain(self.strides)}\n"
                    "hint: for example strides=[12,4] or strides=[[8,16],[4,4]]"
                )

    def _check_quantizers(self) -> None:
        for name in ("quantizer", "code_dim", "fsq_steps"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.levels and (value or name != "fsq_steps"):
                raise ValueError(
                    f"{name} must have one entry a level ({self.levels}): {_plain(value)}\n"
                    f"hint: give {self.levels} entries, or leave {name} out"
                )
        for level, (kind, size) in enumerate(zip(self.quantizers, self.codebook_sizes, strict=True)):
            given = self.fsq_steps[level] if self.fsq_steps else ()
            if kind != "fsq":
                if given:
                    raise ValueError(
                        f"fsq_steps of level {level} must be empty, its quantizer is {kind}: {_plain(self.fsq_steps)}\n"
                        "hint: set quantizer=fsq, or leave fsq_steps out"
                    )
            elif given and (min(given) < 2 or prod(given) != size):
                raise ValueError(
                    f"fsq_steps of level {level} must be at least 2 each and multiply to its codebook size ({size}): "
                    f"{list(given)} multiply to {prod(given)}\n"
                    f"hint: codebook_sizes entry {level} = {prod(given)}, or fsq_steps={list(even_steps(size, ()))}"
                )
            elif not given and not even_steps(size, ()):
                raise ValueError(
                    f"codebook_sizes of level {level} must be a product of numbers up to {_MOST_STEPS} for quantizer "
                    f"fsq: {size}\nhint: a power of two always is, or name fsq_steps"
                )
        if self.hierarchy == "residual" and ("fsq" in self.quantizers or len(set(self.code_dims)) > 1):
            raise ValueError(
                "hierarchy=residual subtracts one level's vectors from the next one's, so all levels must have equal "
                f"code_dim and none can be fsq: {list(self.code_dims)}, {list(self.quantizers)}\n"
                "hint: set hierarchy=features or hierarchy=nested"
            )
        if self.rate_weight and "fsq" not in self.quantizers:
            raise ValueError(
                f"rate_weight must be 0 without a level of quantizer fsq, whose steps it spares: {self.rate_weight}\n"
                "hint: set quantizer=fsq, or leave rate_weight out"
            )
        if self.is_pyramid:
            self._check_pyramid()

    def _check_pyramid(self) -> None:
        if self.l2_normalize:
            raise ValueError(
                f"l2_normalize must be false with hierarchy={self.hierarchy}, where the length of a vector is the "
                "contrast of a patch: true\nhint: leave l2_normalize out"
            )
        if self.hierarchy == "nested-pyramid" and self.levels > 1 and self.level_dropout == 0:
            raise ValueError(
                "level_dropout must be above 0 with hierarchy=nested-pyramid, whose coarse levels learn from nothing "
                "else: 0\nhint: level_dropout=0.1"
            )
        for level, ((rows, columns), dim) in enumerate(zip(self.cells, self.code_dims, strict=True)):
            if dim > 3 * rows * columns:
                raise ValueError(
                    f"code_dim of level {level} must be at most {3 * rows * columns} with hierarchy={self.hierarchy}, "
                    f"the numbers in a patch of {rows} x {columns} pixels: {dim}\n"
                    f"hint: code_dim={min(16, 3 * rows * columns)}"
                )


class VQConfig(VQArchitecture):
    """A tokenizer for pictures of one size."""

    image_size: tuple[int, int] = (32, 32)
    """Height and width of the pictures, in pixels."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each level's codes, coarse first."""
        height, width = self.padded_size
        return tuple((height // rows, width // columns) for rows, columns in self.cells)

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width that the coarsest stride divides, at least those of the pictures."""
        height, width = (-(-side // cell) * cell for side, cell in zip(self.image_size, self.cells[0], strict=True))
        return height, width

    @property
    def tokens(self) -> int:
        """Codes an image, all levels together."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def bits(self) -> float:
        """Of an image's codes as they are: log2 of the codebook's size for each."""
        levels = zip(self.grids, self.codebook_sizes, strict=True)
        return sum(rows * columns * log2(size) for (rows, columns), size in levels)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        coarsest = self.cells[0]
        shown = _plain(self.strides[0])
        pairs = list(zip(self.image_size, coarsest, strict=True))
        if any(side < cell for side, cell in pairs):
            raise ValueError(
                f"image_size must hold at least one code of the coarsest level ({shown}): {list(self.image_size)}\n"
                "hint: larger pictures, or smaller strides"
            )
        if self.padding == "refuse" and any(side % cell for side, cell in pairs):
            fit = [max(cell, side // cell * cell) for side, cell in pairs]
            raise ValueError(
                f"image_size must be a multiple of the coarsest stride ({shown}): {list(self.image_size)}\n"
                f"hint: image_size={fit}, strides that divide {list(self.image_size)}, or padding=edge"
            )
        return self


class GaussianNoise(Settings):
    """Noise on the latents behind the codes."""

    schedule: GaussianScheduleName = "linear"
    """How signal turns into noise over time; edm is that of Karras et al., with its own steps."""
    zero_terminal_snr: bool = False
    """Stretch the schedule so that nothing of the picture is left at its end, as when sampling starts (not edm)."""
    latent_scale: Literal["level", "channel"] = "level"
    """What latents are divided by: a level's largest deviation, so that noise hides a channel the sooner the less it
    holds, as in pixels; or every channel's own."""
    prediction: Prediction = "x0"
    """What the network says: the noise (epsilon), the clean latents (x0), or v between them."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Training weight min(SNR, gamma) of the error of x0 (5 is usual); null weighs all errors alike."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "prediction must be v or x0 with zero_terminal_snr, because pure noise says nothing of the picture: "
                "epsilon\nhint: prediction=v"
            )
        if self.zero_terminal_snr and self.schedule == "edm":
            raise ValueError(
                "zero_terminal_snr must be false with schedule=edm, which has a highest noise level of its own: true\n"
                "hint: zero_terminal_snr=false, or schedule=cosine"
            )
        return self


class PriorArchitecture(Settings):
    """The diffusion prior over the codes: its noise and its denoiser."""

    noise: Literal["absorbing", "mask-and-replace", "gaussian"] = "absorbing"
    """Codes are masked, or masked and replaced by random codes (science: VQ-Diffusion); or the latents behind them meet
    Gaussian noise, and samples snap to codes."""
    gaussian: GaussianNoise = GaussianNoise()
    """With noise=gaussian: its schedule, prediction and weights; uniform_share, schedule, loss, time_weight_power,
    auxiliary_weight and diffusion_steps are for codes."""
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
    code_scale: Literal["codebook", "dimension"] = "codebook"
    """What brings the code vectors that the denoiser reads to a mean square of 1: one factor a codebook, or one a
    dimension, for codes like a pyramid's that hold most of their energy in few. Not used with noise=gaussian."""
    width: int = Field(128, ge=16)
    """Channels of the transformer."""
    depth: int = Field(6, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the transformer's."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that training hides a condition, each for itself, for guidance and for pictures without it."""
    conditions: tuple[ConditionName, ...] = ("class",)
    """What the prior is told beside the codes, any of class, style, text (captions) and map (label maps); a class only
    where the data has classes."""
    activation_checkpointing: bool = False
    """Recompute blocks in backward to save memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width must be a multiple of 4 x heads ({4 * self.heads}), for 2-D rotary positions: {self.width}\n"
                f"hint: width={max(1, round(self.width / (4 * self.heads))) * 4 * self.heads}"
            )
        if self.loss == "simplified" and self.noise == "mask-and-replace":
            raise ValueError(
                "loss=simplified is the bound of absorbing noise only\nhint: set noise=absorbing, or loss=kl"
            )
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(
                f"conditions must name each of {', '.join(CONDITIONS)} at most once: {list(self.conditions)}\n"
                f"hint: conditions={[name for name in CONDITIONS if name in self.conditions]}"
            )
        return self


class PriorConfig(PriorArchitecture):
    """A prior for the codes of one tokenizer."""

    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of each level's codes, coarse first."""
    codebook_sizes: tuple[int, ...]
    """Codes in each level's codebook."""
    code_dim: OneOrEach[Count]
    """Dimensions of the tokenizer's code vectors, which the denoiser reads beside the indices: one number or one a
    level."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty for a prior without them."""
    styles: tuple[str, ...] = ()
    """Names of the styles; empty for a prior without them."""
    text_dim: int = Field(0, ge=0)
    """Dimensions of a caption's embedding; 0 for a prior without captions."""
    text_encoder: str = ""
    """Digest of the network that embeds captions."""
    map_labels: int = Field(0, ge=0)
    """Labels that maps have, 0 to this number - 1; 0 for a prior without maps."""
    map_size: tuple[int, int] = (0, 0)
    """Height and width of label maps, in pixels; a multiple of every level's grid."""

    @property
    def code_dims(self) -> tuple[int, ...]:
        """Dimensions of each level's code vectors."""
        return (self.code_dim,) * len(self.grids) if isinstance(self.code_dim, int) else self.code_dim

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
        if len(self.code_dims) != len(self.grids):
            raise ValueError(
                f"code_dim must be one number or one a level ({len(self.grids)}): {_plain(self.code_dim)}\n"
                "hint: take it from the tokenizer's configuration"
            )
        if self.map_labels and any(
            side == 0 or side % cells for grid in self.grids for side, cells in zip(self.map_size, grid, strict=True)
        ):
            raise ValueError(
                f"map_size must be a multiple of every level's grid {_plain(self.grids)}: {list(self.map_size)}\n"
                "hint: take the tokenizer's padded_size"
            )
        return self
