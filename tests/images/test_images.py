"""The images, as far as they can be tried without Docker: CI builds and runs them.

The list that Dockerfile.runtime installs for target `lean` is installed into an empty environment, stripped and
compiled. The worker runs there as process 1, as the image's user, under a read-only root where the system allows
it, with the image's variables. The interpreter is this one, not the base image's; target `full` takes this
environment's CPU build of PyTorch instead of the CUDA one.
"""

import base64
import hashlib
import http.server
import io
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
from importlib.metadata import distributions
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from benchmarks.images import (
    BASE_MB,
    PLANS,
    compile_environment,
    copy_application,
    empty_environment,
    install,
    pins,
    site_of,
    size_of,
)  # fmt: skip
from da3_runtime.backends.gpu.cuda import has_cuda_driver
from tests.support import fake_gpu
from tests.support.environments import hard_link_packages, installed, link_packages
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import free_port

DOCKERFILES = ("Dockerfile.build", "Dockerfile.runtime")
PHOTO = base64.b64encode((PHOTOS / "coffee.jpg").read_bytes()).decode()
KEY = "a key"
# As process 1 and the image's user, with nothing to write to but a tmpfs on $HOME, which is the image's /tmp.
# The image's files can be read by every user; some of these lie in folders that only root may enter.
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


def instructions(dockerfile, keyword):
    """The arguments of an instruction, each joined to one line."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(rf"^{keyword} +(.*)$", text, re.MULTILINE)


def variables():
    (words,) = [rest for rest in instructions("Dockerfile.runtime", "ENV") if "ENGINE_DIR" in rest]
    return dict(word.split("=", 1) for word in shlex.split(words))


class Container:
    """A target's packages, application and variables."""

    def __init__(self, environment, folder, engine_dir, bundled=False, pythonpath=""):
        folder.mkdir(exist_ok=True)
        self.python = environment / "bin" / "python"
        self.application, home = folder / "app", folder / "home"
        copy_application(self.application, bundled=bundled)
        compile_environment(environment, self.application, folder / "bytecode")
        home.mkdir()
        self.env = variables() | {
            "PATH": f"{self.python.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "RUNTIME_CACHE_DIR": f"{home}/da3-engines",
            "ENGINE_DIR": str(engine_dir),
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
            "PYTHONPATH": pythonpath,
            "MODEL_ID": NANO,
            "HF_HUB_OFFLINE": "1",
        }
        self.bytecode_mb = size_of(folder / "bytecode")
        probe = subprocess.run(
            [*CONFINED, "true"], cwd=self.application, env=self.env, capture_output=True
        )
        self.is_confined = shutil.which("unshare") is not None and probe.returncode == 0

    def start(self, *args, **env):
        line = [*(CONFINED if self.is_confined else []), str(self.python), *args]
        return subprocess.Popen(
            line, cwd=self.application, env=self.env | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *args, **env):
        process = self.start(*args, **env)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def stop(self, process):
        """SIGTERM to the worker itself, as `docker stop` sends it."""
        pid = process.pid
        if self.is_confined:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, signal.SIGTERM)


def packages_of(plans):
    """The packages of target `lean` for this interpreter, kept while the list and slim.py stay the same.

    What this environment has in the same version is linked from it; the rest is installed with its hashes.
    """
    made_of = [ROOT / "requirements" / f"lean-{plans}.txt", ROOT / "scripts" / "slim.py"]
    content = sys.version.encode() + b"".join(path.read_bytes() for path in made_of)
    folder = ROOT / ".cache" / "test-images" / plans / hashlib.sha256(content).hexdigest()[:16]
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        if plans == PLANS[0]:
            empty_environment(folder)
            install_some(folder, hard_link_packages(pins(f"lean-{plans}"), site_of(folder)), plans)
        else:
            change_plans(packages_of(PLANS[0]), folder, plans)
        done.touch()
    return folder


def change_plans(first, folder, plans):
    """Make the packages of ``plans`` from those of the first library, which take long to install."""
    shutil.copytree(first, folder, symlinks=True, copy_function=os.link)
    (folder / "done").unlink()
    site, wanted = site_of(folder), pins(f"lean-{plans}")
    for package in distributions(path=[str(site)]):
        if canonicalize_name(package.metadata["Name"]) not in wanted:
            for top in {file.parts[0] for file in package.files if file.parts[0] != ".."}:
                path = site / top
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    install_some(folder, wanted, plans)


def install_some(folder, names, plans):
    """Install the packages called ``names`` from a list, and strip all packages as the image does."""
    text = (ROOT / "requirements" / f"lean-{plans}.txt").read_text()
    pinned = re.findall(r"^(?:\S+==.*(?:\n +--hash.*)+)", text, re.MULTILINE)
    chosen = [entry for entry in pinned if entry.partition("==")[0] in names]
    (folder / "list.txt").write_text("\n".join(chosen))
    install(folder, [folder / "list.txt"])


