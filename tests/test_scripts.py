"""The launcher scripts as a launcher starts them, on one process and on two."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from zoo import build, save
from zoo.images import images

from benchmarks import harness_data

ROOT = Path(__file__).parents[1]
WORDS = ("red", "green", "blue", "circle", "square", "left", "right", "of", "the", "two")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small text pair of two families, and records of unequal length."""
    save(build("llama"), tmp_path / "teacher")
    save(build("qwen2", seed=1, tokenizer="permuted"), tmp_path / "student")
    rng = random.Random(0)
    rows = [{"prompt": "say something", "completion": " ".join(rng.choices(WORDS, k=1 + i % 9))}
            for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "teacher": {"model_name_or_path": str(tmp_path / "teacher")},
        "student": {"model_name_or_path": str(tmp_path / "student")},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")},
        "objective": {"name": "taid"},
        "train": {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
                  "per_device_eval_batch_size": 5, "use_cpu": True, "disable_tqdm": True,
                  "save_strategy": "no"},
        "output_dir": str(tmp_path / "one"),
    }))
    return path


def launch(program: list[str], recipe: Path, processes: int, *overrides: str) -> None:
    # accelerate's launcher starts one process on a CPU, whatever it is told, so torch's stands in
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", *program, str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_leave_the_results_of_one(recipe: Path) -> None:
    """Global batch of 8 either way; held-out figures over 24 records, none counted twice."""
    folder = recipe.parent
    script = [str(ROOT / "scripts" / "distill_llm.py")]
    launch(script, recipe, 1, "train.per_device_train_batch_size=8")
    launch(script, recipe, 2, f"output_dir={folder / 'two'}")
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("one", "two")]
    assert [r["machine"]["processes"] for r in results] == [1, 2]
    one, two = (r["eval"] for r in results)
    for when in ("before", "after"):
        assert one[when]["n_tokens"] == two[when]["n_tokens"]
        for figure in ("kl", "kl_stderr", "agreement", "nll"):
            assert two[when][figure] == pytest.approx(one[when][figure], rel=1e-4), figure
    assert (folder / "two" / "student" / "model.safetensors").exists()


def test_two_processes_without_the_repository(recipe: Path) -> None:
    """`-m taid_vlm distill` is what an installed package has in place of the scripts."""
    launch(["-m", "taid_vlm", "distill"], recipe, 2, "train.max_steps=1")
    results = json.loads((recipe.parent / "one" / "results.json").read_text())
    assert results["machine"]["processes"] == 2
    assert results["train"]["steps"] == 1


