"""Batches made early are the batches that are asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, prior_settings, prior_stage
from workflows.training.feed import Batch, Feed
from workflows.training.ledger import Ledger
from workflows.training.loop import _Training
from workflows.training.plain import PlainEngine
from workflows.training.stage import Position

CPU = torch.device("cpu")


def position(images_seen: int) -> Position:
    return Position(images_seen, 0, GLOBAL_BATCH, GLOBAL_BATCH)


class Maker:
    """Makes a batch of a position's number, and notes where."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bool]] = []

    def __call__(self, place: Position) -> Batch:
        self.made.append((place.images_seen, threading.current_thread() is threading.main_thread()))
        if place.images_seen < 0:
            raise ValueError("there is no such picture")
        return (torch.tensor(place.images_seen),)


def test_on_a_cpu_batches_are_made_when_they_are_asked_for() -> None:
    maker = Maker()
    feed = Feed(maker, CPU)
    assert [int(feed.take(position(n), position(n + 8))[0]) for n in (0, 8, 16)] == [0, 8, 16]
    assert maker.made == [(0, True), (8, True), (16, True)]


def test_the_next_batch_is_made_early_in_a_thread_and_made_once() -> None:
    maker = Maker()
    feed = Feed(maker, CPU, ahead=True)
    assert [int(feed.take(position(n), position(n + 8) if n < 16 else None)[0]) for n in (0, 8, 16)] == [0, 8, 16]
    feed.close()
    assert maker.made == [(0, True), (8, False), (16, False)]


def test_a_training_that_steps_back_gets_what_it_asks_for() -> None:
    feed = Feed(Maker(), CPU, ahead=True)
    feed.take(position(0), position(8))
    assert int(feed.take(position(80), position(88))[0]) == 80
    assert int(feed.take(position(88), None)[0]) == 88
    feed.close()
    feed.close()


def test_what_goes_wrong_early_is_raised_when_the_batch_is_asked_for() -> None:
    feed = Feed(Maker(), CPU, ahead=True)
    feed.take(position(0), position(-8))
    with pytest.raises(ValueError, match="there is no such picture"):
        feed.take(position(-8), None)
    feed.close()


@pytest.mark.parametrize("micro_batch", [GLOBAL_BATCH, GLOBAL_BATCH // 2])
def test_a_training_fed_early_is_the_same_to_the_bit(micro_batch: int) -> None:
    histories, weights = [], []
    for ahead in (False, True):
        settings = prior_settings(3, micro_batch=micro_batch)
        stage = prior_stage(settings)
        engine = PlainEngine(stage.objective, settings, CPU)
        training = _Training(engine, stage, GoOn(), Heard(), None, None, Ledger())
        training.feed = Feed(stage.batch, CPU, ahead=ahead)
        histories.append(training.run().history)
        weights.append(engine.export())
    assert histories[0] == histories[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
