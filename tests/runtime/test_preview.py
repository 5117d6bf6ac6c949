"""Previews: the reference service's steps, color maps, PNG."""

import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

import da3_runtime.util.parallel
from benchmarks import pillow_pipeline
from da3_runtime.errors import SettingError
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.output.png import encode_png
from da3_runtime.output.preview import COLOR_MAPS, Tone, color_preview, gray_preview
from da3_runtime.postprocess.depth import resize_map
from da3_runtime.store.settings import EngineSettings
from tests.support.paths import NANO, PHOTOS

PLAIN = Tone(histogram_equalization=False)
RNG = np.random.default_rng(0)


def reference_preview(depth, tone):
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
def test_equals_the_reference_service_within_a_level(limit, gamma, clip):
    depth = a_depth(1)
    for equalize in (True, False):
        tone = Tone(*clip, equalize, limit, gamma)
        ours = gray_preview(depth, tone).astype(int)
        error = np.abs(ours - reference_preview(depth, tone))
        # Single precision may put a pixel into the next of the 256 levels, which a tone can part.
        assert (error <= 1).mean() > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_default_tone_is_never_more_than_two_levels_off(seed):
    depth = a_depth(seed, 300, 400)
    ours = gray_preview(depth).astype(int)
    assert np.abs(ours - reference_preview(depth, Tone())).max() <= 2


def edges(seed):
    """Objects at constant depths before a ground plane, without any blur."""
    rng = np.random.default_rng(seed)
    depth = (1 / np.linspace(0.1, 0.6, 378, dtype=np.float32))[:, None] * np.ones((1, 504), np.float32)
    for left, top, size in rng.integers(20, 300, (12, 3)):
        depth[top : top + size, left : left + size // 3] = rng.uniform(1, 6)
    return depth


MODEL_MAPS = {
    "smooth": cv2.GaussianBlur(a_depth(0, 378, 504), (0, 0), 3),
    "rough": a_depth(1, 378, 504),
    "edges": edges(2),
    "ramp": np.linspace(0.5, 40, 378 * 504, dtype=np.float32).reshape(378, 504),
    "columns": np.tile(RNG.uniform(0.5, 3, 504).astype(np.float32), (378, 1)),
}
TONES = [Tone(), Tone(gamma=0.6), Tone(histogram_equalization=False, gamma=1.7), PLAIN]


@pytest.mark.parametrize(
    ("name", "tone"),
    [*((name, Tone()) for name in MODEL_MAPS), *(("rough", tone) for tone in TONES[1:])],
)
def test_percentiles_and_histogram_of_a_sample_are_those_of_a_large_map(name, tone):
    depth = resize_map(MODEL_MAPS[name], 1240, 930)
    error = np.abs(gray_preview(depth, tone).astype(int) - reference_preview(depth, tone))
    assert error.mean() < 0.7
    # A gamma can part neighboring levels.
    assert error.max() <= 3 or tone.gamma != 1


@pytest.fixture(scope="module")
def estimator(engine):
    return Estimator.load(EngineSettings(model_id=NANO, engine_dir=engine.engine_dir))


@pytest.mark.parametrize("size", [(200, 150), (640, 480), (1920, 1080)])
@pytest.mark.parametrize("name", ["temple.jpg", "coffee.jpg", "cat.jpg"])
def test_previews_of_photos_differ_little_from_the_reference_service(estimator, name, size):
    """By one level for 99 percent of the pixels and five for the rest, with resizing and sampling."""
    data = (PHOTOS / name).read_bytes()
    depth = estimator.estimate(data, Timings(), processing_res=504, model_size=True).depth.values
    ours = gray_preview(resize_map(depth, *size)).astype(int)
    error = np.abs(ours - pillow_pipeline.preview(depth, *size))
    assert (error <= 1).mean() >= 0.99
    assert error.max() <= 5


@pytest.mark.parametrize("span", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("tone", [Tone(), PLAIN, Tone(histogram_equalization=False, gamma=0.3)])
def test_a_nearly_flat_map_keeps_its_contrast(span, tone):
    depth = (1 + a_depth(5, 300, 400) * span).astype(np.float32)
    error = np.abs(gray_preview(depth, tone).astype(int) - reference_preview(depth, tone))
    assert error.max() <= 1


def test_negative_depth_counts_as_nearest():
    depth = np.full((100, 100), 2, np.float32)
    depth[:60] = -1
    depth[60:70] = 1
    preview = gray_preview(depth, PLAIN)
    assert (preview[:60] == 255).all()
    assert (preview[60:] == 0).all()


def test_equalization_uses_the_levels_evenly():
    depth = a_depth(2)
    spread = gray_preview(depth, Tone(hist_clip_limit=0))
    plain = gray_preview(depth, PLAIN)

    def distance_from_even(preview):
        shares = np.bincount(preview.ravel() // 32, minlength=8) / preview.size
        return np.abs(shares - 1 / 8).sum()

    assert distance_from_even(spread) < 0.25 * distance_from_even(plain)


@pytest.mark.parametrize("tone", [Tone(), PLAIN, Tone(gamma=0.5)])
def test_near_is_bright(tone):
    preview = gray_preview(np.linspace(1, 10, 1000, dtype=np.float32).reshape(10, 100), tone)
    assert preview[0, 0] == 255
    assert preview[-1, -1] == 0
    assert (np.diff(preview.ravel().astype(int)) <= 0).all()


def test_percentiles_clip_outliers():
    depth = np.full((100, 100), 2, np.float32)
    depth[50:] = 4
    depth[0, 0] = 1e-6
    preview = gray_preview(depth)
    assert preview[10, 10] == 255
    assert preview[90, 90] == 0


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (1, 4), (2, 1)])
def test_previews_maps_of_a_few_pixels(shape):
    depth = np.linspace(1, 2, 4, dtype=np.float32)[: shape[0] * shape[1]].reshape(shape)
    for tone in (PLAIN, Tone(gamma=0.5, histogram_equalization=False), Tone()):
        preview = gray_preview(depth, tone)
        assert preview.shape == shape
        assert preview.ravel()[0] == 255
        assert preview.ravel()[-1] == 0


def test_outliers_beyond_the_percentiles_are_white_or_black():
    depth = np.linspace(1, 1 + 1e-4, 2**18, dtype=np.float32).reshape(512, 512)
    depth[0, :3] = 0, 1e-30, -1
    depth[-1, -3:] = 1e30
    preview = gray_preview(depth)
    assert (preview[0, :3] == 255).all()
    assert (preview[-1, -3:] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 1e30])
