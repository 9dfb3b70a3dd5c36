"""The drawn pictures of a trial, judged on the validation split: the honest score of a tokenizer and a prior together.

The figures are those of `hvqd evaluate` (KID and recall on EfficientNet-Lite0's features), with the validation pictures
in the place of the test pictures, which no search may see. At a rung the pictures are fewer, and drawn from the moving
average of the weights in the rung's checkpoint, while the workers train on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model, metrics
from hvqd_model.randomness import derive_key, uniform
from infra.errors import InputError
from infra.storage import Store
from tuning.space import SearchSpace
from workflows.artifacts import read_manifest
from workflows.context import Context
from workflows.data.batches import CodeTable, ImageTable
from workflows.drawing.generate import decode_codes, draw_images, image_grid
from workflows.drawing.sheets import to_png
from workflows.evaluation.features import FeatureExtractor
from workflows.training.catalog import Saved
from workflows.training.inspection import export_checkpoint, find_checkpoints

log = logging.getLogger(__name__)

SAMPLES = "samples.png"
"""In the trial's folder: the first of its drawn pictures."""
_MOST_REFERENCE = 2_000
_SHOWN = 64
_CHECKPOINT_SECONDS = 60.0
"""A checkpoint is written right after its evaluation; one that does not come in this time never will."""
_POLL_SECONDS = 0.2


def judge_rung(context: Context, space: SearchSpace, images: int) -> tuple[int, Mapping[str, float]] | None:
    """(images, figures) of the first checkpoint of at least so many images, once there is one.

    Returns:
        None when there is none in time, when only that of the end is left, which is judged by more pictures, or when
        the training has deleted it meanwhile.
    """
    found = _awaited_checkpoint(context.root, images)
    if found is None or found.images_seen >= space.images:
        return None
    with tempfile.TemporaryDirectory(prefix="hvqd-rung-") as folder:
        target = Path(folder) / "prior"
        try:
            export_checkpoint(context.config, context.root, "prior", found.name, target)
        except (FileNotFoundError, InputError) as error:
            log.warning("no pictures at the rung of %s images: %s", images, error)
            return None
        prior = load_model(target)
    assert isinstance(prior, HierarchicalPrior)
    return found.images_seen, _judge(context, _tokenizer(context.root), prior, space.budget.rung_samples)


def _awaited_checkpoint(root: Store, images: int) -> Saved | None:
    """The first good checkpoint of the prior that has at least so many images."""
    deadline = time.monotonic() + _CHECKPOINT_SECONDS
    while True:
        good = [found.saved for found in find_checkpoints(root, "prior") if found.saved is not None]
        if late := [saved for saved in good if saved.images_seen >= images]:
            return late[-1]  # they come newest first
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)


def judge_pictures(context: Context) -> dict[str, float]:
    """val_kid_samples, val_kid_reconstructions and val_recall_samples of a root's tokenizer and prior.

    As many pictures are drawn as `evaluation.samples` says, with `sampling`, the same for the same seed.

    Raises:
        InputError: the validation split has fewer than two pictures.
    """
    with tempfile.TemporaryDirectory(prefix="hvqd-pictures-") as folder:
        prior = load_model(context.root.child("prior", "model").download_folder(Path(folder)))
    assert isinstance(prior, HierarchicalPrior)
    vq = _tokenizer(context.root)
    figures = _judge(context, vq, prior, context.config.evaluation.samples)
    reference, codes = _reference(context.root), read_manifest(context.root.child("codes"), "hvqd encode")
    table = CodeTable.open(context.root.child("codes"), codes, "val")
    rows = _spread(len(reference))
    rebuilt = decode_codes(vq, [level[rows] for level in table.codes], context.config.sampling.batch)
    extract = FeatureExtractor(context.config.evaluation.feature_size)
    real, again = (torch.from_numpy(extract(pictures)) for pictures in (reference.images[rows], rebuilt))
    return {**figures, "val_kid_reconstructions": metrics.kid(real, again)}


def _judge(context: Context, vq: HierarchicalVQ, prior: HierarchicalPrior, samples: int) -> dict[str, float]:
    """Figures of so many drawn pictures, of which the first are kept to look at."""
    config, root = context.config, context.root
    torch.set_num_threads(config.compute.threads_per_worker)
    images = _reference(root)
    keys = [derive_key("search sample", config.evaluation.seed, index) for index in range(samples)]
    drawn = draw_images(
        vq,
        prior,
        keys,
        _labels(images, keys, known=bool(prior.config.classes)),
        config.sampling,
        lambda done, total: context.progress.update(done, total, "pictures drawn"),
    )
    root.write_bytes(SAMPLES, to_png(image_grid(drawn[:_SHOWN], columns=8)))
    extract = FeatureExtractor(config.evaluation.feature_size)
    rows = _spread(len(images))
    real, new = (torch.from_numpy(extract(pictures)) for pictures in (images.images[rows], drawn))
    near = metrics.neighbourhood(real, new[: len(rows)])
    return {
        "val_kid_samples": metrics.kid(real, new),
        "val_recall_samples": float(np.mean(np.asarray(near.recall, dtype=np.float64))),
    }


def _tokenizer(root: Store) -> HierarchicalVQ:
    with tempfile.TemporaryDirectory(prefix="hvqd-pictures-") as folder:
        vq = load_model(root.child("vq", "model").download_folder(Path(folder)))
    assert isinstance(vq, HierarchicalVQ)
    return vq


def _reference(root: Store) -> ImageTable:
    """The validation pictures.

    Raises:
        InputError: there are fewer than two.
    """
    dataset = read_manifest(root.child("dataset"), "hvqd data build")
    images = ImageTable.open(root.child("dataset"), dataset, "val")
    if len(images) < 2:
        raise InputError(
            f"the validation split must have at least 2 pictures to judge drawn ones: {len(images)}\n"
            "hint: raise data.validation_share, or bring more pictures"
        )
    return images


def _spread(rows: int) -> np.ndarray:
    """At most `_MOST_REFERENCE` rows, evenly over all."""
    count = min(rows, _MOST_REFERENCE)
    return np.arange(count) * rows // count


def _labels(images: ImageTable, keys: list[int], *, known: bool) -> list[int]:
    """A class for each key, as often as the validation pictures have it; -1 where there are no classes."""
    if not known:
        return [-1] * len(keys)
    rows = (uniform(torch.tensor(keys), stream=derive_key("search label")) * len(images)).long().numpy()
    return [int(label) for label in np.sort(images.labels)[rows]]
