"""Measures against independent references, closed forms and invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from hvqd_model import metrics


def features(count: int, size: int = 16, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) + shift


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    pictures = torch.zeros(3, 3, 4, 4)
    targets = pictures + torch.tensor([1.0, 10.0, 255.0]).view(3, 1, 1, 1)
    expected = 20 * torch.log10(255 / torch.tensor([1.0, 10.0, 255.0])).double()
    torch.testing.assert_close(metrics.psnr(pictures, targets, 255.0), expected, atol=1e-5, rtol=0)


def test_psnr_of_equal_pictures_is_finite() -> None:
    assert metrics.psnr(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 255.0).tolist() == [100.0, 100.0]


def test_ssim_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(4, 3, 32, 24, generator=generator)
    noise = torch.rand(4, 3, 32, 24, generator=generator) * torch.tensor([0.0, 0.1, 0.3, 0.9]).view(4, 1, 1, 1)
    found = structural_similarity_index_measure(
        pictures * 0.5 + noise, pictures, data_range=1.0, reduction="none", sigma=1.5, return_full_image=True
    )
    assert isinstance(found, tuple)
    # Wang et al. use the windows that lie within the picture; torchmetrics also averages over a mirrored border.
    expected = found[1][..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(metrics.ssim(pictures * 0.5 + noise, pictures, 1.0), expected, atol=1e-5, rtol=1e-5)


def test_kid_equals_torchmetrics() -> None:
    x, y = features(40), features(40, seed=1, shift=0.3)
    assert metrics.kid(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kid_equals_a_sum_over_pairs_for_sets_of_different_sizes() -> None:
    x, y = features(5), features(8, seed=1)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 16 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(8) for j in range(8) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert metrics.kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    found = [metrics.kid(features(30, seed=2 * i), features(30, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5


def test_fid_of_a_set_with_itself_is_zero() -> None:
    for count in (10, 100):  # fewer and more pictures than features
        x = features(count)
        assert metrics.fid(x, x) == pytest.approx(0, abs=1e-9)


def test_fid_of_two_gaussians_with_a_shift_is_its_square() -> None:
    x = features(50)
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert metrics.fid(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


@pytest.mark.parametrize("counts", [(12, 9), (60, 9), (60, 50)])
def test_fid_equals_the_formula_with_a_matrix_root(counts: tuple[int, int]) -> None:
    x, y = features(counts[0], 8).numpy(), features(counts[1], 8, seed=1, shift=0.5).numpy() * 1.7
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    # The eigenvalues of a matrix's root are the roots of its eigenvalues; small sets leave tiny negative ones.
    root = np.sqrt(np.linalg.eigvals(s_x @ s_y).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x + s_y) - 2 * root
    assert metrics.fid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    for measure in (metrics.kid, metrics.fid, metrics.neighbourhood):
        with pytest.raises(ValueError, match=r"at least 2 pictures.*\nhint: "):
            measure(features(1), features(4))
        with pytest.raises(ValueError, match="equal features"):
            measure(features(4), features(4, size=3))


def test_neighbourhood_equals_loops() -> None:
    real, other, k = features(20, 3).numpy(), features(14, 3, seed=1, shift=0.8).numpy(), 3

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b))

    def reach(rows: np.ndarray, i: int) -> float:
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    reach_real = [reach(real, i) for i in range(20)]
    reach_other = [reach(other, j) for j in range(14)]
    inside = [[distance(real[i], other[j]) <= reach_real[i] for j in range(14)] for i in range(20)]
    found = metrics.neighbourhood(torch.from_numpy(real), torch.from_numpy(other), k)
    assert found.precision.tolist() == [any(inside[i][j] for i in range(20)) for j in range(14)]
    assert found.recall.tolist() == [
        any(distance(real[i], other[j]) <= reach_other[j] for j in range(14)) for i in range(20)
    ]
    assert found.coverage.tolist() == [any(row) for row in inside]
    assert found.density.mean() == pytest.approx(np.sum(inside) / (k * 14))  # Naeem et al., eq. 3


def test_equal_sets_cover_each_other() -> None:
    found = metrics.neighbourhood(features(30), features(30))
    assert (found.recall.mean(), found.coverage.mean(), found.precision.mean()) == (1, 1, 1)


def test_a_collapsed_set_has_no_recall() -> None:
    collapsed = features(1).expand(30, -1) + 1e-3 * features(30, seed=2)
    assert metrics.neighbourhood(features(50, seed=1), collapsed).recall.mean() == 0


def test_neighbours_are_fewer_in_small_sets() -> None:
    assert metrics.neighbourhood(features(3), features(9)).neighbours == 2


def test_nearest_is_exact() -> None:
    x, y = features(7), features(1500, seed=1)
    distances, places = metrics.nearest(x, y)
    expected = (x[:, None] - y[None]).norm(dim=2).min(1)
    torch.testing.assert_close(distances, expected.values)
    assert places.tolist() == expected.indices.tolist()


def test_usage_and_perplexity() -> None:
    counts = torch.tensor([5, 5, 5, 5, 0, 0, 0, 0])
    assert metrics.usage(counts) == 0.5
    assert metrics.perplexity(counts) == pytest.approx(4)
    assert metrics.perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)


def test_interval_of_pictures_in_groups_of_their_own_is_the_normal_one() -> None:
    values = features(400, 1)[:, 0].numpy()
    found = metrics.interval(values, np.arange(400), 2000, seed=3)
    assert found is not None
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_copies_of_a_picture_in_one_group_do_not_narrow_the_interval() -> None:
    values = features(60, 1)[:, 0].numpy()
    copies, groups = np.repeat(values, 5), np.repeat(np.arange(60), 5)
    once, five = metrics.interval(values, np.arange(60), 500, 0), metrics.interval(copies, groups, 500, 0)
    assert five == pytest.approx(once)


def test_median_interval_equals_resampling_by_hand() -> None:
    values, groups = features(31, 1)[:, 0].numpy(), np.arange(31) % 7
    weights = metrics.group_weights(7, 200, seed=5).numpy().astype(int)
    draws = [np.sort(np.repeat(values, weight[groups])) for weight in weights]
    medians = [draw[(len(draw) - 1) // 2] for draw in draws]  # the lower one of two middle values
    assert metrics.interval(values, groups, 200, 5, "median") == pytest.approx(
        tuple(np.percentile(medians, [2.5, 97.5]))
    )


def test_interval_depends_on_the_seed_alone() -> None:
    values = features(50, 1)[:, 0].numpy()
    names = np.array([f"concept {i % 9}" for i in range(50)])
    assert metrics.interval(values, names, 100, 1) == metrics.interval(values, names, 100, 1)
    assert metrics.interval(values, names, 100, 1) != metrics.interval(values, names, 100, 2)


def test_one_group_has_no_interval() -> None:
    assert metrics.interval([1.0, 2.0], ["a", "a"], 100, 0) is None
    assert metrics.kid_interval(features(4), features(4), [0] * 4, range(4), 100, 0) is None


def test_interval_refuses_values_without_groups() -> None:
    with pytest.raises(ValueError, match="values and groups must be as many: 2 and 3\nhint: "):
        metrics.interval([1.0, 2.0], [0, 1, 2], 10, 0)


def test_kid_resample_equals_its_pairs_by_hand() -> None:
    """Pairs of pictures of different groups count product-wise, pairs within one group once a copy of it."""
    x, y = features(6, 4), features(5, 4, seed=1)
    groups_x, groups_y, resamples = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 1, 1, 2, 3]), 40
    left = metrics.group_weights(4, resamples, 7).numpy()

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 4 + 1) ** 3

    def mean(a: Tensor, b: Tensor, g: np.ndarray, h: np.ndarray, w: np.ndarray, same: bool) -> float:
        total = pairs = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if not (same and i == j):
                    weight = w[g[i]] if g[i] == h[j] else w[g[i]] * w[h[j]]
                    total, pairs = total + weight * k(a[i], b[j]), pairs + weight
        return total / pairs if pairs else np.nan

    draws = [
        mean(x, x, groups_x, groups_x, w, True)
        + mean(y, y, groups_y, groups_y, w, True)
        - 2 * mean(x, y, groups_x, groups_y, w, False)
        for w in left
    ]
    found = metrics.kid_interval(x, y, groups_x, groups_y, resamples, 7, paired=True)
    assert found == pytest.approx(tuple(np.nanpercentile(draws, [2.5, 97.5])))


def test_kid_intervals_cover_the_truth() -> None:
    """With equal distributions the truth is zero: about 95 of 100 intervals hold it, though pictures come in groups."""
    covered = 0
    for trial in range(100):
        concepts = features(30, 4, seed=3 * trial).repeat_interleave(3, 0)
        x = concepts + 0.3 * features(90, 4, seed=3 * trial + 1)
        y = 1.044 * features(90, 4, seed=3 * trial + 2)
        found = metrics.kid_interval(x, y, np.arange(90) // 3, np.arange(90), 100, trial)
        assert found is not None
        covered += found[0] <= 0 <= found[1]
    assert covered >= 85


@pytest.mark.parametrize("most_blocks", [4, 128])
def test_the_parts_of_two_kids_give_their_difference(most_blocks: int) -> None:
    x, one, other = features(60), features(50, seed=1, shift=0.4), features(40, seed=2, shift=0.2)
    groups = np.arange(60) // 3
    parts = [metrics.kid_parts(x, y, groups, most_blocks) for y in (one, other)]
    assert len(parts[0].counts) == min(most_blocks, 20) and sum(parts[0].counts) == 60
    found, error = metrics.kid_difference(*parts, 100, 0)
    assert found == pytest.approx(metrics.kid(x, one) - metrics.kid(x, other), rel=1e-9)
    assert error > 0


def test_the_standard_error_of_a_difference_is_its_spread_over_new_pictures() -> None:
    """Pictures come in groups of three that resemble each other; both sets see the same reference."""
    found, errors = [], []
    for trial in range(150):
        concepts = features(40, 6, seed=4 * trial).repeat_interleave(3, 0)
        x = concepts + 0.3 * features(120, 6, seed=4 * trial + 1)
        sets = [features(150, 6, seed=4 * trial + 2, shift=0.5), features(150, 6, seed=4 * trial + 3, shift=0.4)]
        difference, error = metrics.kid_difference(
            *(metrics.kid_parts(x, y, np.arange(120) // 3) for y in sets), 200, trial
        )
        found.append(difference)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.2)


def test_sets_that_were_compared_with_other_pictures_have_no_difference() -> None:
    parts = [metrics.kid_parts(features(count), features(9, seed=1), np.arange(count)) for count in (10, 12)]
    with pytest.raises(ValueError, match=r"compared with other pictures: 10 and 12\nhint: judge both by one protocol"):
        metrics.kid_difference(*parts, 10, 0)


def test_paired_sets_need_the_same_groups() -> None:
    with pytest.raises(ValueError, match="same groups\nhint: "):
        metrics.kid_interval(features(4), features(4), range(4), range(1, 5), 10, 0, paired=True)
