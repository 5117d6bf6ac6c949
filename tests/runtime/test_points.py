"""Files of points are read back with the libraries that others use, and hold depth times ray."""

import io
import json
import os
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pycolmap
import pytest
import trimesh
from PIL import Image

import da3_runtime as da3
from da3_runtime.errors import OutputError, SettingError
from da3_runtime.output.encode import Output, Wanted, encode_outputs
from da3_runtime.output.glb import glb
from da3_runtime.output.ply import ply
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Prediction, Seen
from da3_runtime.postprocess.points import PointOptions, cloud_of
from da3_runtime.variants import Unit
from tests.support.paths import NANO, PHOTOS
from tools.nano.scenes import LAYOUTS, render_views

ALL = PointOptions(confidence=0, sky=True, edge=0)
NAMES = ["a.jpg", "the garden/b.jpg", "ü.jpg"]
SEED, INDEX = 5, 2


def seen_of(image, depth, intrinsics, extrinsics, unit=Unit.RELATIVE, maps=None, crop=(0, 0)):
    """A photo of twice the size of the network's input, of which ``crop`` was cut off at each side."""
    height, width = depth.shape
    size = 2 * (width + 2 * crop[0]), 2 * (height + 2 * crop[1])
    model = Prediction(Depth(depth, unit), Camera(intrinsics, extrinsics), maps or {}, None, [])
    return Seen(image, model, *size, *crop, (2.0, 2.0))


@pytest.fixture(scope="module")
def rendered():
    """Three views of a scene of exact geometry."""
    scenes = render_views(SEED, INDEX, 3, 84, 112)
    return [
        seen_of(
            scene.rgb,
            np.where(scene.sky, np.float32(1000), scene.depth),
            scene.intrinsics,
            scene.extrinsics,
            maps={"sky": scene.sky},
        )
        for scene in scenes
    ]


def random_view(seed, unit=Unit.RELATIVE, far=0.0, crop=(0, 0)):
    """A view with a camera and a depth that mean nothing."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    center = rng.normal(size=3) + far
    lens = np.array([[90, 1.5, 25], [0, 80, 22], [0, 0, 1]], np.float32)
    pose = np.column_stack([rotation, -rotation @ center])
    return seen_of(
        rng.integers(0, 256, (42, 56, 3), dtype=np.uint8),
        rng.uniform(0.5, 9, (42, 56)).astype(np.float32),
        lens,
        pose if far else pose.astype(np.float32),
        unit,
        {"confidence": rng.uniform(1, 9, (42, 56)).astype(np.float32)},
        crop,
    )


def expected(views):
    """Every point by the definition, in double precision: R^T (depth K^-1 [x + 0.5, y + 0.5, 1] - t)."""
    points = []
    for view in views:
        camera = view.model.camera
        inverse, pose = np.linalg.inv(camera.intrinsics.astype(float)), camera.extrinsics.astype(float)
        rows, columns = np.indices(view.model.depth.values.shape)
        pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(rows.shape)], axis=-1).reshape(-1, 3)
        in_camera = (inverse @ pixels.T) * view.model.depth.values.ravel()
        points.append((pose[:, :3].T @ (in_camera - pose[:, 3:])).T)
    return np.concatenate(points)


def colors_of(views):
    return np.concatenate([view.image.reshape(-1, 3) for view in views])


def read_glb(data):
    """The points in the world's axes, their colors, and the transforms of the cameras, as trimesh reads."""
    scene = trimesh.load(io.BytesIO(data), file_type="glb")
    back = np.diag([1.0, -1, -1, 1])  # from glTF's axes to those of the world
    turned, name = scene.graph["points"]
    points = trimesh.transform_points(scene.geometry[name].vertices, back @ turned)
    # trimesh knows one camera only.
    root, *nodes = document_of(data)["nodes"]
    assert root["rotation"] == [1, 0, 0, 0]  # half a turn around x
    turned = np.diag([1.0, -1, -1, 1])
    turned[:3, 3] = root["translation"]
    cameras = {
        node["name"]: back @ turned @ np.reshape(node["matrix"], (4, 4)).T
        for node in nodes
        if "camera" in node
    }
    return points, scene.geometry[name].colors[:, :3], cameras


