"""The two packages as wheels, installed into environments with what they declare and nothing else."""

import ast
import filecmp
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.metadata import Metadata
from packaging.utils import canonicalize_name

import da3_export
import da3_runtime
from da3_runtime.variants import VARIANTS
from tests.support.environments import closure, make_venv
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import clean_env

FOLDERS = {"da3_runtime": ROOT / "runtime", "da3_export": ROOT / "export"}
# Not declared, with the reason in export/pyproject.toml; and TensorRT, whose import name its metadata does not have.
UNDECLARED = {"depth_anything_3"}
IMPORT_NAMES = {"tensorrt": "tensorrt-cu12", "tensorrt_rtx": "tensorrt-rtx-cu12"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Each package's wheel and its metadata."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in FOLDERS.values():
        line = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(folder),
        ]
        subprocess.run(line, cwd=source, check=True, capture_output=True)
    found = {}
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = Metadata.from_email(archive.read(name), validate=True)
            found[path.name.split("-")[0]] = SimpleNamespace(
                path=path, metadata=metadata, files=archive.namelist()
            )
    assert set(found) == set(FOLDERS)
    return found


def needed(wheel, *extras):
    """What a wheel's metadata declares for some of its extras, its own extras resolved."""
    own = {"da3-runtime", "da3-export"}
    waiting, seen, texts = ["", *extras], set(), []
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for each in wheel.metadata.requires_dist:
            if each.marker.evaluate({"extra": extra}) if each.marker else extra == "":
                if canonicalize_name(each.name) in own:
                    waiting += each.extras if each.name == wheel.metadata.name else []
                else:
                    texts.append(f"{each.name}[{','.join(each.extras)}]{each.specifier}")
    return texts


class Environment:
    """An environment, entered outside the checkout."""

    def __init__(self, folder, wheels, requirements):
        self.packages, self.absent = closure(requirements)
        self.bin = make_venv(folder / "venv", [wheel.path for wheel in wheels], self.packages)
        self.folder = folder

    def run(self, command, *args, **env):
        env = {name: value for name, value in clean_env(**env).items() if name != "PYTHONPATH"}
        line = [str(self.bin / command), *args]
        return subprocess.run(
            line, cwd=self.folder, env=env, capture_output=True, text=True, timeout=240
        )


@pytest.fixture(scope="module")
def base(wheels, tmp_path_factory):
    """`pip install da3-runtime`."""
    runtime = wheels["da3_runtime"]
    return Environment(tmp_path_factory.mktemp("base"), [runtime], needed(runtime))


@pytest.fixture(scope="module")
def whole(wheels, tmp_path_factory):
    """`pip install da3-runtime[cpu] da3-export`."""
    runtime, export = wheels["da3_runtime"], wheels["da3_export"]
    requirements = [*needed(runtime, "cpu", "eager"), *needed(export)]
    return Environment(tmp_path_factory.mktemp("whole"), [runtime, export], requirements)


def test_both_packages_have_one_version(wheels):
    version = da3_runtime.__version__
    assert da3_export.__version__ == version
    assert {str(wheel.metadata.version) for wheel in wheels.values()} == {version}
    declared = [str(each) for each in wheels["da3_export"].metadata.requires_dist]
    assert f"da3-runtime[eager]=={version}" in declared
    assert version in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_contains_every_file_of_its_package(wheels, package):
    folder = FOLDERS[package]
    tree = {
        str(path.relative_to(folder))
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{package}/py.typed" in tree
    in_wheel = {name for name in wheels[package].files if not name.split("/")[0].endswith(".dist-info")}
    assert in_wheel == tree


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_carries_the_license_and_the_notice(wheels, package):
    names = {Path(name).name for name in wheels[package].files if ".dist-info/licenses/" in name}
    assert names == {"LICENSE", "NOTICE"}
    for name in names:
        assert filecmp.cmp(ROOT / name, FOLDERS[package] / name, shallow=False), f"copy {name} there"


def test_the_notice_names_every_checkpoint_with_its_license():
    notice = (ROOT / "NOTICE").read_text()
    for model, variant in VARIANTS.items():
        source = re.escape(variant.repo or model) + ("" if variant.repo else ".*")
        assert re.search(rf"^{source}: {re.escape(variant.license)}$", notice, re.MULTILINE), model


def imported(folder):
    """Top-level names of the packages that a folder's modules import anywhere."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(FOLDERS)


@pytest.mark.parametrize("package", FOLDERS)
def test_every_package_that_is_imported_is_declared(wheels, package):
    requirements = wheels[package].metadata.requires_dist
    declared = {canonicalize_name(each.name) for each in requirements}
    if package == "da3_export":
        # ONNX Runtime is another package on a GPU: the user chooses it with da3-runtime.
        declared |= {"onnxruntime"}
    known = packages_distributions()
    for name in imported(FOLDERS[package] / package) - UNDECLARED:
        providers = {canonicalize_name(each) for each in known.get(name, [IMPORT_NAMES.get(name, name)])}
        assert providers & declared, name


def test_the_metadata_of_what_is_installed_is_consistent(whole):
    line = [sys.executable, "-m", "pip", "--python", str(whole.bin / "python"), "check"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not whole.absent


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "eager"])
def test_the_installed_command_runs_a_photo(whole, engine, backend):
    args = ("--model", NANO, "--engine-dir", str(engine.engine_dir), "--out", f"{backend}.png")
    done = whole.run("da3-runtime", "depth", *args, str(PHOTOS / "coffee.jpg"), BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert f'"{backend}"' in done.stdout
    assert (whole.folder / f"{backend}.png").stat().st_size > 1000


def test_the_installed_commands_report_their_version(whole):
    done = whole.run("da3-runtime", "--version")
    assert (done.returncode, done.stdout.split()[-1]) == (0, da3_runtime.__version__)
    done = whole.run("da3-export", "engines", "--model", "no-such-model")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr


def test_the_base_install_imports_and_names_the_missing_extra(base, engine):
    assert not base.absent
    assert {"onnxruntime", "torch", "fastapi", "runpod", "safetensors"}.isdisjoint(base.packages)
    assert base.run("python", "-c", "import da3_runtime").returncode == 0
    args = ("--model", NANO, "--engine-dir", str(engine.engine_dir), str(PHOTOS / "coffee.jpg"))
    for extra, verb in {"cpu": ("depth", *args), "serve": ("serve", *args[:4])}.items():
        done = base.run("da3-runtime", *verb, DA3_ALLOW_ANONYMOUS="1")
        assert done.returncode != 0
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"da3-runtime[{extra}" in done.stderr


def test_the_extra_serve_is_enough_for_the_server_and_for_image_url(wheels, tmp_path):
    runtime = wheels["da3_runtime"]
    serve = Environment(tmp_path, [runtime], needed(runtime, "cpu", "serve"))
    code = (
        "from da3_runtime.image.fetch import import_downloader\n"
        "import da3_runtime.serve.http_server, da3_runtime.serve.runpod_worker\n"
        "import_downloader()"
    )
    done = serve.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
