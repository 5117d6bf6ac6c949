"""The README says what the code does."""

import re

from da3_runtime.api.request import DepthRequest, takes
from da3_runtime.api.response import DepthResponse
from da3_runtime.settings import Settings
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def default_of(field):
    value = field.default
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def request_rows():
    fields = DepthRequest.model_fields.items()
    return [
        f"| `{name}` | {takes(name)} | {default_of(field)} | {field.description} |"
        for name, field in fields
    ]


def response_rows():
    return [f"| `{name}` | {field.description} |" for name, field in DepthResponse.model_fields.items()]


def test_every_field_of_request_and_response_has_its_row():
    for row in [*request_rows(), *(row for row in response_rows() if "_url`" not in row)]:
        assert row in README


def test_every_setting_of_the_environment_is_there():
    for variable in re.findall(r"``([A-Z0-9_]{4,})``", Settings.__doc__):
        assert re.search(rf"\b{variable}\b", README), variable


def test_every_command_of_the_makefile_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"^([a-z-]+):.*##", makefile, re.M)) - {"help", "format", "clean"}:
        assert re.search(rf"`(make )?{name}\b", README), name
