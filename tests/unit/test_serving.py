"""The picture server without a server: what is refused and how, and which model draws when one fails."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from hvqd_model.prior.conditions import Conditions
from infra.errors import EnvironmentFailure, InputError
from infra.ports import check_port
from tests.malformed_requests import MOST_BYTES, malformed_requests
from tests.unit.test_bundle import CLASSES, SAMPLING, save_models
from tests.unit.test_drawing import map_png, save
from workflows.drawing.asking import Asked, resolve
from workflows.drawing.bundle import LoadedBundle, load_bundle, write_bundle
from workflows.drawing.generate import Pictures, draw_images
from workflows.loading import load_config
from workflows.serving.models import Holder, Item, ServedModel, as_png, try_out
from workflows.serving.requests import BadRequest, DrawRequest, Limits, read_request

LIMITS = Limits(pictures=64, steps=100, body_bytes=MOST_BYTES)


def test_a_request_is_read_and_what_is_left_out_has_a_default() -> None:
    asked = {"seed": -7, "n": 4, "class": "Cats", "steps": 100}
    assert read_request(json.dumps(asked).encode(), LIMITS) == DrawRequest(-7, 4, Asked("Cats"), 100)
    told = {"style": "oil", "text": "a café ☕", "map": base64.b64encode(map_png()).decode()}
    assert read_request(json.dumps(told).encode(), LIMITS).asked == Asked(None, "oil", "a café ☕", map_png())
    empty, again = (read_request(body, LIMITS) for body in (b"", b" {} "))
    assert (empty.count, empty.asked, empty.steps) == (1, Asked(), None) and empty.seed != again.seed
    assert read_request(b'{"seed": null, "class": null}', LIMITS).count == 1
    for seed in (-(2**63), 2**63 - 1):
        assert read_request(json.dumps({"seed": seed}).encode(), LIMITS).seed == seed


def test_what_cannot_be_read_is_refused_with_what_is_allowed_and_a_hint() -> None:
    bodies = [case for case in malformed_requests() if case.status in (400, 413)]
    assert len(bodies) > 250
    read = []
    for case in bodies:
        try:
            found = read_request(case.body, LIMITS)
        except BadRequest as error:
            assert error.status == case.status, case.name
            assert 5 < len(error.error) < 300 and len(error.hint) > 5 and "\n" not in error.hint, case.name
            answer = error.as_json()
            assert set(answer) == {"error", "hint"} and json.dumps(answer, ensure_ascii=False).encode(), case.name
        else:
            read.append(found.asked)
    assert Asked() not in read and len(set(read)) >= 25, "names and maps are the model's to judge"
    assert {asked.label is not None for asked in read} == {asked.style is not None for asked in read} == {True, False}


# ---- which model draws ----


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    folder = tmp_path_factory.mktemp("served")
    vq, prior = save_models(folder / "run")
    write_bundle(folder / "bundle", vq, prior, CLASSES, (3, 1), SAMPLING, {}, "")
    loaded = load_bundle(folder / "bundle")
    for codebook in loaded.vq.codebooks:  # untrained, all codes are one
        codebook.copy_(torch.randn(codebook.shape, generator=torch.Generator().manual_seed(0)))
    return loaded


@dataclass(frozen=True)
class Broken(ServedModel):
    """A model that draws so many batches and then fails."""

    counter: tuple[list[int], ...] = ([],)
    good: int = 1

    def draw(self, seeds: Sequence[int], conditions: Conditions, steps: int) -> Pictures:
        self.counter[0].append(1)
        if len(self.counter[0]) > self.good:
            raise ArithmeticError("nan in the logits")
        return super().draw(seeds, conditions, steps)


def items(model: ServedModel, count: int, steps: int = 2) -> list[Item]:
    return [one for seed in range(count) for one in model.items(Asked(CLASSES[seed % 2]), [seed], steps)]


def broken(bundle: LoadedBundle, good: int) -> Broken:
    return Broken("2", bundle, SAMPLING, ([],), good)


def test_a_picture_does_not_depend_on_what_it_is_drawn_with(bundle: LoadedBundle) -> None:
    model = ServedModel.of("1", bundle)
    holder = Holder(model, lambda version: model)
    together = holder.draw([*items(model, 3), *items(model, 2, steps=1), *items(replace(model, version="0"), 1)])
    assert [holder.draw([item])[0] for item in items(model, 3)] == together[:3] and len(together) == 6
    assert together[5] == together[0] and len(set(together[:5])) == 5
    assert np.asarray(Image.open(io.BytesIO(together[0]))).shape == (16, 16, 3)


def test_a_new_champion_takes_over_when_it_has_drawn_and_old_requests_keep_their_model(bundle: LoadedBundle) -> None:
    first, second = ServedModel.of("1", bundle), ServedModel.of("2", bundle)
    loaded: list[str] = []
    holder = Holder(first, lambda version: loaded.append(version) or second)  # type: ignore[func-returns-value]
    assert not holder.follow("1") and not holder.follow(None) and loaded == []
    under_way = items(holder.current, 1)
    assert holder.follow("2") and holder.current.version == "2" and holder.swaps == 1
    assert len(holder.draw(under_way)) == 1 and holder.current.version == "2"
    assert not holder.follow("2") and loaded == ["2"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    """A model that is told class, style, caption and label map."""
    return load_bundle(save(tmp_path_factory.mktemp("told")))


def test_what_is_asked_by_style_caption_and_map_is_drawn_as_if_it_were_alone(told: LoadedBundle) -> None:
    model = ServedModel.of("1", told)
    holder = Holder(model, lambda version: model)
    requests = [
        Asked("dogs", "ink"), Asked("dogs", "oil"), Asked(style="ink"), Asked(text="red apple"),
        Asked("cats", map_png=map_png(2)), Asked(), Asked("dogs"),
    ]  # fmt: skip
    asked = [one for number, request in enumerate(requests) for one in model.items(request, [number, 7], 2)]
    drawn = holder.draw(asked)
    for number, request in enumerate(requests):
        alone = draw_images(
            told.vq, told.prior, [number, 7], resolve(told, [number, 7], [request] * 2), model.sampling.model_copy(
                update={"steps": 2}
            )
        )  # fmt: skip
        assert drawn[2 * number : 2 * number + 2] == [as_png(image) for image in alone], request
    of_one_seed = {drawn[2 * number + 1] for number in range(len(requests))}
    assert len(of_one_seed) == len({one.asked for one in asked[1::2]}) >= 5, "what is asked shows"
    assert [one.asked.label for one in asked[-4:-2]] == [told.classes[label] for label in told.draw_labels([5, 7])]


def test_a_model_says_which_condition_it_was_not_trained_with(bundle: LoadedBundle) -> None:
    model = ServedModel.of("1", bundle)
    for asked, said in (
        (Asked(style="ink"), "trained without styles: ink"),
        (Asked(text="a cat"), "trained without captions: a cat"),
        (Asked(map_png=map_png()), "trained without label maps"),
    ):
        with pytest.raises(InputError, match=rf"{said}\nhint: leave --(style|text|map) out"):
            model.items(asked, [1], 2)


def test_a_map_that_is_no_picture_or_far_too_large_is_named(told: LoadedBundle) -> None:
    whole = map_png(np.arange(256, dtype=np.uint8).reshape(16, 16) % 3)
    vast = whole[:16] + (200_000).to_bytes(4, "big") * 2 + whole[24:]
    for content in (whole[:8], whole[: len(whole) // 2], vast, b"text"):
        with pytest.raises(InputError, match=r"--map (is no picture|is damaged|must be 16 x 16 pixels).*\nhint: "):
            ServedModel.of("1", told).items(Asked(map_png=content), [1], 2)


def test_what_the_model_before_was_not_trained_with_fails_alone(bundle: LoadedBundle, told: LoadedBundle) -> None:
    holder = Holder(ServedModel.of("1", bundle), lambda version: broken(told, good=1))
    assert holder.follow("2")
    with pytest.raises(ArithmeticError, match="nan in the logits"):
        holder.draw(holder.current.items(Asked(style="ink"), [1], 2))
    assert holder.current.version == "1" and holder.returns == 1
    assert len(holder.draw(items(holder.current, 2))) == 2


@pytest.mark.parametrize("failure", ["load", "draw", "one colour"])
def test_a_champion_that_does_not_load_or_draw_does_not_take_over(bundle: LoadedBundle, failure: str) -> None:
    tries: list[str] = []

    class Grey(ServedModel):
        def draw(self, seeds: Sequence[int], conditions: Conditions, steps: int) -> Pictures:
            return np.full((len(seeds), 16, 16, 3), 128, dtype=np.uint8)

    def load(version: str) -> ServedModel:
        tries.append(version)
        match failure:
            case "load":
                raise OSError("its files are gone")
            case "draw":
                return broken(bundle, good=0)
        return Grey("2", bundle, SAMPLING)

    holder = Holder(ServedModel.of("1", bundle), load)
    assert not holder.follow("2") and not holder.follow("2") and tries == ["2"], "a failed one is not tried for ever"
    assert holder.current.version == "1" and set(holder.refused) == {"2"}
    expected = {"load": "its files are gone", "draw": "nan in the logits", "one colour": "a picture of a single colour"}
    assert expected[failure] in holder.refused["2"]
    assert not holder.follow("1") and holder.refused == {}
    assert not holder.follow("2") and tries == ["2", "2"], "who moves the alias away and back asks for another try"


def test_when_a_new_champion_fails_the_one_before_draws_again_and_no_request_is_lost(bundle: LoadedBundle) -> None:
    first = ServedModel.of("1", bundle)
    holder = Holder(first, lambda version: broken(bundle, good=2))
    assert holder.follow("2")
    with_two = items(holder.current, 2)
    good = holder.draw(with_two)
    assert holder.draw(with_two) == good == holder.draw(items(first, 2)), "the same weights draw the same"
    assert (holder.current.version, holder.returns) == ("1", 1) and "nan in the logits" in holder.refused["2"]
    assert holder.draw(with_two) == good, "a request that began with the failed one is drawn, too"
    assert not holder.follow("2")


def test_a_model_with_nothing_before_it_fails_its_request_alone(bundle: LoadedBundle) -> None:
    holder = Holder(broken(bundle, good=0), lambda version: ServedModel.of(version, bundle))
    with pytest.raises(ArithmeticError, match="nan in the logits"):
        holder.draw(items(holder.current, 1))
    assert holder.follow("3") and len(holder.draw(items(holder.current, 1))) == 1


def test_a_proved_champion_frees_the_one_before(bundle: LoadedBundle) -> None:
    holder = Holder(ServedModel.of("1", bundle), lambda version: broken(bundle, good=22))
    assert holder.follow("2")
    for _ in range(21):
        holder.draw(items(holder.current, 1, steps=1))
    with pytest.raises(ArithmeticError, match="nan in the logits"):
        holder.draw(items(holder.current, 1, steps=1))


def test_a_trial_looks_at_the_size(bundle: LoadedBundle) -> None:
    class Small(ServedModel):
        def draw(self, seeds: Sequence[int], conditions: Conditions, steps: int) -> Pictures:
            return np.zeros((1, 8, 8, 3), dtype=np.uint8)

    try_out(ServedModel.of("1", bundle))
    with pytest.raises(RuntimeError, match=r"version 4 draws pictures of \(1, 8, 8, 3\), not \(1, 16, 16, 3\)"):
        try_out(Small("4", bundle, SAMPLING))


# ---- settings ----


def test_settings_that_cannot_work_are_refused() -> None:
    message = r"max_pictures must be at most max_waiting \(8\): 9\nhint: a request of more pictures than may wait"
    with pytest.raises(InputError, match=message):
        load_config("tiny", None, ["serve.max_pictures=9", "serve.max_waiting=8"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFailure, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*\nhint: name another"):
            check_port("127.0.0.1", port)
    with pytest.raises(EnvironmentFailure, match=r"cannot listen on no-such-host\.invalid:8000: .*\nhint: "):
        check_port("no-such-host.invalid", 8000)
