"""Tokens must tile their text exactly, whatever the tokenizer does; otherwise it is an error."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from zoo import make_tokenizer
from zoo.tokenizers import CORPUS

from taid_vlm.adapters import tokens
from taid_vlm.adapters.tokens import tile, token_table, tokenizer_change
from taid_vlm.errors import AlignmentError

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
EXACT = ("byte level", "gpt2 split", "bpe first", "bpe always", "bpe never", "bpe normalizer",
         "unigram bytes", "zoo metaspace", "zoo unigram")
WRITTEN_OUT = tokens._written_out
ALPHABET = "aeinst TRpic.,:\n\t 0123é图片🐈ß▄\u0301\u200d"


def metaspace(scheme: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def spaced(tokenizer: Tokenizer, scheme: str) -> Tokenizer:
    """The sentencepiece pipeline; "normalizer" is how Llama 2's tokenizer.json writes it."""
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = metaspace(scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@cache
def trained(kind: str) -> dict[str, Any]:
    unigram = kind == "unigram"
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE())
    tokenizer.pre_tokenizer = metaspace("always")
    trainer = (
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=SPECIAL,
                                show_progress=False)
        if unigram
        else trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return json.loads(tokenizer.to_str())["model"]


def bpe(scheme: str) -> Tokenizer:
    found = trained("bpe")
    vocab = dict(found["vocab"])
    vocab |= {name: len(vocab) + i for i, name in enumerate(BYTES)}
    merges = [tuple(pair) for pair in found["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    return spaced(Tokenizer(model), scheme)


def unigram(fallback: bool, scheme: str = "always") -> Tokenizer:
    vocab = [tuple(entry) for entry in trained("unigram")["vocab"]]
    vocab += [(name, -20.0) for name in BYTES] if fallback else []
    return spaced(Tokenizer(models.Unigram(vocab, 0, byte_fallback=fallback)), scheme)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name in ("byte level", "gpt2 split"):  # the second does not normalise
        return make_tokenizer("gpt2", "plain" if name == "byte level" else "other")
    if name.startswith("zoo"):
        return make_tokenizer("gpt2", name.split()[1])
    if name.startswith("unigram"):
        return wrap(unigram(fallback=name.endswith("bytes")))
    return wrap(bpe(name.split()[1]))


def ids_of(name: str, text: str) -> list[int]:
    return tokenizer(name)(text, add_special_tokens=False)["input_ids"]


def spans_of(name: str, text: str) -> list[tuple[int, int]]:
    return tile(token_table(tokenizer(name)), ids_of(name, text), text)


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    words = ["picture", "The", "square", "naïve", "  ", "\n\n", "it's"]
    parts = [rng.choice(words) if rng.random() < 0.3 else rng.choice(ALPHABET) for _ in range(30)]
    return "".join(parts)


def check_tiling(name: str, text: str) -> None:
    """Spans follow each other without a gap, and every slice is its token's own bytes."""
    table, ids, data = token_table(tokenizer(name)), ids_of(name, text), text.encode()
    cursor = 0
    for index, (start, end) in zip(ids, tile(table, ids, text), strict=True):
        token = table.text[index]
        assert start == cursor
        assert token is not None
        assert data[start:end] in (token, token.removeprefix(b" "))  # the virtual space
        cursor = end
    assert cursor == len(data)


@pytest.mark.parametrize("name", EXACT)
def test_random_strings_are_tiled_without_gaps(name: str) -> None:
    for seed in range(60):
        text = random_text(seed)
        if name == "byte level":  # this one composes characters: another test
            text = text.replace("\u0301", "")
        check_tiling(name, text)


@pytest.mark.parametrize("name", ["byte level", "gpt2 split"])
def test_ascii_spans_are_the_tokenizers_own_offsets(name: str) -> None:
    for seed in range(20):
        text = random_text(seed).encode("ascii", "ignore").decode()
        found = tokenizer(name)(text, return_offsets_mapping=True)["offset_mapping"]
        assert spans_of(name, text) == [tuple(offsets) for offsets in found]


@pytest.mark.parametrize("name", EXACT)
def test_tokens_may_end_inside_a_character(name: str) -> None:
    text = "a🐈b"
    ends = [end for _, end in spans_of(name, text)]
    assert any(1 < end < 5 for end in ends)
    assert ends[-1] == 6


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_prepended_space_covers_no_bytes(scheme: str) -> None:
    text = "picture of the picture"
    first, *_ = spans_of(f"bpe {scheme}", text)
    token = token_table(tokenizer(f"bpe {scheme}")).text[ids_of(f"bpe {scheme}", text)[0]]
    assert token.startswith(b" ")
    assert first == (0, len(token) - 1)


def test_without_prepended_space_the_first_token_is_the_texts() -> None:
    ids = ids_of("bpe never", "picture of the picture")
    table = token_table(tokenizer("bpe never"))
    assert not table.text[ids[0]].startswith(b" ")
    assert table.text[ids[-1]].startswith(b" ") != table.text[ids[0]].startswith(b" ")


@pytest.mark.parametrize("name", EXACT)
def test_table_names_every_id(name: str) -> None:
    table, known = token_table(tokenizer(name)), tokenizer(name).get_vocab()
    assert len(table) == max(known.values()) + 1
    assert {s for s in table.strings if s is not None} == set(known)
    special = set(tokenizer(name).all_special_ids)
    assert set(table.special) == special
    assert all((table.text[i] is None) == (i in special) for i in known.values())


def test_table_knows_the_added_tokens() -> None:
    fast = make_tokenizer("llama")
    fast.add_tokens([AddedToken(" square", normalized=False)])
    table, added = token_table(fast), fast.convert_tokens_to_ids(" square")
    assert table.added == set(fast.added_tokens_decoder)
    assert table.added - set(table.special) == {added}
    assert table.text[added] == b" square"


def test_byte_tokens_stand_for_one_byte() -> None:
    fast = tokenizer("bpe first")
    table = token_table(fast)
    assert [table.text[fast.convert_tokens_to_ids(name)] for name in BYTES] == [
        bytes([byte]) for byte in range(256)]


STRIPS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("name", "lstrip", "rstrip"), [
    (name, left, right)
    for name in EXACT for left, right in STRIPS
])
def test_special_token_may_swallow_whitespace(name: str, lstrip: bool, rstrip: bool) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer(name).backend_tokenizer.to_str()))
    fast.add_tokens([AddedToken("<img>", lstrip=lstrip, rstrip=rstrip, special=True,
                                normalized=False)], special_tokens=True)
    text = "see  <img> \n now é<img>"
    ids = fast(text, add_special_tokens=False)["input_ids"]
    spans, data = tile(token_table(fast), ids, text), text.encode()
    image = fast.convert_tokens_to_ids("<img>")
    found = [data[a:b] for index, (a, b) in zip(ids, spans, strict=True) if index == image]
    assert found == [b"<img>", b"<img>"]
    seen = b"".join(data[a:b] for a, b in spans)
    assert seen.replace(b" ", b"").replace(b"\n", b"") == b"see<img>now\xc3\xa9<img>"


