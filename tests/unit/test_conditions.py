"""Conditions: what each tells the prior, how it is hidden, and how several of them guide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hvqd_model.config import CONDITIONS, PriorConfig
from hvqd_model.diffusion.guidance import guide
from hvqd_model.prior.conditioning import cell_shares
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.guided import GuidedPredictor, compose, passes
from hvqd_model.prior.prior import HierarchicalPrior

GRIDS = ((2, 2), (4, 4))
SIZES = (6, 7)
MAP = (8, 8)


def settings(**changes: Any) -> PriorConfig:
    base: dict[str, Any] = {
        "grids": GRIDS,
        "codebook_sizes": SIZES,
        "code_dim": 3,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "conditions": CONDITIONS,
        "classes": ("cats", "dogs", "birds"),
        "styles": ("oil", "ink"),
        "text_dim": 5,
        "text_encoder": "a" * 64,
        "map_labels": 4,
        "map_size": MAP,
    }
    return PriorConfig.model_validate(base | changes)


def random_prior(config: PriorConfig) -> HierarchicalPrior:
    """A prior whose every weight matters."""
    torch.manual_seed(0)
    prior = HierarchicalPrior(config, [torch.randn(size, 3) for size in SIZES])
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior.eval()


def some_conditions(images: int) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(images, 5, generator=generator), dim=1)
    maps = torch.randint(-1, 4, (images, *MAP), generator=generator)
    return Conditions(torch.arange(images) % 3, torch.arange(images) % 2, texts, maps)


def some_codes(images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(size + 1, (images, rows * columns), generator=generator)
        for size, (rows, columns) in zip(SIZES, GRIDS, strict=True)
    ]


def logits_of(prior: HierarchicalPrior, given: Tensor | Conditions | None, guidance: Any, images: int = 4) -> Tensor:
    predictor = GuidedPredictor(prior.denoiser, images, given, guidance, (0.0, 1.0))
    everywhere = [torch.arange(rows * columns).expand(images, -1) for rows, columns in GRIDS]
    with torch.no_grad():
        found = predictor(some_codes(images), [0.4, 0.7], 0.5, everywhere)
    return torch.cat([level.flatten(1) for level in found if level is not None], 1)


# ---- what the network is told ----


@pytest.mark.parametrize(("grid", "parts"), [((2, 2), 4), ((4, 4), 4), ((8, 8), 1), ((8, 4), 1)])
def test_a_cell_is_told_the_shares_of_the_labels_in_its_quarters(grid: tuple[int, int], parts: int) -> None:
    maps = torch.randint(-1, 3, (2, *MAP), generator=torch.Generator().manual_seed(0))
    found = cell_shares(maps, grid, 3)
    rows, columns = MAP[0] // grid[0], MAP[1] // grid[1]
    halves = 2 if parts == 4 else 1
    assert found.shape == (2, grid[0] * grid[1], parts * 3 + 1)
    for image in range(2):
        for cell in range(grid[0] * grid[1]):
            top, left = cell // grid[1] * rows, cell % grid[1] * columns
            whole = maps[image, top : top + rows, left : left + columns]
            expected = []
            for part in range(parts):
                high, wide = rows // halves, columns // halves
                up, across = part // halves * high, part % halves * wide
                piece = whole[up : up + high, across : across + wide]
                expected += [float((piece == label).double().mean()) for label in range(3)]
            expected.append(float((whole >= 0).double().mean()))
            torch.testing.assert_close(found[image, cell], torch.tensor(expected))


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_changes_the_prediction_and_hidden_is_as_if_it_were_not_given(name: Any) -> None:
    prior, given = random_prior(settings()), some_conditions(4)
    nothing = logits_of(prior, None, 1.0)
    assert not torch.equal(logits_of(prior, given.only(name), 1.0), nothing)
    assert torch.equal(logits_of(prior, given.only(), 1.0), nothing)
    bare = Conditions(torch.full((4,), -1))
    alone = bare._replace(
        **{{"class": "labels", "style": "styles", "text": "texts", "map": "maps"}[name]: given.part(name)}
    )
    assert torch.equal(logits_of(prior, alone, 1.0), logits_of(prior, given.only(name), 1.0))


def test_a_map_speaks_to_the_cells_it_covers_first() -> None:
    """Through the input alone (no block mixes tokens yet), a change of the map changes its own cell."""
    prior = random_prior(settings(depth=1))
    maps = torch.full((1, *MAP), -1)
    changed = maps.clone()
    changed[0, :2, :2] = 1
    told = [
        prior.denoiser.conditioning(torch.zeros(1, 2), Conditions(torch.tensor([0]), maps=m))[2]
        for m in (maps, changed)
    ]
    moved = [(a - b).abs().sum(2)[0] > 0 for a, b in zip(*told, strict=True)]
    assert [level.nonzero()[:, 0].tolist() for level in moved] == [[0], [0]]


def test_training_hides_each_condition_for_itself() -> None:
    config, images = settings(label_dropout=0.3), 2000
    torch.manual_seed(0)
    prior = HierarchicalPrior(config)
    seen: list[Conditions] = []
    prior.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    codes = [torch.zeros(images, *grid, dtype=torch.int64) for grid in GRIDS]
    given = some_conditions(images)._replace(maps=torch.zeros(images, *MAP, dtype=torch.int64))
    times = (torch.arange(images, dtype=torch.float64) + 0.5) / images
    prior(codes, given, times, torch.arange(images))
    with torch.no_grad():
        prior.bits(codes, given, torch.arange(images), draws=1)
    for told, share in zip(seen, (0.3, 0.0), strict=True):
        assert told.styles is not None and told.texts is not None and told.maps is not None
        hidden = torch.stack(
            [told.labels == -1, told.styles == -1, (told.texts == 0).all(1), (told.maps == -1).flatten(1).all(1)]
        ).double()
        assert hidden.mean(1).tolist() == pytest.approx([share] * 4, abs=0.04)
        if share:
            assert float((torch.corrcoef(hidden) - torch.eye(4)).abs().max()) < 0.08, "independent of each other"


def test_any_subset_of_four_conditions_is_learned_in_one_model() -> None:
    """A law that is known: the code of each level follows one condition, but for one in ten that is another code."""
    torch.manual_seed(0)
    config = settings(
        grids=((1, 1),) * 4, codebook_sizes=(3,) * 4, classes=("a", "b", "c"), styles=("a", "b", "c"), text_dim=3,
        map_labels=3, map_size=(2, 2), width=32, label_dropout=0.3,
    )  # fmt: skip
    prior = HierarchicalPrior(config, [torch.randn(3, 3)] * 4)
    optimizer = torch.optim.AdamW(prior.parameters(), 2e-2, betas=(0.9, 0.98), weight_decay=0.0)
    steps, images = 250, 64

    def draw(count: int) -> tuple[Conditions, Tensor, list[Tensor]]:
        answer = torch.randint(3, (count, 4))
        maps = answer[:, 3, None, None].expand(count, 2, 2)
        given = Conditions(answer[:, 0], answer[:, 1], torch.eye(3)[answer[:, 2]], maps)
        codes = torch.where(torch.rand(count, 4) < 0.85, answer, torch.randint(3, (count, 4)))
        return given, answer, [codes[:, level, None, None] for level in range(4)]

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-2 * min(1.0, 2 * (1 - step / steps))
        given, _, codes = draw(images)
        times = (torch.rand((), dtype=torch.float64) + torch.arange(images) / images) % 1
        optimizer.zero_grad()
        prior(codes, given, times, torch.randint(2**40, (images,))).loss.backward()
        optimizer.step()

    count = 1500
    given, answer, _ = draw(count)
    for subset in ((), ("class",), ("style", "map"), CONDITIONS):
        found = prior.sample(torch.arange(count), given.only(*subset), steps=4, sampler="ancestral", guidance=1.0)
        follows = (torch.stack([level.flatten() for level in found], 1) == answer).double().mean(0)
        expected = [0.85 + 0.15 / 3 if name in subset else 1 / 3 for name in CONDITIONS]
        assert follows.tolist() == pytest.approx(expected, abs=0.06), subset


# ---- guidance ----


def test_one_scale_guides_all_conditions_together() -> None:
    prior, given = random_prior(settings()), some_conditions(4)
    conditional, unconditional = logits_of(prior, given, 1.0), logits_of(prior, None, 1.0)
    assert torch.equal(logits_of(prior, given, 2.5), guide(conditional, unconditional, 2.5))
    assert torch.equal(logits_of(prior, given, 0.0), unconditional)


def test_a_scale_for_each_condition_adds_up_what_each_alone_changes() -> None:
    prior, given = random_prior(settings()), some_conditions(4)
    scales = {"class": 3.0, "style": 1.5, "text": 0.0, "map": 0.5}
    nothing = logits_of(prior, None, 1.0).double()
    expected = nothing.clone()
    for name, scale in scales.items():
        expected += scale * (logits_of(prior, given.only(name), 1.0).double() - nothing)  # type: ignore[arg-type]
    torch.testing.assert_close(logits_of(prior, given, scales).double(), expected, rtol=1e-5, atol=1e-5)
    assert [scale for scale, _ in passes(given, scales)] == [3.0, 1.5, 0.5], "a scale of 0 costs nothing"


def test_a_scale_for_one_condition_is_the_one_scale_when_nothing_else_is_given() -> None:
    prior, given = random_prior(settings()), some_conditions(4).only("style")
    one = logits_of(prior, given, 2.5)
    torch.testing.assert_close(logits_of(prior, given, {"style": 2.5}), one)
    torch.testing.assert_close(logits_of(prior, given, {"class": 7.0, "style": 2.5}), one)
    plain = logits_of(prior, given, 1.0)
    torch.testing.assert_close(logits_of(prior, given, {}), plain)  # who is not named has scale 1


def test_what_the_neighbours_are_told_does_not_matter() -> None:
    prior, given = random_prior(settings()), some_conditions(4)
    assert given.styles is not None
    own = given.only("class")
    others = own._replace(styles=torch.cat([torch.tensor([-1]), given.styles[1:]]))
    for guidance in (2.5, {"class": 2.5, "style": 1.5}):
        assert torch.equal(logits_of(prior, own, guidance)[0], logits_of(prior, others, guidance)[0])


def test_composing_independent_conditions_gives_their_conjunction() -> None:
    """p(x | a, b) = p(x) p(x | a) / p(x) p(x | b) / p(x), normalised, when a and b are independent given x."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((5,), (5, 2), (5, 3)))
    x, a, b = x / x.sum(), a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    joint = x[:, None, None] * a[:, :, None] * b[:, None, :]
    exact = joint[:, 1, 2] / joint[:, 1, 2].sum()
    given_a, given_b = (table / table.sum() for table in (joint[:, 1].sum(1), joint[:, :, 2].sum(1)))
    found = compose(x.log(), [(1.0, given_a.log()), (1.0, given_b.log())]).softmax(0)
    torch.testing.assert_close(found, exact)


