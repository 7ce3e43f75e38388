"""A judge behind a URL: what it is asked, how its replies are read and kept, and what fails."""

import json
import logging
from pathlib import Path

import pytest
from benchmarks.serving import asked_text, completion, failure, serving
from benchmarks.short_answers import read
from benchmarks.test_rows import png

from taid_vlm.benchmarks.asking import Asking, open_task
from taid_vlm.benchmarks.candidates import Candidate
from taid_vlm.benchmarks.evaluate import evaluate
from taid_vlm.benchmarks.judge import Judge, open_judge
from taid_vlm.benchmarks.metrics import charxiv
from taid_vlm.benchmarks.question import NO_JUDGE, Verdict
from taid_vlm.benchmarks.scoring import REFUSED, UNCLEAR
from taid_vlm.benchmarks.table import as_text
from taid_vlm.benchmarks.tasks import ai2d, charxiv_descriptive, charxiv_reasoning, mmvet
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, TaidError
from taid_vlm.io.endpoint import Endpoint

ASKED = [("v1", "What is x?", "-1 <AND> -5", "math,ocr"), ("v2", "Why?", "red<OR>blue", "rec"),
         ("v3", "Where?", "here", "rec,spat"), ("v4", "Who {answer}?", "me", "rec")]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as made:
        yield made


@pytest.fixture
def task(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"question_id": name, "question": text, "answer": gold, "capability": abilities,
             "image": "a.png"} for name, text, gold, abilities in ASKED]
    (tmp_path / "mmvet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_task(mmvet.BENCHMARK, mmvet.BENCHMARK.rules[0],
                     DataSource(str(tmp_path / "mmvet.jsonl")))


def judge_of(server, **how):
    return Judge(Endpoint(server.url, "a judge", timeout=5.0, attempts=2, backoff=0.01), **how)


def run(server, task, folder: Path, judge=None, **asking):
    """The candidate answers with what it is asked; the judge's replies are the server's, too."""
    candidate = Candidate("served", Endpoint(server.url, "served", timeout=5.0))
    return evaluate([candidate], [task], folder, Asking(**asking), judge)["served"]


def replies(server, said):
    """The candidate echoes its question; the judge says what `said` has for it."""
    def reply(body, times):
        text = asked_text(body)
        if body["model"] == "served":
            return completion(text)
        return said(text)

    server.reply = reply


def scores(results):
    return {name: figure["value"] for name, figure in results["tasks"]["mmvet"]["figures"].items()}


def judged_bodies(server):
    return [body for body in server.bodies if body["model"] == "a judge"]


def test_scores_are_the_judge_s(server, task, tmp_path):
    by_text = {"What is x?": "0.5", "Why?": "1.0", "Where?": "Score: 0.3", "Who {answer}?": "0.0"}
    replies(server, lambda text: completion(
        next(score for asked, score in by_text.items() if f"Question: {asked}\n" in text)))
    results = run(server, task, tmp_path / "out", judge_of(server))
    assert scores(results) == pytest.approx(
        {"score": 0.45, "rec": 1.3 / 3, "ocr": 0.5, "spat": 0.3, "math": 0.5})
    entry = results["tasks"]["mmvet"]
    assert "unscored" not in entry and entry["parse_failures"] == 0
    assert entry["judge"]["model"] == "a judge" and entry["judge"]["temperature"] == 0
    assert entry["judge"]["prompt"]["name"] == "mmvet" and entry["judge"]["prompt"]["version"] == 1
    assert len(entry["judge"]["prompt"]["sha256"]) == 16
    assert entry["by_tag"]["abilities"]["math ocr"]["score"]["value"] == 0.5


def test_what_the_judge_is_asked(server, task, tmp_path):
    """Everything stands where it goes, also where a question holds braces itself."""
    replies(server, lambda text: completion("1"))
    run(server, task, tmp_path / "out", judge_of(server))
    texts = sorted(map(asked_text, judged_bodies(server)))
    assert [body["temperature"] for body in judged_bodies(server)] == [0.0] * 4
    assert any("Question: Who {answer}?\nReference: me\nAnswer: Who {answer}?\n" in text
               for text in texts)
    assert any("Reference: -1  <AND>  -5\nAnswer: What is x?\n" in text for text in texts)
    assert any("Reference: red <OR> blue\n" in text for text in texts)


