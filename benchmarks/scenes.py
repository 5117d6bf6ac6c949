"""Compares scenes of several views on backends with eager FP32 on the same device.

    ENGINE_DIR=engines python -m benchmarks.scenes --device cuda --models da3-nano,da3-small

The scenes are those of parity, with known cameras too. Every scene runs twice. First the network chooses
the reference view; the result says how often the choice is that of eager FP32. Then the reference is the
choice of eager FP32, and every output must be within the tolerance of its precision
(:mod:`da3_export.parity.tolerances`): another reference is another frame and other depths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.backends import options_of, parser
from benchmarks.contenders import BEFORE_PREFIX, ENGINE_BACKENDS, make_contender
from benchmarks.record import RESULTS, installed, provenance, reason, write_result
from benchmarks.reference import without_tf32
from benchmarks.report import PACKAGES
from da3_export.parity import subjects
from da3_export.parity.cases import Case, all_cases, case_cameras, case_images
from da3_export.parity.reference import Reference
from da3_export.parity.report import Row, compare
from da3_export.util.progress import aligned
from da3_runtime.backends.eager import Eager
from da3_runtime.commands.options import run_verb
from da3_runtime.network.load import load_network
from da3_runtime.network.precision import FP32
from da3_runtime.network_io import Conditions, RawOutputs
from da3_runtime.postprocess.poses import encode_poses
from da3_runtime.settings import Settings
from da3_runtime.store.engine_weights import engine_checkpoint
from da3_runtime.store.find_engine import find_engine
from da3_runtime.variants import Head, Variant

SUBJECTS = {"fp32": subjects.FP32, "fp16": subjects.FP16}
SCENES = [case for case in all_cases(large=True, known=True) if case.views > 1]


def given_of(case: Case) -> Conditions:
    """The known cameras of a case; the network chooses the reference view."""
    given = Conditions.none(case.batch, case.views)
    cameras = case_cameras(case)
    if cameras is not None:
        given.poses[0] = encode_poses(*cameras, case.height, case.width)
    return given


def references(variant: Variant, engine_dir: Path, device: str) -> list[RawOutputs]:
    """Outputs of eager FP32 for every scene, TF32 off."""
    (graph,) = variant.graphs
    settings = Settings.of(model_id=variant.model_id, engine_dir=engine_dir).engine
    folder, _ = find_engine(settings)
    checkpoint = engine_checkpoint(folder, settings)
    network = load_network(variant, graph, checkpoint.path, FP32).to(device)
    eager = Eager(network, device, checkpoint.trained)
    with without_tf32():
        outputs = [eager.run(case_images(case), given_of(case)) for case in SCENES]
    eager.close()
    return outputs


def measure_backend(
    name: str, variant: Variant, engine_dir: Path, before: Path | None, wanted: Sequence[RawOutputs]
) -> dict[str, object]:
    """Parity of one contender on every scene."""
    result: dict[str, object] = {"model": variant.model_id, "contender": name}
    rows: list[Row] = []
    agreed = 0
    try:
        loaded = make_contender(name, variant, Head.DPT, engine_dir, engine_dir, before).load()
        subject = SUBJECTS[loaded.backend.precision]
        for case, want in zip(SCENES, wanted, strict=True):
            images, given = case_images(case), given_of(case)
            (free,) = loaded.run(images, given).values()
            assert want.reference is not None
            assert free.reference is not None
            agreed += bool(np.array_equal(free.reference, want.reference))
            (forced,) = loaded.run(images, Conditions(want.reference, given.poses)).values()
            # A margin of zero: the reference view was given.
            rows += compare(subject, case, forced, Reference(want, 0.0, case_cameras(case)))
        loaded.close()
    except Exception as error:  # any error of a library goes into the report
        return {**result, "why": reason(error)}
    artefact = loaded.backend.artefact
    worst = {row.output: row for row in sorted(rows, key=lambda row: row.severity)}
    return {
        **result,
        "artefact": None if artefact is None else artefact.name,
        "precision": loaded.backend.precision,
        "ok": all(row.ok for row in rows),
        "scenes": len(SCENES),
        "same_reference": agreed,
        "worst": [asdict(row) for row in worst.values()],
    }


def measure(args: argparse.Namespace) -> int:
    """Measure every model and contender, print a table, and write the result file."""
    if not args.contenders:
        engines = ENGINE_BACKENDS[args.device][-1]
        args.contenders = f"{BEFORE_PREFIX}{engines},{engines}" if args.before else engines
    options = options_of(args)
    engine_dir = Settings.from_env().engine.engine_dir
    results: list[dict[str, object]] = []
    for variant in options.models:
        wanted = references(variant, engine_dir, options.device)
        results += [
            measure_backend(name, variant, engine_dir, options.before, wanted)
            for name in options.contenders
        ]
        # After each model, so that a later failure costs only its own.
        write_result(
            options.out,
            {**provenance(installed(PACKAGES)), "device_kind": options.device, "rows": results},
        )
    lines = [("model", "contender", "artefact", "parity", "same reference view", "worst mean")]
    for each in results:
        if "why" in each:
            lines.append((str(each["model"]), str(each["contender"]), "-", str(each["why"]), "-", "-"))
            continue
        assert isinstance(each["worst"], list)
        mean = max(row["mean"] for row in each["worst"])
        verdict = "ok" if each["ok"] else "OUT OF TOLERANCE"
        same = f"{each['same_reference']} of {each['scenes']}"
        what = (str(each["model"]), str(each["contender"]), str(each["artefact"]))
        lines.append((*what, verdict, same, f"{mean:.1e}"))
    print(aligned(lines))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, which is that of ``benchmarks.backends``, and measure."""
    root = parser()
    root.prog, root.description = "python -m benchmarks.scenes", __doc__
    root.set_defaults(models="da3-nano", out=RESULTS / "gpu_scenes.json")
    return run_verb(measure, root.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
