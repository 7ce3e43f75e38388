"""CIDEr against pycocoevalcap's figures and a dense reference; the tokens of captions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from benchmarks.short_answers import BROKEN, judged, question, read, survives

from taid_vlm.benchmarks.metrics.captions import CIDER, cider, tokens
from taid_vlm.benchmarks.tasks import coco_caption
from taid_vlm.errors import RecordError

REFERENCES = [
    ["a man rides a brown horse", "a man on a horse in a field", "the man is riding a horse",
     "a person rides a horse through grass", "man riding horse"],
    ["a red bus on the street", "a bus drives down a city street",
     "red double decker bus in london", "a bus on a road", "the bus is red"],
    ["two cats sleep on a bed", "cats on a bed", "two cats lying on a white bed",
     "a pair of cats asleep", "two cats sleep"],
    ["a plate of food with rice", "rice and vegetables on a plate", "a plate with rice",
     "food on a white plate", "plate of rice"],
]
LONG = "a plate of food with rice and vegetables on a white plate with food on a plate of food"
# Scores of pycocoevalcap 1.2 (cider.Cider) on these tokens.
SCORED = [
    (["a man riding a horse", "a red bus on a city street", "a dog", LONG],
     [2.535986191773207, 2.592750163529302, 0.0, 0.21568795353892312]),
    (["man", "a a a a a a", "two cats sleep on a bed", ""],
     [0.7790289757631184, 0.0, 4.198803760377937, 0.0]),
]


def split(texts: Sequence[str]) -> list[list[str]]:
    return [text.split() for text in texts]


@pytest.mark.parametrize(("captions", "scores"), SCORED)
def test_scores_of_pycocoevalcap(captions: list[str], scores: list[float]) -> None:
    assert cider(split(captions), [split(each) for each in REFERENCES]) == \
        pytest.approx(scores, abs=1e-12)


def dense_cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """The paper's equations on vectors over all n-grams there are, in float64."""
    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]

    total = np.zeros(len(candidates))
    for n in range(1, 5):
        seen = sorted({gram for text in chain(candidates, *references)
                       for gram in grams(text, n)})
        images = np.array([[any(gram in grams(ref, n) for ref in refs) for gram in seen]
                           for refs in references]).sum(0).reshape(-1)
        rarity = np.log(len(references)) - np.log(np.maximum(images, 1))

        def vector(words: list[str], n: int = n, seen: list[tuple[str, ...]] = seen,
                   rarity: np.ndarray = rarity) -> np.ndarray:
            return np.array([grams(words, n).count(gram) for gram in seen]) * rarity

        for index, (words, refs) in enumerate(zip(candidates, references, strict=True)):
            for ref in refs:
                a, b = vector(words), vector(ref)
                norm = np.sqrt((a**2).sum() * (b**2).sum())
                gap = max(len(words) - 1, 0) - max(len(ref) - 1, 0)
                alike = (np.minimum(a, b) * b).sum() / norm if norm else 0.0
                total[index] += 10 / 4 * alike * np.exp(-gap**2 / 72) / len(refs)
    return total.tolist()


def test_cider_against_dense_vectors() -> None:
    draw, words = random.Random(0), ["a", "the", "dog", "cat", "runs", "sits", "on", "red"]

    def caption(longest: int) -> list[str]:
        return draw.choices(words, k=draw.randint(0, longest))

    for _ in range(15):
        images = draw.randint(1, 6)
        said = [caption(15) for _ in range(images)]
        references = [[caption(9) for _ in range(draw.randint(1, 4))] for _ in range(images)]
        assert cider(said, references) == pytest.approx(dense_cider(said, references), abs=1e-12)