def test_without_a_judge_nothing_has_a_score_and_says_so(server, task, tmp_path):
    results = run(server, task, tmp_path / "out")
    entry = results["tasks"]["mmvet"]
    assert entry["figures"]["score"]["n"] == 0 and entry["unscored"] == {NO_JUDGE: 4}
    assert entry["by_tag"] == {} and "judge" not in entry and entry["parse_failures"] == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["tasks"]["mmvet"]["figures"]["score"]["value"] is None
    lines = [json.loads(line) for line in
             (tmp_path / "out" / "answers" / "mmvet.jsonl").read_text().splitlines()]
    assert [(line["score"], line["unscored"]) for line in lines] == [(None, NO_JUDGE)] * 4
    assert f"served: mmvet: 4 of 4 answers have no score: 4: {NO_JUDGE}" in as_text(
        {"served": results})
    replies(server, lambda text: completion("1.0"))  # a judge comes later: nobody is asked again
    asked = len(server.bodies)
    assert scores(run(server, task, tmp_path / "out", judge_of(server)))["score"] == 1
    assert len(server.bodies) == asked + 4 == asked + len(judged_bodies(server))


def test_failures_are_counted_and_never_a_score(server, task, tmp_path):
    def said(text):
        if "Question: Why?" in text:
            return completion("I cannot say.")
        return failure(400) if "Question: Where?" in text else completion("0.8")

    replies(server, said)
    results = run(server, task, tmp_path / "out", judge_of(server))
    assert results["tasks"]["mmvet"]["unscored"] == {UNCLEAR: 1, REFUSED: 1}
    assert results["tasks"]["mmvet"]["figures"]["score"] == pytest.approx(
        {"value": 0.8, "stderr": 0, "n": 2})


def test_a_missing_answer_is_wrong_without_the_judge(server, task, tmp_path):
    def reply(body, times):
        if body["model"] == "a judge":
            return completion("1.0")
        return failure(400) if "Why?" in asked_text(body) else completion("an answer")

    server.reply = reply
    results = run(server, task, tmp_path / "out", judge_of(server))
    assert scores(results)["score"] == 0.75 and len(judged_bodies(server)) == 3
    assert results["tasks"]["mmvet"]["unanswered"] == {"refused by the server": 1}


def test_replies_are_kept(server, task, tmp_path, caplog):
    """Again: nothing is asked. Broken off: what was said is kept. Another prompt: all anew."""
    replies(server, lambda text: failure(500) if "Question: Where?" in text else completion("1"))
    with pytest.raises(TaidError, match=r"gives no answer after 2 attempts.*are kept"):
        run(server, task, tmp_path / "out", judge_of(server, requests=1), batch_size=1)
    before = {asked_text(body) for body in judged_bodies(server)}
    replies(server, lambda text: completion("1"))
    run(server, task, tmp_path / "out", judge_of(server))
    asked = len(judged_bodies(server))
    again = [asked_text(body) for body in judged_bodies(server)]
    assert len({*again}) == 4 and all(again.count(text) == 1 for text in before
                                      if "Question: Where?" not in text)
    first = (tmp_path / "out" / "answers" / "mmvet.judge.jsonl").read_text()
    run(server, task, tmp_path / "out", judge_of(server))
    assert len(judged_bodies(server)) == asked
    assert (tmp_path / "out" / "answers" / "mmvet.judge.jsonl").read_text() == first
    assert not [*(tmp_path / "out" / "answers").glob(".*partial*")]

    own = tmp_path / "prompt.txt"
    own.write_text("{question}|{answer}|{prediction}|")
    caplog.set_level(logging.WARNING)
    results = run(server, task, tmp_path / "out", judge_of(server, prompt=own))
    assert results["tasks"]["mmvet"]["judge"]["prompt"]["name"] == str(own)
    assert len(judged_bodies(server)) == asked + 4
    assert "Why?|red <OR> blue|Why?|" in map(asked_text, judged_bodies(server))


def test_another_answer_is_judged_again(server, task, tmp_path):
    replies(server, lambda text: completion("1"))
    run(server, task, tmp_path / "out", judge_of(server))
    run(server, task, tmp_path / "out", judge_of(server), max_new_tokens=9)
    assert len(judged_bodies(server)) == 4  # other settings, but the same answers
    assert len([b for b in server.bodies if b["model"] == "served"]) == 8
    server.reply = lambda body, _: completion("new" if body["model"] == "served" else "0")
    results = run(server, task, tmp_path / "out", judge_of(server), max_new_tokens=8)
    assert len(judged_bodies(server)) == 8 and scores(results)["score"] == 0


def test_seeds_are_judged_each(server, task, tmp_path):
    server.reply = lambda body, _: completion(
        str(body["seed"] % 100) if body["model"] == "served" else
        "1" if "Question: Why?" in asked_text(body) else "0")
    results = run(server, task, tmp_path / "out", judge_of(server), temperature=1.0, seeds=(1, 2))
    assert len(judged_bodies(server)) == 8
    assert results["tasks"]["mmvet"]["figures"]["score"]["value"] == 0.25


