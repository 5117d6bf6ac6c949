"""Valid requests, and the one sentence about an invalid one."""

import json

import pytest

from da3_runtime.api.request import DepthRequest, parse_request, takes
from da3_runtime.api.schema import json_schemas
from da3_runtime.errors import RequestError
from da3_runtime.output.encode import Output

URL = {"image_url": "https://example.com/a.jpg"}


def test_defaults_are_the_reference_service_s():
    request, warnings = parse_request(URL)
    assert warnings == []
    assert (request.use_ray_pose, request.use_sdt_head, request.processing_res) == (None, None, None)
    assert request.wanted.outputs == (Output.PREVIEW,)
    tone = request.wanted.tone
    assert (tone.clip_percentile_low, tone.clip_percentile_high) == (0.5, 99.5)
    assert (tone.gamma, tone.histogram_equalization, tone.hist_clip_limit) == (1.0, True, 0.01)
    assert request.output_size == "original"


def test_null_is_the_same_as_left_out():
    everything = dict.fromkeys(DepthRequest.model_fields)
    assert parse_request(everything | URL) == parse_request(URL)


def test_numbers_and_flags_may_come_as_text_as_the_reference_takes_them():
    request, _ = parse_request(URL | {"processing_res": "504", "gamma": "0.8", "use_ray_pose": "true"})
    assert (request.processing_res, request.gamma, request.use_ray_pose) == (504, 0.8, True)


def test_white_space_around_a_url_is_ignored():
    request, _ = parse_request({"image_url": "\n https://example.com/a.jpg\r\n"})
    assert request.image_url == URL["image_url"]


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,aGk=", "\n DATA:;base64,aGk", "data:," + "x" * 9000]
)
def test_a_data_uri_in_image_url_is_the_image(uri):
    request, warnings = parse_request({"image_url": uri})
    assert (request.image_url, request.image_base64) == (None, uri.strip())
    assert warnings == []
    with pytest.raises(RequestError, match=r"^Two images"):
        parse_request({"image_url": uri, "image_base64": "aGk="})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_url", 5),
        ("image_url", "x" * 5000),
        ("image_base64", ["x"]),
        ("model_id", 3),
        ("use_ray_pose", "maybe"),
        ("use_sdt_head", 2),
        ("processing_res", 83),
        ("processing_res", 1037),
        ("processing_res", 504.5),
        ("processing_res", True),
        ("clip_percentile_low", float("nan")),
        ("clip_percentile_high", float("inf")),
        ("clip_percentile_high", 100.5),
        ("clip_percentile_low", "low"),
        ("gamma", 0),
        ("gamma", -1),
        ("gamma", False),
        ("gamma", {}),
        ("histogram_equalization", "x"),
        ("hist_clip_limit", -0.1),
        ("focal_length_px", 0),
        ("focal_length_px", 1e-320),
        ("intrinsics", [[1e300, 0, 1], [0, 1e300, 1], [0, 0, 1]]),
        ("model_id", "x" * 201),
        ("focal_length_px", "long"),
        ("intrinsics", [1, 2, 3]),
        ("intrinsics", [[1, 0, 0], [0, 1, 0]]),
        ("intrinsics", [[1, 0, 0], [0, 1, 0], [0, 0, "x"]]),
        ("outputs", []),
        ("outputs", "preview"),
        ("outputs", ["depth"]),
        ("outputs", ["preview"] * 14),
        ("output_size", "half"),
        ("color_map", "jet"),
        ("depth_unit", "cm"),
        ("points_confidence", 101),
        ("points_edge", -0.1),
        ("points_sky", "some"),
        ("points_max", 0),
        ("points_max", 2_000_001),
        ("points_cameras", 2),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_field_and_what_it_takes(field, value):
    data = ({} if field.startswith("image_") else URL) | {field: value}
    with pytest.raises(RequestError) as caught:
        parse_request(data)
    assert str(caught.value) == f"{field} must be {takes(field)}."
    assert caught.value.status == 400


def test_limits_are_part_of_the_sentence():
    assert takes("processing_res") == "a whole number from 84 to 1036"
    assert takes("points_max") == "a whole number from 1 to 2000000"
    assert takes("gamma") == "a number over 0 and at most 10"
    assert takes("color_map").startswith("one of: inferno, ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "input must be a JSON object"),
        ("text", "input must be a JSON object"),
        ({}, "No image"),
        (URL | {"image_base64": "aaaa"}, "Two images"),
        (
            URL | {"clip_percentile_low": 60, "clip_percentile_high": 60},
            "clip_percentile_low must be below",
        ),
        (URL | {"depth_unit": "mm"}, "depth_unit mm is for depth_png16: add it to outputs"),
        (URL | {"intrinsics": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "intrinsics must be"),
        (URL | {"intrinsics": [[1, 0, 0], [0, 1, 0], [0, 0, 2]]}, "intrinsics must be"),
        (URL | {"intrinsics": [[1e-300, 0, 0], [0, 1, 0], [0, 0, 1]]}, "intrinsics must be"),
    ],
)
def test_contradicting_fields_are_one_sentence(data, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        parse_request(data)


def test_unknown_fields_are_ignored_with_a_warning():
    _, warnings = parse_request(URL | {"focal_lenght_px": 5, "\ud800": 1})
    assert len(warnings) == 1
    assert "'focal_lenght_px'" in warnings[0]
    warnings[0].encode()


def test_repr_hides_the_key():
    request, _ = parse_request(URL | {"api_key": "secret"})
    assert "secret" not in repr(request)


def test_the_schemas_are_complete_documents():
    for document in json_schemas().values():
        text = json.dumps(document)
        for part in text.split('"$ref": "#/$defs/')[1:]:
            assert part.partition('"')[0] in document["$defs"]
    fields = json_schemas()["request"]["$defs"]["DepthRequest"]["properties"]
    assert set(fields) == set(DepthRequest.model_fields)
    assert all(field["description"] for field in fields.values())
