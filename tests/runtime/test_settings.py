"""Settings, and the names of variants and heads."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from da3_export import settings as export_settings
from da3_export.settings import BuildSettings
from da3_runtime.backends import BACKENDS
from da3_runtime.errors import SettingError, UnknownModelError
from da3_runtime.serve.mode import Mode
from da3_runtime.settings import Settings, table
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import VARIANTS, Head, find_head, find_variant


def test_defaults_when_nothing_is_set():
    settings = Settings.from_env({})
    assert settings == Settings()
    engine = settings.engine
    assert (engine.model_id, engine.head, engine.backend) == ("da3-small", "dpt", "auto")


def test_an_empty_variable_counts_as_unset():
    empty = {variable: "" for each in table() for variable in each.variables}
    assert Settings.from_env(empty) == Settings()


@pytest.mark.parametrize("text", ["on", "t", "yes", "y", "2", "-1", "no"])
def test_a_flag_takes_only_0_1_true_and_false(text):
    with pytest.raises(SettingError, match=r"^DA3_ALLOW_ANONYMOUS must be 0 or 1, not "):
        Settings.from_env({"DA3_ALLOW_ANONYMOUS": text})


@pytest.mark.parametrize("text", [" ", " 0 ", "FALSE"])
def test_a_flag_may_be_padded_and_in_capitals(text):
    assert not Settings.from_env({"DA3_ALLOW_ANONYMOUS": text}).server.allow_anonymous


@pytest.mark.parametrize("value", ["2.0", "1e1", "two", 2.0, True])
def test_a_number_is_a_whole_number(value):
    with pytest.raises(SettingError, match=r"^max_batch must be a whole number from 1 to 64, not "):
        Settings.of(max_batch=value)


@pytest.mark.parametrize(
    ("variable", "text", "number"),
    [
        ("MAX_IMAGE_PIXELS", "8192 x 8192", 2**26),
        ("MAX_IMAGE_PIXELS", "8192x8192", 2**26),
        ("MAX_IMAGE_PIXELS", "8192 * 8192 pixels", 2**26),
        ("MAX_IMAGE_PIXELS", "5712\N{MULTIPLICATION SIGN}4284", 5712 * 4284),
        ("MAX_IMAGE_PIXELS", " 24 MP ", 24_000_000),
        ("MAX_IMAGE_PIXELS", "12.5mp", 12_500_000),
        ("MAX_IMAGE_PIXELS", "16777216 pixels", 2**24),
        ("MAX_IMAGE_PIXELS", "16_777_216", 2**24),
        ("MAX_IMAGE_BYTES", "128MiB", 2**27),
        ("MAX_IMAGE_BYTES", "128 mib", 2**27),
        ("MAX_IMAGE_BYTES", "128Mi", 2**27),
        ("MAX_IMAGE_BYTES", "0.5 GiB", 2**29),
        ("MAX_IMAGE_BYTES", "64MB", 64_000_000),
        ("MAX_IMAGE_BYTES", "512 kB", 512_000),
        ("MAX_IMAGE_BYTES", "67108864 bytes", 2**26),
        ("MAX_RESPONSE_BYTES", "20 MB", 20_000_000),
    ],
)
def test_bytes_and_pixels_may_be_spelled_with_their_unit(variable, text, number):
    name = variable.lower()
    assert Settings.from_env({variable: text}) == Settings.of(**{name: number})
    assert Settings.of(**{name: text}) == Settings.of(**{name: number})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MAX_IMAGE_PIXELS", "8192 x"),
        ("MAX_IMAGE_PIXELS", "8192 x 8192 x 3"),
        ("MAX_IMAGE_PIXELS", "64 MiB"),
        ("MAX_IMAGE_PIXELS", "65536 x 65536"),
        ("MAX_IMAGE_BYTES", "64 * 2**20"),
        ("MAX_IMAGE_BYTES", "1.2.3 MB"),
        ("MAX_IMAGE_BYTES", ". MB"),
        ("MAX_IMAGE_BYTES", "-5 MB"),
        ("MAX_IMAGE_BYTES", "128M"),
        ("MAX_IMAGE_BYTES", "1.0000001 kB"),
        ("MAX_IMAGE_BYTES", "4 GiB"),
        ("MAX_RESPONSE_BYTES", "8 x 8"),
        ("THREADS", "2 MB"),
    ],
)
def test_another_spelling_is_refused_with_an_example_of_a_valid_one(variable, text):
    with pytest.raises(SettingError, match=rf"^{variable} must be a whole number from ") as refused:
        Settings.from_env({variable: text})
    example = {"PIXELS": ", such as 4096 x 4096 or 24 MP, not ", "BYTES": ", such as 64 MiB, not "}
    assert example.get(variable.rpartition("_")[2], "") in str(refused.value)


def test_an_invalid_secret_is_not_shown():
    with pytest.raises(SettingError, match=r"^api_key must be printable ASCII characters\.$"):
        Settings.of(api_key=12345)


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
    "RAY_POSE": ("1", "ray_pose", True),
    "BACKEND": ("Eager", "backend", "eager"),
    "PRECISION": ("INT8", "precision", "int8"),
    "PROCESSING_RES": ("700", "processing_res", 700),
    "THREADS": ("3", "threads", 3),
    "MAX_IMAGE_PIXELS": ("10", "max_image_pixels", 10),
    "MAX_IMAGE_BYTES": ("11", "max_image_bytes", 11),
    "MAX_VIDEO_BYTES": ("12", "max_video_bytes", 12),
    "MAX_VIDEO_SECONDS": ("13", "max_video_seconds", 13),
    "MAX_VIDEO_FRAMES": ("14", "max_video_frames", 14),
    "VIDEO_DOWNLOAD_SECONDS": ("15", "video_download_seconds", 15),
    "MAX_LOADED_MODELS": ("2", "max_loaded_models", 2),
    "MAX_CONCURRENCY": ("4", "max_concurrency", 4),
    "MAX_VIEWS": ("5", "max_views", 5),
    "MAX_DOWNLOADS": ("3", "max_downloads", 3),
    "DA3_CORS_ORIGINS": (
        " https://A.example/, http://localhost:3000 ",
        "cors_origins",
        ("https://a.example", "http://localhost:3000"),
    ),
    "DA3_PAGE": ("0", "page", False),
    "KEEP_ALIVE_SECONDS": ("60", "keep_alive_seconds", 60),
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
    settings = Settings.from_env({variable: text})
    assert settings == Settings.of(**{name: value})
    assert settings != Settings()


@pytest.mark.parametrize("text", ["secret\n", "\tsecret", " secret\r\n"])
def test_white_space_around_the_key_does_not_count(text):
    assert Settings.from_env({"DA3_API_KEY": text}).server.api_key == "secret"


@pytest.mark.parametrize("text", ["\n", "schlüssel", "a\nb", "a\0b", "🔑"])
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(text):
    with pytest.raises(SettingError, match=r"^DA3_API_KEY must be printable ASCII characters\.$"):
        Settings.from_env({"DA3_API_KEY": text})


BUILD = {
    "SDT_FUSION_CHANNELS": ("64", "sdt_fusion_channels", 64),
    "HARDWARE_COMPATIBLE": ("1", "hardware_compatible", True),
    "VERSION_COMPATIBLE": ("1", "version_compatible", True),
    "MODEL_ID": ("m", "model_id", "m"),
    "USE_SDT_HEAD": ("1", "head", "sdt"),
    "PROCESSING_RES": ("252", "processing_res", 252),
}


@pytest.mark.parametrize("variable", BUILD)
def test_the_exporter_reads_its_own_variables_and_those_of_engines(variable):
    text, name, value = BUILD[variable]
    assert BuildSettings.from_env({variable: text}) == BuildSettings(**{name: value})


def test_the_table_lists_every_variable_once_with_a_complete_description():
    rows = [*table(), *export_settings.table()]
    variables = [variable for each in rows for variable in each.variables]
    assert len(set(variables)) == len(variables)
    assert set(variables) == set(EVERY) | {
        "SDT_FUSION_CHANNELS",
        "HARDWARE_COMPATIBLE",
        "VERSION_COMPATIBLE",
    }
    for each in rows:
        assert each.description.endswith("."), each
        assert each.takes, each
        if each.default == "unset":
            assert "nset: " in each.description, each
    by_name = {each.name: each for each in rows}
    assert by_name["processing_res"].takes == "a whole number from 84 to 1036"
    assert (
        by_name["sdt_fusion_channels"].takes == "a whole number from 8 to 1024 that is a multiple of 8"
    )
    assert (by_name["ray_pose"].takes, by_name["ray_pose"].default) == ("0 or 1", "0")
    assert by_name["backend"].takes.replace(" or ", ", ").split(", ") == [
        AUTO,
        *(b.name for b in BACKENDS),
    ]
    assert set(by_name["mode"].takes.replace(" or ", ", ").split(", ")) == {AUTO, *Mode}
    assert by_name["head"].takes == " or ".join(Head)


def test_two_variables_for_one_setting_must_agree():
    assert Settings.from_env({"HEAD": "SDT", "USE_SDT_HEAD": "1"}).engine.head == "sdt"
    with pytest.raises(SettingError, match="HEAD=sdt and USE_SDT_HEAD=false"):
        Settings.from_env({"HEAD": "sdt", "USE_SDT_HEAD": "false"})
    same = {"MODEL": "da3-small", "MODEL_ID": "depth-anything/DA3-SMALL"}
    assert Settings.from_env(same).engine.model_id == "da3-small"
    for cls in (Settings, BuildSettings):
        with pytest.raises(SettingError, match="MODEL=da3-small and MODEL_ID=da3-base"):
            cls.from_env({"MODEL": "da3-small", "MODEL_ID": "da3-base"})


def test_repr_hides_the_key_and_no_backend_gets_it():
    settings = Settings.from_env({"DA3_API_KEY": "geheim"})
    assert "geheim" not in repr(settings)
    assert not hasattr(settings.engine, "api_key")


def test_settings_cannot_be_changed_in_place():
    settings = Settings()
    with pytest.raises(FrozenInstanceError):
        settings.engine.threads = 3
    changed = settings.changed(threads=3, port=80, revision=None)
    assert changed == Settings.of(threads=3, port=80)
    assert settings == Settings()
    assert replace(settings.engine, threads=3) == changed.engine


@pytest.mark.parametrize(
    ("variable", "value", "takes"),
    [
        ("PROCESSING_RES", "83", "from 84 to 1036"),
        ("PROCESSING_RES", "1037", "from 84 to 1036"),
        ("THREADS", "-1", "from 0 to 1024"),
        ("RAY_POSE", "maybe", "0 or 1"),
        ("DA3_ALLOW_ANONYMOUS", "2", "0 or 1"),
        ("USE_SDT_HEAD", "perhaps", "0 or 1"),
        ("MAX_IMAGE_BYTES", "ten", "a whole number"),
        ("MAX_RESPONSE_BYTES", "9999", "from 10000"),
        ("PORT", "65536", "to 65535"),
        ("IMAGE_URL_HOSTS", "a.example b.example", "host names"),
    ],
)
def test_a_bad_value_is_one_sentence_with_the_variable_and_what_it_takes(variable, value, takes):
    with pytest.raises(SettingError, match=rf"^{variable} must be .*{takes}.*, not '{value}'\.$"):
        Settings.from_env({variable: value})


def test_a_bad_width_of_the_sdt_head_names_its_variable():
    with pytest.raises(SettingError, match=r"^SDT_FUSION_CHANNELS must be .* multiple of 8, not '30'"):
        BuildSettings.from_env({"SDT_FUSION_CHANNELS": "30"})


def test_settings_by_name_have_the_same_limits():
    with pytest.raises(SettingError, match=r"^threads must be a whole number from 0 to 1024, not -1"):
        Settings.of(threads=-1)
    with pytest.raises(SettingError, match=r"^thread is not a setting; the settings are: model_id, "):
        Settings.of(thread=1)
    with pytest.raises(ValueError, match="threads"):
        EngineSettings(threads=-1)


def test_the_health_check_imports_no_settings():
    """It runs every few seconds in a new process."""
    code = "import sys, da3_runtime.serve.healthcheck; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
