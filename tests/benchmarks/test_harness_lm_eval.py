"""lm-eval on this package's models: the same figures as lm-eval alone, offline, on local data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import build, save

from benchmarks import harness_data as made

pytest.importorskip("lm_eval")

import datasets
import lm_eval.evaluator
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from taid_vlm.benchmarks.harness import lm_eval as ours
from taid_vlm.benchmarks.harness.lm_eval import run_lm_eval
from taid_vlm.benchmarks.harness.suites import leaves
from taid_vlm.compare import compare_runs, read_method
from taid_vlm.compare.folders import read_folder
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent"))
TASKS = ("arc_challenge", "hellaswag", "winogrande", "gsm8k")


@pytest.fixture(scope="module", autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # runs pip, for 20 s
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints llama and llava, and data/ with all six tasks."""
    root = tmp_path_factory.mktemp("harness")
    for family in ("llama", "llava"):
        save(build(family), root / family)
    index = ours._packaged_tasks()
    made.open_llm(root / "data", [index[t].cfg["dataset_name"] for t in leaves("mmlu", index)])
    return root


def answers(output: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers" / f"{task}.jsonl").open()]


def measure(folder: Path, output: Path, tasks: tuple[str, ...] = TASKS, model: str = "llama",
            **options: Any) -> dict[str, Any]:
    given = {"num_fewshot": 2, "device": "cpu", **options}
    return run_lm_eval(str(folder / model), tasks, output,
                       data={task: folder / "data" / task for task in tasks}, **given)


def alone(folder: Path, tmp_path: Path, **arguments: Any) -> dict[str, dict[str, Any]]:
    """lm-eval with the model loaded by itself and task files that owe nothing to this package."""
    paths = {"arc_challenge": ("ARC-Challenge", "test"), "hellaswag": ("data", "validation"),
             "winogrande": ("winogrande_xl", "validation"), "gsm8k": ("main", "test")}
    for task, (inner, split) in paths.items():
        files = {part: str(folder / "data" / task / inner / f"{part}-00000-of-00001.parquet")
                 for part in ("train", split)}
        config = {"include": str(ours._packaged_tasks()[task].yaml_path), "task": task,
                  "dataset_path": "parquet", "dataset_name": None,
                  "dataset_kwargs": {"data_files": files}}
        if task == "arc_challenge":
            config["validation_split"] = None
        (tmp_path / f"{task}.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    return {task: simple_evaluate(
        "hf", model_args={"pretrained": str(folder / "llama")}, tasks=[task], device="cpu",
        task_manager=manager, num_fewshot=2, **arguments) for task in TASKS}


def test_the_same_figures_as_lm_eval_alone(folder: Path, tmp_path: Path) -> None:
    results = measure(folder, tmp_path / "out", batch_size=4)
    by_task = alone(folder, tmp_path, batch_size=4)
    for task, expected in by_task.items():
        for name, figure in results["tasks"][task]["figures"].items():
            metric, _, kept = name.partition(",")
            value = expected["results"][task][f"{metric},{kept or 'none'}"]
            stderr = expected["results"][task][f"{metric}_stderr,{kept or 'none'}"]
            assert (figure["value"], figure["stderr"]) == (value, stderr), (task, name)
        rows, samples = answers(tmp_path / "out", task), expected["samples"][task]
        for row, sample in zip(rows, samples, strict=task != "gsm8k"):
            assert row["prompt"].startswith(sample["arguments"][0][0])
            if task == "gsm8k":
                assert row["answer"] == sample["resps"][0][0]
            else:
                assert row["likelihoods"] == [said[0] for said in sample["filtered_resps"]]
        assert results["tasks"][task]["n"] == len(rows) == expected["n-samples"][task]["effective"]


