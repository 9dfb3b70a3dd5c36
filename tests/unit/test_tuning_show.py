"""What `hvqd tune show` tells of a space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import environment, run_hvqd
from tuning.loading import space_from
from tuning.show import describe

SMALL: dict[str, Any] = {
    "name": "small",
    "about": "Two levels or one.",
    "base": {"preset": "integration"},
    "job": "vq",
    "parameters": {
        "levels": {"choice": [1, 2], "ordered": True},
        "strides": {"key": "vq.model.strides", "choice": [[8], [4]], "when": "levels == 1"},
        "vq.model.codebook_sizes": {"choice": [16, 32], "length": "levels"},
    },
    "computed": {"vq.model.code_dim": "8 * levels"},
    "constraints": ["tokens <= 20", "bits < 90"],
    "metrics": [{"name": "val_psnr", "direction": "max"}],
    "budget": {"trials": 5, "images": 640, "min_images": 160},
}


def test_counts_reasons_and_examples_are_those_of_the_space() -> None:
    space = space_from(SMALL, "space.yaml")
    shown = describe(space, examples=2)
    told = shown.as_json()
    assert told["combinations"] == 2 * 2 + 4
    assert told["draws"]["tried"] == 200
    assert told["draws"]["possible"] + sum(told["draws"]["refused"].values()) == 200
    assert set(told["draws"]["refused"]) == {"bits < 90"}
    assert told["images_at_most"] == 5 * 640
    assert told["rungs"] == [160, 320, 640]
    assert len(told["examples"]) == 2
    for example in told["examples"]:
        assert space.check(example["drawn"], memory=None)
        assert example["quantities"]["bits"] < 90
    assert json.loads(json.dumps(told)) == told


def test_the_text_names_every_parameter_constraint_and_metric() -> None:
    text = describe(space_from(SMALL, "space.yaml"), examples=1).as_text(width=120)
    for word in (
        *SMALL["parameters"],
        *SMALL["constraints"],
        "small: Two levels or one.",
        "max val_psnr",
        "vq.model.code_dim",
    ):
        assert word in text
    assert "when levels == 1" in text and "length levels" in text and "2 each" in text
    assert "combinations  8" in text and "3,200 images at most" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_real_number_makes_the_combinations_endless() -> None:
    parameters = {"vq.train.learning_rate": {"log_uniform": [0.001, 0.01]}}
    changed = {**SMALL, "parameters": parameters, "computed": {}, "constraints": []}
    shown = describe(space_from(changed, "space.yaml"), examples=1)
    assert shown.as_json()["combinations"] is None
    assert "endless" in shown.as_text(100)


@pytest.mark.parametrize("change", [{}, {"parameters": {"vq.model.widht": {"choice": [16]}}}])
def test_the_command_answers_as_a_program_expects(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**SMALL, **change}))
    done = run_hvqd("tune", "show", "space.yaml", "--json", cwd=tmp_path, env=environment(tmp_path))
    if change:
        assert done.status == 2
        assert done.err.splitlines()[-1] == "hint: did you mean vq.model.width?"
        assert done.answer["error"].endswith("unknown key: vq.model.widht")
    else:
        assert done.succeeded().answer["combinations"] == 8