@pytest.mark.parametrize("family", ["llama", "gemma2", "idefics3"])
def test_bos_that_the_tokenizer_adds_covers_no_bytes(family: str) -> None:
    fast = make_tokenizer(family)
    table, text = token_table(fast), "The picture"
    ids = fast(text)["input_ids"]
    assert ids[0] == fast.bos_token_id
    assert tile(table, ids, text)[0] == (0, 0)
    assert tile(table, ids[1:], text) == tile(table, ids, text)[1:]
    written = fast.bos_token + text
    spans = tile(table, fast(written, add_special_tokens=False)["input_ids"], written)
    assert spans[0] == (0, len(fast.bos_token))


def test_eos_that_is_added_covers_no_bytes() -> None:
    table, text = token_table(tokenizer("bpe first")), "a picture"
    ids = [*ids_of("bpe first", text), tokenizer("bpe first").eos_token_id]
    assert tile(table, ids, text)[-1] == (len(text), len(text))


def test_decomposed_text_under_nfc_is_an_error() -> None:
    fast = make_tokenizer("qwen2")
    composed, decomposed = "un café", "un cafe\u0301"
    assert fast(composed)["input_ids"] == fast(decomposed)["input_ids"]  # a silent change
    with pytest.raises(AlignmentError, match="normal"):
        tile(token_table(fast), fast(decomposed)["input_ids"], decomposed)


