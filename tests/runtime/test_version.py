"""The package's version is shown everywhere."""

import da3_runtime
from da3_runtime.serve.http_server import make_app
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from tests.support.paths import NANO
from tests.support.processes import run_module


def test_the_command_line_and_the_server_say_it():
    done = run_module("da3_runtime", "--version")
    assert (done.code, done.stdout) == (0, f"da3-runtime {da3_runtime.__version__}\n")
    app = make_app(Service(Settings.of(model_id=NANO)), loading=None)
    assert app.openapi()["info"]["version"] == da3_runtime.__version__
