"""Resizing depth maps: within their range, without aliasing, near to Pillow's bicubic."""

import numpy as np
import pytest
from PIL import Image

from da3_runtime.image.preprocess import model_input
from da3_runtime.postprocess.depth import resize_map
from tests.support.paths import PHOTOS

RNG = np.random.default_rng(0)
MAP = RNG.uniform(1, 9, (54, 72)).astype(np.float32)


def pillow_resize(values, width, height):
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized), values.min(), values.max())


@pytest.mark.parametrize(
    "size", [(640, 480), (73, 53), (72, 200), (10, 54), (31, 23), (1, 1), (500, 7), (2000, 1999)]
)
def test_returns_a_new_map_of_the_requested_size_and_leaves_the_old_one(size):
    before = MAP.copy()
    resized = resize_map(MAP, *size)
    assert resized.shape == size[::-1]
    assert resized.dtype == np.float32
    assert resized.flags.c_contiguous
    assert np.array_equal(MAP, before)


@pytest.mark.parametrize("size", [(1008, 756), (1920, 1440), (200, 150), (500, 375)])
def test_is_near_pillows_bicubic(size):
    gray = np.asarray(Image.open(PHOTOS / "coffee.jpg").convert("L").resize((504, 378)))
    values = np.ascontiguousarray(gray, dtype=np.float32)
    error = np.abs(resize_map(values, *size) - pillow_resize(values, *size))
    # The sharpest edges of a photo, of 255 levels; a depth map is far smoother.
    assert error.mean() < 1.5
    assert np.quantile(error, 0.99) < 16


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (9, 1)])
def test_resizes_maps_smaller_than_the_kernel(shape):
    values = MAP[: shape[0], : shape[1]].copy()
    resized = resize_map(values, 40, 30)
    assert resized.shape == (30, 40)
    assert values.min() <= resized.min()
    assert resized.max() <= values.max()


def test_enlarging_creates_no_nearer_or_farther_depth():
    step = np.where(np.arange(72) < 36, np.float32(1), np.float32(5)) * np.ones((54, 1), np.float32)
    resized = resize_map(step, 700, 500)
    assert (resized.min(), resized.max()) == (1, 5)


def test_shrinking_counts_every_pixel():
    stripes = np.tile(np.array([0, 4], np.float32), (60, 60))
    np.testing.assert_allclose(resize_map(stripes, 40, 20), 2, atol=0.7)
    assert resize_map(stripes, 30, 15).mean() == pytest.approx(2, abs=1e-5)


def test_resizes_a_mask_to_a_mask():
    mask = np.zeros((20, 30), bool)
    mask[:10] = True
    resized = resize_map(mask, 90, 60)
    assert resized.dtype == bool
    assert resized[:29].all()
    assert not resized[31:].any()


def test_fits_a_model_size_map_to_its_photo():
    rgb = np.asarray(Image.open(PHOTOS / "temple.jpg").convert("RGB"))
    height, width = model_input(rgb).shape[2:4]
    ramp = np.linspace(0, 1, width, dtype=np.float32) * np.ones((height, 1), np.float32)
    resized = resize_map(ramp, rgb.shape[1], rgb.shape[0])
    expected = np.clip((np.arange(640) + 0.5) * width / 640 - 0.5, 0, width - 1) / (width - 1)
    np.testing.assert_allclose(resized[100], expected, atol=1e-3)
