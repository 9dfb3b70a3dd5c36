"""Configurations: what is accepted, what is refused and how, and that a printed one can be passed back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.errors import InputError
from workflows.config import RunConfig
from workflows.loading import config_from, load_config, masked, parse_override, preset_names, to_yaml


def test_every_preset_survives_a_round_trip_through_its_yaml() -> None:
    names = preset_names()
    assert len(names) == 6
    for name in names:
        config = load_config(name)
        assert config_from(yaml.safe_load(to_yaml(config))) == config


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("vq: {train: {images: 100, learning_rate: 0.5}}\nseed: 3\n")
    config = load_config("tiny", file, ["vq.train.images=200"], root="elsewhere", seed=4)
    assert (config.vq.train.images, config.vq.train.learning_rate, config.seed) == (200, 0.5, 4)
    assert config.root == "elsewhere"
    assert config.compute.workers == 2, "what only the preset says stays"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vq.trian.images=3", r"unknown key: vq\.trian\nhint: did you mean vq\.train\?"),
        ("dada.source=x", r"unknown key: dada\nhint: did you mean data\?"),
        ("vq.train.images=many", r"vq\.train\.images: .*integer.*'many'\nhint: "),
        ("vq.train.images=0", r"vq\.train\.images: .*greater than or equal to 1, not 0\nhint: "),
        ("data.image_size=[30,30]", r"image_size must be a multiple of the coarsest stride \(16\): \[30, 30\]\nhint: "),
        ("vq.model.strides=[16,8,3]", r"each of strides must be a multiple of the next: \[16, 8, 3\]\nhint: "),
        ("vq.model.strides=[4,8,16]", r"strides must not grow from level to level, coarse first: \[4, 8, 16\]\nhint: "),
        ("vq.model.codebook_sizes=[64]", r"codebook_sizes must have one entry a level \(3\): \[64\]\nhint: "),
        ("vq.model.codebook_sizes=[64,64,1]", r"codebook_sizes must be at least 2 each: \[64, 64, 1\]\nhint: "),
        ("compute.workers=3", r"vq\.train\.global_batch must be a multiple of .*\(8 x 3\): 16\nhint: the nearest is"),
        ("prior.model.width=100", r"width must be a multiple of 4 x heads \(16\).*: 100\nhint: width=96"),
        ("data.test_share=0.95", r"must leave something to train on: 0\.06 \+ 0\.95\nhint: "),
        ("seed", r"--set takes key=value with a dotted key: seed\nhint: "),
        ("seed=[1", r"--set seed: the value is not valid YAML: \[1\nhint: "),
    ],
)
def test_what_is_wrong_is_named_with_a_hint(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("tiny", None, [override])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no such preset: tyni .*\nhint: did you mean --preset tiny\?"):
        load_config("tyni")


def test_a_missing_or_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such configuration file: .*absent\.yaml\nhint: "):
        load_config(None, tmp_path / "absent.yaml")
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(InputError, match=r"must hold keys and values, not a list\nhint: "):
        load_config(None, file)


def test_an_override_reads_its_value_as_yaml() -> None:
    assert parse_override("vq.model.strides=[8, 4]") == {"vq": {"model": {"strides": [8, 4]}}}
    assert parse_override("tracking.uri=null") == {"tracking": {"uri": None}}


def test_every_setting_is_documented() -> None:
    text = to_yaml(RunConfig()).splitlines()
    settings = [line for line in text if not line.lstrip().startswith("#")]
    assert len(settings) > 80
    comments = [line for line in text if line.lstrip().startswith("#")]
    assert len(comments) == len(settings)


def test_passwords_in_urls_are_not_shown() -> None:
    config = load_config("tiny", None, ["tracking.uri=http://me:secret@server:5000"])
    assert "secret" not in to_yaml(masked(config))
    assert masked(config).tracking.uri == "http://me:***@server:5000"
