"""Quantizers: gradients, losses, purity, precision, and the statistics that codebooks learn from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvqd_model.codec.codebooks import make_quantizer
from hvqd_model.codec.estimators import pass_gradient, rotate_gradient
from hvqd_model.codec.quantizer import CANDIDATES, CodebookStatistics, Quantizer, merge_statistics
from tests.small_quantizers import KINDS, Kind, assert_same, ema, keys, normal, started, state, statistics, whole

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
