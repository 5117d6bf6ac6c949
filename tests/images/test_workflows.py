"""The workflows: what actionlint says, and that what they name is there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.images import PLANS
from da3_runtime.variants import VARIANTS, Head
from tests.conftest import ROOT, clean_env

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# YAML 1.1 reads the key "on" as true.
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = [
    pytest.param(job, id=f"{name}-{key}")
    for name, workflow in WORKFLOWS.items()
    for key, job in workflow["jobs"].items()
]


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


STEPS = [step for workflow in WORKFLOWS.values() for step in steps_of(workflow)]
INPUTS = WORKFLOWS["engines"][True]["workflow_dispatch"]["inputs"]


def test_actionlint_finds_nothing():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which("actionlint", path=path)
    if tool is None and "GITHUB_ACTIONS" not in os.environ:
        pytest.skip("actionlint is not installed: pip install -r requirements/actions.txt")
    assert tool is not None
    done = subprocess.run([tool, "-no-color", *FILES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_the_three_workflows():
    assert set(WORKFLOWS) == {"ci", "engines", "images"}
    assert set(WORKFLOWS["ci"][True]) == {"push", "pull_request"}
    assert set(WORKFLOWS["engines"][True]) == {"workflow_dispatch"}
    assert WORKFLOWS["images"][True]["push"] == {"tags": ["v*.*.*"]}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_reads_the_repository_and_no_more(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    more = {
        key: job["permissions"] for key, job in WORKFLOWS[name]["jobs"].items() if "permissions" in job
    }
    wanted = {"image": {"contents": "read", "packages": "write"}} if name == "images" else {}
    assert more == wanted


@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_and_runs_on_a_named_system(job):
    assert job["timeout-minutes"] <= 180
    assert re.fullmatch(r"ubuntu-\d+\.\d+", job["runs-on"])


def test_every_action_is_pinned_to_a_version():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+){0,2}|[0-9a-f]{40})", action), action


def test_no_script_holds_an_expression():
    """Inputs reach a shell as variables, never as text of the script."""
    for step in STEPS:
        assert "${{" not in step.get("run", ""), step["run"]


def test_no_checkout_leaves_its_token_behind():
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == sum(len(workflow["jobs"]) for workflow in WORKFLOWS.values())
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_every_make_target_and_script_that_is_run_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for step in STEPS for line in step.get("run", "").splitlines()]
    called = {name for line in lines for name in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"engines", "publish-engines"} <= called <= targets
    scripts = {name for line in lines for name in re.findall(r"\.ci/[\w.]+", line)}
    assert scripts
    assert all((ROOT / name).is_file() for name in scripts)
    lists = {name for line in lines for name in re.findall(r"requirements/[\w.-]+", line)}
    assert all((ROOT / name).is_file() for name in lists)


def test_every_model_and_head_is_offered():
    offered = re.findall(r"\bda3[\w-]+", INPUTS["models"]["description"])
    assert offered == list(VARIANTS)
    assert INPUTS["head"]["options"] == [head.value for head in Head]


def test_a_build_gets_its_options_as_the_variables_that_make_reads():
    step = next(step for step in STEPS if "make engines" in step.get("run", ""))
    assert set(step["env"]) == {"MODEL", "HEAD", "WEIGHTS", "TARGETS"}
    told = " ".join(INPUTS) + " ".join(step["env"].values())
    assert all(
        name in told for name in ("inputs.head", "inputs.weights", "inputs.targets", "matrix.model")
    )


def test_the_hub_s_token_is_there_for_publishing_only():
    jobs = WORKFLOWS["engines"]["jobs"]
    assert [name for name, job in jobs.items() if "HF_TOKEN" in json.dumps(job)] == ["publish"]
    assert jobs["publish"]["if"] == "inputs.publish_repo != ''"
    text = (ROOT / ".github" / "workflows" / "engines.yml").read_text()
    assert text.count("secrets.") == 1


def test_the_images_have_provenance_a_bill_of_materials_and_a_cache():
    built = next(
        step["with"] for step in steps_of(WORKFLOWS["images"]) if "context" in step.get("with", {})
    )
    assert (built["push"], built["provenance"], built["sbom"]) == (True, "mode=max", True)
    assert built["cache-from"].split(",")[0] == built["cache-to"].split(",")[0] == "type=gha"
    images = WORKFLOWS["images"]["jobs"]["image"]["strategy"]["matrix"]["include"]
    assert [(each["file"], each["target"], each["plans"]) for each in images] == [
        *(("Dockerfile.runtime", target, plans) for plans in PLANS for target in ("full", "lean")),
        ("Dockerfile.build", "", ""),
    ]
    assert len({each["image"] + each["suffix"] for each in images}) == len(images)
    for each in images:
        dockerfile = ROOT / each["file"]
        if each["target"] and dockerfile.is_file():
            assert re.search(rf"^FROM .* AS {each['target']}$", dockerfile.read_text(), re.MULTILINE)


def plan(tmp_path, models, head="dpt"):
    output, summary = tmp_path / "output", tmp_path / "summary"
    env = clean_env(PYTHONPATH=str(ROOT), GITHUB_OUTPUT=str(output), GITHUB_STEP_SUMMARY=str(summary))
    line = [sys.executable, ".ci/plan_builds.py", "--models", models, "--head", head]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    text = output.read_text() if output.exists() else ""
    return done, text, summary.read_text() if summary.exists() else ""


@pytest.mark.parametrize("head", Head)
def test_a_plan_of_all_models_warns_of_the_large_ones(tmp_path, head):
    done, output, summary = plan(tmp_path, "all", head)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.removeprefix("models=")) == list(VARIANTS)
    for model in VARIANTS:
        assert f"| {model} |" in summary
    warned = set(re.findall(r"::warning::(\S+) takes", done.stdout))
    assert warned == {name for name, variant in VARIANTS.items() if variant.above_half_billion}
    row = re.compile(rf"^\| da3-giant \| {head} \|.*?\|.*?\| ([\d.]+) \|", re.MULTILINE)
    (peak,) = row.findall((ROOT / "README.md").read_text())
    assert f"da3-giant takes {peak} GB of memory" in done.stdout


def test_a_plan_takes_a_list_and_refuses_what_is_no_model(tmp_path):
    _, output, _ = plan(tmp_path, " DA3-small,da3-base  da3-small ")
    assert json.loads(output.removeprefix("models=")) == ["da3-small", "da3-base"]
    for wrong in ("da3-small,$(id)", "", ","):
        done, output, _ = plan(tmp_path / "none", wrong)
        assert done.returncode == 2
        assert done.stdout.startswith("::error::models ")
        assert "da3-small" in done.stdout
        assert output == ""
