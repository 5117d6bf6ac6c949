"""The HTTP server behaves as its OpenAPI document says, whatever is sent; ``make fuzz`` sends more."""

import os
import threading

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from da3_runtime.serve.http_server import make_app

EXAMPLES = 200 if os.environ.get("FUZZ") else 24  # of each operation
EXCLUDED = {
    # The bytes of an image have no schema: of images that satisfy it, nearly all are damaged.
    "/runsync": ["positive_data_acceptance"],
    # A job that is only queued is checked when it runs, as on RunPod.
    "/run": ["negative_data_rejection"],
}


def test_every_response_is_documented(serve):
    service = serve()
    service.load_default()
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service, threading.Thread()))
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:
        excluded = [CHECKS.get_one(name) for name in EXCLUDED.get(operation.path, [])]
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            check(operation, mode, excluded, EXAMPLES // len(modes))


def check(operation, mode, excluded, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def run(case):
        case.call_and_validate(excluded_checks=excluded)

    run()
