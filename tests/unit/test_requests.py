"""What makes a finished artifact stale, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import InputError
from workflows.artifacts import Manifest, request_digest
from workflows.config import RunConfig
from workflows.loading import load_config
from workflows.requests import request_of

DATASET = Manifest("dataset", "asked", {}, {})
LOSSES_BEYOND_PIXELS = ("perceptual_weight", "perceptual_network", "adversarial")


def request(*changes: str) -> str:
    """Of the tokenizer, of the preset tiny with changes under vq.train."""
    config = load_config("tiny", None, [f"vq.train.{change}" for change in changes])
    return request_of("vq", config, {"dataset": DATASET})


def test_losses_that_are_off_leave_a_tokenizer_as_current_as_it_was_before_they_existed() -> None:
    config: RunConfig = load_config("tiny")
    settings = config.vq.model_dump(mode="json")
    for name in LOSSES_BEYOND_PIXELS:
        del settings["train"][name]
    before = request_digest("vq", {"vq": settings, "seed": 0}, {"dataset": DATASET.digest})
    assert request() == before
    assert request("adversarial.width=64", "adversarial.start=0.4", "perceptual_network=anywhere.pth") == before


def test_losses_that_are_on_are_part_of_what_was_asked_for(tmp_path: Path) -> None:
    perceptual, adversarial = "perceptual_weight=0.1", "adversarial.weight=0.5"
    file = tmp_path / "weights.pth"
    found = {request(), request(perceptual), request("perceptual_weight=0.2"), request(adversarial)}
    found |= {request(adversarial, "adversarial.width=64"), request(adversarial, perceptual)}
    for content in (b"one", b"other"):
        file.write_bytes(content)
        found.add(request(perceptual, f"perceptual_network={file}"))
    assert len(found) == 8
    copy = tmp_path / "copy.pth"
    copy.write_bytes(b"other")
    assert request(perceptual, f"perceptual_network={copy}") in found, "the content counts, not the name"


def test_a_named_file_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no such file with weights of the feature network: .*gone\.pth\nhint: "):
        request("perceptual_weight=0.1", f"perceptual_network={tmp_path / 'gone.pth'}")


def test_codes_are_asked_for_anew_when_an_arithmetic_is_named() -> None:
    parents = {"dataset": DATASET, "vq": DATASET}
    found = [
        request_of("codes", load_config("tiny", None, [f"encode.precision={precision}"]), parents)
        for precision in ("fp32", "auto", "bf16")
    ]
    assert len(set(found)) == 3
    before = request_digest("codes", {}, dict.fromkeys(parents, DATASET.digest))
    assert found[0] == before, "what was encoded before there was a choice stays current"


def test_codes_are_asked_for_anew_when_they_are_refined() -> None:
    parents = {"dataset": DATASET, "vq": DATASET}
    found = [
        request_of("codes", load_config("tiny", None, [f"encode.refine_rounds={rounds}"]), parents)
        for rounds in (0, 1, 2)
    ]
    assert len(set(found)) == 3
    assert found[0] == request_digest("codes", {}, dict.fromkeys(parents, DATASET.digest))


def test_priors_and_figures_from_before_code_scale_and_fine_guidance_stay_current() -> None:
    parents = dict.fromkeys(("dataset", "vq", "codes", "prior"), DATASET)
    config = load_config("small")
    model, sampling = config.prior.model_dump(mode="json"), config.sampling.model_dump(mode="json")
    for name in ("gaussian", "conditions", "code_scale"):
        del model["model"][name]
    del model["text_encoder"]
    digests = {"codes": DATASET.digest}
    assert request_of("prior", config, parents) == request_digest("prior", {"prior": model, "seed": 0}, digests)
    for name in ("gaussian_sampler", "eta", "fine_guidance"):
        del sampling[name]
    judged = {"evaluation": config.evaluation.model_dump(mode="json"), "sampling": sampling}
    digests = dict.fromkeys(parents, DATASET.digest)
    assert request_of("evaluation", config, parents) == request_digest("evaluation", judged, digests)

    changed = load_config("small", None, ["prior.model.code_scale=dimension", "sampling.fine_guidance=1.5"])
    for kind in ("prior", "evaluation"):
        assert request_of(kind, changed, parents) != request_of(kind, config, parents)
