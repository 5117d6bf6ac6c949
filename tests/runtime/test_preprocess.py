"""RGB -> model input, against upstream's InputProcessor."""

import numpy as np
import pytest
from PIL import Image

from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.preprocess import (
    bounded_size,
    divisible_size,
    fitting_resolution,
    model_input,
    nearest_multiple,
    resize_to_input,
)
from tests.support.paths import PHOTOS

# Odd sizes, one-pixel and extreme aspect ratios, exact fits, shrinking and enlarging, ties in rounding.
SIZES = [(640, 427), (427, 640), (504, 504), (504, 378), (503, 505), (33, 47), (14, 14), (7, 7), (1, 1), (1, 900),
         (900, 1), (2000, 31), (31, 2000), (1999, 1501), (511, 511), (505, 371), (3, 2), (1008, 756), (250, 251)]  # fmt: skip


def upstream_input(processor, rgb, processing_res):
    image = processor._load_image(rgb)
    image = processor._resize_image(image, processing_res, "upper_bound_resize")
    return np.asarray(processor._make_divisible_by_resize(image, processor.PATCH_SIZE))


@pytest.fixture(scope="module")
def photo():
    return Image.open(PHOTOS / "temple.jpg").convert("RGB")


@pytest.mark.parametrize("processing_res", [504, 98, 770, 1036, 500])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_input_equals_upstream_to_the_byte(upstream_preprocessing, photo, size, processing_res):
    rgb = np.asarray(photo.resize(size, Image.Resampling.BICUBIC))
    expected = upstream_input(upstream_preprocessing(), rgb, processing_res)
    actual = resize_to_input(rgb, processing_res)
    assert actual.shape == expected.shape
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("name", ["temple.jpg", "coffee.jpg", "cat.jpg"])
def test_input_of_photos_equals_upstream_to_the_byte(upstream_preprocessing, name):
    rgb = np.asarray(Image.open(PHOTOS / name).convert("RGB"))
    assert np.array_equal(resize_to_input(rgb), upstream_input(upstream_preprocessing(), rgb, 504))


def test_nearest_multiple_rounds_ties_up():
    assert [nearest_multiple(side) for side in (6, 7, 20, 21, 22, 14)] == [0, 14, 14, 28, 28, 14]


def test_model_input_is_a_batch_of_one_with_sides_divisible_by_14():
    images = model_input(np.zeros((427, 640, 3), np.uint8))
    assert images.shape == (1, 1, 336, 504, 3)
    assert images.flags.c_contiguous


def test_a_resolution_above_the_engines_limit_names_the_limit():
    with pytest.raises(SettingError, match="1036"):
        model_input(np.zeros((100, 100, 3), np.uint8), 1050)


@pytest.mark.parametrize(
    ("size", "processing_res", "longest"),
    [
        ((2560, 1080), 168, 182),  # an ultrawide screen, da3-nano's default
        ((1080, 2560), 168, 182),
        ((12000, 1300), 504, 707),  # a panorama
        ((1300, 1300), 84, 84),
        ((3000, 300), 504, 766),
        ((300, 3000), 1036, 1036),
        ((640, 427), 504, 504),
        ((10, 1), 504, 766),
        ((1036, 77), 504, 1030),
    ],
)
def test_the_resolution_rises_until_the_short_side_fits(size, processing_res, longest):
    assert fitting_resolution(*size, processing_res) == longest
    sides = model_input(np.zeros((*size[::-1], 3), np.uint8), processing_res).shape[2:4]
    assert min(sides) >= 84
    assert max(sides) <= 1036
    if longest > processing_res:
        assert min(divisible_size(*bounded_size(*size, longest - 1))) < 84


def test_an_image_too_elongated_for_the_engine_names_sizes_and_limit():
    with pytest.raises(ImageError, match=r"2000 x 140 pixels is too elongated: .*1036 x 70.* least 84"):
        model_input(np.zeros((140, 2000, 3), np.uint8))
