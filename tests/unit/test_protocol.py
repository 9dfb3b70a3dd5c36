"""Protocols as files: they come back as they were written, and what is not the protocol's is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.errors import InputError
from workflows.artifacts import Manifest
from workflows.config import EvaluationSettings, RunConfig, SamplingSettings
from workflows.evaluation.protocol import ExtractorPin, Protocol, read_protocol
from workflows.loading import load_config
from workflows.release.registry import figures_under, intervals_of, intervals_under, protocols_of, shared_protocol

DATASET = Manifest("dataset", "r", {}, {}, {"rows": 1})
PROTOCOL = Protocol(
    name="mine",
    dataset=DATASET.digest,
    evaluation=EvaluationSettings(samples=50, seed=7),
    sampling=SamplingSettings(steps=3, top_k=5),
    extractor=ExtractorPin(name="net", weights_sha256="b" * 64),
    digest="c" * 64,
)


def test_a_protocol_comes_back_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PROTOCOL.as_yaml())
    assert read_protocol(tmp_path / "p.yaml") == PROTOCOL


def test_a_protocol_replaces_how_models_are_judged_and_nothing_else() -> None:
    config = RunConfig()
    applied = PROTOCOL.applied(config)
    assert (applied.evaluation, applied.sampling) == (PROTOCOL.evaluation, PROTOCOL.sampling)
    assert applied.model_copy(update={"evaluation": config.evaluation, "sampling": config.sampling}) == config
    assert load_config("tiny", None, PROTOCOL.overrides()).sampling == PROTOCOL.sampling


def test_other_data_other_features_and_another_description_are_refused() -> None:
    PROTOCOL.check_dataset(DATASET, "here")
    PROTOCOL.check_digest("c" * 64, "b" * 64)
    with pytest.raises(InputError, match=r"the protocol mine judges on the dataset .*, here is .*\nhint: name a root"):
        PROTOCOL.check_dataset(Manifest("dataset", "r", {}, {}, {"rows": 2}), "here")
    with pytest.raises(InputError, match=r"sees with net of b{12}, here are weights a{12}\nhint: install the feature"):
        PROTOCOL.check_digest("c" * 64, "a" * 64)
    with pytest.raises(
        InputError, match=r"is c{12}, this version of hvqd would measure d{12}\nhint: figures would not"
    ):
        PROTOCOL.check_digest("d" * 64, "b" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"the protocol .*p\.yaml: format: input should be 1, not 2\nhint: `hvqd protocol"),
        ({"dataset": "abc"}, r"dataset: string should match pattern .*, not 'abc'\nhint: "),
        ({"evaluation": {"samplez": 3}}, r"unknown key: evaluation\.samplez\nhint: did you mean evaluation\.samples\?"),
        ({"sampling": {"steps": 0}}, r"sampling\.steps: .*, not 0\nhint: `hvqd protocol"),
        ({"digest": None}, r"digest: .*, not None\nhint: "),
    ],
)
def test_a_file_that_is_no_protocol_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**PROTOCOL.model_dump(mode="json"), **change}))
    with pytest.raises(InputError, match=message):
        read_protocol(tmp_path / "p.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such protocol: .*/absent\nhint: `hvqd protocol --root ROOT` writes one"):
        read_protocol(tmp_path / "absent")
    for text, message in (("a: [", "cannot read the protocol"), ("- a", "must hold keys and values, not a list")):
        (tmp_path / "p.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_protocol(tmp_path / "p.yaml")


# ---- figures by protocol ----

OWN, LATER = "a" * 64, "b" * 64
TAGS = {
    "hvqd.protocol": OWN,
    "hvqd.figures": '{"psnr": 1.0}',
    f"hvqd.judged.{LATER[:16]}": '{"psnr": 2.0}',
    f"hvqd.intervals.{OWN[:16]}": '{"psnr": [0.5, 1.5]}',
}


def test_versions_are_compared_by_a_protocol_that_both_were_judged_by() -> None:
    assert protocols_of(TAGS) == [OWN, LATER[:16]]
    newer = {"hvqd.protocol": LATER, "hvqd.figures": '{"psnr": 3.0}'}
    assert shared_protocol(newer, TAGS) == LATER and shared_protocol(TAGS, newer) == LATER[:16]
    assert figures_under(TAGS, LATER) == {"psnr": 2.0} and figures_under(newer, LATER[:16]) == {"psnr": 3.0}
    assert shared_protocol(newer, {**newer, "hvqd.protocol": OWN}) is None
    assert shared_protocol(TAGS, TAGS) == OWN and shared_protocol({}, TAGS) is None and protocols_of({}) == []
    assert figures_under(TAGS, None) is None and figures_under(TAGS, "c" * 64) is None
    both = {**TAGS, f"hvqd.judged.{OWN[:16]}": "{}"}
    assert protocols_of(both) == [OWN, LATER[:16]], "its own protocol is named once"


def test_intervals_are_kept_by_protocol() -> None:
    assert intervals_under(TAGS, OWN) == {"psnr": (0.5, 1.5)} and intervals_under(TAGS, LATER) == {}
    measured = {"psnr": {"value": 1.0, "low": 0.5, "high": 1.5}, "fid": {"value": 2.0, "low": None, "high": None}}
    assert intervals_of(measured) == {"psnr": [0.5, 1.5]}
