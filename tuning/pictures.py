"""The final pictures of a trial, judged on the validation split: the honest score of a tokenizer and a prior together.

The figures are those of `hvqd evaluate` (KID and recall on EfficientNet-Lite0's features), with the validation pictures
in the place of the test pictures, which no search may see.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model, metrics
from hvqd_model.randomness import derive_key, uniform
from infra.errors import InputError
from workflows.artifacts import read_manifest
from workflows.context import Context
from workflows.data.batches import CodeTable, ImageTable
from workflows.features import FeatureExtractor
from workflows.generate import decode_codes, draw_images, image_grid
from workflows.sheets import to_png

SAMPLES = "samples.png"
"""In the trial's folder: the first of its drawn pictures."""
_MOST_REFERENCE = 2_000
_SHOWN = 64


def judge_pictures(context: Context) -> dict[str, float]:
    """val_kid_samples, val_kid_reconstructions and val_recall_samples of a root's tokenizer and prior.

    As many pictures are drawn as `evaluation.samples` says, with `sampling`, the same for the same seed.

    Raises:
        InputError: the validation split has fewer than two pictures.
    """
    config, root = context.config, context.root
    torch.set_num_threads(config.compute.threads_per_worker)
    with tempfile.TemporaryDirectory(prefix="hvqd-pictures-") as folder:
        models = [
            load_model(root.child(kind, "model").download_folder(Path(folder) / kind)) for kind in ("vq", "prior")
        ]
    vq, prior = models
    assert isinstance(vq, HierarchicalVQ) and isinstance(prior, HierarchicalPrior)
    dataset = read_manifest(root.child("dataset"), "hvqd data build")
    images = ImageTable.open(root.child("dataset"), dataset, "val")
    codes = CodeTable.open(root.child("codes"), read_manifest(root.child("codes"), "hvqd encode"), "val")
    count = min(len(images), _MOST_REFERENCE)
    if count < 2:
        raise InputError(
            f"the validation split must have at least 2 pictures to judge drawn ones: {count}\n"
            "hint: raise data.validation_share, or bring more pictures"
        )
    chosen = np.arange(count) * len(images) // count
    samples, seed = config.evaluation.samples, config.evaluation.seed
    keys = [derive_key("search sample", seed, index) for index in range(samples)]
    drawn = draw_images(
        vq,
        prior,
        keys,
        _labels(images, keys, known=bool(prior.config.classes)),
        config.sampling,
        lambda done, total: context.progress.update(done, total, "pictures drawn"),
    )
    root.write_bytes(SAMPLES, to_png(image_grid(drawn[:_SHOWN], columns=8)))
    rebuilt = decode_codes(vq, [level[chosen] for level in codes.codes], config.sampling.batch)
    extract = FeatureExtractor(config.evaluation.feature_size)
    real, new, again = (torch.from_numpy(extract(pictures)) for pictures in (images.images[chosen], drawn, rebuilt))
    near = metrics.neighbourhood(real, new[:count])
    return {
        "val_kid_samples": metrics.kid(real, new),
        "val_kid_reconstructions": metrics.kid(real, again),
        "val_recall_samples": float(np.mean(np.asarray(near.recall, dtype=np.float64))),
    }


def _labels(images: ImageTable, keys: list[int], *, known: bool) -> list[int]:
    """A class for each key, as often as the validation pictures have it; -1 where there are no classes."""
    if not known:
        return [-1] * len(keys)
    rows = (uniform(torch.tensor(keys), stream=derive_key("search label")) * len(images)).long().numpy()
    return [int(label) for label in np.sort(images.labels)[rows]]