def test_constant_depth_is_black_without_warnings(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preview = gray_preview(np.full((4, 4), value, np.float32))
    assert np.unique(preview).tolist() == [0]


@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (1, 30), (30, 1), (97, 203), (12, 7, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(shape, dtype):
    if len(shape) == 3 and dtype == np.uint16:
        return
    rng = np.random.default_rng(0)
    for top in (np.iinfo(dtype).max, 3):
        preview = rng.integers(0, top, shape, dtype, endpoint=True)
        for view in (preview, preview[::-1, ::-1]):
            data = encode_png(view)
            by_pillow = np.asarray(Image.open(io.BytesIO(data)))
            assert np.array_equal(by_pillow, view)
            flags = cv2.IMREAD_COLOR_RGB if len(shape) == 3 else cv2.IMREAD_UNCHANGED
            by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            assert by_opencv.dtype == dtype
            assert np.array_equal(by_opencv, view)


def test_the_png_does_not_depend_on_the_number_of_cores(monkeypatch):
    preview = np.random.default_rng(0).integers(0, 60, (1500, 1400), np.uint8)
    files = set()
    for threads in (1, 3):
        monkeypatch.setattr(da3_runtime.util.parallel, "_thread_count", lambda threads=threads: threads)
        files.add(encode_png(preview))
    assert len(files) == 1


@pytest.mark.parametrize("name", COLOR_MAPS)
def test_a_color_map_orders_depth_and_its_png_is_rgb(name):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colors = color_preview(gray, name)
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 200
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(colors)))), colors)
    if name != "turbo":  # perceptually uniform: lightness rises with the value
        light = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[:, :, 0].ravel().astype(int)
        assert (np.diff(light) >= -1).all()
        assert light[-1] - light[0] > 100


def test_an_unknown_color_map_lists_the_known_ones():
    with pytest.raises(SettingError, match="color_map 'jet' is not one of: inferno, magma"):
        color_preview(np.zeros((2, 2), np.uint8), "jet")
