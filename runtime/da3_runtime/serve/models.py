"""Which models a server has: loaded, with an engine at hand, or others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, Field

from da3_runtime.errors import ManifestError
from da3_runtime.serve.service import Service
from da3_runtime.store.checkpoint import bundled_sdt
from da3_runtime.store.find_engine import local_engine
from da3_runtime.variants import VARIANTS, Head, Variant


class ModelState(BaseModel):
    """A model with one of its heads."""

    model_id: str = Field(description="Short id of the model, for model_id of a request.")
    head: Head = Field(description="dpt, or sdt for use_sdt_head.")
    license: str = Field(description="License of the model's checkpoint: its SPDX id.")
    unit: str = Field(description="Unit of its depth: m, relative, or m with a focal length.")
    state: Literal["loaded", "engine", "other"] = Field(
        description="loaded: in memory. engine: its engine is in ENGINE_DIR. other: its engine or its "
        "checkpoint has to be found or downloaded, which may fail."
    )
    is_default: bool = Field(description="Whether a request that names no model gets it.")


class ModelStates(BaseModel):
    """The response of /models."""

    models: list[ModelState] = Field(description="Every model, with each head that it may have here.")


def model_states(service: Service) -> ModelStates:
    """Every model and head, and whether it is loaded or has an engine in ``ENGINE_DIR``."""
    return ModelStates(models=list(_states(service)))


def _states(service: Service) -> Iterator[ModelState]:
    loaded = {(key.model_id, key.head) for key in service.pool.loaded()}
    default = service.default[:2]
    for variant in VARIANTS.values():
        for head in Head:
            key = (variant.model_id, head)
            state: Literal["loaded", "engine", "other"] = "other"
            if key in loaded:
                state = "loaded"
            elif _has_engine(service, variant, head):
                state = "engine"
            if head is Head.SDT and state == "other" and key != default and not bundled_sdt(variant):
                continue  # it would run with a random head
            yield ModelState(
                model_id=variant.model_id,
                head=head,
                license=variant.license,
                unit="m with a focal length" if variant.needs_focal else variant.unit.value,
                state=state,
                is_default=key == default,
            )


def _has_engine(service: Service, variant: Variant, head: Head) -> bool:
    settings = replace(service.settings.engine, model_id=variant.model_id, head=head.value)
    try:
        return local_engine(settings).manifest is not None
    except ManifestError:
        return False
