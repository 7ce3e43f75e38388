"""Which models answer, on this machine or behind a URL, and who judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taid_vlm.benchmarks.candidates import Candidate
    from taid_vlm.benchmarks.judge import Judge

LOCAL = ("dtype", "chat_template", "chat_template_kwargs", "processor_kwargs")
SERVED = ("api_key_env",)
JUDGE = ("judge_model", "judge_key_env", "judge_prompt")
TIMEOUT = 120.0  # seconds


def open_candidates(options: Any, models: Sequence[str]) -> list[Candidate]:
    """`[NAME=]MODEL` each; raises TaidError, also for options that do not go together."""
    if options.base_url is not None:
        options.refuse(LOCAL, "is up to the server that --base-url names")
    else:
        options.refuse(SERVED, "goes with --base-url")
        if options.judge_url is None:
            options.refuse(("timeout",), "goes with --base-url or --judge-url")

    from taid_vlm.benchmarks.candidates import parse_candidates, parse_served
    from taid_vlm.config.model import ModelSpec

    if options.base_url is not None:
        timeout = TIMEOUT if options.timeout is None else options.timeout
        return parse_served(models, options.base_url, options.api_key_env, timeout)
    return parse_candidates(models, ModelSpec(
        model_name_or_path="", dtype=options.dtype, chat_template=options.chat_template,
        processor_kwargs=options.processor_kwargs or {}), options.chat_template_kwargs)


def open_judge(options: Any) -> Judge | None:
    """None where there is none; raises TaidError."""
    if options.judge_url is None:
        options.refuse(JUDGE, "goes with --judge-url")
        return None
    from taid_vlm.benchmarks.judge import open_judge

    return open_judge(options.judge_url, options.judge_model, options.judge_key_env,
                      options.timeout or TIMEOUT, options.batch_size, options.judge_prompt)
