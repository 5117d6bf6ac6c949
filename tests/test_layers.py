"""Rules about imports and model ids that hold for every file of the two packages."""

import ast
import os
import re
import subprocess
import sys

import pytest

from da3_runtime.variants import VARIANTS
from tests.support.paths import ROOT

RUNTIME = sorted((ROOT / "runtime" / "da3_runtime").rglob("*.py"))
EXPORT = sorted((ROOT / "export" / "da3_export").rglob("*.py"))

# A module of da3_runtime imports only from its own folder and from lower floors.
FLOORS = (
    ("__init__", "__main__", "handler"),
    ("commands",),
    ("batch", "serve"),
    ("api",),
    ("inference",),
    ("backends", "image"),
    ("store", "output"),
    ("network", "postprocess"),
    ("settings",),
    ("*.settings",),  # the settings of one folder
    ("variants",),
    ("network_io",),
    ("util",),
    ("errors",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
NOT_INSTALLED = {"tools", "tests", "benchmarks", "scripts"}


def module_name(path):
    parts = path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """Full names of everything that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports are not used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module):
    """Folder and floor of a module, or of something that is imported from it."""
    parts = module.split(".")[1:]
    if not parts or parts[0] not in FLOOR:
        return "__init__", FLOOR["__init__"]
    key = "*.settings" if parts[1:2] == ["settings"] else parts[0]
    return parts[0], FLOOR[key]


@pytest.mark.parametrize("path", RUNTIME, ids=module_name)
def test_the_runtime_imports_only_from_lower_floors(path):
    folder, floor = place(module_name(path))
    for name in imported_modules(path):
        top = name.partition(".")[0]
        assert top not in {"da3_export", *NOT_INSTALLED}, name
        if top != "da3_runtime" or name == "da3_runtime.__version__":
            continue
        imported_folder, imported_floor = place(name)
        assert imported_folder == folder or imported_floor > floor, name


@pytest.mark.parametrize("path", EXPORT, ids=module_name)
def test_the_exporter_imports_only_installed_packages(path):
    assert not [name for name in imported_modules(path) if name.partition(".")[0] in NOT_INSTALLED]


def test_importing_the_runtime_loads_no_torch():
    lean = [
        module_name(p)
        for p in RUNTIME
        if ".network" not in module_name(p.parent) and p.name != "__main__.py"
    ]
    assert "da3_runtime.backends.eager" in lean
    assert "da3_runtime.inference.estimator" in lean
    heavy = "{'torch', 'depth_anything_3', 'onnx', 'tensorrt', 'tensorrt_rtx'}"
    code = f"import sys, {', '.join(lean)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["da3_export", "da3_runtime"])
@pytest.mark.parametrize("args", [["--help"], ["depth", "--help"], ["engines", "--help"], ["nonsense"]])
def test_help_and_bad_verbs_import_nothing_heavy(module, args):
    code = (
        f"import sys, runpy; sys.argv = ['x', *{args!r}]\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'cv2', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# Words of model ids, without "da3" itself: the brand is in names of packages, variables and headers.
ID_WORDS = {word for model in VARIANTS for word in model.split("-")} - {"da3"}
ID_WORDS |= {word.removeprefix("da3") for word in ID_WORDS}
# Constants that only look like a part of a model id.
NO_MODEL_ID = {"all", "is_metric", "base-uri 'none'"}  # MODEL=all; a field; a browser's policy
# The tables of facts about models.
TABLES = {"variants.py", "network/sizes.py", "store/releases.py"}


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def parts_of_model_ids(code):
    """String constants in code that are a model id or a part of one; sentences do not count."""
    tree = ast.parse(code)
    documentation = set(docstrings(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str | bytes):
            continue
        text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
        text = text.lower()
        if node in documentation or text in NO_MODEL_ID or re.search(r"\w\s+\w", text):
            continue
        words = set(re.findall(r"[a-z0-9]+", text))
        is_piece = len(text) > 2 and any(text in model for model in VARIANTS)
        if is_piece or words & ID_WORDS:
            yield text


@pytest.mark.parametrize("path", [*RUNTIME, *EXPORT], ids=module_name)
def test_no_file_looks_inside_a_model_id(path):
    if not any(path.as_posix().endswith(f"da3_runtime/{table}") for table in TABLES):
        assert list(parts_of_model_ids(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        'model_id.endswith("-giant")',
        'model_id.startswith("da3nested")',
        'model_id.startswith("da3n")',
        'model_id in ("da3-giant",)',
        '"giant" in model_id',
        're.search("giant", model_id)',
        're.search(r"^da3(nested|mono)-", model_id)',
        'match model_id:\n    case "da3-giant":\n        pass',
        'SIZES = {"DA3-LARGE": 1}',
        'f"{series}-giant" == model_id',
        'model_id.split("-")[1] == "small"',
    ],
)
def test_looking_inside_a_model_id_is_found(code):
    assert list(parts_of_model_ids(code))


@pytest.mark.parametrize("package", ["da3_runtime", "da3_export", "benchmarks"])
def test_onnxruntime_sends_and_stores_nothing(package, tmp_path, engine):
    """By default ONNX Runtime stores a machine id in the home folder and sends telemetry."""
    (model,) = (engine.engine_dir / "da3-nano" / "dpt").glob("*.fp32.onnx")
    code = (
        f"import {package}, onnxruntime\n"
        f"onnxruntime.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider'])"
    )
    # Without the variables by which ONNX Runtime detects a test run.
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert list(tmp_path.rglob("*")) == []
