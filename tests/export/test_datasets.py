"""Data sets with known depth: their layouts, what is read from them, and what is refused."""

import re
import sys

import cv2
import numpy as np
import pycolmap
import pytest

from da3_export.accuracy.datasets import DATA_SETS, find_samples, nyu_test_indices, read_sample
from da3_export.accuracy.samples import Source, read_depth
from da3_runtime.errors import SettingError
from tests.support.data_sets import (
    DRIVE,
    FISHEYE,
    PINHOLE,
    write_diode,
    write_eth3d,
    write_folder,
    write_kitti,
    write_nyu,
    write_nyu_mat,
    write_photo,
    write_steps,
    write_tum,
)


def read(name, path, **options):
    """Photos and known depths of a data set by name, and its samples by name."""
    row, samples = find_samples(name, Source(path, **options))
    return {s.name: read_sample(s, row) for s in samples}, {s.name: s for s in samples}


def counted(truth):
    """First and last row and column, end not included, of the pixels that count."""
    rows, columns = np.nonzero(truth)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_nyus_mat_gives_the_test_photos_upright(tmp_path):
    images, depths = write_nyu_mat(tmp_path)
    read_, samples = read("nyu", tmp_path)
    assert list(samples) == [f"{i:05}" for i in (0, 1, 8, 13, 14, 15, 16, 17)]
    photo, truth = read_["00008"]
    assert np.array_equal(photo.rgb, images[8].transpose(2, 1, 0))
    inside = truth > 0
    assert np.array_equal(truth[inside], depths[8].T[inside].astype(float))
    assert 500 < photo.focal_px < 530
    raw, _ = read("nyu-raw", tmp_path / "nyu_depth_v2_labeled.mat")
    assert raw["00008"][1].max() > truth.max()


def test_the_test_split_of_nyu_has_654_photos():
    indices = nyu_test_indices(1449)
    assert len(set(indices)) == 654
    assert (indices[0], indices[-1]) == (0, 1448)


def test_nyu_counts_the_eigen_crop_below_ten_meters(tmp_path):
    depth = np.full((480, 640), 2.345)
    depth[100, 100:200] = (0, 10.5) * 50
    write_nyu(tmp_path, depth)
    ((photo, truth),) = read("nyu", tmp_path)[0].values()
    assert counted(truth) == (45, 471, 41, 601)
    assert (truth[45:471, 41:601] == 0).sum() == 100
    assert truth.max() == pytest.approx(2.345)
    assert photo.rgb.shape == (480, 640, 3)


def test_nyu_without_h5py_names_the_extra(tmp_path, monkeypatch):
    write_nyu_mat(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("da3_export.accuracy.datasets.is_installed", lambda name: False)
    with pytest.raises(
        SettingError, match=r'h5py is not installed: pip install "da3-export\[datasets\]"'
    ):
        find_samples("nyu", Source(tmp_path))


@pytest.mark.parametrize("content", [b"nothing", b"MATLAB 5.0 MAT-file" + bytes(200)])
def test_another_mat_file_is_refused(tmp_path, content):
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(content)
    with pytest.raises(SettingError, match=r"labeled\.mat has no readable array 'images'"):
        find_samples("nyu", Source(tmp_path))


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("kitti", (153, 371, 44, 1197)),
        ("kitti-garg", (153, 371, 44, 1197)),
        ("kitti-eigen", (124, 342, 44, 1197)),
    ],
)
def test_kitti_counts_its_crop_below_80_meters(tmp_path, name, window):
    depth = np.full((375, 1242), 12.5)
    depth[200, 300], depth[200, 301] = 0, 85
    write_kitti(tmp_path, depth)
    ((photo, truth),) = read(name, tmp_path)[0].values()
    assert counted(truth) == window
    assert truth[200, 300] == truth[200, 301] == 0
    assert truth[200, 302] == 12.5
    assert photo.focal_px == 721.5377


LISTS = {
    "paths": f"2011_09_26/{DRIVE}/image_02/data/0000000069.png "
    f"{DRIVE}/proj_depth/groundtruth/image_02/0000000069.png 721.5377\n"
    f"2011_09_26/{DRIVE}/image_02/data/0000000070.png None 721.5377\n",
    "names": f"2011_09_26/{DRIVE} 0000000069 l\n2011_09_26/{DRIVE} 0000000070 l\n",
}


