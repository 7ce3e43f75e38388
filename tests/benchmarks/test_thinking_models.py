"""Models that think before they answer, here and behind a URL: what is read, counted and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.quiz import QUIZ, questions
from benchmarks.serving import Server, serving
from tokenizers import AddedToken
from zoo import build, save

from taid_vlm.adapters import make_adapter
from taid_vlm.benchmarks import evaluate as module
from taid_vlm.benchmarks.answering import Answer, Generating
from taid_vlm.benchmarks.asking import Asking, Task
from taid_vlm.benchmarks.candidates import Candidate, LocalModel
from taid_vlm.benchmarks.metrics.thoughts import MARKS, ends_inside, take_off_all
from taid_vlm.benchmarks.remote import read_completion
from taid_vlm.benchmarks.scoring import CUT, EMPTY, SILENT, judge, thoughts_of
from taid_vlm.benchmarks.tasks.chartqa import BENCHMARK as CHARTQA
from taid_vlm.benchmarks.tasks.docvqa import BENCHMARK as DOCVQA
from taid_vlm.benchmarks.tasks.vqav2 import BENCHMARK as VQAV2
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.models.generation import _decoded

SAID = [Answer("<think>\nIt is red, not B.\n</think>\n\nA"), Answer("<think>\n\n</think>\n\nB"),
        Answer("<think>It is", cut=True), Answer("C"), Answer("<think>hm</think>"),
        Answer("", cut=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("models") / "llama")


def task(**more: Any) -> Task:
    asked = [replace(question, answers=("A",)) for question in questions(len(SAID), seen=False)]
    return Task(QUIZ, QUIZ.rules[0], DataSource("quiz"), asked, **more)


def says(monkeypatch: pytest.MonkeyPatch, said: list[Answer] | None = None) -> None:
    by_name = dict(zip((q.id for q in task().questions), said or SAID, strict=True))
    monkeypatch.setattr(Generating, "batch", lambda answerer, asked, seed: [
        by_name[question.id] for question in asked])


def run(model: Path, output: Path, how: Task) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    results = module.evaluate([Candidate("m", ModelSpec(str(model)))], [how], output, Asking())
    lines = (output / "answers" / "quiz.jsonl").read_text().splitlines()
    return results["m"]["tasks"]["quiz"], [json.loads(line) for line in lines]


def test_thoughts_are_taken_off_before_the_rule(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch)
    entry, lines = run(model, tmp_path, task())
    assert [line["read"] for line in lines][:3] == ["A", "B", None]
    assert [line["answer"] for line in lines] == ["A", "B", "", "C", "", ""]
    assert [line.get("missing") for line in lines] == [None, None, CUT, None, SILENT, EMPTY]
    assert entry["unanswered"] == {CUT: 1, SILENT: 1, EMPTY: 1}
    assert entry["cut"] == 2
    thoughts = entry["thoughts"]
    assert (thoughts["rule"], thoughts["version"], thoughts["cut"]) == ("auto", 1, 1)
    assert thoughts["answers"] == {"think": 3}  # an empty one is none
    tokenizer = build("llama").tokenizer
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"])
             for text in ("It is red, not B.", "It is", "hm")]
    assert thoughts["tokens"] == {"mean": sum(sizes) / 3, "max": max(sizes)}
    assert thoughts["characters"] == {"mean": 8.0, "max": 17}


def test_another_rule_of_thoughts_asks_nothing_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch)
    before = run(model, tmp_path, task())
    monkeypatch.setattr(module, "load_model", lambda *args: 1 / 0)
    entry, lines = run(model, tmp_path, task(thoughts="keep"))
    assert [line["answer"] for line in lines] == [answer.text for answer in SAID]
    assert entry["thoughts"] == {"rule": "keep", "version": 1, "answers": {}, "cut": 0}
    assert run(model, tmp_path, task())[1] == before[1]
    entry, lines = run(model, tmp_path, task(thoughts="magistral"))
    assert lines[0]["answer"] == SAID[0].text


@pytest.mark.parametrize(("benchmark", "gold"), [(CHARTQA, "14"), (DOCVQA, "14"), (VQAV2, "14")])
def test_rules_that_compare_the_whole_answer_see_no_thought(benchmark: Any, gold: str) -> None:
    asked = [replace(questions(1, seen=False)[0], choices=(), answers=(gold,) * 10)]
    said = [Answer("<think>\n\n</think>\n\n14")]
    for rule in benchmark.rules:
        assert judge(rule, asked, said)[0].verdict.score == 1
        assert judge(rule, asked, said, thoughts="keep")[0].verdict.score == 0


def test_a_template_that_opens_the_thought(tmp_path: Path) -> None:
    """As those of DeepSeek-R1 and Qwen3-VL-Thinking; an answer that is cut is a thought."""
    built = build("llama")
    template = built.tokenizer.chat_template + "{% if add_generation_prompt %}{{ '<think>\\n' }}" \
        "{% endif %}"
    for thinks in (False, True):
        built.processor.chat_template = template if thinks else built.tokenizer.chat_template
        adapter = make_adapter(built.processor, "model")
        adapter.as_learned = False
        answerer = Generating(built.model, adapter, 2, max_new_tokens=3)
        given = [answer for batch in answerer.answers(questions(3, seen=False), (), 0)
                 for _, answer in batch]
        assert [answer.opened for answer in given] == [thinks] * 3
        assert all(answer.cut for answer in given)
        judged = judge(QUIZ.rules[0], questions(3, seen=False), given)
        assert [one.missing for one in judged] == [CUT if thinks else ""] * 3


def test_a_model_is_asked_by_its_template_and_a_student_as_it_learned(tmp_path: Path) -> None:
    """Qwen3's template prints an empty thought before the answers it learns, and none when asked:
    with one, a model that was trained to think would not."""
    asked = questions(1, seen=False)[0]
    folder = save(build("qwen3"), tmp_path / "run" / "student")
    ends = {}
    for name in ("by its template", "as learned"):
        model = LocalModel(ModelSpec(str(folder)))
        ids = model.adapter.encode_prompts([asked.asked()], [[]])["input_ids"][0]
        ends[model.identity["asked"]] = model.adapter.tokenizer.decode(ids)
        assert list(ends)[-1] == name
        (tmp_path / "run" / "recipe.yaml").write_text("a run's")
    assert ends["by its template"].endswith("<|im_start|>assistant\n")
    assert ends["as learned"] == ends["by its template"] + "<think>\n\n</think>\n\n"


def test_where_the_prompt_opened_it_shows_in_other_answers() -> None:
    """A server's prompt is not known; one answer that only closes a thought tells of all."""
    texts = ["It is red.</think>B", "It is blue, so", "B", "<think>a</think>B"]
    taken = [said for _, said in take_off_all(texts, [False, True, False, False])]
    assert [said.answer for said in taken] == ["B", "", "B", "B"]
    assert [said.cut for said in taken] == [False, True, False, False]
    taken = [said for _, said in take_off_all(texts[1:], [True, False, False])]
    assert [said.answer for said in taken] == ["It is blue, so", "B", "B"]


