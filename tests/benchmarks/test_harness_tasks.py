"""What is asked of lm-eval and what is made of its results, without lm-eval itself."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from zoo import make_tokenizer

from taid_vlm.benchmarks.harness import lm_eval as ours
from taid_vlm.benchmarks.harness.converted import (
    average,
    entry_of,
    figures_of,
    prompt_hash,
    rows_of,
    too_long,
)
from taid_vlm.benchmarks.harness.local_data import (
    TaskChange,
    data_folder,
    source_of,
    split_files,
    task_yaml,
)
from taid_vlm.benchmarks.harness.suites import (
    SUITES,
    TaskRequest,
    changes_of,
    expand,
    leaves,
    member_of,
)
from taid_vlm.errors import TaidError

ARC = {"task": "arc_challenge", "dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Challenge",
       "training_split": "train", "validation_split": "validation", "test_split": "test"}
MMLU = {"task": "mmlu_anatomy", "dataset_path": "cais/mmlu", "dataset_name": "anatomy",
        "test_split": "test", "fewshot_split": "dev"}


def change(path: Path | None, config: dict[str, Any] = ARC, shots: int | None = None,
           split: str | None = None) -> TaskChange:
    return TaskChange(config["task"], Path("/packaged/task.yaml"), config, path, shots, split)


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}\n")
    return folder


# ----- suites -------------------------------------------------------------------------------


def test_open_llm_has_the_leaderboards_shots_and_figures() -> None:
    found = {m.task: (m.num_fewshot, m.figure, m.fewshot_split) for m in SUITES["openllm"]}
    assert found == {
        "arc_challenge": (25, "acc_norm", "train"), "hellaswag": (10, "acc_norm", "train"),
        "mmlu": (5, "acc", None), "truthfulqa_mc2": (0, "acc", None),
        "winogrande": (5, "acc", "train"), "gsm8k": (5, "exact_match,strict-match", None)}
    assert member_of("gsm8k") is SUITES["openllm"][5] and member_of("lambada") is None


def test_a_suite_is_spelt_out_with_its_data() -> None:
    asked = expand(["openllm", "lambada"], {"openllm": "/d", "mmlu": "/m", "lambada": "/l.jsonl"},
                   None)
    assert [a.name for a in asked] == [m.task for m in SUITES["openllm"]] + ["lambada"]
    paths = {a.name: str(a.path) for a in asked}
    assert paths["mmlu"] == "/m" and paths["gsm8k"] == "/d/gsm8k" and paths["lambada"] == "/l.jsonl"
    assert asked[0].num_fewshot == 25 and asked[-1].member is None


@pytest.mark.parametrize(("tasks", "data", "shots", "message"), [
    ([], {}, None, "none is named"),
    (["gsm8k", "openllm"], {}, None, "'gsm8k' is asked for twice"),
    (["gsm8k"], {"gsmk8": "/d"}, None, "'gsmk8' is no task that was asked for. Did you mean"),
    (["openllm"], {}, 3, "num_fewshot = 3, but every task of the suite"),
])
def test_what_does_not_fit_is_refused(
    tasks: list[str], data: dict[str, str], shots: int | None, message: str
) -> None:
    with pytest.raises(TaidError, match=message):
        expand(tasks, data, shots)


def entry(kind: str, cfg: dict[str, Any] | None = None, tags: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=cfg, tags=set(tags),
                           yaml_path=Path("/packaged/x.yaml"))


INDEX = {
    "mmlu": entry("GROUP", {"group": "mmlu", "task": ["stem", {"task": "mmlu_law"}]}),
    "stem": entry("TAG", tags=("mmlu_anatomy", "mmlu_physics")),
    "mmlu_anatomy": entry("TASK", MMLU),
    "mmlu_physics": entry("TASK", MMLU | {"task": "mmlu_physics", "dataset_name": "physics"}),
    "mmlu_law": entry("TASK", MMLU | {"task": "mmlu_law", "dataset_name": "law"}),
    "truthfulqa_mc2": entry("TASK", {"task": "truthfulqa_mc2", "validation_split": "validation",
                                     "num_fewshot": 0}),
}


def test_a_group_is_all_its_tasks_each_with_its_folder(tmp_path: Path) -> None:
    assert leaves("mmlu", INDEX) == ["mmlu_anatomy", "mmlu_physics", "mmlu_law"]
    for name in ("anatomy", "physics", "law"):
        files(tmp_path / name, "test.jsonl", "dev.jsonl")
    changes = changes_of(TaskRequest("mmlu", tmp_path, 5), INDEX)
    assert [c.path for c in changes] == [tmp_path / n for n in ("anatomy", "physics", "law")]
    with pytest.raises(TaidError, match="no folder 'anatomy' for mmlu_anatomy"):
        changes_of(TaskRequest("mmlu", files(tmp_path / "other", "test.jsonl"), 5), INDEX)


def test_shots_for_a_task_that_writes_its_own_are_refused() -> None:
    with pytest.raises(TaidError, match="num_fewshot = 5, but truthfulqa_mc2 is defined without"):
        changes_of(TaskRequest("truthfulqa_mc2", None, 5), INDEX)
    assert changes_of(TaskRequest("truthfulqa_mc2", None, 0), INDEX)[0].shots == 0
    with pytest.raises(TaidError, match=r"no task 'mmlu_laws'\. Did you mean 'mmlu_law'"):
        changes_of(TaskRequest("mmlu_laws"), INDEX)


# ----- task files ---------------------------------------------------------------------------


def test_a_folder_gives_every_split(tmp_path: Path) -> None:
    files(tmp_path, "arc_train.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl",
          "contest.jsonl", "README.md")
    written = yaml.safe_load(task_yaml(change(tmp_path, shots=25, split="train")))
    assert written["include"] == "/packaged/task.yaml" and written["task"] == "arc_challenge"
    assert written["dataset_path"] == "json" and written["dataset_name"] is None
    names = {split: [Path(p).name for p in paths]
             for split, paths in written["dataset_kwargs"]["data_files"].items()}
    assert names == {"test": ["test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"],
                     "train": ["arc_train.jsonl"]}
    assert written["validation_split"] is None and "training_split" not in written
    assert (written["num_fewshot"], written["fewshot_split"]) == (25, "train")
    assert written["tag"] is None  # or the group of that tag would become this one task


def test_one_file_is_enough_without_examples(tmp_path: Path) -> None:
    path = files(tmp_path, "mine.parquet") / "mine.parquet"
    written = yaml.safe_load(task_yaml(change(path)))
    assert written["dataset_path"] == "parquet"
    assert list(written["dataset_kwargs"]["data_files"]) == ["test"]
    assert written["training_split"] is None and written["validation_split"] is None
    only_shots = yaml.safe_load(task_yaml(change(None, shots=3)))
    assert only_shots == {"include": "/packaged/task.yaml", "task": "arc_challenge", "tag": None,
                          "num_fewshot": 3}
    assert yaml.safe_load(task_yaml(change(path, MMLU)))["fewshot_split"] is None
    written_out = MMLU | {"fewshot_config": {"samples": [{}]}, "num_fewshot": 4}
    assert change(path, written_out).examples is None and task_yaml(change(path, written_out))


@pytest.mark.parametrize(("names", "shots", "message"), [
    (["validation.jsonl"], 0, "questions are in split 'test'.*It holds: validation.jsonl"),
    (["test.jsonl"], 2, "2 solved examples come from split 'train'"),
    (["a_test.jsonl", "b_test.jsonl"], 0, "could be any of a_test.jsonl, b_test.jsonl"),
    (["test.jsonl", "train.parquet"], 1, "must be of one kind"),
])
def test_a_folder_that_lacks_something_is_refused(
    names: list[str], shots: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match=message):
        task_yaml(change(files(tmp_path, *names), shots=shots))


def test_a_path_that_is_not_there_or_no_data_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "test.jsonl", "notes.txt")
    with pytest.raises(TaidError, match=r"does not exist\. Did you mean 'test.jsonl'"):
        task_yaml(change(tmp_path / "tests.jsonl"))
    with pytest.raises(TaidError, match=r"notes\.txt"):
        task_yaml(change(tmp_path / "notes.txt"))


def test_a_copy_of_the_hubs_repository_is_understood(tmp_path: Path) -> None:
    inner = files(tmp_path / "ARC-Challenge", "test.jsonl")
    assert data_folder(tmp_path, ARC, several=False) == inner
    plain = files(tmp_path / "plain" / "data", "test.jsonl")
    assert data_folder(tmp_path / "plain", ARC, several=False) == plain
    assert data_folder(plain, ARC, several=False) == plain
    assert data_folder(inner / "test.jsonl", ARC, several=False) == inner / "test.jsonl"


def test_the_source_is_the_questions_alone(tmp_path: Path) -> None:
    one = change(files(tmp_path, "test.jsonl", "train.jsonl"))
    before = source_of([one])
    assert before["path"] == str(tmp_path) and before["split"] == "test"
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    assert source_of([one]) == before
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n')
    assert source_of([one])["sha256"] != before["sha256"]
    assert list(split_files(one)) == ["test", "train"]
    assert source_of([change(None)]) == {"path": "allenai/ai2_arc/ARC-Challenge", "split": "test",
                                         "sha256": None}


# ----- results ------------------------------------------------------------------------------

RESULTS = {
    "arc_challenge": {"name": "arc_challenge", "alias": "arc", "sample_len": 4, "acc,none": 0.25,
                      "acc_stderr,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"},
    "gsm8k": {"sample_len": 3, "exact_match,flexible-extract": 1 / 3,
              "exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.1},
}


def test_figures_begin_with_the_headline() -> None:
    figures = figures_of(RESULTS["arc_challenge"], "arc_challenge")
    assert list(figures) == ["acc_norm", "acc"]
    assert figures["acc"] == {"value": 0.25, "stderr": 0.25, "n": 4}
    assert math.isnan(figures["acc_norm"]["stderr"])
    assert list(figures_of(RESULTS["gsm8k"], "gsm8k")) == [
        "exact_match,strict-match", "exact_match,flexible-extract"]
    assert list(figures_of(RESULTS["arc_challenge"], "unknown")) == ["acc", "acc_norm"]


def test_the_average_is_of_six_independent_tasks() -> None:
    tasks = {m.task: {"figures": {m.figure: {"value": 0.1 * i, "stderr": 0.01 * i, "n": 10 * i}}}
             for i, m in enumerate(SUITES["openllm"], start=1)}
    figure = average("openllm", tasks)["figures"]["average"]
    assert figure["value"] == pytest.approx(2.1 / 6) and figure["n"] == 210
    assert figure["stderr"] == pytest.approx(math.sqrt(91e-4) / 6)


def sample(number: int, said: list[Any], asked: list[Any], **more: Any) -> dict[str, Any]:
    return {"doc_id": number, "doc": {}, "doc_hash": str(number), "arguments": asked,
            "resps": [[one] for one in said], "filtered_resps": said, "filter": "none", **more}


def test_a_row_names_the_choice_that_its_figure_counts() -> None:
    choices = ["short", "a much longer one"]
    asked = [("Q? A:", f" {choice}") for choice in choices]
    held = [sample(0, [(-5.0, False), (-8.0, False)], asked, target=1, acc=0.0, acc_norm=1.0)]
    (by_length,) = rows_of("arc", held, "acc_norm", lambda _: choices)
    (plain,) = rows_of("arc", held, "acc", lambda _: choices)
    assert (by_length["answer"], by_length["score"]) == ("a much longer one", 1.0)
    assert (plain["answer"], plain["score"], plain["answers"]) == ("short", 0.0, [choices[1]])
    assert plain["likelihoods"] == [-5.0, -8.0] and plain["prompt"] == "Q? A:"
    assert plain["id"] == "arc/0" and plain["tags"] == {"task": "arc"}


def test_winogrande_has_its_choices_in_the_question() -> None:
    asked = [("The cat", " ran."), ("The dog", " ran.")]
    held = [sample(0, [(-2.0, False), (-1.0, False)], asked, target="ran.", acc=1.0)]
    (row,) = rows_of("w", held, "acc", lambda _: ["The cat", "The dog"], lambda _: 1)
    assert row["answer"] == "The dog" and row["prompt"] == "The cat\nThe dog"
    assert row["answers"] == ["The dog"]


def test_what_a_filter_could_not_read_is_counted() -> None:
    asked = [("Question: 1+1?", {"until": []})]
    held = [sample(i, [text], asked, target="2", exact_match=score, filter=name) | {
        "filtered_resps": [read]} for i, (text, read, score, name) in enumerate([
            ("#### 2", "2", 1.0, "strict-match"), ("two", "[invalid]", 0.0, "strict-match"),
            ("", "", 0.0, "strict-match"), ("#### 2", "2", 1.0, "flexible-extract")])]
    rows = rows_of("gsm8k", held, "exact_match,strict-match")
    assert [row["read"] for row in rows] == ["2", None, None]
    assert [row["answer"] for row in rows] == ["#### 2", "two", ""]
    raw = {"results": RESULTS, "versions": {"gsm8k": 3.0}}
    told = entry_of("gsm8k", raw, rows, rule="lm-eval 0")
    assert told["parse_failures"] == 2 and told["n"] == 3 and told["rule_version"] == 3.0
    assert told["title"] == "GSM8K" and told["answers"] == "answers/gsm8k.jsonl"
    assert prompt_hash(rows) != prompt_hash(rows[:2])


def test_scores_that_are_no_numbers_and_texts_that_are_no_answers() -> None:
    held = [sample(0, [(-3.5, True)], [("once", " upon")], target="upon", perplexity=(1, 2))]
    (row,) = rows_of("lambada", held, "perplexity")
    assert row["score"] is None and row["likelihoods"] == [-3.5] and row["read"] == ""


def test_prompts_that_are_cut_are_counted_once() -> None:
    held = [sample(0, [(-1.0, True)] * 2, [("x" * 9, "ab"), ("x" * 9, "abc")]),
            sample(1, [(-1.0, True)], [("x", "y")]),
            sample(2, ["t"], [("x" * 7, {})]), sample(3, ["t"], [("x" * 6, {})]),
            sample(3, ["t"], [("x" * 6, {})], filter="other"),
            sample(4, ["t"], [("x" * 6, {"max_gen_toks": 5})])]
    assert too_long(held, list, max_length=10, max_gen_toks=4) == 3  # 0 (12 > 11), 2, 4


# ----- before lm-eval -----------------------------------------------------------------------


def test_without_lm_eval_one_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours._packaged_tasks.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(TaidError, match=r'pip install "taid-vlm\[lm-eval\]"'):
        ours.run_lm_eval("model", ["gsm8k"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "message"), [
    ({"limit": 0}, "limit = 0"), ({"batch_size": 0}, "batch_size = 0"),
    ({"num_fewshot": -1}, "num_fewshot = -1"), ({"batchsize": 2}, "Did you mean 'batch_size'"),
])
def test_options_are_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=message):
        ours.run_lm_eval("model", ["gsm8k"], tmp_path / "out", **options)


def test_two_bos_and_an_eos_behind_every_text_are_refused() -> None:
    tokenizer = make_tokenizer("llama")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ours.check_ends("a b", [[bos, 5, 6], [5, 6]], tokenizer)
    ours.check_ends(f"a b{tokenizer.eos_token}", [[bos, 5, eos]], tokenizer)
    with pytest.raises(TaidError, match="two BOS"):
        ours.check_ends("a b", [[bos, 5], [bos, bos, 5]], tokenizer)
    with pytest.raises(TaidError, match="EOS behind every text"):
        ours.check_ends("a b", [[bos, 5, eos]], tokenizer)
