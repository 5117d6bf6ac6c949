"""``da3-runtime scene``: several photos of one scene -> their depths and cameras."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from da3_runtime.commands.depth import add_output_options, find_wanted, log_to_stderr, write_outputs
from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, settings_of
from da3_runtime.errors import SettingError
from da3_runtime.util.files import write_atomically

SCENE = "scene"  # name of the files of the whole scene, without their endings
SCENE_NAME = f"{SCENE}.json"
# Facts that each view has of its own.
_OF_A_VIEW = ("min_depth", "max_depth", "unit", "is_metric", "focal_source")


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "scene",
        help="compute depth and cameras of several photos of one scene",
        description="The network sees all photos together: their depths agree, and their cameras have "
        f"one world. Writes the outputs of each photo, and {SCENE_NAME} with all cameras, to the folder "
        "OUT; prints the content of that file as one JSON line.",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="PHOTO", help="photos, or folders of photos"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    add_output_options(parser, "preview,depth_png16,confidence")
    parser.add_argument(
        "--reference",
        default="auto",
        help="photo that the cameras refer to: auto, first, middle, or its number from 0; default auto",
    )
    parser.add_argument(
        "--cameras",
        type=Path,
        help="known cameras, whose unit the depth gets: a folder with COLMAP's cameras.txt and "
        "images.txt, or a scene.json",
    )
    parser.add_argument("--verbose", action="store_true", help="log why backends were skipped")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files and print the scene; exit code 0."""
    from da3_runtime.api.response import facts_of
    from da3_runtime.commands.depth_tasks import find_tasks
    from da3_runtime.image.cameras import cameras_of, lenses_and_poses
    from da3_runtime.inference.estimator import Estimator, Timings
    from da3_runtime.inference.scene import reference_index
    from da3_runtime.postprocess.camera import Camera

    log_to_stderr(args.verbose)
    settings = settings_of(args, own_files=True)
    wanted = find_wanted(args)
    if args.out.suffix.lower() == ".png":
        raise SettingError(f"--out {args.out}: a scene needs a folder.")
    tasks = find_tasks(args.images, args.out).tasks
    reference_index(args.reference, len(tasks))
    known = cameras_of(args.cameras, [task.source for task in tasks]) if args.cameras else None
    timings = Timings()
    with timings.stage("load"):
        estimator = Estimator.load(settings.engine, settings.images, settings.inference)
    with timings.stage("decode"):
        photos = [estimator.read(task.source) for task in tasks]
    lenses, extrinsics = None, None
    if known is not None:
        lenses, extrinsics = lenses_and_poses(known, [photo.rgb.shape[1::-1] for photo in photos])
    estimate = estimator.estimate_scene(
        photos,
        timings,
        lenses=lenses,
        extrinsics=extrinsics,
        reference=args.reference,
        maps=wanted.maps,
    )
    views = []
    own, common = (wanted.only(of_scene=of_scene) for of_scene in (False, True))
    names = [(task.target.parent / task.source.name).relative_to(args.out).as_posix() for task in tasks]
    with timings.stage("encode"):
        # First, so that nothing is written if no points can be made.
        together = [view.prediction for view in estimate.views]
        files, _ = write_outputs(together, common, args.out / SCENE, names)
        for task, view, name in zip(tasks, estimate.views, names, strict=True):
            prediction = view.prediction
            facts = facts_of(prediction, estimator.loaded)
            written, more = write_outputs([prediction], own, task.target, [name])
            camera = None if view.camera is None else view.camera.as_lists()
            views.append(
                {
                    "image": str(task.source),
                    "width": view.width,
                    "height": view.height,
                    **(camera or dict.fromkeys(Camera._fields)),
                    "crop": [view.left, view.top, facts["width"], facts["height"]],
                    **{name: facts[name] for name in _OF_A_VIEW},
                    **written,
                    "warnings": [*prediction.warnings, *more],
                }
            )
    shared = {
        name: value for name, value in facts.items() if name not in (*_OF_A_VIEW, "width", "height")
    }
    scene = {
        "reference": estimate.reference,
        **files,
        **shared,
        "views": views,
        "timings_ms": timings.ms,
    }
    text = json.dumps(scene)
    try:
        write_atomically(args.out / SCENE_NAME, (text + "\n").encode())
    except OSError as error:
        raise SettingError(f"{args.out}: {error.strerror or 'cannot be written'}.") from None
    print(text)
    return 0
