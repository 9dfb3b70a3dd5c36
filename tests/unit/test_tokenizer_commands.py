"""`hvqd reconstruct` and `hvqd codes inspect` on a small tokenizer: what they show is what the model does."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvqd_model import HierarchicalVQ, VQConfig, save_model
from infra.errors import EnvironmentFailure, InputError
from tests.pictures import decoded, encoded, noise, write_files
from workflows.config import RunConfig
from workflows.data.batches import to_input
from workflows.drawing.codes_inspection import InspectRequest, draw_levels, inspect_codes, inspect_levels
from workflows.drawing.codes_inspection import as_text as inspection_text
from workflows.drawing.generate import Pictures, decode_codes, to_uint8
from workflows.drawing.reconstruct import ReconstructRequest, as_text, parse_levels, reconstruct, reconstructed
from workflows.encode import encode_batches

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {"image_size": (16, 16)},
    "oblong": {"image_size": (16, 24), "strides": ((8, 8), (4, 2))},
    "padded": {"image_size": (13, 18), "padding": "edge", "strides": (8, 4)},
}


def tokenizer(name: str = "plain") -> HierarchicalVQ:
    """Random weights, and codebooks that fit what they make of some pictures."""
    torch.manual_seed(0)
    vq = HierarchicalVQ(VQConfig(codebook_sizes=(16, 32), code_dim=8, width=8, **ARCHITECTURES[name])).eval()
    given = to_input(pictures(vq, 16))
    for level in vq.start_order:
        with torch.no_grad():
            vectors = vq(given, torch.zeros(16, dtype=torch.int64)).vectors[level]
        vq.start_codebook(level, vectors, key=level)
    return vq


def pictures(model: HierarchicalVQ, count: int = 5) -> Pictures:
    shape = (count, *model.config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- arithmetic ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_fp32_codes_decode_to_what_the_model_reconstructs_to_the_bit(name: str) -> None:
    model = tokenizer(name)
    given = pictures(model, 3)
    with torch.no_grad():
        output = model(to_input(given), torch.zeros(3, dtype=torch.int64))
    codes = encode_batches(model, given, batch=3)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(codes, output.codes, strict=True))
    np.testing.assert_array_equal(decode_codes(model, codes, 3), to_uint8(output.reconstruction.clamp(-1, 1)))


def test_bf16_computes_the_layers_only_and_comes_close() -> None:
    model = tokenizer()
    given = pictures(model, 8)
    codes = encode_batches(model, given)
    seen: list[torch.dtype] = []
    handle = model.encoder.stem.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    rough = encode_batches(model, given, precision="bf16")
    handle.remove()
    assert seen == [torch.bfloat16]
    assert all(book.dtype == torch.float32 for book in model.codebooks)
    assert all(a.dtype == np.int32 and (a == b).mean() > 0.8 for a, b in zip(rough, codes, strict=True))
    exact, close = (decode_codes(model, codes, 8, precision).astype(int) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(exact - close).max() <= 12


def test_the_batch_changes_no_code_and_no_picture() -> None:
    model = tokenizer()
    given = pictures(model)
    one, other = encode_batches(model, given, batch=2), encode_batches(model, given, batch=5)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert np.abs(decode_codes(model, one, 2).astype(int) - decode_codes(model, one, 5)).max() <= 1


# ---- reconstruct ----


def test_levels_are_read_as_a_number_or_a_range() -> None:
    assert [list(parse_levels(text, 3)) for text in (None, "2", "1..3", " 2..3 ")] == [
        [1, 2, 3],
        [2],
        [1, 2, 3],
        [2, 3],
    ]


@pytest.mark.parametrize("text", ["0", "4", "1..4", "0..2", "2..1", "all", "1-2", "", "1..", "-1"])
def test_levels_that_the_tokenizer_lacks_are_refused(text: str) -> None:
    message = rf"--levels must be a number or a rising range within 1\.\.3: {text}\nhint: 1 is the coarsest level alone"
    with pytest.raises(InputError, match=message):
        parse_levels(text, 3)


def test_prefixes_are_what_the_model_decodes_from_its_first_levels() -> None:
    model = tokenizer()
    given = pictures(model, 3)
    with torch.no_grad():
        codes = model.encode(to_input(given))
        expected = [to_uint8(model.decode(codes[:count])) for count in (1, 2)]
    found = reconstructed(model, given, range(1, 3), "fp32", batch=3)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    (fine,) = reconstructed(model, given, range(2, 3), "fp32", batch=3)
    np.testing.assert_array_equal(fine, expected[1])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tokenizer's and a pictures' folder; one picture is broken."""
    (tmp_path / "model").mkdir()
    save_model(tokenizer(), tmp_path / "model")
    files = {f"{index}.png": encoded(noise(index, 30, 20)) for index in range(3)}
    write_files(tmp_path / "pictures", {**files, "3.png": b"broken"})
    return tmp_path


