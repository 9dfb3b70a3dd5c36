"""What an evaluation is made of: the features, the judge, and figures with their intervals and n."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvqd_model.metrics import kid
from workflows.evaluation.features import FeatureExtractor
from workflows.evaluation.figures import (
    PictureSet,
    Resampling,
    class_figures,
    code_figures,
    nearest_figures,
    reconstruction_figures,
    rounded,
    set_figures,
)
from workflows.evaluation.judge import ClassJudge

RESAMPLING = Resampling(50, 1)


def picture_set(count: int, seed: int, shift: float = 0.0) -> PictureSet:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, count)
    features = (rng.normal(size=(count, 8)) + shift).astype(np.float32)
    features[np.arange(count), labels] += 6
    return PictureSet(pictures, features, labels, np.arange(count) // 2)


def test_features_do_not_depend_on_the_other_pictures() -> None:
    extractor = FeatureExtractor(32)
    pictures = picture_set(67, 0).pictures
    together = extractor(pictures)
    assert together.shape == (67, 1280) and np.isfinite(together).all()
    assert np.array_equal(extractor(pictures[65:66])[0], together[65])
    assert np.unique(together, axis=0).shape[0] == 67
    assert len(str(extractor.protocol["weights_sha256"])) == 64


def test_the_judge_learns_classes_and_ignores_pictures_without_one() -> None:
    train, test = picture_set(200, 0), picture_set(100, 1)
    labels = train.labels.copy()
    labels[::4] = -1
    judge = ClassJudge(train.features, labels, 3, ridge=0.01)
    assert (judge.judge(test.features) == test.labels).mean() > 0.95
    again = ClassJudge(train.features[labels >= 0], labels[labels >= 0], 3, ridge=0.01)
    assert np.array_equal(again.judge(test.features), judge.judge(test.features))


def test_the_judge_stands_at_the_minimum_of_its_loss() -> None:
    """At the minimum the free biases make the mean probabilities equal to the shares of the classes."""
    train = picture_set(90, 0)
    judge = ClassJudge(train.features, train.labels, 3, ridge=0.05)
    x = (train.features - train.features.mean(0)) / train.features.std(0)
    logits = x @ judge._weights.detach().numpy() + judge._bias.detach().numpy()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert probabilities.mean(0) == pytest.approx(np.bincount(train.labels) / 90, abs=1e-4)


def test_reconstruction_figures_of_every_prefix() -> None:
    originals = picture_set(10, 0).pictures // 2
    coarse, fine = originals + 30, originals + 3
    found = reconstruction_figures(originals, [coarse, fine], np.arange(10) // 2, RESAMPLING)
    assert set(found) == {"psnr", "psnr_prefix_1", "psnr_prefix_2", "ssim"}
    assert found["psnr_prefix_1"].value == pytest.approx(20 * math.log10(255 / 30))
    assert found["psnr"].value == found["psnr_prefix_2"].value == pytest.approx(20 * math.log10(255 / 3))
    assert 0.9 < found["ssim"].value < 1 and found["ssim"].n == 10


def test_code_figures() -> None:
    counts = [np.array([4, 4, 0, 0]), np.array([10, 0, 0, 0, 0, 0, 0, 6])]
    bits = [np.array([8.0, 4.0]), np.array([16.0, 48.0])]
    found = code_figures(counts, 7, bits, [(1, 2), (2, 4)], np.array(["a", "b"]), RESAMPLING)
    assert found["rate_bits"].value == 2 * 2 + 8 * 3
    assert (found["usage_0"].value, found["usage_1"].value) == (0.5, 0.25)
    assert found["perplexity_0"].value == pytest.approx(2)
    assert (found["bits_0"].value, found["bits_1"].value, found["bits_total"].value) == (3, 4, 38)
    assert found["usage_0"].interval is None and found["bits_0"].interval == (2, 4)


def test_set_figures_tell_a_far_set_from_a_near_one() -> None:
    real = picture_set(60, 0)
    near = set_figures("near", real, picture_set(80, 1), RESAMPLING)
    far = set_figures("far", real, picture_set(80, 2, shift=3), RESAMPLING)
    assert set(near) == {"kid_near", "fid_near", "recall_near", "density_near", "coverage_near"}
    assert far["kid_far"].value > 5 * abs(near["kid_near"].value)
    assert far["fid_far"].value > near["fid_near"].value
    assert far["recall_far"].value < near["recall_near"].value
    for name, figure in {**near, **far}.items():
        if not name.startswith("fid"):
            assert figure.interval is not None and figure.interval[0] <= figure.value <= figure.interval[1]
    assert (near["kid_near"].n, near["recall_near"].n) == (80, 60)


def test_reconstructions_are_resampled_with_their_originals() -> None:
    import torch

    real = picture_set(60, 0)
    moved = PictureSet(real.pictures, real.features + 0.5, real.labels, real.groups)
    paired = set_figures("reconstructions", real, moved, RESAMPLING)["kid_reconstructions"]
    apart = set_figures("samples", real, moved, RESAMPLING)["kid_samples"]
    assert (
        paired.value
        == apart.value
        == pytest.approx(kid(torch.from_numpy(real.features), torch.from_numpy(moved.features)))
    )
    assert paired.interval is not None and apart.interval is not None
    assert paired.interval[1] - paired.interval[0] < apart.interval[1] - apart.interval[0]


def test_class_accuracy_leaves_out_pictures_without_a_class() -> None:
    real = picture_set(120, 0)
    judge = ClassJudge(real.features, real.labels, 3, ridge=0.01)
    labels = real.labels.copy()
    labels[:100] = -1
    unknown = PictureSet(real.pictures, real.features, np.full(120, -1), real.groups)
    half = PictureSet(real.pictures, real.features, labels, real.groups)
    found = class_figures(judge, {"real": half, "samples": unknown}, majority=1, resampling=RESAMPLING)
    assert set(found) == {"class_accuracy_real", "class_shuffled_real", "class_majority"}
    assert found["class_accuracy_real"].n == 20
    assert found["class_majority"].value == pytest.approx((labels[100:] == 1).mean())


def test_chance_is_the_mean_accuracy_over_every_shuffle_of_the_asked_classes() -> None:
    real = picture_set(120, 0)
    judge = ClassJudge(real.features, real.labels, 3, ridge=0.01)
    found = class_figures(judge, {"real": real}, majority=0, resampling=RESAMPLING)
    seen = judge.judge(real.features)
    rolled = [(seen == np.roll(real.labels, by)).mean() for by in range(120)]  # each picture meets each label once
    assert found["class_shuffled_real"].value == pytest.approx(np.mean(rolled))


def test_a_training_picture_has_no_distance_to_the_training_pictures() -> None:
    train, other = picture_set(30, 0), picture_set(30, 1)
    figures, found = nearest_figures(train.features, {"copies": train, "heldout": other}, RESAMPLING)
    assert figures["nearest_train_copies"].value == pytest.approx(0, abs=1e-6)
    assert found["copies"][1].tolist() == list(range(30))
    assert figures["nearest_train_heldout"].value > 0.5


def test_figures_have_six_digits() -> None:
    assert rounded(12.3456789) == 12.3457
    assert rounded(-1.23456789e-8) == -1.23457e-8
