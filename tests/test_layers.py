"""The lines between the layers."""

import ast
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

RUNTIME = sorted((ROOT / "runtime" / "da3_runtime").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT / "runtime").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_packages(path):
    """Top-level packages that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", RUNTIME, ids=module_name)
def test_runtime_never_imports_export(path):
    assert "da3_export" not in imported_packages(path)


def test_no_package_imports_the_training_of_the_bundled_model():
    exporter = sorted((ROOT / "export" / "da3_export").rglob("*.py"))
    assert len(exporter) > 20
    for path in (*RUNTIME, *exporter):
        assert "tools" not in imported_packages(path), path


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


def test_no_file_looks_inside_a_model_id():
    for path in [*RUNTIME, *(ROOT / "export").rglob("*.py")]:
        if path.name == "variants.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
                assert node.left.value not in (
                    "small",
                    "base",
                    "large",
                    "giant",
                    "nested",
                    "metric",
                    "mono",
                )


@pytest.mark.parametrize("package", ["da3_runtime", "da3_export", "benchmarks"])
def test_onnxruntime_keeps_to_itself(package, tmp_path, engine):
    """It would keep an id of the machine in the home folder, and send what it sees of models."""
    (model,) = (engine.engine_dir / "da3-nano" / "dpt").glob("*.fp32.onnx")
    code = (
        f"import {package}, onnxruntime\n"
        f"onnxruntime.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider'])"
    )
    # Among what is left out are the variables by which it knows a test.
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert list(tmp_path.rglob("*")) == []
