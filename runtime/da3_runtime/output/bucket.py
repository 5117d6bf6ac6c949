"""Large outputs -> a bucket, through the RunPod SDK."""

from __future__ import annotations

import logging
import os

from da3_runtime.errors import UploadError
from da3_runtime.util.runpod_sdk import import_sdk

logger = logging.getLogger(__name__)

# The SDK's own settings; without all three it would write to a folder of the worker instead.
_VARIABLES = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


def is_configured() -> bool:
    """Whether the environment names a bucket and its keys."""
    return all(os.environ.get(name) for name in _VARIABLES)


def upload(job_id: str, name: str, data: bytes) -> str:
    """Put a file into the bucket under the job's name; returns an address that works for a week.

    Raises
    ------
    UploadError
        If the bucket does not take it.
    """
    import_sdk()
    from botocore.exceptions import BotoCoreError, ClientError
    from runpod.serverless.utils import upload_in_memory_object

    try:
        url: str = upload_in_memory_object(name, data, prefix=job_id)
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        logger.warning("upload of %s failed: %s", name, error)
        raise UploadError("The outputs could not be put into the bucket.") from None
    return url
