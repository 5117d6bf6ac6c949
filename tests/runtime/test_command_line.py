"""The commands da3-runtime and da3-export: verbs, help, completion, exit codes."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import da3_export.__main__
import da3_runtime.__main__
from da3_runtime.commands.options import CLOSED_PIPE, Verbs, run_verb, settings_of
from da3_runtime.errors import ImageError
from da3_runtime.output.encode import Output
from da3_runtime.util.extras import EXTRAS, not_installed
from da3_runtime.variants import DEFAULT_MODEL, NON_COMMERCIAL, VARIANTS
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env, run_module

COMMANDS = {
    "da3-runtime": (
        da3_runtime.__main__,
        ["depth", "batch", "scene", "video", "serve", "prefetch", "warmup"],
    ),
    "da3-export": (
        da3_export.__main__,
        ["engines", "parity", "list", "publish", "distill-sdt", "evaluate"],
    ),
}
HELPS = [(name, *verb) for name, (_, verbs) in COMMANDS.items() for verb in ([], *([v] for v in verbs))]
HEAVY = {"numpy", "torch", "cv2", "PIL", "pydantic", "onnx", "onnxruntime", "tqdm", "shtab"}


def verbs_of(parser):
    (action,) = [each for each in parser._actions if isinstance(each, Verbs)]
    return action.choices


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_verbs_each_with_help_for_every_option(name):
    module, verbs = COMMANDS[name]
    parser = module.parser()
    assert parser.prog == name
    assert list(verbs_of(parser)) == verbs
    for verb in verbs_of(parser).values():
        assert callable(verb.get_default("run"))
        assert all(action.help for action in verb._actions)


@pytest.mark.parametrize("line", HELPS, ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(line):
    name, *verb = line
    code = (
        f"import sys, time; from {COMMANDS[name][0].__name__} import main\n"
        f"try: main({[*verb, '--help']!r})\n"
        "except SystemExit as end: code = end.code\n"
        f"print(code, sorted({HEAVY!r} & set(sys.modules)), time.process_time() < 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 [] True"
    assert done.stdout.startswith(f"usage: {' '.join(line)}")


def test_every_verb_uses_one_default_model_which_may_be_used_commercially():
    assert VARIANTS[DEFAULT_MODEL].license != NON_COMMERCIAL
    assert settings_of(argparse.Namespace()).engine.model_id == DEFAULT_MODEL
    for name, verb in verbs_of(da3_runtime.__main__.parser()).items():
        (option,) = [action for action in verb._actions if "--model" in action.option_strings]
        assert f"; default {DEFAULT_MODEL} (variable MODEL)" in option.help, name


@pytest.mark.parametrize(
    ("module", "args", "called"),
    [
        ("da3_runtime.serve.http_server", ["serve"], "serve"),
        ("da3_runtime.serve.http_server", [], "serve"),
        ("da3_runtime.commands.prefetch", ["prefetch"], "prefetch"),
        ("da3_runtime.commands.depth_run", ["depth", "a.jpg"], "depth_of_files"),
    ],
)
def test_a_verb_without_a_model_runs_the_default_model(module, args, called, monkeypatch):
    given = []
    monkeypatch.setattr(f"{module}.{called}", lambda settings, *_, **__: given.append(settings) or 0)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for variable in ("MODEL", "MODEL_ID"):
        monkeypatch.delenv(variable, raising=False)
    assert da3_runtime.__main__.main(args) == 0
    assert getattr(given[0], "engine", given[0]).model_id == DEFAULT_MODEL


def test_an_unknown_output_lists_them_all(capsys):
    assert da3_runtime.__main__.main(["depth", "photo.jpg", "--outputs", "x"]) == 2
    listed = capsys.readouterr().err.partition("is not one of: ")[2].strip().rstrip(".")
    assert listed.split(", ") == list(Output)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_know_every_verb(name, shell, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    module, verbs = COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        module.main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert ended.value.code == 0
    assert name in script
    assert all(verb in script for verb in verbs)


def test_completion_in_bash_completes_a_verb(tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed")
    done = run_module("da3_runtime", "--print-completion", "bash")
    (tmp_path / "completion").write_text(done.stdout)
    script = (
        f"source {tmp_path / 'completion'}; COMP_WORDS=(da3-runtime pre); COMP_CWORD=1; "
        '_shtab_da3_runtime; echo "${COMPREPLY[@]}"'
    )
    completed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout == "prefetch\n"


def test_without_shtab_completion_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        da3_runtime.__main__.main(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert 'shtab is not installed: pip install "shtab"' in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_code_of_a_bad_command_line_is_2(name, capsys):
    for line in (["nonsense"], ["--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            COMMANDS[name][0].main(line)
        assert ended.value.code == 2
        assert f"usage: {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ImageError("no image"), 2, "error: no image\n"),
        (
            ModuleNotFoundError(name="fastapi"),
            2,
            'fastapi is not installed: pip install "da3-runtime[serve]".',
        ),
        (ModuleNotFoundError(name="onnxruntime.capi"), 2, 'pip install "da3-runtime[cpu]".'),
        (
            ModuleNotFoundError(name="some_thing"),
            2,
            'some_thing is not installed: pip install "some-thing".',
        ),
        (OSError(28, "No space left on device"), 1, "error: No space left on device.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_expected_error_is_one_sentence_and_an_exit_code(error, code, message, capsys):
    def fail(_):
        raise error

    assert run_verb(fail, None) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def run_into(stdout, line):
    name, *args = line
    return subprocess.run(
        [sys.executable, "-m", COMMANDS[name][0].__name__.partition(".")[0], *args],
        stdout=stdout, stderr=subprocess.PIPE, env=clean_env(PYTHONUNBUFFERED=""), cwd=ROOT, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        ["da3-runtime", "--version"],
        ["da3-runtime", "depth", "--help"],
        ["da3-runtime", "--print-completion", "bash"],
        ["da3-runtime", "prefetch", "--model", NANO],
        ["da3-export", "list", "--json"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe_ends_a_command_quietly(line):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_into(writer, line)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


def test_a_command_runs_without_a_stdout():
    line = shlex.join([sys.executable, "-m", "da3_runtime", "prefetch", "--model", NANO])
    done = subprocess.run(
        ["bash", "-c", f"{line} >&-"],
        env=clean_env(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        done = run_into(full, ["da3-runtime", "prefetch", "--model", NANO])
    assert (done.returncode, done.stderr) == (1, "error: No space left on device.\n")


def test_an_unexpected_error_is_not_hidden():
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_verb(fail, None)


def test_the_extra_of_a_backend_overrides_that_of_the_module():
    assert not_installed("onnxruntime") == 'onnxruntime is not installed: pip install "da3-runtime[cpu]"'
    assert not_installed("onnxruntime", "gpu").endswith('"da3-runtime[gpu]"')
    assert set(EXTRAS.values()) <= {
        "cpu",
        "gpu",
        "tensorrt-rtx",
        "tensorrt-lean",
        "openvino",
        "eager",
        "heif",
        "ray",
        "serve",
        "runpod",
        "video",
    }


def test_serve_without_its_extra_is_one_sentence():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from da3_runtime.__main__ import main; sys.exit(main(['serve', '--model', 'da3-nano']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == 'error: fastapi is not installed: pip install "da3-runtime[serve]".\n'


def test_warmup_exits_with_0_only_if_the_model_ran(engine, tmp_path, run_here):
    args = ("da3_runtime", "warmup", "--model", NANO)
    done = run_module(*args, ENGINE_DIR=str(engine.engine_dir))
    assert done.code == 0
    assert f"{NANO} is warm" in done.stderr
    unknown = run_here("da3_runtime", "warmup", "--model", "da3-tiny")
    assert (unknown.code, "da3-tiny" in unknown.stderr) == (2, True)
    nothing = run_here(*args, ENGINE_DIR=str(tmp_path), BACKEND="onnxruntime-cpu")
    assert (nothing.code, "Traceback" in nothing.stderr) == (2, False)


def test_list_prints_the_engines_as_a_table_and_as_json(engine, run_here):
    line = ("da3_export", "list", "--engine-dir", str(engine.engine_dir))
    assert NANO in run_here(*line).stdout
    assert any(NANO in json.dumps(row) for row in json.loads(run_here(*line, "--json").stdout))


def test_the_command_for_runpod_takes_its_options():
    done = subprocess.run(
        [sys.executable, "-m", "da3_runtime.handler", "--help"],
        cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--warmup" in done.stdout
