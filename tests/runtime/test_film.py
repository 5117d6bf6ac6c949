"""A film file becomes upright frames with their times, whatever its format; what is no film is refused."""

from fractions import Fraction

import numpy as np
import pytest

from da3_runtime.errors import ImageError, ImageFormatError, ImageTooLargeError
from da3_runtime.image.film import Film, FilmLimits, Pick
from tests.support.films import ramps, write_film, write_sound

CODECS = [
    ("h264.mp4", "libx264", "yuv420p"),
    ("hevc.mp4", "libx265", "yuv420p"),
    ("vp9.webm", "libvpx-vp9", "yuv420p"),
    ("mpeg4.avi", "mpeg4", "yuv420p"),
    ("mjpeg.mov", "mjpeg", "yuvj420p"),
    ("ten-bits.mkv", "libx265", "yuv420p10le"),
]
LIMIT = 10**8


def read(path, pick=Pick(), start=0, limit=LIMIT):  # noqa: B008
    """Frames, times in seconds, and warnings."""
    with Film(path, FilmLimits(limit)) as film:
        frames = list(film.frames(pick, start))
        assert [frame.number for frame in frames] == list(range(start, start + len(frames)))
        seconds = [float(frame.time * film.time_base) for frame in frames]
        return [frame.rgb for frame in frames], seconds, film.warnings


@pytest.mark.parametrize(("name", "codec", "pixels"), CODECS)
def test_films_of_many_codecs_are_read(tmp_path, name, codec, pixels):
    frames = ramps(12)
    found, seconds, warnings = read(write_film(tmp_path / name, frames, codec, pixels))
    assert len(found) == 12
    assert warnings == []
    np.testing.assert_allclose(seconds, np.arange(12) / 30, atol=1e-3)
    for frame, true in zip(found, frames, strict=True):
        assert np.abs(frame.astype(int) - true).mean() < 12


