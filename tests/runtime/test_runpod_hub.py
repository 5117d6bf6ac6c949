"""The files that RunPod reads have only documented fields, and values that the worker accepts.

The fields are those of RunPod's "Hub publishing guide", the pools and GPU ids those of "GPU types".
"""

import base64
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from da3_runtime.api.request import parse_request
from da3_runtime.backends import BACKENDS
from da3_runtime.serve.mode import AUTO
from da3_runtime.settings import Settings, table
from da3_runtime.variants import DEFAULT_MODEL, NON_COMMERCIAL, VARIANTS
from tests.support.paths import ROOT
from tests.support.processes import clean_env

HUB = json.loads((ROOT / ".runpod" / "hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
GUIDE = (ROOT / "docs" / "runpod.md").read_text()
# Variables of the settings and of huggingface_hub.
VARIABLES = {variable for each in table() for variable in each.variables} | {
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
}

STRING, NUMBER, INTEGER, LIST, OBJECT = str, (int, float), int, list, dict
# Field: its type, and whether it is required.
HUB_FIELDS = {
    "title": (STRING, True), "description": (STRING, True), "type": (STRING, True),
    "category": (STRING, True), "iconUrl": (STRING, False), "config": (OBJECT, True),
}  # fmt: skip
CONFIG_FIELDS = {
    "runsOn": (STRING, True), "endpointType": (STRING, False), "containerDiskInGb": (INTEGER, True),
    "gpuCount": (INTEGER, True), "gpuIds": (STRING, True), "allowedCudaVersions": (LIST, False),
    "env": (LIST, False), "presets": (LIST, False),
}  # fmt: skip
INPUT_FIELDS = {
    "string": {"options": LIST, "default": STRING},
    "huggingface": {"default": STRING},
    "number": {"min": NUMBER, "max": NUMBER, "default": NUMBER},
    "boolean": {"default": bool, "trueValue": STRING, "falseValue": STRING},
}
INPUT_COMMON = {
    "name": STRING,
    "type": STRING,
    "description": STRING,
    "advanced": bool,
    "required": bool,
}
TEST_FIELDS = {"name": (STRING, True), "input": (OBJECT, True), "timeout": (INTEGER, False)}
TEST_CONFIG_FIELDS = {
    "gpuTypeId": (STRING, True), "gpuCount": (INTEGER, True), "env": (LIST, False),
    "allowedCudaVersions": (LIST, False),
}  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"
ESTIMATES = json.loads((RESULTS / "gpu_memory.json").read_text())["estimates"]
MEMORY = {row["model"]: row for row in ESTIMATES}
# Memory of each pool's GPUs, in GB.
POOLS = {
    "AMPERE_16": 16, "AMPERE_24": 24, "ADA_24": 24, "AMPERE_48": 48, "ADA_48_PRO": 48,
    "AMPERE_80": 80, "ADA_80_PRO": 80, "HOPPER_141": 141,
}  # fmt: skip


def check_fields(what, fields):
    assert set(what) <= set(fields)
    assert {name for name, (_, is_needed) in fields.items() if is_needed} <= set(what)
    for name, value in what.items():
        kind = fields[name][0]
        assert isinstance(value, kind), name
        assert not isinstance(value, bool) or kind is bool, name


def check_cuda_versions(versions):
    assert versions
    for version in versions:
        assert re.fullmatch(r"\d+\.\d+", version)
        assert float(version) >= 12.8, "what is installed is built for CUDA 12.8"


def inputs():
    return {each["key"]: each["input"] for each in HUB["config"]["env"] if "input" in each}


def settings_with(**env):
    """The worker's settings from these variables; raises if one is invalid."""
    return Settings.from_env(env)


def test_the_listing_has_the_documented_fields():
    check_fields(HUB, HUB_FIELDS)
    assert HUB["type"] == "serverless"
    assert HUB["category"] in ("audio", "embedding", "language", "video", "image")
    config = HUB["config"]
    check_fields(config, CONFIG_FIELDS)
    assert config["runsOn"] == "GPU"
    assert config.get("endpointType", "LB") == "LB"
    pools = config["gpuIds"].split(",")
    largest = max(POOLS[MEMORY[model]["pool"]] for model in VARIANTS)
    assert min(POOLS[pool] for pool in pools) >= largest
    check_cuda_versions(config["allowedCudaVersions"])


def test_every_variable_is_a_setting_that_accepts_the_offered_values():
    keys = [each["key"] for each in HUB["config"]["env"]]
    assert len(keys) == len(set(keys))
    assert set(keys) <= VARIABLES
    for each in HUB["config"]["env"]:
        assert set(each) in ({"key", "value"}, {"key", "input"})
    for key, field in inputs().items():
        own = INPUT_FIELDS[field["type"]]
        assert {"name", "type", "description", "default"} <= set(field) <= {*INPUT_COMMON, *own}, key
        for name, value in field.items():
            assert isinstance(value, (INPUT_COMMON | own)[name]), (key, name)
        if field["type"] == "boolean":
            values = [field["trueValue"], field["falseValue"]]
        elif field["type"] == "number":
            assert field["min"] <= field["default"] <= field["max"]
            values = [field["min"], field["max"], field["default"]]
        else:
            for option in field.get("options", []):
                assert set(option) == {"label", "value"}
            values = [option["value"] for option in field.get("options", [])]
            assert not values or field["default"] in values
            values.append(field["default"])
        for value in values:
            settings_with(**{key: str(value)})


def test_every_model_is_offered_with_its_license():
    model = inputs()["MODEL_ID"]
    assert [option["value"] for option in model["options"]] == list(VARIANTS)
    assert model["default"] == DEFAULT_MODEL
    for option in model["options"]:
        is_limited = VARIANTS[option["value"]].license == NON_COMMERCIAL
        assert ("non-commercial" in option["label"]) is is_limited
    backends = [option["value"] for option in inputs()["BACKEND"]["options"]]
    assert backends == [
        AUTO,
        *(each.name for each in BACKENDS if each.automatic and AUTO in each.precisions),
    ]


def test_a_preset_sets_only_offered_variables():
    for preset in HUB["config"]["presets"]:
        assert set(preset) == {"name", "defaults"}
        assert set(preset["defaults"]) <= set(inputs())
        model = preset["defaults"]["MODEL_ID"]
        assert (VARIANTS[model].license == NON_COMMERCIAL) is ("non-commercial" in preset["name"])
        settings_with(**{key: str(value) for key, value in preset["defaults"].items()})


def test_the_hub_s_tests_have_the_documented_fields():
    assert set(TESTS) == {"tests", "config"}
    check_fields(TESTS["config"], TEST_CONFIG_FIELDS)
    assert TESTS["config"]["gpuTypeId"].startswith("NVIDIA ")
    check_cuda_versions(TESTS["config"]["allowedCudaVersions"])
    for each in TESTS["config"]["env"]:
        assert set(each) == {"key", "value"}
        assert each["key"] in VARIABLES
        settings_with(**{each["key"]: each["value"]})
    assert TESTS["tests"]
    for test in TESTS["tests"]:
        check_fields(test, TEST_FIELDS)


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_a_test_of_the_hub_is_a_request_without_warnings(test):
    request, warnings = parse_request(test["input"])
    assert warnings == []
    image = Image.open(io.BytesIO(base64.b64decode(request.image_base64)))
    assert min(image.size) >= 84


def test_the_hub_s_handler_is_the_worker(engine):
    """The file that the Hub requires runs a job."""
    env = {each["key"]: each["value"] for each in TESTS["config"]["env"]}
    job = json.dumps({"input": TESTS["tests"][-1]["input"]})
    done = subprocess.run(
        [sys.executable, ROOT / ".runpod" / "handler.py", "--test_input", job],
        cwd=ROOT / "docs",
        env=clean_env(ENGINE_DIR=str(engine.engine_dir), **env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "completed successfully" in done.stdout


def test_the_files_that_the_hub_looks_for_are_there():
    """handler.py, Dockerfile and README.md, in .runpod or in the root; the Dockerfile is the worker's."""
    assert (ROOT / "README.md").is_file()
    dockerfile = ROOT / "Dockerfile"
    assert str(dockerfile.readlink()) == "Dockerfile.runtime"
    if dockerfile.is_file():
        stages = re.findall(r"^FROM .* AS (\S+)$", dockerfile.read_text(), re.MULTILINE)
        assert stages[-1] == "full"


def test_the_guide_has_every_variable_of_the_listing_and_no_unknown_one():
    for key in (each["key"] for each in HUB["config"]["env"]):
        assert f"`{key}`" in GUIDE
    known = {*VARIABLES, *POOLS, "IN_QUEUE", "IN_PROGRESS"}
    for name in set(re.findall(r"`([A-Z][A-Z0-9]+_[A-Z0-9_]+)\b", GUIDE)):
        assert name in known or name.startswith(("RUNPOD_", "BUCKET_")), name


# For each graph: attention heads of the backbone, and channels of the DPT head's maps.
SHAPES = {
    "da3-nano": [(5, 32)], "da3-small": [(6, 64)], "da3-base": [(12, 128)], "da3-large": [(16, 256)],
    "da3-giant": [(24, 256)], "da3metric-large": [(16, 256)], "da3mono-large": [(16, 256)],
    "da3nested-giant-large": [(24, 256), (16, 256)],
}  # fmt: skip


def activations(model):
    """GB of the formula in gpu_memory.json: the largest profile's attention, twice, and four of its largest maps."""
    tokens = max((74 * 74 + 1) ** 2, 8 * (36 * 36 + 1) ** 2)
    pixels = max(1036 * 1036, 8 * 504 * 504)
    return (
        sum(2 * heads * tokens * 2 + 4 * width / 2 * pixels * 2 for heads, width in SHAPES[model]) / 1e9
    )


@pytest.mark.parametrize("model", VARIANTS)
def test_the_memory_estimates_follow_from_their_formula(model):
    builds = json.loads((RESULTS / "builds.json").read_text())["rows"]
    (build,) = [each for each in builds if (each["model"], each["head"]) == (model, "dpt")]
    engine = build["plan_mb"] / 1000 + activations(model) + 0.5
    eager = 1.5 * build["fp32_mb"] / 1000 + activations(model) + 1
    row = MEMORY[model]
    assert (row["engine_gb"], row["eager_gb"]) == (round(engine, 1), round(eager, 1))
    smallest = min(memory for memory in POOLS.values() if memory >= 1.2 * eager)
    assert POOLS[row["pool"]] == smallest
