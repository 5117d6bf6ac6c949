"""Options, shell completion and exit codes that the commands da3-runtime and da3-export share.

An option that is a setting overrides the environment variable of the same name, so the settings check
both. This module imports only the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from da3_runtime.errors import DA3Error, SettingError
from da3_runtime.util.extras import not_installed
from da3_runtime.variants import DEFAULT_MODEL

if TYPE_CHECKING:
    from da3_runtime.settings import Settings

Verbs = argparse._SubParsersAction  # the type that add_subparsers returns

# Disk errors: reported as one sentence, not as a traceback.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}

CLOSED_PIPE = 128 + 13  # SIGPIPE's number

# Option -> help text, with its default last; its variable has the same name in capitals.
OPTIONS = {
    "model": f"model id or hub repository; default {DEFAULT_MODEL}",
    "head": "head of the network, dpt or sdt; default dpt",
    "weights": "hub, random:SEED (da3-export only), a folder or a .safetensors file",
    "sdt_weights": "random:SEED (da3-export only), or the .safetensors file of a fine-tuned SDT head",
    "revision": "branch, tag or commit of the hub repository",
    "ray_pose": "1 to take the camera from the ray branch; default 0",
    "engine_dir": "folder of the engine folders; default engines",
    "backend": "run this backend only; default auto",
    "precision": "faster and less exact on a CPU: bf16 or int8; default auto",
    "processing_res": "longest side of the model's input in pixels; default 504, da3-nano's 168",
    "threads": "CPU threads of a backend, 0 for all cores; default 0",
}
ENGINE_OPTIONS = (
    "model",
    "head",
    "weights",
    "sdt_weights",
    "revision",
    "ray_pose",
    "engine_dir",
)
RUN_OPTIONS = (*ENGINE_OPTIONS, "threads", "backend", "precision", "processing_res")


def add_options(parser: argparse.ArgumentParser, names: Iterable[str], **texts: str) -> None:
    """Add options that are settings; the settings parse their values later.

    Parameters
    ----------
    names : Iterable[str]
        Names of options in :data:`OPTIONS` or ``texts``.
    **texts : str
        Help texts of further options, or instead of those in :data:`OPTIONS`.
    """
    for name in names:
        variable, text = name.upper(), texts.get(name) or OPTIONS[name]
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=variable, metavar=variable, help=f"{text} (variable {variable})")


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """The environment, overridden by the given options: arguments with a name in capitals."""
    given = {name: value for name, value in vars(args).items() if name.isupper() and value is not None}
    env = {**os.environ, **given}
    # An option overrides both variables of its setting.
    for option, other in (("MODEL", "MODEL_ID"), ("HEAD", "USE_SDT_HEAD")):
        if option in given:
            env.pop(other, None)
    return env


def settings_of(args: argparse.Namespace, own_files: bool = False) -> Settings:
    """Settings from the environment and the given options; raises as ``Settings.from_env``.

    Parameters
    ----------
    own_files : bool
        Whether the images are the user's own files, whose limits have larger defaults.
    """
    from da3_runtime.settings import Settings

    return Settings.from_env(environment_of(args), own_files=own_files)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log to stderr, one line with the time for each message."""
    style = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=style, stream=sys.stderr)


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: Any = None,
    ) -> None:
        try:
            import shtab  # type: ignore[import-not-found]
        except ModuleNotFoundError:
            parser.error(f"{not_installed('shtab')}.")
        for each in _with_verbs(parser):
            for action in each._actions:
                if action.type is Path:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, values))
        parser.exit()


def _with_verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    verbs = [
        each
        for action in parser._actions
        if isinstance(action, Verbs)
        for each in action.choices.values()
    ]
    return [parser, *verbs]


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add ``--print-completion``."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a completion script for this shell, and exit",
    )


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse a command line, run its verb, and return the exit code.

    If the reader of stdout stops early, as ``head`` does, the command ends without a message. Its exit
    code is then the one that a shell reports for SIGPIPE.
    """
    try:
        try:
            args = parser.parse_args(argv)
            return run_verb(args.run, args)
        finally:
            _flush()
    except BrokenPipeError:
        _drop_rest()
        return CLOSED_PIPE


def _flush() -> None:
    if sys.stdout is not None:  # None: the shell has closed it
        sys.stdout.flush()


def _drop_rest() -> None:
    """Drop text that stdout refuses, so that the interpreter's own flush at its end succeeds."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_verb(verb: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a verb and return its exit code; an expected error becomes one sentence on stderr."""
    # Pillow warns about damaged metadata, which nobody can act on, and about large images.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        code = verb(args)
        _flush()
        return code
    except DA3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error.name or str(error))}.", file=sys.stderr)
        return SettingError.exit_code
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        name = f"{Path(error.filename).name}: " if isinstance(error.filename, str) else ""
        print(f"error: {name}{error.strerror}.", file=sys.stderr)
        _drop_rest()
        return DA3Error.exit_code
    except BaseException as error:
        if not _is_interruption(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130


def _is_interruption(error: BaseException | None) -> bool:
    """Whether the user stopped the verb, even if that caused another error in the running code."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
