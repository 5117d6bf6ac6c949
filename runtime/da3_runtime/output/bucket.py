"""Uploads large outputs to a bucket, through the RunPod SDK."""

from __future__ import annotations

import logging
import os

from da3_runtime.errors import UploadError
from da3_runtime.util.runpod_sdk import import_sdk

logger = logging.getLogger(__name__)

# The SDK's own settings. If one is missing, the SDK writes to a folder of the worker instead.
_VARIABLES = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


def is_configured() -> bool:
    """Whether the environment sets a bucket's address and both keys."""
    return all(os.environ.get(name) for name in _VARIABLES)


def upload(job_id: str, name: str, data: bytes) -> str:
    """Upload a file under the job's id; returns its address, which is valid for a week.

    Raises
    ------
    UploadError
        If the upload fails for any reason; the log states the reason.
    """
    import_sdk()
    from botocore.exceptions import BotoCoreError, ClientError
    from runpod.serverless.utils import upload_in_memory_object

    try:
        url: str = upload_in_memory_object(name, data, prefix=job_id)
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        logger.warning("upload of %s failed: %s", name, error)
        raise UploadError(
            "The outputs could not be uploaded to the bucket: try again, or request fewer outputs."
        ) from None
    return url