@pytest.mark.parametrize(("reply", "score"), [
    ("0.5", 0.5), ("1", 1), ("1.0", 1), ("0", 0), ("**0.7**", 0.7), ("Score: 0.2", 0.2),
    ("0.3 | because", 0.3), ("0.8/1.0", 0.8), ("10", None), ("2", None), ("1.5", None),
    ("seven", None), ("", None), ("The score is 0.5", None)])
def test_a_reply_s_number(reply, score):
    question = read(mmvet.BENCHMARK, answer="x", capability="rec")
    found = mmvet.read_score(question, reply)
    assert found == (None if score is None else Verdict(score, reply.strip("*").removeprefix(
        "Score: ").split()[0].split("/")[0]))


@pytest.mark.parametrize(("how", "words"), [
    ({"url": "http://x/v1", "model": None}, "--judge-model"),
    ({"url": "x/v1", "model": "m"}, "--judge-url = 'x/v1'.*http"),
    ({"url": "http://x/v1", "model": "m", "key_variable": "NO_SUCH_KEY"}, "env.*NO_SUCH_KEY"),
    ({"url": "http://x/v1", "model": "m", "timeout": 0.0}, "--timeout = 0")])
def test_a_judge_that_cannot_be(how, words):
    with pytest.raises(TaidError, match=words):
        open_judge(**{"key_variable": None, "timeout": 1.0, "requests": 2, **how})


def test_prompts_and_tasks_that_do_not_fit(server, task, tmp_path):
    own = tmp_path / "prompt.txt"
    own.write_text("{question} {prediction}")
    with pytest.raises(TaidError, match=r"prompt.txt' lacks \{answer\}"):
        judge_of(server, prompt=own).check([task])
    with pytest.raises(TaidError, match="cannot be read"):
        judge_of(server, prompt=tmp_path / "none.txt").check([task])
    other = open_task(ai2d.BENCHMARK, ai2d.BENCHMARK.rules[0], _ai2d(tmp_path))
    with pytest.raises(TaidError, match="none of the tasks' rules asks a judge"):
        judge_of(server).check([other])
    assert not server.bodies


def _ai2d(folder: Path) -> DataSource:
    row = {"question": "?", "options": ["a", "b"], "answer": "1", "image": "a.png"}
    (folder / "ai2d.jsonl").write_text(json.dumps(row))
    return DataSource(str(folder / "ai2d.jsonl"))


# ----- CharXiv ------------------------------------------------------------------------------

CONSTANTS = '''
import os
DESCRIPTIVE_RESP_INST = {1: "{}what is its title?\\n  * As written.", 18: "What is the layout?"}
DESCRIPTIVE_GRADING_PREFIX = ("<|NUM_TRIPLETS|> pairs, keys <|JSON_KEYS|>: "
                              "<|OVERARCHING_QUESTION|>\\n")
DESCRIPTIVE_GRADING_QMAP = {1: "Title?", 18: "Layout?"}
DESCRIPTIVE_GRADING_ICL = {"title": "Rubric of titles\\n", "layout": "Rubric of layouts\\n"}
REASONING_RESP_INST = {3: "{}\\n* A number.", 4: "{}\\n{}"}
REASONING_GRADING_PREFIX = "Compare."
REASONING_GRADING_INST = {3: "<|question|> | <|ground_truth|> | <|response|>",
                          4: "<|question|> ! <|ground_truth|> ! <|response|>"}
raise RuntimeError("never run")
'''
CHART = {"figure_path": "images/7.jpg", "subplot_row": 2, "subplot_col": 3, "subplot_loc": None,
         **{f"descriptive_q{n}": q for n, q in zip("1234", (1, 18, 1, 1), strict=True)},
         **{f"descriptive_a{n}": a for n, a in zip("1234", ("A", "1 by 1", "C", "D"), strict=True)},
         "reasoning_q": "How much?", "reasoning_a": "2.50", "reasoning_q_source": 4}


def charts(benchmark, folder: Path, **columns):
    (folder / "constants.py").write_text(CONSTANTS)
    row = {"image": "a.png", **CHART, **columns}
    (folder / "val.jsonl").write_text(json.dumps(row))
    return open_task(benchmark, benchmark.rules[0], DataSource(str(folder / "val.jsonl")))


