"""How codebooks start, move and restart codes that nobody uses."""

from __future__ import annotations

import math

import pytest
import torch

from hvqd_model.codec.codebooks import make_quantizer
from tests.small_quantizers import KINDS, Kind, assert_same, ema, keys, normal, started, state, statistics, whole

# The start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_start_spreads_the_codes_like_the_vectors(kind: Kind, normalize: bool) -> None:
    vectors = 30 * normal(200, 4)
    quantizer = make_quantizer(kind, 16, 4, normalize=normalize)
    quantizer.start(vectors, 0)
    length = 1.0 if normalize else float(vectors.norm(dim=1).mean())
    assert 0.5 * length < float(quantizer.codebook.detach().norm(dim=1).mean()) < 1.5 * length
    assert len(quantizer.assign(vectors).unique()) > 8


# The moving average


def test_constant_statistics_pull_the_codes_to_their_means_at_the_rate_of_the_decay() -> None:
    """N_t = g^t n_0 + (1 - g^t) n and the same for the sums; with even use e_t - s/n = g^t (e_0 - s/n)."""
    codebook, counts, decay = whole(4, 3), torch.tensor([7, 1, 3, 5]), 0.8
    sums = whole(4, 3, seed=1) * counts[:, None]
    uneven, even = ema(codebook, decay), ema(codebook, decay)
    even_counts = torch.full((4,), 4)
    for step in range(1, 41):
        uneven.update(statistics(counts, sums), step)
        even.update(statistics(even_counts, sums), step)
        kept = decay**step
        start = codebook.double() * 4
        expected = (kept * start + (1 - kept) * sums) / (kept * 4 + (1 - kept) * counts.double())[:, None]
        torch.testing.assert_close(uneven.codebook.double(), expected, rtol=0, atol=1e-4)
        limit = sums.double() / 4
        torch.testing.assert_close(even.codebook - limit, kept * (codebook - limit), rtol=0, atol=1e-4)
    torch.testing.assert_close(uneven.codebook, sums / counts[:, None], rtol=0, atol=1e-2)


def test_smoothing_never_divides_by_zero_and_keeps_the_total() -> None:
    quantizer = ema(whole(3, 2), decay=0.1)
    for step in range(60):
        quantizer.update(statistics(torch.tensor([0, 8, 0]), torch.tensor([[0.0, 0.0], [8.0, 16.0], [0.0, 0.0]])), step)
    assert float(quantizer.counts.sum()) == pytest.approx(8, rel=1e-4)
    assert torch.isfinite(quantizer.codebook).all()
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([1.0, 2.0]), rtol=1e-4, atol=0)


def test_normalized_codes_stay_on_the_sphere() -> None:
    quantizer = started(normalize=True, restart_threshold=0.5)
    for step in range(5):
        quantizer.update(quantizer(normal(30, 3, seed=step) * 5, keys(30)).statistics, step)
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(6))
    values = quantizer(normal(30, 3) * 5, keys(30)).values
    torch.testing.assert_close(values.norm(dim=1), torch.ones(30))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_codebook_alone(poison: float) -> None:
    quantizer = ema(whole(3, 2), restart_threshold=0.5)
    quantizer.update(statistics(torch.tensor([2, 2, 2]), whole(3, 2, seed=1)), 0)
    before = state(quantizer)
    assert float(quantizer.update(statistics(torch.tensor([1, 2, 3]), torch.full((3, 2), poison)), 1)) == 0
    assert_same(state(quantizer), before)


def test_a_step_without_vectors_leaves_the_codebook_alone() -> None:
    quantizer = ema(whole(3, 2), restart_threshold=0.5)
    before = state(quantizer)
    quantizer.update(statistics(torch.zeros(3), torch.zeros(3, 2)), 0)
    assert_same(state(quantizer), before)


