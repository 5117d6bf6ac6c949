"""Which files of a folder are images, and what the results of each are called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from da3_runtime.commands.depth_tasks import find_tasks
from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.decode import FORMATS, decode_photo
from da3_runtime.image.folder import find_photos, photo_endings
from da3_runtime.output.files import ENDINGS


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths[0]


def names(tasks, out):
    """Source's name -> target below ``out``."""
    return {task.source.name: str(task.target.relative_to(out)) for task in tasks}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    touch(folder / "a.jpg", folder / "b" / "c.PNG")
    return folder


@pytest.fixture
def refused(tmp_path):
    def message(images, out=None, error=SettingError):
        with pytest.raises(error) as caught:
            find_tasks(images, out or tmp_path / "out")
        return str(caught.value)

    return message


def test_every_ending_of_a_format_that_is_read_is_a_photo(tmp_path):
    endings = (".jpg", ".JPEG", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ico",
               ".avif", ".heic", ".HEIF", ".mpo")  # fmt: skip
    touch(*(tmp_path / f"photo{ending}" for ending in endings), tmp_path / "raw.cr2", tmp_path / "x.svg")
    found = find_photos(tmp_path)
    assert {Path(name).suffix for name in found.names} == set(endings)
    assert found.skipped == {".cr2": 1, ".svg": 1}
    assert {Image.EXTENSION[each] for each in photo_endings() & set(Image.EXTENSION)} <= {
        *FORMATS,
        "MPO",
    }


def test_a_multi_picture_file_is_read(tmp_path):
    Image.new("RGB", (8, 6)).save(
        tmp_path / "a.mpo", save_all=True, append_images=[Image.new("L", (8, 6))]
    )
    data = (tmp_path / "a.mpo").read_bytes()
    assert decode_photo(data, max_bytes=10**6, max_pixels=100).rgb.shape == (6, 8, 3)


def test_sidecars_folders_and_hidden_files_are_no_photos(photos):
    touch(photos / "._a.jpg", photos / "__MACOSX" / "a.jpg", photos / "x.png" / "d.jpg")
    touch(photos / ".hidden.jpg", photos / ".thumbnails" / "a.jpg", photos / "README", photos / "a.x\n")
    os.mkfifo(photos / "pipe.jpg")
    found = find_photos(photos)
    assert found.names == ["a.jpg", "b/c.PNG", "x.png/d.jpg"]
    assert found.skipped == {"hidden": 2, "without an ending": 1, "other": 1, "not a file": 1}


def test_linked_folders_are_searched_once_and_cycles_end(photos, tmp_path):
    touch(tmp_path / "elsewhere" / "e.jpg")
    (photos / "aa").symlink_to(photos / "b")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "b" / "up").symlink_to(photos)
    (tmp_path / "elsewhere" / "back").symlink_to(photos / "b")
    (photos / "loop").symlink_to(photos / "loop")
    assert find_photos(photos).names == ["a.jpg", "b/c.PNG", "linked/e.jpg"]


@pytest.mark.parametrize("target", ["gone.jpg", "link.jpg"])
def test_a_link_to_a_missing_photo_is_a_photo_that_fails(photos, target):
    (photos / "link.jpg").symlink_to(photos / target)
    assert "link.jpg" in find_photos(photos).names


def test_a_folder_that_cannot_be_read_is_an_error(photos, monkeypatch, refused):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert refused([photos], error=ImageError) == f"{photos}: Permission denied."


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg", "a.png", "b"]),
        (["a.jpg", "a.color.jpg"], ["a.jpg", "a.color.jpg"]),
        (["a.jpg", "a.depth.webp", "a.sky.png"], ["a.jpg", "a.depth.webp", "a.sky.png"]),
        (["a.jpg", "a.png", "a.jpg.webp"], ["a.jpg", "a.png", "a.jpg.webp"]),
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),
        (["a.b.jpg", "a.jpg"], ["a.b", "a"]),
    ],
)
def test_the_ending_stays_where_two_images_would_share_a_file(tmp_path, files, expected):
    folder, out = tmp_path / "photos", tmp_path / "out"
    touch(*(folder / file for file in files))
    tasks = find_tasks([folder], out).tasks
    found = {str(task.source.relative_to(folder)): str(task.target.relative_to(out)) for task in tasks}
    assert found == dict(zip(files, expected, strict=True))
    written = [f"{target}{ending}" for target in found.values() for ending in ENDINGS.values()]
    assert len(set(written)) == len(written)


def test_names_do_not_depend_on_the_wanted_outputs(tmp_path):
    touch(tmp_path / "in" / "a.jpg", tmp_path / "in" / "a.color.jpg")
    out = tmp_path / "out"
    one, other = (
        find_tasks([tmp_path / "in"], out, [ending]) for ending in (".depth.npz", ".color.png")
    )
    assert one == other


