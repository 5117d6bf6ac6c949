"""Requests that every way into the service refuses, with the status and a part of the error for each."""

from PIL import Image

from tests.support.images import PHOTO, base64_text, encode, png_with_wrong_size
from tests.support.paths import PHOTOS

HTML = base64_text(b"<html>not an image</html>")
TRUNCATED_JPEG = base64_text((PHOTOS / "cat.jpg").read_bytes()[:2000])
# Name of the fault -> fields of the request, status of the response, and a part of its error.
INVALID_REQUESTS = {
    "no image": ({}, 400, "No image"),
    "two images": ({"image_url": "https://a.b/c", "image_base64": PHOTO}, 400, "Two images"),
    "image of another type": ({"image_base64": 5}, 400, "image_base64 must be text"),
    "bad base64": ({"image_base64": "***"}, 400, "image_base64 is not valid Base64"),
    "bad data URI": ({"image_base64": "data:image/png,abc"}, 400, "data URI"),
    "private address": ({"image_url": "file:///etc/passwd"}, 400, "public http or https"),
    "unknown model": ({"image_base64": PHOTO, "model_id": "da3-tiny"}, 400, "model_id 'da3-tiny'"),
    "model of another type": ({"image_base64": PHOTO, "model_id": []}, 400, "model_id must be text"),
    "NaN percentile": ({"image_base64": PHOTO, "clip_percentile_low": "nan"}, 400, "from 0 to 100"),
    "percentiles crossed": ({"image_base64": PHOTO, "clip_percentile_high": 0.1}, 400, "must be below"),
    "gamma": ({"image_base64": PHOTO, "gamma": -1}, 400, "gamma must be a number over 0"),
    "resolution": ({"image_base64": PHOTO, "processing_res": 5000}, 400, "from 84 to 1036"),
    "output": ({"image_base64": PHOTO, "outputs": ["mesh"]}, 400, "outputs must be"),
    "focal length": ({"image_base64": PHOTO, "focal_length_px": -5}, 400, "focal_length_px must be"),
    "rays with the SDT head": (
        {"image_base64": PHOTO, "use_ray_pose": True, "use_sdt_head": True},
        400,
        "no rays",
    ),
    "too many pixels": (
        {"image_base64": base64_text(encode(Image.new("1", (5001, 5000))))},
        413,
        "5001 x 5000 pixels; the limit is 25000000 pixels",
    ),
    "no image format": ({"image_base64": HTML}, 415, "none of the formats"),
    "zero bytes": ({"image_base64": ""}, 422, "empty"),
    "truncated": ({"image_base64": TRUNCATED_JPEG}, 422, "cut short"),
    "lying header": ({"image_base64": base64_text(png_with_wrong_size())}, 422, "cut short"),
    "too elongated": (
        {"image_base64": base64_text(encode(Image.new("L", (900, 9))))},
        422,
        "at least 84",
    ),
}
