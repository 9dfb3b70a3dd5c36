"""The perceptual distance: against loops, at the places where a gradient could break, and on real pictures."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hvqd_model.codec.perceptual import perceptual_distance
from workflows.data.sources import BUNDLED
from workflows.evaluation.feature_network import FeatureMaps


def maps(seed: int, pictures: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pictures, *shape, generator=generator) for shape in ((5, 3, 2), (7, 1, 2))]


def emoji(count: int, side: int) -> Tensor:
    """(count, 3, side, side) bundled pictures on white, in [-1, 1], spread over the whole set."""
    column = pq.read_table(BUNDLED, columns=["image"]).column("image")
    found = []
    for index in range(0, len(column), len(column) // count):
        picture = Image.open(io.BytesIO(column[index].as_py())).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        found.append(np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(found[:count])).permute(0, 3, 1, 2).float() / 127.5 - 1


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur within three pixels of the edge."""
    axis = torch.arange(-3.0, 4.0)
    window = torch.exp(-axis.square() / (2 * sigma**2))
    window = (window / window.sum()).expand(3, 1, 7)
    padded = F.pad(pictures, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(padded, window[:, :, :, None], groups=3), window[:, :, None, :], groups=3)


def test_the_distance_equals_loops_over_layers_and_positions() -> None:
    one, other = maps(0), maps(1)
    expected = []
    for picture in range(2):
        layers = []
        for a, b in zip(one, other, strict=True):
            squares = []
            for row in range(a.shape[2]):
                for column in range(a.shape[3]):
                    x, y = (map_[picture, :, row, column].double().numpy() for map_ in (a, b))
                    squares.append(np.square(x / np.linalg.norm(x) - y / np.linalg.norm(y)).sum())
            layers.append(sum(squares) / len(squares))
        expected.append(sum(layers) / len(layers))
    assert perceptual_distance(one, other).tolist() == pytest.approx(expected, rel=1e-4)


def test_equal_maps_are_no_distance_apart_and_opposite_ones_four() -> None:
    one = maps(0)
    assert perceptual_distance(one, one).tolist() == [0.0, 0.0]
    assert perceptual_distance(one, [-x for x in one]).tolist() == pytest.approx([4.0, 4.0], rel=1e-4)


def test_only_the_direction_of_features_counts() -> None:
    one, other = maps(0), maps(1)
    scaled = perceptual_distance([7 * x for x in one], other)
    torch.testing.assert_close(scaled, perceptual_distance(one, other), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_gradient_is_finite_at_equality_and_where_features_vanish(scale: float) -> None:
    features = [(scale * x).requires_grad_() for x in maps(0)]
    for targets in (maps(0), [torch.zeros_like(x) for x in maps(0)]):
        for gradient in torch.autograd.grad(perceptual_distance(features, targets).sum(), features):
            assert torch.isfinite(gradient).all()


def test_the_distance_is_float32_whatever_the_maps_precision() -> None:
    low = [x.bfloat16() for x in maps(0)]
    found = perceptual_distance(low, maps(1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, perceptual_distance([x.float() for x in low], maps(1)), rtol=0, atol=0)


@pytest.mark.parametrize("given", [[], maps(0)[:1], maps(0, pictures=1)])
def test_maps_of_other_shapes_are_refused(given: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^feature maps must have the shapes of the targets'.*\nhint: take both from"):
        perceptual_distance(given, maps(1) if given else [])


def test_a_blur_is_worse_than_a_shift_by_one_pixel_though_not_in_pixels() -> None:
    framed = emoji(48, 34)
    crops, shifted = framed[:, :, 1:-1, 1:-1], framed[:, :, 1:-1, 2:]
    soft = blurred(framed, 1.2)[:, :, 1:-1, 1:-1]
    features = FeatureMaps(torch.device("cpu"))
    with torch.no_grad():
        targets = features(crops)
        worse = perceptual_distance(features(soft), targets) > perceptual_distance(features(shifted), targets)
    in_pixels = (soft - crops).square().flatten(1).mean(1) > (shifted - crops).square().flatten(1).mean(1)
    assert float(worse.float().mean()) > 0.95
    assert float(in_pixels.float().mean()) < 0.2


def test_the_distance_grows_with_noise_and_its_gradient_leads_back() -> None:
    pictures = emoji(8, 32)
    features = FeatureMaps(torch.device("cpu"))
    with torch.no_grad():
        targets = features(pictures)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    found = [float(perceptual_distance(features(pictures + s * noise), targets).mean()) for s in (0, 0.05, 0.1, 0.3)]
    assert found[0] == 0 and found == sorted(found) and math.isfinite(found[-1])
    noisy = (pictures + 0.1 * noise).requires_grad_()
    (gradient,) = torch.autograd.grad(perceptual_distance(features(noisy), targets).mean(), noisy)
    with torch.no_grad():
        stepped = noisy - 0.5 * gradient / gradient.norm()
        assert float(perceptual_distance(features(stepped), targets).mean()) < 0.98 * found[2]
