"""Depth -> pictures: the reference service's tone steps, colours, PNG."""

import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

import da3_runtime.util.parallel
from da3_runtime.errors import SettingError
from da3_runtime.output.png import encode_png
from da3_runtime.output.preview import COLOUR_MAPS, Tone, colour_picture, inverse_depth_picture
from da3_runtime.postprocess.resize import resize_bicubic

PLAIN = Tone(histogram_equalization=False)


def reference_picture(depth, tone):
    """The reference service's documented steps, level by level."""
    inverse = 1 / (depth.astype(np.float64) + 1e-6)
    ordered = np.sort(inverse.ravel())

    def percentile(p):
        at = p / 100 * (ordered.size - 1)
        below = int(np.floor(at))
        above = min(below + 1, ordered.size - 1)
        return ordered[below] + (at - below) * (ordered[above] - ordered[below])

    low, high = percentile(tone.clip_percentile_low), percentile(tone.clip_percentile_high)
    share = (np.minimum(np.maximum(inverse, low), high) - low) / (high - low + 1e-8)
    if tone.histogram_equalization:
        level = np.floor(share.astype(np.float32) * 255).astype(int)
        counts = [float((level == value).sum()) for value in range(256)]
        if tone.hist_clip_limit > 0:
            most = tone.hist_clip_limit * level.size / 256
            spare = sum(max(count - most, 0) for count in counts)
            counts = [min(count, most) + spare / 256 for count in counts]
        running, sums = 0.0, []
        for count in counts:
            running += count
            sums.append(running)
        first = next(value for value in sums if value > 0)
        table = [(value - first) / (sums[-1] - first + 1e-8) for value in sums]
        share = np.array(table)[level]
    return np.floor(np.maximum(share, 0).astype(np.float32) ** tone.gamma * 255).astype(np.uint8)


def a_depth(seed, height=120, width=160):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.2, 1.2, (6, 8)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.maximum(smooth, 0.1) + rng.uniform(0, 0.01, (height, width)).astype(np.float32)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.03, 2.0])
@pytest.mark.parametrize("gamma", [1.0, 0.6, 2.2])
@pytest.mark.parametrize("clip", [(0.5, 99.5), (0, 100), (10, 60)])
def test_the_picture_is_the_reference_services(limit, gamma, clip):
    depth = a_depth(1)
    for equalise in (True, False):
        tone = Tone(*clip, equalise, limit, gamma)
        ours = inverse_depth_picture(depth, tone).astype(int)
        error = np.abs(ours - reference_picture(depth, tone))
        # Single precision may put a pixel into the next of the 256 levels, which a tone can part.
        assert (error <= 1).mean() > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_by_default_no_pixel_is_two_levels_off(seed):
    depth = a_depth(seed, 300, 400)
    ours = inverse_depth_picture(depth).astype(int)
    assert np.abs(ours - reference_picture(depth, Tone())).max() <= 2


def test_of_a_large_map_the_picture_is_the_reference_services():
    depth = resize_bicubic(a_depth(0, 378, 504), 2016, 1512)
    for tone in (Tone(), Tone(gamma=0.6), Tone(histogram_equalization=False, gamma=1.7), PLAIN):
        ours = inverse_depth_picture(depth, tone).astype(int)
        error = np.abs(ours - reference_picture(depth, tone))
        assert (error <= 1).mean() > 0.99
        # A gamma can part neighbouring levels.
        assert error.max() <= 2 or tone.gamma != 1