@pytest.fixture(scope="module")
def lean(engine, tmp_path_factory):
    return Container(packages_of(PLANS[0]), tmp_path_factory.mktemp("lean"), engine.engine_dir)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Target `full` without an engine; what its list pins are links into this environment."""
    folder = tmp_path_factory.mktemp("full")
    eager = folder / "eager"
    for name in (eager, folder / "engines"):
        name.mkdir()
    here = {name for name in pins("full") if installed(name)}
    assert not {name for name in set(pins("full")) - here if name != "triton" and name[:7] != "nvidia-"}
    link_packages(here, eager)
    environment = packages_of(PLANS[0])
    return Container(
        environment, folder / "image", folder / "engines", bundled=True, pythonpath=str(eager)
    )


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
        raise AssertionError("the worker does not become ready")

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.container.stop(self.process)
        self.process.communicate(timeout=60)

    def ask(self, image=PHOTO):
        return self.client.post("/runsync", json={"input": {"image_base64": image}})


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing(dockerfile):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    linter = shutil.which("hadolint", path=path)
    assert linter is not None, "'make setup' installs it"
    done = subprocess.run([linter, dockerfile], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_copied_file_exists_and_is_in_the_build_context(dockerfile):
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copies = [rest.split() for rest in instructions(dockerfile, "COPY")]
    sources = [word for words in copies if "--from" not in words[0] for word in words[:-1]]
    sources += re.findall(r"type=bind,source=([^, ]+)", (ROOT / dockerfile).read_text())
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert [rule for rule in let_in if source == rule or source.startswith(f"{rule}/")], source


def test_lean_has_every_package_that_its_packages_declare():
    """Except for the RunPod SDK, whose declared dependencies are overridden, and what slim.py removes."""
    site = site_of(packages_of(PLANS[0]))
    present = {
        canonicalize_name(each.metadata["Name"]): each for each in distributions(path=[str(site)])
    }
    missing = {
        requirement.name
        for name, each in present.items()
        if name != "runpod"
        for requirement in map(Requirement, each.requires or [])
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and canonicalize_name(requirement.name) not in present
    }
    assert missing == {"hf-xet"}
    assert {"torch", "pip", "setuptools", "onnx", "depth-anything-3", "triton", "mypy"}.isdisjoint(
        present
    )
    assert not [path for path in (site.parents[2] / "bin").iterdir() if path.name.startswith("pip")]


def test_lean_is_smaller_than_700_mb(lean):
    parts = [
        size_of(site_of(packages_of(PLANS[0]))),
        size_of(lean.application),
        lean.bytecode_mb,
        BASE_MB,
    ]
    assert sum(parts) < 700, parts


def test_nothing_but_tmp_can_be_written(lean):
    if not lean.is_confined:
        pytest.skip("this system allows no mount namespace")
    code = (
        "import os, pathlib\n"
        "print(os.getpid(), os.getuid(), os.getcwd())\n"
        "(pathlib.Path.home() / 'x').write_text('x')\n"
        "for place in ('x', 'da3_runtime/x', '/x', '/usr/x'):\n"
        "    try: pathlib.Path(place).write_text('x')\n"
        "    except OSError as error: print(error.errno)\n"
    )
    status, output = lean.run("-c", code)
    assert status == 0, output
    assert output.split() == ["1", "10001", str(lean.application), *4 * ["30"]]


def test_without_a_key_the_worker_refuses_to_start(lean):
    status, output = lean.run("-m", "da3_runtime", PORT=str(free_port()))
    assert status == 2
    assert "set DA3_API_KEY, or DA3_ALLOW_ANONYMOUS=1" in output


def test_lean_answers_over_http_from_the_engine_and_reports_its_health(lean):
    health = ("-m", "da3_runtime.serve.healthcheck")
    assert lean.run(*health, PORT=str(free_port()))[0] == 1
    with Served(lean) as served:
        answer = served.ask().json()
        assert answer["status"] == "COMPLETED", answer
        assert answer["output"]["backend"] == "onnxruntime-cpu"
        assert "page/page.js" in served.client.get("/").text
        assert served.client.get("/page/three.js").status_code == 200
        assert lean.run(*health, PORT=str(served.port))[0] == 0
    assert lean.run(*health, RUNPOD_WEBHOOK_GET_JOB="http://x", PORT=str(free_port()))[0] == 0


def test_after_sigterm_process_1_finishes_the_running_request(lean):
    with Served(lean) as served, ThreadPoolExecutor(1) as threads:
        stream = io.BytesIO()
        Image.new("1", (4096, 4096)).save(stream, "PNG")
        answer = threads.submit(served.ask, base64.b64encode(stream.getvalue()).decode())
        time.sleep(0.3)
        lean.stop(served.process)
        assert answer.result(60).json()["status"] == "COMPLETED"
        assert served.process.wait(60) == 0


def test_sigterm_during_the_start_stops_the_worker(lean):
    process = lean.start("-m", "da3_runtime", DA3_HOST="127.0.0.1", PORT=str(free_port()))
    time.sleep(1)
    lean.stop(process)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output


class Bucket(http.server.BaseHTTPRequestHandler):
    """Keeps what is put."""

    def do_PUT(self):
        self.server.put[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_queue_worker_runs_a_job_and_puts_a_large_output_into_the_bucket(lean):
    """The stripped packages contain one of the cloud's services, and no other."""
    bucket = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    bucket.put = {}
    threading.Thread(target=bucket.serve_forever, daemon=True).start()
    fields = {"outputs": ["depth_png16", "camera"], "output_size": "model", "processing_res": 126}
    job = json.dumps({"input": {"image_base64": PHOTO, **fields}})
    status, output = lean.run(
        "-m", "da3_runtime.handler", "--test_input", job, MAX_RESPONSE_BYTES="10000",
        BUCKET_ENDPOINT_URL=f"http://127.0.0.1:{bucket.server_port}", BUCKET_ACCESS_KEY_ID="id",
        BUCKET_SECRET_ACCESS_KEY="x",
    )  # fmt: skip
    bucket.shutdown()
    bucket.server_close()
    assert status == 0, output
    assert "intrinsics" in output
    assert "depth_png16_url" in output
    assert bucket.put


