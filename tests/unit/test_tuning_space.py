"""Search spaces: draws, their configurations, constraints, and what a file can get wrong."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig
from hvqd_model.prior.prior import HierarchicalPrior
from infra.errors import InputError
from tests.tiny_training import prior_settings, prior_stage, vq_settings, vq_stage
from tuning.loading import load_space, space_from, space_names
from tuning.parameters import Parameter, RandomSuggester
from tuning.quantities import MEANINGS, estimate_memory, parameters
from tuning.reported import REPORTED, check_reported
from tuning.space import Drawn, Refusal, SearchSpace
from workflows.loading import load_config
from workflows.training.plain import PlainEngine
from workflows.training.vq_stage import VQStage

TOKENIZERS: dict[str, Any] = {
    "name": "tokenizers",
    "base": {"preset": "integration", "set": {"vq.train.learning_rate": 0.002}},
    "job": "vq",
    "parameters": {
        "levels": {"choice": [1, 2], "ordered": True},
        "stride": {"key": "vq.model.strides", "choice": [[4], [8]], "when": "levels == 1"},
        "strides": {"key": "vq.model.strides", "choice": [[8, 4], [16, 4]], "when": "levels == 2"},
        "vq.model.codebook_sizes": {"log_int": [8, 64], "length": "levels"},
        "vq.model.level_dropout": {"uniform": [0.0, 0.3], "when": "levels > 1"},
        "vq.model.quantizer": {"choice": ["ema", "simvq"]},
    },
    "constraints": ["tokens <= 17"],
    "metrics": [{"name": "cost", "expression": "10 ** (-val_psnr / 10) + 0.01 * bits_per_pixel"}],
    "budget": {"trials": 4, "images": 640, "min_images": 160},
}


def space(**changes: Any) -> SearchSpace:
    return space_from({**TOKENIZERS, **changes}, "space.yaml")


def with_parameters(**parameters: Any) -> SearchSpace:
    return space(parameters={**TOKENIZERS["parameters"], **parameters})


def draws(found: SearchSpace, count: int = 60) -> list[Drawn]:
    generator = np.random.default_rng(0)
    return [found.draw_any(generator) for _ in range(count)]


# ---- draws ----


def test_a_list_has_as_many_entries_as_its_length_says_and_conditions_hold() -> None:
    found = draws(space())
    assert {drawn["levels"] for drawn in found} == {1, 2}
    for drawn in found:
        levels = drawn["levels"]
        assert len(drawn["vq.model.codebook_sizes"]) == levels
        assert ("stride" in drawn, "strides" in drawn) == (levels == 1, levels == 2)
        assert ("vq.model.level_dropout" in drawn) == (levels == 2)


def test_a_length_may_be_a_list_whose_length_is_meant() -> None:
    parameters = {
        "vq.model.strides": {"choice": [[8], [8, 4]]},
        "vq.model.codebook_sizes": {"choice": [16, 32], "length": "vq.model.strides"},
    }
    for drawn in draws(space(parameters=parameters)):
        assert len(drawn["vq.model.codebook_sizes"]) == len(drawn["vq.model.strides"])


def test_the_same_seed_draws_the_same_trials() -> None:
    assert draws(space()) == draws(space())


def test_the_order_in_the_file_matters_to_no_condition() -> None:
    backwards = dict(reversed(TOKENIZERS["parameters"].items()))
    for drawn in draws(space(parameters=backwards)):
        assert list(drawn) == [name for name in backwards if name in drawn]
        assert len(drawn["vq.model.codebook_sizes"]) == drawn["levels"]


def test_draws_keep_to_their_ranges_and_spread_as_their_kind_says() -> None:
    kinds = {
        "a": {"int": [3, 6]},
        "b": {"log_int": [1, 100]},
        "c": {"uniform": [-1.0, 1.0]},
        "d": {"log_uniform": [1e-4, 1.0]},
        "e": {"choice": ["x", "y"]},
    }
    found = draws(space(parameters=kinds, constraints=[]), 4000)
    columns = {name: [drawn[name] for drawn in found] for name in kinds}
    assert set(columns["a"]) == {3, 4, 5, 6}
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in Counter(columns["a"]).values())
    assert min(columns["b"]) == 1 and max(columns["b"]) == 100
    assert abs(float(np.median(columns["b"])) - 7) <= 1  # half of log(0.5) to log(100.5)
    assert abs(float(np.mean(columns["c"]))) < 0.05 and min(columns["c"]) >= -1 and max(columns["c"]) <= 1
    assert abs(float(np.median(np.log10(columns["d"]))) + 2) < 0.1
    assert abs(columns["e"].count("x") / 4000 - 0.5) < 0.03


def test_the_grid_is_every_combination_once() -> None:
    found = space(
        parameters={
            "levels": {"choice": [1, 2]},
            "stride": {"key": "vq.model.strides", "choice": [[4], [8]], "when": "levels == 1"},
            "vq.model.codebook_sizes": {"choice": [8, 16, 32], "length": "levels"},
        }
    )
    combinations = list(found.grid())
    one = [{"levels": 1, "stride": [s], "vq.model.codebook_sizes": [k]} for s in (4, 8) for k in (8, 16, 32)]
    two = [{"levels": 2, "vq.model.codebook_sizes": [a, b]} for a in (8, 16, 32) for b in (8, 16, 32)]
    assert combinations == one + two
    assert found.count() == 15


def test_a_grid_takes_points_of_a_range() -> None:
    found = space(parameters={"vq.train.learning_rate": {"log_uniform": [0.0001, 0.01]}}, constraints=[])
    rates = [drawn["vq.train.learning_rate"] for drawn in found.grid(points=3)]
    assert rates == pytest.approx([0.0001, 0.001, 0.01])
    assert found.count() is None


def test_flat_values_come_back_as_the_same_draw() -> None:
    found = space()
    for drawn in draws(found):
        flat = found.flat(drawn)
        assert all(value is None or isinstance(value, bool | int | float | str) for value in flat.values())
        assert found.from_flat(flat) == drawn
        assert found.contains(drawn)


def test_a_draw_of_another_space_is_not_contained() -> None:
    found = space()
    drawn = draws(found)[0]
    assert not found.contains({**drawn, "vq.model.quantizer": "fsq"})
    assert not found.contains({**drawn, "more": 1})
    assert not found.contains({name: value for name, value in drawn.items() if name != "levels"})
    with pytest.raises(
        InputError, match=r"vq.model.quantizer cannot be \"fsq\".*\nhint: choice \[\"ema\", \"simvq\"\]"
    ):
        found.flat({**drawn, "vq.model.quantizer": "fsq"})
    with pytest.raises(InputError, match=r"has no parameter leves\nhint: did you mean levels\?"):
        found.flat({"leves": 1})
    with pytest.raises(InputError, match=r"needs a value of strides?\nhint: the space has changed"):
        found.from_flat({"levels": 1})
    with pytest.raises(InputError, match=r"does not ask for extra here\nhint: the space has changed"):
        found.from_flat({**found.flat(drawn), "extra": 1})
    with pytest.raises(InputError, match=r"codebook_sizes cannot be \[7000\]: 7000 is outside 8 to 64"):
        found.flat({"vq.model.codebook_sizes": [7000]})


def test_optuna_is_asked_for_just_what_applies() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = space()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        trial = study.ask()
        drawn = found.suggest(trial)
        assert trial.params == found.flat(drawn)
        study.tell(trial, 1.0)


# ---- configurations ----


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_overrides_resolve_to_the_very_configuration(seed: int) -> None:
    found = space(constraints=[])
    drawn = found.draw_any(np.random.default_rng(seed))
    base = ["vq.train.learning_rate=0.002"]
    assert load_config("integration", None, [*base, *found.overrides(drawn)]) == found.configuration(drawn)


def test_the_budget_sets_images_and_intervals_of_the_searched_stage() -> None:
    found = space()
    config = found.configuration(draws(found)[0])
    train = config.vq.train
    assert (train.images, train.evaluate_every_images, train.checkpoint_every_images) == (640, 160, 160)
    assert config.prior.train == found.resolved_base.prior.train
    assert found.rungs == (160, 320, 640)


def test_rungs_without_a_budget_follow_the_base() -> None:
    found = space(budget={"reduction_factor": 4})
    assert found.images == 640
    assert found.rungs == (40, 160, 640)


def test_computed_settings_follow_the_parameters() -> None:
    found = space(
        parameters={"width": {"key": "prior.model.width", "choice": [32, 64]}, "kind": {"choice": ["a", "b"]}},
        computed={"prior.model.heads": "width // 32", "prior.model.depth": '3 if kind == "a" else 5'},
        constraints=[],
    )
    for drawn in draws(found, 10):
        model = found.configuration(drawn).prior.model
        assert model.heads == drawn["width"] // 32
        assert model.depth == {"a": 3, "b": 5}[drawn["kind"]]


def test_the_base_can_be_another_preset_and_other_settings() -> None:
    found = space_from(TOKENIZERS, "space.yaml", preset="tiny", overrides=["vq.model.width=40"])
    assert found.resolved_base.data.image_size == (32, 32)
    assert found.resolved_base.vq.model.width == 40
    assert found.resolved_base.vq.train.learning_rate == 0.002  # the space's own settings stay


# ---- constraints ----


def test_drawn_trials_satisfy_the_constraints_and_refused_ones_say_which() -> None:
    found = space()
    generator = np.random.default_rng(3)
    for _ in range(20):
        assert found.configuration(found.draw(generator, memory=None)).vq_config.tokens <= 17
    large = {"levels": 2, "strides": [8, 4], "vq.model.codebook_sizes": [8, 8], "vq.model.quantizer": "ema"}
    with pytest.raises(Refusal, match=r"the constraint tokens <= 17 does not hold: tokens=20\nhint:") as caught:
        found.check(large)
    assert caught.value.reason == "tokens <= 17"


def test_a_configuration_that_cannot_be_is_refused_before_it_costs_anything() -> None:
    found = with_parameters(strides={"key": "vq.model.strides", "choice": [[4, 8]], "when": "levels == 2"})
    drawn = {"levels": 2, "strides": [4, 8], "vq.model.codebook_sizes": [8, 8], "vq.model.quantizer": "ema"}
    with pytest.raises(
        Refusal, match=r"strides must not grow from level to level, coarse first: \[4, 8\]\nhint:"
    ) as caught:
        found.check(drawn)
    assert caught.value.reason == "vq.model: strides must not grow from level to level, coarse first"


def test_a_constraint_over_a_parameter_that_does_not_apply_holds() -> None:
    found = space(constraints=["strides[0] >= 16"])
    for drawn in (found.draw(np.random.default_rng(seed), memory=None) for seed in range(20)):
        assert drawn["levels"] == 1 or drawn["strides"] == [16, 4]


def test_constraints_may_ask_for_any_setting() -> None:
    found = space(constraints=["vq.train.micro_batch * 4 <= tokens * sum(vq.model.codebook_sizes)"])
    for seed in range(10):
        config = found.configuration(found.draw(np.random.default_rng(seed), memory=None))
        assert config.vq_config.tokens * sum(config.vq_config.codebook_sizes) >= 64


def test_memory_is_estimated_last_and_a_refusal_by_it_counts_for_many() -> None:
    asked = []

    def estimate(config: object, job: object) -> float:
        asked.append(config)
        return 3.0

    found = space(constraints=["memory_gib <= 2", "tokens <= 4"])
    with pytest.raises(
        InputError, match=r"none of .* draws is possible: .*memory_gib <= 2 \(2\d times\).*\nhint: widen"
    ):
        found.draw(np.random.default_rng(0), estimate)
    assert 10 <= len(asked) <= 25
    assert space(constraints=["memory_gib <= 2"]).draw(np.random.default_rng(0), lambda config, job: 1.0)


def test_what_nothing_satisfies_is_said_after_a_bounded_number_of_draws() -> None:
    with pytest.raises(
        InputError,
        match=r"none of 1,000 draws is possible: tokens <= 3 \(1000 times\)\nhint: .*does not hold: tokens=\d+",
    ):
        space(constraints=["tokens <= 3"])


# ---- quantities and metrics ----


def test_quantities_agree_with_models_that_were_built() -> None:
    config = load_config("integration")
    vq = config.vq_config
    tokenizer = HierarchicalVQ(vq)
    assert parameters(config, "vq") == sum(weight.numel() for weight in tokenizer.parameters())
    prior = HierarchicalPrior(
        PriorConfig(
            **config.prior.model.model_dump(),
            grids=vq.grids,
            codebook_sizes=vq.codebook_sizes,
            code_dim=vq.code_dims,
        )
    )
    trained = sum(weight.numel() for weight in prior.parameters() if weight.requires_grad)
    assert parameters(config, "prior") == trained
    found = space(constraints=[], metrics=[{"name": name, "expression": name} for name in MEANINGS])
    drawn = {"levels": 2, "strides": [8, 4], "vq.model.codebook_sizes": [16, 64], "vq.model.quantizer": "ema"}
    measured = found.measured({"val_psnr": 20.0}, found.configuration(drawn), lambda config, job: 1.5)
    by_hand = {"levels": 2, "tokens": 4 + 16, "bits": 4 * 4 + 16 * 6, "pixels": 256, "bits_per_pixel": 112 / 256}
    assert {name: measured[name] for name in by_hand} == by_hand
    assert measured["memory_gib"] == 1.5


def test_the_memory_estimate_is_the_planners() -> None:
    from workflows.planning.planner import estimate

    config = load_config("integration", overrides=["prior.model.depth=1"])
    plan = estimate(config, advise=False)
    assert estimate_memory(config, "joint") == pytest.approx(plan.memory_gib, rel=1e-6)
    slower = load_config("integration", overrides=["vq.train.learning_rate=0.5", "sampling.steps=3"])
    assert estimate_memory(slower, "vq") == estimate_memory(config, "vq")


def test_a_metric_is_worked_out_from_what_was_reported() -> None:
    found = space()
    drawn = {"levels": 1, "stride": [4], "vq.model.codebook_sizes": [64], "vq.model.quantizer": "ema"}
    config = found.configuration(drawn)
    measured = found.measured({"val_psnr": 20.0}, config)
    assert measured["cost"] == pytest.approx(0.01 + 0.01 * 16 * 6 / 256)
    assert "cost" not in found.measured({"loss": 1.0}, config)  # before codebooks have started


def test_each_stage_reports_the_figures_that_spaces_may_ask_for() -> None:
    reported: dict[str, set[str]] = {}
    for stage in (vq_stage(vq_settings(2)), prior_stage(prior_settings(2))):
        if isinstance(stage, VQStage):
            for level, size in enumerate(stage.model.config.codebook_sizes):
                stage.model.start_codebook(level, torch.randn(4 * size, 8), level)
        stage.objective.eval()
        with torch.no_grad():
            reported[stage.name] = set(
                stage.evaluate(PlainEngine(stage.objective, stage.settings, torch.device("cpu")))
            )
    for job in ("vq", "prior"):
        asked = [name.replace("N", "1") for name in REPORTED[job] if "kid" not in name and "recall" not in name]
        missing = set(asked) - reported[job] - {"val_perceptual"}  # reported where its weight is not 0
        assert missing == set(), job
        for name in asked:
            check_reported(job, name, "metrics")


# ---- bad input ----


def test_ready_spaces_load_and_every_draw_is_a_configuration_or_refused_with_a_reason() -> None:
    assert space_names() == ["joint", "prior", "vq"]
    for name in space_names():
        found = load_space(name)
        assert found.name == name and found.about
        possible = 0
        for drawn in draws(found, 40):
            try:
                found.check(drawn, memory=None)
            except Refusal as refusal:
                assert refusal.reason
            else:
                possible += 1
        assert possible >= 10, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, r"parameters must name at least one: none\nhint:"),
        ({"metrics": []}, r"metrics must name at least one: none\nhint:"),
        ({"metrix": []}, r"unknown key: metrix\nhint: did you mean metrics\?"),
        ({"budget": {"trails": 3}}, r"unknown key: budget.trails\nhint: did you mean budget.trials\?"),
        ({"job": "both"}, r"job: input should be 'vq', 'prior' or 'joint', not 'both'\nhint:"),
        ({"base": {"preset": "tinny"}}, r"no such preset: tinny .*\nhint: did you mean --preset tiny\?"),
        ({"base": {"set": {"vq.model.widht": 3}}}, r"unknown key: vq.model.widht\nhint: did you mean vq.model.width\?"),
        (
            {"budget": {"images": 100, "min_images": 200}},
            r"min_images must be at most images \(100\): 200\nhint: .*25",
        ),
        ({"constraints": ["tokns < 3"]}, r"constraint 1: unknown name: tokns\nhint: did you mean tokens\?"),
        ({"constraints": ["tokens <"]}, r"constraint 1 is not an expression"),
        ({"metrics": [{"name": "val_psrn"}]}, r"job vq does not report val_psrn\nhint: did you mean val_psnr\?"),
        (
            {"metrics": [{"name": "val_bits_total"}]},
            r"job vq does not report val_bits_total\nhint: it reports val_psnr",
        ),
        (
            {"metrics": [{"name": "c", "expression": "val_psnr + byts"}]},
            r"metric c: job vq does not report byts\nhint: it reports",
        ),
        ({"metrics": [{"name": "val_psnr"}, {"name": "val_psnr"}]}, r"different names: val_psnr\nhint:"),
        ({"computed": {"vq.train.images": "3"}}, r"computed must not set .* sets: vq.train.images\nhint:"),
        ({"parameters": 3}, r"parameters must be a group of names, not 3\nhint:"),
    ],
)
def test_a_wrong_space_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        space(**changes)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("vq.model.codebok_sizes", {"choice": [1]}, r"unknown key: .*\nhint: did you mean vq.model.codebook_sizes\?"),
        ("model.code_dim", {"choice": [1]}, r"unknown key: model.code_dim\nhint: did you mean vq.model.code_dim\?"),
        ("x", {"key": "vq.width", "choice": [1]}, r"unknown key: vq.width\nhint: did you mean vq.model.width\?"),
        ("tracking.uri", {"choice": ["a"]}, r"a sweep sets tracking.uri itself\nhint:"),
        ("vq.train.images", {"int": [1, 2]}, r"leave vq.train.images to the budget: .*\nhint: set budget.images"),
        ("x", {"choise": [1]}, r"unknown key: choise\nhint: did you mean choice\?"),
        ("x", {"choice": []}, r"choice must name at least one value: \[\]\nhint:"),
        ("x", {"choice": [1, 1]}, r"choice must name different values: \[1, 1\]\nhint:"),
        ("x", {}, r"one of choice, int.* must say what it can be: none is given\nhint:"),
        ("x", {"choice": [1], "int": [1, 2]}, r"what it can be: choice, int\nhint:"),
        ("x", {"int": [5, 2]}, r"int must rise, \[low, high\]: \[5, 2\]\nhint: int: \[2, 5\]"),
        ("x", {"uniform": [1.0, 1.0]}, r"uniform must rise"),
        ("x", {"int": [1.5, 2]}, r"int must be \[low, high\], two whole numbers: \[1.5, 2\]\nhint:"),
        ("x", {"uniform": [1]}, r"uniform must be \[low, high\], two numbers: \[1\]\nhint:"),
        ("x", {"uniform": [0, math.inf]}, r"two numbers: \[0, Infinity\]\nhint:"),
        ("x", {"log_uniform": [0, 1]}, r"log_uniform must begin above 0: \[0, 1\]\nhint:"),
        ("x", {"int": [1, 2], "ordered": True}, r"ordered is for a choice, int has an order: true\nhint:"),
        ("x", {"int": [1, 2], "when": "levls == 1"}, r"x.when: unknown name: levls\nhint: did you mean levels\?"),
        ("x", {"int": [1, 2], "length": "tokens"}, r"x.length: unknown name: tokens\nhint:"),
        ("x", {"int": [1, 2], "when": "x == 1"}, r"must not wait for each other in a circle: x\nhint:"),
        ("x", {"int": [1, 2], "length": "levels - 1"}, r"x.length must be a count of at least 1, or a list: 0\nhint:"),
        ("x", {"int": [1, 2], "length": "stride"}, r"x.length asks for stride, which does not apply here\nhint:"),
        ("x", {"key": "vq.model.strides", "choice": [[8]]}, r"stride.? and x both set vq.model.strides\nhint: give"),
    ],
)
def test_a_wrong_parameter_is_explained(name: str, parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        with_parameters(**{name: parameter})
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_no_space_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such search space: vqq \(ready ones are joint, prior, vq\)\nhint:"):
        load_space("vqq")
    file = tmp_path / "space.yaml"
    file.write_text("a: [")
    with pytest.raises(InputError, match=r"space.yaml is not valid YAML: .*\nhint: `hvqd tune show vq --yaml`"):
        load_space(file)
    file.write_text("- 1")
    with pytest.raises(InputError, match=r"space.yaml must hold keys and values, not list\nhint:"):
        load_space(file)
    file.write_text(yaml.safe_dump(TOKENIZERS))
    assert load_space(file) == space()


def test_a_value_that_no_suggester_can_give_back_is_refused() -> None:
    parameter = Parameter(int=(1, 4))
    assert parameter.suggest("x", RandomSuggester(np.random.default_rng(0))) in (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"2\.5 is no number of the range"):
        parameter.flat(2.5)
