"""Quantizers: nearest codes, gradients, what a codebook learns from and how it moves.

Vectors of small whole numbers make fp32 arithmetic exact, so that ties are ties and sums depend on no order.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvqd_model.codec import search as module
from hvqd_model.codec.codebooks import EMAQuantizer, make_quantizer
from hvqd_model.codec.estimators import pass_gradient, rotate_gradient
from hvqd_model.codec.quantizer import CANDIDATES, CodebookStatistics, Quantizer, merge_statistics
from hvqd_model.codec.search import kmeans, nearest_codes

Kind = Literal["ema", "gradient", "simvq"]
KINDS: tuple[Kind, ...] = ("ema", "gradient", "simvq")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(*shape: int, seed: int = 0, largest: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def keys(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count)


def started(kind: Kind = "ema", codes: int = 6, dim: int = 3, **changes: object) -> Quantizer:
    quantizer = make_quantizer(kind, codes, dim, **changes)  # type: ignore[arg-type]
    quantizer.start(normal(40, dim), 0)
    return quantizer


def ema(codebook: Tensor, decay: float = 0.9, restart_threshold: float = 0.0) -> EMAQuantizer:
    """A started EMA quantizer with a given codebook (k-means of distinct vectors, one each, are those vectors)."""
    quantizer = make_quantizer("ema", *codebook.shape, decay=decay, restart_threshold=restart_threshold)
    assert isinstance(quantizer, EMAQuantizer)
    quantizer.start(codebook, 0)
    quantizer.embedding.copy_(codebook)
    return quantizer


def statistics(counts: Tensor, sums: Tensor, candidates: Tensor | None = None) -> CodebookStatistics:
    found = torch.zeros(0, sums.shape[1]) if candidates is None else candidates
    return CodebookStatistics(counts.float(), sums.float(), found, torch.arange(len(found)))


def state(quantizer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


# Nearest codes


def reference_nearest(vectors: Tensor, codebook: Tensor) -> list[int]:
    """The first code at the least squared distance, one pair at a time."""
    distances = [[sum((a - b) ** 2 for a, b in zip(v, e, strict=True)) for e in codebook.tolist()] for v in vectors]
    return [row.index(min(row)) for row in distances]


@pytest.mark.parametrize("codes", [2, 7, 33])
def test_nearest_codes_equal_a_loop_and_ties_go_to_the_lowest_index(codes: int) -> None:
    vectors, codebook = whole(60, 2, largest=3), whole(codes, 2, seed=1, largest=3)
    expected = reference_nearest(vectors, codebook)
    ties = sum(row.eq(row.min()).sum() > 1 for row in torch.cdist(vectors, codebook))
    assert ties > 0, "the case must have ties"
    assert nearest_codes(vectors, codebook).tolist() == expected


def test_the_lowest_of_equal_codes_wins_wherever_they_stand() -> None:
    for codes in range(2, 40):
        assert nearest_codes(normal(9, 5), normal(1, 5, seed=1).expand(codes, -1)).tolist() == [0] * 9


@pytest.mark.parametrize("codes", [64, 192, 1024, 63, 200])  # whole blocks, and what is no multiple of a block
def test_the_smallest_distance_found_in_blocks_is_where_argmin_finds_it(codes: int) -> None:
    distances = whole(300, codes, seed=3, largest=2)  # most rows have their smallest value in several blocks
    distances[0] = torch.inf
    distances[1, 5 * codes // 6 :] = torch.nan
    distances[2] = torch.nan
    distances[3] = -torch.inf
    assert torch.equal(module._lowest(distances), torch.argmin(distances, dim=1))


def test_nearest_codes_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = whole(50, 3), whole(20, 3, seed=1)
    at_once = nearest_codes(vectors, codebook)
    for elements in (1, 20, 60, 147, 20 * 49):  # one row at a time, whole rows, a remainder, all but one
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        assert torch.equal(nearest_codes(vectors, codebook), at_once)


def test_a_codebook_larger_than_a_chunk_is_searched_row_by_row() -> None:
    side = 1 << 10  # at 2^20 codes a chunk is two rows
    codebook = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    vectors = torch.tensor([[0.0, 3.0], [77.0, 1.0], [1023.0, 1023.0], [-4.0, 5.0], [512.0, 0.0]])
    assert nearest_codes(vectors, codebook).tolist() == [3, 77 * side + 1, side * side - 1, 5, 512 * side]


@pytest.mark.parametrize("codes", [4, 128])
def test_no_vectors_have_no_codes(codes: int) -> None:
    found = nearest_codes(torch.zeros(0, 3), whole(codes, 3))
    assert found.shape == (0,) and found.dtype == torch.int64


def test_distances_are_computed_in_fp32() -> None:
    codebook = torch.tensor([[1.0], [1.001]])  # equal in bf16
    assert nearest_codes(torch.tensor([[1.0]], dtype=torch.bfloat16), codebook).tolist() == [0]
    quantizer = ema(codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(torch.tensor([[1.0], [1.0009]]), keys(2)).indices.tolist() == [0, 1]


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_straight_through_jacobian_is_the_identity(kind: Kind) -> None:
    quantizer = started(kind)
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z, keys(4)).values, normal(4, 3, seed=5))
    assert torch.equal(jacobian.reshape(12, 12), torch.eye(12))


def rotation_jacobian(e: Tensor, q: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(lambda z: rotate_gradient(z[None], q[None])[0], e)
    return found


def test_the_rotation_trick_scales_and_rotates_the_gradient() -> None:
    for seed, dim in itertools.product(range(5), (2, 3, 16)):
        e, q, gradient = normal(3, dim, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(rotate_gradient(e[None], q[None])[0], q, rtol=0, atol=1e-14)
        scale = q.norm() / e.norm()
        rotation = rotation_jacobian(e, q) / scale
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-14)
        assert float(torch.linalg.det(rotation)) == pytest.approx(1), "a rotation, not a reflection"
        torch.testing.assert_close(rotation @ (e / e.norm()), q / q.norm(), rtol=0, atol=1e-14)
        # What lies across the plane of both stays where it is.
        plane, _ = torch.linalg.qr(torch.stack([e, q], 1))
        across = gradient - plane @ (plane.T @ gradient)
        torch.testing.assert_close(rotation @ across, across, rtol=0, atol=1e-13)


def test_the_rotation_trick_keeps_the_angle_between_gradient_and_vector() -> None:
    e = normal(20, 8, dtype=torch.float64).requires_grad_()
    q, above = normal(20, 8, seed=1, dtype=torch.float64), normal(20, 8, seed=2, dtype=torch.float64)
    rotate_gradient(e, q).backward(above)
    assert e.grad is not None
    scale = q.norm(dim=1) / e.detach().norm(dim=1)
    torch.testing.assert_close(e.grad.norm(dim=1) / above.norm(dim=1), scale, rtol=1e-13, atol=0)
    cosine = torch.cosine_similarity
    torch.testing.assert_close(cosine(e.grad, e.detach()), cosine(above, q), rtol=0, atol=1e-13)


def test_without_a_rotation_the_gradient_goes_straight_through() -> None:
    e = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    q = torch.tensor([[-2.0, -4.0], [1.0, 1.0], [0.0, 0.0]])  # opposite; from nothing; to nothing
    above = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = rotate_gradient(e, q)
    out.backward(above)
    torch.testing.assert_close(out.detach(), q, rtol=0, atol=1e-6)
    assert e.grad is not None and torch.equal(e.grad, above)


def test_estimators_agree_where_the_code_is_the_vector() -> None:
    e = normal(5, 4, dtype=torch.float64).requires_grad_()
    gradients = []
    for estimator in ("straight-through", "rotation"):
        (found,) = torch.autograd.grad(pass_gradient(e, e.detach(), estimator).square().sum(), e)  # type: ignore[arg-type]
        gradients.append(found)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_quantizer_passes_its_gradient_by_its_estimator(kind: Kind, normalize: bool) -> None:
    quantizer = started(kind, estimator="rotation", normalize=normalize)
    z = normal(7, 3, seed=3).requires_grad_()
    (found,) = torch.autograd.grad(quantizer(z, keys(7)).values, z, normal(7, 3, seed=4))
    prepared = quantizer.prepare(z)
    codes = quantizer.lookup(quantizer.assign(z)).detach()
    (expected,) = torch.autograd.grad(rotate_gradient(prepared, codes), z, normal(7, 3, seed=4))
    torch.testing.assert_close(found, expected)


# The loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_commitment_weighs_the_vectors_term_and_not_the_codes(kind: Kind) -> None:
    """|sg(z) - e|^2 + beta |z - sg(e)|^2: a known bug of public code is beta on the wrong term."""
    quantizer = started(kind, commitment=0.25)
    z = normal(9, 3, seed=2).requires_grad_()
    output = quantizer(z, keys(9))
    codes = quantizer.codebook.detach()[output.indices]
    error = (z.detach() - codes).square().mean()
    learns = kind != "ema"
    torch.testing.assert_close(output.loss.detach(), (0.25 + learns) * error)
    output.loss.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z.detach() - codes) / z.numel())
    if kind == "gradient":
        expected = torch.zeros(6, 3).index_add_(0, output.indices, 2 * (codes - z.detach()) / z.numel())
        torch.testing.assert_close(quantizer.embedding.grad, expected)
    assert any(parameter.grad is not None for parameter in quantizer.parameters()) is learns


# Purity, precision, statistics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(kind: Kind, training: bool) -> None:
    quantizer = started(kind).train(training)
    before, random = state(quantizer), torch.get_rng_state()
    first, second = (quantizer(normal(9, 3, seed=1).requires_grad_(), keys(9)) for _ in range(2))
    (first.values.sum() + first.loss).backward()
    assert_same(state(quantizer), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first.values, second.values) and torch.equal(first.loss, second.loss)


def train_a_step(quantizer: Quantizer, run: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The state after one step whose forward goes through `run`, and the gradient of the vectors."""
    z = normal(30, 3, seed=1).requires_grad_()
    found: list[CodebookStatistics] = []

    def forward(vectors: Tensor) -> Tensor:
        output = quantizer(vectors, keys(30))
        found.append(output.statistics)
        total: Tensor = output.values.square().sum() + output.loss
        return total

    run(forward, z).backward()
    quantizer.update(found[0], 3)
    assert z.grad is not None
    return state(quantizer), z.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_activation_checkpointing_is_one_update(kind: Kind) -> None:
    plain = started(kind, restart_threshold=0.5)
    recomputed = copy.deepcopy(plain)
    after, gradient = train_a_step(plain, lambda forward, z: forward(z))
    again, same = train_a_step(recomputed, lambda forward, z: checkpoint(forward, z, use_reentrant=False))
    assert_same(again, after)
    assert torch.equal(gradient, same)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_precision_leaves_buffers_in_fp32(kind: Kind) -> None:
    quantizer = nn.Sequential(started(kind)).bfloat16().half().double()
    buffers = dict(quantizer.named_buffers())
    assert len(buffers) == {"ema": 4, "gradient": 1, "simvq": 2}[kind]
    assert {buffer.dtype for buffer in buffers.values()} <= {torch.float32, torch.bool}


