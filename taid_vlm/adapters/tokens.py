"""The bytes behind every token, and how a token sequence tiles its text.

Two models can only be compared token by token if we know which bytes each token stands for.
Offset mappings differ between tokenizers (and are missing after image expansion), so the tokens'
own bytes are laid over the text; if they do not tile it exactly, that is an error, never a guess.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from taid_vlm.errors import AlignmentError, TaidError

logger = logging.getLogger(__name__)

TOKENIZER_PROBES = (  # texts that tell tokenizers apart
    "The quick brown fox, 1,234.5 times.", " naïve 数量\n\n  a_b", "What's this?\tI'll see...",
    "def f(x):\n    return x  # 100 %\n", "    leading and trailing   ",
    "Straße ñandú Ελλάδα Привет", "こんにちは世界。한국어 مرحبا", "🙂👩\u200d🚀 e\u0301 \ufb01",
    "https://a.b/c?d=e&f=1", "1234567890 12 345",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
    """

    text: list[bytes | None]
    special: dict[int, bytes]
    strings: list[str | None]
    added: frozenset[int] = frozenset()
    drops_space: bool = False

    def __len__(self) -> int:
        return len(self.text)


def token_table(tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """Read the table off a tokenizer (byte-level BPE, metaspace with byte fallback, words)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise AlignmentError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, so the bytes of "
            "its tokens are not known; load the fast tokenizer of this model."
        )
    byte_level = "ByteLevel" in str(backend.decoder) or "ByteLevel" in str(backend.pre_tokenizer)
    added = tokenizer.added_tokens_decoder
    special_ids = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    strings: list[str | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        strings[index] = token
    text: list[bytes | None] = [None] * size
    for index, token in enumerate(strings):
        if token is None or index in special_ids:
            continue
        text[index] = token.encode() if index in added else _token_bytes(token, byte_level)
    named = ((index, strings[index]) for index in special_ids if index < size)
    special = {index: name.encode() for index, name in named if name is not None}
    splitter = str(backend.pre_tokenizer)
    drops_space = not byte_level and ("Whitespace" in splitter or "BertPreTokenizer" in splitter)
    return TokenTable(text, special, strings, frozenset(added), drops_space)


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


def _token_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:
        return b"".join(
            bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token
        )
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match.group(1), 16)])
    return token.replace("▁", " ").encode()


def tile(table: TokenTable, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Byte span (start, end) of every token in `text`.

    Tokens the tokenizer added by itself (BOS, the virtual space at the start of a word) get an
    empty span; whitespace beside a special token, which may swallow it, is skipped.

    Raises:
        AlignmentError: the tokens' bytes are not the text's, for example because the tokenizer
            normalises the text (NFC, lower case) or met an unknown character.
    """
    data, cursor, spans, after_special = text.encode(), 0, [], table.drops_space
    for index in ids:
        start, end = _place(table, index, data, cursor, after_special)
        spans.append((start, end))
        cursor = end
        text_of = table.text[index] if index < len(table) else None
        # a lone (virtual) space may stand between a special token and what it swallowed
        after_special = table.drops_space or text_of is None or (
            after_special and not text_of.strip())
    rest = data[cursor:]
    if rest.strip() or (rest and not after_special):
        raise _mismatch(data, cursor, "the end of the tokens")
    return spans


def _place(
    table: TokenTable, index: int, data: bytes, cursor: int, after_special: bool
) -> tuple[int, int]:
    token = table.text[index] if index < len(table) else None
    if token is None:
        name = table.special.get(index, b"\0")
        start = _skip_space(data, cursor)
        return (start, start + len(name)) if data.startswith(name, start) else (cursor, cursor)
    if data.startswith(token, cursor):
        return cursor, cursor + len(token)
    if token[:1] == b" " and data.startswith(token[1:], cursor):
        return cursor, cursor + len(token) - 1
    start = _skip_space(data, cursor) if after_special else cursor
    for spelled in (token, token[1:] if token[:1] == b" " else token):
        if start > cursor and data.startswith(spelled, start):
            return start, start + len(spelled)
    raise _mismatch(data, cursor, f"token {table.strings[index]!r}")


def _skip_space(data: bytes, cursor: int) -> int:
    while cursor < len(data) and data[cursor : cursor + 1].isspace():
        cursor += 1
    return cursor


def _mismatch(data: bytes, cursor: int, token: str) -> AlignmentError:
    near = data[max(0, cursor - 10) : cursor + 20].decode(errors="replace")
    return AlignmentError(
        f"the tokens do not spell the text: {token} against {near!r} (byte {cursor}). The "
        "tokenizer changes text before it splits it (Unicode normal form, case, unknown "
        "characters); normalise the data the same way."
    )