def document_of(data):
    """The JSON part of a GLB file."""
    length = int.from_bytes(data[12:16], "little")
    return json.loads(data[20 : 20 + length])


def read_ply(data):
    cloud = trimesh.load(io.BytesIO(data), file_type="ply")
    return cloud, cloud.metadata["_ply_raw"]["vertex"]["data"]


def read_colmap(data, tmp_path):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    return pycolmap.Reconstruction(str(tmp_path / "sparse" / "0"))


def encoded(output, views, options=ALL, names=NAMES, cameras=True):
    predictions = [replace(view.model, seen=view) for view in views]
    wanted = Wanted((output,), points=options, cameras=cameras)
    (each,) = encode_outputs(predictions, wanted, names[: len(views)])
    return each.file


VIEWS = {
    "one photo": [random_view(1)],
    "three": [random_view(1), random_view(2), random_view(3)],
    "cropped": [random_view(1, crop=(14, 0)), random_view(2, crop=(0, 28))],
    "meters": [random_view(4, Unit.METERS)],
    "far from the origin": [random_view(5, Unit.CAMERAS, 4e5), random_view(6, Unit.CAMERAS, 4e5)],
}


def is_near(points, views):
    """Within 1e-4 of the distance to the cameras."""
    origin = views[0].model.camera
    center = -origin.extrinsics[:, :3].astype(float).T @ origin.extrinsics[:, 3]
    np.testing.assert_allclose(points - center, expected(views) - center, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())
def test_a_glb_has_every_point_and_camera(views):
    points, colors, cameras = read_glb(encoded(Output.GLB, views))
    is_near(points, views)
    # glTF's colors are linear.
    level = colors_of(views) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(colors / 255, linear, atol=1 / 255)
    assert list(cameras) == NAMES[: len(views)]
    for name, view in zip(NAMES, views, strict=False):
        pose = np.vstack([view.model.camera.extrinsics.astype(float), [0, 0, 0, 1]])
        looks = np.linalg.inv(pose) @ np.diag([1.0, -1, -1, 1])  # glTF's camera looks along -z
        np.testing.assert_allclose(cameras[name], looks, rtol=1e-6, atol=1e-5)


def test_the_lines_of_a_camera_end_at_the_corners_of_its_photo():
    (view,) = views = [random_view(1)]
    scene = trimesh.load(io.BytesIO(encoded(Output.GLB, views)), file_type="glb")
    corners = np.unique(np.asarray(scene.geometry[f"camera {NAMES[0]}"].vertices), axis=0)
    rays = corners[np.abs(corners).max(axis=1) > 0] @ np.diag([1, -1, -1])
    pixels = rays / rays[:, 2:] @ view.model.camera.intrinsics.T
    assert {tuple(np.round(each[:2], 3)) for each in pixels} == {(0, 0), (56, 0), (0, 42), (56, 42)}


def test_a_glb_may_have_no_cameras_and_says_its_unit():
    data = encoded(Output.GLB, VIEWS["meters"], cameras=False)
    assert read_glb(data)[2] == {}
    document = document_of(data)
    assert document["nodes"][0]["extras"] == {"unit": "m"}
    assert len(document["scenes"][0]["nodes"]) == 1


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())
def test_a_ply_has_every_point_its_color_and_confidence(views):
    cloud, raw = read_ply(encoded(Output.PLY, views))
    is_near(cloud.vertices, views)
    np.testing.assert_array_equal(cloud.colors[:, :3], colors_of(views))
    confidence = np.concatenate([view.model.maps["confidence"].ravel() for view in views])
    np.testing.assert_array_equal(np.ravel(raw["confidence"]), confidence)


