"""Where a server is, and how patiently it is asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from taid_vlm.config.kinds import Count, Positive, Rate, wanted
from taid_vlm.config.section import Section


class Server(Section):
    """A vLLM server.

    Args:
        url: Up to and with the version: http://localhost:8000/v1.
        model: The name under which the server knows the model.
        timeout (seconds): Until a request that says nothing is given up.
        retries: How often a request is sent again, with longer and longer pauses, before the run
            ends.
        concurrency: Requests at once, from each process.
        api_key_env: The environment variable with the server's key.
    """

    url: Annotated[str, Field(pattern=r"^https?://."), wanted(
        "a URL up to and with the version, as http://localhost:8000/v1")]
    model: str
    timeout: Rate = 120.0
    retries: Count = 5
    concurrency: Positive = 8
    api_key_env: str | None = None