def asked(place: Path, **changes: Any) -> ReconstructRequest:
    given = {
        "path": str(place / "pictures"),
        "levels": None,
        "count": 10,
        "model": str(place / "model"),
        "precision": "fp32",
        "out": place / "sheet.png",
    }
    return ReconstructRequest(**(given | changes))


def test_reconstruct_writes_a_sheet_and_says_what_each_prefix_keeps(place: Path) -> None:
    result = reconstruct(asked(place), RunConfig())
    assert json.loads(json.dumps(result)) == result
    assert (result["image"], result["precision"]) == (str(place / "sheet.png"), "fp32")
    sheet = decoded((place / "sheet.png").read_bytes())
    assert sheet.shape == (40 + 3 * 100, 5 * 100 + 4, 3)
    originals = sheet[40:, 4:100].reshape(3, 100, 96, 3)[:, :96:6, ::6]
    fine = sheet[40:, 204:300].reshape(3, 100, 96, 3)[:, :96:6, ::6]
    errors = np.square(originals.astype(float) - fine).mean((1, 2, 3))
    each = 10 * np.log10(255**2 / errors)
    assert [row["name"] for row in result["levels"]] == ["level 1", "levels 1-2"]
    assert [row["bits"] for row in result["levels"]] == [4 * math.log2(16), 4 * 4 + 16 * 5]
    assert result["levels"][1]["psnr"] == pytest.approx(each.mean(), abs=1e-3)
    assert [row["name"] for row in result["pictures"]] == ["0.png", "1.png", "2.png"]
    assert [row["psnr"][1] for row in result["pictures"]] == pytest.approx(each.tolist(), abs=1e-3)
    assert result["rejected"] == ["3.png: unreadable: not a picture in a known format"]
    text = as_text(result).splitlines()
    assert text[0] == f"3 pictures by {place / 'model'}"
    assert text[1] == "left out  3.png: unreadable: not a picture in a known format"
    assert text[3].split() == [
        "levels",
        "1-2",
        f"{result['levels'][1]['psnr']:.2f}",
        "dB",
        "96",
        "bits",
        "a",
        "picture",
    ]
    assert text[-1] == str(place / "sheet.png")


def test_refined_codes_show_every_picture_nearer(place: Path) -> None:
    plain = reconstruct(asked(place), RunConfig())
    config = RunConfig.model_validate({"encode": {"refine_rounds": 2}})
    refined = reconstruct(asked(place, out=place / "refined.png"), config)
    assert refined["levels"][1]["psnr"] > plain["levels"][1]["psnr"]
    for before, after in zip(plain["pictures"], refined["pictures"], strict=True):
        assert after["name"] == before["name"] and after["psnr"][1] >= before["psnr"][1] - 1e-3


def test_one_level_of_one_picture_is_a_sheet_of_three(place: Path) -> None:
    result = reconstruct(asked(place, path=str(place / "pictures" / "1.png"), levels="1"), RunConfig())
    assert [row["levels"] for row in result["levels"]] == [1]
    assert decoded((place / "sheet.png").read_bytes()).shape == (140, 304, 3)


