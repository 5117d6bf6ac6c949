"""All errors that users see. Every message is a sentence that a user can act on.

A message never contains a traceback, a secret, or a path that the user did not name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DA3Error(Exception):
    """Base class of all expected errors.

    Attributes
    ----------
    status : int
        HTTP status of a request that fails with this error.
    exit_code : int
        Exit code of a command that fails with this error.
    """

    status = 500
    exit_code = 1


class SettingError(DA3Error):
    """A setting or an option has an invalid value."""

    status = 400
    exit_code = 2


class UnknownModelError(SettingError):
    """The model id is unknown."""


class RequestError(DA3Error):
    """A request has an invalid field, or lacks a required one."""

    status = 400
    exit_code = 2


class UnauthorizedError(DA3Error):
    """The API key of a request is missing or wrong."""

    status = 401


class OutputError(DA3Error):
    """An output cannot be made of this depth, such as millimeters of relative depth."""

    status = 422
    exit_code = 2


class ResponseTooLargeError(DA3Error):
    """The response is larger than MAX_RESPONSE_BYTES or the platform allows."""

    status = 413


class UnknownJobError(DA3Error):
    """No job has this id, or its result has expired."""

    status = 404


class BusyError(DA3Error):
    """The queue is full."""

    status = 503


class UploadError(DA3Error):
    """The files of a response could not be uploaded to the bucket."""

    status = 502


class ImageError(DA3Error):
    """The image cannot be fetched or decoded, or is outside the limits."""

    status = 422
    exit_code = 2


class ImageFormatError(ImageError):
    """The bytes are not of a supported image format."""

    status = 415


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than allowed."""

    status = 413


class CheckpointError(DA3Error):
    """The weights are missing, damaged, or do not fit the variant."""

    status = 503
    exit_code = 2


class ManifestError(DA3Error):
    """A manifest is missing, damaged, or of another schema version."""

    status = 503


class ArtefactError(DA3Error):
    """An engine artefact is missing or does not match its manifest."""

    status = 503


class BackendUnavailableError(DA3Error):
    """No backend, or not the requested one, can run on this machine."""

    status = 503
    exit_code = 2


class InferenceError(DA3Error):
    """A loaded backend failed on a request."""


class OutOfMemoryError(InferenceError):
    """The GPU has too little free memory for a request."""

    status = 507


class SceneTooLargeError(InferenceError):
    """A scene has more views, or larger ones, than a backend can run at once."""

    status = 507


class DeviceLostError(InferenceError):
    """The GPU is in a state that this process cannot recover from."""

    def __init__(self) -> None:
        super().__init__("Unrecoverable GPU error; the worker must be restarted.")


class BuildError(DA3Error):
    """A build step failed; the engine folder is unchanged."""


class ParityError(BuildError):
    """The difference between an engine and upstream exceeds a tolerance."""


@contextmanager
def of_video() -> Iterator[None]:
    """Name the fields of a film, not those of an image, in the message of what fails in the body."""
    try:
        yield
    except (ImageError, RequestError) as error:
        text = str(error).replace("image_", "video_").replace("data:image", "data:video")
        raise type(error)(text) from None


@contextmanager
def of_image(index: int | None) -> Iterator[None]:
    """Name one of several images, by its index, in the message of what fails in the body.

    None is a single image, which needs no name.
    """
    try:
        yield
    except (ImageError, RequestError) as error:
        if index is None:
            raise
        raise type(error)(f"images[{index}]: {error}") from None
