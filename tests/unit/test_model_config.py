"""The models' configurations: what follows from them, and how what is wrong with them is said."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from hvqd_model.config import GaussianNoise, PriorArchitecture, PriorConfig, Settings, VQArchitecture, VQConfig

FITTING = {"grids": ((2, 2), (4, 4)), "codebook_sizes": (8, 8), "code_dim": 4}

REFUSED: list[tuple[type[Settings], dict[str, object], str]] = [
    (VQArchitecture, {"strides": ()}, "strides must name 1 to 5 levels: []\nhint: strides=[8,4] gives two levels"),
    (
        VQArchitecture,
        {"strides": (64, 32, 16, 8, 4, 2), "codebook_sizes": (8,) * 6},
        "strides must name 1 to 5 levels: [64, 32, 16, 8, 4, 2]\nhint: strides=[8,4] gives two levels",
    ),
    (
        VQArchitecture,
        {"strides": (8, 4, 2), "codebook_sizes": (64, 32)},
        "codebook_sizes must have one entry a level (3): [64, 32]\nhint: codebook_sizes=[64, 64, 64]",
    ),
    (
        VQArchitecture,
        {"codebook_sizes": ()},
        "codebook_sizes must have one entry a level (2): []\nhint: codebook_sizes=[1024, 1024]",
    ),
    (
        VQArchitecture,
        {"codebook_sizes": (64, 1)},
        "codebook_sizes must be at least 2 each: [64, 1]\nhint: 1024 is a good start",
    ),
    (
        VQArchitecture,
        {"width_multipliers": ()},
        "width_multipliers must be one or more, each at least 1: []\nhint: width_multipliers=[1,3,3]",
    ),
    (
        VQArchitecture,
        {"width_multipliers": (1, 0)},
        "width_multipliers must be one or more, each at least 1: [1, 0]\nhint: width_multipliers=[1,3,3]",
    ),
    (
        VQArchitecture,
        {"strides": (8, 3)},
        "each of strides must be a multiple of the next: [8, 3]\n"
        "hint: for example strides=[12,4] or strides=[[8,16],[4,4]]",
    ),
    (
        VQArchitecture,
        {"strides": (4, 8)},
        "strides must not grow from level to level, coarse first: [4, 8]\nhint: for example strides=[8,4]",
    ),
    (
        VQConfig,
        {"image_size": (32, 30)},
        "image_size must be a multiple of the coarsest stride (8): [32, 30]\n"
        "hint: image_size=[32, 24], strides that divide [32, 30], or padding=edge",
    ),
    (
        VQConfig,
        {"image_size": (4, 32)},
        "image_size must hold at least one code of the coarsest level (8): [4, 32]\n"
        "hint: larger pictures, or smaller strides",
    ),
    (
        VQConfig,
        {"image_size": (32, 12), "strides": ((8, 16), (8, 4)), "padding": "edge"},
        "image_size must hold at least one code of the coarsest level ([8, 16]): [32, 12]\n"
        "hint: larger pictures, or smaller strides",
    ),
    (
        VQArchitecture,
        {"strides": ((8, 4), (4, 8))},
        "strides must not grow from level to level, coarse first: [[8, 4], [4, 8]]\nhint: for example strides=[8,4]",
    ),
    (
        VQArchitecture,
        {"quantizer": ("ema",)},
        "quantizer must have one entry a level (2): ['ema']\nhint: give 2 entries, or leave quantizer out",
    ),
    (
        VQArchitecture,
        {"code_dim": (8, 8, 8)},
        "code_dim must have one entry a level (2): [8, 8, 8]\nhint: give 2 entries, or leave code_dim out",
    ),
    (
        VQArchitecture,
        {"quantizer": "fsq", "fsq_steps": ((8, 8, 4, 4), (8, 5, 5, 5))},
        "fsq_steps of level 1 must be at least 2 each and multiply to its codebook size (1024): [8, 5, 5, 5] multiply "
        "to 1000\nhint: codebook_sizes entry 1 = 1000, or fsq_steps=[8, 8, 4, 4]",
    ),
    (
        VQArchitecture,
        {"quantizer": "fsq", "fsq_steps": ((8, 8, 4, 4),)},
        "fsq_steps must have one entry a level (2): [[8, 8, 4, 4]]\nhint: give 2 entries, or leave fsq_steps out",
    ),
    (
        VQArchitecture,
        {"quantizer": ("fsq", "ema"), "fsq_steps": ((8, 8, 4, 4), (8, 8, 4, 4))},
        "fsq_steps of level 1 must be empty, its quantizer is ema: [[8, 8, 4, 4], [8, 8, 4, 4]]\n"
        "hint: set quantizer=fsq, or leave fsq_steps out",
    ),
    (
        VQArchitecture,
        {"quantizer": "fsq", "codebook_sizes": (1024, 22)},
        "codebook_sizes of level 1 must be a product of numbers up to 8 for quantizer fsq: 22\n"
        "hint: a power of two always is, or name fsq_steps",
    ),
    (
        VQArchitecture,
        {"quantizer": "fsq", "hierarchy": "residual"},
        "hierarchy=residual subtracts one level's vectors from the next one's, so all levels must have equal code_dim "
        "and none can be fsq: [4, 4], ['fsq', 'fsq']\nhint: set hierarchy=features or hierarchy=nested",
    ),
    (
        PriorConfig,
        FITTING | {"code_dim": (4, 4, 4)},
        "code_dim must be one number or one a level (2): [4, 4, 4]\nhint: take it from the tokenizer's configuration",
    ),
    (
        PriorArchitecture,
        {"width": 100},
        "width must be a multiple of 4 x heads (16), for 2-D rotary positions: 100\nhint: width=96",
    ),
    (
        PriorArchitecture,
        {"width": 16, "heads": 16},
        "width must be a multiple of 4 x heads (64), for 2-D rotary positions: 16\nhint: width=64",
    ),
    (
        PriorArchitecture,
        {"noise": "mask-and-replace"},
        "loss=simplified is the bound of absorbing noise only\nhint: set noise=absorbing, or loss=kl",
    ),
    (
        GaussianNoise,
        {"zero_terminal_snr": True, "prediction": "epsilon"},
        "prediction must be v or x0 with zero_terminal_snr, because pure noise says nothing of the picture: epsilon\n"
        "hint: prediction=v",
    ),
    (
        GaussianNoise,
        {"zero_terminal_snr": True, "schedule": "edm"},
        "zero_terminal_snr must be false with schedule=edm, which has a highest noise level of its own: true\n"
        "hint: zero_terminal_snr=false, or schedule=cosine",
    ),
    (
        PriorConfig,
        FITTING | {"codebook_sizes": (8,)},
        "grids and codebook_sizes must have one entry a level: 2 and 1\n"
        "hint: take both from the tokenizer's configuration",
    ),
    (
        PriorConfig,
        FITTING | {"grids": (), "codebook_sizes": ()},
        "grids and codebook_sizes must have one entry a level: 0 and 0\n"
        "hint: take both from the tokenizer's configuration",
    ),
]


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED)
def test_what_is_refused_is_named_with_the_value_and_a_hint(
    kind: type[Settings], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"Value error, {message} [type=")):
        kind.model_validate(values)


def test_what_a_hint_proposes_is_accepted() -> None:
    assert VQArchitecture(strides=(8, 4, 2), codebook_sizes=(64, 64, 64)).levels == 3
    assert VQConfig(strides=(4, 4), image_size=(8, 16)).grids == ((2, 4), (2, 4))
    assert VQConfig(image_size=(32, 24)).grids == ((4, 3), (8, 6))
    assert VQConfig(image_size=(8, 32)).tokens == 4 + 16
    assert VQConfig(image_size=(32, 30), padding="edge").padded_size == (32, 32)
    assert VQArchitecture(strides=(12, 4)).cells == ((12, 12), (4, 4))
    assert VQArchitecture(strides=((8, 16), (4, 4))).cells == ((8, 16), (4, 4))
    assert VQArchitecture(quantizer="fsq", codebook_sizes=(1024, 1000)).steps == ((8, 8, 4, 4), (8, 5, 5, 5))
    assert VQArchitecture(quantizer="fsq", codebook_sizes=(22, 22), fsq_steps=((11, 2), (2, 11))).code_dims == (2, 2)
    assert PriorArchitecture(width=96).width == 96
    assert PriorArchitecture(width=64, heads=16).heads == 16
    assert PriorArchitecture(noise="mask-and-replace", loss="kl").loss == "kl"
    assert GaussianNoise(zero_terminal_snr=True, prediction="v").schedule == "linear"


BOUNDS: list[tuple[type[Settings], str, float, str]] = [
    (VQArchitecture, "code_dim", 0, "greater than or equal to 1"),
    (VQArchitecture, "commitment", -0.1, "greater than or equal to 0"),
    (VQArchitecture, "codebook_decay", 0, "greater than 0"),
    (VQArchitecture, "codebook_decay", 1, "less than 1"),
    (VQArchitecture, "restart_threshold", -1, "greater than or equal to 0"),
    (VQArchitecture, "level_dropout", 1.5, "less than or equal to 1"),
    (VQArchitecture, "width", 4, "greater than or equal to 8"),
    (VQArchitecture, "width", 10, "a multiple of 4"),
    (VQArchitecture, "blocks", 0, "greater than or equal to 1"),
    (VQArchitecture, "ssim_weight", -1, "greater than or equal to 0"),
    (GaussianNoise, "min_snr_gamma", 0, "greater than 0"),
    (PriorArchitecture, "uniform_share", 1.1, "less than or equal to 1"),
    (PriorArchitecture, "stagger", -0.1, "greater than or equal to 0"),
    (PriorArchitecture, "context_corruption", 1, "less than 1"),
    (PriorArchitecture, "time_weight_power", 0.5, "less than or equal to 0"),
    (PriorArchitecture, "time_weight_power", -2, "greater than or equal to -1"),
    (PriorArchitecture, "auxiliary_weight", -1, "greater than or equal to 0"),
    (PriorArchitecture, "diffusion_steps", 0, "greater than or equal to 1"),
    (PriorArchitecture, "depth", 0, "greater than or equal to 1"),
    (PriorArchitecture, "heads", 0, "greater than or equal to 1"),
    (PriorArchitecture, "mlp_ratio", 0, "greater than 0"),
    (PriorArchitecture, "label_dropout", 1, "less than 1"),
]


@pytest.mark.parametrize(("kind", "name", "value", "bound"), BOUNDS)
def test_numbers_out_of_bounds_are_refused(kind: type[Settings], name: str, value: float, bound: str) -> None:
    with pytest.raises(ValidationError, match=rf"1 validation error for {kind.__name__}\n{name}(\.one)?\n  .*{bound}"):
        kind.model_validate({name: value})


@pytest.mark.parametrize(
    ("kind", "name", "allowed"),
    [
        (VQArchitecture, "hierarchy", "'features', 'residual', 'nested', 'pyramid' or 'nested-pyramid'"),
        (VQArchitecture, "quantizer", "'ema', 'gradient', 'simvq' or 'fsq'"),
        (VQArchitecture, "estimator", "'straight-through' or 'rotation'"),
        (VQArchitecture, "pixel_loss", "'l1', 'l2' or 'l1+l2'"),
        (PriorArchitecture, "noise", "'absorbing', 'mask-and-replace' or 'gaussian'"),
        (GaussianNoise, "schedule", "'linear', 'scaled-linear', 'cosine', 'sigmoid' or 'edm'"),
        (GaussianNoise, "prediction", "'epsilon', 'x0' or 'v'"),
        (PriorArchitecture, "schedule", "'linear' or 'cosine'"),
        (PriorArchitecture, "loss", "'simplified' or 'kl'"),
    ],
)
def test_an_unknown_choice_names_the_allowed_ones(kind: type[Settings], name: str, allowed: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"Input should be {allowed}")):
        kind.model_validate({name: "other"})


@pytest.mark.parametrize(
    ("kind", "needed"), [(VQArchitecture, {}), (VQConfig, {}), (PriorArchitecture, {}), (PriorConfig, FITTING)]
)
def test_unknown_keys_are_refused_and_nothing_changes_later(kind: type[Settings], needed: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"colour\n  Extra inputs are not permitted"):
        kind.model_validate({"colour": "red"} | needed)
    with pytest.raises(ValidationError, match="Instance is frozen"):
        kind.model_validate(needed).width = 64  # type: ignore[attr-defined]


def test_bits_are_tokens_times_the_logarithm_of_the_codebook() -> None:
    assert VQConfig(image_size=(32, 32), strides=(8, 4), codebook_sizes=(1024, 256)).bits == 16 * 10 + 64 * 8


def test_grids_and_tokens_follow_from_the_picture() -> None:
    config = VQConfig(strides=(16, 4, 2), codebook_sizes=(8, 8, 8), image_size=(32, 48))
    assert config.grids == ((2, 3), (8, 12), (16, 24))
    assert (config.levels, config.tokens) == (3, 6 + 96 + 384)
    prior = PriorConfig(grids=config.grids, codebook_sizes=config.codebook_sizes, code_dim=config.code_dim)
    assert prior.tokens == config.tokens


@pytest.mark.parametrize("config", [VQConfig(), PriorConfig.model_validate(FITTING | {"classes": ("a", "b")})])
def test_a_configuration_survives_a_round_trip_through_json(config: VQConfig | PriorConfig) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_every_setting_is_documented() -> None:
    documented = 0
    for kind in (VQConfig, PriorConfig, GaussianNoise):
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name}"
            documented += 1
    assert documented == 21 + 27 + 5