def test_a_lossless_film_gives_its_frames_with_any_size(tmp_path):
    frames = ramps(3, height=37, width=51)
    found, _, _ = read(write_film(tmp_path / "a.mkv", frames))
    np.testing.assert_array_equal(found, frames)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_a_rotated_film_is_upright(tmp_path, rotation):
    path = write_film(tmp_path / "a.mp4", ramps(2), "libx264rgb", "rgb24", rotation=rotation)
    found, _, _ = read(path)
    np.testing.assert_allclose(found[0].astype(int), np.rot90(ramps(1)[0], rotation // 90), atol=8)


def test_a_mirrored_film_is_mirrored(tmp_path):
    path = write_film(tmp_path / "a.mp4", ramps(2), "libx264rgb", "rgb24", rotation=0)
    data = path.read_bytes()
    start = data.index(b"tkhd") + 4 + 40  # the matrix of the track's header (ISO 14496-12, 8.3.2)
    one = (1 << 16).to_bytes(4, "big")
    assert data[start : start + 4] == one
    path.write_bytes(data[:start] + (-(1 << 16)).to_bytes(4, "big", signed=True) + data[start + 4 :])
    found, _, _ = read(path)
    np.testing.assert_allclose(found[0].astype(int), ramps(1)[0][:, ::-1], atol=8)


def test_pixels_that_are_not_square_become_square(tmp_path):
    path = write_film(tmp_path / "a.mp4", ramps(2), "libx264", "yuv420p", aspect=Fraction(3, 2))
    assert read(path)[0][0].shape == (56, 126, 3)


TIMES = [0, 10, 90, 100, 130, 400, 401, 900]


def test_variable_frame_rates_keep_their_times(tmp_path):
    path = write_film(tmp_path / "a.mp4", ramps(8), "libx264", "yuv420p", times=TIMES)
    np.testing.assert_allclose(read(path)[1], np.array(TIMES) / 600, atol=1e-6)


def test_frames_are_picked_by_number_or_by_rate(tmp_path):
    path = write_film(tmp_path / "a.mkv", ramps(30))
    assert len(read(path, Pick(every=4))[0]) == 8
    seconds = read(path, Pick(fps=10))[1]
    np.testing.assert_allclose(seconds, np.arange(10) / 10, atol=2e-3)
    # Matroska rounds times, and no frame may be lost or repeated for it.
    for rate, count in ((30, 30), (29.97, 29), (1000, 30)):
        assert len(read(path, Pick(fps=rate))[0]) == count
    varying = write_film(tmp_path / "b.mp4", ramps(8), "libx264", "yuv420p", times=TIMES)
    np.testing.assert_allclose(np.array(read(varying, Pick(fps=5))[1]) * 600, [0, 130, 400, 900])


def test_a_run_that_goes_on_gets_the_same_frames(tmp_path):
    path = write_film(tmp_path / "a.mkv", ramps(20))
    whole = read(path, Pick(every=2))
    rest = read(path, Pick(every=2), start=6)
    np.testing.assert_array_equal(rest[0], whole[0][6:])
    assert rest[1] == whole[1][6:]


def test_frames_that_are_left_out_are_reported_and_bounded(tmp_path):
    path, skipped = write_film(tmp_path / "a.mkv", ramps(30)), []
    with Film(path, FilmLimits(LIMIT)) as film:
        frames = list(film.frames(Pick(every=10), 1, lambda: skipped.append(None)))
    assert (len(frames), len(skipped)) == (2, 28)
    with Film(path, FilmLimits(LIMIT, 1, frames_per_second=30)) as film:
        assert len(list(film.frames(Pick(every=1000)))) == 1
    with (
        Film(path, FilmLimits(LIMIT, 1, frames_per_second=29)) as film,
        pytest.raises(ImageTooLargeError, match=r"more than 29 frames \(29 for each of MAX_VIDEO_SEC"),
    ):
        list(film.frames(Pick(every=1000)))


def test_a_film_that_is_cut_short_gives_its_frames_and_a_warning(tmp_path):
    path = write_film(tmp_path / "a.mp4", ramps(60), "libx264", "yuv420p", movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found, seconds, warnings = read(path)
    assert 5 < len(found) < 60
    assert len(warnings) == 1
    assert f"ends at {seconds[-1] + 1 / 30:.1f} s" in warnings[0]


def test_a_damaged_film_gives_the_frames_before_and_a_warning(tmp_path):
    frames = [np.random.default_rng(i).integers(0, 256, (56, 84, 3), np.uint8) for i in range(60)]
    path = write_film(tmp_path / "a.mp4", frames, "libx264", "yuv420p", movflags="faststart")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    found, _, warnings = read(path)
    assert 10 < len(found) < 60
    assert len(warnings) == 1
    assert "only the frames before are used" in warnings[0]


def refused(path, error, text):
    with pytest.raises(error, match=text) as caught:
        read(path, limit=56 * 84)
    assert str(caught.value).count("\n") == 0


def test_what_is_no_film_is_refused_in_one_sentence(tmp_path):
    text = tmp_path / "a.mp4"
    text.write_text("no film" * 100)
    refused(text, ImageFormatError, "is not a video that can be read")
    # FFmpeg would open the other file.
    playlist = tmp_path / "b.mp4"
    playlist.write_text(
        f"#EXTM3U\n#EXTINF:1,\n{write_film(tmp_path / 'c.mp4', ramps(2), 'mpeg4', 'yuv420p')}\n"
    )
    refused(playlist, ImageFormatError, "is not a video that can be read")
    playlist.write_text("ffconcat version 1.0\nfile c.mp4\n")
    refused(playlist, ImageFormatError, "is not a video that can be read")
    headless = write_film(tmp_path / "d.mp4", ramps(60), "libx264", "yuv420p")
    headless.write_bytes(headless.read_bytes()[:-500])
    refused(headless, ImageFormatError, "or its end is missing")
    refused(write_sound(tmp_path / "a.m4a", "aac", 1024), ImageFormatError, "only audio")
    refused(write_sound(tmp_path / "a.mp3", "libmp3lame", 1152), ImageFormatError, "only audio")
    refused(tmp_path / "none.mp4", ImageError, "no such file")
    refused(tmp_path, ImageError, "is a folder")


def test_a_frame_that_is_too_large_is_refused(tmp_path):
    path = write_film(tmp_path / "a.mkv", ramps(2, height=58))
    refused(path, ImageTooLargeError, r"4872 pixels; the limit is 4704 \(MAX_IMAGE_PIXELS\)")
    # Small, but its header claims pixels that are wide.
    path = write_film(tmp_path / "a.mp4", ramps(2), "libx264", "yuv420p", aspect=Fraction(3, 2))
    refused(path, ImageTooLargeError, r"7056 pixels; the limit is 4704 \(MAX_IMAGE_PIXELS\)")
