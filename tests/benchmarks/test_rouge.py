"""ROUGE-L against rouge-score's figures and a table; files of instructions and references."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.short_answers import BROKEN, judged, question, read_file, survives, verdict

from taid_vlm.benchmarks.metrics import rouge
from taid_vlm.benchmarks.metrics.rouge import ROUGE_L, common_subsequence, rouge_l
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.tasks.open_ended import BENCHMARK
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, TaidError

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent"))


def subsequence_by_table(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j],
                                                                     table[i][j - 1])
    return table[-1][-1]


def test_common_subsequence_against_the_table() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        a, b = (draw.choices("abcd", k=draw.randint(0, draw.choice((3, 12, 80))))
                for _ in range(2))
        assert common_subsequence(a, b) == subsequence_by_table(a, b)


def test_rouge_l_by_hand() -> None:
    assert rouge_l(["police", "kill"], ["police", "the", "kill"]) == pytest.approx(0.8)
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == rouge_l(["b"], ["a"]) == 0.0


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rouge._stemmer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(TaidError, match=r"nltk.*pip install 'taid-vlm\[eval\]'"):
        read_file(BENCHMARK, [{"prompt": "Say it.", "output": "It."}], tmp_path)  # before a model


class TestWithStemmer:
    @pytest.fixture(autouse=True)
    def stemmer(self) -> None:
        pytest.importorskip("nltk")

    # Scores of rouge-score 0.1.2, RougeScorer(["rougeL"], use_stemmer=True).
    @pytest.mark.parametrize(("answer", "reference", "score"), [
        ("The quick brown dog jumped on the logs.", "The quick brown fox jumps over the lazy dog",
         0.5882352941176471),
        ("police killed the gunman", "police kill the gunman", 1.0),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("It's 3.14, isn't it?", "It is 3 14 is not it", 0.5714285714285714),
        ("Étude naïve runners' RAN", "etude naive runner ran", 0.4444444444444445),
        ("generalizations of oscillators", "generalize the oscillation", 0.6666666666666666),
        ("a b c d e", "e d c b a", 0.20000000000000004),
        ("word", "word word word", 0.5),
    ])
    def test_scores_of_rouge_score(self, answer: str, reference: str, score: float) -> None:
        found = verdict(ROUGE_L, answer, reference)
        assert found.score == pytest.approx(score, abs=1e-15) and found.read == answer

    def test_the_best_reference_counts(self) -> None:
        assert verdict(ROUGE_L, "a small cat", "a dog", "the small cats", "no").score == \
            pytest.approx(2 / 3)

    @pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
    def test_broken_answers(self, answer: str) -> None:
        found = survives(ROUGE_L, answer, "stems of running horses", "none " * 300)
        assert found.score == 0.0

    def test_many_different_words(self) -> None:
        text = " ".join(f"running{index}ness" for index in range(14_000))
        assert survives(ROUGE_L, text, "horses").score == 0.0

    def test_figures(self) -> None:
        asked = [question("one two"), question("one two")]
        found = ROUGE_L.figures(judged(ROUGE_L, asked, ["one two", "three"]))
        assert found["rouge_l"].value == 0.5 and found["rouge_l"].n == 2
        assert ROUGE_L.judge([], []) == [] and ROUGE_L.figures([])["rouge_l"].n == 0

    @pytest.mark.parametrize(("row", "prompt", "answers"), [
        ({"prompt": "Say it.", "output": "It."}, "Say it.", ("It.",)),
        ({"instruction": "Add.", "input": "1 and 2", "output": ["3", "three"]},
         "Add.\n\n1 and 2", ("3", "three")),
        ({"instruction": "Add.", "input": "", "references": ["3"]}, "Add.", ("3",)),
        ({"prompt": "### Add.", "instruction": "Add.", "output": "[3, 4]"}, "### Add.",
         ("[3, 4]",)),  # a text that looks like a list is one text
    ])
    def test_columns(self, row: dict[str, Any], prompt: str, answers: tuple[str, ...],
                     tmp_path: Path) -> None:
        one, = read_file(BENCHMARK, [{**row, "category": "sums"}], tmp_path)
        assert one.prompt == (prompt,) and one.answers == answers and one.images == ()
        assert one.tags == {"category": "sums"} and one.id == "0"

    def test_with_an_image(self, tmp_path: Path) -> None:
        one, = read_file(BENCHMARK, [{"prompt": "What?", "image": "a.png", "output": "A dog"}],
                         tmp_path)
        assert one.prompt == (None, "What?") and one.images[0].value == tmp_path / "a.png"

    @pytest.mark.parametrize(("row", "said"), [
        ({"prompt": "What?"}, "no references.*found: prompt"),
        ({"prompt": "What?", "output": ""}, "no references"),
        ({"prompt": "What?", "output": []}, "blank answer or none"),
        ({"prompt": "What?", "references": ["a", " "]}, "blank"),
        ({"prompt": "何？", "output": "犬です。"}, "none of the letters a-z"),
        ({"output": "It."}, "column 'prompt' is missing"),
    ])
    def test_rows_that_cannot_be_scored(
        self, row: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(RecordError, match=f"rows.jsonl:1: .*{said}"):
            read_file(BENCHMARK, [row], tmp_path)

    def test_columns_by_another_name(self, tmp_path: Path) -> None:
        path = tmp_path / "dolly.json"
        path.write_text('[{"instruction": "Add.", "context": "1, 2", "response": "3"}]')
        one, = read_questions(BENCHMARK, DataSource(
            str(path), columns={"input": "context", "output": "response"}))
        assert one.prompt == ("Add.\n\n1, 2",) and one.answers == ("3",)

    @pytest.mark.skipif(not EXTRA.exists(), reason="TAID_VLM_EXTRA_DATA is not set")
    @pytest.mark.parametrize("name", ["vicuna_questions", "mt_bench_questions"])
    def test_prompts_without_references(self, name: str) -> None:
        with pytest.raises(RecordError, match=f"{name}.jsonl:1: no references.*Vicuna"):
            read_questions(BENCHMARK, DataSource(str(EXTRA / "text" / f"{name}.jsonl")))

    @pytest.mark.skipif(not EXTRA.exists(), reason="TAID_VLM_EXTRA_DATA is not set")
    def test_real_answers(self) -> None:
        asked = read_questions(BENCHMARK, DataSource(
            str(EXTRA / "text" / "gsm8k_test.jsonl"), max_records=200,
            columns={"prompt": "question", "output": "answer"}))
        own = [verdict.score for verdict in ROUGE_L.judge(asked, [q.answers[0] for q in asked])]
        assert own == [1.0] * 200
        shifted = [q.answers[0] for q in asked[1:] + asked[:1]]
        assert max(verdict.score for verdict in ROUGE_L.judge(asked, shifted)) < 0.75