def test_its_own_logs_are_the_same_evaluation(folder: Path, tmp_path: Path) -> None:
    """What lm-eval writes with --log_samples, read by `compare`: figures, scores, choices and
    answers are those that its run through this package has."""
    measure(folder, tmp_path / "ours", batch_size=4)
    for task, raw in alone(folder, tmp_path, batch_size=4).items():
        tracker = EvaluationTracker(output_path=str(tmp_path / "logs"))
        tracker.general_config_tracker.model_name_sanitized = "llama"
        samples = raw.pop("samples")
        raw["lm_eval_version"] = version("lm-eval")  # of its environment's report, which is off
        tracker.save_results_aggregated(results=raw, samples=samples)
        tracker.save_results_samples(task_name=task, samples=samples[task])
    logged, ran = (read_folder(tmp_path / name) for name in ("logs", "ours"))
    assert logged.results["tasks"].keys() == ran.results["tasks"].keys() == set(TASKS)
    for task, entry in logged.results["tasks"].items():
        own = ran.results["tasks"][task]
        assert (entry["rule"], entry["rule_version"], entry["n"]) == (
            own["rule"], own["rule_version"], own["n"])
        assert entry["answering"]["num_fewshot"] == own["answering"]["num_fewshot"] == 2
        assert {name: (f["value"], f["stderr"]) for name, f in entry["figures"].items()} == {
            name: (f["value"], f["stderr"]) for name, f in own["figures"].items()}
        for first, second in zip(logged.answers(task), ran.answers(task), strict=True):
            assert (first["id"], first["score"]) == (second["id"], second["score"])
            if task in ("arc_challenge", "hellaswag"):
                assert (first["answer"], first["answers"]) == (second["answer"], second["answers"])
            if task == "gsm8k":
                assert (first["answer"], first["read"]) == (second["answer"], second["read"])
    found = compare_runs([read_method(f"logs={tmp_path / 'logs'}"),
                          read_method(f"ours={tmp_path / 'ours'}")])
    assert all(j.against["ours"].interval.value == 0 for j in found.benchmarks)
    assert sum(j.paired is not None for j in found.benchmarks) >= 4


@cache
def llama() -> Any:
    return build("llama")


def naive(prompt: str, continuation: str) -> float:
    """Log-likelihood of the continuation's tokens, one forward per row, in float64."""
    tokenizer, model = llama().tokenizer, llama().model.double()
    whole, before = (tokenizer(text).input_ids for text in (prompt + continuation, prompt))
    assert whole.count(tokenizer.bos_token_id) == 1
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """One run over the four tasks at batch 5."""
    measure(folder, folder / "run", batch_size=5)
    return folder / "run"


def test_likelihoods_are_those_of_one_forward_per_row(run: Path) -> None:
    for row in answers(run, "arc_challenge"):
        expected = [naive(row["prompt"], f" {choice}") for choice in row["choices"]]
        assert row["likelihoods"] == pytest.approx(expected, abs=1e-3)
        per_letter = [x / len(c) for x, c in zip(expected, row["choices"], strict=True)]
        assert row["answer"] == row["choices"][per_letter.index(max(per_letter))]
        assert row["score"] == float(row["answer"] == row["answers"][0])


