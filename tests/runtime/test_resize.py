"""Bicubic resizing against Pillow's."""

import numpy as np
import pytest
from PIL import Image

from da3_runtime.postprocess.resize import resize_bicubic

MAP = np.random.default_rng(0).uniform(1, 9, (54, 72)).astype(np.float32)


def pillows(values, width, height):
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized), values.min(), values.max())


SIZES = [(640, 480), (73, 53), (72, 200), (10, 54), (31, 23), (1, 1), (500, 7), (72, 1), (2000, 1999)]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_pillows(size):
    resized = resize_bicubic(MAP, *size)
    assert resized.shape == size[::-1]
    assert resized.dtype == np.float32
    assert resized.flags.c_contiguous
    np.testing.assert_allclose(resized, pillows(MAP, *size), rtol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (9, 1)])
def test_maps_smaller_than_the_kernel_are_resized_too(shape):
    values = MAP[: shape[0], : shape[1]].copy()
    np.testing.assert_allclose(resize_bicubic(values, 40, 30), pillows(values, 40, 30), rtol=2e-6)


def test_the_map_itself_is_left_alone():
    before = MAP.copy()
    assert resize_bicubic(MAP, 72, 54) is MAP
    resize_bicubic(MAP, 100, 54)
    resize_bicubic(MAP, 72, 100)
    assert np.array_equal(MAP, before)


def test_nothing_becomes_nearer_or_farther():
    step = np.where(np.arange(72) < 36, np.float32(1), np.float32(5)) * np.ones((54, 1), np.float32)
    resized = resize_bicubic(step, 700, 500)
    assert (resized.min(), resized.max()) == (1, 5)