@pytest.mark.parametrize(("prompt", "inside"), [
    ("<|im_start|>assistant\n<think>\n", True), ("assistant\n<think>\n\n</think>\n\n", False),
    ("what is <think>?<|im_end|>\n<|im_start|>assistant\n", False), ("", False),
    ("<|turn>model\n<|channel>thought\n", True), ("<|turn>model\n<|channel>thought\n<channel|>",
                                                   False), ("[THINK]", True)])
def test_ends_of_prompts(prompt: str, inside: bool) -> None:
    assert ends_inside(prompt) is inside


def test_special_tokens_that_mark_thoughts_stay() -> None:
    """Magistral's are special tokens, which decoding otherwise drops without a trace."""
    tokenizer = build("llama").tokenizer
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("[THINK]", "[/THINK]")])
    eos = tokenizer.eos_token_id
    ids = tokenizer("[THINK]what[/THINK]red", add_special_tokens=False)["input_ids"]
    plain = tokenizer("what is red", add_special_tokens=False)["input_ids"]
    marked, other = _decoded(tokenizer, [[*ids, eos, eos], [*plain, eos]], MARKS)
    assert marked.replace(" ", "") == "[THINK]what[/THINK]red"
    expected = tokenizer.batch_decode([[*ids, eos], [*plain, eos]], skip_special_tokens=True)
    assert other == expected[1]
    assert _decoded(tokenizer, [[*ids, eos], [*plain, eos]], ()) == expected


