"""The adversary's network and losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvqd_model.codec.discriminator import Discriminator, adaptive_weight, adversarial_loss, discriminator_loss
from hvqd_model.codec.losses import with_gradient


def network(halvings: int = 2) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(16, halvings)


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (40, 256)])
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_there_is_a_verdict_for_every_cell_of_pictures_of_any_size(height: int, width: int, halvings: int) -> None:
    verdicts = network(halvings)(pictures(1, height, width))
    assert verdicts.shape == (1, height >> halvings, width >> halvings)
    assert verdicts.dtype == torch.float32


@pytest.mark.parametrize(("halvings", "patch"), [(1, 12), (2, 26), (3, 54)])
def test_a_verdict_sees_a_patch_of_the_width_that_is_promised(halvings: int, patch: int) -> None:
    model = network(halvings)
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.GroupNorm):  # it looks at the whole picture: what is measured are the convolutions
            model.layers[index] = nn.Identity()
    given = pictures(1, 128, 128).requires_grad_()
    verdicts = model(given)
    (gradient,) = torch.autograd.grad(verdicts[0, verdicts.shape[1] // 2, verdicts.shape[2] // 2], given)
    rows = torch.nonzero(gradient[0].abs().sum((0, 2)))
    assert int(rows.max() - rows.min()) + 1 == patch


def test_a_pictures_verdicts_do_not_depend_on_the_others_in_training_either() -> None:
    model = network().train()
    given = pictures(5)
    torch.testing.assert_close(model(given)[1:2], model(given[1:2]), rtol=1e-5, atol=1e-6)
    assert dict(model.named_buffers()) == {}


def test_it_learns_to_tell_blurred_pictures_from_sharp_ones() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    real = pictures(8)
    fake = nn.functional.avg_pool2d(real, 3, 1, 1)
    losses = []
    for _ in range(30):
        loss = discriminator_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2.0, abs=0.5), "undecided at first"
    assert losses[-1] < 0.3


def test_the_hinge_losses_equal_their_definitions() -> None:
    real, fake = torch.tensor([[[2.0, 0.5, -1.0]]]), torch.tensor([[[-3.0, 0.0, 1.0]]])
    assert float(discriminator_loss(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert float(adversarial_loss(fake)) == pytest.approx(2 / 3)


def test_the_adaptive_weight_makes_both_gradients_equally_long_within_its_bounds() -> None:
    reconstruction, adversarial = pictures(1).flatten(), 0.03 * pictures(2)[0].flatten()
    weight = adaptive_weight(reconstruction, adversarial)
    torch.testing.assert_close((weight * adversarial).norm(), reconstruction.norm(), rtol=1e-4, atol=0)
    assert float(adaptive_weight(reconstruction, torch.zeros(3072))) == 1e4
    assert float(adaptive_weight(torch.zeros(3072), adversarial)) == 0.0


def test_a_loss_that_was_differentiated_before_gives_the_same_gradient_afterwards() -> None:
    weights = torch.linspace(-1, 1, 12).requires_grad_()

    def decoded() -> Tensor:
        return torch.tanh(weights.view(1, 3, 2, 2) * 2)

    (expected,) = torch.autograd.grad(decoded().pow(3).sum(), weights)
    known = decoded().detach().requires_grad_()
    value = known.pow(3).sum()
    (gradient,) = torch.autograd.grad(value, known)
    loss = with_gradient(value, decoded(), gradient)
    assert torch.equal(loss, value)
    torch.testing.assert_close(torch.autograd.grad(loss, weights)[0], expected)
