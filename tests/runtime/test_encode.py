"""Encoded outputs can be decoded again, and the rest of the program follows the table of outputs."""

import io
from dataclasses import replace

import cv2
import numpy as np
import OpenEXR
import pytest
from PIL import Image

from da3_runtime.api.request import DepthRequest
from da3_runtime.api.response import DepthResponse, SceneResponse, ViewResponse, outputs_of
from da3_runtime.errors import OutputError
from da3_runtime.network_io import MAPS
from da3_runtime.output.encode import DepthUnit, Output, Wanted, encode_outputs
from da3_runtime.output.maps import exr, npz, png16, png_of_millimeters, sky_png, tiff
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Prediction, Seen
from da3_runtime.postprocess.points import PointOptions
from da3_runtime.variants import Unit

DEPTH = np.random.default_rng(0).uniform(0.3, 90, (37, 53)).astype(np.float32)


def pixels(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def test_16_bit_depth_is_within_half_a_step():
    png, scale = png16(DEPTH)
    steps = pixels(png)
    assert steps.dtype == np.uint16
    assert steps.max() == 65535
    np.testing.assert_allclose(steps * scale, DEPTH, atol=0.51 * scale)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), steps)


def test_invalid_depth_is_zero_and_small_depth_is_not():
    depth = np.array([[0, np.nan, np.inf, -1], [1e-9, 1, 2, 4]], np.float32)
    png, scale = png16(depth)
    steps = pixels(png)
    assert steps.tolist()[0] == [0, 0, 0, 0]
    assert steps[1, 0] == 1
    np.testing.assert_allclose(steps[1, 1:] * scale, [1, 2, 4], atol=scale)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_constant_depth_keeps_its_value(value):
    png, scale = png16(np.full((3, 3), value, np.float32))
    np.testing.assert_allclose(pixels(png) * scale, value, rtol=1e-5)


def test_npz_keeps_every_bit():
    with np.load(io.BytesIO(npz(DEPTH))) as archive:
        assert archive.files == ["depth"]
        assert archive["depth"].dtype == np.float32
        assert np.array_equal(archive["depth"], DEPTH)


def test_millimeters_are_rounded_and_invalid_or_far_ones_are_zero():
    depth = np.array([[1.2344, 65.535, 65.5356, 1e9], [1e-6, 0, np.nan, -1]], np.float32)
    png, beyond = png_of_millimeters(depth)
    assert pixels(png).tolist() == [[1234, 65535, 0, 0], [1, 0, 0, 0]]
    assert beyond == 2 / 8


def test_millimeters_are_for_meters_only_and_say_what_is_too_far():
    wanted = Wanted((Output.DEPTH_PNG16,), depth_unit=DepthUnit.MM)
    meters = replace(EVERYTHING, depth=Depth(DEPTH, Unit.METERS))
    (encoded,) = encode_outputs(meters, wanted)
    assert encoded.facts == {"depth_scale": 0.001}
    is_near = DEPTH < 65.535
    np.testing.assert_allclose(pixels(encoded.file)[is_near] / 1000, DEPTH[is_near], atol=0.0006)
    assert (pixels(encoded.file)[~is_near] == 0).all()
    assert encoded.warnings == [
        f"{(~is_near).mean():.1%} of the pixels are farther than 65.535 m, the most that depth_png16 "
        "holds in mm: they are 0, as invalid ones."
    ]
    near = replace(meters, depth=Depth(DEPTH / 2, Unit.METERS))
    assert not next(encode_outputs(near, wanted)).warnings
    for unit in (Unit.RELATIVE, Unit.CAMERAS):
        with pytest.raises(
            OutputError, match=f"in meters, and the unit of this depth is {unit}: choose"
        ):
            list(encode_outputs(replace(EVERYTHING, depth=Depth(DEPTH, unit)), wanted))


def test_tiff_keeps_every_bit_and_says_its_unit():
    data = tiff(DEPTH, Unit.METERS)
    assert np.array_equal(pixels(data), DEPTH)
    image = Image.open(io.BytesIO(data))
    assert (image.mode, image.tag_v2[270]) == ("F", "depth, unit m")
    assert np.array_equal(np.asarray(image), DEPTH)


def test_exr_keeps_every_bit(tmp_path):
    path = tmp_path / "depth.exr"
    path.write_bytes(exr(DEPTH))
    with OpenEXR.File(str(path)) as file:
        assert np.array_equal(file.channels()["Y"].pixels, DEPTH)


