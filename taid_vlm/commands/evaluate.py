"""`taid-vlm evaluate`: which models, which benchmarks, asked how, by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from taid_vlm.commands.models import JUDGE, open_candidates, open_judge
from taid_vlm.commands.options import Many, Object, Options, option, say_and_part

INTERRUPTED = "; the same command goes on with the next question"
_ASKING = ("method", "choose_by", "normalise", "max_new_tokens", "temperature", "top_p", "seeds")
_OF_HARNESS = ("num_fewshot", "apply_chat_template")


class EvaluateOptions(Options):
    """What is not given is None, so that what has no effect can be refused."""

    groups: ClassVar = {"rule": "how questions are asked and judged",
                        "dtype": "models of this machine, or behind a URL",
                        "judge_url": "a language model as judge",
                        "harness": "benchmarks of lm-eval, for text"}

    model: Many = option(
        "folder, folder of a run (its student), hub name[@revision], or with --base-url what the "
        "server calls it", "[NAME=]MODEL", ..., many=True)
    tasks: Many | None = option(
        "benchmarks, or YAML files that describe one; without DATA (a file or folder) they are "
        "read from the hub", "TASK[=DATA]", many=True)
    suite: Many | None = option(
        "a leaderboard's benchmarks, those of --tasks among them, and its average: taid-vlm; "
        "FOLDER holds data as TASK.tsv, TASK.parquet or TASK.jsonl", "SUITE[=FOLDER]", many=True)
    output_dir: Path = option(default=...)
    batch_size: int = option("rows, or requests to a server, at once", "N", 8)
    max_records: int | None = option("the first rows only", "N")
    video_frames: int | None = option("shown of every video (default 8)", "N")
    json_: bool = option("print JSON instead of a table", default=False)

    rule: Many | None = option(
        "judge a task by another of its rules; asks nothing again", "TASK:RULE", many=True)
    thoughts: str | None = option(
        "how thoughts are taken off answers before any rule: auto (the default), keep, or a rule "
        "by name (think, gpt-oss, magistral ...); asks nothing again", "RULE")
    method: Literal["generate", "likelihood"] | None = option(
        "likelihood chooses the most likely of a question's choices")
    choose_by: Literal["letter", "text"] | None = option("whose likelihood (default letter)")
    normalise: Literal["sum", "bytes", "tokens"] | None = option(
        "what likelihoods are divided by (default sum: nothing)")
    max_new_tokens: int | None = option("default: the benchmark's", "N")
    temperature: float | None = option(
        "sample answers; 0, the default, takes the most likely token", "T")
    top_p: float | None = option(metavar="P")
    seeds: tuple[int, ...] | None = option(
        "of sampling; every question is answered once per seed", "SEED", many=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option()
    chat_template: str | None = option("jinja file, for all models", "FILE")
    chat_template_kwargs: Object | None = option(
        "variables of the chat template; default: for a run's student those of its recipe", "JSON")
    processor_kwargs: Object | None = option(
        'how pictures are shown, for all models, as in a recipe: {"max_pixels": 501760}', "JSON")
    base_url: str | None = option(
        "of OpenAI-compatible chat completions, as http://localhost:8000/v1", "URL")
    api_key_env: str | None = option("environment variable that holds the server's key", "NAME")
    timeout: float | None = option("of one request to the server (default 120)", "SECONDS")

    judge_url: str | None = option(
        "of a language model that judges what rules cannot (mmvet, charxiv): chat completions",
        "URL")
    judge_model: str | None = option("as its server calls it", "MODEL")
    judge_key_env: str | None = option("environment variable that holds its server's key", "NAME")
    judge_prompt: Path | None = option(
        "in place of a rule's own, with {question}, {answer} and {prediction}", "FILE")

    harness: Literal["lm-eval"] | None = option("--tasks are those of lm-eval")
    num_fewshot: int | None = option("solved examples", "N")
    apply_chat_template: bool | None = option()

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.tasks and not self.suite:
            raise ValueError("--tasks or --suite is needed: which benchmarks?")
        return self


def evaluate(**options: Any) -> dict[str, dict[str, Any]]:
    """Let models answer benchmarks, and judge the answers.

    Args:
        options: those of `EvaluateOptions`, for example `model="runs/first"`,
            `tasks=["pope=pope.jsonl"]` and `output_dir="runs/first/eval"`.

    Returns:
        By model what was written to its results.json.

    Raises:
        TaidError: anything a user can mend, before weights are loaded where it can show there.

    Example:
        The student of the example of `distill`, asked two questions:

        >>> from pathlib import Path
        >>> from taid_vlm import evaluate
        >>> _ = Path("held.jsonl").write_text(
        ...     '{"question": "a red circle. is there a square?", "answer": "no"}\\n'
        ...     '{"question": "a red circle. is there a circle?", "answer": "yes"}\\n')
        >>> _ = Path("held.yaml").write_text(
        ...     'type: short_answer\\ndata: held.jsonl\\nimages: false\\nprompt: "{question}"\\n')
        >>> results = evaluate(model="runs/first", tasks=["held.yaml"], output_dir="runs/eval")
        >>> [(model, of["tasks"]["held"]["n"]) for model, of in results.items()]
        [('first', 2)]
    """
    return _evaluate(EvaluateOptions(**options))


def run(options: EvaluateOptions) -> None:
    results = _evaluate(options)

    from taid_vlm.benchmarks.table import as_text
    from taid_vlm.io.files import as_json

    say_and_part(lambda: as_json(results) if options.json_ else as_text(results))


def _evaluate(options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    if options.harness is not None:
        return _with_harness(options)
    options.refuse(_OF_HARNESS, "goes with --harness lm-eval")

    from taid_vlm.benchmarks.asking import Asking, open_tasks
    from taid_vlm.benchmarks.evaluate import evaluate
    from taid_vlm.benchmarks.suite import with_members

    asking = Asking(**options.given(_ASKING), batch_size=options.batch_size)
    if asking.method == "likelihood":
        options.refuse(("thoughts",), "is for generated answers; likelihood chooses without any")
    candidates, judge_model = open_candidates(options, options.model), open_judge(options)
    suites = options.suite or ()
    tasks = open_tasks(with_members(options.tasks or (), suites), options.rule or (),
                       options.max_records, options.video_frames, options.thoughts or "auto")
    return evaluate(candidates, tasks, options.output_dir, asking, judge_model,
                    [suite.partition("=")[0] for suite in suites])


def _with_harness(options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """lm-eval's own tasks, by lm-eval."""
    options.refuse(("rule", "thoughts", *_ASKING, "base_url", "video_frames", "suite", "judge_url",
                    *JUDGE),
                   "is for this package's own benchmarks; leave it out with --harness")
    if not options.apply_chat_template:
        options.refuse(("chat_template_kwargs",), "goes with --apply-chat-template")
    from taid_vlm.benchmarks.harness.lm_eval import run_lm_eval
    from taid_vlm.config.model import ModelSpec
    from taid_vlm.runs.folders import locked

    candidates, output = open_candidates(options, options.model), options.output_dir.expanduser()
    named = [text.partition("=") for text in options.tasks or ()]
    results = {}
    for candidate in candidates:
        assert isinstance(candidate.source, ModelSpec)
        folder = output / candidate.name if len(candidates) > 1 else output
        with locked(folder.with_name(f".{folder.name}.evaluation")):  # the folder itself stays new
            results[candidate.name] = run_lm_eval(
                candidate.source, [task for task, _, _ in named], folder,
                data={task: data for task, _, data in named if data}, name=candidate.name,
                limit=options.max_records, batch_size=options.batch_size,
                **options.given(_OF_HARNESS))
    return results
