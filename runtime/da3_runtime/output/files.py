"""Outputs as files that can be read alone: their endings, and PNGs that carry their own scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from da3_runtime.output.encode import Encoded, Output, Wanted, encode_outputs
from da3_runtime.output.png import chunk
from da3_runtime.postprocess.depth import Prediction

ENDINGS = {output: output.row.ending for output in Output if output.row.ending}
_AFTER_HEADER = 33  # a PNG's signature (8 bytes) and header chunk (25)


def output_of(name: str) -> Output | None:
    """The output that a file of this name holds, by its ending; None if no output has the ending."""
    name = name.lower()
    by_length = sorted(ENDINGS.items(), key=lambda each: -len(each[1]))
    return next((output for output, ending in by_length if name.endswith(ending)), None)


def described_outputs(
    predictions: Sequence[Prediction], wanted: Wanted, names: Sequence[str]
) -> Iterator[Encoded]:
    """As :func:`encode_outputs`, with files that can be read alone; see :func:`self_describing`."""
    for each in encode_outputs(predictions, wanted, names):
        file = each.file and self_describing(each.file, each.facts, predictions[0].depth.unit)
        yield replace(each, file=file)


def self_describing(file: bytes, facts: Mapping[str, object], unit: str) -> bytes:
    """A file with its scales and unit inside, if it is a PNG that needs them.

    Parameters
    ----------
    facts : Mapping[str, object]
        Facts that the encoder returned, such as ``depth_scale`` or ``confidence_scale``.
    unit : str
        Unit of the depth.

    Returns
    -------
    bytes
        The PNG with one text chunk (tEXt, PNG specification 11.3.3.2) per fact, and ``unit`` beside a
        ``depth_scale``; any other file as it is.
    """
    texts = {name: repr(value) for name, value in facts.items() if name.endswith("_scale")}
    if "depth_scale" in texts:
        texts["unit"] = str(unit)
    parts = [file[:_AFTER_HEADER]]
    for text in texts.items():
        parts += chunk(b"tEXt", "\0".join(text).encode("latin-1"))
    return b"".join((*parts, file[_AFTER_HEADER:]))
