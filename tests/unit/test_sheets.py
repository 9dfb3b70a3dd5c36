"""Sheets: every pixel stands where the layout says, error maps mean the same in all of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pictures import decoded
from workflows.drawing.generate import Pictures
from workflows.drawing.sheets import GAP, enlarged, error_map, mean_psnr, prefix_name, prefix_sheet, to_png


def pictures(seed: int, count: int = 3, height: int = 8, width: int = 12) -> Pictures:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_the_mean_psnr_is_the_mean_over_pictures_and_not_of_their_errors() -> None:
    a, b = pictures(0), pictures(1)
    b[0] = a[0] // 2 + 40
    errors = [np.square(one.astype(float) - other).mean() for one, other in zip(a, b, strict=True)]
    assert mean_psnr(a, b) == pytest.approx(np.mean([10 * np.log10(255**2 / error) for error in errors]))
    assert mean_psnr(a, a) == 100


def test_an_error_map_is_white_where_nothing_differs_and_black_from_64_on() -> None:
    original = np.full((1, 1, 5, 3), 100, dtype=np.uint8)
    other = original.copy()
    other[0, 0, 1, 2] = 100 - 32  # one colour is enough
    other[0, 0, 2] = 164
    other[0, 0, 3] = 255
    other[0, 0, 4] = 101
    row = error_map(other, original)[0, 0].astype(int)
    assert row[[0, 2, 3]].tolist() == [[255] * 3, [0] * 3, [0] * 3]
    assert row[1].tolist() == [226, 70, 30]
    assert 255 * 3 > row[4].sum() > row[1].sum() > 0


def test_errors_of_both_signs_look_alike_and_larger_ones_darker() -> None:
    original = np.full((1, 1, 64, 3), 100, dtype=np.uint8)
    steps = np.arange(64, dtype=np.uint8)[None, None, :, None]
    above, below = error_map(original + steps, original), error_map(original - steps, original)
    np.testing.assert_array_equal(above, below)
    brightness = above[0, 0].astype(int).sum(1)
    assert (np.diff(brightness) < 0).all()


def test_a_sheet_holds_originals_then_prefixes_then_their_errors_a_row_a_picture() -> None:
    originals, coarse, fine = pictures(0), pictures(1), pictures(2)
    sheet = np.asarray(prefix_sheet(originals, [(1, coarse), (2, fine)], least_side=48))
    columns = [originals, coarse, fine, error_map(coarse, originals), error_map(fine, originals)]
    scale, height, width = 4, 8 * 4, 12 * 4
    assert sheet.shape == (40 + 3 * (height + GAP), 5 * (width + GAP) + GAP, 3)
    for place, column in enumerate(columns):
        left = GAP + place * (width + GAP)
        for row, picture in enumerate(enlarged(column, scale)):
            top = 40 + row * (height + GAP)
            np.testing.assert_array_equal(sheet[top : top + height, left : left + width], picture)
        assert (sheet[:40, left : left + width] < 128).any(), "every column has a heading"


def test_large_pictures_stay_as_they_are() -> None:
    originals = pictures(0, count=1, height=200, width=150)
    sheet = np.asarray(prefix_sheet(originals, [(1, originals)]))
    np.testing.assert_array_equal(sheet[40:240, GAP : GAP + 150], originals[0])


def test_pictures_above_a_limit_are_reduced_after_they_were_compared() -> None:
    originals = np.full((1, 200, 150, 3), 100, dtype=np.uint8)
    other = originals.copy()
    other[:, ::2] += 64  # every second line: the mean of the error's colours, not the colour of the mean error
    sheet = np.asarray(prefix_sheet(originals, [(1, other)], most_side=120))
    cell = sheet[40:140, 2 * GAP + 96 + 1 :][:, :70]
    assert sheet.shape == (40 + 100 + GAP, 3 * (96 + GAP) + GAP, 3)
    assert np.unique(cell.reshape(-1, 3), axis=0).tolist() == [[132, 132, 132]]
    errors = sheet[40:140, 3 * GAP + 2 * 96 + 1 :][:, :70]
    assert np.abs(errors.astype(int) - 127.5).max() <= 1


def test_a_narrow_picture_has_room_for_its_heading() -> None:
    originals = pictures(0, count=1, height=96, width=8)
    sheet = np.asarray(prefix_sheet(originals, [(1, originals)]))
    assert sheet.shape[1] == 3 * (96 + GAP) + GAP
    np.testing.assert_array_equal(sheet[40:136, 2 * GAP + 96 : 2 * GAP + 104], originals[0])


def test_prefixes_are_called_by_their_levels() -> None:
    assert [prefix_name(count) for count in (1, 2, 5)] == ["level 1", "levels 1-2", "levels 1-5"]


def test_a_png_is_lossless_and_always_the_same() -> None:
    sheet = prefix_sheet(pictures(0), [(1, pictures(1))])
    assert to_png(sheet) == to_png(sheet)
    np.testing.assert_array_equal(decoded(to_png(sheet)), np.asarray(sheet))
