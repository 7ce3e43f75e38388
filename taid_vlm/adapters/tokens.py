"""The bytes behind every token, and how a token sequence tiles its text.

Two models can only be compared token by token if we know which bytes each token stands for.
Offset mappings differ between tokenizers (and are missing after image expansion), so the tokens'
own bytes are laid over the text; if they do not tile it exactly, that is an error, never a guess.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from taid_vlm.errors import AlignmentError, TaidError

logger = logging.getLogger(__name__)

TOKENIZER_PROBES = (  # texts that tell tokenizers apart
    "The quick brown fox, 1,234.5 times.", " naïve 数量\n\n  a_b", "What's this?\tI'll see...",
    "def f(x):\n    return x  # 100 %\n", "    leading and trailing   ",
    "Straße ñandú Ελλάδα Привет", "こんにちは世界。한국어 مرحبا", "🙂👩\u200d🚀 e\u0301 \ufb01",
    "https://a.b/c?d=e&f=1", "1234567890 12 345",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = re.compile(  # Unicode's white space in UTF-8: what \s is to the tokenizers library
    rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f"
    rb"|\xe3\x80\x80)*")
_NOWHERE = b"\xff"  # in no UTF-8
_BLOCK = 128  # tokens compared with the text at once


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True)
class TokenTable:
    """What each token id of one tokenizer stands for.

    text: id -> bytes, None for special tokens and ids without a token.
    special: id -> the bytes of its name, for special tokens.
    strings: id -> the token as the vocabulary spells it (None without a token).
    added: ids of tokens that were added to the vocabulary, special or not.
    drops_space: whether the tokenizer splits at whitespace and forgets it (word-level models).
    also: id -> other bytes that give this token: an added token of the model's own vocabulary is
        matched in the text as it is written, and merged from what the model writes that way.
    lstrip, rstrip: ids of added tokens that swallow the whitespace on their left or right.
    unknown: the id for what has no token.
    space: how the vocabulary writes a space ("" where it is byte-level).
    normalizer: of the tokenizers library, or None.
    """

    text: list[bytes | None]
    special: dict[int, bytes]
    strings: list[str | None]
    added: frozenset[int] = frozenset()
    drops_space: bool = False
    also: dict[int, bytes] = field(default_factory=dict)
    lstrip: frozenset[int] = frozenset()
    rstrip: frozenset[int] = frozenset()
    unknown: int | None = None
    space: str = ""
    normalizer: Any = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def literal(self) -> list[bytes]:
        """id -> the bytes it has where it is written out in the text, special tokens included."""
        return [self.special.get(index, _NOWHERE) if text is None else text
                for index, text in enumerate(self.text)]


@dataclass(frozen=True)
class _Writing:
    """How a vocabulary writes text, by the tokenizer's own pipeline.

    before, after: marks of a word's continuation and end (WordPiece's "##", "</w>").
    undone: whether added tokens, where they are normalised, are written that way, too.
    """

    byte_level: bool
    space: str
    before: str
    after: str
    undone: bool

    def bytes_of(self, token: str) -> bytes:
        """What one of the model's own tokens spells, as the library's decoders have it."""
        if self.byte_level:
            known = all(character in _ALPHABET for character in token)
            return bytes(map(_ALPHABET.__getitem__, token)) if known else token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        token = token.removeprefix(self.before).removesuffix(self.after)
        return token.replace(self.space, " ").encode()

    def matched(self, token: AddedToken, normalizer: Any) -> bytes:
        """The text in which the library finds an added token, swallowed whitespace aside.

        As it is written; or, where it is normalised, what the normaliser makes such a token of.
        """
        if not token.normalized or normalizer is None:
            return token.content.encode()
        normal = normalizer.normalize_str(token.content)
        if self.undone and not self.byte_level:
            return normal.replace(self.space, " ").encode()
        return self.bytes_of(normal) if self.undone else normal.encode()


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder as its settings, sequences flattened."""
    def flat(settings: dict[str, Any]) -> Iterable[dict[str, Any]]:
        inner = next((value for key, value in settings.items()
                      if key in ("normalizers", "pretokenizers", "decoders")), None)
        return [settings] if inner is None else chain.from_iterable(map(flat, inner))

    return [] if component is None else list(flat(json.loads(component.__getstate__())))