class TestCharXiv:
    """The words are those of the authors' file; theirs gave the same questions and prompts."""

    def test_descriptive(self, tmp_path):
        found = charts(charxiv_descriptive.BENCHMARK, tmp_path).questions
        assert [q.id for q in found] == [f"images/7.jpg_{n}" for n in "1234"]
        assert found[0].prompt[1] == ("For the subplot at row 2 and column 3, what is its title?\n"
                                      "  * As written.")
        assert found[1].prompt[1] == "What is the layout?"
        assert charxiv.ask("", found[1], " 2 by 2 ") == (
            "1 pairs, keys ['extract_answer_T1', 'score_T1']: Layout?\nRubric of layouts\n"
            "T1:\nResponse 1: 2 by 2\nGround Truth 1: 1 by 1\n\n")
        assert found[1].tags == {"kind": "Pattern Recognition"} and found[1].group == "images/7.jpg"

    @pytest.mark.parametrize(("columns", "begins"), [
        ({"subplot_row": 0, "subplot_col": 0}, "For the current plot, what"),
        ({"subplot_loc": "the inset"}, "For the inset, what")])
    def test_where_to_look(self, tmp_path, columns, begins):
        first, *_ = charts(charxiv_descriptive.BENCHMARK, tmp_path, **columns).questions
        assert first.prompt[1].startswith(begins)

    def test_reasoning(self, tmp_path):
        found, = charts(charxiv_reasoning.BENCHMARK, tmp_path).questions
        assert found.prompt[1] == ("How much?\n* Your final answer must be a number with 2 decimal "
                                   "places.")
        assert charxiv.ask("", found, "2.5") == "Compare.How much? ! 2.50 ! 2.5"
        whole, = charts(charxiv_reasoning.BENCHMARK, tmp_path, reasoning_a="3").questions
        assert whole.prompt[1].endswith("must be an exact integer.")

    def test_vlmevalkit_s_table_brings_its_own_words(self):
        found = read(charxiv_reasoning.BENCHMARK, index=4, inst_category=3, answer="7",
                     grading_query="Compare {PREDICTION} with 7")
        assert found.prompt == (None, "what is It?") and found.tags == {"kind": "Number-in-Chart"}
        assert charxiv.ask("", found, "8") == "Compare 8 with 7"
        about = read(charxiv_descriptive.BENCHMARK, index=4, qid=16, grading_query="{PREDICTION}?")
        assert about.tags == {"kind": "Pattern Recognition"}

    def test_without_the_authors_file(self, tmp_path):
        (tmp_path / "val.jsonl").write_text(json.dumps({"image": "a.png", **CHART}))
        with pytest.raises(RecordError, match=r"princeton-nlp/CharXiv, src/constants.py"):
            open_task(charxiv_reasoning.BENCHMARK, charxiv_reasoning.BENCHMARK.rules[0],
                      DataSource(str(tmp_path / "val.jsonl")))

    def test_a_template_that_is_not_there(self, tmp_path):
        with pytest.raises(RecordError, match=r"constants.py has no REASONING_RESP_INST\[1\]"):
            charts(charxiv_reasoning.BENCHMARK, tmp_path, reasoning_q_source=1)

    @pytest.mark.parametrize(("reply", "wanted"), [
        ('{"extract_answer_T1": "A", "score_T1": 1}', Verdict(1, "A")),
        ('```json\n{"extracted_answer": "b", "score": 0}\n```', Verdict(0, "b")),
        ('{"score": 1}', Verdict(1, "")), ('{"score": 2}', None), ('{"score": true}', None),
        ('{"score": "1"}', None), ("1", None), ("", None), ('{"score": 1', None),
        ('{"extract_answer": "x"}', None)])
    def test_replies(self, reply, wanted):
        question = read(charxiv_reasoning.BENCHMARK, inst_category=3, grading_query="{PREDICTION}")
        assert charxiv.read_score(question, reply) == wanted

    def test_as_it_is_used(self, server, tmp_path):
        (tmp_path / "a.png").write_bytes(png(1))
        task = charts(charxiv_descriptive.BENCHMARK, tmp_path)
        replies(server, lambda text: completion(
            json.dumps({"extract_answer_T1": "x", "score_T1": int("titles" in text)})))
        plain = run(server, task, tmp_path / "out")["tasks"]["charxiv_descriptive"]
        assert plain["unscored"] == {NO_JUDGE: 4}
        entry = run(server, task, tmp_path / "out", judge_of(server))["tasks"][
            "charxiv_descriptive"]
        assert entry["figures"]["accuracy"]["value"] == 0.75
        assert entry["judge"]["prompt"]["name"] == "CharXiv"
        with pytest.raises(TaidError, match="charxiv_descriptive brings its own"):
            judge_of(server, prompt=tmp_path / "x").check([task])