def normalised(normalizer: Any, text: str) -> list[tuple[int, int]]:
    backend = bpe("never")
    backend.normalizer = normalizer
    fast = wrap(backend)
    return tile(token_table(fast), fast(text, add_special_tokens=False)["input_ids"], text)


@pytest.mark.parametrize(("normalizer", "text"), [
    (normalizers.Lowercase(), "The picture"),
    (normalizers.NFKC(), "the ﬁrst picture"),
    (normalizers.NFD(), "un café"),
    (normalizers.Replace("``", '"'), "``the picture"),
    (normalizers.Replace(Regex(" {2,}"), " "), "the  picture"),
])
def test_other_normalisers_are_an_error(normalizer: Any, text: str) -> None:
    with pytest.raises(AlignmentError):
        normalised(normalizer, text)


@pytest.mark.parametrize(("normalizer", "text"), [
    (normalizers.Replace(Regex(" {2,}"), " "), "the  🐈"),
    (normalizers.Replace("\n", ""), "the\npicture"),
    (normalizers.Strip(), "the picture  "),
])
def test_whitespace_that_a_normaliser_drops_is_an_error(normalizer: Any, text: str) -> None:
    with pytest.raises(AlignmentError):
        normalised(normalizer, text)


@pytest.mark.parametrize("text", ["a 🐈 here", "🐈", "picture 🐈"])
def test_unknown_character_is_an_error(text: str) -> None:
    ids = ids_of("unigram", text)
    assert tokenizer("unigram").unk_token_id in ids
    with pytest.raises(AlignmentError):
        tile(token_table(tokenizer("unigram")), ids, text)


def test_unigram_tiles_what_it_knows() -> None:
    check_tiling("unigram", "The picture shows a red square on the left.")


@pytest.mark.parametrize("name", EXACT)
def test_wrong_tokens_are_an_error(name: str) -> None:
    text = "The square is blue."
    table, ids = token_table(tokenizer(name)), ids_of(name, text)
    wrong = [ids[:-1], ids[1:], [*ids, ids[-1]], ids[::-1], [len(table) + 5, *ids[1:]]]
    for broken in wrong:
        with pytest.raises(AlignmentError):
            tile(table, broken, text)


def test_error_names_the_place() -> None:
    table, ids = token_table(tokenizer("byte level")), ids_of("byte level", "The red square")
    with pytest.raises(AlignmentError, match=r"byte 3\b.*normalise"):
        tile(table, ids, "The blue square")


def test_tokenizer_without_backend_is_refused() -> None:
    with pytest.raises(AlignmentError, match="fast tokenizer"):
        token_table(SimpleNamespace())


def test_word_level_tokenizers_forget_their_spaces() -> None:
    words = {word: i for i, word in enumerate(("<unk>", "</s>", "a", "red", "square", "."))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    text = "a  red square. "
    spans = tile(token_table(fast), fast(text)["input_ids"], text)
    assert [text[start:end] for start, end in spans] == ["a", "red", "square", "."]
    with pytest.raises(AlignmentError):
        tile(token_table(fast), fast("a blue square")["input_ids"], "a blue square")


# ----- what an added token spells: the rules of the tokenizers library ------------------------


def with_added(name: str, *added: AddedToken) -> PreTrainedTokenizerBase:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer(name).backend_tokenizer.to_str()))
    fast.add_tokens(list(added))
    return fast


def pieces(fast: PreTrainedTokenizerBase, text: str) -> list[tuple[str, str]]:
    """Every token and what it covers of a text."""
    ids, data = fast(text, add_special_tokens=False)["input_ids"], text.encode()
    table = token_table(fast)
    spans = tile(table, ids, text)
    return [(table.strings[index] or "", data[a:b].decode(errors="replace"))
            for index, (a, b) in zip(ids, spans, strict=True)]


def with_runs(normalized: bool) -> PreTrainedTokenizerBase:
    """As Gemma 3: runs of "▁" are merged by the model, and added tokens that are not special."""
    vocab = {name: i for i, name in enumerate(["<unk>", *BYTES, *"▁abx=1\n", "▁▁", "▁▁▁▁", "▁x"])}
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "x")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁" * n, normalized=normalized) for n in (2, 4)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("normalized", [True, False])
def test_runs_of_spaces_that_are_added_tokens(normalized: bool) -> None:
    fast, code = with_runs(normalized), "a  b\n    x = 1"
    table = token_table(fast)
    assert table.text[fast.convert_tokens_to_ids("▁▁▁▁")] == b"    "
    assert [b for _, b in pieces(fast, code)] == ["a", "  ", "b", "\n", "    ", "x", " ", "=", " ",
                                                  "1"]


