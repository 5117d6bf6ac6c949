"""The one settings object, read from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from da3_runtime.errors import SettingError
from da3_runtime.variants import MAX_SIDE, MIN_SIDE

AUTO = "auto"
_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
# Where RunPod mounts the models that it caches, in the layout of the hub's own cache.
CACHED_MODELS_DIR = Path("/runpod-volume/huggingface-cache/hub")


@dataclass(frozen=True)
class Settings:
    """Everything that the environment can set.

    ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and the cache's variables are huggingface_hub's, ``BUCKET_*`` and
    ``RUNPOD_*`` the RunPod SDK's; each reads its own.

    Attributes
    ----------
    engine_dir : Path
        ``ENGINE_DIR``: where engine folders lie, ``engines`` by default.
    engine_repo : str | None
        ``ENGINE_REPO``: hub repository of published engines, asked where ``ENGINE_DIR`` has none.
    runtime_cache_dir : Path | None
        ``RUNTIME_CACHE_DIR``: where what a backend specialises for this machine's GPU is kept; unset,
        next to the engine, or in the user's cache folder where that cannot be written.
    cached_models_dir : Path
        ``CACHED_MODELS_DIR``: a hub cache that is looked into before the hub, by default where RunPod
        mounts cached models.
    model_id : str
        ``MODEL`` or ``MODEL_ID``: the variant to run, or to serve where a request names none.
    head : str
        ``HEAD``, or ``USE_SDT_HEAD``: its head.
    weights : str | None
        ``WEIGHTS``: ``hub``, a folder in the hub's layout, or a ``.safetensors`` file; ``export`` also
        takes ``random:SEED``. Unset, the eager backend takes the checkpoint that lies in the engine's
        folder, else the hub's.
    revision : str | None
        ``REVISION``: branch, tag or commit of the hub repository.
    sdt_weights : str | None
        ``SDT_WEIGHTS``: ``.safetensors`` file of a fine-tuned SDT head; unset, the one bundled with the
        variant, or an untrained one.
    sdt_fusion_channels : int | None
        ``SDT_FUSION_CHANNELS``: width of an SDT head's fused map; unset, the variant's own.
    ray_pose : bool
        ``RAY_POSE``: build the ray branch too; take the camera from its rays.
    hardware_compatible : bool
        ``HARDWARE_COMPATIBLE``: build a TensorRT plan for every GPU of compute capability 8.0 and later.
    version_compatible : bool
        ``VERSION_COMPATIBLE``: build a TensorRT plan that ``tensorrt-lean`` of its release runs too.
    backend : str
        ``BACKEND``: ``auto`` or one backend's name, which is then the only one tried.
    processing_res : int | None
        ``PROCESSING_RES``: longest side of the model's input in pixels; unset, the variant's own.
    threads : int
        ``THREADS``: CPU threads of a backend, 0 for all cores.
    max_image_pixels : int
        ``MAX_IMAGE_PIXELS``: largest width x height of an image, 4096 x 4096 by default.
    max_image_bytes : int
        ``MAX_IMAGE_BYTES``: largest encoded image, 64 MiB by default.
    max_loaded_models : int
        ``MAX_LOADED_MODELS``: how many models stay loaded.
    max_concurrency : int
        ``MAX_CONCURRENCY``: how many requests are worked on at once; one batch in a model's network.
    max_batch : int | None
        ``MAX_BATCH``: how many images that wait for a model at once, and have one size, are run
        together; unset, 8 on a GPU and 1 on a CPU, which gains nothing from it.
    batch_wait_ms : int
        ``BATCH_WAIT_MS``: how long a batch that has room waits for requests that are being decoded.
    max_queued_jobs : int
        ``MAX_QUEUED_JOBS``: how many more the HTTP server lets wait.
    max_response_bytes : int | None
        ``MAX_RESPONSE_BYTES``: largest answer; unset, what RunPod carries: 20 MB from a queue worker,
        30 MB from a load-balancing worker.
    download_seconds : int
        ``DOWNLOAD_SECONDS``: how long an ``image_url`` may take.
    image_url_hosts : tuple[str, ...]
        ``IMAGE_URL_HOSTS``: names of the only hosts an ``image_url`` may have, ``*.name`` for all below
        one, with commas between; unset, every public one.
    mode : str
        ``DA3_MODE``: what ``python -m da3_runtime`` without a verb starts; ``auto`` finds out.
    host : str | None
        ``DA3_HOST``: address the HTTP server listens on; unset, this machine's own for ``http``, every
        address for ``load-balancer``.
    port, health_port : int | None
        ``PORT`` and ``PORT_HEALTH``: its ports.
    api_key : str | None
        ``DA3_API_KEY``: what a request must know.
    allow_anonymous : bool
        ``DA3_ALLOW_ANONYMOUS``: whether the HTTP server may answer other machines without a key.
    workspace : Path | None
        ``WORKSPACE``: volume on which pictures are kept.
    output_retention_days : int
        ``OUTPUT_RETENTION_DAYS``: days after which they are removed; 0 for never.
    """

    engine_dir: Path = Path("engines")
    engine_repo: str | None = None
    runtime_cache_dir: Path | None = None
    cached_models_dir: Path = CACHED_MODELS_DIR
    model_id: str = "da3-small"
    head: str = "dpt"
    weights: str | None = None
    revision: str | None = None
    sdt_weights: str | None = None
    sdt_fusion_channels: int | None = None
    ray_pose: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    backend: str = AUTO
    processing_res: int | None = None
    threads: int = 0
    max_image_pixels: int = 4096 * 4096
    max_image_bytes: int = 64 * 2**20
    max_loaded_models: int = 1
    max_concurrency: int = 2
    max_batch: int | None = None
    batch_wait_ms: int = 0
    max_queued_jobs: int = 16
    max_response_bytes: int | None = None
    download_seconds: int = 10
    image_url_hosts: tuple[str, ...] = ()
    mode: str = AUTO
    host: str | None = None
    port: int | None = None
    health_port: int | None = None
    api_key: str | None = field(default=None, repr=False)
    allow_anonymous: bool = False
    workspace: Path | None = None
    output_retention_days: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, model_id: str = model_id) -> Settings:
        """Settings from ``env``; an empty variable counts as unset.

        Parameters
        ----------
        model_id : str
            The model where the environment names none.

        Raises
        ------
        SettingError
            Naming the variable whose value is not what it takes.
        """
        return cls(
            engine_dir=Path(env.get("ENGINE_DIR") or cls.engine_dir),
            engine_repo=env.get("ENGINE_REPO") or None,
            runtime_cache_dir=_path(env, "RUNTIME_CACHE_DIR"),
            cached_models_dir=Path(env.get("CACHED_MODELS_DIR") or cls.cached_models_dir),
            model_id=env.get("MODEL") or env.get("MODEL_ID") or model_id,
            head=_head(env),
            weights=env.get("WEIGHTS") or None,
            revision=env.get("REVISION") or None,
            sdt_weights=env.get("SDT_WEIGHTS") or None,
            sdt_fusion_channels=_integer(env, "SDT_FUSION_CHANNELS", 0, 8, 1024, multiple=8) or None,
            ray_pose=_flag(env, "RAY_POSE"),
            hardware_compatible=_flag(env, "HARDWARE_COMPATIBLE"),
            version_compatible=_flag(env, "VERSION_COMPATIBLE"),
            backend=(env.get("BACKEND") or cls.backend).lower(),
            processing_res=_integer(env, "PROCESSING_RES", 0, MIN_SIDE, MAX_SIDE) or None,
            threads=_integer(env, "THREADS", cls.threads, 0, 1024),
            max_image_pixels=_integer(env, "MAX_IMAGE_PIXELS", cls.max_image_pixels, 1, 2**31),
            max_image_bytes=_integer(env, "MAX_IMAGE_BYTES", cls.max_image_bytes, 1, 2**31),
            max_loaded_models=_integer(env, "MAX_LOADED_MODELS", cls.max_loaded_models, 1, 64),
            max_concurrency=_integer(env, "MAX_CONCURRENCY", cls.max_concurrency, 1, 64),
            max_batch=_integer(env, "MAX_BATCH", 0, 1, 64) or None,
            batch_wait_ms=_integer(env, "BATCH_WAIT_MS", cls.batch_wait_ms, 0, 10_000),
            max_queued_jobs=_integer(env, "MAX_QUEUED_JOBS", cls.max_queued_jobs, 0, 10_000),
            max_response_bytes=_integer(env, "MAX_RESPONSE_BYTES", 0, 10_000, 2**31) or None,
            download_seconds=_integer(env, "DOWNLOAD_SECONDS", cls.download_seconds, 1, 600),
            image_url_hosts=_hosts(env, "IMAGE_URL_HOSTS"),
            mode=(env.get("DA3_MODE") or cls.mode).lower(),
            host=env.get("DA3_HOST") or None,
            port=_integer(env, "PORT", 0, 0, 65535) or None,
            health_port=_integer(env, "PORT_HEALTH", 0, 0, 65535) or None,
            api_key=env.get("DA3_API_KEY") or None,
            allow_anonymous=_flag(env, "DA3_ALLOW_ANONYMOUS"),
            workspace=_path(env, "WORKSPACE"),
            output_retention_days=_integer(env, "OUTPUT_RETENTION_DAYS", 0, 0, 36_500),
        )


def _head(env: Mapping[str, str]) -> str:
    head = env.get("HEAD")
    if not env.get("USE_SDT_HEAD"):
        return head or Settings.head
    by_flag = "sdt" if _flag(env, "USE_SDT_HEAD") else "dpt"
    if head and head.lower() != by_flag:
        raise SettingError(f"HEAD={head} and USE_SDT_HEAD={env['USE_SDT_HEAD']} contradict each other.")
    return by_flag


def _hosts(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in env.get(name, "").split(",") if host.strip())
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise SettingError(f"{name} takes names of hosts with commas between, not {host!r}.")
    return hosts


def _path(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    return Path(text) if text else None


def _flag(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name, "").strip().lower()
    if text not in ("", "0", "false", "1", "true"):
        raise SettingError(f"{name} must be 0 or 1, not {text!r}.")
    return text in ("1", "true")


def _integer(
    env: Mapping[str, str], name: str, default: int, low: int, high: int, multiple: int = 1
) -> int:
    text = env.get(name)
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise SettingError(f"{name} must be a whole number, not {text!r}.") from None
    if not low <= value <= high:
        raise SettingError(f"{name} must be between {low} and {high}, not {value}.")
    if value % multiple:
        raise SettingError(f"{name} must be a multiple of {multiple}, not {value}.")
    return value
