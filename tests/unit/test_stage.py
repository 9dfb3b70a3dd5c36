"""A stage's small parts: the learning rate, the position in training, means of metrics, moving tensors."""

from __future__ import annotations

import math

import pytest
import torch

from workflows.config import TrainSettings
from workflows.training.stage import Position, RunningMean, learning_rate_at, place_on

SETTINGS = TrainSettings(
    images=1_000,
    global_batch=10,
    learning_rate=2.0,
    warmup_images=100,
    decay_start=0.4,
    final_learning_rate_share=0.1,
)


def test_the_learning_rate_rises_linearly_over_the_warm_up() -> None:
    rates = [learning_rate_at(step * 10, SETTINGS) for step in range(10)]
    assert rates == pytest.approx([0.2 * (step + 1) for step in range(10)])


def test_the_learning_rate_is_flat_between_warm_up_and_decay() -> None:
    assert {learning_rate_at(images, SETTINGS) for images in range(90, 401, 10)} == {2.0}


def test_the_learning_rate_falls_as_half_a_cosine_to_its_final_share() -> None:
    assert learning_rate_at(700, SETTINGS) == pytest.approx(2.0 * (0.1 + 0.9 / 2)), "half way"
    assert learning_rate_at(550, SETTINGS) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate_at(1_000, SETTINGS) == pytest.approx(0.2)
    assert learning_rate_at(5_000, SETTINGS) == pytest.approx(0.2), "never rises again"
    falling = [learning_rate_at(images, SETTINGS) for images in range(400, 1_001, 10)]
    assert falling == sorted(falling, reverse=True)


def test_without_warm_up_and_decay_the_learning_rate_is_constant() -> None:
    constant = SETTINGS.model_copy(update={"warmup_images": 0, "decay_start": 1.0})
    assert {learning_rate_at(images, constant) for images in range(0, 1_000, 10)} == {2.0}


def test_a_position_counts_its_first_image_from_the_start_of_training() -> None:
    assert Position(images_seen=96, offset=24, count=8, global_batch=32).first == 120


def test_a_running_mean_is_the_mean_of_each_metric_and_begins_anew_when_taken() -> None:
    means = RunningMean()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)})
    means.add({"restarts": torch.tensor(5.0)})
    assert {name: float(value) for name, value in means.take().items()} == {"loss": 3.0, "restarts": 5.0}
    assert means.take() == {}
    means.add({"loss": torch.tensor(4.0)})
    assert float(means.take()["loss"]) == 4.0


def test_a_running_mean_keeps_no_graph_and_loses_no_small_value() -> None:
    means = RunningMean()
    leaf = torch.tensor(1e8, requires_grad=True)
    means.add({"loss": leaf * 1})
    for _ in range(3):
        means.add({"loss": torch.tensor(1.0)})
    mean = means.take()["loss"]
    assert not mean.requires_grad
    assert float(mean) == (1e8 + 3) / 4


def test_tensors_are_placed_within_tuples_and_the_rest_is_left_alone() -> None:
    device = torch.device("meta")
    placed, (inner, text) = place_on(device, torch.zeros(2), (torch.ones(3), "name"))
    assert (placed.device, inner.device, text) == (device, device, "name")