def test_a_wrong_request_writes_nothing(place: Path) -> None:
    with pytest.raises(InputError, match=r"--levels must be .* within 1\.\.2: 3"):
        reconstruct(asked(place, levels="3"), RunConfig())
    with pytest.raises(InputError, match="no such picture, folder or split"):
        reconstruct(asked(place, path="nowhere"), RunConfig())
    assert not (place / "sheet.png").exists()
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*/model/config\.json/sheet\.png"):
        reconstruct(asked(place, out=place / "model" / "config.json" / "sheet.png"), RunConfig())


# ---- codes inspect ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inspected_codes_are_the_most_used_with_the_mean_of_their_decoded_cells(name: str) -> None:
    model = tokenizer(name)
    given = pictures(model)
    codes = encode_batches(model, given, batch=16)
    levels = inspect_levels(model, given, most=4)
    assert [level.grid for level in levels] == list(model.config.grids)
    for index, level in enumerate(levels):
        counted = Counter(int(code) for code in codes[index].flat)
        assert [found.count for found in level.shown] == [count for _, count in counted.most_common(4)]
        assert all(counted[found.code] == found.count for found in level.shown)
        rows, columns = model.config.cells[index]
        drawn = decode_codes(model, codes[: index + 1], 16).astype(float)
        height, width = drawn.shape[1:3]
        for found in level.shown:
            cells = []
            for picture, row, column in np.argwhere(codes[index] == found.code):
                ys = np.minimum(np.arange(rows) + row * rows, height - 1)  # past the edge its last pixel
                xs = np.minimum(np.arange(columns) + column * columns, width - 1)
                cells.append(drawn[picture][ys][:, xs])
            assert len(cells) <= 64
            np.testing.assert_allclose(found.mean, np.mean(cells, 0), atol=0.51)
            around = (rows + 2 * (rows // 2), columns + 2 * (columns // 2), 3)
            assert {example.shape for example in found.examples} == {around}
            inner = [
                example[rows // 2 : rows // 2 + rows, columns // 2 : columns // 2 + columns]
                for example in found.examples
            ]
            assert all(any(np.array_equal(part, cell) for cell in cells) for part in inner)


def test_use_and_perplexity_are_those_of_the_counts() -> None:
    model = tokenizer()
    (_, fine) = inspect_levels(model, pictures(model), most=3)
    facts = fine.as_json()
    share = fine.counts[fine.counts > 0] / fine.counts.sum()
    assert facts["codes"] == 5 * 16
    assert facts["used"] == len(share)
    assert facts["usage"] == pytest.approx(len(share) / 32, abs=1e-4)
    assert facts["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.01)
    assert [code["share"] for code in facts["most_used"]] == pytest.approx(sorted(share, reverse=True)[:3], abs=1e-5)


def test_only_codes_that_occur_are_shown() -> None:
    model = tokenizer()
    levels = inspect_levels(model, pictures(model), most=1_000)
    assert [len(level.shown) for level in levels] == [int((level.counts > 0).sum()) for level in levels]
    sheet = draw_levels(levels)
    assert len(levels[1].shown) > 8, "more than a row"
    assert sheet.height > draw_levels(inspect_levels(model, pictures(model), most=2)).height


def test_codes_inspect_writes_a_sheet_and_a_table(place: Path) -> None:
    request = InspectRequest(str(place / "pictures"), 3, 5, str(place / "model"), "fp32", place / "codes.png")
    result = inspect_codes(request, RunConfig())
    assert json.loads(json.dumps(result)) == result
    assert (result["pictures"], [row["level"] for row in result["levels"]]) == (2, [0, 1]), "one of the three is broken"
    assert (np.asarray(decoded((place / "codes.png").read_bytes())) < 250).any()
    text = inspection_text(result).splitlines()
    assert text[1].split() == ["level", "codes", "used", "usage", "perplexity", "most", "used"]
    assert text[2].split()[:5] == ["0", "8", str(result["levels"][0]["used"]), "of", "16"]
    with pytest.raises(InputError, match=r"--codes must be at least 1: 0\nhint: for example --codes 24"):
        inspect_codes(InspectRequest("val", 3, 0, str(place / "model"), "fp32", place / "no.png"), RunConfig())
    assert not (place / "no.png").exists()
