"""What a loaded model does when memory runs out."""

import numpy as np
import pytest

from da3_runtime.errors import OutOfMemoryError
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.network_io import RawOutputs


class Limited:
    """A graph that runs at most ``room`` images at once, and takes their first pixel for depth."""

    def __init__(self, room):
        self.room = room
        self.batches = []
        self.freed = 0

    def run(self, images, conditions):
        self.batches.append(len(images))
        if len(images) > self.room:
            raise OutOfMemoryError("The GPU has not enough free memory.")
        return RawOutputs(images[..., 0].astype(np.float32))

    def free(self):
        self.freed += 1


IMAGES = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1, 1) * np.ones((2, 14, 14, 3), np.uint8)


def depths(raw):
    return raw["model"].depth[:, 0, 0, 0].tolist()


def test_a_batch_that_fits_runs_at_once():
    graph = Limited(room=3)
    assert depths(Loaded(None, {"model": graph}, []).run(IMAGES)) == [0, 1, 2]
    assert (graph.batches, graph.freed) == ([3], 0)


def test_the_images_of_a_batch_that_is_too_large_run_one_by_one():
    graph = Limited(room=1)
    loaded = Loaded(None, {"model": graph}, [], make_room=lambda: pytest.fail("a model was closed"))
    assert depths(loaded.run(IMAGES)) == [0, 1, 2]
    assert (graph.batches, graph.freed) == ([3, 1, 1, 1], 1)


def test_if_one_image_is_too_large_other_models_are_closed_and_it_runs_again():
    graph = Limited(room=0)

    def make_room():
        graph.room = 1
        return True

    assert depths(Loaded(None, {"model": graph}, [], make_room=make_room).run(IMAGES)) == [0, 1, 2]
    assert (graph.batches, graph.freed) == ([3, 1, 1, 1, 1], 2)


@pytest.mark.parametrize("closed", [True, False])
def test_if_nothing_helps_the_error_is_out_of_memory(closed):
    graph = Limited(room=0)
    with pytest.raises(OutOfMemoryError):
        Loaded(None, {"model": graph}, [], make_room=lambda: closed).run(IMAGES)
    assert graph.batches == ([3, 1, 1] if closed else [3, 1])
