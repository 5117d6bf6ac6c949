"""Settings, variants and heads: what a user may type."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from da3_runtime.errors import SettingError, UnknownModelError
from da3_runtime.settings import Settings
from da3_runtime.variants import SERVED_MODEL, VARIANTS, Head, find_head, find_variant


def test_defaults_when_nothing_is_set():
    settings = Settings.from_env({})
    assert settings == Settings()
    assert (settings.model_id, settings.head, settings.backend) == ("da3-small", "dpt", "auto")


def test_an_empty_variable_counts_as_unset():
    assert Settings.from_env({"MODEL": "", "WEIGHTS": "", "THREADS": ""}) == Settings()


EVERY = {
    "ENGINE_DIR": ("/e", "engine_dir", Path("/e")),
    "ENGINE_REPO": ("me/engines", "engine_repo", "me/engines"),
    "RUNTIME_CACHE_DIR": ("/caches", "runtime_cache_dir", Path("/caches")),
    "CACHED_MODELS_DIR": ("/c", "cached_models_dir", Path("/c")),
    "MODEL": ("m", "model_id", "m"),
    "MODEL_ID": ("m", "model_id", "m"),
    "HEAD": ("h", "head", "h"),
    "USE_SDT_HEAD": ("true", "head", "sdt"),
    "WEIGHTS": ("w", "weights", "w"),
    "REVISION": ("r", "revision", "r"),
    "SDT_WEIGHTS": ("s", "sdt_weights", "s"),
    "SDT_FUSION_CHANNELS": ("64", "sdt_fusion_channels", 64),
    "RAY_POSE": ("1", "ray_pose", True),
    "HARDWARE_COMPATIBLE": ("1", "hardware_compatible", True),
    "VERSION_COMPATIBLE": ("1", "version_compatible", True),
    "BACKEND": ("Eager", "backend", "eager"),
    "PROCESSING_RES": ("700", "processing_res", 700),
    "THREADS": ("3", "threads", 3),
    "MAX_IMAGE_PIXELS": ("10", "max_image_pixels", 10),
    "MAX_IMAGE_BYTES": ("11", "max_image_bytes", 11),
    "MAX_LOADED_MODELS": ("2", "max_loaded_models", 2),
    "MAX_CONCURRENCY": ("4", "max_concurrency", 4),
    "MAX_BATCH": ("3", "max_batch", 3),
    "BATCH_WAIT_MS": ("7", "batch_wait_ms", 7),
    "MAX_QUEUED_JOBS": ("0", "max_queued_jobs", 0),
    "MAX_RESPONSE_BYTES": ("20000", "max_response_bytes", 20_000),
    "DOWNLOAD_SECONDS": ("5", "download_seconds", 5),
    "IMAGE_URL_HOSTS": (" A.example, *.b.example ", "image_url_hosts", ("a.example", "*.b.example")),
    "DA3_MODE": ("Queue", "mode", "queue"),
    "DA3_HOST": ("::1", "host", "::1"),
    "PORT": ("80", "port", 80),
    "PORT_HEALTH": ("81", "health_port", 81),
    "DA3_API_KEY": ("k", "api_key", "k"),
    "DA3_ALLOW_ANONYMOUS": ("1", "allow_anonymous", True),
    "WORKSPACE": ("/w", "workspace", Path("/w")),
    "OUTPUT_RETENTION_DAYS": ("7", "output_retention_days", 7),
}


@pytest.mark.parametrize("variable", EVERY)
def test_every_variable_is_read(variable):
    text, name, value = EVERY[variable]
    assert Settings.from_env({variable: text}) == replace(Settings(), **{name: value})


def test_no_setting_is_without_a_variable():
    assert {name for _, name, _ in EVERY.values()} == {field.name for field in fields(Settings)}


def test_the_server_s_own_default_gives_way_to_a_name():
    assert Settings.from_env({}, SERVED_MODEL).model_id == SERVED_MODEL
    assert Settings.from_env({"MODEL_ID": "m"}, SERVED_MODEL).model_id == "m"
    assert Settings.from_env({"MODEL_ID": "m", "MODEL": "n"}).model_id == "n"


def test_two_words_about_the_head_must_agree():
    assert Settings.from_env({"HEAD": "SDT", "USE_SDT_HEAD": "1"}).head == "sdt"
    with pytest.raises(SettingError, match="HEAD=sdt and USE_SDT_HEAD=false"):
        Settings.from_env({"HEAD": "sdt", "USE_SDT_HEAD": "false"})


def test_the_key_is_not_shown():
    assert "geheim" not in repr(Settings.from_env({"DA3_API_KEY": "geheim"}))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PROCESSING_RES", "83"),
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