@pytest.mark.parametrize("kind", KINDS)
def test_until_its_start_a_quantizer_is_the_identity_and_learns_nothing(kind: Kind) -> None:
    quantizer = make_quantizer(kind, 6, 3, restart_threshold=0.5)
    z = normal(9, 3).requires_grad_()
    before = state(quantizer)
    output = quantizer(z, keys(9))
    assert torch.equal(output.values, z) and float(output.loss) == 0
    assert output.statistics.counts.sum() == 0 and len(output.statistics.candidates) == 0
    assert float(quantizer.update(output.statistics, 0)) == 0
    assert_same(state(quantizer), before)
    quantizer.start(output.vectors, 0)
    assert bool(quantizer.started)


@pytest.mark.parametrize("kind", ["gradient", "simvq"])
def test_a_codebook_that_learns_by_gradient_is_not_moved_by_updates(kind: Kind) -> None:
    quantizer = started(kind, restart_threshold=0.9)
    before = state(quantizer)
    assert float(quantizer.update(quantizer(normal(9, 3), keys(9)).statistics, 0)) == 0
    assert_same(state(quantizer), before)


# Restarts


def test_a_far_dead_code_is_replaced_once_and_used_in_the_next_step() -> None:
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0], [500.0, 500.0]])
    quantizer = ema(codebook, decay=0.5, restart_threshold=0.2)
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 2.0], [10.0, 1.0], [0.0, 1.0]])
    restarts, used = [], []
    for step in range(12):
        output = quantizer(z, keys(6))
        used.append(bool((output.indices == 2).any()))
        restarts.append(float(quantizer.update(output.statistics, step)))
    assert sum(restarts) == 1
    when = restarts.index(1.0)
    assert used == [False] * (when + 1) + [True] * (11 - when)
    # Unused from the start: N = 2 g^t falls below a fifth of the expected use, 0.4, at the third step.
    assert when == 2


def test_a_restarted_code_is_a_vector_of_the_step_at_the_expected_use() -> None:
    quantizer = ema(torch.tensor([[0.0], [5.0]]), decay=0.01, restart_threshold=0.1)
    candidates = torch.tensor([[3.0], [4.0]])
    found = statistics(torch.tensor([8, 0]), torch.tensor([[8.0], [0.0]]), candidates)
    assert float(quantizer.update(found, 0)) == 1
    assert quantizer.counts[1] == 4 and quantizer.sums[1] == 12
    assert float(quantizer.codebook[1]) == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("vectors", [1, 4, 64, 4096])
def test_restarts_are_relative_to_the_expected_use(vectors: int) -> None:
    """An absolute threshold restarts every code of a coarse level, whose expected use is below one vector."""
    codes = 16
    quantizer = ema(torch.arange(codes, dtype=torch.float32)[:, None], decay=0.99, restart_threshold=0.05)
    share = vectors / codes
    found = statistics(torch.full((codes,), share), torch.arange(codes)[:, None] * share, torch.full((8, 1), 3.0))
    assert [float(quantizer.update(found, step)) for step in range(100)] == [0.0] * 100
    starved = torch.full((codes,), vectors / (codes - 1))
    starved[5] = 0
    found = statistics(starved, starved[:, None] * torch.arange(codes)[:, None], torch.full((8, 1), 3.0))
    restarts = [float(quantizer.update(found, step)) for step in range(300)]
    assert sum(restarts) == 1
    assert restarts.index(1.0) == math.ceil(math.log(0.05) / math.log(0.99)) - 1


def test_the_least_used_codes_restart_first_when_candidates_are_few() -> None:
    quantizer = ema(whole(4, 1), decay=0.01, restart_threshold=0.9)
    found = statistics(torch.tensor([94, 3, 1, 2]), torch.zeros(4, 1), torch.tensor([[7.0], [8.0]]))
    assert float(quantizer.update(found, 0)) == 2
    torch.testing.assert_close(quantizer.codebook[[2, 3]], torch.tensor([[7.0], [8.0]]), rtol=1e-4, atol=0)
    assert quantizer.counts.argmin() == 1


def test_a_threshold_of_zero_never_restarts() -> None:
    quantizer = ema(whole(3, 1), decay=0.1, restart_threshold=0.0)
    found = statistics(torch.tensor([9, 0, 0]), torch.tensor([[9.0], [0.0], [0.0]]), torch.ones(5, 1))
    assert sum(float(quantizer.update(found, step)) for step in range(50)) == 0
