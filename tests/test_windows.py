"""Long documents in windows: every byte learned once, by both models, at boundaries of both."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from training.runs import make_trainer, weights
from zoo import make_tokenizer

from taid_vlm import DistillationConfig
from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.windows import Windows, cut
from taid_vlm.errors import TaidError
from taid_vlm.records import Malformed, Record

WORDS = ("a", "red", "naïve", "图片", "under the", "x = [1,  2]\n", "\n\n", "don't", "🙂",
         "antidisestablishmentarianism", "def f():\n    return 0\n", "12345678")
PAIRS = [("llama", "plain", "qwen2", "other"), ("qwen2", "plain", "llama", "metaspace"),
         ("llama", "plain", "llama", "plain"), ("gemma3_text", "plain", "qwen2", "plain")]


def document(number: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(number))


def adapters(names: tuple[str, str, str, str], max_length: int | None = None
             ) -> list[ModelAdapter]:
    teacher, one, student, other = names
    return [make_adapter(make_tokenizer(teacher, one), "teacher", max_length),
            make_adapter(make_tokenizer(student, other), "student", max_length)]


def learned(adapter: ModelAdapter, record: Record) -> tuple[bytes, int, bool]:
    """Bytes of a window that are learned, its tokens, and whether the end of the text is."""
    (row,) = adapter.encode([adapter.render(record)], [[]]).rows
    (answer,) = row.answers
    assert all(token.prefix == token.suffix == b"" for token in answer.tokens)
    assert answer.tokens[0].position > 0 or record.context == 0
    assert [token.start for token in answer.tokens[1:]] == [t.end for t in answer.tokens[:-1]]
    data = (record.text or "")[record.context :].encode()
    return (data[answer.tokens[0].start : answer.tokens[-1].end], len(row.ids),
            answer.end_of_turn is not None)


@pytest.mark.parametrize("names", PAIRS, ids=" ".join)
@pytest.mark.parametrize(("window", "stride"), [(16, 2), (64, 8), (64, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_every_byte_is_learned_once(
    names: tuple[str, str, str, str], window: int, stride: int, seed: int
) -> None:
    both, text = adapters(names), document(150, seed)
    windows = list(Windows([], both, window, stride).split(Record("a", text=text)))
    assert len(windows) > 3
    for adapter in both:
        parts = [learned(adapter, record) for record in windows if isinstance(record, Record)]
        assert b"".join(part for part, _, _ in parts) == text.encode()
        assert all(tokens <= window for _, tokens, _ in parts)
        assert [ends for _, _, ends in parts] == [False] * (len(parts) - 1) + [True]
    for start, first, end in cut(text, both, window, stride):
        assert start < first < end or start == first == 0


@pytest.mark.parametrize("names", PAIRS[:2], ids=" ".join)
def test_context_is_no_longer_than_the_stride_and_seldom_shorter(
    names: tuple[str, str, str, str]
) -> None:
    both, stride = adapters(names), 12
    windows = list(cut(document(300), both, 64, stride))[1:]
    text = document(300)
    for adapter in both:
        sizes = [len(adapter.tokenizer(text[start:first], add_special_tokens=False)["input_ids"])
                 for start, first, _ in windows]
        assert max(sizes) <= stride + 1  # alone, a text may begin with one token more
    assert min(first - start for start, first, _ in windows) > 0


def test_a_text_without_spaces_is_cut_too() -> None:
    both, text = adapters(PAIRS[0]), "图片naïve" * 60
    windows = list(cut(text, both, 32, 4))
    assert windows[0][:2] == (0, 0)
    assert [end for *_, end in windows] == [*(first for _, first, _ in windows[1:]), len(text)]


def test_short_texts_and_conversations_stay_as_they_are() -> None:
    short = Record("a", text="a red one")
    chat = {"prompt": "a", "completion": "b"}
    rows = list(Windows([short, chat, {"prompt": "a"}], adapters(PAIRS[0]), 64, 8, passes=1))
    assert rows[0] == short
    assert isinstance(rows[1], Record) and rows[1].answers == ["b"]
    assert isinstance(rows[2], Malformed)


def test_all_tokens_are_aligned_where_tokenizers_are_one() -> None:
    both, text = adapters(PAIRS[2]), document(120)
    collator = DistillationCollator(both[1])
    windows = list(Windows([Record("a", text=text)], both, 32, 4, passes=1))
    batch = collator(windows)
    assert batch["counts"]["cut"] == 0
    ids = both[1].tokenizer(text, add_special_tokens=False)["input_ids"]
    assert abs(len(batch["labels"]) - len(ids) - 1) <= 2  # the same but where windows begin


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(workers: int) -> None:
    rows = [{"text": document(40, seed)} for seed in range(5)]
    windows = Windows(rows, adapters(PAIRS[0]), 32, 4, seed=1)
    windows.block = 4
    loader = DataLoader(windows, 4, collate_fn=list, num_workers=workers)
    texts = [row.text for batch in islice(loader, 12) for row in batch]
    alone = [row.text for row in islice(windows, 48) if isinstance(row, Record)]
    assert texts == alone


def test_training_in_windows(tmp_path: Path) -> None:
    """Ends where it should, cuts nothing, and is the same again."""
    data = [{"text": document(60, seed)} for seed in range(4)]
    options: dict[str, Any] = {"teacher": "llama", "student": "qwen2", "data": data,
                               "window": 32, "max_length": 32, "max_steps": 2}
    one, two = (make_trainer(tmp_path / name, **options) for name in "ab")
    for trainer in (one, two):
        trainer.train()
        assert trainer.cut == 0
        assert trainer.answer_tokens > 200
    assert all(torch.equal(x, weights(two)[name]) for name, x in weights(one).items())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"window": 8}, "window = 8, but it must be at least 16"),
    ({"stride": 4}, r"stride = 4 tokens without a window"),
    ({"window": 32, "stride": 32}, r"stride = 32 tokens of a window of 32 leave nothing"),
])
def test_what_windows_cannot_be(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=message):
        DistillationConfig(str(tmp_path), use_cpu=True, **arguments)


def test_a_window_longer_than_a_model_takes(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"train\.window = 64, but the \w+ takes at most 32 tokens"):
        make_trainer(tmp_path, teacher="llama", student="qwen2", data=[{"text": "a"}], window=64,
                     max_length=32)
