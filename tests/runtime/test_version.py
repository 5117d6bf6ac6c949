"""The version is said in one place and shown everywhere."""

import re

from setuptools.config.pyprojecttoml import read_configuration

import da3_runtime
from da3_runtime.serve.http_server import make_app
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from tests.conftest import NANO, ROOT, run_module


def test_the_package_has_the_runtime_s_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", da3_runtime.__version__)
    project = read_configuration(ROOT / "pyproject.toml", expand=True)["project"]
    assert project["version"] == da3_runtime.__version__
    assert da3_runtime.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_the_command_line_and_the_server_say_it():
    done = run_module("da3_runtime", "--version")
    assert (done.code, done.stdout) == (0, f"da3-engines {da3_runtime.__version__}\n")
    app = make_app(Service(Settings.of(model_id=NANO)), loading=None)
    assert app.openapi()["info"]["version"] == da3_runtime.__version__
