"""`taid-vlm generate`: a model's answers, filtered, as records to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from taid_vlm.commands.models import open_candidates, open_judge
from taid_vlm.commands.options import Many, Object, Options, option, say_and_part

INTERRUPTED = "; the same command goes on with the next prompt"
_WRITING = ("n", "max_new_tokens", "temperature", "top_p", "seed", "turns", "thoughts")


class GenerateOptions(Options):
    """What is not given is None, so that what has no effect can be refused."""

    groups: ClassVar = {"thoughts": "what becomes of the answers",
                        "dtype": "a model of this machine, or behind a URL",
                        "judge_url": "a language model as judge (it is shown no images)"}

    model: str = option(
        "folder, folder of a run (its student), hub name[@revision], or with --base-url what the "
        "server calls it", "[NAME=]MODEL", ...)
    data: str = option(
        "prompts, as data.train of a recipe: file, folder, hub name, or its keys as JSON; answers "
        "in it are references, and may be absent", "DATA", ...)
    output_dir: Path = option("new, or of an earlier call, which goes on", default=...)
    n: int | None = option(
        "answers per prompt (default 1); also --samples, which torchrun lets through", "N",
        also="--samples")
    turns: Literal["each", "last"] | None = option(
        "which answers of a conversation are written: each that is learned, after the data's own "
        "words (the default), or the last; one that ends with a question is answered there")
    max_new_tokens: int | None = option("default 512", "N")
    temperature: float | None = option(
        "sample answers; 0, the default, takes the most likely token", "T")
    top_p: float | None = option(metavar="P")
    seed: int | None = option(
        "of sampling (default 0); with the record and the answer's number it gives every answer "
        "random numbers of its own", "SEED")
    batch_size: int = option("rows, or requests to a server, at once", "N", 8)
    max_records: int | None = option("the first rows only", "N")
    video_frames: int | None = option("shown of every video (default 8)", "N")

    thoughts: str | None = option(
        "keep (the default) leaves answers as they are; a rule (auto, think, gpt-oss ...) takes "
        "thoughts off", "RULE")
    reasoning: bool = option(
        "thoughts that are taken off stand beside their answers, as reasoning_content (those of "
        "gpt-oss and Cohere with keep, too: no answer can hold their marks)",
        default=False)
    filters: Many | None = option(
        "what is kept (default: cut repeats): cut, repeats, min_length=N, max_length=N, "
        "script=latin (or of the question), agree[=SHARE] of final answers, duplicates, "
        "judge[=SCORE]; or none", "RULE[=VALUE]", many=True)
    copy_images: bool = option(
        "copy image files into the folder; without, records name them where they are",
        default=False)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option()
    chat_template: str | None = option("jinja file", "FILE")
    chat_template_kwargs: Object | None = option(
        "variables of the chat template; default: for a run's student those of its recipe", "JSON")
    processor_kwargs: Object | None = option(
        'how pictures are shown, as in a recipe: {"max_pixels": 501760}', "JSON")
    base_url: str | None = option(
        "of OpenAI-compatible chat completions, as http://localhost:8000/v1", "URL")
    api_key_env: str | None = option("environment variable that holds the server's key", "NAME")
    timeout: float | None = option("of one request to the server (default 120)", "SECONDS")

    judge_url: str | None = option(
        "of the judge that --filters judge asks: chat completions", "URL")
    judge_model: str | None = option("as its server calls it", "MODEL")
    judge_key_env: str | None = option("environment variable that holds its server's key", "NAME")
    judge_prompt: Path | None = option(
        "in place of its own, with {question}, {answer} (the data's, if any) and {prediction}; the "
        "reply is a score of 0 to 1", "FILE")


def generate(**options: Any) -> dict[str, Any]:
    """Write a model's answers as records to train on.

    Args:
        options: those of `GenerateOptions`, for example `model="Qwen/Qwen3-8B"`,
            `data="prompts.jsonl"` and `output_dir="generated"`.

    Returns:
        What was written to results.json.

    Raises:
        TaidError: anything a user can mend, before weights are loaded where it can show there.
    """
    return _generate(GenerateOptions(**options))


def run(options: GenerateOptions) -> None:
    results = _generate(options)

    from taid_vlm.generate.generate import as_text

    say_and_part(lambda: as_text(results, options.output_dir))


def _generate(options: GenerateOptions) -> dict[str, Any]:
    from taid_vlm.generate.filters import USUAL, parse_filters
    from taid_vlm.generate.generate import generate
    from taid_vlm.generate.prompts import parse_source
    from taid_vlm.generate.writing import Writing

    filters = parse_filters(USUAL if options.filters is None else options.filters)
    writing = Writing(**options.given(_WRITING), filters=filters, batch_size=options.batch_size,
                      reasoning=options.reasoning, copies=options.copy_images)
    source = parse_source(options.data, options.max_records, options.video_frames)
    [candidate] = open_candidates(options, [options.model])
    return generate(candidate, source, options.output_dir, writing, open_judge(options))