def test_a_run_that_is_written_with_the_sign_itself() -> None:
    """Not normalised, it is found in the text as it is written, too."""
    assert pieces(with_runs(False), "a▁▁b  b") == [
        ("a", "a"), ("▁▁", "▁▁"), ("b", "b"), ("▁▁", "  "), ("b", "b")]


@pytest.mark.parametrize("name", ["byte level", "gpt2 split"])
def test_an_added_token_that_the_byte_level_model_has(name: str) -> None:
    """Merged, it is the bytes that it stands for; where it is written out, it is itself."""
    fast = with_added(name, *(AddedToken(token, normalized=False) for token in ("Ġthe", "Ã©", "é")))
    table = token_table(fast)
    told = {token: table.text[fast.convert_tokens_to_ids(token)] for token in ("Ġthe", "é")}
    assert told == {"Ġthe": b" the", "é": b"\xe9"}
    text = "on the Ġthe 鸡 é"
    assert "".join(b for _, b in pieces(fast, text) if "\ufffd" not in b).replace(
        " ", "") == "ontheĠtheé"
    check = [a for a, b in pieces(fast, text) if b in ("Ġthe", " the", "é")]
    assert check == ["Ġthe", "Ġthe", "é"]


@pytest.mark.parametrize("name", EXACT)
def test_an_added_token_that_the_model_has_not_is_itself(name: str) -> None:
    fast = with_added(name, *(AddedToken(token, normalized=False) for token in ("<tag▁x>", "  ")))
    text = "see <tag▁x>The  picture"
    found = dict(pieces(fast, text))
    assert found["<tag▁x>"] == "<tag▁x>" and found["  "] == "  "
    table = token_table(fast)
    assert table.text[fast.convert_tokens_to_ids("<tag▁x>")] == "<tag▁x>".encode()


def test_a_normalised_added_token_is_found_in_normalised_text() -> None:
    """Llama 2's normaliser puts a "▁" in front of the token, so that it takes the space before."""
    fast = with_added("bpe normalizer", AddedToken("<tag>", normalized=True))
    assert ("<tag>", " <tag>") in pieces(fast, "the <tag>picture")
    assert pieces(fast, "<tag>picture")[0] == ("<tag>", "<tag>")
    backend = bpe("never")
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens([AddedToken("TAG", normalized=True)])
    assert ("TAG", "tag") in pieces(wrap(backend), "the tag is")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("lstrip", "rstrip"), STRIPS)
@pytest.mark.parametrize("space", [" ", "  ", " \n\t", "\u00a0", "\u3000 \u2009"])
def test_an_ordinary_added_token_may_swallow_whitespace(
    name: str, lstrip: bool, rstrip: bool, space: str
) -> None:
    fast = with_added(name, AddedToken("<tag>", lstrip=lstrip, rstrip=rstrip, normalized=False))
    text = f"see{space}<tag>{space}now é<tag>"
    found = pieces(fast, text)
    assert [b for a, b in found if a == "<tag>"] == ["<tag>", "<tag>"]
    ids, data = fast(text, add_special_tokens=False)["input_ids"], text.encode()
    covered = b"".join(data[a:b] for a, b in tile(token_table(fast), ids, text)).decode()
    if rstrip:  # a virtual space may lie on one that was swallowed
        covered = re.sub(r"<tag>\s+", "<tag>", covered)
    assert covered == f"see{'' if lstrip else space}<tag>{'' if rstrip else space}now é<tag>"


@pytest.mark.parametrize("name", EXACT)
def test_whitespace_that_no_token_swallows_is_an_error(name: str) -> None:
    fast = with_added(name, AddedToken("<tag>", normalized=False))
    ids = fast("see<tag>now", add_special_tokens=False)["input_ids"]
    for text in ("see <tag>now", "see<tag> \nnow", "see<tag>now "):
        with pytest.raises(AlignmentError):
            tile(token_table(fast), ids, text)