def test_accelerate_starts_the_package(recipe: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1",
               "-m", "taid_vlm", "distill", "train.max_steps=1", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (recipe.parent / "one" / "report.html").exists()


def test_the_steps_on_a_cached_teacher_are_measured(tmp_path: Path) -> None:
    """Every row of benchmarks/cache.md, on a few records."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench_cache.py"), "--folder", str(tmp_path / "bench"),
         "--steps", "1", "--rounds", "1", "--records", "16"], capture_output=True, text=True,
        check=False, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT),
                                       "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    page = (ROOT / "benchmarks/cache.md").read_text()
    for name in ("hidden states, float32", "hidden states, bfloat16", "top 64", "12 draws"):
        assert f"{name}: built in " in done.stdout
        assert f"{name}" in page
    assert done.stdout.count("CPU ms a step") == 6


# ----- evaluation ---------------------------------------------------------------------------


def evaluated(script: str, folder: Path, processes: int, *arguments: str | Path) -> dict[str, Any]:
    """What a script leaves in results.json, on one process or two."""
    output = folder / f"{script}-{processes}"
    command = [sys.executable, *(("-m", "torch.distributed.run", "--standalone",
                                  f"--nproc_per_node={processes}") if processes > 1 else ()),
               str(ROOT / "scripts" / script), *map(str, arguments), "--output-dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("unread") == 1  # one process prints
    return json.loads((output / "results.json").read_text())


def answers_of(folder: Path, script: str, processes: int) -> dict[str, str]:
    return {path.name: path.read_text() for path in
            sorted((folder / f"{script}-{processes}" / "answers").iterdir())}


def test_vision_benchmarks_on_two_processes(tmp_path: Path) -> None:
    """The same answers and figures as one process gives; the number is asserted."""
    save(build("llava"), tmp_path / "model")
    rows = []
    for index, picture in enumerate(images(9)):
        picture.save(tmp_path / f"{index}.png")
        rows.append({"question_id": index, "question": "is it " + "red " * (index % 4) + "?",
                     "answer": ("yes", "no")[index % 2], "category": "x", "image": f"{index}.png"})
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", tmp_path / "model", "--tasks", f"pope={tmp_path / 'pope.jsonl'}",
                 "--batch-size", "2", "--max-new-tokens", "5")
    one, two = (evaluated("evaluate_vlm.py", tmp_path, number, *arguments) for number in (1, 2))
    assert [one["machine"]["processes"], two["machine"]["processes"]] == [1, 2]
    assert two["tasks"]["pope"]["figures"] == one["tasks"]["pope"]["figures"]
    accuracy = two["tasks"]["pope"]["figures"]["accuracy"]
    assert accuracy == pytest.approx({**accuracy, "value": 5 / 9, "stderr": 0.17568209, "n": 9})
    assert answers_of(tmp_path, "evaluate_vlm.py", 1) == answers_of(tmp_path, "evaluate_vlm.py", 2)


def test_text_benchmarks_of_lm_eval_on_two_processes(tmp_path: Path) -> None:
    """Each takes its share of the tasks; figures and answers are those of one process."""
    pytest.importorskip("lm_eval")
    save(build("llama"), tmp_path / "model")
    for name, rows, asked in (("arc_challenge/ARC-Challenge", harness_data.arc, "test"),
                              ("winogrande/winogrande_xl", harness_data.winogrande, "validation"),
                              ("hellaswag/data", harness_data.hellaswag, "validation")):
        for split, number in (("train", 6), (asked, 4)):
            harness_data.parquet(rows(number), tmp_path / name / f"{split}-00000-of-00001.parquet")
    tasks = [f"{name}={tmp_path / name}" for name in ("arc_challenge", "winogrande", "hellaswag")]
    arguments = ("--model", tmp_path / "model", "--harness", "lm-eval", "--tasks", *tasks,
                 "--num-fewshot", "1")
    one, two = (evaluated("evaluate_llm.py", tmp_path, number, *arguments) for number in (1, 2))
    assert [*two["tasks"]] == [*one["tasks"]] == ["arc_challenge", "winogrande", "hellaswag"]
    for task, entry in one["tasks"].items():
        assert two["tasks"][task]["figures"] == entry["figures"]
    assert two["machine"]["processes"] == 2
    assert answers_of(tmp_path, "evaluate_llm.py", 1) == answers_of(tmp_path, "evaluate_llm.py", 2)


def test_a_served_student_is_asked_with_a_picture(tmp_path: Path) -> None:
    from benchmarks.serving import Body, completion, failure, serving

    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG of a kind")
    script = [sys.executable, str(ROOT / "scripts/ask_served.py"), "What is shown?"]

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *words], capture_output=True, text=True, check=False)

    with serving() as server:
        url = server.url
        server.reply = lambda body, _: completion("a red bar")
        done = ask("--image", str(picture), "--url", url, "--model", "student")
        assert (done.returncode, done.stdout) == (0, "a red bar\n"), done.stderr
        body: Body = server.bodies[0]
        assert body["model"] == "student" and body["temperature"] == 0
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,iVBORyBvZiBh")
        assert text == {"type": "text", "text": "What is shown?"}
        server.reply = lambda body, _: failure(400, "too long")
        done = ask("--url", url, "--model", "student")
        assert done.returncode == 1 and "400" in done.stderr and "too long" in done.stderr
    done = ask("--url", url, "--model", "student")
    assert done.returncode == 1 and "cannot be asked" in done.stderr
    assert ask("--image", str(tmp_path / "none.png")).returncode == 2
