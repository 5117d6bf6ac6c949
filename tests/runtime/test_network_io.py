"""Names and shapes of inputs and outputs, as the manifest and the backends use them."""

import numpy as np
import pytest

from da3_runtime.network_io import (
    ANYVIEW_INPUTS,
    ANYVIEW_OUTPUTS,
    CHOOSE,
    MONOCULAR_INPUTS,
    MONOCULAR_OUTPUTS,
    OUTPUTS,
    RAY_OUTPUTS,
    Conditions,
    RawOutputs,
    inputs_of,
    output_specs,
    shapes_of,
)


def test_every_output_has_a_shape_a_series_and_a_field():
    assert set(OUTPUTS) == {*ANYVIEW_OUTPUTS, *MONOCULAR_OUTPUTS, *RAY_OUTPUTS}
    assert set(OUTPUTS) == set(RawOutputs._fields)


def test_dynamic_dimensions_follow_the_input_s_shape():
    specs = output_specs(["depth", "intrinsics", "reference", "rays", "ray_confidence"])
    shapes = [(2, 5, 84, 140), (2, 5, 3, 3), (2,), (2, 5, 48, 80, 6), (2, 5, 48, 80)]
    assert shapes_of(specs, (2, 5, 84, 140, 3)) == shapes


def test_a_graph_gets_the_inputs_that_it_has_and_chooses_by_default():
    images = np.zeros((2, 3, 14, 14, 3), np.uint8)
    both = inputs_of(ANYVIEW_INPUTS, images)
    assert both["wanted_reference"].tolist() == [CHOOSE, CHOOSE]
    assert list(inputs_of(MONOCULAR_INPUTS, images)) == ["images"]
    conditions = Conditions.none(2, 3)
    conditions.reference[:] = (1, 2)
    assert inputs_of(ANYVIEW_INPUTS, images, conditions)["wanted_reference"].tolist() == [1, 2]


def test_outputs_of_several_batches_are_joined_and_absent_ones_stay_none():
    parts = [RawOutputs(np.full((n, 1, 2, 2), n, np.float32)) for n in (1, 2)]
    joined = RawOutputs.joined(parts)
    assert joined.depth[:, 0, 0, 0].tolist() == [1, 2, 2]
    assert joined.sky is None


def test_values_without_a_name_are_refused():
    with pytest.raises(ValueError, match="zip"):
        RawOutputs.of(["depth"], [np.ones((1, 2, 2), np.float32)] * 2)
