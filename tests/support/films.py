"""Makes films for tests, and reads films that the code wrote."""

from fractions import Fraction

import av
import numpy as np

RATE = 30


def write_film(
    path, frames, codec="ffv1", pixels="bgr0", times=None, rotation=None, aspect=None, **muxer
):
    """A film of RGB frames [H, W, 3]; ``times`` in units of 1/600 s, else 30 frames per second."""
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = base = Fraction(1, 600 if times else RATE)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for time, frame in zip(times or range(len(frames)), frames, strict=True):
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            made.pts, made.time_base = time, base
            container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    return path


def write_sound(path, codec, samples):
    """A file of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100, layout="stereo")
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, samples), np.float32), "fltp", "stereo")
            frame.rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_film(path, pixels="rgb24"):
    """Frames, their times in seconds, and the metadata of a film."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return (
            [frame.to_ndarray(format=pixels) for frame in frames],
            [frame.time for frame in frames],
            dict(container.metadata),
        )


def ramps(count, height=56, width=84):
    """Frames that differ from each other and at each corner."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack(
            [255 * x // width, 255 * y // height, np.full_like(x, 9 * number % 256)], axis=-1
        ).astype(np.uint8)
        for number in range(count)
    ]