def _writing(backend: Any) -> _Writing:
    normal, split, decode = map(
        _parts, (backend.normalizer, backend.pre_tokenizer, backend.decoder))
    byte_level = any(part["type"] == "ByteLevel" for part in (*normal, *split, *decode))
    replaced = [part["content"] for part in normal
                if part["type"] == "Replace" and part["pattern"] == {"String": " "}]
    signs = [part["replacement"] for part in (*split, *decode) if part["type"] == "Metaspace"]
    marks = {part["type"]: part for part in decode}
    return _Writing(
        byte_level, (replaced + signs or ["▁"])[0],
        getattr(backend.model, "continuing_subword_prefix", None)
        or marks.get("WordPiece", {}).get("prefix", ""),
        getattr(backend.model, "end_of_word_suffix", None)
        or marks.get("BPEDecoder", {}).get("suffix", ""),
        bool(replaced) or any(part["type"] == "ByteLevel" for part in normal))


def _forgets_space(backend: Any) -> bool:
    """Whether the pre-tokenizer takes whitespace away where it splits."""
    return any(part["type"] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer",
                                "CharDelimiterSplit")
               or (part.get("behavior") == "Removed" and not part.get("invert"))
               for part in _parts(backend.pre_tokenizer))


def token_table(tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """Read the table off a tokenizer (byte-level BPE, metaspace with byte fallback, words).

    Source: the tokenizers library, `AddedVocabulary` and its decoders.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise AlignmentError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, so the bytes of "
            "its tokens are not known; load the fast tokenizer of this model."
        )
    writing, added = _writing(backend), tokenizer.added_tokens_decoder
    special_ids = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    strings: list[str | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        strings[index] = token
    text = [None if token is None or index in special_ids else writing.bytes_of(token)
            for index, token in enumerate(strings)]
    named = ((index, strings[index]) for index in special_ids if index < size)
    special = {index: name.encode() for index, name in named if name is not None}
    also: dict[int, bytes] = {}
    for index, token in added.items():
        spelled = special.get(index, text[index])
        matched = writing.matched(token, backend.normalizer)
        if matched == spelled or spelled is None or (index in special
                                                     and matched.strip() == spelled):
            continue
        if index not in special and not _is_merged(backend, index, token.content):
            text[index] = matched
        else:
            also[index] = matched
    return TokenTable(
        text, special, strings, frozenset(added),
        not writing.byte_level and _forgets_space(backend), also,
        frozenset(index for index, token in added.items() if token.lstrip),
        frozenset(index for index, token in added.items() if token.rstrip),
        tokenizer.unk_token_id, "" if writing.byte_level else writing.space, backend.normalizer)


def _is_merged(backend: Any, index: int, token: str) -> bool:
    """Whether an added token is one that the model makes by itself, too."""
    return [piece.id for piece in backend.model.tokenize(token)] == [index]


def tokenizer_change(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, added: Iterable[str] = ()
) -> str:
    """What a tokenizer does no longer do as before, in words; "" if it is the same.

    transformers rebuilds some tokenizers by the type of the model that they lie beside, whatever
    their file says.

    Args:
        added: tokens that may be new.
    """
    ids_before, ids_after = before.get_vocab(), after.get_vocab()
    if {**ids_before, **{token: ids_after.get(token) for token in added}} != ids_after:
        return "ids of its vocabulary"
    for key, token in before.special_tokens_map.items():
        if after.special_tokens_map.get(key) != token:
            return f"its {key}"
    for text in TOKENIZER_PROBES:
        first, second = (one(text)["input_ids"] for one in (before, after))
        if first != second:
            return f"how it splits {text!r}: {second} instead of {first}"
    return ""


def check_reloaded(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, subject: str, mend: str = "",
    added: Iterable[str] = (), fatal: bool = True,
) -> None:
    """A tokenizer must be as it was.

    Args:
        subject: what "changes" it, in the message; mend: what to do about it.
        added: tokens that may be new.
        fatal: raise TaidError; else only warn.
    """
    if change := tokenizer_change(before, after, added):
        message = f"{subject} changes {change}. {mend}".strip()
        if fatal:
            raise TaidError(message)
        logger.warning(message)


def tile(table: TokenTable, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Byte span (start, end) of every token in `text`.

    Tokens the tokenizer added by itself (BOS, the virtual space at the start of a word) get an
    empty span; whitespace beside a token that may swallow it is skipped.

    Raises:
        AlignmentError: the tokens' bytes are not the text's, for example because the tokenizer
            normalises the text (NFC, lower case) or met an unknown character.
    """
    data, cursor, may_skip = text.encode(), 0, table.drops_space
    spans: list[tuple[int, int]] = []
    for first in range(0, len(ids), _BLOCK):
        block = ids[first : first + _BLOCK]
        if written := _written_out(table, block, data, cursor):
            spans += written
            cursor, may_skip = spans[-1][1], _may_skip(table, block, may_skip)
            continue
        for number, index in enumerate(block, first):
            span = _place(table, index, data, cursor, may_skip)
            if span is None:
                raise _mismatch(table, ids[: number + 1], data, cursor)
            spans.append(span)
            cursor, may_skip = span[1], _may_skip(table, [index], may_skip)
    end = _skip_space(data, cursor) if may_skip else cursor
    if end < len(data):
        raise _mismatch(table, ids, data, cursor, at_end=True)
    return spans


def _written_out(
    table: TokenTable, ids: list[int], data: bytes, cursor: int
) -> list[tuple[int, int]] | None:
    """The spans of tokens that stand in the text as they are, in one comparison."""
    if max(ids) >= len(table):
        return None
    literal = table.literal
    pieces = [literal[index] for index in ids]
    if not data.startswith(b"".join(pieces), cursor):
        return None
    return list(pairwise(accumulate(map(len, pieces), initial=cursor)))


def _may_skip(table: TokenTable, ids: Sequence[int], before: bool) -> bool:
    """Whether whitespace may be missing after these tokens.

    A lone (virtual) space may stand between a token and what it swallowed.
    """
    for index in reversed(ids):
        text = table.text[index] if index < len(table) else None
        if table.drops_space or text is None or index in table.rstrip:
            return True
        if text.strip():
            return False
    return before


def _place(
    table: TokenTable, index: int, data: bytes, cursor: int, may_skip: bool
) -> tuple[int, int] | None:
    """Where a token stands: at the cursor, or behind whitespace that may be skipped."""
    token = table.text[index] if index < len(table) else None
    spellings = [table.special.get(index, _NOWHERE) if token is None else token]
    if index in table.also:
        spellings.append(table.also[index])
    starts = [cursor]
    if token is None or may_skip or index in table.lstrip:
        starts.append(_skip_space(data, cursor))
    for start in starts:
        for spelled in spellings:
            if data.startswith(spelled, start):
                return start, start + len(spelled)
            if spelled[:1] == b" " and data.startswith(spelled[1:], start):  # a virtual space
                return start, start + len(spelled) - 1
    return (cursor, cursor) if token is None else None


def _skip_space(data: bytes, cursor: int) -> int:
    match = _SPACES.match(data, cursor)
    assert match is not None
    return match.end()


def _mismatch(
    table: TokenTable, ids: list[int], data: bytes, cursor: int, at_end: bool = False
) -> AlignmentError:
    near = data[max(0, cursor - 10) : cursor + 20].decode(errors="replace")
    index = ids[-1] if ids else -1
    token = "the end of the tokens" if at_end else f"token {table.strings[index]!r}"
    return AlignmentError(f"the tokens do not spell the text: {token} against {near!r} (byte "
                          f"{cursor}). {_cause(table, ids, data, cursor)}")


def _cause(table: TokenTable, ids: list[int], data: bytes, cursor: int) -> str:
    """Whether the data or the tokenizer's table is at fault."""
    text = data.decode()
    normal = text if table.normalizer is None else table.normalizer.normalize_str(text)
    plain = normal.replace(table.space, " ") if table.space else normal
    if table.space and table.space in text:
        return (f"The tokenizer writes a space as {table.space!r}, so it cannot tell it from the "
                "text's own; normalise the data to another character.")
    if plain not in (text, " " + text):
        at = next((i for i, (a, b) in enumerate(zip(text, plain, strict=False)) if a != b),
                  min(len(text), len(plain)))
        return (f"The tokenizer changes text before it splits it ({text[at : at + 8]!r} becomes "
                f"{plain[at : at + 8]!r}: Unicode normal form, case, white space); normalise the "
                "data the same way.")
    if table.unknown is not None and table.unknown in ids:
        return ("The tokenizer has no token for a character here; take it out of the data, or "
                "choose a model that can spell it.")
    return ("The tokenizer does not normalise this text, so the data is not at fault: its "
            "vocabulary, added tokens or decoder do not say what its tokens stand for; load the "
            "model's own tokenizer.json.")