@pytest.mark.parametrize(
    ("images", "file"),
    [(("x/a.jpg", "y/a.jpg"), "a.jpg.png"), (("x/a", "y/a"), "a.png")],
)
def test_two_images_that_would_write_one_file_are_refused_by_name(tmp_path, refused, images, file):
    first, second = (touch(tmp_path / image) for image in images)
    message = refused([first, second])
    assert f"would both write {tmp_path / 'out' / file}; " in message
    assert str(first) in message
    assert str(second) in message


def test_images_whose_names_differ_in_case_only_are_told_apart_where_the_disk_does(
    tmp_path, monkeypatch
):
    touch(tmp_path / "in" / "a.jpg", tmp_path / "in" / "A.png")
    for platform, expected in (("linux", ["A", "a"]), ("darwin", ["A.png", "a.jpg"])):
        monkeypatch.setattr(sys, "platform", platform)
        tasks = find_tasks([tmp_path / "in"], tmp_path / "out").tasks
        assert sorted(names(tasks, tmp_path / "out").values()) == expected


def test_an_image_that_is_given_twice_runs_once(photos, monkeypatch):
    monkeypatch.chdir(photos)
    tasks = find_tasks([photos / "a.jpg", Path("a.jpg")], photos / "depth").tasks
    assert len(tasks) == 1


def out_by_name(photos):
    return photos / "depth"


def out_by_link(photos):
    (photos.parent / "link").symlink_to(photos)
    return photos.parent / "link" / "depth"


def out_by_dots(photos):
    return photos / "b" / ".." / "depth"


def out_from_the_folder_itself(_):
    return Path("depth")


def out_behind_a_linked_folder(photos):
    (photos.parent / "results").mkdir()
    (photos / "results").symlink_to(photos.parent / "results")
    return photos.parent / "results" / "new"


@pytest.mark.parametrize(
    ("images", "spell"),
    [
        ("photos", out_by_name),
        ("photos", out_by_link),
        ("photos", out_by_dots),
        ("photos", out_behind_a_linked_folder),
        (".", out_by_name),
        (".", out_from_the_folder_itself),
    ],
)
def test_a_second_run_has_the_results_of_the_first(photos, monkeypatch, images, spell):
    monkeypatch.chdir(photos if images == "." else photos.parent)
    out = spell(photos)
    found = []
    for _ in range(3):
        tasks = find_tasks([Path(images)], out).tasks
        found.append(names(tasks, out))
        touch(*(task.target.with_name(task.target.name + ".png") for task in tasks))
    (photos / "a link.png").symlink_to(out / "a.png")
    found.append(names(find_tasks([Path(images)], out).tasks, out))
    assert found == [{"a.jpg": "a", "c.PNG": "b/c"}] * 4


def test_a_preview_beside_its_photo_is_no_photo_of_the_next_run(tmp_path):
    touch(tmp_path / "a.jpg", tmp_path / "depth.png", tmp_path / "depth.depth.png")
    (task,) = find_tasks([tmp_path], tmp_path / "depth.png").tasks
    assert (task.source.name, task.target.name) == ("a.jpg", "depth")


@pytest.mark.parametrize("out", ["photos", "photos/b/..", "link"])
def test_results_among_the_photos_that_are_searched_are_refused(photos, tmp_path, refused, out):
    (tmp_path / "link").symlink_to(photos)
    assert "is searched for photos" in refused([photos], tmp_path / out)
    touch(photos / "photos" / "d.jpg")
    assert "is searched for photos" in refused([photos], tmp_path)


def test_results_may_go_into_a_folder_above(photos, tmp_path):
    assert names(find_tasks([photos], tmp_path).tasks, tmp_path) == {"a.jpg": "a", "c.PNG": "b/c"}


def test_a_folder_without_photos_is_an_error_that_counts_its_files(tmp_path, refused):
    touch(tmp_path / "in" / "a.txt", tmp_path / "in" / "b.txt", tmp_path / "in" / "c.mov")
    message = refused([tmp_path / "in"], error=ImageError)
    assert "contains no image, only 2 .txt, 1 .mov; the known endings are: " in message


def test_a_path_that_the_system_refuses_is_one_sentence(tmp_path, refused):
    assert "no such file" in refused([tmp_path / "a.jpg"], error=ImageError)
    assert "File name too long" in refused([tmp_path / f"{'x' * 300}.jpg"], error=ImageError)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refused([tmp_path / "loop"], error=ImageError)


def test_a_named_pipe_can_be_an_image():
    code = (
        "from pathlib import Path; from da3_runtime.commands.depth_tasks import find_tasks\n"
        "print(find_tasks([Path('/dev/stdin')], Path('out')).tasks[0].target)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="", capture_output=True, text=True, check=True
    )
    assert done.stdout == "out/stdin\n"