@pytest.mark.parametrize("span", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("tone", [Tone(), PLAIN, Tone(histogram_equalization=False, gamma=0.3)])
def test_a_map_that_is_nearly_flat(span, tone):
    depth = (1 + a_depth(5, 300, 400) * span).astype(np.float32)
    error = np.abs(inverse_depth_picture(depth, tone).astype(int) - reference_picture(depth, tone))
    assert error.max() <= 1


def test_negative_depth_is_the_nearest():
    depth = np.full((100, 100), 2, np.float32)
    depth[:60] = -1
    depth[60:70] = 1
    picture = inverse_depth_picture(depth, PLAIN)
    assert (picture[:60] == 255).all()
    assert (picture[60:] == 0).all()


def test_equalising_uses_the_levels_evenly():
    depth = a_depth(2)
    spread = inverse_depth_picture(depth, Tone(hist_clip_limit=0))
    plain = inverse_depth_picture(depth, PLAIN)

    def distance_from_even(picture):
        shares = np.bincount(picture.ravel() // 32, minlength=8) / picture.size
        return np.abs(shares - 1 / 8).sum()

    assert distance_from_even(spread) < 0.25 * distance_from_even(plain)


@pytest.mark.parametrize("tone", [Tone(), PLAIN, Tone(gamma=0.5)])
def test_near_is_bright(tone):
    picture = inverse_depth_picture(np.linspace(1, 10, 1000, dtype=np.float32).reshape(10, 100), tone)
    assert picture[0, 0] == 255
    assert picture[-1, -1] == 0
    assert (np.diff(picture.ravel().astype(int)) <= 0).all()


def test_percentiles_clip_outliers():
    depth = np.full((100, 100), 2, np.float32)
    depth[50:] = 4
    depth[0, 0] = 1e-6
    picture = inverse_depth_picture(depth)
    assert picture[10, 10] == 255
    assert picture[90, 90] == 0


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (1, 4), (2, 1)])
def test_the_smallest_maps(shape):
    depth = np.linspace(1, 2, 4, dtype=np.float32)[: shape[0] * shape[1]].reshape(shape)
    for tone in (PLAIN, Tone(gamma=0.5, histogram_equalization=False), Tone()):
        picture = inverse_depth_picture(depth, tone)
        assert picture.shape == shape
        assert picture.ravel()[0] == 255
        assert picture.ravel()[-1] == 0


def test_what_is_far_nearer_than_white_is_white():
    depth = np.linspace(1, 1 + 1e-4, 2**18, dtype=np.float32).reshape(512, 512)
    depth[0, :3] = 0, 1e-30, -1
    depth[-1, -3:] = 1e30
    picture = inverse_depth_picture(depth)
    assert (picture[0, :3] == 255).all()
    assert (picture[-1, -3:] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 1e30])
def test_constant_depth_makes_a_plain_picture_without_warnings(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = inverse_depth_picture(np.full((4, 4), value, np.float32))
    assert np.unique(picture).tolist() == [0]


@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (1, 30), (30, 1), (97, 203), (12, 7, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(shape, dtype):
    if len(shape) == 3 and dtype == np.uint16:
        return
    rng = np.random.default_rng(0)
    for top in (np.iinfo(dtype).max, 3):
        picture = rng.integers(0, top, shape, dtype, endpoint=True)
        for view in (picture, picture[::-1, ::-1]):
            data = encode_png(view)
            by_pillow = np.asarray(Image.open(io.BytesIO(data)))
            assert np.array_equal(by_pillow, view)
            flags = cv2.IMREAD_COLOR_RGB if len(shape) == 3 else cv2.IMREAD_UNCHANGED
            by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            assert by_opencv.dtype == dtype
            assert np.array_equal(by_opencv, view)


def test_the_file_does_not_depend_on_the_cores(monkeypatch):
    picture = np.random.default_rng(0).integers(0, 60, (1500, 1400), np.uint8)
    files = set()
    for threads in (1, 3):
        monkeypatch.setattr(da3_runtime.util.parallel, "_thread_count", lambda threads=threads: threads)
        files.add(encode_png(picture))
    assert len(files) == 1


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_a_colour_map_orders_depth_and_its_png_is_rgb(name):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = colour_picture(gray, name)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 200
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(colours)))), colours)
    if name != "turbo":  # perceptually uniform: lightness rises with the value
        light = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[:, :, 0].ravel().astype(int)
        assert (np.diff(light) >= -1).all()
        assert light[-1] - light[0] > 100


def test_an_unknown_colour_map_lists_the_known_ones():
    with pytest.raises(SettingError, match="color_map 'jet' is not one of: inferno, magma"):
        colour_picture(np.zeros((2, 2), np.uint8), "jet")
