"""What may be sent and what comes back, as JSON schemas."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from da3_runtime.api.request import DepthRequest
from da3_runtime.api.response import DepthResponse

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Job(BaseModel):
    """What /run and /runsync take."""

    input: DepthRequest


class FailedOutput(BaseModel):
    """``output`` of a failed job."""

    status: int = Field(description="HTTP status that tells what is wrong.")


class Answer(BaseModel):
    """What /runsync and /status answer: RunPod's envelope of a job."""

    id: str = Field(description="The job's id.")
    status: str = Field(description="IN_QUEUE, IN_PROGRESS, COMPLETED or FAILED.")
    delayTime: int = Field(0, description="Milliseconds that it waited.")  # noqa: N815
    executionTime: int = Field(0, description="Milliseconds that it took.")  # noqa: N815
    output: DepthResponse | FailedOutput | None = Field(None, description="Once it is done.")
    error: str | None = Field(None, description="Once it has failed: one sentence.")


def json_schemas() -> dict[str, Any]:
    """The schemas of a request and of an answer, each a document of its own."""
    return {
        "request": {"$schema": _DIALECT, **Job.model_json_schema()},
        "response": {"$schema": _DIALECT, **Answer.model_json_schema(mode="serialization")},
    }


def openapi_components() -> dict[str, Any]:
    """The request's schema and those it names, as an OpenAPI document's ``components.schemas``."""
    schema = Job.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), Job.__name__: schema}
