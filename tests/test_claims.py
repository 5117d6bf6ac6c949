"""Every claim has a known state and names tests that exist; test_docs.py compares the pages made of the claims."""

import re
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from da3_export.claims import PATH, Claim, State, claims, experience_with
from da3_export.parity.plans import BACKENDS
from da3_runtime.store.manifest import Kind, Parity
from tests.support.named_tests import exists
from tests.support.paths import ROOT


def test_the_words_for_states_are_those_of_the_manifest():
    assert [*State] == ["verified", "partly verified", "unverified"]
    assert {*Parity} < {*State}
    text = PATH.read_text().replace('"unverified"', '"not run"', 1)
    with pytest.raises(ValidationError, match="state"):
        TypeAdapter(list[Claim]).validate_json(text)


def test_every_row_is_a_line_and_another_claim():
    assert len(PATH.read_text().splitlines()) == len({claim.what for claim in claims()}) + 2


def test_every_named_test_exists_and_runs_without_a_gpu():
    named = {name for claim in claims() for name in claim.tests}
    assert len(named) > 100
    assert [name for name in named if not exists(name)] == []
    assert not exists("runtime/test_gpu.py::test_what_was_loaded_is_given_back"), "it needs a GPU"


def test_a_state_rests_on_something():
    """A verified claim has tests, or says that it was seen once; an unverified one was seen nowhere."""
    for claim in claims():
        if claim.state is State.VERIFIED:
            assert claim.tests or re.search(r"\bonce\b", claim.how), claim.what
        assert (claim.state is State.UNVERIFIED) == (claim.where == ""), claim.what
        assert not (claim.state is State.UNVERIFIED and claim.tests), claim.what
        assert claim.how, claim.what


def test_recorded_files_exist():
    named = {name for claim in claims() for name in re.findall(r"[\w.]+\.json\b", claim.how)}
    assert "gpu.json" in named
    assert [name for name in named if not (ROOT / "benchmarks" / "results" / name).is_file()] == []


def test_kinds_of_artefacts_that_may_not_be_measured_have_one_sentence_each():
    kinds = [kind for claim in claims() for kind in claim.artefacts]
    assert len(kinds) == len(set(kinds))
    assert {*BACKENDS, Kind.ONNX_BF16, Kind.ONNX_INT8, Kind.ONNX_FP16_ORT} == set(kinds)
    assert "run no TensorRT-RTX plan" in experience_with(Kind.TENSORRT_RTX)
    assert experience_with(Kind.ONNX_FP32) == ""


def test_the_six_most_important_claims_are_one_sentence_each():
    assert len([claim for claim in claims() if claim.readme]) == 6
    for claim in claims():
        if claim.readme or claim.artefacts:
            assert re.fullmatch(r"[A-Z]\S*( \S+)+\.", claim.short), claim.what
            assert len(claim.short.split()) <= 25


def test_reading_claims_loads_no_torch():
    code = "import sys, da3_export.claims as c; c.claims(); print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
