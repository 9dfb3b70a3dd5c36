"""Judges beyond pixels in training: gradients against plain autograd, an adversary's life, guard and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvqd_model.codec.discriminator import adversarial_loss, discriminator_loss
from infra.storage import open_store
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, vq_settings, vq_stage
from workflows.config import AdversarialSettings, VQTrainSettings
from workflows.training.adversary import Adversary
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.judges import build_judges
from workflows.training.loop import train
from workflows.training.plain import PlainEngine
from workflows.training.precision import Precision
from workflows.training.stage import Evidence, Position
from workflows.training.vq_stage import VQStage

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
STEPS = 8
START = 0.5


def settings_of(steps: int = STEPS, adversarial: dict[str, Any] | None = None, **changes: Any) -> VQTrainSettings:
    """Codebooks from the first step, an adversary from half of the budget, an evaluation after every step."""
    group = AdversarialSettings(**({"weight": 0.5, "start": START, "width": 8} | (adversarial or {})))
    base = {"codebook_start": 0.0, "evaluate_every_images": GLOBAL_BATCH, "adversarial": group}
    return vq_settings(steps, **(base | changes))


def stage_of(weights: int = 0, **settings: Any) -> VQStage:
    return vq_stage(settings_of(**settings), weights, attention=False)


def engine_of(stage: VQStage) -> PlainEngine:
    return PlainEngine(stage.objective, stage.settings, CPU)


def adversary_of(stage: VQStage) -> Adversary:
    assert stage.companion is not None
    return stage.companion


def everything(engine: PlainEngine, adversary: Adversary) -> dict[str, Tensor]:
    """Every tensor and number that training goes on from, copied."""
    found = {f"model.{name}": tensor.clone() for name, tensor in engine.module.state_dict().items()}
    for index, state in engine.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value.clone() for name, value in state.items()}
    kept = adversary.state_dict()
    found |= {f"network.{name}": value.clone() for name, value in kept.pop("network").items()}
    for index, state in kept.pop("optimizer")["state"].items():
        found |= {f"its optimizer.{index}.{name}": value.clone() for name, value in state.items()}
    return found | {name: torch.as_tensor(value).clone() for name, value in kept.items()}


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def values(history: list[dict[str, Any]], name: str) -> dict[int, float]:
    """A metric by the step after which it was recorded."""
    return {record["images"] // GLOBAL_BATCH: record[name] for record in history if name in record}


# ---- what is added to the loss ----


def test_the_gradient_is_that_of_the_weighted_sum_of_all_losses() -> None:
    stage = stage_of(perceptual_weight=0.7)
    adversary, judges = adversary_of(stage), stage.objective.judges
    adversary.started, adversary.factor = True, torch.tensor(3.0)
    images, keys = stage.batch(Position(0, 0, GLOBAL_BATCH, GLOBAL_BATCH))

    output = stage.objective(images, keys)
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in stage.model.named_parameters()}
    stage.model.zero_grad()
    own = stage.model(images, keys)
    expected = own.loss + 0.7 * judges.distance(own.reconstruction, images)
    expected = expected + 0.5 * 3.0 * adversarial_loss(adversary.network(own.reconstruction))
    expected.backward()

    torch.testing.assert_close(output.loss, expected)
    for name, parameter in stage.model.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert sum(gradient is not None for gradient in found.values()) > 20


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer_over_the_global_batch() -> None:
    stage = stage_of(micro_batch=2, perceptual_weight=0.7)
    adversary, judges = adversary_of(stage), stage.objective.judges
    adversary.before_step(GLOBAL_BATCH * STEPS)
    last = stage.model.decoder.out.weight
    sums = [torch.zeros_like(last), torch.zeros_like(last)]
    for offset in range(0, GLOBAL_BATCH, 2):
        inputs = stage.batch(Position(0, offset, 2, GLOBAL_BATCH))
        stage.after_micro_batch(stage.objective(*inputs))
        own = stage.model(*inputs)
        losses = (
            own.loss + 0.7 * judges.distance(own.reconstruction, inputs[0]),
            adversarial_loss(adversary.network(own.reconstruction)),
        )
        for total, loss in zip(sums, losses, strict=True):
            total += torch.autograd.grad(loss, last, retain_graph=True)[0]
    assert float(adversary.factor) == 0, "the first step has none yet"
    adversary.step(0)
    assert float(adversary.factor) == pytest.approx(float(sums[0].norm() / sums[1].norm()), rel=1e-3)


def test_the_discriminator_steps_as_adam_does_on_the_whole_batch() -> None:
    stage = stage_of(micro_batch=2)
    adversary, reference = adversary_of(stage), adversary_of(stage_of())
    optimizer = torch.optim.AdamW(reference.network.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        real, fake = torch.rand(2, GLOBAL_BATCH, 3, 16, 16, generator=generator)
        adversary.before_step(step * GLOBAL_BATCH)
        for part in range(0, GLOBAL_BATCH, 2):
            adversary.learn(Evidence(real[part : part + 2], fake[part : part + 2], torch.ones(2, 4)))
        adversary.step(step * GLOBAL_BATCH)
        optimizer.zero_grad()
        discriminator_loss(reference.network(real), reference.network(fake)).backward()
        torch.nn.utils.clip_grad_norm_(reference.network.parameters(), stage.settings.gradient_clip)
        optimizer.step()
        if step == 0:
            optimizer.param_groups[0]["lr"] = 2e-4  # before the decay of the learning rate begins
    for one, other in zip(adversary.network.parameters(), reference.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_losses_that_are_off_leave_training_as_it_was_to_the_bit() -> None:
    plain = vq_stage(vq_settings(3, codebook_start=0.0), attention=False)
    assert plain.companion is None and plain.objective.judges.features is None
    waiting = stage_of(steps=30)  # its adversary is never due
    waiting.settings = waiting.settings.model_copy(update={"images": 3 * GLOBAL_BATCH})
    plain.settings = waiting.settings
    found = []
    for stage in (plain, waiting):
        engine = engine_of(stage)
        train(engine, stage, GoOn(), Heard())
        found.append(engine.export())
    assert_identical(*found)


def test_judges_are_no_part_of_what_is_trained_saved_and_exported() -> None:
    stage = stage_of(perceptual_weight=0.5)
    plain = vq_stage(vq_settings(1), attention=False)
    assert stage.objective.state_dict().keys() == plain.objective.state_dict().keys()
    assert len(list(stage.objective.parameters())) == len(list(plain.objective.parameters()))


def test_the_perceptual_distance_is_logged_evaluated_and_lowered() -> None:
    found = []
    for weight in (1e-6, 1.0):
        stage = vq_stage(vq_settings(25, perceptual_weight=weight, codebook_start=0.9), attention=False)
        history = train(engine_of(stage), stage, GoOn(), Heard()).history
        assert len(values(history, "perceptual")) == 25
        found.append(values(history, "val_perceptual")[25])
    assert found[1] < 0.9 * found[0]


def test_in_bf16_the_judges_say_nearly_the_same_and_their_weights_stay_float32() -> None:
    found = []
    for precision in PRECISIONS:
        exact = stage_of(perceptual_weight=0.7)
        judges = build_judges(exact.settings, 5, precision, CPU)
        stage = VQStage(exact.model, exact.settings, 5, precision, exact.train, exact.validation, judges)
        adversary = adversary_of(stage)
        adversary.before_step(STEPS * GLOBAL_BATCH)
        output = stage.objective(*stage.batch(Position(0, 0, GLOBAL_BATCH, GLOBAL_BATCH)))
        learned = stage.after_micro_batch(output)
        adversary.step(0)
        assert {parameter.dtype for parameter in adversary.parameters} == {torch.float32}
        found.append({**output.metrics, "discriminator": learned["discriminator"], "factor": adversary.factor})
    for name in ("perceptual", "adversarial", "discriminator", "factor"):
        assert not torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0.1, atol=0.02)


# ---- an adversary's life ----


def test_the_adversary_begins_at_its_share_of_the_budget_and_says_how_it_does() -> None:
    stage = stage_of()
    history = train(engine_of(stage), stage, GoOn(), Heard()).history
    assert values(history, "adversary_started") == {4: 1.0}
    after = [5, 6, 7, 8]
    for name in ("adversarial", "adaptive_weight", "discriminator", "discriminator_left_out"):
        assert list(values(history, name)) == after, name
    for name in ("discriminator_real", "discriminator_fake"):
        assert all(0 <= share <= 1 for share in values(history, name).values()), name
    assert all(weight > 0 for weight in values(history, "adaptive_weight").values())
    best = max(list(values(history, "val_psnr").values())[:4])
    assert adversary_of(stage).best_psnr == pytest.approx(best, rel=1e-5)


def test_it_starts_from_weights_that_follow_from_the_seed_alone() -> None:
    settings = settings_of()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = Adversary(settings, 5, "fp32", CPU)
    assert torch.equal(torch.rand(1), expected), "building it draws from nobody's numbers"
    other, another = Adversary(settings, 5, "fp32", CPU), Adversary(settings, 6, "fp32", CPU)
    pairs = list(zip(one.parameters, other.parameters, another.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("where", ["real", "gradients"])
def test_a_step_of_the_discriminator_that_is_not_finite_is_left_out_and_counted(where: str) -> None:
    adversary = adversary_of(stage_of())
    adversary.started = True
    good = Evidence(torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16), torch.ones(2, 4))
    bad = Evidence(
        torch.full_like(good.real, torch.inf) if where == "real" else good.real,
        good.fake,
        torch.full_like(good.gradients, torch.nan) if where == "gradients" else good.gradients,
    )
    states = []
    for evidence in (good, bad, good):
        adversary.before_step(0)
        adversary.learn(evidence)
        left_out = adversary.step(0)["discriminator_left_out"]
        states.append((float(left_out), everything(engine_of(stage_of()), adversary)))
    assert [left_out for left_out, _ in states] == [0.0, 1.0, 0.0]
    assert adversary.left_out == 1
    states[0][1].pop("left_out")
    assert_identical({name: states[1][1][name] for name in states[0][1]}, states[0][1])
    assert not torch.equal(states[2][1]["network.layers.0.weight"], states[1][1]["network.layers.0.weight"])


class BadPicture(VQStage):
    """Stage 1 whose sixth step, with the adversary at work, meets a picture that is not a number."""

    def batch(self, position: Position) -> tuple[Any, ...]:
        """One bad picture."""
        images, keys = super().batch(position)
        if position.images_seen == 5 * GLOBAL_BATCH:
            images[0] = torch.inf
        return images, keys


def test_a_step_that_the_tokenizer_leaves_out_teaches_the_adversary_nothing() -> None:
    good = stage_of()
    stage = BadPicture(good.model, good.settings, good.seed, "fp32", good.train, good.validation, good.objective.judges)
    engine, states = engine_of(stage), []
    for step in (5, 6, 7):
        stage.settings = good.settings.model_copy(update={"images": step * GLOBAL_BATCH})
        train(engine, stage, GoOn((step - 1) * GLOBAL_BATCH if step > 5 else 0), Heard())
        states.append(everything(engine, adversary_of(stage)))
    assert_identical(states[1], states[0])
    assert not torch.equal(states[2]["network.layers.0.weight"], states[1]["network.layers.0.weight"])
    assert all(torch.isfinite(value).all() for value in states[2].values())


# ---- the guard ----


RUINOUS = {"weight": 1e3, "learning_rate": 1e-2, "guard_psnr_drop": 0.5}
"""An adversary that pushes a thousand times as hard as the reconstruction pulls."""
FAST = {"steps": 24, "learning_rate": 5e-3, "decay_start": 1.0}
"""Enough training to have something to ruin."""


def test_the_guard_sends_the_adversary_away_for_good_when_quality_falls() -> None:
    stage, heard = stage_of(adversarial=RUINOUS, **FAST), Heard()
    history = train(engine_of(stage), stage, GoOn(), heard).history
    ((gone, _),) = values(history, "adversary_switched_off").items()
    psnr = values(history, "val_psnr")
    best = max(psnr[step] for step in range(1, 13))
    assert 12 < gone < 24
    assert psnr[gone] < best - 0.5
    assert all(psnr[step] >= best - 0.5 for step in range(12, gone)), "at the first such evaluation"
    assert list(values(history, "adversarial")) == list(range(13, gone + 1))
    assert psnr[24] > psnr[gone], "it recovers"
    (alarm,) = [alarm for alarm in heard.alarms if alarm.name == "adversary switched off"]
    assert alarm.images == gone * GLOBAL_BATCH
    assert alarm.remedy == "vq.train.adversarial.weight=500, or vq.train.adversarial.start=0.75"


def test_a_psnr_that_is_no_number_counts_as_fallen() -> None:
    adversary = adversary_of(stage_of())
    assert adversary.observe(20.0) == {}
    adversary.before_step(STEPS * GLOBAL_BATCH)
    assert adversary.observe(19.1) == {}
    assert adversary.observe(float("nan")) == {"adversary_switched_off": 1.0}
    assert adversary.observe(30.0) == {} and not adversary.is_active


# ---- checkpoints ----


class StopsAfter(Heard):
    """A reporter that stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Stop when it is time."""
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("adversarial", "stopped_after"), [({}, 15), (RUINOUS, 21)], ids=["at work", "sent away"])
def test_resume_equals_an_uninterrupted_run_to_the_bit(
    adversarial: dict[str, Any], stopped_after: int, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"adversarial": adversarial, "checkpoint_every_images": 2 * GLOBAL_BATCH, **FAST}

    def kept(name: str, stage: VQStage) -> StoreCheckpoints:
        return StoreCheckpoints(open_store(str(tmp_path / name)), "r", 2, stage.companion)

    stage = stage_of(**asked)
    whole = engine_of(stage)
    history = train(whole, stage, kept("whole", stage), Heard()).history
    expected = everything(whole, adversary_of(stage))
    gone = [step for step in values(history, "adversary_switched_off") if 15 <= step <= 20]
    assert len(gone) == bool(adversarial), "between the second stop and the third"

    stage = stage_of(**asked)
    with pytest.raises(KeyboardInterrupt):
        train(engine_of(stage), stage, kept("broken", stage), StopsAfter(stopped_after))
    stage = stage_of(weights=1, **asked)
    resumed = engine_of(stage)
    for parameter in adversary_of(stage).parameters:
        parameter.data.zero_()
    state = train(resumed, stage, kept("broken", stage), Heard())
    assert_identical(everything(resumed, adversary_of(stage)), expected)
    assert state.history == history


# ---- settings ----


def test_the_adversary_is_refused_with_zero_3_and_nothing_else_is() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.weight must be 0 with zero_stage=3.*: 0\.5\nhint: set zero_"):
        settings_of(zero_stage=3)
    assert settings_of(zero_stage=2).zero_stage == 2
    assert settings_of(zero_stage=3, adversarial={"weight": 0.0}, perceptual_weight=1.0).zero_stage == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate_every_images": 5 * GLOBAL_BATCH},
        {"codebook_start": 0.45},
        {"codebook_start": 0.9},
        {"adversarial": {"start": 0.05}},
    ],
)
def test_a_guard_without_an_evaluation_to_compare_with_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"adversarial\.start must leave an evaluation between .*\nhint: a later adversarial\.start"
    ):
        settings_of(**changes)