def test_counts_in_a_bf16_module_reach_a_hundred() -> None:
    """In bf16 a moving average of 100 with decay .99 settles far below."""
    quantizer = ema(torch.tensor([[1.0], [3.0]]), decay=0.99).bfloat16()
    before = copy.deepcopy(quantizer.codebook)
    for step in range(600):
        quantizer.update(statistics(torch.tensor([100, 100]), torch.tensor([[200.0], [300.0]])), step)
    assert torch.equal(before, torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(quantizer.counts, torch.tensor([100.0, 100.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2.0], [3.0]]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_quantizer_answers_in_fp32(kind: Kind) -> None:
    quantizer = started(kind).bfloat16()
    output = quantizer(normal(5, 3).bfloat16(), keys(5))
    for tensor in (output.values, output.vectors, output.loss, quantizer.codebook):
        assert tensor.dtype == torch.float32
    for tensor in (output.statistics.counts, output.statistics.sums, output.statistics.candidates):
        assert tensor.dtype == torch.float32


def test_statistics_equal_loops() -> None:
    quantizer = ema(whole(5, 2))
    z, order = whole(20, 2, seed=1), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    output = quantizer(z, order)
    counts, sums = [0.0] * 5, torch.zeros(5, 2)
    for vector, index in zip(z, output.indices.tolist(), strict=True):
        counts[index] += 1
        sums[index] += vector
    assert output.statistics.counts.tolist() == counts
    assert torch.equal(output.statistics.sums, sums)
    assert output.statistics.candidate_priorities.tolist() == list(range(20))
    assert torch.equal(output.statistics.candidates[order], z)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_do_not_count_teach_nothing(kind: Kind) -> None:
    """The statistics and gradients are those of the others alone; the loss keeps the whole batch as its measure."""
    quantizer, vectors = started(kind), normal(40, 3, seed=3)
    counted = torch.arange(40) % 3 > 0
    found, alone = vectors.clone().requires_grad_(), vectors[counted].clone().requires_grad_()
    part = quantizer(found, keys(40), counted)
    whole = quantizer(alone, keys(40)[counted])
    part.loss.backward()
    by_code = [p.grad.clone() for p in quantizer.parameters() if p.grad is not None]
    quantizer.zero_grad()
    whole.loss.backward()
    share = float(counted.float().mean())
    torch.testing.assert_close(part.loss, whole.loss * share)
    assert found.grad is not None and alone.grad is not None
    torch.testing.assert_close(found.grad[counted], alone.grad * share)
    assert not found.grad[~counted].any()
    assert len(by_code) == len(list(quantizer.parameters()))
    for one, other in zip(by_code, [p.grad for p in quantizer.parameters()], strict=True):
        assert other is not None
        torch.testing.assert_close(one, other * share)
    assert torch.equal(part.statistics.counts, whole.statistics.counts)
    torch.testing.assert_close(part.statistics.sums, whole.statistics.sums)
    kept = part.statistics.candidate_priorities < 40
    assert torch.equal(part.statistics.candidates[kept], whole.statistics.candidates)


def test_a_vector_that_does_not_count_never_restarts_a_code() -> None:
    quantizer = ema(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), restart_threshold=0.5)
    vectors = torch.tensor([[7.0, 7.0], [0.0, 1.0], [0.0, -1.0], [8.0, 8.0]])
    quantizer.counts.copy_(torch.tensor([2.0, 0.0]))
    out = quantizer(vectors, keys(4), torch.tensor([False, True, True, False]))
    assert float(quantizer.update(out.statistics, 0)) == 1
    assert quantizer.codebook[1].tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("count", [40, 700])  # fewer and more vectors than there are candidates
@pytest.mark.parametrize("parts", [(1, 39), (13, 14), (20,), (5, 5, 5)])
def test_merged_statistics_do_not_depend_on_the_split(count: int, parts: tuple[int, ...]) -> None:
    quantizer = ema(whole(5, 2))
    z, priorities = whole(count, 2, seed=1), torch.randperm(count, generator=torch.Generator().manual_seed(0))
    sizes = [part * count // 40 for part in parts]
    sizes.append(count - sum(sizes))
    pieces = zip(z.split(sizes), priorities.split(sizes), strict=True)
    found = [quantizer(*piece).statistics for piece in pieces]
    merged = found[0]
    for other in found[1:]:
        merged = merge_statistics(merged, other)
    backwards = found[-1]
    for other in found[-2::-1]:
        backwards = merge_statistics(other, backwards)
    together = quantizer(z, priorities).statistics
    assert len(together.candidates) == min(count, CANDIDATES)
    for one in (merged, backwards):
        assert torch.equal(one.counts, together.counts) and torch.equal(one.sums, together.sums)
        assert torch.equal(one.candidate_priorities, together.candidate_priorities)
        assert torch.equal(one.candidates, together.candidates)


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


# The start


def blobs(count: int, members: int, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Far centres on a grid, and vectors close around them, in random order."""
    centres = 10 * torch.stack([torch.arange(count) % 5, torch.arange(count) // 5, *torch.zeros(dim - 2, count)], 1)
    vectors = (centres[:, None] + 0.1 * normal(count, members, dim, seed=seed)).flatten(0, 1)
    return centres, vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("key", range(5))
def test_separated_blobs_become_a_centre_each(key: int) -> None:
    centres, vectors = blobs(15, 12, seed=key)
    found = kmeans(vectors, 15, key)
    owner = torch.cdist(vectors, centres).argmin(1)
    means = torch.stack([vectors[owner == blob].mean(0) for blob in range(15)])
    nearest = torch.cdist(means, found).argmin(1)
    assert sorted(nearest.tolist()) == list(range(15))
    torch.testing.assert_close(found[nearest], means, rtol=0, atol=1e-5)


def test_a_started_codebook_finds_the_blobs_and_stays_there() -> None:
    centres, vectors = blobs(10, 20)
    quantizer = make_quantizer("ema", 10, 4)
    quantizer.start(vectors, 1)
    for step in range(20):
        quantizer.update(quantizer(vectors, keys(200)).statistics, step)
    distances = torch.cdist(centres, quantizer.codebook)
    assert sorted(distances.argmin(1).tolist()) == list(range(10))
    assert float(distances.min(1).values.max()) < 0.1


def test_kmeans_is_deterministic_in_its_key_and_draws_from_no_global_generator() -> None:
    vectors, random = normal(50, 3), torch.get_rng_state()
    assert torch.equal(kmeans(vectors, 7, 1), kmeans(vectors, 7, 1))
    assert not torch.equal(kmeans(vectors, 7, 1), kmeans(vectors, 7, 2))
    assert torch.equal(torch.get_rng_state(), random)


def test_kmeans_of_as_many_vectors_as_clusters_is_the_vectors() -> None:
    vectors = normal(8, 3)
    found = kmeans(vectors, 8, 0)
    assert sorted(torch.cdist(vectors, found).argmin(1).tolist()) == list(range(8))
    torch.testing.assert_close(torch.cdist(vectors, found).min(1).values, torch.zeros(8), rtol=0, atol=1e-3)


def test_kmeans_centres_are_the_means_of_what_is_nearest() -> None:
    vectors = blobs(4, 30)[1]
    found = kmeans(vectors, 6, 0, iterations=50)
    owner = torch.tensor(reference_nearest(vectors, found))
    for cluster in range(6):
        torch.testing.assert_close(found[cluster], vectors[owner == cluster].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_vectors_than_clusters_give_centres_beside_each(count: int) -> None:
    vectors = normal(count, 4)
    found = kmeans(vectors, 10, 0)
    assert len(found.unique(dim=0)) > count
    assert float(torch.cdist(found, vectors).min(1).values.max()) < 1e-2
    assert len(set(torch.cdist(found, vectors).argmin(1).tolist())) == count


def test_equal_vectors_give_finite_centres() -> None:
    assert torch.equal(kmeans(torch.ones(20, 3), 5, 0), torch.ones(5, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_start_spreads_the_codes_like_the_vectors(kind: Kind, normalize: bool) -> None:
    vectors = 30 * normal(200, 4)
    quantizer = make_quantizer(kind, 16, 4, normalize=normalize)
    quantizer.start(vectors, 0)
    length = 1.0 if normalize else float(vectors.norm(dim=1).mean())
    assert 0.5 * length < float(quantizer.codebook.detach().norm(dim=1).mean()) < 1.5 * length
    assert len(quantizer.assign(vectors).unique()) > 8


# SimVQ and the choice of a kind


def test_simvq_moves_every_code_with_one_vector() -> None:
    quantizer = started("simvq")
    before = quantizer.codebook.detach().clone()
    quantizer(normal(1, 3, seed=9), keys(1)).loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 0.1 * parameter.grad
    assert bool((quantizer.codebook != before).any(1).all())
    assert [name for name, _ in quantizer.named_parameters()] == ["map"]


def test_quantizers_do_not_draw_their_start_from_a_global_generator() -> None:
    built = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        built.append([state(make_quantizer(kind, 5, 3)) for kind in KINDS])
    for one, other in zip(*built, strict=True):
        assert_same(one, other)


def test_unknown_kinds_and_estimators_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^quantizer must be ema, gradient, simvq or fsq: other\nhint: set quantizer=ema$"
    ):
        make_quantizer("other", 4, 2)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^estimator must be straight-through or rotation: gumbel\nhint: set estimator=rotation$"
    ):
        pass_gradient(normal(2, 2), normal(2, 2), "gumbel")  # type: ignore[arg-type]
