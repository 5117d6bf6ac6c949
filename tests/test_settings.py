"""Settings, variants and heads: what a user may type."""

from pathlib import Path

import pytest

from runtime.errors import SettingError, UnknownModelError
from runtime.settings import Settings
from runtime.variants import VARIANTS, Head, find_head, find_variant


def test_defaults_when_nothing_is_set():
    settings = Settings.from_env({})
    assert settings == Settings()
    assert (settings.model_id, settings.head, settings.backend) == ("da3-small", "dpt", "auto")


def test_an_empty_variable_counts_as_unset():
    assert Settings.from_env({"MODEL": "", "WEIGHTS": "", "THREADS": ""}) == Settings()


def test_every_variable_is_read():
    settings = Settings.from_env(
        {"ENGINES_DIR": "/e", "MODEL": "m", "HEAD": "h", "WEIGHTS": "w", "REVISION": "r", "SDT_WEIGHTS": "s", "SDT_FUSION_CHANNELS": "64", "RAY_POSE": "1", "BACKEND": "Eager",
         "PROCESSING_RES": "700", "THREADS": "3", "MAX_IMAGE_PIXELS": "10", "MAX_IMAGE_BYTES": "11"}
    )  # fmt: skip
    assert settings == Settings(Path("/e"), "m", "h", "w", "r", "s", 64, True, "eager", 700, 3, 10, 11)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PROCESSING_RES", "0"),
        ("PROCESSING_RES", "1037"),
        ("THREADS", "-1"),
        ("SDT_FUSION_CHANNELS", "30"),
        ("RAY_POSE", "maybe"),
        ("MAX_IMAGE_BYTES", "ten"),
    ],
)
def test_a_bad_number_names_its_variable(variable, value):
    with pytest.raises(SettingError, match=variable):
        Settings.from_env({variable: value})


@pytest.mark.parametrize("name", ["da3-small", "DA3-Small", " depth-anything/da3-small "])
def test_a_variant_is_found_by_id_or_repository_in_any_case(name):
    assert find_variant(name).model_id == "da3-small"


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(UnknownModelError) as caught:
        find_variant("da3-tiny")
    assert all(model in str(caught.value) for model in VARIANTS)


def test_an_unknown_head_lists_the_known_ones():
    assert find_head("DPT") is Head.DPT
    with pytest.raises(SettingError, match="dpt"):
        find_head("fpn")
