"""Requests and responses as JSON schemas and OpenAPI components."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from da3_runtime.api.request import DepthRequest
from da3_runtime.api.response import DepthResponse, FilmResponse, SceneResponse

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Job(BaseModel):
    """The body of POST /run and POST /runsync."""

    input: DepthRequest


class FailedOutput(BaseModel):
    """``output`` of a failed job."""

    status: int = Field(description="HTTP status code of the failure, 400 to 599.")


class Failure(BaseModel):
    """The response to a request that did not become a job."""

    error: str = Field(description="One sentence about the failure.")
    status: int = Field(description="HTTP status code of the response, 400 to 599.")


class Answer(BaseModel):
    """The response of /runsync and /status: RunPod's envelope of a job."""

    id: str = Field(description="The id of the job.")
    status: str = Field(
        description="State of the job: IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED or CANCELLED."
    )
    delayTime: int = Field(0, description="Time in the queue, in milliseconds; default 0.")  # noqa: N815
    executionTime: int = Field(0, description="Run time, in milliseconds; default 0.")  # noqa: N815
    output: DepthResponse | SceneResponse | FilmResponse | FailedOutput | None = Field(
        None, description="Result of a COMPLETED job, status code of a FAILED one; null before."
    )
    error: str | None = Field(
        None, description="One sentence about the failure of a FAILED job; null otherwise."
    )


def json_schemas() -> dict[str, Any]:
    """JSON schemas of a request and of a response, each a complete document."""
    return {
        "request": {"$schema": _DIALECT, **Job.model_json_schema()},
        "response": {"$schema": _DIALECT, **Answer.model_json_schema(mode="serialization")},
    }


def openapi_components() -> dict[str, Any]:
    """The request's schema and the schemas it refers to, for OpenAPI's ``components.schemas``."""
    schema = Job.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), Job.__name__: schema}
