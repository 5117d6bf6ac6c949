"""The images, as far as they can be tried without Docker: what they install and copy, run as they run it.

What a stage of Dockerfile.runtime installs is installed into an empty environment, stripped and compiled;
what it copies is copied; and the worker runs there as process 1 under a read-only root where the system lets
it, with the stage's own variables. The interpreter is this one, not the base image's, and target `full` takes
this environment's CPU build of PyTorch in place of the CUDA one.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution, distributions
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from benchmarks.images import (
    DOCKERFILE,
    PLANS,
    compile_environment,
    copy_application,
    make_environment,
    package_sizes,
    pins,
    site_of,
    stages,
)  # fmt: skip
from da3_runtime.backends.gpu.cuda import has_cuda_driver
from tests.conftest import NANO, PHOTOS, ROOT, free_port
from tests.runtime.test_http_server import encode
from tests.runtime.test_plan_runner import OWN, REAL
from tests.runtime.test_runpod_worker import Platform
from tests.runtime.test_service import Bucket
from tests.support.fake_gpu import Cudart, Status

RUNTIME = stages(DOCKERFILE)
BUILD = stages(ROOT / "Dockerfile.build")
README = (ROOT / "README.md").read_text()
PHOTO = base64.b64encode((PHOTOS / "coffee.jpg").read_bytes()).decode()
KEY = "a key"
IMAGE_PYTHON = os.environ.get("IMAGE_PYTHON") or sys.executable
# As process 1 and the image's user, with nothing to write to but a tmpfs on $HOME, which is the image's /tmp.
# What lies in the image anybody may read; here some of it lies in folders of root's.
READ = "+dac_read_search"
AS_USER = [
    "setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups", "--pdeathsig", "KILL",
    "--bounding-set", f"-all,{READ}", "--inh-caps", READ, "--ambient-caps", READ, "--",
]  # fmt: skip
CONFINED = [
    "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec",
    'mount -o remount,ro,bind /; mount --bind "$PWD" "$PWD"; mount -o remount,ro,bind "$PWD";'
    'cd "$PWD"; mount -t tmpfs -o mode=1777 none "$HOME"; exec "$@"', "sh", *AS_USER,
]  # fmt: skip


def variables(stage):
    return dict(word.split("=", 1) for rest in stage.of("ENV") for word in shlex.split(rest))


class Container:
    """A target's packages, application and variables."""

    def __init__(self, python, application, bytecode, home, engine_dir, pythonpath=""):
        self.application = application
        self.python = str(python)
        self.env = variables(RUNTIME["lean"]) | {
            "PATH": f"{python.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "RUNTIME_CACHE_DIR": f"{home}/da3-engines",
            "ENGINE_DIR": str(engine_dir),
            "PYTHONPYCACHEPREFIX": str(bytecode),
            "PYTHONPATH": pythonpath,
            "MODEL_ID": NANO,
            "HF_HUB_OFFLINE": "1",
        }
        home.mkdir(exist_ok=True)
        probe = subprocess.run([*CONFINED, "true"], cwd=application, env=self.env, capture_output=True)
        self.is_confined = shutil.which("unshare") is not None and probe.returncode == 0

    def start(self, *args, **env):
        line = [*(CONFINED if self.is_confined else []), self.python, *args]
        return subprocess.Popen(
            line, cwd=self.application, env=self.env | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *args, **env):
        process = self.start(*args, **env)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def signal(self, process):
        """SIGTERM to the worker itself, as `docker stop` sends it."""
        pid = process.pid
        if self.is_confined:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, signal.SIGTERM)


def packages_of_lean(plans):
    """The packages of target `lean` for IMAGE_PYTHON, kept for as long as they are the same."""
    lists = sorted((ROOT / "requirements").glob("*.txt"))
    made_of = [path.read_bytes() for path in (*lists, ROOT / "scripts" / "slim.py", DOCKERFILE)]
    digest = hashlib.sha256(b"".join([f"{IMAGE_PYTHON} {sys.version}".encode(), *made_of])).hexdigest()[
        :16
    ]
    folder = ROOT / ".cache" / "test-images" / plans / digest
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        make_environment(folder, IMAGE_PYTHON, plans)
        done.touch()
    return folder


@pytest.fixture(scope="module")
def environment():
    return packages_of_lean(PLANS[0])


