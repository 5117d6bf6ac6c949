"""The workflows: what actionlint, which CI runs, does not look at; and the plan of engines.yml."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from da3_runtime.variants import VARIANTS, Head
from tests.support.paths import ROOT
from tests.support.processes import clean_env

WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
STEPS = [
    step
    for workflow in WORKFLOWS.values()
    for job in workflow["jobs"].values()
    for step in job.get("steps", [])
]


def test_every_action_is_pinned_by_commit():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert not [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)]


def test_no_script_contains_an_expression():
    """Inputs reach a shell as variables, never as text of the script."""
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")]


def test_every_make_target_and_script_that_a_workflow_runs_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    scripts = "\n".join(step["run"] for step in STEPS if "run" in step)
    called = set(re.findall(r"\bmake ([a-z-]+)", scripts))
    called |= set(WORKFLOWS["nightly"]["jobs"]["long"]["strategy"]["matrix"]["target"])
    assert {"engines", "soak"} <= called <= targets
    files = set(re.findall(r"(?:\.ci|tests)/[\w./]+", scripts))
    assert files
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_every_model_and_head_is_offered():
    # YAML 1.1 reads the key "on" as true.
    inputs = WORKFLOWS["engines"][True]["workflow_dispatch"]["inputs"]
    assert re.findall(r"\bda3[\w-]+", inputs["models"]["description"]) == list(VARIANTS)
    assert inputs["head"]["options"] == [head.value for head in Head]


def plan(tmp_path, models, head="dpt"):
    output, summary = tmp_path / "output", tmp_path / "summary"
    env = clean_env(
        PYTHONPATH=str(ROOT / "runtime"), GITHUB_OUTPUT=str(output), GITHUB_STEP_SUMMARY=str(summary)
    )
    line = [sys.executable, ".ci/plan_builds.py", "--models", models, "--head", head]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    text = output.read_text() if output.exists() else ""
    return done, text, summary.read_text() if summary.exists() else ""


@pytest.mark.parametrize("head", Head)
def test_a_plan_of_all_models_warns_of_the_large_ones(tmp_path, head):
    done, output, summary = plan(tmp_path, "all", head)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.removeprefix("models=")) == list(VARIANTS)
    assert re.findall(r"^\| (da3[\w-]+) \| [\d.]+ \| [\d.]+ \|$", summary, re.MULTILINE) == list(
        VARIANTS
    )
    warned = set(re.findall(r"::warning::(\S+) takes [\d.]+ GB of memory", done.stdout))
    assert warned == {name for name, variant in VARIANTS.items() if variant.above_half_billion}


def test_a_plan_takes_a_list_of_models(tmp_path):
    _, output, _ = plan(tmp_path, " DA3-small,da3-base  da3-small ")
    assert json.loads(output.removeprefix("models=")) == ["da3-small", "da3-base"]


@pytest.mark.parametrize("models", ["da3-small,$(id)", "", ","])
def test_a_plan_of_an_unknown_model_is_refused(tmp_path, models):
    done, output, _ = plan(tmp_path, models)
    assert done.returncode == 2
    assert done.stdout.startswith("::error::models ")
    assert "da3-small" in done.stdout
    assert output == ""
