"""The one error hierarchy. Every message is a sentence that a user can act on.

Messages never carry a traceback, a secret, or a path the user did not name.
"""

from __future__ import annotations


class DA3Error(Exception):
    """Base of every error this project raises on purpose.

    Attributes
    ----------
    status : int
        HTTP status that the error maps to.
    exit_code : int
        Exit code of a command that ends with it.
    """

    status = 500
    exit_code = 1


class SettingError(DA3Error):
    """A setting or an option has a value outside what it takes."""

    status = 400
    exit_code = 2


class UnknownModelError(SettingError):
    """The model id names no variant."""


class RequestError(DA3Error):
    """A request has a field of the wrong type or outside its limits, or lacks one."""

    status = 400
    exit_code = 2


class UnauthorizedError(DA3Error):
    """The request's key is missing or wrong."""

    status = 401


class ResponseTooLargeError(DA3Error):
    """The answer has more bytes than the platform carries."""

    status = 413


class BusyError(DA3Error):
    """As many requests wait already as may."""

    status = 503


class UploadError(DA3Error):
    """An answer's files could not be put in the bucket."""

    status = 502


class ImageError(DA3Error):
    """The image cannot be had, cannot be read, or is outside the limits."""

    status = 422
    exit_code = 2


class ImageFormatError(ImageError):
    """The bytes are of no image format that is read here."""

    status = 415


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the limit."""

    status = 413


class CheckpointError(DA3Error):
    """The weights cannot be had, or do not fit the variant."""

    status = 503
    exit_code = 2


class ManifestError(DA3Error):
    """A manifest is missing, damaged or of another schema."""

    status = 503


class ArtefactError(DA3Error):
    """An engine artefact is missing or does not match its manifest."""

    status = 503


class BackendUnavailableError(DA3Error):
    """No backend, or not the one asked for, can run here."""

    status = 503
    exit_code = 2


class InferenceError(DA3Error):
    """A loaded backend failed on a request."""


class OutOfMemoryError(InferenceError):
    """The GPU has not enough free memory for a request."""

    status = 507


class DeviceLostError(InferenceError):
    """The GPU failed in a way that this process does not recover from; only a fresh worker does."""

    def __init__(self) -> None:
        super().__init__("The GPU failed and takes no more work from this worker; it needs a fresh one.")


class BuildError(DA3Error):
    """A build step failed; nothing of it was published."""


class ParityError(BuildError):
    """An engine is out of tolerance."""