@pytest.mark.parametrize("lines", LISTS.values(), ids=LISTS)
def test_kittis_list_chooses_the_photos_that_have_depth(tmp_path, lines):
    write_kitti(tmp_path, np.full((24, 32), 5.0), frames=(69, 71))
    write_photo(tmp_path / "2011_09_26" / DRIVE / "image_02" / "data" / "0000000070.png")
    assert len(find_samples("kitti", Source(tmp_path))[1]) == 2
    split = tmp_path / "list.txt"
    split.write_text(lines)
    _, (sample,) = find_samples("kitti", Source(tmp_path, split=split))
    assert sample.name.endswith("0000000069.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"2011_09_26/{DRIVE} 0000000099 l", rf"missing: {DRIVE}/image_02/data/0000000099\.png"),
        (LISTS["paths"].splitlines()[0].replace("69", "71"), r"lists depth that is missing: .*71\.png"),
        ("nothing", r"list\.txt, line 2: give a drive such as"),
    ],
)
def test_a_wrong_line_of_kittis_list_is_named(tmp_path, line, message):
    write_kitti(tmp_path, np.full((24, 32), 5.0))
    write_photo(tmp_path / "2011_09_26" / DRIVE / "image_02" / "data" / "0000000071.png")
    split = tmp_path / "list.txt"
    split.write_text(LISTS["names"].splitlines()[0] + f"\n{line}\n")
    with pytest.raises(SettingError, match=message):
        find_samples("kitti", Source(tmp_path, split=split))


def test_linked_folders_are_searched_once(tmp_path):
    data = write_kitti(tmp_path / "data", np.full((24, 32), 5.0))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "raw").symlink_to(data / "2011_09_26")
    (linked / "depth").symlink_to(data / "val")
    (linked / "again").symlink_to(linked)
    assert len(find_samples("kitti", Source(linked))[1]) == 1


POSES = (
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.5, 0.5, -0.5, 0.5, 1.0, 2.0, 3.0),
    (0.9238795325112867, 0.0, 0.3826834323650898, 0.0, -1.0, 0.5, 0.25),
)


def test_eth3d_gives_raw_depth_and_the_cameras_of_colmaps_files(tmp_path):
    depth = write_eth3d(tmp_path, POSES)
    read_, samples = read("eth3d", tmp_path)
    assert len(samples) == 3
    name = "office/images/dslr_images/DSC_0001.JPG"
    _, truth = read_[name]
    assert np.array_equal(truth, np.where(np.isinf(depth), 0, depth))
    assert (samples[name].scene, samples[name].focal_px) == ("office", 30.5)
    for sample, (w, x, y, z, *position) in zip(samples.values(), POSES, strict=True):
        rotation = pycolmap.Rotation3d(np.array([x, y, z, w])).matrix()
        assert sample.extrinsics == pytest.approx(np.column_stack((rotation, position)))


def test_eth3ds_smaller_photos_are_compared_at_the_depths_size(tmp_path):
    write_eth3d(tmp_path, POSES[:1], size=(12, 16))
    ((photo, truth),) = read("eth3d", tmp_path)[0].values()
    assert photo.rgb.shape == (12, 16, 3)
    assert truth.shape == (24, 32)
    assert photo.focal_px == 30.5 / 2
    write_eth3d(tmp_path, POSES[:1], size=(12, 24))
    with pytest.raises(SettingError, match=r"DSC_0000\.JPG is 32 x 24 pixels, DSC_0000\.JPG"):
        read("eth3d", tmp_path)


def test_eth3ds_depth_moves_to_where_undistorted_photos_show_it(tmp_path):
    depth = write_eth3d(tmp_path, POSES[:1], kind="dslr_images_undistorted", size=(26, 36))
    ((_, truth),) = read("eth3d", tmp_path)[0].values()
    assert truth.shape == (26, 36)
    fisheye = pycolmap.Camera(model="THIN_PRISM_FISHEYE", width=32, height=24, params=FISHEYE)
    pinhole = pycolmap.Camera(model="PINHOLE", width=36, height=26, params=PINHOLE)
    seen = 0
    for row in range(26):
        for column in range(36):
            ray = pinhole.cam_from_img(np.array([[column + 0.5, row + 0.5]]))[0]
            x, y = fisheye.img_from_cam(np.array([[*ray, 1.0]]))[0]
            inside = 0 <= x < 32 and 0 <= y < 24
            wanted = depth[int(y), int(x)] if inside else 0
            assert truth[row, column] == (wanted if np.isfinite(wanted) else 0)
            seen += inside
    assert seen > 300


def test_eth3d_names_what_is_missing(tmp_path):
    write_eth3d(tmp_path, POSES[:2], kind="dslr_images_undistorted", size=(26, 36))
    scene = tmp_path / "office"
    (scene / "dslr_calibration_jpg" / "images.txt").unlink()
    with pytest.raises(SettingError, match="office: depth belongs to the distorted photos"):
        find_samples("eth3d", Source(tmp_path))
    (scene / "ground_truth_depth" / "dslr_images" / "DSC_0001.JPG").unlink()
    with pytest.raises(SettingError, match=r"dslr_images/DSC_0001\.JPG is missing"):
        write_eth3d(tmp_path, POSES[:1])
        write_photo(scene / "images" / "dslr_images" / "DSC_0001.JPG")
        find_samples("eth3d", Source(tmp_path))