# As Stanford's PTBTokenizer and pycocoevalcap's list of punctuation give them.
@pytest.mark.parametrize(("caption", "found"), [
    ("A man's dog isn't on the t-shirt (red), at 7:30 p.m. -- it's $5.00!",
     "a man 's dog is n't on the t-shirt -lrb- red -rrb- at 7:30 p.m. it 's $ 5.00"),
    ("Two cats & a dog: 1,000 birds; 3.5% of", "two cats & a dog 1,000 birds 3.5 % of"),
    ("a black/white cat and/or dog...", "a black/white cat and/or dog"),
    ('"Quoted" text — em-dash – en-dash', "quoted text em-dash en-dash"),
    ("U.S. flag, St. Louis. can't cannot gonna", "u.s. flag st. louis ca n't can not gon na"),
    ("a dog 🐶 and a cat😀", "a dog and a cat"),
    ("a café naïve façade", "a café naïve façade"),
    ("#hashtag #2 @user x=y a*b [b] {c}", "#hashtag # 2 @user x = y a * b -lsb- b -rsb- -lcb- c "
                                         "-rcb-"),
    ("I'm we're they'll you'd he's dogs' o'clock",
     "i 'm we 're they 'll you 'd he 's dogs o'clock"),
    ("10-year-old boy's 2nd 50's .75", "10-year-old boy 's 2nd 50 's .75"),
    ("Женщина бежит по улице.", "женщина бежит по улице"),
    ("two-- three…four", "two three four"),
    ("it’s a man’s “world”", "it 's a man 's world"),
    ("a dog\nand a cat.\n", "a dog and a cat"),
    ("...", ""), ("", ""),
])
def test_tokens_of_a_caption(caption: str, found: str) -> None:
    assert tokens(caption) == found.split()


def test_the_best_caption_is_one_of_the_references() -> None:
    asked = [question(*captions) for captions in REFERENCES]
    said = [captions[0] for captions in REFERENCES]
    own = [verdict.score for verdict in CIDER.judge(asked, said)]
    others = [verdict.score for verdict in CIDER.judge(asked, said[1:] + said[:1])]
    assert min(own) > 2 > 0.3 > max(others)
    assert CIDER.figures(judged(CIDER, asked, said))["cider"].value == pytest.approx(
        sum(own) / 4)


def test_rule_is_told_by_its_tokens() -> None:
    assert "ptb-like" in CIDER.name
    assert CIDER.judge([question("a dog")], ["A dog!"])[0].read == "a dog"
    assert CIDER.judge([question("a dog")], ["..."])[0].read is None


def test_figures_of_none_and_of_one_image() -> None:
    """Among one image every n-gram is in all images and weighs nothing: no figure, not 0."""
    one = judged(CIDER, [question("a dog")], ["a dog"])
    assert one[0].verdict.score == 0.0
    assert math.isnan(CIDER.figures(one)["cider"].value)
    assert CIDER.judge([], []) == [] and CIDER.figures([])["cider"].n == 0


def test_images_with_the_same_captions() -> None:
    asked = [question("a dog runs"), question("a dog runs"), question("two cats sleep")]
    same = CIDER.judge(asked, ["a dog runs", "a dog runs", "two cats sleep"])
    assert same[0].score == same[1].score > 0
    assert cider([["x"]] * 2, [[["x"]]] * 2) == [0.0, 0.0]


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_broken_captions(answer: str) -> None:
    assert survives(CIDER, answer, "a man rides a horse", "a man on a horse").score == 0.0


def test_a_broken_caption_among_others() -> None:
    asked = [question(*captions) for captions in REFERENCES]
    for answer in BROKEN.values():
        scores = [verdict.score for verdict in CIDER.judge(asked, [answer, *["a bus"] * 3])]
        assert all(map(math.isfinite, scores)) and scores[0] < 0.2


def test_coco_row() -> None:
    one = read(coco_caption.BENCHMARK, answer=[" A dog. ", "a cat"], question_id="COCO_7.jpg", id=3)
    assert one.answers == ("A dog.", "a cat") and one.id == "COCO_7.jpg"
    assert one.prompt == (None, "Provide a one-sentence caption for the provided image.")


@pytest.mark.parametrize("answer", [[], [""], ["a dog", " "], None, ["a dog", None]])
def test_caption_without_references(answer: list[str] | None) -> None:
    with pytest.raises(RecordError, match=r"x.jsonl:1: .*answer"):
        read(coco_caption.BENCHMARK, answer=answer)
