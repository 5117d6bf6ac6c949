"""The reference view of a scene: upstream's choice, or the one that was asked for."""

import pytest
import torch

from da3_runtime.network.reference import reference_of, unbalance
from da3_runtime.network_io import CHOOSE


def class_tokens(scenes, views, seed=0):
    return torch.randn(scenes, views, 24, generator=torch.Generator().manual_seed(seed))


def chosen(tokens, wanted=CHOOSE):
    return reference_of(tokens, torch.full((len(tokens),), wanted)).tolist()


@pytest.mark.parametrize("views", [3, 4, 5, 8, 16])
def test_the_choice_is_upstreams(views):
    from depth_anything_3.model.reference_view_selector import select_reference_view

    tokens = class_tokens(100, views)
    assert chosen(tokens) == select_reference_view(tokens[:, :, None], "saddle_balanced").tolist()
    assert len(set(chosen(tokens))) == views, "every place is chosen at times"


@pytest.mark.parametrize("views", [1, 2])
def test_of_one_or_two_views_the_first_is_the_reference(views):
    """As upstream, which chooses from three views on."""
    tokens = class_tokens(40, views)
    assert chosen(tokens) == [0] * 40
    assert torch.isfinite(unbalance(tokens)).all()


def test_each_scene_may_choose_or_have_its_reference_given():
    tokens = class_tokens(3, 5)
    own = chosen(tokens)
    mixed = reference_of(tokens, torch.tensor([4, CHOOSE, 0])).tolist()
    assert mixed == [4, own[1], 0]


def test_equal_views_have_a_reference():
    assert chosen(torch.ones(2, 4, 24)) == [0, 0]