def test_exr_that_opencv_does_not_write_is_one_sentence(monkeypatch):
    def refuse(*_):
        raise cv2.error("OpenEXR codec is disabled")

    monkeypatch.setattr(cv2, "imencode", refuse)
    with pytest.raises(OutputError, match="depth_exr cannot be written here"):
        exr(DEPTH)


def test_sky_is_white():
    sky = DEPTH > 40
    assert np.array_equal(pixels(sky_png(sky)), sky * 255)


CAMERA = Camera(np.eye(3, dtype=np.float32), np.eye(3, 4, dtype=np.float32))
IMAGE = np.zeros((37, 53, 3), np.uint8)


def with_seen(prediction):
    return replace(prediction, seen=Seen(IMAGE, prediction, 53, 37, 0, 0, (1.0, 1.0)))


MAPS_OF_ALL = {"confidence": DEPTH + 1, "sky": DEPTH > 40}
EVERYTHING = with_seen(Prediction(Depth(DEPTH, Unit.RELATIVE), CAMERA, MAPS_OF_ALL, None, []))
LITTLE = with_seen(Prediction(Depth(DEPTH, Unit.RELATIVE), None, {}, None, []))
OF_POINTS = (Output.GLB, Output.PLY, Output.COLMAP)
EVERY = Wanted(tuple(Output), points=PointOptions(edge=0))


def test_every_output_is_encoded_as_its_row_says():
    for encoded in encode_outputs(EVERYTHING, EVERY):
        row = encoded.output.row
        assert (encoded.file is not None) == bool(row.stem) == bool(row.ending) == bool(row.description)
        assert set(encoded.facts) == set(row.facts)


def test_outputs_that_the_model_lacks_are_null_and_have_no_facts():
    wanted = Wanted(tuple(each for each in Output if each not in OF_POINTS))
    fields, _ = outputs_of([list(encode_outputs(LITTLE, wanted))], None, None)
    absent = {name for name, value in fields.items() if value is None}
    assert absent == {"confidence_base64", "sky_base64", "camera"}
    assert "confidence_scale" not in fields


def test_every_field_of_an_output_is_in_the_response_schema():
    encoded = list(encode_outputs(EVERYTHING, EVERY))
    fields, _ = outputs_of([encoded], None, None)
    urls, _ = outputs_of([encoded], 1, lambda name, data: f"https://{name}")
    own, common = (
        list(encode_outputs(EVERYTHING, EVERY.only(of_scene=of_scene))) for of_scene in (False, True)
    )
    first, second, both = outputs_of([own, own], 1, lambda name, data: f"https://{name}", common)
    assert set(fields) | set(urls) <= set(DepthResponse.model_fields)
    assert urls["depth_npz_url"] == "https://depth_npz.npz"
    assert urls["image_url"] == "https://preview.png"
    assert (first["image_url"], second["image_url"]) == (
        "https://0-preview.png",
        "https://1-preview.png",
    )
    assert (set(both), both["colmap_url"]) == (
        {"glb_url", "ply_url", "colmap_url", "scene_npz_url"}, "https://colmap.zip",
    )  # fmt: skip
    assert set(both) <= set(SceneResponse.model_fields)
    assert not set(both) & set(ViewResponse.model_fields)
    assert all(field.description for field in DepthResponse.model_fields.values())


def test_the_response_starts_as_the_reference_services_does():
    names = list(DepthResponse.model_fields)
    assert names[:6] == ["image_base64", "min_depth", "max_depth", "head_type", "file_path", "unit"]
    names = names[-7:]
    assert names == [
        "model_id", "license", "backend", "precision", "parity", "timings_ms", "warnings"
    ]  # fmt: skip


def test_file_endings_are_unique():
    endings = [output.row.ending for output in Output if output.row.ending]
    assert len(set(endings)) == len(endings)


def test_every_map_of_a_network_has_an_output():
    assert {output.row.map for output in Output if output.row.map is not None} == set(MAPS)


@pytest.mark.parametrize("output", Output)
def test_only_the_maps_of_the_wanted_outputs_are_needed(output):
    needed = Wanted((output,)).maps
    assert needed == ({output.value} if output in (Output.CONFIDENCE, Output.SKY) else set())


def test_a_request_may_name_every_output():
    request = DepthRequest(image_url="https://example.com/a.jpg", outputs=[str(each) for each in Output])
    assert request.wanted.outputs == tuple(Output)
