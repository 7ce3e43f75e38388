"""What is asked and how: benchmarks with their questions and rules, and the settings of asking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.answering import generate_settings
from taid_vlm.benchmarks.likelihood import CHOOSE_BY, NORMALISE, choose_settings
from taid_vlm.benchmarks.metrics.thoughts import AUTO, check_rule
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.registry import find_benchmark
from taid_vlm.benchmarks.store import data_hash, question_hash
from taid_vlm.config.data import FRAMES, DataSource, VideoSpec
from taid_vlm.errors import TaidError, at_least, nearest, one_of
from taid_vlm.io.hashing import text_hash

METHODS = ("generate", "likelihood")


@dataclass(frozen=True)
class Asking:
    """How questions are put to a model.

    Args:
        method: "generate", or "likelihood" to choose among a question's choices.
        max_new_tokens: of an answer; None is what each benchmark says.
        temperature, top_p: 0 is greedy; otherwise answers are sampled once per seed.
        choose_by, normalise: as in `likelihood.Choosing`.
        batch_size: rows (behind a URL: requests) at once.
    """

    method: str = "generate"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seeds: tuple[int, ...] = (0,)
    choose_by: str = "letter"
    normalise: str = "sum"
    batch_size: int = 8

    def __post_init__(self) -> None:
        one_of("--method", self.method, METHODS)
        one_of("--choose-by", self.choose_by, CHOOSE_BY)
        one_of("--normalise", self.normalise, NORMALISE)
        at_least("--batch-size", self.batch_size, 1)
        at_least("--max-new-tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < float("inf"):
            raise TaidError(f"--temperature = {self.temperature}, but it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise TaidError(f"--top-p = {self.top_p}, but it must be in (0, 1].")
        self._check_together()

    def _check_together(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise TaidError(f"--seeds = {list(self.seeds)}, but they must differ.")
        if self.method == "likelihood" and (self.temperature or self.max_new_tokens):
            raise TaidError("--method likelihood generates nothing: leave --temperature and "
                            "--max-new-tokens out.")
        if not self.temperature and (self.seeds != (0,) or self.top_p != 1):
            raise TaidError("--seeds and --top-p are for sampled answers, but --temperature is 0; "
                            "set it, for example to 1.")

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """What stands in the results, and what answers of a benchmark depend on."""
        if self.method == "likelihood":
            return choose_settings(self.choose_by, self.normalise)
        return generate_settings(self.max_new_tokens or benchmark.max_new_tokens,
                                 self.temperature, self.top_p)


@dataclass(frozen=True)
class Task:
    """A benchmark, its questions, and the rule that judges the answers.

    left_out: rows that are no part of the benchmark, by reason.
    thoughts: by which rule of `metrics.thoughts` thoughts are taken off before.
    """

    benchmark: Benchmark
    rule: Rule
    source: DataSource
    questions: Sequence[Question]
    left_out: Mapping[str, int] = field(default_factory=dict)
    thoughts: str = AUTO

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Of all that a model is shown, by question id."""
        return {question.id: question_hash(question) for question in self.questions}

    @property
    def video_frames(self) -> dict[str, int]:
        """How many frames are shown of every video, where there are videos."""
        if not any(image.kind == "video" for q in self.questions for image in q.images):
            return {}
        return {"video_frames": (self.source.video and self.source.video.frames) or FRAMES}

    @cached_property
    def sha256(self) -> str | None:
        """Of a file or folder; None for several, and for those of the hub."""
        first, *others = self.source.paths
        return None if others else data_hash(Path(first).expanduser())

    @property
    def prompt_hash(self) -> str:
        together = "\n".join(f"{name} {each}" for name, each in self.hashes.items())
        return text_hash(together)


def open_tasks(
    names: Sequence[str], rules: Sequence[str] = (), max_records: int | None = None,
    video_frames: int | None = None, thoughts: str = AUTO,
) -> list[Task]:
    """The benchmarks that `--tasks` names, with all their questions read.

    Args:
        names: NAME, NAME=DATA or a YAML file each; without DATA they are read from the hub.
        rules: TASK:RULE each; the others are judged by their first rule.
        max_records: only the first so many rows of each.
        video_frames: shown of every video.
        thoughts: how they are taken off answers.

    Raises:
        TaidError: an unknown task or rule, data that is not there or lacks columns.
    """
    at_least("--max-records", max_records, 1)
    at_least("--video-frames", video_frames, 1)
    check_rule(thoughts)
    video = VideoSpec(frames=video_frames)
    benchmarks: dict[str, Benchmark] = {}
    places: dict[str, str] = {}
    for name, _, data in (text.partition("=") for text in names):
        benchmark = find_benchmark(name)
        if benchmark.name in benchmarks:
            raise TaidError(f"--tasks: '{benchmark.name}' stands twice.")
        benchmarks[benchmark.name], places[benchmark.name] = benchmark, data
    chosen = _rules(benchmarks, rules)
    return [replace(open_task(benchmark, chosen[name],
                              _source(benchmark, places[name], max_records, video)),
                    thoughts=thoughts) for name, benchmark in benchmarks.items()]


def open_task(benchmark: Benchmark, rule: Rule, source: DataSource) -> Task:
    """A benchmark with its questions read from `source`."""
    left_out = Counter[str]()
    try:
        questions = read_questions(benchmark, source, left_out=left_out)
    except TaidError as error:
        on_hub = benchmark.hub is not None and source.path == benchmark.hub[0]
        if Path(source.paths[0]).expanduser().exists() or not on_hub:
            raise
        raise TaidError(str(error), mend="With a copy on this machine: --tasks "
                                         f"{benchmark.name}=FILE.") from error
    return Task(benchmark, rule, source, questions, left_out)


def _rules(benchmarks: Mapping[str, Benchmark], texts: Sequence[str]) -> dict[str, Rule]:
    chosen = {name: benchmark.rules[0] for name, benchmark in benchmarks.items()}
    for text in texts:
        task, colon, wanted = text.partition(":")
        if not colon:
            raise TaidError(f"--rule '{text}' must look like mmstar:vlmevalkit.")
        if task not in benchmarks:
            raise TaidError(f"--rule '{text}': '{task}' is none of the tasks."
                            f"{nearest(task, benchmarks)}")
        named = {rule.name: rule for rule in benchmarks[task].rules}
        if wanted not in named:
            raise TaidError(f"--rule '{text}': {task} has no rule '{wanted}'."
                            f"{nearest(wanted, named)}")
        chosen[task] = named[wanted]
    return chosen


def _source(
    benchmark: Benchmark, data: str, max_records: int | None, video: VideoSpec
) -> DataSource:
    path, name, split = benchmark.hub or ("", None, "train")
    if not data and not path:
        raise TaidError(f"--tasks {benchmark.name}: its data is not on the hub; say where it is, "
                        f"as in {benchmark.name}=FILE.")
    is_files = Path(data or path).is_file() or any(sign in data for sign in "*?[")
    if is_files and not split.startswith("train"):
        split = "train"  # the split's name is the hub's; files are all there is
    return DataSource(path=data or path, split=split, name=None if data else name,
                      max_records=max_records, video=video)