@pytest.mark.parametrize("file", ["cameras.txt", "images.txt"])
def test_a_damaged_file_of_colmap_is_named(tmp_path, file):
    write_eth3d(tmp_path, POSES[:1])
    (tmp_path / "office" / "dslr_calibration_jpg" / file).write_text("0 PINHOLE x\n")
    with pytest.raises(SettingError, match=rf"dslr_calibration_jpg/{file} is not a text file of COLMAP"):
        find_samples("eth3d", Source(tmp_path))


def test_eth3ds_depth_of_another_length_is_refused(tmp_path):
    write_eth3d(tmp_path, POSES[:1])
    for file in (tmp_path / "office").rglob("*.txt"):
        file.unlink()
    depth = tmp_path / "office" / "ground_truth_depth" / "dslr_images" / "DSC_0000.JPG"
    depth.write_bytes(depth.read_bytes()[:-4])
    with pytest.raises(SettingError, match=r"DSC_0000\.JPG holds 767 FP32 numbers.*32 x 24 pixels"):
        read("eth3d", tmp_path)


def test_diode_counts_what_its_mask_allows(tmp_path):
    depth, mask = write_diode(tmp_path)
    write_diode(tmp_path, "outdoor")
    read_, _ = read("diode", tmp_path)
    assert len(read_) == 2
    for photo, truth in read_.values():
        assert np.array_equal(truth, np.where(mask > 0, depth[..., 0], 0).astype(float))
        assert photo.focal_px == pytest.approx((886.81 + 927.06) / 2)
    next(tmp_path.rglob("*_mask.npy")).unlink()
    with pytest.raises(SettingError, match=r"scan_00183/\w+_depth_mask\.npy is missing"):
        find_samples("diode", Source(tmp_path))


def test_tum_pairs_what_belongs_together_in_time(tmp_path):
    image, depth = np.full((24, 32, 3), 90, np.uint8), np.full((24, 32), 1.2345)
    w, x, y, z, *_ = POSES[1]
    pose = (1.0, 2.0, 3.0, x, y, z, w)
    views = [(100.0, image, depth, pose), (100.1, image, None, pose), (100.2, image, 2 * depth, pose)]
    write_tum(tmp_path, views)
    read_, samples = read("tum", tmp_path)
    assert [name.rsplit("/", 1)[-1] for name in samples] == ["100.000000.png", "100.200000.png"]
    first, second = (truth for _, truth in read_.values())
    assert first.max() == pytest.approx(1.2345, abs=1e-4)
    assert second.max() == pytest.approx(2.469, abs=1e-4)
    sample = next(iter(samples.values()))
    assert (sample.scene, sample.focal_px) == ("rgbd_dataset_freiburg1_xyz", pytest.approx(516.9))
    camera = pycolmap.Rigid3d(pycolmap.Rotation3d(np.array([x, y, z, w])), np.array([1.0, 2.0, 3.0]))
    assert sample.extrinsics == pytest.approx(camera.inverse().matrix())


def test_tum_without_a_track_has_no_cameras_and_bad_lines_are_named(tmp_path):
    image, depth = np.full((24, 32, 3), 90, np.uint8), np.ones((24, 32))
    sequence = write_tum(tmp_path, [(1.0, image, depth, POSES[0])], name="mine")
    (sequence / "groundtruth.txt").unlink()
    _, (sample,) = find_samples("tum", Source(tmp_path))
    assert (sample.scene, sample.extrinsics, sample.focal_px) == (None, None, 525)
    (sequence / "groundtruth.txt").write_text("1.0 1 2 3\n")
    with pytest.raises(SettingError, match="must be: time tx ty tz qx qy qz qw"):
        find_samples("tum", Source(tmp_path))
    (sequence / "depth.txt").write_text("soon depth/1.png\n")
    with pytest.raises(SettingError, match=r"depth\.txt: each line must begin with a time"):
        find_samples("tum", Source(tmp_path))
    (sequence / "depth.txt").unlink()
    with pytest.raises(SettingError, match=r"mine/depth\.txt is missing in"):
        find_samples("tum", Source(tmp_path))


def write_pfm(path, depth):
    height, width = depth.shape
    path.write_bytes(f"Pf\n{width} {height}\n-1.0\n".encode() + depth[::-1].astype("<f4").tobytes())