def test_a_ply_of_a_model_without_confidence_has_none(rendered):
    header = ply(cloud_of(rendered, ALL), Unit.RELATIVE).partition(b"end_header\n")[0].decode()
    assert "confidence" not in header
    assert "property float x\n" in header


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())
def test_a_colmap_model_has_every_point_camera_and_track(views, tmp_path):
    model = read_colmap(encoded(Output.COLMAP, views), tmp_path)
    assert (model.num_images(), model.num_cameras()) == (len(views), len(views))
    ids = sorted(model.point3D_ids())
    is_near(np.array([model.point3D(i).xyz for i in ids]), views)
    np.testing.assert_array_equal([model.point3D(i).color for i in ids], colors_of(views))
    for number, (view, name) in enumerate(zip(views, NAMES, strict=False), 1):
        image, camera = model.image(number), model.camera(number)
        assert (image.name, camera.model.name) == (name, "PINHOLE")
        assert (camera.width, camera.height) == (view.width, view.height)
        pose = image.cam_from_world().matrix()
        np.testing.assert_allclose(pose, view.model.camera.extrinsics, rtol=1e-6, atol=1e-6)
        # The lens has a skew of 1.5 pixels here, which COLMAP's pinhole camera lacks: leave it out.
        tall = (
            np.array([p.xy[1] for p in image.points2D]) - camera.principal_point_y
        ) / camera.focal_length_y
        for row in range(0, len(image.points2D), 97):
            point = image.points2D[row]
            track = model.point3D(point.point3D_id).track.elements
            assert [(each.image_id, each.point2D_idx) for each in track] == [(number, row)]
            _, y, z = pose @ np.append(model.point3D(point.point3D_id).xyz, 1)
            assert y / z == pytest.approx(tall[row], abs=2e-3)
    first = model.image(1).points2D[0].xy
    np.testing.assert_allclose(first, [2 * (views[0].left + 0.5), 2 * (views[0].top + 0.5)])


def test_a_scene_npz_has_upstreams_names():
    views = VIEWS["three"]
    with np.load(io.BytesIO(encoded(Output.SCENE_NPZ, views))) as archive:
        assert set(archive.files) == {"image", "depth", "conf", "intrinsics", "extrinsics"}
        for index, view in enumerate(views):
            np.testing.assert_array_equal(archive["image"][index], view.image)
            np.testing.assert_array_equal(archive["depth"][index], view.model.depth.values)
            np.testing.assert_array_equal(archive["conf"][index], view.model.maps["confidence"])
            np.testing.assert_array_equal(archive["intrinsics"][index], view.model.camera.intrinsics)
            np.testing.assert_array_equal(archive["extrinsics"][index], view.model.camera.extrinsics)


def test_a_scene_npz_needs_no_camera():
    view = random_view(1)
    view = replace(view, model=replace(view.model, camera=None, maps={}))
    with np.load(io.BytesIO(encoded(Output.SCENE_NPZ, [view]))) as archive:
        assert set(archive.files) == {"image", "depth"}


def away_from(solid, points):
    """Distance [N] of points from a solid's surface."""
    offset = solid.local(points - solid.center)
    if solid.kind == "plane":
        return np.abs(offset[:, 1])
    if solid.kind == "sphere":
        return np.abs(np.linalg.norm(offset, axis=1) - solid.half[0])
    beyond = np.abs(offset) - solid.half
    if solid.kind == "pillar":
        around = np.hypot(offset[:, 0], offset[:, 2]) - solid.half[0]
        beyond = np.column_stack([around, beyond[:, 1]])
    return np.abs(beyond.max(axis=1))


