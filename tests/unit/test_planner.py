"""Plans: memory by ZeRO stage, traffic, the least change that fits, prices, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hvqd_model.codec.hierarchy import HierarchicalVQ
from infra.errors import InputError
from tests.command_line import environment, run_hvqd
from workflows.config import RunConfig, TrainSettings
from workflows.loading import config_from, load_config
from workflows.planning.advice import changed_config, least_change
from workflows.planning.footprint import Footprint
from workflows.planning.model_walk import Pictures, StageFootprint, StageName, _prior, stage_footprint
from workflows.planning.planner import GIB, Machine, estimate, memory_of, plan_stage, wire_bytes
from workflows.planning.prices import BUNDLED, Device, Prices, read_prices
from workflows.planning.text import plan_text

PARAMETERS = 1_000_000
WALKED = StageFootprint(PARAMETERS, 0, 0, Footprint(transient_bytes=50_000, growing_bytes=PARAMETERS * 4 + 60_000))
KNOWN = Pictures(1_000, 3)


def small_config(**changes: object) -> RunConfig:
    """Two workers, models of a few thousand weights."""
    train = {"images": 64, "global_batch": 32, "micro_batch": 16, "precision": "fp32", "zero_stage": 1}
    values = {
        "data": {"image_size": [16, 16]},
        "vq": {"model": {"codebook_sizes": [16, 16], "width": 16, "code_dim": 8}, "train": train},
        "prior": {"model": {"width": 64, "depth": 2, "heads": 2}, "train": train},
        "compute": {"workers": 2},
    }
    config = config_from(values)
    return changed_config(config, dict(changes)) if changes else config


def table(memory_gib: float, **device: float) -> Prices:
    prices = read_prices()
    cpu = prices.devices["cpu"].model_copy(update={"memory_gib": memory_gib, "reserved_gib": 0.0, **device})
    return prices.model_copy(update={"devices": {"cpu": cpu}})


@pytest.mark.parametrize(
    ("zero", "bytes_a_parameter"),
    [(0, 4 + 4 + 8), (1, 4 + 4 + 12 / 4), (2, 4 + (8 + 12) / 4), (3, (4 + 8 + 12) / 4)],
)
def test_state_follows_from_parameters_by_zero_stage(zero: int, bytes_a_parameter: float) -> None:
    settings = TrainSettings.model_validate({"zero_stage": zero, "global_batch": 64, "micro_batch": 16})
    memory = memory_of(settings, WALKED, 4, on_gpu=False)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state == pytest.approx(bytes_a_parameter * PARAMETERS)
    assert memory.average == 0


def test_the_average_is_sharded_as_the_optimizer_is() -> None:
    settings = TrainSettings(ema_half_life_images=100, zero_stage=2, global_batch=64, micro_batch=16)
    assert memory_of(settings, WALKED, 4, on_gpu=False).average == PARAMETERS
    alone = settings.model_copy(update={"global_batch": 16})
    assert memory_of(alone, WALKED, 1, on_gpu=False).average == 4 * PARAMETERS


def test_a_checkpointed_prior_on_a_cpu_is_planned_without_the_heaps_fragments() -> None:
    config = load_config("integration")
    changed = changed_config(config, {"prior.model.activation_checkpointing": True})

    def share(found: RunConfig, stage: StageName) -> float:
        machine = Machine("cpu", read_prices().devices["cpu"], read_prices().shares)
        memory = plan_stage(found, stage, stage_footprint(found, stage, KNOWN), machine).memory
        return memory.fragments / (memory.activations + memory.exchange)

    assert share(changed, "prior") < 0.1 < 0.3 < share(config, "prior")
    assert share(changed, "vq") == share(config, "vq") > 0.3


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    settings = TrainSettings(offload_optimizer=True, zero_stage=2, global_batch=64, micro_batch=16)
    assert memory_of(settings, WALKED, 4, on_gpu=True).optimizer == 0


def test_one_worker_sends_nothing_and_more_send_what_their_zero_stage_does() -> None:
    assert all(wire_bytes(PARAMETERS, 0, 1, zero, 2) == 0 for zero in range(4))
    unit = 4 * PARAMETERS * 3 / 4
    sent = [wire_bytes(PARAMETERS, 0, 4, zero, accumulation=2) / unit for zero in range(4)]
    assert sent == [2, 2, 3, 6]


def test_parameters_are_those_of_the_model() -> None:
    config = small_config()
    real = HierarchicalVQ(config.vq_config)
    walked = stage_footprint(config, "vq", KNOWN)
    assert walked.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert walked.buffer_bytes == sum(b.numel() * b.element_size() for b in real.buffers())


@pytest.mark.parametrize(
    ("judge", "least_operations"),
    [
        ({"vq.train.perceptual_weight": 0.5}, 200),
        ({"vq.train.adversarial.weight": 0.1, "vq.train.images": 1_600, "vq.train.evaluate_every_images": 320}, 50),
    ],
    ids=["features", "adversary"],
)
def test_what_judges_reconstructions_is_planned_too(judge: dict[str, object], least_operations: int) -> None:
    plain, judged = (stage_footprint(small_config(**changes), "vq", KNOWN) for changes in ({}, judge))
    assert judged.parameters == plain.parameters, "the tokenizer's own"
    assert judged.micro.operations >= plain.micro.operations + least_operations
    assert judged.micro.transient_bytes > plain.micro.transient_bytes
    assert judged.micro.total_flops > 1.1 * plain.micro.total_flops


def test_a_deep_prior_lies_on_the_line_through_two_shallow_ones() -> None:
    config = small_config(**{"prior.model.depth": 7})
    continued, walked = stage_footprint(config, "prior", KNOWN), _prior(config, KNOWN, 7)
    assert continued.parameters == walked.parameters
    assert continued.micro.operations == walked.micro.operations
    assert continued.micro.total_flops == pytest.approx(walked.micro.total_flops)
    assert continued.micro.transient_bytes == pytest.approx(walked.micro.transient_bytes, rel=0.02)


def test_activations_grow_with_the_micro_batch_and_state_does_not() -> None:
    plans = [
        estimate(
            small_config(**{"vq.train.global_batch": 64, "vq.train.micro_batch": micro}), pictures=KNOWN, advise=False
        ).stages[0]
        for micro in (8, 16)
    ]
    small, large = (plan.memory for plan in plans)
    assert 1.6 < large.activations / small.activations < 2.2
    assert (large.weights, large.optimizer) == (small.weights, small.optimizer)
    assert [plan.accumulation for plan in plans] == [4, 2]


def test_a_plan_that_fits_proposes_nothing() -> None:
    plan = estimate(small_config(), prices=table(4), pictures=KNOWN)
    assert plan.fits and plan.changes == ()
    assert plan_text(plan).endswith("it fits")
    assert plan.memory_gib == pytest.approx(max(stage.memory.total for stage in plan.stages) / GIB)


def test_the_least_change_is_a_smaller_micro_batch_where_that_is_enough() -> None:
    config = small_config()
    now = estimate(config, prices=table(4), pictures=KNOWN)
    room = (now.stages[1].memory.total - now.stages[1].memory.activations // 3) / GIB
    plan = estimate(config, prices=table(room), pictures=KNOWN)
    assert not plan.fits
    assert [change.settings for change in plan.changes if change.stage == "prior"] == [{"prior.train.micro_batch": 8}]
    for change in plan.changes:
        changed = estimate(changed_config(config, change.settings), prices=table(room), pictures=KNOWN, advise=False)
        assert not any(problem.startswith(change.stage) for problem in changed.problems), "what is proposed fits"
    assert "least change: --set prior.train.micro_batch=8" in plan_text(plan)


def machine(memory_gib: float) -> Machine:
    prices = table(memory_gib)
    return Machine("cpu", prices.devices["cpu"], prices.shares)


def test_without_a_smaller_micro_batch_the_state_is_sharded() -> None:
    config = small_config(**{"prior.train.micro_batch": 1, "prior.train.global_batch": 2, "prior.model.width": 128})
    plans = {
        zero: plan_stage(
            changed := changed_config(config, {"prior.train.zero_stage": zero}),
            "prior",
            stage_footprint(changed, "prior", KNOWN),
            machine(4),
        ).memory.total
        for zero in (1, 2, 3)
    }
    assert plans[2] < plans[1]
    found = least_change(config, "prior", KNOWN, machine(plans[2] * 1.01 / GIB))
    assert found is not None
    assert len(found.settings) == 1 and found.settings.get("prior.train.micro_batch") is None


def test_what_no_change_can_do_is_said() -> None:
    plan = estimate(small_config(), prices=table(1e-5), pictures=KNOWN)
    assert plan.changes == ()
    assert "no change of prior fits: it takes more workers, or a device with more memory" in plan_text(plan)


def test_cost_is_hours_times_devices_times_price() -> None:
    config = small_config()
    plan = estimate(config, prices=table(4, hour=2.0), pictures=KNOWN)
    training = sum(stage.hours for stage in plan.stages)
    assert plan.cost == pytest.approx(2.0 * (2 * training + plan.other_hours))
    assert plan.other_hours > 0 and plan.hours == pytest.approx(training + plan.other_hours / 2), "both encode and draw"


def test_the_preset_for_one_gpu_fits_a_small_one() -> None:
    plan = estimate(load_config("small"), device="l4-24gb", advise=False)
    assert (plan.device, plan.fits, plan.devices) == ("l4-24gb", True, 1)


# ---- prices ----


def test_every_device_of_the_table_is_typed() -> None:
    prices = read_prices()
    assert len(prices.devices) >= 8
    assert all(isinstance(device, Device) for device in prices.devices.values())


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "prices.yaml"


def test_a_table_that_is_missing_broken_or_wrong_is_named(broken: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the price table .*prices\.yaml.*\nhint: copy .*prices\.yaml"):
        read_prices(broken)
    broken.write_text("devices: [")
    with pytest.raises(InputError, match=r"is not valid YAML"):
        read_prices(broken)
    broken.write_text(BUNDLED.read_text().replace("memory_gib: 16,", "memory_gib: -1,"))
    with pytest.raises(InputError, match=r"devices\.t4-16gb\.memory_gib: input should be greater than 0"):
        read_prices(broken)


def test_a_device_that_is_not_in_the_table_is_named_with_those_that_are() -> None:
    with pytest.raises(
        InputError, match=r"no such device in the price table: abacus \(cpu, t4-16gb.*\nhint: choose one"
    ):
        estimate(small_config(), device="abacus", pictures=KNOWN)


# ---- the command ----


def test_the_command_plans_and_touches_nothing(tmp_path: Path) -> None:
    done = run_hvqd(
        *("plan", "--preset", "integration", "--root", str(tmp_path / "root"), "--json"),
        cwd=tmp_path,
        env=environment(tmp_path, {"HVQD_LOGS": str(tmp_path / "logs")}),
    )
    plan = done.succeeded().answer["plan"]
    assert plan["fits"] is True
    assert [stage["stage"] for stage in plan["stages"]] == ["vq", "prior"]
    assert plan["stages"][0]["steps"] * plan["stages"][0]["global_batch"] == 640
    assert not (tmp_path / "root").exists()
