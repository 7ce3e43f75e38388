"""`taid-vlm generate`: the same records however it was interrupted, shared out or filtered anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.serving import Body, Reply, Server, completion, failure, serving
from cli.recipes import (
    Checkpoints,
    Outcome,
    byte_rows,
    command,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_parquet,
    write_recipe,
)
from cli.test_distill import FAST
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from zoo import VLM_FAMILIES, build, templates

from taid_vlm.commands.generate import generate
from taid_vlm.commands.recipes import shipped_recipes
from taid_vlm.config.yaml import read_yaml
from taid_vlm.errors import TaidError
from taid_vlm.generate import generate as module
from taid_vlm.io.jsonl import dump_lines
from taid_vlm.records import Record, open_records

Cli = Callable[..., Outcome]
SAMPLED = {"n": 2, "temperature": 1.0, "max_new_tokens": 12, "filters": ["none"], "batch_size": 3}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(Path(__file__).parents[2])}
SLOW = """
import sys, time
from taid_vlm.benchmarks import store
add = store.AnswerStore.add
def slow(self, *given):
    add(self, *given)
    print("kept", flush=True)
    time.sleep(0.5)
store.AnswerStore.add = slow
from taid_vlm.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def words(options: dict[str, Any]) -> list[str]:
    """Options as they stand on the command line."""
    line: list[str] = []
    for name, value in options.items():
        listed = value if isinstance(value, list) else [value]
        line += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, listed))]
    return line


def written(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]


def said(row: dict[str, Any]) -> Any:
    return row["messages"][-1]["content"]


def read_back(output: Path) -> list[Record]:
    """The records as training reads them, which are those that stand there."""
    records = list(open_records(str(output / "records.jsonl")))
    assert len(records) == loaded(output / "results.json")["records"]
    return records


def adds_up(results: dict[str, Any]) -> bool:
    lost = sum(results["unanswered"].values()) + sum(results["filtered"].values())
    return results["records"] + lost == results["answers"] == results["prompts"] * results[
        "answering"]["n"]


Taught = Callable[[str], str]


