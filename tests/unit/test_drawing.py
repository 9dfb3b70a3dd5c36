"""Using a model: what is asked for in names, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvqd_model import HierarchicalPrior, PriorConfig, save_model
from infra.errors import InputError
from tests.pictures import encoded, noise
from tests.unit.test_generate import models
from workflows.config import RunConfig, SamplingSettings
from workflows.context import Silent
from workflows.data.learned_text import LearnedText, load_text, write_text
from workflows.data.text_encoder import TextEncoder, encoder_digest, encoder_folder
from workflows.drawing.asking import Asked, nearest_caption, resolve
from workflows.drawing.bundle import LoadedBundle, load_bundle, write_bundle
from workflows.drawing.editing import BATCH, EditRequest, enlarge, fill, interpolate, kept_levels, restyle
from workflows.drawing.generate import decode_codes, draw_images
from workflows.drawing.sample import RECIPE, SampleRequest, draw_samples, parse_guidance, read_recipe, seeds_for
from workflows.drawing.sheets import GAP
from workflows.encode import encode_batches
from workflows.loading import load_config

CLASSES = ("cats", "dogs", "birds")
SAMPLING = SamplingSettings(steps=3, batch=4, guidance=2.0)


def save(folder: Path, **changes: Any) -> Path:
    """A bundle of tiny models that are told all four conditions."""
    vq, plain = models()
    # Codebooks as small as what an untrained encoder says, so that pictures have codes of their own.
    small = {name: x * 0.1 if "quantizers" in name and x.ndim == 2 else x for name, x in vq.state_dict().items()}
    vq.load_state_dict(small)
    config = PriorConfig.model_validate(
        plain.config.model_dump()
        | {"conditions": ("class", "style", "text", "map"), "styles": ("ink", "oil"), "text_dim": 384}
        | {"text_encoder": encoder_digest(encoder_folder(None)), "map_labels": 3, "map_size": (16, 16), "stagger": 1.0}
        | changes
    )
    torch.manual_seed(0)
    prior = HierarchicalPrior(config, vq.codebooks)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(0, 0.2)
    save_model(vq, folder / "made" / "vq")
    save_model(prior, folder / "made" / "prior")
    rows = (3, 1, 2) if config.classes else ()
    write_bundle(
        folder / "bundle",
        folder / "made" / "vq",
        folder / "made" / "prior",
        config.classes,
        rows,
        SAMPLING,
        {},
        "# card\n",
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model that is told everything."""
    return save(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def bundle(told: Path) -> LoadedBundle:
    """The same, in memory, with three learned captions."""
    loaded = load_bundle(told)
    assert loaded.text is not None
    captions = ("red apple", "grinning face", "flag: Germany")
    learned = LearnedText(loaded.text.encoder, captions, loaded.text.encoder(captions).astype(np.float16))
    return replace(loaded, text=learned)


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an unconditional model."""
    nothing = {"conditions": (), "classes": (), "styles": (), "text_dim": 0, "text_encoder": "", "map_labels": 0}
    return save(tmp_path_factory.mktemp("untold"), **nothing)


@pytest.fixture
def config() -> RunConfig:
    return load_config("integration", overrides=["sampling.steps=3", "sampling.batch=4", "sampling.guidance=2"])


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def map_png(values: Any = 1, size: tuple[int, int] = (16, 16)) -> bytes:
    return encoded(Image.fromarray(np.full(size, values, dtype=np.uint8)))


# ---- what is asked ----


def test_names_captions_and_maps_become_conditions_row_by_row(bundle: LoadedBundle) -> None:
    asked = [Asked("Dogs", "OIL", "red apple", map_png()), Asked(style="ink"), Asked(text="red apple"), Asked()]
    found = resolve(bundle, [1, 2, 3, 4], asked)
    drawn = bundle.draw_labels([1, 2, 3, 4])
    assert found.labels.tolist() == [1, drawn[1], -1, drawn[3]], "a caption says itself what there is to see"
    assert found.styles is not None and found.styles.tolist() == [1, 0, -1, -1]
    assert found.texts is not None and found.maps is not None and bundle.text is not None
    vector = torch.from_numpy(bundle.text.encoder(["red apple"])[0])
    assert torch.equal(found.texts, torch.stack([vector, 0 * vector, vector, 0 * vector]))
    assert [found.maps[row].unique().tolist() for row in range(4)] == [[1], [-1], [-1], [-1]]


def test_a_class_alone_gives_the_pictures_that_a_class_always_gave(bundle: LoadedBundle) -> None:
    seeds = [11, 12, 13]
    by_name = resolve(bundle, seeds, [Asked("cats"), Asked("birds"), Asked()])
    labels = [0, 2, bundle.draw_labels(seeds)[2]]
    assert np.array_equal(
        draw_images(bundle.vq, bundle.prior, seeds, by_name, SAMPLING),
        draw_images(bundle.vq, bundle.prior, seeds, labels, SAMPLING),
    )


def test_the_nearest_learned_caption_is_found(bundle: LoadedBundle) -> None:
    assert bundle.text is not None
    found = nearest_caption(bundle, bundle.text.encoder(["german flag"])[0])
    assert found is not None and found[0] == "flag: Germany" and 0.5 < found[1] < 1
    assert nearest_caption(replace(bundle, text=None), np.zeros(384, dtype=np.float32)) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked("dgos"), r"no such class: dgos \(the model knows cats, dogs, birds\)\nhint: did you mean 'dogs'\?"),
        (Asked(style="oils"), r"no such style: oils \(the model knows ink, oil\)\nhint: did you mean 'oil'\?"),
        (Asked(style="zzz"), r"no such style: zzz \(the model knows ink, oil\)\nhint: choose one of them"),
        (Asked(text=" "), "--text must have a word: it is empty\nhint: "),
        (
            Asked(text="quarterly tax return"),
            r"has learned no caption like 'quarterly tax return' .*\nhint: the nearest is",
        ),
        (Asked(map_png=map_png(size=(8, 16))), r"--map must be 16 x 16 pixels: 16 x 8\nhint: resize it without"),
        (Asked(map_png=map_png(3)), r"--map must have labels 0 to 2 \(255 for none\): 3\nhint: use the labels"),
        (Asked(map_png=encoded(noise(0))), r"--map must have one byte a pixel, the label: mode RGB\nhint: save it"),
    ],
)
def test_what_the_model_has_not_learned_is_refused(bundle: LoadedBundle, asked: Asked, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(bundle, [1], [asked])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked("cats"), "the model was trained without classes: cats\nhint: leave --class out"),
        (Asked(style="ink"), "the model was trained without styles: ink\nhint: leave --style out"),
        (Asked(text="a cat"), "the model was trained without captions: a cat\nhint: leave --text out"),
        (Asked(map_png=map_png()), "the model was trained without label maps\nhint: leave --map out"),
    ],
)
def test_a_model_without_a_condition_refuses_it(untold: Path, asked: Asked, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(load_bundle(untold), [1], [asked])


def test_a_bundle_carries_the_encoder_of_its_captions(tmp_path: Path) -> None:
    folder, vectors = encoder_folder(None), np.eye(3, 384, dtype=np.float32)
    write_text(tmp_path / "text", folder, ("", "a cat", "a dog"), vectors)
    learned = load_text(tmp_path / "text", encoder_digest(folder))
    assert learned.captions == ("a cat", "a dog") and np.array_equal(learned.embeddings, vectors[1:])
    assert np.array_equal(learned.encoder(["a cat"]), TextEncoder(folder)(["a cat"]))
    with pytest.raises(
        InputError, match=r"is not the one that the prior was trained with: .*, not aaaaaaaaaaaa\nhint: "
    ):
        load_text(tmp_path / "text", "a" * 64)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    _, prior = models()
    with torch.no_grad():
        prior.denoiser.final_modulation.weight[0, 0] = float("nan")
    save_model(prior, tmp_path / "prior")
    from hvqd_model import load_model

    with pytest.raises(
        ValueError, match=r"not all finite: denoiser\.final_modulation\.weight\nhint: the training went wrong"
    ):
        load_model(tmp_path / "prior")


# ---- sample ----


def request(told: Path, out: str = "grid.png", count: int = 5, **changes: Any) -> SampleRequest:
    return SampleRequest(
        **({"count": count, "asked": Asked(), "model": str(told), "seed": 3, "out": Path(out)} | changes)
    )


def test_a_recipe_draws_the_same_pictures_again(told: Path, config: RunConfig, tmp_path: Path) -> None:
    asked = Asked("dogs", "ink", None, map_png(2))
    guided = SAMPLING.model_copy(update={"guidance": {"class": 3.0, "style": 1.5}})
    written = draw_samples(request(told, asked=asked), config, Silent(), guided)
    again, sampling = read_recipe(Path(written["recipe"]), request(told, "again.png", count=1))
    assert (again.asked, again.count, again.seed, sampling) == (asked, 5, 3, guided)
    repeated = draw_samples(again, config, Silent(), sampling)
    assert Path(repeated["image"]).read_bytes() == Path(written["image"]).read_bytes()
    assert json.loads(Path(repeated["recipe"]).read_text()) == json.loads(Path(written["recipe"]).read_text())
    with pytest.raises(
        InputError, match=r"the recipe was drawn with the model ffff, and this is .*\nhint: name its folder"
    ):
        draw_samples(replace(again, digest="ffff"), config, Silent(), sampling)


def test_a_folder_holds_the_pictures_of_the_grid(told: Path, bundle: LoadedBundle, config: RunConfig) -> None:
    written = draw_samples(request(told, "pictures", count=11), config, Silent())
    names = sorted(path.name for path in Path(written["folder"]).iterdir())
    assert names == [f"{index:02d}.png" for index in range(11)] + [RECIPE]
    seeds = seeds_for(3, 11)
    expected = draw_images(bundle.vq, bundle.prior, seeds, bundle.draw_labels(seeds), config.sampling)
    for index in range(11):
        assert np.array_equal(np.asarray(Image.open(f"pictures/{index:02d}.png")), expected[index])


def test_a_preview_ends_with_the_pictures_and_changes_none(told: Path, config: RunConfig) -> None:
    plain = draw_samples(request(told), config, Silent())
    watched = draw_samples(request(told, "film.png", preview=True), config, Silent())
    assert Path(plain["image"]).read_bytes() == Path(watched["image"]).read_bytes()
    film = np.asarray(Image.open(watched["preview"]).convert("RGB"))
    grid = np.asarray(Image.open(watched["image"]).convert("RGB"))
    assert watched["preview"].endswith("film-preview.png")
    column = film[40:, -96 - GAP : -GAP]
    for row in range(4):  # of the first batch
        found = column[row * (96 + GAP) : row * (96 + GAP) + 96 : 6, ::6]
        top, left = row // 2 * 130, row % 2 * 130
        assert np.array_equal(found, grid[top : top + 128 : 8, left : left + 128 : 8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "-n must be at least 1: 0\nhint: for example -n 16"),
        ({"workers": 0}, "--workers must be at least 1: 0\nhint: 1 draws"),
        (
            {"out": Path("a.jpg")},
            r"--out must be a PNG file, or a folder's name without a suffix: a\.jpg\nhint: --out a\.png",
        ),
    ],
)
def test_a_wrong_request_is_refused(told: Path, config: RunConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_samples(request(told, **changes), config, Silent())


def test_guidance_of_an_unconditional_model_is_refused_where_it_is_asked_for(untold: Path, config: RunConfig) -> None:
    draw_samples(request(untold, count=1), config, Silent())
    with pytest.raises(
        InputError, match=r"--guidance needs a model with conditions, .* unconditional: 2\.0\nhint: leave"
    ):
        draw_samples(request(untold, count=1, guided=True), config, Silent())


def test_guidance_is_one_number_or_one_for_each_condition() -> None:
    assert parse_guidance("3") == "sampling.guidance=3"
    assert parse_guidance("class=3, style=1.5") == "sampling.guidance={class: 3, style: 1.5}"
    parsed = load_config("tiny", overrides=[parse_guidance("class=3,style=1.5")])
    assert parsed.sampling.guidance == {"class": 3.0, "style": 1.5}
    for text in ("class=3,style", "=3", "class="):
        with pytest.raises(
            InputError, match=rf"--guidance must be a number, or one for each condition: {text}\nhint: "
        ):
            parse_guidance(text)


def test_what_is_no_recipe_is_refused(told: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such recipe: none\.json\nhint: `hvqd sample` writes one"):
        read_recipe(Path("none.json"), request(told))
    for content in ("{", "[]", "{}", '{"class": null, "count": "x", "seed": 1, "sampling": {}, "model": "m"}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=r"bad\.json is no recipe: .*\nhint: "):
            read_recipe(Path("bad.json"), request(told))


# ---- edits ----


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(1).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16), (250, 30, 40)).save(tmp_path / "b.png")
    noise(3, 8, 8).save(tmp_path / "small.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (9, 0, 16, 7))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "a.png"


def edit(told: Path, path: str = "a.png", count: int = 2, **changes: Any) -> EditRequest:
    return EditRequest(
        **(
            {"path": path, "asked": Asked(), "model": str(told), "seed": 1, "count": count, "out": Path("sheet.png")}
            | changes
        )
    )


def cells(sheet: str, side: int = 96) -> list[np.ndarray[Any, Any]]:
    """The (16, 16, 3) pictures of a sheet's first row."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    lefts = range(GAP, pixels.shape[1] - side, side + GAP)
    return [pixels[40 : 40 + side : side // 16, left : left + side : side // 16] for left in lefts]


def reconstruction(bundle: LoadedBundle, path: str) -> np.ndarray[Any, Any]:
    pixels = np.asarray(Image.open(path).convert("RGB"))[None]
    codes = encode_batches(bundle.vq, pixels, "cpu", "fp32", BATCH)
    return decode_codes(bundle.vq, codes, BATCH)[0]


def test_a_strip_begins_and_ends_with_the_reconstructions_bit_for_bit(
    told: Path, bundle: LoadedBundle, config: RunConfig, picture: Path
) -> None:
    result = interpolate(edit(told), "b.png", 12, 1.0, config)
    strip = cells(result["image"])
    assert len(strip) == 12 and result["drawn"][0] == result["drawn"][-1] == 0 and max(result["drawn"]) > 0
    assert np.array_equal(strip[0], reconstruction(bundle, "a.png"))
    assert np.array_equal(strip[-1], reconstruction(bundle, "b.png"))
    assert len({frame.tobytes() for frame in strip}) > 2


def test_filling_a_hole_leaves_every_other_pixel_as_the_file_has_it(
    told: Path, config: RunConfig, picture: Path
) -> None:
    result = fill(edit(told, count=3), "mask.png", 1, config)
    original, hole = np.asarray(Image.open("a.png")), np.asarray(Image.open("mask.png")) > 127
    shown = cells(result["image"])
    assert len(shown) == 5 and result["hole"] == pytest.approx(49 / 256, abs=1e-4)
    for found in shown[2:]:
        assert np.array_equal(found[~hole], original[~hole]) and not np.array_equal(found[hole], original[hole])
    assert not np.array_equal(shown[2], shown[3]), "another seed, another filling"
    alone = cells(fill(edit(told, count=1), "mask.png", 1, config)["image"])
    assert np.array_equal(alone[2], shown[2]), "however many are asked for"


def test_a_model_of_gaussian_noise_fills_holes_and_goes_between_pictures_too(
    tmp_path: Path, config: RunConfig, picture: Path
) -> None:
    model = save(tmp_path / "gaussian", noise="gaussian")
    result = fill(edit(model, count=2), "mask.png", 0, config)
    original, hole = np.asarray(Image.open("a.png")), np.asarray(Image.open("mask.png")) > 127
    for filled in cells(result["image"])[2:]:
        assert np.array_equal(filled[~hole], original[~hole]) and not np.array_equal(filled, original)
    strip = cells(interpolate(edit(model), "b.png", 4, 1.0, config)["image"])
    assert np.array_equal(strip[0], reconstruction(load_bundle(model), "a.png"))
    assert np.array_equal(strip[-1], reconstruction(load_bundle(model), "b.png"))


def test_an_enlarged_picture_and_a_restyled_one_keep_the_coarse_level(
    told: Path, bundle: LoadedBundle, config: RunConfig, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []
    decode = decode_codes
    monkeypatch.setattr(
        "workflows.drawing.editing.decode_codes",
        lambda vq, codes, batch: seen.append(codes) or decode(vq, codes, batch),
    )
    result = enlarge(edit(told, "small.png"), None, config)
    assert result["kept"] == 1
    assert len(result["psnr_scaled_back"]) == 2 and len(cells(result["image"])) == 4
    assert (seen[0][0] == seen[0][0][:1]).all() and (seen[0][1][0] != seen[0][1][1]).any()
    seen.clear()
    restyle(edit(told, asked=Asked(style="oil")), "b.png", 0.5, 1, config)
    content, moved, results = seen
    assert (moved[0] == content[0]).all() and (results[0] == content[0]).all()
    assert (results[1] != moved[1]).any()


def test_all_levels_but_the_finest_are_kept_unless_fewer_are_asked_for() -> None:
    assert [kept_levels(None, levels) for levels in (2, 3, 5)] == [1, 2, 4] and kept_levels(1, 3) == 1
    with pytest.raises(InputError, match=r"^--keep must be between 1 and 2, the coarse levels that stay: 3\nhint: "):
        kept_levels(3, 3)
    with pytest.raises(InputError, match=r"^the model has one level of codes: none is coarse\nhint: "):
        kept_levels(None, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda told, c: fill(edit(told), "none.png", 1, c), r"no such picture: none\.png\nhint: name a local file"),
        (
            lambda told, c: fill(edit(told), "small.png", 1, c),
            r"--mask must be as large as the picture, 16 x 16: 8 x 8\nhint",
        ),
        (
            lambda told, c: fill(edit(told), "black.png", 1, c),
            r"--mask has no hole: nothing in black\.png .*\nhint: draw",
        ),
        (lambda told, c: fill(edit(told, count=0), "mask.png", 1, c), "-n must be at least 1: 0\nhint: "),
        (
            lambda told, c: enlarge(edit(told), 1, c),
            "the picture must be smaller than the model's 16 x 16: 16 x 16\nhint: ",
        ),
        (
            lambda told, c: enlarge(edit(told, "small.png"), 2, c),
            "--keep must be between 1 and 1, .*: 2\nhint: 1 keeps",
        ),
        (
            lambda told, c: enlarge(edit(told, "wide.png"), 1, c),
            "must have the model's shape, 16 to 16: 12 x 8\nhint: crop",
        ),
        (
            lambda told, c: restyle(edit(told), None, 0.5, 1, c),
            "a style is needed: neither --like nor --style .*\nhint: ",
        ),
        (lambda told, c: restyle(edit(told), "b.png", 1.5, 1, c), r"strength must be between 0 and 1: 1\.5\nhint: "),
        (
            lambda told, c: interpolate(edit(told), "b.png", 1, 0.5, c),
            "steps must be at least 2, the two ends: 1\nhint: ",
        ),
        (
            lambda told, c: interpolate(edit(told), "none.png", 3, 0.5, c),
            r"no such picture, folder or split: none\.png",
        ),
    ],
)
def test_a_wrong_edit_is_refused(told: Path, config: RunConfig, picture: Path, call: Any, message: str) -> None:
    Image.new("L", (16, 16)).save("black.png")
    noise(4, 12, 8).save("wide.png")
    with pytest.raises(ValueError, match=message):
        call(told, config)
    assert not Path("sheet.png").exists()