def test_depth_is_read_from_each_kind_of_file(tmp_path):
    depth = np.array([[1.5, 2], [0, 4]])
    np.savez(tmp_path / "a.npz", depth=depth)
    np.save(tmp_path / "a.npy", depth.astype(np.float32))
    write_steps(tmp_path / "a.png", depth, 1000)
    write_pfm(tmp_path / "a.pfm", depth)
    cv2.imwrite(str(tmp_path / "a.tiff"), depth.astype(np.float32))
    cv2.imwrite(str(tmp_path / "a.tif"), (depth * 1000).astype(np.uint16))
    for ending in ("npz", "npy", "png", "pfm", "tiff", "tif"):
        assert read_depth(tmp_path / f"a.{ending}", 0.001) == pytest.approx(depth), ending
    with pytest.raises(SettingError, match=r"a\.tif: integers need --depth-scale"):
        read_depth(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"nothing", r"a\.npy is not a depth file"),
        ("a.depth.npz", b"nothing", r"a\.depth\.npz is not a depth file"),
        ("a.depth.png", b"nothing", r"a\.depth\.png is not a depth file"),
        ("a.npy", np.ones((2, 2, 3)), r"a\.npy holds 2 x 2 x 3 float64: depth is a map"),
        ("a.npy", np.array([["x"]]), r"a\.npy holds 1 x 1 <U1: depth is a map"),
    ],
)
def test_a_file_that_holds_no_depth_is_named(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(SettingError, match=message):
        read_depth(tmp_path / name)


def test_an_8_bit_png_and_an_npz_without_depth_are_no_depth(tmp_path):
    cv2.imwrite(str(tmp_path / "a.depth.png"), np.ones((2, 2), np.uint8))
    np.savez(tmp_path / "a.depth.npz", other=np.ones((2, 2)))
    for name in ("a.depth.png", "a.depth.npz"):
        with pytest.raises(SettingError, match="is not a depth file"):
            read_depth(tmp_path / name, 1.0)


def test_a_folders_photos_and_depth_are_paired_by_name(tmp_path):
    write_folder(tmp_path, 1)
    for name, ending in (("b.jpg", "depth.png"), ("c.tif", "depth.tiff"), ("d.png", "depth.tif")):
        write_photo(tmp_path / name)
        cv2.imwrite(str(tmp_path / f"{name[0]}.{ending}"), np.ones((24, 32), np.uint16))
    (tmp_path / "._b.jpg").write_bytes(b"a sidecar")
    _, samples = find_samples("folder", Source(tmp_path, 0.001))
    assert [(s.name, s.depth_name) for s in samples] == [
        ("0.png", "0.npy"),
        ("b.jpg", "b.depth.png"),
        ("c.tif", "c.depth.tiff"),
        ("d.png", "d.depth.tif"),
    ]


def test_bad_requests_are_refused_with_one_sentence(tmp_path):
    def refused(message, name="folder", path=tmp_path, **options):
        with pytest.raises(SettingError, match=message):
            find_samples(name, Source(path, **options))

    refused(re.escape(", ".join(DATA_SETS)), "nyuv2")
    refused(
        "missing does not exist: give the folder of the data set kitti", "kitti", tmp_path / "missing"
    )
    for name in DATA_SETS:
        refused(f"is not a folder with photos in it.*set {name} needs", name)
    write_folder(tmp_path, 1)
    refused("--depth-scale must be above 0", depth_scale=0.0)
    refused("--depth-scale must be above 0", depth_scale=float("nan"))
    refused("kitti has a scale of its own", "kitti", depth_scale=0.001)
    refused("--split is KITTI's", split=tmp_path / "list.txt")
    refused(r"list\.txt is not a text file", "kitti", split=tmp_path / "list.txt")
    write_photo(tmp_path / "b.png")
    refused(r"1 of 2 photos have no depth file, b\.png first; put b\.depth\.npz")
    cv2.imwrite(str(tmp_path / "b.depth.png"), np.ones((24, 32), np.uint16))
    refused(r"b\.depth\.png: a PNG of depth needs --depth-scale")


def test_bad_files_are_refused_with_one_sentence(tmp_path):
    write_folder(tmp_path, 1)
    np.save(tmp_path / "0.npy", np.ones((32, 24)))
    with pytest.raises(SettingError, match=r"0\.npy is 24 x 32 pixels, 0\.png \(upright\) is 32 x 24"):
        read("folder", tmp_path)
    np.save(tmp_path / "0.npy", np.array([[0, np.nan, np.inf, -1] * 8] * 24))
    with pytest.raises(SettingError, match=r"0\.npy has no valid pixel"):
        read("folder", tmp_path)
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(SettingError, match=r"0\.png: "):
        read("folder", tmp_path)
    write_kitti(tmp_path / "kitti", np.full((24, 32), 90.0))
    with pytest.raises(SettingError, match=r"069\.png has no valid pixel: .* below 80 m"):
        read("kitti", tmp_path / "kitti")
