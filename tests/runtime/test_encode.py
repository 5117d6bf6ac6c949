"""What a caller gets back can be read back."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from da3_runtime.output.encode import npz, png16, sky_png

DEPTH = np.random.default_rng(0).uniform(0.3, 90, (37, 53)).astype(np.float32)


def pixels(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def test_depth_comes_back_from_16_bits_within_half_a_step():
    png, scale = png16(DEPTH)
    steps = pixels(png)
    assert steps.dtype == np.uint16
    assert steps.max() == 65535
    np.testing.assert_allclose(steps * scale, DEPTH, atol=0.51 * scale)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), steps)


def test_what_is_no_depth_is_zero_and_what_is_small_is_not():
    depth = np.array([[0, np.nan, np.inf, -1], [1e-9, 1, 2, 4]], np.float32)
    png, scale = png16(depth)
    steps = pixels(png)
    assert steps.tolist()[0] == [0, 0, 0, 0]
    assert steps[1, 0] == 1
    np.testing.assert_allclose(steps[1, 1:] * scale, [1, 2, 4], atol=scale)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_a_constant_depth_comes_back(value):
    png, scale = png16(np.full((3, 3), value, np.float32))
    np.testing.assert_allclose(pixels(png) * scale, value, rtol=1e-5)


def test_depth_comes_back_from_npz_to_the_bit():
    with np.load(io.BytesIO(npz(DEPTH))) as archive:
        assert archive.files == ["depth"]
        assert archive["depth"].dtype == np.float32
        assert np.array_equal(archive["depth"], DEPTH)


def test_sky_is_white():
    sky = DEPTH > 40
    assert np.array_equal(pixels(sky_png(sky)), sky * 255)