def container(environment, engine, folder):
    copy_application(folder / "app")
    compile_environment(environment, folder / "app", folder / "bytecode")
    python = environment / "bin" / "python"
    return Container(python, folder / "app", folder / "bytecode", folder / "home", engine.engine_dir)


@pytest.fixture(scope="module")
def lean(environment, engine, tmp_path_factory):
    return container(environment, engine, tmp_path_factory.mktemp("lean"))


@pytest.fixture(scope="module")
def lean_for_tensorrt(engine, tmp_path_factory):
    return container(packages_of_lean("tensorrt-lean"), engine, tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture(scope="module")
def full(lean, tmp_path_factory):
    """Target `full` without an engine; PyTorch and what its lists pin are links into this environment."""
    if sys.executable != IMAGE_PYTHON:
        pytest.skip("PyTorch is here for another Python than IMAGE_PYTHON")
    folder = tmp_path_factory.mktemp("full")
    copy_application(folder / "app")
    copy_application(folder / "app", "full")
    (folder / "eager").mkdir()
    wanted = {name for name, _ in pins(*RUNTIME["eager"].requirements())}
    for name in {name for name in wanted if name != "triton" and not name.startswith("nvidia-")}:
        for file in distribution(name).files:
            top, target = file.parts[0], folder / "eager" / file.parts[0]
            if top != ".." and not target.exists():
                target.symlink_to(Path(distribution(name).locate_file(top)).resolve())
    (folder / "engines").mkdir()
    return Container(
        Path(lean.python), folder / "app", lean.env["PYTHONPYCACHEPREFIX"], folder / "home",
        folder / "engines", str(folder / "eager"),
    )  # fmt: skip


class Served:
    """The worker over HTTP."""

    def __init__(self, container, **env):
        self.container, self.port = container, free_port()
        self.process = container.start(
            "-m", "da3_runtime", DA3_HOST="127.0.0.1", PORT=str(self.port), DA3_API_KEY=KEY, **env
        )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, headers={"da3-api-key": KEY}
        )

    def __enter__(self):
        for _ in range(1200):
            try:
                if self.client.get("/ping").status_code == 200:
                    return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.05)
        raise AssertionError("it does not become ready")

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.container.signal(self.process)
        self.process.communicate(timeout=60)

    def ask(self, image=PHOTO):
        return self.client.post("/runsync", json={"input": {"image_base64": image}})


