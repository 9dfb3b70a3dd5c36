"""An evaluation's pictures are drawn by all processes of the job: the same pictures, and what is there is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hvqd_model import HierarchicalVQ, load_model
from infra.storage import open_store
from tests.tiny_training import (
    CODE_DIM,
    CODES,
    code_table,
    image_table,
    prior_settings,
    prior_stage,
    vq_settings,
    vq_stage,
)
from workflows.config import ComputeSettings, SamplingSettings
from workflows.context import Context
from workflows.drawing.draw_apart import in_this_process, laid_down
from workflows.evaluation.features import FeatureExtractor
from workflows.evaluation.sets import drawn
from workflows.evaluation.subject import Parts, Split, Subject
from workflows.loading import load_config

PICTURES, A_PART = 520, 256
SAMPLING = SamplingSettings(steps=3, guidance=2.0, batch=16)


@dataclass
class Told:
    """A progress that remembers how many pictures were said to be done."""

    done: list[float] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Not remembered."""

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Of drawing alone."""
        if unit.endswith("drawn"):
            assert total == PICTURES
            self.done.append(done)


def subject_of(root: Path, compute: ComputeSettings, told: Told) -> Subject:
    """Small models with fresh weights, which draw as any others."""
    config = load_config("tiny", None, []).model_copy(update={"compute": compute})
    store = open_store(str(root))
    pictures, codes = image_table(20), code_table(20)
    vq = vq_stage(vq_settings(1)).model.eval()
    for level, size in enumerate(CODES):
        vq.start_codebook(level, 9 * torch.randn((size, CODE_DIM), generator=torch.Generator().manual_seed(level)), 0)
    split = Split(pictures.ids, pictures.images, pictures.labels, pictures.groups, tuple(codes.codes))
    return Subject(
        context=Context(config, store, told),
        vq=vq,
        prior=prior_stage(prior_settings(1)).objective.model.eval(),
        train=split,
        test=split,
        counts=tuple(np.ones(size, dtype=np.int64) for size in CODES),
        encoded=20,
        features=FeatureExtractor(16),
        parts=Parts(store, "a request"),
        refine_rounds=0,
    )


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local cluster starts with the first drawing and ends with the tests."""
    import ray

    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_cluster")
def test_two_processes_draw_what_one_draws_and_only_what_is_missing(tmp_path: Path) -> None:
    alone, together, again = Told(), Told(), Told()
    one = subject_of(tmp_path / "one", ComputeSettings(), alone)
    wanted = drawn(one, "samples", one.prior, PICTURES, SAMPLING)
    assert alone.done[-1] == PICTURES and len(np.unique(wanted.pictures, axis=0)) > PICTURES // 2

    root = tmp_path / "two"
    two = subject_of(root, ComputeSettings(workers=2), together)
    found = drawn(two, "samples", two.prior, PICTURES, SAMPLING)
    assert np.array_equal(found.pictures, wanted.pictures) and np.array_equal(found.labels, wanted.labels)
    assert together.done == sorted(together.done) and together.done[-1] == PICTURES

    kept = sorted(path.name for path in root.rglob("samples-*.npy"))
    assert kept == ["samples-000000.npy", "samples-000256.npy", "samples-000512.npy"]
    (middle,) = root.rglob(kept[1])
    middle.write_bytes(middle.read_bytes()[:100])  # cut off, as by a full disk
    two = replace(two, context=replace(two.context, progress=again))
    assert np.array_equal(drawn(two, "samples", two.prior, PICTURES, SAMPLING).pictures, wanted.pictures)
    assert min(again.done) > PICTURES - A_PART and again.done[-1] == PICTURES


def test_processes_start_where_they_are_worth_it() -> None:
    assert in_this_process(1000, ComputeSettings()) and in_this_process(15, ComputeSettings(workers=2))
    assert not in_this_process(16, ComputeSettings(workers=2))
    assert not in_this_process(1, ComputeSettings(gpus_per_worker=1)), "this process draws on the CPU"


def test_models_lie_where_all_nodes_see_them_while_they_draw(tmp_path: Path) -> None:
    subject = subject_of(tmp_path / "root", ComputeSettings(), Told())
    shared = subject.parts.folder("models-samples")
    for address in (None, "head:6379"):
        with laid_down(subject.vq, subject.prior, ComputeSettings(address=address), shared) as models:
            assert (models.url == shared.url) == (address is not None)
            loaded = load_model(models.path / "prior")
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), subject.prior.parameters(), strict=True))
            assert isinstance(load_model(models.path / "vq"), HierarchicalVQ)
        assert not models.path.exists() and shared.is_empty()