# ----- servers ------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as made:
        yield made


def reply(message: dict[str, Any], finish: str = "stop", **more: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", **message},
                                    "finish_reason": finish}], **more}).encode()


USAGE = {"completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 31}}
REPLIES = [  # as vLLM (both its names), OpenRouter, Mistral, and servers without a parser give it
    (reply({"content": "\n\nB", "reasoning_content": "It is"}), Answer("B", thought="It is")),
    (reply({"content": "B", "reasoning": "It is"}, usage=USAGE),
     Answer("B", thought="It is", thought_tokens=31)),
    (reply({"content": None, "reasoning_content": "It is"}, "length",
           usage={"completion_tokens": 40}),
     Answer("", cut=True, thought="It is", thought_tokens=40)),
    (reply({"reasoning": "It is"}, "length"), Answer("", cut=True, thought="It is")),
    (reply({"content": None}, "length", usage={"completion_tokens": 40}), Answer("", cut=True)),
    (reply({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "It is"}]},
                        {"type": "text", "text": "B"}]}), Answer("B", thought="It is")),
    (reply({"content": "<think>It is</think>B", "reasoning_content": None}),
     Answer("<think>It is</think>B")),
    (reply({"content": "B", "reasoning": ""}, usage={"completion_tokens": True}), Answer("B")),
    (reply({"content": "B"}, usage=None), Answer("B")),
]


@pytest.mark.parametrize(("data", "answer"), REPLIES)
def test_what_servers_say(data: bytes, answer: Answer) -> None:
    assert read_completion(data) == answer


@pytest.mark.parametrize("message", [{}, {"content": 7}, {"reasoning": ["x"]}, {"role": "x"}])
def test_what_is_no_answer_is_asked_again(message: dict[str, Any]) -> None:
    data = json.dumps({"choices": [{"message": message}]}).encode()
    if message == {"reasoning": ["x"]}:
        assert read_completion(data) == Answer("")
    else:
        with pytest.raises(ValueError, match=r"no chat completion|no text"):
            read_completion(data)


def test_a_server_whose_limit_ends_every_thought(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, times: (200, {}, reply(
        {"content": None, "reasoning_content": "It is"}, "length", usage={"completion_tokens": 9}))
    end = Endpoint(server.url, "m", attempts=2, backoff=0.01)
    entry = module.evaluate([Candidate("m", end)], [task()], tmp_path)["m"]["tasks"]["quiz"]
    assert entry["unanswered"] == {CUT: len(SAID)}
    assert entry["cut"] == len(SAID) == entry["thoughts"]["cut"]
    assert entry["thoughts"]["answers"] == {"server": len(SAID)}
    assert entry["thoughts"]["tokens"] == {"mean": 9.0, "max": 9}
    lines = [json.loads(x) for x in (tmp_path / "answers" / "quiz.jsonl").read_text().splitlines()]
    assert {line["thought"] for line in lines} == {"It is"}
    asked = len(server.bodies)
    assert module.evaluate([Candidate("m", end)], [task()], tmp_path)["m"]["tasks"]["quiz"][
        "thoughts"] == entry["thoughts"]
    assert len(server.bodies) == asked


def test_tokens_that_nobody_counted_are_not_told() -> None:
    answers = {0: [Answer("B", thought="It is", thought_tokens=3), Answer("B", thought="It is")]}
    judged = {0: judge(QUIZ.rules[0], questions(2, seen=False), answers[0])}
    found = thoughts_of("auto", answers, judged)
    assert "tokens" not in found
    assert found["characters"] == {"mean": 5.0, "max": 5}
    assert thoughts_of("auto", answers, judged, len)["tokens"] == {"mean": 4.0, "max": 5}
