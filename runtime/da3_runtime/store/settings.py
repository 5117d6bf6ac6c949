"""Settings of an engine: which model, from which weights, on which backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic.dataclasses import dataclass

from da3_runtime.errors import SettingError
from da3_runtime.store.hub import CACHED_MODELS_DIR
from da3_runtime.util.setting_group import AUTO, CONFIG, Flag, Name, make_group, one_of, setting
from da3_runtime.variants import DEFAULT_MODEL, Head, find_variant


@dataclass(frozen=True, config=CONFIG)
class EngineSettings:
    """What finds and loads an engine."""

    title: ClassVar[str] = "Model, engine and backend"

    _: KW_ONLY
    model_id: str = setting(
        DEFAULT_MODEL,
        "Model to run, and the model of a request that names none: a short id in any case, or its hub "
        "repository. MODEL and MODEL_ID must not contradict each other.",
        variables=("MODEL", "MODEL_ID"),
        takes="a model id",
    )
    head: str = setting(
        "dpt",
        "Head of the network. USE_SDT_HEAD=1 means HEAD=sdt; the two must not contradict each other.",
        variables=("HEAD", "USE_SDT_HEAD"),
        takes="dpt or sdt",
    )
    ray_pose: Flag = setting(
        False, "Take the camera from the network's ray branch; when building, build that branch too."
    )
    engine_dir: Path = setting(Path("engines"), "Folder of the engine folders.")
    engine_repo: str | None = setting(
        None,
        "Hub repository of published engines, used if ENGINE_DIR lacks the engine. Unset: only "
        "ENGINE_DIR is searched.",
        takes="OWNER/NAME or OWNER/NAME@REVISION",
    )
    cached_models_dir: Path = setting(
        CACHED_MODELS_DIR,
        "Read-only hub cache that is searched before the hub. The default is RunPod's mount of cached "
        "models.",
    )
    weights: str | None = setting(
        None,
        "Checkpoint. Unset: the checkpoint in the engine's folder, else the hub's (or the bundled one, "
        "for da3-nano). nested takes da3-giant out of the nested model's checkpoint, where it was "
        "trained further. Only da3-export takes random:SEED.",
        takes="hub, nested, a folder with model.safetensors, a .safetensors file, or random:SEED",
    )
    revision: str | None = setting(
        None,
        "Branch, tag or commit of the checkpoint's hub repository. Unset: the commit that the engine "
        "was built from, else the published release (for da3mono-large the default branch).",
    )
    sdt_weights: str | None = setting(
        None,
        "Fine-tuned SDT head. Unset: the head in the engine's folder, else the bundled one if the model "
        "has one; da3-export then builds an untrained head. Only da3-export takes random:SEED.",
        takes="a .safetensors file, or random:SEED",
    )
    backend: Name = setting(
        AUTO,
        "Backend to run; any other backend is then not tried. auto: the best one that can run here.",
        takes="auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-tensorrt, eager-cuda, "
        "openvino, onnxruntime-cpu or eager",
    )
    precision: Annotated[str, one_of(AUTO, "bf16", "int8")] = setting(
        AUTO,
        "A faster and less exact artefact for CPUs: int8 runs with onnxruntime-cpu, bf16 with openvino. "
        "da3-export then builds that artefact too. auto: FP32 on a CPU, FP16 or bf16 on a GPU.",
        takes="auto, bf16 or int8",
    )
    threads: int = setting(0, "CPU threads of a backend. 0: all cores.", low=0, high=1024)
    runtime_cache_dir: Path | None = setting(
        None,
        "Folder for kernels that a backend specializes for this machine's GPU, and for the digests of "
        "verified files. Unset: the user's cache folder; for kernels the engine's folder, if it can be "
        "written.",
    )

    @staticmethod
    def resolved(env: Mapping[str, str]) -> dict[str, str]:
        """The environment with MODEL_ID and USE_SDT_HEAD folded into MODEL and HEAD.

        Raises
        ------
        SettingError
            If the two variables of a pair contradict each other.
        """
        env = dict(env)
        model, model_id = env.get("MODEL"), env.pop("MODEL_ID", "")
        if model and model_id and not _same_model(model, model_id):
            raise SettingError(
                f"MODEL={model} and MODEL_ID={model_id} contradict each other; set only one."
            )
        env["MODEL"] = model or model_id
        head, flag = env.get("HEAD"), env.pop("USE_SDT_HEAD", "")
        if flag:
            by_flag = Head.SDT if _flag("USE_SDT_HEAD", flag) else Head.DPT
            if head and head.lower() != by_flag:
                raise SettingError(
                    f"HEAD={head} and USE_SDT_HEAD={flag} contradict each other; set only one."
                )
            env["HEAD"] = by_flag
        return env


def _same_model(one: str, other: str) -> bool:
    try:
        return find_variant(one) is find_variant(other)
    except SettingError:
        return one == other


def _flag(variable: str, text: str) -> bool:
    return make_group(EngineSettings, {"ray_pose": text}, {"ray_pose": variable}).ray_pose