def test_the_headline_is_the_mean_of_the_rows(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    for task, headline in zip(TASKS, ("acc_norm", "acc_norm", "acc", "exact_match,strict-match"),
                              strict=True):
        entry, rows = results["tasks"][task], answers(run, task)
        assert next(iter(entry["figures"])) == headline
        mean = sum(row["score"] for row in rows) / len(rows)
        assert entry["figures"][headline]["value"] == pytest.approx(mean)
        assert all(row["score"] == float(row["answer"] in row["answers"]) for row in rows
                   if task != "gsm8k")
        assert entry["n"] == len(rows) and entry["answering"]["num_fewshot"] == 2
        assert entry["parse_failures"] == (len(rows) if task == "gsm8k" else 0)
        assert entry["rule"].startswith("lm-eval 0.") and entry["rule_version"] >= 1


def test_the_batch_changes_nothing(folder: Path, run: Path, tmp_path: Path) -> None:
    measure(folder, tmp_path / "one", batch_size=1)
    for task in TASKS:
        for one, five in zip(answers(tmp_path / "one", task), answers(run, task), strict=True):
            assert one["likelihoods" if task != "gsm8k" else "answer"] == (
                pytest.approx(five["likelihoods"], abs=1e-4) if task != "gsm8k"
                else five["answer"])


def test_an_interrupted_evaluation_goes_on(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that were finished are not asked again, unless what they depend on is another."""
    output, measured, left = tmp_path / "out", ours._measured, list[str]()

    def watched(name: str, *rest: Any) -> Any:
        if len(left) == 2:
            raise KeyboardInterrupt
        left.append(name)
        return measured(name, *rest)

    monkeypatch.setattr(ours, "_measured", watched)
    with pytest.raises(KeyboardInterrupt):
        measure(folder, output, batch_size=5)
    assert not output.exists()
    assert left == list(TASKS[:2])
    left.clear()
    with pytest.raises(KeyboardInterrupt):
        measure(folder, output, batch_size=5, seed=7)
    assert left == list(TASKS[:2])  # other examples: asked anew
    left.clear()
    measure(folder, output, batch_size=5)
    assert left == list(TASKS[2:])
    for task in TASKS:
        assert answers(output, task) == answers(run, task)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_open_llm_is_the_papers_six(folder: Path, tmp_path: Path) -> None:
    results = run_lm_eval(str(folder / "llama"), ["openllm"], tmp_path / "out", device="cpu",
                          data={"openllm": folder / "data"}, batch_size=16)
    entries, suite = results["tasks"], results["suites"]["openllm"]
    shots = {name: entry["answering"]["num_fewshot"] for name, entry in entries.items()}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0,
                     "winogrande": 5, "gsm8k": 5}
    values = [next(iter(entry["figures"].values()))["value"] for entry in entries.values()]
    assert suite["figures"]["average"]["value"] == pytest.approx(sum(values) / 6)
    assert 0 < suite["figures"]["average"]["stderr"] < 0.5
    assert all(entry["seconds"] > 0 for entry in entries.values())
    assert len(entries["mmlu"]["by_tag"]["task"]) == 57
    assert entries["mmlu"]["n"] == sum(2 + i % 3 for i in range(57))
    first = answers(tmp_path / "out", "mmlu")[0]["prompt"]
    assert first.count("Answer:") == 6 and "(with answers) about" in first
    scores = [row["score"] for row in answers(tmp_path / "out", "mmlu")]
    assert entries["mmlu"]["figures"]["acc"]["value"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(("model", "adds_bos"), [("llama", True), ("llava", False)])
def test_the_chat_template_comes_once_with_one_bos(
    folder: Path, tmp_path: Path, model: str, adds_bos: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []
    real = ours.too_long  # is given lm-eval's own encoding

    def watched(samples: Any, encode: Any, *rest: Any) -> int:
        seen.extend(encode(prompt) for sample in samples for prompt, _ in sample["arguments"])
        return real(samples, encode, *rest)

    monkeypatch.setattr(ours, "too_long", watched)
    results = measure(folder, tmp_path / "out", ("arc_challenge", "gsm8k"), model,
                      apply_chat_template=True)
    tokenizer = build(model).tokenizer
    for task in results["tasks"]:
        for row in answers(tmp_path / "out", task):
            assert row["prompt"].count("Question:") == 3
            assert "'type'" not in row["prompt"]
    bos = [ids.count(tokenizer.bos_token_id) for ids in seen]
    assert bos and set(bos) == {int(adds_bos)}


def test_a_mistake_ends_before_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "load_model", lambda *_: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    with pytest.raises(TaidError, match=r"no task 'arc_chalenge'\. Did you mean 'arc_challenge'"):
        run_lm_eval(str(folder / "llama"), ["arc_chalenge"], out)
    with pytest.raises(TaidError, match=r"allenai/ai2_arc.*arc_easy=FOLDER"):
        run_lm_eval(str(folder / "llama"), ["arc_easy"], out)
    other = made.jsonl([{"text": "no question"}], tmp_path / "arc" / "test.jsonl")
    with pytest.raises(TaidError, match=r"'arc_easy'.*columns"):
        run_lm_eval(str(folder / "llama"), ["arc_easy"], out, data={"arc_easy": other})
    with pytest.raises(TaidError, match=r"no model at"):
        measure(folder, out, ("gsm8k",), "nowhere/at/all")
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_base_model_has_no_chat_template(folder: Path, tmp_path: Path) -> None:
    built = build("gpt2")
    built.tokenizer.chat_template = None
    save(built, tmp_path / "gpt2")
    with pytest.raises(TaidError, match=r"has no chat template"):
        run_lm_eval(ModelSpec(str(tmp_path / "gpt2")), ["gsm8k"], tmp_path / "out", device="cpu",
                    data={"gsm8k": folder / "data" / "gsm8k"}, apply_chat_template=True)


@pytest.mark.skipif(not (EXTRA / "text").exists(), reason="TAID_VLM_EXTRA_DATA lacks text")
def test_a_real_model_on_real_problems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = run_lm_eval(str(EXTRA / "stories260K"), ["gsm8k"], tmp_path / "out", limit=4,
                          data={"gsm8k": EXTRA / "text"}, device="cpu", num_fewshot=1)
    entry = results["tasks"]["gsm8k"]
    assert entry["n"] == 4 and entry["answering"]["limit"] == 4
    assert entry["answering"]["prompts_cut"] > 0 and "lm-eval cut them" in caplog.text
    assert entry["parse_failures"] + sum(r["read"] is not None for r in answers(
        tmp_path / "out", "gsm8k")) == 4