def test_a_watcher_sees_codes_without_masks_and_changes_nothing() -> None:
    prior, given = random_prior(settings(stagger=1.0)), some_conditions(4)
    seen: list[list[Tensor]] = []
    plain = prior.sample(torch.arange(4), given, steps=6)
    watched = prior.sample(torch.arange(4), given, steps=6, watch=lambda codes: seen.append(list(codes)))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert 2 <= len(seen) <= 6 and len(seen[0]) == 1 and len(seen[-1]) == 2, "coarse first"
    for codes in seen:
        for level, size in zip(codes, SIZES, strict=False):
            assert int(level.max()) < size
    assert torch.equal(seen[-1][0], plain[0].flatten(1))


# ---- refusals ----


def test_conditions_that_are_not_this_priors_are_refused() -> None:
    prior, given = random_prior(settings()), some_conditions(2)
    seeds = torch.arange(2)
    bad = {
        r"styles must be \(2,\) numbers from -1 \(no style\) to 1: \[5\]\nhint: the styles are oil": given._replace(
            styles=torch.tensor([0, 5])
        ),
        r"texts must be \(2, 5\) embeddings: \(2, 4\)\nhint: embed captions": given._replace(texts=torch.zeros(2, 4)),
        r"maps must be \(2, 8, 8\) integers: torch\.int64 \(2, 4, 8\)\nhint: one label": given._replace(
            maps=torch.zeros(2, 4, 8, dtype=torch.int64)
        ),
        r"labels of maps must be from -1 \(none\) to 3: 0\.\.4\nhint: use the labels": given._replace(
            maps=torch.arange(128).view(2, 8, 8) % 5
        ),
    }
    for message, conditions in bad.items():
        with pytest.raises(ValueError, match=message):
            prior.sample(seeds, conditions)
    classes_alone = random_prior(settings(styles=(), text_dim=0, map_labels=0))
    with pytest.raises(
        ValueError, match=r"this prior knows no style: it was trained with class\nhint: leave style out"
    ):
        classes_alone.sample(seeds, given)


def test_guidance_that_the_prior_does_not_know_is_refused() -> None:
    prior = random_prior(settings(styles=()))
    bad = {
        r"guidance by style needs a prior with that condition, and this one has class, text, map: style=2\.0\nhint: ": {
            "style": 2.0
        },
        r"guidance must be at least 0: class=-1\.0\nhint: 1 follows": {"class": -1.0},
        r"guidance must be at least 0: text=nan\nhint: 1 follows": {"text": math.nan},
    }
    for message, guidance in bad.items():
        with pytest.raises(ValueError, match=message):
            prior.sample(torch.arange(2), guidance=guidance)


def test_a_condition_named_twice_and_maps_that_no_grid_divides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most once: \['map', 'map'\]\nhint: conditions=\['map'\]"):
        settings(conditions=("map", "map"))
    with pytest.raises(ValueError, match=r"map_size must be a multiple of every level's grid .*: \[8, 6\]\nhint: take"):
        settings(map_size=(8, 6))