def test_lean_without_an_engine_reports_what_is_missing(lean, tmp_path):
    job = json.dumps({"input": {"image_base64": PHOTO}})
    status, output = lean.run("-m", "da3_runtime.handler", "--test_input", job, ENGINE_DIR=str(tmp_path))
    assert status == 1
    assert "torch" in output


def test_full_answers_with_eager_where_no_engine_exists(full):
    with Served(full) as served:
        answer = served.ask().json()
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"]["backend"] == "eager"
    assert any("eager ran instead" in warning for warning in answer["output"]["warnings"])


def test_lean_for_tensorrt_has_only_its_library_and_all_that_the_fake_one_has(engine, tmp_path):
    """TensorRT's own bindings differ only in what builds; without its libraries they cannot be imported."""
    lean_for_tensorrt = Container(packages_of("tensorrt-lean"), tmp_path / "image", engine.engine_dir)
    fakes = {
        "ICudaEngine": fake_gpu.Engine,
        "IExecutionContext": fake_gpu.Context,
        "Runtime": fake_gpu.Runtime,
    }
    wanted = {
        real: [name for name in vars(fake) if not name.startswith("_") and name not in fake_gpu.OWN]
        for real, fake in fakes.items()
    }
    wanted["Runtime"].remove("get_engine_validity")  # the runner asks whether it exists
    wanted["ICudaEngine"] += ["num_io_tensors", "num_optimization_profiles"]
    wanted["IExecutionContext"] += ["active_optimization_profile"]
    code = f"""
from importlib.util import find_spec
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
import tensorrt_lean_bindings as library
print([name for name in ('torch', 'tensorrt', 'tensorrt_rtx') if find_spec(name)])
print(TensorRT.unavailable())
print(TensorRTRTX.unavailable())
print([(cls, name) for cls, names in {wanted}.items() for name in names
       if not hasattr(getattr(library, cls), name)])
print(library.ExecutionContextAllocationStrategy.USER_MANAGED is not None,
      library.ILogger.Severity.ERROR is not None, library.uint8 != library.float32, library.__version__)
"""
    status, output = lean_for_tensorrt.run("-c", code)
    assert status == 0, output
    other, tensorrt, tensorrt_rtx, absent, constants = output.splitlines()
    assert (other, absent) == ("[]", "[]")
    assert "not installed" in tensorrt_rtx
    assert has_cuda_driver() or ("driver" in tensorrt and "not installed" not in tensorrt)
    # The image that builds plans has the same release: its plans run in no other.
    assert constants == f"True True True {pins('cuda')['tensorrt-cu12']}"
    with Served(lean_for_tensorrt) as served:
        assert served.ask().json()["status"] == "COMPLETED"


def test_the_fake_gpu_has_only_what_cuda_bindings_have(lean):
    functions = [name for name in vars(fake_gpu.Cudart) if name.startswith("cuda")]
    statuses = {status.name: int(status) for status in fake_gpu.Status}
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
    assert has_cuda_driver() or refused == "[35]", "the functions can be called without a driver"


def test_modules_without_a_file_are_not_compiled(tmp_path):
    """PyTorch has such modules."""
    package = tmp_path / "da3_runtime" / "util"
    package.mkdir(parents=True)
    (package / "runpod_sdk.py").write_text("def import_sdk(): pass\n")
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