@pytest.mark.parametrize("name", EXACT)
def test_a_single_word_is_found_between_words_only(name: str) -> None:
    fast = with_added(name, AddedToken("pic", single_word=True, normalized=False))
    found = pieces(fast, "a pic, picture")
    assert "".join(b for _, b in found) == "a pic, picture"
    assert [b for a, b in found if a == "pic"].count("pic") >= 1


def test_another_sign_for_a_space() -> None:
    vocab = {token: i for i, token in enumerate(["<unk>", "_", "a", "▁", "_a", "b"])}
    backend = Tokenizer(models.BPE(vocab, [("_", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [b for _, b in pieces(fast, "b a▁")] == ["b", " a", "▁"]


@pytest.mark.parametrize(("model", "decoder", "expected"), [
    (models.WordPiece({"<unk>": 0, "pic": 1, "##ture": 2, "a": 3}, unk_token="<unk>"),
     decoders.WordPiece(), ["a", "pic", "ture"]),
    (models.BPE({"<unk>": 0, "a</w>": 1, "p": 2, "q</w>": 3, "pq</w>": 4, "a": 5, "q": 6},
                [("p", "q</w>")], unk_token="<unk>", end_of_word_suffix="</w>"),
     decoders.BPEDecoder(), ["a", "pq"]),
])
def test_marks_of_words(model: Any, decoder: Any, expected: list[str]) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [b for _, b in pieces(fast, "".join(expected[:1]) + " " + "".join(expected[1:]))] \
        == expected


def message(fast: PreTrainedTokenizerBase, text: str, shown: str | None = None) -> str:
    with pytest.raises(AlignmentError) as error:
        tile(token_table(fast), fast(text, add_special_tokens=False)["input_ids"], shown or text)
    return str(error.value)


def test_a_mismatch_names_what_is_at_fault() -> None:
    changed = message(make_tokenizer("qwen2"), "un cafe\u0301")
    assert "'e\u0301' becomes 'é'" in changed and "normalise the data" in changed
    unknown = message(tokenizer("unigram"), "picture 🐈")
    assert "no token for a character" in unknown and "normal form" not in unknown
    sign = message(tokenizer("bpe never"), "the▁picture")
    assert "a space as '▁'" in sign
    table = message(make_tokenizer("qwen2"), "The red", "The blue")
    assert "not at fault" in table and "tokenizer.json" in table and "normal form" not in table


# ----- old and fast ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EXACT, "unigram"])
def test_a_long_text_is_tiled_as_its_tokens_one_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing many tokens at once changes nothing, wherever special tokens interrupt."""
    fast = with_added(name, AddedToken("<img>", special=True, lstrip=True, normalized=False))
    table = token_table(fast)
    for seed in range(6):
        text = "".join(random_text(seed * 9 + i) + "  <img>" * (i % 2) for i in range(9))
        ids = fast(text, add_special_tokens=False)["input_ids"]
        results = []
        for block in (1, 7, 128):
            monkeypatch.setattr(tokens, "_BLOCK", block)
            monkeypatch.setattr(tokens, "_written_out",
                                (lambda *_: None) if block == 1 else WRITTEN_OUT)
            try:
                results.append(tile(table, ids, text))
            except AlignmentError as error:
                results.append(str(error))
        assert results[0] == results[1] == results[2]


# ----- the same tokenizer after it was saved ------------------------------------------------


def lower(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("change", "told"), [
    (lambda tokenizer: None, ""),
    (lambda tokenizer: tokenizer.add_tokens(["<new>"]), "ids of its vocabulary"),
    (lambda tokenizer: setattr(tokenizer, "eos_token", "a"), "its eos_token"),
    (lower, "how it splits 'The quick brown fox, 1,234.5 times.': ["),
])
def test_what_changed_is_told(family: str, change: Callable[[Any], None], told: str) -> None:
    before = make_tokenizer(family)
    after = copy.deepcopy(before)
    change(after)
    found = tokenizer_change(before, after)
    assert found.startswith(told) if told else not found


def test_a_token_may_be_new() -> None:
    before, after = (make_tokenizer("qwen2") for _ in range(2))
    after.add_tokens(["<new>", "<other>"])
    assert tokenizer_change(before, after, ["<new>", "<other>"]) == ""
    assert tokenizer_change(before, after, ["<new>"]) == "ids of its vocabulary"
    assert tokenizer_change(before, before, ["<new>"]) == "ids of its vocabulary"
