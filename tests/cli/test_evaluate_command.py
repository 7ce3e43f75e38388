"""`taid-vlm evaluate`, as a user calls it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import PartialState
from benchmarks.quiz import timeless
from benchmarks.serving import KEY, Server, completion, failure, serving
from cli.recipes import Checkpoints, Outcome, command, loaded, png, write_jsonl, write_parquet

from taid_vlm.benchmarks.registry import find_benchmark
from taid_vlm.commands.evaluate import evaluate
from taid_vlm.errors import TaidError

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent"))
Cli = Callable[..., Outcome]
NUMBER = 10


def pope(folder: Path) -> Path:
    return write_jsonl(folder / "pope.jsonl", [
        {"question_id": index, "question": f"Is there a {word} in the image?",
         "answer": ("yes", "no")[index % 2], "category": ("random", "popular")[index // 5],
         "image": f"{index % 4}.png", "image_source": str(index % 4)}
        for index, word in enumerate(("cat", "dog", "red car", "tree", "cup") * (NUMBER // 5))])


def mmstar(folder: Path) -> Path:
    rng = random.Random(0)
    return write_parquet(folder / "mmstar.parquet", [
        {"index": index, "question": f"What is it? Options: A: {rng.random():.2f}, B: dog, C: cat, "
         "D: sky", "answer": "ABCD"[index % 4], "category": "coarse",
         "l2_category": ("objects", "scenes")[index % 2], "image": png(index % 4)}
        for index in range(NUMBER)])


def own(folder: Path) -> Path:
    write_jsonl(folder / "sums.jsonl", [
        {"id": f"s{a}", "question": f"{a} + {a}?", "options": ["0", "2", "4"], "answer": "ABC"[a]}
        for a in range(3)])
    (folder / "sums.yaml").write_text(yaml.safe_dump(
        {"type": "multiple_choice", "data": "sums.jsonl", "images": False}))
    return folder / "sums.yaml"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    pope(tmp_path), mmstar(tmp_path), own(tmp_path)
    (tmp_path / "elsewhere").mkdir()  # the file was moved, its pictures were not
    pope(tmp_path / "elsewhere")
    write_jsonl(tmp_path / "odd.jsonl", [{"question_id": 1, "question": "Is?", "image": "0.png"}])
    return tmp_path


def answers(output: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers" / f"{task}.jsonl").open()]


def test_models_and_tasks_side_by_side(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    done = cli("evaluate", "--model", f"teacher={checkpoints('internvl')}",
               "--model", f"base={checkpoints('llava')}", "--tasks", f"pope={data}/pope.jsonl",
               f"mmstar={data}/mmstar.parquet", data / "sums.yaml", "--output-dir", data / "eval",
               "--rule", "mmstar:vlmevalkit", "pope:lmms", "--batch-size", "4")
    assert done.status == 0, done.err
    header, *table = done.out.splitlines()
    assert header.split() == ["model", "task", "rule", "figure", "value", "n", "unread",
                              "unanswered", "cut", "seconds"]
    assert sum(line.startswith("teacher") for line in table) == 3
    assert any(line.split()[:5] == ["base", "mmstar", "vlmevalkit", "1", "accuracy"]
               for line in table)
    for name in ("teacher", "base"):
        results = loaded(data / "eval" / name / "results.json")
        tasks = results["tasks"]
        assert (results["name"], list(tasks)) == (name, ["pope", "mmstar", "sums"])
        assert [tasks[task]["n"] for task in tasks] == [NUMBER, NUMBER, 3]
        assert (tasks["pope"]["rule"], tasks["mmstar"]["rule"]) == ("lmms", "vlmevalkit")
        assert set(tasks["mmstar"]["by_tag"]["l2_category"]) == {"objects", "scenes"}
        for task, entry in tasks.items():
            rows = answers(data / "eval" / name, task)
            benchmark = find_benchmark(str(data / "sums.yaml") if task == "sums" else task)
            assert len(rows) == entry["n"]
            assert entry["parse_failures"] == sum(row["read"] is None for row in rows)
            assert entry["rule_version"] == next(
                rule.version for rule in benchmark.rules if rule.name == entry["rule"])


def test_json_and_likelihood(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    done = cli("evaluate", "--model", checkpoints("qwen2_5_vl"), "--tasks",
               f"mmstar={data}/mmstar.parquet", "--output-dir", data / "eval", "--json",
               "--method", "likelihood", "--choose-by", "text", "--normalise", "tokens",
               "--max-records", 6, "--dtype", "bfloat16")
    assert done.status == 0, done.err
    (results,) = json.loads(done.out).values()
    assert results == loaded(data / "eval" / "results.json")
    assert results["model"]["dtype"] == "bfloat16"
    entry = results["tasks"]["mmstar"]
    assert (entry["n"], entry["parse_failures"], entry["source"]["max_records"]) == (6, 0, 6)
    assert {row["answer"] for row in answers(data / "eval", "mmstar")} <= set("ABCD")


def test_sampling(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    done = cli("evaluate", "--model", checkpoints("llama"), "--tasks", data / "sums.yaml",
               "--output-dir", data / "eval", "--temperature", 1, "--top-p", 0.95, "--seeds", 1, 2,
               "--max-new-tokens", 3)
    assert done.status == 0, done.err
    entry = loaded(data / "eval" / "results.json")["tasks"]["sums"]
    assert entry["answering"] == {"method": "generate", "max_new_tokens": 3, "temperature": 1.0,
                                  "top_p": 0.95, "seeds": [1, 2]}
    assert len(entry["figures"]["accuracy"]["seeds"]) == 2


def test_a_model_behind_a_url(cli: Cli, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    with serving() as server:
        check_served(cli, data, server, monkeypatch)


def check_served(cli: Cli, data: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = lambda body, times: completion("Yes, there is.") if times > 1 else failure(429)
    monkeypatch.setattr("taid_vlm.benchmarks.remote.Endpoint.backoff", 0.01)
    arguments = ("evaluate", "--model", "gpt=org/big-vlm", "--tasks", f"pope={data}/pope.jsonl",
                 "--output-dir", data / "eval", "--base-url", server.url, "--api-key-env", "MY_KEY",
                 "--timeout", 5)
    done = cli(*arguments)
    assert done.status == 0, done.err
    results = loaded(data / "eval" / "results.json")
    assert results["model"] == {"name": "org/big-vlm", "url": server.url}
    assert results["tasks"]["pope"]["figures"]["accuracy"]["value"] == 0.5
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    written = [path.read_text() for path in (data / "eval").rglob("*.json*")]
    assert not any(KEY in text for text in (*written, done.out, done.err))
    asked = len(server.bodies)
    assert asked == 2 * NUMBER
    assert cli(*arguments).status == 0
    assert len(server.bodies) == asked  # nothing is asked, and paid for, twice


def forked(arguments: tuple[Any, ...], shown: Path, **environment: str) -> int:
    """The command in a process of its own, which shares what is imported here; its id."""
    process = os.fork()
    if process:
        return process
    try:
        os.environ.update(environment)
        PartialState._reset_state()
        with shown.open("w") as file, contextlib.redirect_stdout(file):
            status = command(*arguments)
    except BaseException:
        status = 1
    os._exit(status)


def on_two(arguments: tuple[Any, ...], data: Path) -> None:
    """The command in two processes that work together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [forked(arguments, data / f"{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank),
                        **group) for rank in range(2)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]