@pytest.fixture(scope="module")
def taught(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Small models that have learned to answer in words, and to stop."""
    known: dict[str, str] = {}

    def teach(family: str) -> str:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            rows = picture_rows(folder) if family in VLM_FAMILIES else pairs(16)
            assert command("distill", write_recipe(folder, {
                "student": {"model_name_or_path": checkpoints(family)}, "objective": "ce",
                "data": {"train": str(write_jsonl(folder / "train.jsonl", rows))},
                "train": {**FAST, "max_steps": 60}, "output_dir": str(folder / "run")})) == 0
            known[family] = str(folder / "run" / "student")
        return known[family]

    return teach


@pytest.fixture
def text(taught: Taught, tmp_path: Path) -> dict[str, Any]:
    return {"model": taught("llama"),
            "data": str(write_jsonl(tmp_path / "prompts.jsonl", pairs(7))), **SAMPLED}


# ----- what is written ----------------------------------------------------------------------


def test_records_and_results_say_everything(
    cli: Cli, text: dict[str, Any], tmp_path: Path
) -> None:
    done = cli("generate", *words(text), "--output-dir", tmp_path / "out")
    assert done.status == 0, done.err
    for line in ("prompts       7 from 7 records; left out: none",
                 "answers       14, of at most 12 tokens; there already: 0", "time          about",
                 "records       14 of 14 answers", "without any   0 of 7 prompts"):
        assert line in done.out
    results, rows = loaded(tmp_path / "out" / "results.json"), written(tmp_path / "out")
    assert [row["id"] for row in rows] == [
        f"prompts.jsonl:{line}/0#{number}" for line in range(1, 8) for number in range(2)]
    assert [row["messages"][0]["content"] for row in rows[::2]] == [
        row["prompt"] for row in pairs(7)]
    assert [row["category"] for row in rows[::2]] == [row["category"] for row in pairs(7)]
    assert len({said(row) for row in rows}) > 7  # draws of their own
    assert [record.answers[0] for record in read_back(tmp_path / "out")] == list(map(said, rows))
    assert adds_up(results)
    assert results["kind"] == "generation" and results["model"]["weights_sha256"]
    assert results["answering"] == {"method": "generate", "max_new_tokens": 12, "n": 2, "seed": 0,
                                    "temperature": 1.0, "top_p": 1.0, "turns": "each"}
    assert results["data"]["sha256"] and results["filters"] == []
    assert results["machine"]["processes"] == 1
    assert not any((tmp_path / "out" / "answers").glob(".*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers", "records.jsonl", "results.json"]


def test_split_seed_and_number(text: dict[str, Any], tmp_path: Path) -> None:
    """A draw follows from seed, record and number; not from what is asked beside it."""
    def rows(name: str, **more: Any) -> dict[str, str]:
        generate(**{**text, **more}, output_dir=tmp_path / name)
        return {row["id"]: said(row) for row in written(tmp_path / name)}

    whole = rows("whole")
    assert rows("batch", batch_size=7) == whole
    first = rows("part", max_records=3, n=3)
    assert {key: first[key] for key in first if not key.endswith("#2")} == dict(
        list(whole.items())[:6])
    assert len({key: 0 for key in whole if rows("seed", seed=1)[key] != whole[key]}) > 7
    assert rows("part", n=2) == whole  # what is there already, and more


def test_nothing_is_asked_again(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate(**text, output_dir=tmp_path)
    every, whole = written(tmp_path), (tmp_path / "records.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", lambda *args: pytest.fail("weights are loaded"))
        filtered = generate(**{**text, "filters": ["max_length=11", "duplicates"]},
                            output_dir=tmp_path)
        assert adds_up(filtered) and filtered["filtered"]["max_length"]
        assert 0 < filtered["records"] < len(every)
        lines = [json.loads(line) for line in
                 (tmp_path / "answers" / "generated.jsonl").read_text().splitlines()]
        assert len(lines) == 14  # none is lost
        assert [line["left_out"] for line in lines if "left_out" in line] == [
            "max_length"] * filtered["filtered"]["max_length"]
        generate(**text, output_dir=tmp_path)
        assert (tmp_path / "records.jsonl").read_bytes() == whole
    generate(**{**text, "temperature": 0.5}, output_dir=tmp_path)
    assert "answering.temperature: 1.0 -> 0.5" in caplog.text
    assert written(tmp_path) != every


def test_the_limit_and_agreement(text: dict[str, Any], tmp_path: Path) -> None:
    """The usual filters; a small model of random weights hardly ever ends its answers."""
    usual = {key: value for key, value in text.items() if key != "filters"}
    results = generate(**usual, output_dir=tmp_path)
    assert [each["rule"] for each in results["filters"]] == ["cut", "repeats"]
    assert results["filtered"]["cut"] and adds_up(results)
    greedy = {**text, "temperature": 1e-4, "filters": ["agree", "duplicates"]}
    results = generate(**greedy, output_dir=tmp_path)
    assert results["filtered"]["duplicates"] == results["records"]  # both answers are the same


# ----- interrupted, shared out --------------------------------------------------------------


def test_killed_and_gone_on_with(text: dict[str, Any], tmp_path: Path) -> None:
    generate(**text, output_dir=tmp_path / "whole")
    line = [sys.executable, "-c", SLOW, "generate", *words(text), "--output-dir",
            str(tmp_path / "out")]
    for kills in (2, 1):
        with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout is not None
            while kills:
                kills -= killed.stdout.readline().startswith("kept")
            killed.send_signal(signal.SIGKILL)
        assert not (tmp_path / "out" / "records.jsonl").exists()
    partial = tmp_path / "out" / "answers" / ".generated.partial-0.jsonl"
    known = len(partial.read_text().splitlines()) - 1
    assert 7 <= known < 14
    partial.write_text(partial.read_text()[:-9])  # the last line was being written
    generate(**text, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == (
        tmp_path / "whole" / "records.jsonl").read_bytes()


def test_two_processes_write_what_one_does(text: dict[str, Any], tmp_path: Path) -> None:
    generate(**text, output_dir=tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "-m", "taid_vlm"]
    line = ["--samples" if word == "--n" else word for word in words(text)]
    done = subprocess.run([*launcher, "generate", *line, "--output-dir", str(tmp_path / "two")],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("records       ") == 1
    assert loaded(tmp_path / "two" / "results.json")["machine"]["processes"] == 2
    assert (tmp_path / "two" / "records.jsonl").read_bytes() == (
        tmp_path / "one" / "records.jsonl").read_bytes()


def test_a_kill_while_results_are_written(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(**text, output_dir=tmp_path / "whole")
    for broken in ("write_json", "dump_lines"):
        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, broken, stop)
            with pytest.raises(KeyboardInterrupt):
                generate(**text, output_dir=tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(module, "load_model", lambda *args: pytest.fail("weights are loaded"))
            generate(**text, output_dir=tmp_path / "out")
        assert written(tmp_path / "out") == written(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


# ----- images, conversations ----------------------------------------------------------------


def test_images_in_files_and_broken_ones(taught: Taught, tmp_path: Path) -> None:
    rows = picture_rows(tmp_path, 6)
    (tmp_path / "3.png").write_bytes(b"no image at all")
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    options = {"model": taught("qwen2_5_vl"), "data": str(data), "max_new_tokens": 9,
               "filters": ["none"], "batch_size": 4}
    results = generate(**options, output_dir=tmp_path / "out")
    assert results["unanswered"] == {"unreadable image": 1} and results["records"] == 5
    assert adds_up(results) and results["prompts_without_record"] == 1
    assert [row["images"] for row in written(tmp_path / "out")] == [
        [str(tmp_path / row["image"])] for row in rows if row["image"] != "3.png"]
    assert not (tmp_path / "out" / "images").exists()
    for record in read_back(tmp_path / "out"):
        record.images[0].load()
    generate(**options, copy_images=True, output_dir=tmp_path / "out")
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    for index in range(3):
        (tmp_path / f"{index}.png").unlink()
    assert len(list(Path(moved, "images").iterdir())) == 3
    for record in read_back(Path(moved)):
        record.images[0].load()


def test_images_inside_a_file_of_data(taught: Taught, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "prompts.parquet", byte_rows(5))
    results = generate(model=taught("qwen2_5_vl"), data=str(data), output_dir=tmp_path / "out",
                       max_new_tokens=9, filters=["none"])
    assert results["records"] == 5
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 4  # one of them twice
    before = list(open_records(str(data)))
    for then, now in zip(before, read_back(tmp_path / "out"), strict=True):
        assert now.images[0].load().tobytes() == then.images[0].load().tobytes()
        assert now.messages[0] == then.messages[0]


def test_frames_of_a_video(taught: Taught, tmp_path: Path) -> None:
    rows = [{"prompt": "<video>what is this", "video": [f"{i}.png" for i in (0, 1, 2, 3, 0, 1)]}]
    picture_rows(tmp_path, 4)
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    results = generate(model=taught("qwen2_5_vl"), data=str(data), output_dir=tmp_path / "out",
                       max_new_tokens=9, filters=["none"], video_frames=4)
    assert results["records"] == 1 and results["data"]["video"] == {"frames": 4}
    [record] = read_back(tmp_path / "out")
    assert record.images[0].load().indices == (0, 2, 3, 5)  # type: ignore[attr-defined]


def test_a_model_without_a_template_goes_on_with_the_text(
    taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(taught("llama"), tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    Saying(monkeypatch, " named Tom.")
    rows = [{"prompt": "a cat"}, {"system": "x", "prompt": "a dog"}]
    results = generate(model=str(model), data=str(write_jsonl(tmp_path / "a.jsonl", rows)),
                       output_dir=tmp_path / "out")
    assert results["unanswered"] == {"conversation for a model of one question": 1}
    assert [said(row) for row in written(tmp_path / "out")] == [" named Tom."]


def test_an_adapter_answers_on_its_base(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    recipe = write_recipe(tmp_path, {
        "student": {"model_name_or_path": checkpoints("llama"), "peft": {
            "r": 4, "target_modules": "all-linear"}}, "objective": "ce",
        "data": {"train": str(data)}, "train": {**FAST, "max_steps": 2},
        "output_dir": str(tmp_path / "run")})
    assert cli("distill", recipe).status == 0
    results = generate(model=str(tmp_path / "run"), data=str(data), output_dir=tmp_path / "out",
                       **SAMPLED)
    assert results["model"]["base_sha256"] and adds_up(results)


TOOL = {"type": "function", "function": {
    "name": "look", "description": "see", "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 3}}}
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "look at 3"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "red", "name": "look"},
        {"role": "assistant", "content": "It is red.", "reasoning_content": "one, two"},
        {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "Yes."}]


def test_tools_thoughts_and_turns(taught: Taught, tmp_path: Path) -> None:
    (tmp_path / "tools.jinja").write_text(templates.hermes())
    options = {"model": taught("qwen3"), "chat_template": str(tmp_path / "tools.jinja"),
               "max_new_tokens": 9, "filters": ["none"]}
    data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": TALK, "tools": [TOOL]}])
    generate(**options, data=str(data), output_dir=tmp_path / "out")
    records = read_back(tmp_path / "out")
    assert [len(record.messages) for record in records] == [3, 5, 7]
    original = next(iter(open_records(str(data))))
    for record in records:
        assert record.tools == original.tools
        assert [m.weight for m in record.messages if m.role == "assistant"] == [
            *[0.0] * (len(record.answers) - 1), 1.0]
        for now, then in zip(record.messages[:-1], original.messages, strict=False):
            assert (now.parts, now.thought, now.calls) == (then.parts, then.thought, then.calls)
    last = generate(**options, data=str(data), output_dir=tmp_path / "out", turns="last")
    assert last["records"] == 1 and len(read_back(tmp_path / "out")[0].messages) == 7
    with pytest.raises(TaidError, match="3 x tools for a chat template without"):
        generate(model=options["model"], data=str(data), output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Saying:
    """A stand-in for a model's tokens: its text whatever is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        from taid_vlm.generate import writing
        from taid_vlm.models import generation
        from taid_vlm.models.generation import Continued

        def continued(model: Any, adapter: Any, inputs: Any, asked: Any, **how: Any) -> Any:
            ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
            return [Continued(ids, adapter.end_of_turn_id)] * len(asked)

        for place in (writing, generation):
            monkeypatch.setattr(place, "continue_prompts", continued)


@pytest.mark.parametrize(("options", "content", "thought"), [
    ({}, "<think>\none\n</think>\n\ntwo", None), ({"thoughts": "auto"}, "two", None),
    ({"thoughts": "think", "reasoning": True}, "two", "one")])
def test_thoughts_stay_or_go_by_rule(
    options: dict[str, Any], content: str, thought: str | None, checkpoints: Checkpoints,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    Saying(monkeypatch, "<think>\none\n</think>\n\ntwo")
    data = write_jsonl(tmp_path / "a.jsonl", pairs(2))
    results = generate(model=checkpoints("qwen3"), data=str(data), output_dir=tmp_path / "out",
                       **options)
    assert [(said(row), row["messages"][-1].get("reasoning_content"))
            for row in written(tmp_path / "out")] == [(content, thought)] * 2
    assert results["thoughts"]["answers"] == {"think": 2}
    from taid_vlm.adapters.turns import is_thoughtful

    for record in read_back(tmp_path / "out"):
        assert is_thoughtful(record.messages[-1]) == (options != {"thoughts": "auto"})


@pytest.mark.parametrize(("options", "content"), [
    ({}, "<think>\none\n</think>\n\ntwo"), ({"thoughts": "auto"}, "two")])
def test_a_thought_that_the_prompt_opens(
    options: dict[str, Any], content: str, checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the prompt has of it belongs to the answer; one that is never closed is no answer."""
    data = write_jsonl(tmp_path / "a.jsonl", pairs(1))
    Saying(monkeypatch, "one\n</think>\n\ntwo")
    generate(model=checkpoints("qwen3_5"), data=str(data), output_dir=tmp_path / "out", **options)
    assert [said(row) for row in written(tmp_path / "out")] == [content]
    Saying(monkeypatch, "one and two")
    with pytest.raises(TaidError, match="1 x cut in its thought"):
        generate(model=checkpoints("qwen3_5"), data=str(data), output_dir=tmp_path / "no")


@pytest.mark.parametrize(("options", "thought"), [
    ({}, "one"), ({"thoughts": "gpt-oss"}, None),
    ({"thoughts": "auto", "reasoning": True}, "one")])
def test_thoughts_in_marks_that_no_answer_can_hold(
    options: dict[str, Any], thought: str | None, checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Saying(monkeypatch, "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>final"
                        "<|message|>two")
    data = write_jsonl(tmp_path / "a.jsonl", pairs(1))
    generate(model=checkpoints("gpt_oss"), data=str(data), output_dir=tmp_path / "out", **options)
    [row] = written(tmp_path / "out")
    assert (said(row), row["messages"][-1].get("reasoning_content")) == ("two", thought)
    read_back(tmp_path / "out")


def test_a_thought_without_an_answer_is_none(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", pairs(1))
    for text, why in {"<think>\none</think>": "thought without an answer", " ": "empty"}.items():
        Saying(monkeypatch, text)
        if text == " ":
            with pytest.raises(TaidError, match="has an answer: 1 x empty"):
                generate(model=checkpoints("qwen3"), data=str(data), output_dir=tmp_path / why)
            assert not (tmp_path / why).exists()
            continue
        results = generate(model=checkpoints("qwen3"), data=str(data), output_dir=tmp_path / why)
        assert results["unanswered"] == {why: 1} and not written(tmp_path / why)


def test_in_bfloat16(taught: Taught, tmp_path: Path) -> None:
    shutil.copytree(taught("qwen2_5_vl"), tmp_path / "model")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.bfloat16
                                                ).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "a.jsonl", picture_rows(tmp_path, 5))
    options = {"model": str(tmp_path / "model"), "data": str(data), **SAMPLED}
    results = generate(**options, output_dir=tmp_path / "one")
    assert results["model"]["dtype"] == "bfloat16" and results["records"] == 10
    generate(**options, output_dir=tmp_path / "again")
    assert written(tmp_path / "one") == written(tmp_path / "again")


# ----- behind a URL -------------------------------------------------------------------------


def called(body: Body) -> Reply:
    call = {"name": "look", "arguments": '{"x": 4}'}
    message = {"role": "assistant", "content": None, "reasoning_content": "I look.",
               "tool_calls": [{"id": "c9", "type": "function", "function": call}]}
    choices = [{"message": message, "finish_reason": "stop"}]
    return 200, {}, json.dumps({"choices": choices}).encode()


def test_a_server_is_sent_the_whole_conversation(server: Server, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": TALK, "tools": [TOOL]}])
    server.reply = lambda body, _: called(body) if len(body["messages"]) == 2 else completion("ok")
    results = generate(model="served", base_url=server.url, data=str(data), n=2, temperature=0.5,
                       output_dir=tmp_path / "out", filters=["none"])
    assert results["records"] == 6 and results["length_in"] == "pieces of words"
    bodies = {len(body["messages"]): body for body in server.bodies}
    assert sorted(bodies) == [2, 4, 6] and all(body["tools"] == [TOOL] for body in server.bodies)
    assert len({body["seed"] for body in server.bodies}) == 6
    system, user, call, tool = bodies[4]["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert user["content"] == [{"type": "text", "text": "look at 3"}]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"x": 3}
    assert tool == {"role": "tool", "content": "red", "name": "look"}
    first, *_ = read_back(tmp_path / "out")
    assert first.messages[-1].calls[0]["function"] == {"name": "look", "arguments": {"x": 4}}
    assert first.messages[-1].thought == "I look."
    asked = len(server.bodies)
    generate(model="served", base_url=server.url, data=str(data), n=2, temperature=0.5,
             output_dir=tmp_path / "out", filters=["min_length=3"])
    assert len(server.bodies) == asked  # calls are kept with the answers
    assert {len(record.messages) for record in read_back(tmp_path / "out")} == {3}


def test_a_server_s_refusals_and_images(server: Server, tmp_path: Path) -> None:
    rows = picture_rows(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"none")
    (tmp_path / "a.jsonl").write_text(dump_lines(rows))

    def reply(body: Body, times: int) -> Reply:
        bad = {**json.loads(called(body)[2])}
        bad["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = "{half"
        number = len(server.bodies)
        return failure(400) if number == 2 else completion("two words here", "length") \
            if number == 1 else (200, {}, json.dumps(bad).encode())

    server.reply = reply
    results = generate(model="served", base_url=server.url, data=str(tmp_path / "a.jsonl"),
                       output_dir=tmp_path / "out", batch_size=1)
    assert results["unanswered"] == {"unreadable image": 1, "refused by the server": 1,
                                     "tool call that is no JSON": 1}
    assert results["filtered"] == {"cut": 1} and adds_up(results)
    assert results["records"] == 0 and written(tmp_path / "out") == []


def test_a_judge_chooses(server: Server, text: dict[str, Any], tmp_path: Path) -> None:
    replies = iter(["1.0", "0.4", "0.5", "well", "0.9", "0", "1"] * 9)
    server.reply = lambda body, _: completion(next(replies))
    judged = {**text, "filters": ["judge", "max_length=11"], "judge_url": server.url,
              "judge_model": "judge"}
    results = generate(**judged, output_dir=tmp_path / "out")
    shown = results["answers"] - results["filtered"]["max_length"] - sum(
        results["unanswered"].values())
    assert len(server.bodies) == shown  # what other filters leave out is not shown to it
    assert results["filtered"]["judge"] and results["filtered"]["the judge's reply says no score"]
    assert results["judge"]["model"] == "judge" and adds_up(results)
    asked = "\n".join(part["text"] for body in server.bodies
                      for part in body["messages"][0]["content"])
    row = written(tmp_path / "out")[0]
    assert f"Question: {row['messages'][0]['content']}\n" in asked
    assert f"Answer: {said(row)}\n" in asked
    assert f"Reference: {pairs(7)[int(row['id'].split(':')[1][0]) - 1]['completion']}\n" in asked
    again = generate(**{**judged, "filters": ["judge=0.95", "max_length=11"]},
                     output_dir=tmp_path / "out")
    assert len(server.bodies) == shown and again["records"] < results["records"]


# ----- sequence-level distillation ----------------------------------------------------------


def test_seq_kd_from_a_teacher_s_answers(
    cli: Cli, checkpoints: Checkpoints, taught: Taught, tmp_path: Path
) -> None:
    """The two commands of the recipe, with small models of its families."""
    data = write_jsonl(tmp_path / "prompts.jsonl", picture_rows(tmp_path, 8))
    done = cli("generate", "--model", taught("qwen2_5_vl"), "--data", data, "--n", 2,
               "--temperature", 1, "--max-new-tokens", 9, "--filters", "repeats", "duplicates",
               "--output-dir", tmp_path / "generated")
    assert done.status == 0, done.err
    records = loaded(tmp_path / "generated" / "results.json")["records"]
    tree = read_yaml(shipped_recipes()["seq_kd_qwen2.5_vl_7b_to_3b"], "recipe")
    tree["student"]["model_name_or_path"] = checkpoints("qwen2_5_vl", seed=1)
    tree["data"] = {"train": str(tmp_path / "generated" / "records.jsonl"), "eval": str(data)}
    tree["output_dir"] = str(tmp_path / "run")
    tree["train"] |= {"bf16": False, "learning_rate": 0.05, "max_steps": 12, "save_steps": 100,
                      "dataloader_num_workers": 0, "num_train_epochs": 1, "logging_steps": 1,
                      "gradient_accumulation_steps": 2}
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0, done.err
    results = loaded(tmp_path / "run" / "results.json")
    assert records == len(read_back(tmp_path / "generated")) > 8
    losses = [line["loss"] for line in results["history"] if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


# ----- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "message"), {
    "two greedy": ({"temperature": 0.0}, "--n = 2, but at temperature 0"),
    "seed of none": ({"n": 1, "temperature": 0.0, "seed": 3}, "--seed is for sampled answers"),
    "no rule": ({"filters": ["repeat"]}, "Did you mean 'repeats'"),
    "agree alone": ({"n": 1, "filters": ["agree"]}, "set --n"),
    "reasoning kept": ({"reasoning": True}, "--reasoning goes with --thoughts"),
    "thoughts": ({"thoughts": "thinks"}, "Did you mean"),
    "judge": ({"filters": ["judge"]}, "--filters judge and --judge-url go together"),
    "judge's model": ({"filters": ["judge"], "judge_url": "http://x/v1"}, "needs --judge-model"),
    "n": ({"n": 0}, "--n = 0"), "top p": ({"top_p": 1.5}, "--top-p = 1.5"),
    "no data": ({"data": "no.jsonl"}, "no.jsonl"), "no model": ({"model": "./no"}, "./no"),
    "key": ({"api_key_env": "X"}, "goes with --base-url"),
    "dtype of a server": ({"base_url": "http://x/v1", "dtype": "bfloat16"}, "is up to the server"),
}.values())
def test_mistakes_are_one_message(
    more: dict[str, Any], message: str, text: dict[str, Any], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("weights are loaded"))
    done = cli("generate", *words({**text, **more}), "--output-dir", tmp_path / "out")
    assert done.status == 2 and len(done.errors) == 1, done.err
    assert message in done.errors[0]
    assert not (tmp_path / "out").exists()


def test_columns_of_other_names_are_said_how(text: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "b.jsonl", [{"statement": "a", "kind": "b"}])
    with pytest.raises(TaidError, match=r"'messages' is missing .* --data '\{\"path\": \"FILE\""):
        generate(**{**text, "data": str(data)}, output_dir=tmp_path / "out")


def test_a_text_model_does_not_see(
    checkpoints: Checkpoints, tmp_path: Path, text: dict[str, Any]
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", picture_rows(tmp_path, 2))
    with pytest.raises(TaidError, match=r"text model, but 'a.jsonl:1/0' of --data holds an image"):
        generate(**{**text, "data": str(data)}, output_dir=tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(text: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "records.jsonl").write_text("mine\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text('{"kind": "evaluation"}')
    for name in "ab":
        with pytest.raises(TaidError, match="of something else"):
            generate(**text, output_dir=tmp_path / name)
    assert (tmp_path / "a" / "records.jsonl").read_text() == "mine\n"


# ----- real tokenizers ----------------------------------------------------------------------

REAL = Path(os.environ.get("TAID_VLM_REAL", "/nonexistent"))


@pytest.mark.skipif(not (REAL / "qwen3").exists(), reason="TAID_VLM_REAL names no folder")
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "smollm2"])
def test_with_a_real_tokenizer(name: str, tmp_path: Path) -> None:
    """Text comes out of tokens as it goes in again, whatever a random model says."""
    if not (REAL / name).exists():
        pytest.skip(f"no {name}")
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    if tokenizer.chat_template is None:
        pytest.skip(f"{name} has no chat template")
    built = build("llama")
    config = built.model.config
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    results = generate(model=str(tmp_path / "model"), data=str(data), output_dir=tmp_path / "out",
                       **{**SAMPLED, "max_new_tokens": 30})
    assert results["records"] == 8 and adds_up(results)
    assert [said(row).strip() for row in written(tmp_path / "out")] == [
        record.answers[0] for record in read_back(tmp_path / "out")]