@pytest.mark.parametrize("dockerfile", ["Dockerfile.runtime", "Dockerfile.build"])
def test_hadolint_finds_nothing(dockerfile):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    linter = shutil.which("hadolint", path=path)
    assert linter is not None, "'make setup' installs it"
    done = subprocess.run([linter, dockerfile], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_all_that_is_copied_is_there_and_not_ignored():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    sources = {source for stage in (*RUNTIME.values(), *BUILD.values()) for source in stage.sources}
    assert {"runtime/*.py", "requirements/runpod.txt", "export", "scripts/slim.py"} <= sources
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert [rule for rule in let_in if source == rule or source.startswith(f"{rule}/")], source
    for rule in let_in:
        assert [source for source in sources if source == rule or source.startswith(f"{rule}/")], rule


def test_the_targets_are_what_the_readme_says():
    *_, last = RUNTIME
    assert (last, RUNTIME[last].base) == ("full", "lean"), "full is the default, on lean"
    lean, full = RUNTIME["lean"], RUNTIME["full"]
    assert lean.of("ENTRYPOINT") == ['["python", "-m", "da3_runtime"]']
    assert lean.of("USER") == ["10001:10001"] == full.of("USER")[-1:]
    assert lean.of("EXPOSE") == ["8080"]
    (health,) = lean.of("HEALTHCHECK")
    assert health.endswith('CMD ["python", "-m", "da3_runtime.serve.healthcheck"]')
    section = README.split("\n## Images\n")[1].split("\n## ")[0]
    for said in ("10001", "/ping", "`/engines`", "`DA3_API_KEY`", *variables(lean)):
        assert said in section or said in ("PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"), said
    assert set(variables(full)) == {"PYTHONPATH"}
    for name in ("packages", "lean"):
        assert RUNTIME[name].base == "${PYTHON_IMAGE}"


def test_the_bases_are_pinned_by_digest():
    digest = r"@sha256:[0-9a-f]{64}$"
    for file, base in (
        ("Dockerfile.runtime", r"^ARG PYTHON_IMAGE=python:3\.12\.\d+-slim-bookworm"),
        ("Dockerfile.build", r"^ARG CUDA_IMAGE=nvidia/cuda:12\.8\.1-base-ubuntu24\.04"),
    ):
        assert re.search(base + digest, (ROOT / file).read_text(), re.M), file


def test_a_token_is_in_no_layer_of_the_build():
    text = (ROOT / "Dockerfile.build").read_text()
    assert "--mount=type=secret,id=hf_token" in text
    assert not re.search(r"^\s*(ARG|ENV).*TOKEN", text, re.M)


def test_each_pin_stands_once():
    found = [
        line.split("==")[0].lower()
        for path in sorted((ROOT / "requirements").glob("*.in"))
        # These repeat what their own packages need too, or are never installed together with the rest.
        if path.stem not in ("benchmark", "reference", "test-common", "tools", "torch-cpu")
        for line in path.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    assert len(found) == len(set(found))


def test_lean_has_all_that_its_packages_ask_for(environment):
    """But for the SDK, whose declared dependencies are replaced, and what slim.py takes away."""
    site = site_of(environment)
    there = {canonicalize_name(each.metadata["Name"]): each for each in distributions(path=[str(site)])}
    missing = {
        requirement.name
        for name, each in there.items()
        if name != "runpod"
        for requirement in map(Requirement, each.requires or [])
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and canonicalize_name(requirement.name) not in there
    }
    assert missing == {"hf-xet"}
    assert not list(site.rglob("*.pyx")) + list(site.rglob("*.cpp")) + list(site.rglob("tests"))
    assert sum(package_sizes(site).values()) < 600


def test_lean_s_cuda_bindings_have_all_that_the_pretended_gpu_has(lean):
    functions = [name for name in vars(Cudart) if name.startswith("cuda")]
    statuses = {status.name: int(status) for status in Status}
    code = f"""
from cuda.bindings import runtime
print([name for name in {functions} if not hasattr(runtime, name)])
print({{name: int(getattr(runtime.cudaError_t, name)) for name in {list(statuses)}}})
print([int(status) for status in runtime.cudaMalloc(1)[:1]])
"""
    status, output = lean.run("-c", code)
    assert status == 0, output
    missing, found, refused = output.splitlines()[-3:]
    assert missing == "[]"
    assert found == str(statuses)
    assert has_cuda_driver() or refused == "[35]", "the functions can be called where there is no driver"


def test_every_library_of_plans_has_its_list_and_the_default_is_the_dockerfile_s():
    assert f"\nARG PLANS={PLANS[0]}\n" in DOCKERFILE.read_text()
    for plans in PLANS:
        assert f"requirements/{plans}.txt" in RUNTIME["packages"].requirements(plans)
        assert f"requirements/{plans}.txt" in RUNTIME["packages"].sources


def test_the_image_for_tensorrt_takes_the_plans_of_the_image_that_builds_them():
    pinned = dict(pins("requirements/tensorrt-lean.txt"))
    built_with = dict(pins("requirements/cuda.txt"))["tensorrt-cu12"]
    assert set(pinned.values()) == {built_with}
    assert variables(BUILD["tools"])["VERSION_COMPATIBLE"] == "1"


def test_lean_for_tensorrt_has_its_library_alone_and_answers(lean_for_tensorrt, environment):
    code = (
        "from importlib.util import find_spec as f\n"
        "print([n for n in ('torch', 'pip', 'tensorrt', 'tensorrt_rtx') if f(n)])\n"
        "from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX\n"
        "print(TensorRT.unavailable(), TensorRTRTX.unavailable(), sep=', ')"
    )
    status, output = lean_for_tensorrt.run("-c", code)
    assert status == 0, output
    found, reasons = output.splitlines()
    here = None if has_cuda_driver() else "there is no NVIDIA driver"
    assert (found, reasons) == ("[]", f"{here}, tensorrt_rtx is not installed")
    its_size, default_size = (
        sum(package_sizes(site_of(packages_of_lean(plans))).values()) for plans in reversed(PLANS)
    )
    assert its_size < default_size
    with Served(lean_for_tensorrt) as served:
        assert served.ask().json()["status"] == "COMPLETED"


def test_tensorrt_lean_has_all_that_the_pretended_library_has(lean_for_tensorrt):
    """TensorRT's own bindings are the same but for what builds; they cannot be imported without its libraries."""
    wanted = {
        real: [name for name in vars(pretended) if not name.startswith("_") and name not in OWN]
        for pretended, real in REAL.items()
        if real in ("ICudaEngine", "IExecutionContext", "Runtime")
    }
    wanted["Runtime"].remove("get_engine_validity")  # the runner asks whether it is there
    wanted["ICudaEngine"] += ["num_io_tensors", "num_optimization_profiles"]
    wanted["IExecutionContext"] += ["active_optimization_profile"]
    code = f"""
import tensorrt_lean_bindings as library
print([(cls, name) for cls, names in {wanted}.items() for name in names
       if not hasattr(getattr(library, cls), name)])
print(library.ExecutionContextAllocationStrategy.USER_MANAGED is not None,
      library.ILogger.Severity.ERROR is not None, library.uint8 != library.float32, library.__version__)
"""
    status, output = lean_for_tensorrt.run("-c", code)
    assert status == 0, output
    pinned = dict(pins("requirements/tensorrt-lean.txt"))["tensorrt-lean-cu12-bindings"]
    assert output.splitlines() == ["[]", f"True True True {pinned}"]


def test_modules_that_no_file_made_are_not_compiled(tmp_path):
    """PyTorch has such."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "sdk.py").write_text("def import_sdk(): pass\n")
    (tmp_path / "odd.py").write_text(
        "import sys, types\n"
        "odd = types.ModuleType('odd.made')\n"
        "odd.__file__ = '_odd.py'\n"
        "sys.modules['odd.made'] = odd\n"
    )
    code = "import slim; slim.ENTRIES = (); slim.compile_imported(['odd'])"
    paths = f"{tmp_path}{os.pathsep}{ROOT / 'scripts'}"
    env = {"PYTHONPATH": paths, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, check=True)
    assert len(list((tmp_path / "bytecode").rglob("odd.*.pyc"))) == 1


def test_lean_has_no_torch_no_installer_and_no_compiler(lean):
    names = [
        "torch",
        "pip",
        "setuptools",
        "pytest",
        "onnx",
        "depth_anything_3",
        "triton",
        "Cython",
        "mypy",
    ]
    code = f"from importlib.util import find_spec as f; print([n for n in {names} if f(n)], f('tensorrt_rtx'))"
    status, output = lean.run("-c", code)
    assert status == 0
    assert output.startswith("[] ModuleSpec"), output
    assert not [
        path for path in Path(lean.python).parent.iterdir() if re.match("pip|cc|gcc|cython", path.name)
    ]
    assert not (lean.application / "export").exists()
    assert not (lean.application / "runtime" / "eager").exists()


def test_nothing_but_tmp_can_be_written(lean):
    if not lean.is_confined:
        pytest.skip("this system lets nobody make a mount namespace")
    code = (
        "import os, pathlib\n"
        "print(os.getpid(), os.getuid(), os.getcwd())\n"
        "(pathlib.Path.home() / 'x').write_text('x')\n"
        "for place in ('x', 'runtime/x', '/x', '/usr/x'):\n"
        "    try: pathlib.Path(place).write_text('x')\n"
        "    except OSError as error: print(error.errno)\n"
    )
    status, output = lean.run("-c", code)
    assert status == 0, output
    assert output.split() == ["1", "10001", str(lean.application), *4 * ["30"]]


def test_without_a_key_it_refuses_to_start(lean):
    status, output = lean.run("-m", "da3_runtime", PORT=str(free_port()))
    assert status == 2
    assert "set DA3_API_KEY, or DA3_ALLOW_ANONYMOUS=1" in output


def test_lean_answers_over_http_from_the_engine_and_knows_its_health(lean):
    port = str(free_port())
    assert lean.run("-m", "da3_runtime.serve.healthcheck", PORT=port)[0] == 1
    with Served(lean) as served:
        answer = served.ask().json()
        assert answer["status"] == "COMPLETED", answer
        assert answer["output"]["backend"] == "onnxruntime-cpu"
        assert lean.run("-m", "da3_runtime.serve.healthcheck", PORT=str(served.port))[0] == 0
    assert (
        lean.run("-m", "da3_runtime.serve.healthcheck", RUNPOD_WEBHOOK_GET_JOB="http://x", PORT=port)[0]
        == 0
    )


def test_told_to_stop_process_1_finishes_the_request_in_hand(lean):
    with Served(lean) as served, ThreadPoolExecutor(1) as threads:
        image = base64.b64encode(encode(Image.new("1", (4096, 4096)))).decode()
        asked = threads.submit(served.ask, image)
        time.sleep(0.3)
        lean.signal(served.process)
        assert asked.result(60).json()["status"] == "COMPLETED"
        assert served.process.wait(60) == 0


def test_told_to_stop_while_it_starts_it_stops(lean):
    process = lean.start("-m", "da3_runtime", DA3_HOST="127.0.0.1", PORT=str(free_port()))
    time.sleep(1)
    lean.signal(process)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output


def test_the_sdk_runs_one_job(lean):
    job = json.dumps({"input": {"image_base64": PHOTO, "outputs": ["camera"]}})
    status, output = lean.run("-m", "da3_runtime.serve.runpod_worker", "--test_input", job)
    assert status == 0, output
    assert "intrinsics" in output


def test_the_sdk_s_local_server_answers(lean):
    port = free_port()
    process = lean.start(
        "-m", "da3_runtime.serve.runpod_worker", "--rp_serve_api", "--rp_api_port", str(port)
    )
    try:
        with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as client:
            for _ in range(600):
                try:
                    answer = client.post("/runsync", json={"input": {"image_base64": PHOTO}}).json()
                    break
                except httpx.TransportError:
                    assert process.poll() is None, process.stdout.read()
                    time.sleep(0.05)
        assert answer["status"] == "COMPLETED"
        assert answer["output"]["backend"] == "onnxruntime-cpu"
    finally:
        lean.signal(process)
        process.communicate(timeout=60)


def loopback(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_a_queue_worker_told_to_stop_returns_the_job_in_hand(lean):
    """Its answer is too large for the platform, so that the bucket is tried too."""
    platform, address = loopback(Platform)
    bucket, bucket_address = loopback(Bucket)
    bucket.put, bucket.status, platform.done, platform.jobs = {}, 200, {}, []
    image = base64.b64encode(encode(Image.new("1", (4096, 4096)))).decode()
    job = {"image_base64": image, "outputs": ["depth_npz"], "output_size": "model", "processing_res": 84}
    worker = lean.start(
        "-m", "da3_runtime", RUNPOD_ENDPOINT_ID="x", RUNPOD_WEBHOOK_GET_JOB=f"{address}/job-take/$ID?a=b",
        RUNPOD_WEBHOOK_POST_OUTPUT=f"{address}/job-done/$ID?a=b", RUNPOD_SKIP_GPU_CHECK="true",
        RUNPOD_SKIP_AUTO_SYSTEM_CHECKS="true", MAX_RESPONSE_BYTES="10000",
        BUCKET_ENDPOINT_URL=bucket_address, BUCKET_ACCESS_KEY_ID="id", BUCKET_SECRET_ACCESS_KEY="x",
    )  # fmt: skip
    try:
        platform.jobs.append({"id": "large", "input": job})
        while platform.jobs and worker.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not platform.done, "the job is in hand"
        lean.signal(worker)
        output, _ = worker.communicate(timeout=60)
    finally:
        worker.kill()
    assert worker.returncode == 0, output
    assert "depth_npz_url" in platform.done["large"]["output"], output
    assert bucket.put


def test_full_answers_with_eager_where_there_is_no_engine(full):
    with Served(full) as served:
        answer = served.ask().json()
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"]["backend"] == "eager"
    assert any("eager answered instead" in warning for warning in answer["output"]["warnings"])


def test_lean_without_an_engine_says_so(lean, tmp_path):
    job = json.dumps({"input": {"image_base64": PHOTO}})
    status, output = lean.run(
        "-m", "da3_runtime.serve.runpod_worker", "--test_input", job, ENGINE_DIR=str(tmp_path)
    )
    assert status == 1
    assert 'not installed: pip install "da3-runtime[eager]"' in output