def test_two_processes_give_the_same(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    def arguments(output: str) -> tuple[Any, ...]:
        return ("evaluate", "--model", checkpoints("llava"), "--tasks", f"pope={data}/pope.jsonl",
                "--output-dir", data / output, "--batch-size", 2)

    on_two(arguments("two"), data)
    assert (data / "0.txt").read_text().startswith("model ")
    assert (data / "1.txt").read_text() == ""
    assert cli(*arguments("one")).status == 0
    one, two = (timeless(loaded(data / name / "results.json")) for name in ("one", "two"))
    assert one == two
    assert loaded(data / "two" / "results.json")["machine"]["processes"] == 2
    assert answers(data / "one", "pope") == answers(data / "two", "pope")
    assert sorted(path.name for path in (data / "two" / "answers").iterdir()) == ["pope.jsonl"]


def test_killed_and_called_again(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    """The power goes while answers are being written; the same command goes on."""
    arguments = ("evaluate", "--model", checkpoints("llava"), "--tasks",
                 f"mmstar={data}/mmstar.parquet", "--batch-size", "1", "--max-new-tokens", "60")
    partial = data / "eval" / "answers" / ".mmstar.partial-0.jsonl"
    process = forked((*arguments, "--output-dir", data / "eval"), data / "shown.txt")
    waited = time.monotonic()
    while not (partial.exists() and partial.read_text().count("\n") > 2):
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        assert time.monotonic() - waited < 60
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (data / "eval" / "results.json").exists()
    assert 2 < partial.read_text().count("\n") < NUMBER + 1
    for output in ("eval", "whole"):
        done = cli(*arguments, "--output-dir", data / output)
        assert done.status == 0, done.err
    assert answers(data / "eval", "mmstar") == answers(data / "whole", "mmstar")


def test_from_python(checkpoints: Checkpoints, data: Path) -> None:
    """One model and one task need no list; the command writes the same."""
    (results,) = evaluate(model=Path(checkpoints("llama")), tasks=data / "sums.yaml",
                          output_dir=data / "eval", max_new_tokens=3, batch_size=2).values()
    assert results == loaded(data / "eval" / "results.json")
    assert results["tasks"]["sums"]["answering"]["max_new_tokens"] == 3
    with pytest.raises(TaidError, match=r"no option '--task'\. Did you mean '--tasks'\?"):
        evaluate(model="m", tasks="sums", output_dir=data, task="pope")
    with pytest.raises(TaidError, match="--tasks or --suite is needed"):
        evaluate(model="m", output_dir=data)


# ----- mistakes -----------------------------------------------------------------------------

POPE = ["--tasks", "pope={data}/pope.jsonl"]
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown task": (["--tasks", "pop={data}/pope.jsonl"],
                     ("no benchmark 'pop'", "Did you mean 'pope'?")),
    "twice": ([*POPE, *POPE], ("'pope' stands twice",)),
    "missing file": (["--tasks", "pope={data}/poppe.jsonl"],
                     ("poppe.jsonl", "does not exist", "'pope.jsonl'")),
    "missing column": (["--tasks", "pope={data}/odd.jsonl"],
                       ("odd.jsonl:1", "'answer' is missing")),
    "on the hub, offline": (["--tasks", "mmstar"], ("Lin-Chen/MMStar", "mmstar=FILE")),
    "missing YAML": (["--tasks", "{data}/sum.yaml"], ("sum.yaml", "sums.yaml")),
    "unknown rule": ([*POPE, "--rule", "pope:oficial"],
                     ("pope has no rule 'oficial'", "Did you mean 'official'?")),
    "rule of another task": ([*POPE, "--rule", "mme:official"], ("'mme' is none of the tasks",)),
    "rule without task": ([*POPE, "--rule", "official"], ("must look like mmstar:vlmevalkit",)),
    "no model": ([*POPE, "--model", "b={data}/nowhere"], ("model: no model at", "nowhere")),
    "text model": ([*POPE, "--model", "{text}"], ("is a text model", "pope asks about images")),
    "the same name": ([*POPE, "--model", "{llava}"], ("two models are called",)),
    "method": ([*POPE, "--method", "likelyhood"], ("Did you mean 'likelihood'?",)),
    "likelihood of what": ([*POPE, "--method", "likelihood"], ("pope", "use generate")),
    "dtype": ([*POPE, "--dtype", "bf16"], ("--dtype = 'bf16'", "bfloat16")),
    "template": ([*POPE, "--chat-template", "{data}/none.jinja"], ("none.jinja", "neither a file")),
    "records": ([*POPE, "--max-records", "0"], ("--max-records = 0",)),
    "no image folder": (["--tasks", "pope={data}/elsewhere/pope.jsonl"],
                        (f"none of the {NUMBER} questions", f"{NUMBER} x unreadable image",
                         "elsewhere/0.png", "there is no such file", "Image paths start from")),
    "thoughts": ([*POPE, "--thoughts", "thnk"], ("--thoughts thnk", "Did you mean 'think'?")),
    "thoughts of likelihood": (
        ["--tasks", "mmstar={data}/mmstar.parquet", "--method", "likelihood", "--thoughts", "auto"],
        ("--thoughts is for generated answers",)),
    "seeds": ([*POPE, "--seeds", "1", "2"], ("--temperature",)),
    "key without URL": ([*POPE, "--api-key-env", "X"], ("--api-key-env goes with --base-url",)),
    "timeout without URL": ([*POPE, "--timeout", "3"], ("--timeout goes with --base-url",)),
    "no key": ([*POPE, "--base-url", "http://x/v1", "--api-key-env", "NO_SUCH_KEY"],
               ("the environment variable 'NO_SUCH_KEY' is not set",)),
    "dtype of a server": ([*POPE, "--base-url", "http://x/v1", "--dtype", "auto"],
                          ("--dtype is up to the server",)),
    "no URL": ([*POPE, "--base-url", "localhost:80"], ("--base-url = 'localhost:80'", "http://")),
    "likelihood of a server": (
        ["--tasks", "mmstar={data}/mmstar.parquet", "--base-url", "http://x/v1", "--method",
         "likelihood"], ("needs a model on this machine",)),
    "harness": ([*POPE, "--harness", "lmeval"], ("--harness = 'lmeval'", "'lm-eval'")),
    "rule with harness": ([*POPE, "--harness", "lm-eval", "--rule", "pope:lmms"],
                          ("--rule is for this package's own benchmarks",)),
    "fewshot without harness": ([*POPE, "--num-fewshot", "3"], ("goes with --harness lm-eval",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show_before_weights_are_loaded(
    cli: Cli, checkpoints: Checkpoints, data: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("taid_vlm.benchmarks.evaluate.load_model", never)
    given, words = MISTAKES[mistake]
    places = {"data": data, "text": checkpoints("llama"), "llava": checkpoints("llava")}
    done = cli("evaluate", "--model", checkpoints("llava"), "--output-dir", data / "eval",
               *(argument.format(**places) for argument in given))
    assert done.status == 2
    (message,) = done.errors
    assert all(word in message for word in words), message
    assert not (data / "eval").exists()


def test_two_evaluations_do_not_share_a_folder(
    cli: Cli, checkpoints: Checkpoints, data: Path
) -> None:
    """Neither one that writes there, nor one of several models of which one does."""
    task = ("--tasks", f"pope={data}/pope.jsonl")
    (data / "eval" / "other").mkdir(parents=True)
    with (data / "eval" / "other" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711")
        file.flush()
        one = cli("evaluate", "--model", checkpoints("llava"), *task, "--output-dir",
                  data / "eval" / "other")
        two = cli("evaluate", "--model", checkpoints("llava"), f"other={checkpoints('qwen2_5_vl')}",
                  *task, "--output-dir", data / "eval")
    for done in (one, two):
        assert done.status == 2
        (message,) = done.errors
        assert f"'{data}/eval/other' is in use by another run (process 4711)" in message
    assert sorted(path.name for path in (data / "eval").rglob("*")) == [".lock", "other"]


def test_nor_do_two_of_lm_eval(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    (data / ".eval.evaluation").mkdir()
    with (data / ".eval.evaluation" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cli("evaluate", "--model", checkpoints("llama"), "--tasks", "arc_easy",
                   "--harness", "lm-eval", "--output-dir", data / "eval")
    assert done.status == 2
    assert "is in use by another run" in done.errors[0]
    assert not (data / "eval").exists()


def test_what_cannot_be_asked_of_some_questions_is_told(
    cli: Cli, checkpoints: Checkpoints, data: Path
) -> None:
    (data / "1.png").unlink()
    done = cli("evaluate", "--model", f"m={checkpoints('llava')}", "--tasks",
               f"pope={data}/pope.jsonl", "--output-dir", data / "eval")
    assert done.status == 0, done.err
    assert "m, pope: unanswered: 3 x unreadable image" in done.out.splitlines()
    entry = loaded(data / "eval" / "results.json")["tasks"]["pope"]
    assert entry["unanswered"] == {"unreadable image": 3}
    assert [path.name for path in (data / "eval").iterdir() if path.name.startswith(".")] == []


def test_a_benchmark_that_a_model_cannot_take_leaves_nothing(
    cli: Cli, checkpoints: Checkpoints, data: Path
) -> None:
    """Only once the weights are loaded can a question be too long."""
    write_jsonl(data / "sums.jsonl", [
        {"id": f"s{a}", "question": "what is this " * 3000, "options": ["0", "2"], "answer": "A"}
        for a in range(3)])
    done = cli("evaluate", "--model", checkpoints("llama"), "--tasks", data / "sums.yaml",
               "--output-dir", data / "eval")
    assert done.status == 2
    (message,) = done.errors
    assert "sums: none of the 3 questions" in message
    assert "3 x longer than the model's context" in message
    assert not (data / "eval").exists()


def test_an_interruption_says_how_to_go_on(
    cli: Cli, checkpoints: Checkpoints, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taid_vlm.benchmarks.answering.generate_batch", stop)
    done = cli("evaluate", "--model", checkpoints("llava"), "--output-dir", data / "eval",
               "--tasks", f"pope={data}/pope.jsonl")
    assert done.status == 130
    assert "the same command goes on" in done.err


@pytest.mark.skipif(not (EXTRA / "nlvr_test.parquet").exists(), reason="TAID_VLM_EXTRA_DATA")
def test_real_pictures(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """`nlvr` on its real rows, by two families, at two batch sizes."""
    for family in ("llava", "qwen2_5_vl"):
        for size in (1, 4):
            done = cli("evaluate", "--model", checkpoints(family), "--output-dir",
                       tmp_path / f"{family}{size}", "--batch-size", size, "--max-records", 8,
                       "--tasks", f"nlvr={EXTRA}/nlvr_test.parquet")
            assert done.status == 0, done.err
        assert answers(tmp_path / f"{family}1", "nlvr") == answers(tmp_path / f"{family}4", "nlvr")
        assert loaded(tmp_path / f"{family}1/results.json")["tasks"]["nlvr"]["n"] == 8


# ----- suites -------------------------------------------------------------------------------


def test_a_suite_over_two_calls(cli: Cli, checkpoints: Checkpoints, data: Path) -> None:
    """What is there is evaluated; the average waits for the rest, which a later call may bring."""
    (data / "suite").mkdir()
    (data / "mmstar.parquet").rename(data / "suite" / "mmstar.parquet")
    arguments = ("evaluate", "--model", checkpoints("llava"), "--output-dir", data / "eval",
                 "--batch-size", 4)
    done = cli(*arguments, "--suite", f"taid-vlm={data}/suite")
    assert done.status == 0, done.err
    assert "taid-vlm: no average, missing: mmbench (not evaluated), mmmu" in done.out
    suites = loaded(data / "eval" / "results.json")["suites"]
    assert suites["taid-vlm"]["figures"] == {} and "mmstar" not in suites["taid-vlm"]["missing"]
    write_jsonl(data / "ai2d.jsonl", [{"question": "?", "options": ["a", "b"], "answer": 1,
                                       "image": "0.png"}])
    assert cli(*arguments, "--tasks", f"ai2d={data}/ai2d.jsonl").status == 0
    missing = loaded(data / "eval" / "results.json")["suites"]["taid-vlm"]["missing"]
    assert sorted(missing) == ["hallusion_bench", "math_vista", "mmbench", "mmmu", "mmvet",
                               "ocrbench"]
    assert "--tasks or --suite is needed" in cli(*arguments).err
    assert "no suite 'taid'" in cli(*arguments, "--suite", "taid").err


def test_a_judge_on_the_command_line(cli: Cli, checkpoints: Checkpoints, data: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    write_jsonl(data / "mmvet.jsonl", [{"question_id": "v1", "question": "Who?", "answer": "me",
                                        "capability": "rec", "image": "0.png"}])
    with serving() as server:
        server.reply = lambda body, _: completion("0.6")
        arguments = ("evaluate", "--model", checkpoints("llava"), "--tasks",
                     f"mmvet={data}/mmvet.jsonl", "--output-dir", data / "eval",
                     "--max-new-tokens", 4)
        plain = cli(*arguments)
        assert plain.status == 0 and "1 of 1 answers have no score" in plain.out
        assert "--judge-model goes with --judge-url" in cli(*arguments, "--judge-model", "x").err
        done = cli(*arguments, "--judge-url", server.url, "--judge-model", "judge",
                   "--judge-key-env", "JUDGE_KEY")
    assert done.status == 0 and "60.0" in done.out
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}" and len(server.bodies) == 1
    written = [path.read_text() for path in (data / "eval").rglob("*.json*")]
    assert not any(KEY in text for text in (*written, done.out, done.err))


def test_of_two_processes_one_asks_the_judge(
    cli: Cli, checkpoints: Checkpoints, data: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_jsonl(data / "mmvet.jsonl", [
        {"question_id": f"v{n}", "question": f"Who is {n}?", "answer": "me", "capability": "rec",
         "image": f"{n % 4}.png"} for n in range(5)])
    with serving() as server:
        server.reply = lambda body, _: completion("0.5")
        arguments = ("evaluate", "--model", checkpoints("llava"), "--tasks",
                     f"mmvet={data}/mmvet.jsonl", "--output-dir", data / "eval", "--batch-size", 2,
                     "--max-new-tokens", 4, "--judge-url", server.url, "--judge-model", "judge")
        on_two(arguments, data)
        assert len(server.bodies) == 5
        figure = loaded(data / "eval" / "results.json")["tasks"]["mmvet"]["figures"]["score"]
        assert (figure["value"], figure["n"]) == (0.5, 5)
        assert cli(*arguments).status == 0  # nobody is asked again
        assert len(server.bodies) == 5
    assert sorted(path.name for path in (data / "eval" / "answers").iterdir()) == [
        "mmvet.jsonl", "mmvet.judge.jsonl"]