def test_the_points_of_a_rendered_scene_lie_on_its_surfaces(rendered):
    rng = np.random.default_rng([SEED, INDEX])
    world, _ = LAYOUTS[int(rng.integers(len(LAYOUTS)))](rng)
    points, _, _ = read_glb(encoded(Output.GLB, rendered, PointOptions(edge=0)))
    assert len(points) == sum(int((~view.model.maps["sky"]).sum()) for view in rendered)
    away = np.min([away_from(solid, points.astype(np.float32)) for solid in world.solids], axis=0)
    assert (away / np.linalg.norm(points, axis=1)).max() < 1e-4


def test_sky_edges_and_unsure_pixels_are_left_out():
    depth = np.full((6, 8), 2, np.float32)
    depth[:, 4:] = 4
    sky, confidence = np.zeros((6, 8), bool), np.arange(48, dtype=np.float32).reshape(6, 8)
    sky[0] = True
    lens = np.array([[8, 0, 4], [0, 8, 3], [0, 0, 1]], np.float32)
    image = np.zeros((6, 8, 3), np.uint8)
    maps = {"sky": sky, "confidence": confidence}
    view = seen_of(image, depth, lens, np.eye(3, 4, dtype=np.float32), maps=maps)

    def kept(**options):
        cloud = cloud_of([view], replace(ALL, **options))
        mask = np.zeros((6, 8), bool)
        mask[tuple((cloud.pixels[:, ::-1] - 0.5).astype(int).T)] = True
        return mask

    assert kept().all()
    np.testing.assert_array_equal(kept(sky=False), ~sky)
    edge = np.ones((6, 8), bool)
    edge[:, 3:5] = False  # the depths differ by 2: all of the near depth, half of the far one
    np.testing.assert_array_equal(kept(edge=0.1), edge)
    half = edge.copy()
    half[:, 4] = True
    np.testing.assert_array_equal(kept(edge=0.6), half)
    np.testing.assert_array_equal(kept(confidence=50), confidence >= 23.5)
    with pytest.raises(OutputError, match="No pixel remains as a point: send a smaller"):
        cloud_of(
            [replace(view, model=replace(view.model, maps={"sky": ~np.zeros_like(sky)}))], PointOptions()
        )


def test_the_percentile_is_that_of_all_photos():
    sure, unsure = random_view(1), random_view(2)
    unsure.model.maps["confidence"][:] = 1
    cloud = cloud_of([sure, unsure], replace(ALL, confidence=49))
    assert cloud.counts == [42 * 56, 42 * 56]  # those equal to the percentile stay
    assert cloud_of([sure, unsure], replace(ALL, confidence=51)).counts[1] == 0


def test_of_too_many_points_a_random_choice_remains_the_same_each_time():
    views = VIEWS["three"]
    every = cloud_of(views, ALL)
    few, again = (cloud_of(views, replace(ALL, most=1000)) for _ in range(2))
    np.testing.assert_array_equal(few.xyz, again.xyz)
    assert sum(few.counts) == 1000
    assert all(250 < count < 420 for count in few.counts)
    assert {tuple(row) for row in few.xyz} <= {tuple(row) for row in every.xyz}
    assert len(cloud_of(views, replace(ALL, most=42 * 56 * 3)).xyz) == len(every.xyz)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("confidence", 101, "points_confidence"), ("edge", -1, "points_edge"), ("most", 0, "points_max"),
     ("most", 10**9, "points_max"), ("confidence", float("nan"), "points_confidence")],
)  # fmt: skip
def test_an_option_outside_its_range_is_one_sentence(field, value, name):
    with pytest.raises(SettingError, match=f"^{name} must be from .* to .*, not {value}"):
        PointOptions(**{field: value})


@pytest.mark.parametrize("output", [Output.GLB, Output.PLY, Output.COLMAP])
def test_points_need_a_camera(output):
    view = random_view(1)
    with pytest.raises(OutputError, match="Points need a camera, and this model finds none: send focal"):
        encoded(output, [replace(view, model=replace(view.model, camera=None))])


