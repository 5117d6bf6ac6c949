"""Names and shapes of inputs and outputs, as the manifest and the backends use them."""

import numpy as np
import pytest

from da3_runtime.network_io import (
    ANYVIEW_OUTPUTS,
    MONOCULAR_OUTPUTS,
    OUTPUTS,
    RAY_OUTPUTS,
    RawOutputs,
    output_specs,
    shapes_of,
)


def test_every_output_has_a_shape_a_series_and_a_field():
    assert set(OUTPUTS) == {*ANYVIEW_OUTPUTS, *MONOCULAR_OUTPUTS, *RAY_OUTPUTS}
    assert set(OUTPUTS) == set(RawOutputs._fields)


def test_dynamic_dimensions_follow_the_input_s_shape():
    specs = output_specs(["depth", "intrinsics", "rays", "ray_confidence"])
    shapes = [(2, 84, 140), (2, 3, 3), (2, 48, 80, 6), (2, 48, 80)]
    assert shapes_of(specs, (2, 84, 140, 3)) == shapes


def test_outputs_of_several_batches_are_joined_and_absent_ones_stay_none():
    parts = [RawOutputs(np.full((n, 2, 2), n, np.float32)) for n in (1, 2)]
    joined = RawOutputs.joined(parts)
    assert joined.depth[:, 0, 0].tolist() == [1, 2, 2]
    assert joined.sky is None


def test_values_without_a_name_are_refused():
    with pytest.raises(ValueError, match="zip"):
        RawOutputs.of(["depth"], [np.ones((1, 2, 2), np.float32)] * 2)
