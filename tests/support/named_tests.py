"""Tests that docs/faults.md and claims.json name as ``PATH::NAME``."""

import ast
from functools import cache

from tests.support.paths import ROOT

NEEDS_GPU = "pytest.mark.gpu"


@cache
def tests_in(file: str) -> frozenset[str]:
    """Names of the tests in a file below ``tests`` that need no GPU. The file is parsed, not imported."""
    path = ROOT / "tests" / file
    body = ast.parse(path.read_text()).body if path.is_file() else []
    if any(isinstance(node, ast.Assign) and NEEDS_GPU in ast.unparse(node) for node in body):
        return frozenset()
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(NEEDS_GPU in ast.unparse(decorator) for decorator in node.decorator_list)
    )


def exists(name: str) -> bool:
    """Whether ``PATH::NAME`` is a test that needs no GPU."""
    file, _, test = name.partition("::")
    return test in tests_in(file)
