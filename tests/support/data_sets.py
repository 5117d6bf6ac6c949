"""Small data sets in the layouts of the public ones."""

import cv2
import numpy as np


def write_photo(path, height=24, width=32, seed=0):
    """An image of noise, which it returns."""
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1])
    return rgb


def write_steps(path, depth, steps):
    """A 16-bit PNG with so many steps in a meter; the depth that it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(np.asarray(depth) * steps).astype(np.uint16)
    assert cv2.imwrite(str(path), whole)
    return whole / steps


def write_folder(folder, count=3, height=24, width=32):
    """A plain folder of photos 0.png with 0.npy."""
    for index in range(count):
        write_photo(folder / f"{index}.png", height, width, seed=index)
        np.save(folder / f"{index}.npy", np.full((height, width), index + 1.0))
    return folder


def write_nyu_mat(folder, count=20):
    """The labeled data set with ``count`` photos; images [N, 3, W, H] and depths [N, W, H]."""
    import h5py

    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (count, 3, 32, 24), np.uint8)
    depths = rng.uniform(1, 9, (count, 32, 24)).astype(np.float32)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"], file["rawDepths"] = images, depths, depths + 1
    return images, depths


def write_nyu(folder, depth):
    """One unpacked test photo, as large as its depth."""
    write_photo(folder / "bathroom" / "rgb_00045.jpg", *np.shape(depth))
    return write_steps(folder / "bathroom" / "sync_depth_00045.png", depth, 1000)


DRIVE = "2011_09_26_drive_0002_sync"


def write_kitti(folder, depth, frames=(69,), drive=DRIVE):
    """Photos of one drive in the raw data's layout, and annotated depth."""
    for frame in frames:
        raw = folder / drive[:10] / drive / "image_02" / "data"
        write_photo(raw / f"{frame:010}.png", *np.shape(depth), seed=frame)
        truth = folder / "val" / drive / "proj_depth" / "groundtruth" / "image_02"
        write_steps(truth / f"{frame:010}.png", depth, 256)
    return folder


FISHEYE = (30.0, 31.0, 16.2, 11.8, 0.05, -0.02, 0.003, -0.002, 0.01, 0.004, 0.002, -0.001)
PINHOLE = (28.0, 29.0, 18.0, 13.0)


def write_eth3d(folder, poses, *, kind="dslr_images", size=(24, 32)):
    """A scene with photos of one kind, and depth of the distorted ones, 24 x 32.

    Parameters
    ----------
    poses : Sequence[tuple[float, ...]]
        qw, qx, qy, qz, tx, ty, tz of each photo.
    """
    scene = folder / "office"
    depth = np.random.default_rng(5).uniform(1, 9, (24, 32)).astype("<f4")
    depth[0, :5] = np.inf
    for index in range(len(poses)):
        write_photo(scene / "images" / kind / f"DSC_{index:04}.JPG", *size, seed=index)
        target = scene / "ground_truth_depth" / "dslr_images" / f"DSC_{index:04}.JPG"
        target.parent.mkdir(parents=True, exist_ok=True)
        depth.tofile(target)
    for calibration, name, camera in (
        ("dslr_calibration_jpg", "dslr_images", ("THIN_PRISM_FISHEYE", 32, 24, *FISHEYE)),
        ("dslr_calibration_undistorted", "dslr_images_undistorted", ("PINHOLE", 36, 26, *PINHOLE)),
    ):
        (scene / calibration).mkdir(parents=True, exist_ok=True)
        line = " ".join(map(str, camera))
        (scene / calibration / "cameras.txt").write_text(f"# Camera list\n0 {line}\n")
        lines = [
            f"{index} {' '.join(map(str, pose))} 0 {name}/DSC_{index:04}.JPG\n"
            + ("1.5 2.5 -1\n" if index % 2 else "\n")
            for index, pose in enumerate(poses)
        ]
        (scene / calibration / "images.txt").write_text("# Image list\n#\n" + "".join(lines))
    return depth


def write_diode(folder, part="indoors"):
    """One photo with depth [H, W, 1] and its mask."""
    place = folder / part / "scene_00019" / "scan_00183"
    write_photo(place / "00019_00183_indoors_330_000.png")
    depth = np.random.default_rng(6).uniform(1, 9, (24, 32, 1)).astype(np.float32)
    mask = (np.random.default_rng(7).random((24, 32)) < 0.5).astype(np.float32)
    np.save(place / "00019_00183_indoors_330_000_depth.npy", depth)
    np.save(place / "00019_00183_indoors_330_000_depth_mask.npy", mask)
    return depth, mask


def write_tum(folder, views, name="rgbd_dataset_freiburg1_xyz"):
    """A sequence; each view is a time, an image [H, W, 3], depth [H, W] and tx ty tz qx qy qz qw."""
    sequence = folder / name
    rgb, depth, track = ["# color images"], ["# depth maps"], ["# ground truth trajectory"]
    for time, image, truth, pose in views:
        (sequence / "rgb").mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(sequence / "rgb" / f"{time:.6f}.png"), image[..., ::-1])
        rgb.append(f"{time:.6f} rgb/{time:.6f}.png")
        if truth is not None:
            later = time + 0.011
            write_steps(sequence / "depth" / f"{later:.6f}.png", truth, 5000)
            depth.append(f"{later:.6f} depth/{later:.6f}.png")
        track.append(f"{time - 0.004:.4f} {' '.join(map(str, pose))}")
    for file, lines in (("rgb.txt", rgb), ("depth.txt", depth), ("groundtruth.txt", track)):
        (sequence / file).write_text("\n".join(lines) + "\n")
    return sequence