def test_a_file_name_that_is_no_unicode_keeps_its_bytes(tmp_path):
    views, name = VIEWS["one photo"], os.fsdecode(b"bad\xff.jpg")
    with zipfile.ZipFile(io.BytesIO(encoded(Output.COLMAP, views, names=[name]))) as archive:
        assert b"bad\xff.jpg\0" in archive.read("sparse/0/images.bin")
    assert list(read_glb(encoded(Output.GLB, views, names=[name]))[2]) == ["bad?.jpg"]


def test_one_far_point_does_not_cost_a_far_world_its_precision():
    (view,) = views = [random_view(5, Unit.CAMERAS, 4e5)]
    depth = view.model.depth.values.copy()
    depth[0, 0] = 1e6
    (view,) = views = [replace(view, model=replace(view.model, depth=Depth(depth, Unit.CAMERAS)))]
    cloud, _ = read_ply(encoded(Output.PLY, views))
    np.testing.assert_allclose(cloud.vertices[1:], expected(views)[1:], atol=2e-3)


def test_photos_of_one_name_are_told_by_their_folders(model, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(PHOTOS / "temple.jpg", tmp_path / folder / "x.jpg")
    scene = model.scene([tmp_path / "a" / "x.jpg", str(tmp_path / "b" / "x.jpg")])
    reconstruction = read_colmap(scene.save(tmp_path / "s.colmap.zip").read_bytes(), tmp_path)
    assert [reconstruction.image(number).name for number in (1, 2)] == ["a/x.jpg", "b/x.jpg"]


def test_a_scene_without_points_leaves_nothing_half_written(engine, tmp_path, run_here):
    photos = [str(PHOTOS / name) for name in ("temple.jpg", "coffee.jpg")]
    done = run_here(
        "da3_runtime", "scene", *photos, "--out", str(tmp_path / "o"), "--outputs", "preview,glb",
        "--points-edge", "1e-7", ENGINE_DIR=str(engine.engine_dir), MODEL=NANO,
    )  # fmt: skip
    assert (done.code, list((tmp_path / "o").glob("*"))) == (2, [])
    assert done.stderr.startswith("error: No pixel remains as a point")


def test_a_glb_is_made_of_whole_words():
    """The specification wants the parts of the file, and every accessor, to start at multiples of four."""
    for name in ("a", "ab", "abc", "abcd"):
        data = glb(cloud_of(VIEWS["one photo"], ALL), VIEWS["one photo"], [name], "m", cameras=True)
        assert int.from_bytes(data[8:12], "little") == len(data)
        length = int.from_bytes(data[12:16], "little")
        assert length % 4 == 0
        document = json.loads(data[20 : 20 + length])
        assert all(view["byteOffset"] % 4 == 0 for view in document["bufferViews"])
        assert document["buffers"][0]["byteLength"] == int.from_bytes(data[20 + length :][:4], "little")


@pytest.fixture(scope="module")
def model(engine):
    with da3.load(NANO, engine_dir=engine.engine_dir) as model:
        yield model


def test_a_turned_photo_gives_points_of_the_upright_one(model, tmp_path):
    photo = Image.open(PHOTOS / "temple.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored rows go from the upright photo's right to its left
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    depth = model.depth(tmp_path / "turned.jpg")
    reconstruction = read_colmap(depth.save(tmp_path / "turned.colmap.zip").read_bytes(), tmp_path)
    camera, image = reconstruction.camera(1), reconstruction.image(1)
    assert (camera.width, camera.height, image.name) == (*photo.size, "turned.jpg")
    np.testing.assert_allclose(camera.focal_length_x, depth.camera.intrinsics[0, 0], rtol=1e-4)
    # Each point projects to the pixel that it came from, whose color it has.
    apart = []
    for point in list(image.points2D)[::500]:
        projected = image.project_point(reconstruction.point3D(point.point3D_id).xyz)
        np.testing.assert_allclose(projected, point.xy, atol=0.05)
        here = photo.getpixel(tuple(point.xy.astype(int)))
        apart.append(np.abs(reconstruction.point3D(point.point3D_id).color - np.array(here, int)).mean())
    assert np.median(apart) < 12


def test_a_scene_of_different_shapes_is_saved_whole(model, tmp_path):
    tall = tmp_path / "tall.png"
    Image.open(PHOTOS / "coffee.jpg").rotate(90, expand=True).save(tall)
    scene = model.scene([PHOTOS / "temple.jpg", tall])
    options = da3.PointOptions(confidence=0, edge=0, sky=True)
    for ending in (".glb", ".ply", ".colmap.zip", ".scene.npz"):
        scene.save(tmp_path / f"both{ending}", points=options)
    reconstruction = read_colmap((tmp_path / "both.colmap.zip").read_bytes(), tmp_path)
    assert [reconstruction.image(i).name for i in (1, 2)] == ["temple.jpg", "tall.png"]
    for number, view in enumerate(scene, 1):
        camera, image = reconstruction.camera(number), reconstruction.image(number)
        moved = view.camera.intrinsics[:2, 2] + view.crop
        np.testing.assert_allclose(
            [camera.principal_point_x, camera.principal_point_y], moved, rtol=1e-3
        )
        point = image.points2D[1234]
        projected = image.project_point(reconstruction.point3D(point.point3D_id).xyz)
        np.testing.assert_allclose(projected, point.xy, atol=0.05)
    with np.load(tmp_path / "both.scene.npz") as archive:
        assert len(archive["depth"]) == 2
        assert archive["depth"][0].size * 2 == reconstruction.num_points3D()
    with pytest.raises(SettingError, match=r"one of \.glb, \.ply, \.colmap\.zip, \.scene\.npz"):
        scene.save(tmp_path / "both.png")


def test_the_commands_write_the_files_of_points(engine, tmp_path, run_here):
    photos = [str(PHOTOS / name) for name in ("temple.jpg", "coffee.jpg")]
    folder = {"ENGINE_DIR": str(engine.engine_dir), "MODEL": NANO}
    outputs = "preview,glb,ply,colmap,scene_npz"
    out = tmp_path / "one"
    done = run_here(
        "da3_runtime", "depth", photos[0], "--out", str(out), "--outputs", f"{outputs},depth_tiff,depth_exr",
        "--points-max", "500", "--no-points-cameras", **folder,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    names = {
        "temple" + each
        for each in (".png", ".glb", ".ply", ".colmap.zip", ".scene.npz", ".depth.tiff", ".depth.exr")
    }
    assert {path.name for path in out.iterdir()} == names
    points, _, cameras = read_glb((out / "temple.glb").read_bytes())
    assert (len(points), cameras) == (500, {})
    assert json.loads(done.stdout)["glb"] == str(out / "temple.glb")

    out = tmp_path / "both"
    done = run_here("da3_runtime", "scene", *photos, "--out", str(out), "--outputs", outputs, **folder)
    assert done.code == 0, done.stderr
    files = {
        "temple.png",
        "coffee.png",
        "scene.json",
        "scene.glb",
        "scene.ply",
        "scene.colmap.zip",
        "scene.scene.npz",
    }
    assert {path.name for path in out.iterdir()} == files
    assert json.loads(done.stdout)["ply"] == str(out / "scene.ply")
    assert set(read_glb((out / "scene.glb").read_bytes())[2]) == {"temple.jpg", "coffee.jpg"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points-max", "0"], "points_max must be from 1 to 16777216, not 0."),
        (["--depth-unit", "mm"], "--depth-unit mm is for depth_png16: add it to --outputs."),
    ],
)
def test_a_wrong_option_of_points_is_one_sentence(options, message, tmp_path, run_here):
    photo = str(PHOTOS / "temple.jpg")
    done = run_here("da3_runtime", "depth", photo, "--out", str(tmp_path / "o"), *options)
    assert (done.code, done.stderr) == (2, f"error: {message}\n")
