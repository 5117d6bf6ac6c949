"""The one settings object, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import SettingError

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """Everything that the environment can set.

    Attributes
    ----------
    engines_dir : Path
        ``ENGINES_DIR``: where engine folders lie, ``engines`` by default.
    model_id : str
        ``MODEL``: the variant to serve.
    head : str
        ``HEAD``: its head.
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
    """

    engines_dir: Path = Path("engines")
    model_id: str = "da3-small"
    head: str = "dpt"
    weights: str | None = None
    revision: str | None = None
    sdt_weights: str | None = None
    sdt_fusion_channels: int | None = None
    ray_pose: bool = False
    backend: str = AUTO
    processing_res: int | None = None
    threads: int = 0
    max_image_pixels: int = 4096 * 4096
    max_image_bytes: int = 64 * 2**20

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Settings from ``env``; an empty variable counts as unset.

        Raises
        ------
        SettingError
            Naming the variable whose value is not what it takes.
        """
        return cls(
            engines_dir=Path(env.get("ENGINES_DIR") or cls.engines_dir),
            model_id=env.get("MODEL") or cls.model_id,
            head=env.get("HEAD") or cls.head,
            weights=env.get("WEIGHTS") or None,
            revision=env.get("REVISION") or None,
            sdt_weights=env.get("SDT_WEIGHTS") or None,
            sdt_fusion_channels=_integer(env, "SDT_FUSION_CHANNELS", 0, 8, 1024, multiple=8) or None,
            ray_pose=_flag(env, "RAY_POSE"),
            backend=(env.get("BACKEND") or cls.backend).lower(),
            processing_res=_integer(env, "PROCESSING_RES", 0, 1, 1036) or None,
            threads=_integer(env, "THREADS", cls.threads, 0, 1024),
            max_image_pixels=_integer(env, "MAX_IMAGE_PIXELS", cls.max_image_pixels, 1, 2**31),
            max_image_bytes=_integer(env, "MAX_IMAGE_BYTES", cls.max_image_bytes, 1, 2**31),
        )


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
