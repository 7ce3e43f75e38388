"""Cells: tokens of two different vocabularies that begin the same pieces of text.

Where two tokenizers differ, a token's probability is not the same event for both. A model whose
vocabulary holds " s" but not " saw" says " s" before every word in s; compared entry by entry with
a model that says " saw", it seems to forbid that word. So each token is put together with the token
that the other tokenizer would begin the same bytes with, and the connected groups (cells) are
compared: " s" on one side against " s", " saw", " said", ... on the other. A cell's total
probability is (up to how tokenizers split at its end) that of the same next bytes. With equal
tokenizers every cell is one token on each side, and nothing is coarsened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from taid_vlm.adapters import ModelAdapter, TokenTable
from taid_vlm.adapters.tokens import tile
from taid_vlm.alignment.vocabulary import (
    VocabularyMap,
    check_rows,
    pair_tokens,
    side_map,
    token_keys,
)
from taid_vlm.errors import AlignmentError

Cell = tuple[list[int], list[int]]  # the teacher's ids, the student's ids
Roles: TypeAlias = Sequence[tuple[int, int]]
Glue: TypeAlias = tuple[bytes, bytes]
Numbers: TypeAlias = NDArray[np.int64]
BATCH = 4096  # texts that are split at a time; what the tokenizers library says of one takes 1 KB
NOT_UTF8 = b"\xff"
ANCHOR = "\n"  # a text before the token, so that no virtual space is put in front of it


def build_cell_map(
    teacher: ModelAdapter, student: ModelAdapter, teacher_rows: int, student_rows: int,
    roles: Roles = (), glue: Glue = (b"", b""), find: Callable[[Roles, Glue], Cells] | None = None,
) -> VocabularyMap:
    """The vocabulary map of two different tokenizers.

    Args:
        teacher, student: the adapters.
        teacher_rows, student_rows: rows of the heads.
        roles: (teacher id, student id) that play the same part, such as the end of a turn.
        glue: bytes that a token carries in front at this position, on the two sides.
        find: gives this pair's `find_cells` by roles and glue, such as from a store.

    Raises:
        AlignmentError: a head with too few rows, or nothing in common.
    """
    check_rows(teacher.table, student.table, teacher_rows, student_rows)
    cells = find(roles, glue) if find else find_cells(teacher, student, roles, glue)
    if not cells:
        raise AlignmentError("no token of the teacher begins the same text as one of the student.")
    single = (cells.sizes == 1).all(0)
    several = np.cumsum(~single) - 1
    t_side, s_side = (
        side_map(token[single[cell]], model.table, rows, token[~single[cell]],
                 several[cell[~single[cell]]])
        for token, cell, model, rows in zip(cells.token, cells.cell, (teacher, student),
                                            (teacher_rows, student_rows), strict=True))
    return VocabularyMap(t_side, s_side, False, len(s_side.rest) > 0, int((~single).sum()))


@dataclass(frozen=True)
class Cells:
    """Groups of tokens on both sides, (the teacher's, the student's).

    token: [M] ids, those of a cell together. cell: [M] their cells 0, 1, ..., ascending.
    """

    token: tuple[Numbers, Numbers]
    cell: tuple[Numbers, Numbers]

    def __len__(self) -> int:
        return int(self.cell[0][-1]) + 1 if len(self.cell[0]) else 0

    @property
    def sizes(self) -> Numbers:
        """How many tokens of each side are in each cell, [2, cells]."""
        return np.stack([np.bincount(cell, minlength=len(self)) for cell in self.cell])

    def __iter__(self) -> Iterator[Cell]:
        ends = self.sizes.cumsum(1)
        parts = (np.split(token, end)[:-1] for token, end in zip(self.token, ends, strict=True))
        return ((t.tolist(), s.tolist()) for t, s in zip(*parts, strict=True))


def find_cells(
    teacher: ModelAdapter, student: ModelAdapter, roles: Roles = (), glue: Glue = (b"", b"")
) -> Cells:
    """All cells; each holds at least one token of either model.

    Special tokens are paired by role or name only. Of several tokens that spell the same bytes
    (a byte token beside a character) one stands for them; the others are paired by kind.
    """
    keys_t, keys_s = token_keys(teacher.table, glue[0]), token_keys(student.table, glue[1])
    spelled_t, spelled_s = _spelling(keys_t), _spelling(keys_s)
    spoken_t, spoken_s = set(spelled_t.values()), set(spelled_s.values())
    named = [(t, s) for t, s in pair_tokens(keys_t, keys_s, roles)
             if t not in spoken_t and s not in spoken_s]
    begun_s = _first_tokens(spelled_t, student, spelled_s, glue[1])
    begun_t = _first_tokens(spelled_s, teacher, spelled_t, glue[0])
    # a token that both have and neither says here (its merges are never reached) stays by itself
    for data in begun_s.keys() & begun_t.keys():
        if begun_s[data] != spelled_s[data] and begun_t[data] != spelled_t[data]:
            begun_s[data], begun_t[data] = spelled_s[data], spelled_t[data]
    links_t = [*(t for t, _ in named), *map(spelled_t.__getitem__, begun_s), *begun_t.values()]
    links_s = [*(s for _, s in named), *begun_s.values(), *map(spelled_s.__getitem__, begun_t)]
    return _connected(np.array(links_t, np.int64), np.array(links_s, np.int64))


def _spelling(keys: dict[tuple[str, bytes], int]) -> dict[bytes, int]:
    """Bytes (without glue) -> the token that a tokenizer spells them with."""
    spelled: dict[bytes, int] = {}
    for kind in ("text", "added", "byte"):
        for (of, data), index in keys.items():
            if of == kind and data:
                spelled.setdefault(data, index)
    return spelled


def _first_tokens(
    source: dict[bytes, int], target: ModelAdapter, spelled: dict[bytes, int], glue: bytes
) -> dict[bytes, int]:
    """Bytes of the source's tokens -> the target's token that begins the same bytes."""
    longest = max(map(len, spelled), default=0)
    texts = {data: text for data in source if (text := _as_text(glue + data)) is not None}
    wholes = (spelled.get(data) for data in texts)
    begun = dict(zip(texts, _after_anchor(target, list(texts.values()), wholes), strict=True))
    known = set(spelled.values())
    first_tokens = {}
    for data in source:
        first = begun.get(data)
        if first not in known:  # no text of its own, or split in the middle of the glue
            prefixes = (data[:n] for n in range(min(longest, len(data)), 0, -1))
            first = next((spelled[prefix] for prefix in prefixes if prefix in spelled), None)
        if first is not None:
            first_tokens[data] = first
    return first_tokens


def _after_anchor(
    model: ModelAdapter, texts: list[str], wholes: Iterable[int | None]
) -> Iterator[int | None]:
    """The first token of each text where it stands behind the anchor; `wholes` spell all of it."""
    alone = model.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    # that call has left the backend without padding and truncation
    split, spelled, anchor = model.tokenizer.backend_tokenizer, model.table.text, ANCHOR.encode()
    one = [spelled[index] for index in alone] == [anchor]
    batches = ([ANCHOR + text for text in texts[start : start + BATCH]]
               for start in range(0, len(texts), BATCH))
    laid = ((text, encoding.ids) for batch in batches for text, encoding in zip(
        batch, split.encode_batch_fast(batch, add_special_tokens=False), strict=True))
    for (text, ids), whole in zip(laid, wholes, strict=True):
        if ids[:-1] == alone and ids[-1:] == [whole]:
            yield whole
        elif one and ids[:1] == alone and text.encode() == b"".join(
                spelled[index] or NOT_UTF8 for index in ids):
            yield ids[1]
        else:
            yield _token_after_anchor(model.table, ids, text)


def _as_text(data: bytes) -> str | None:
    """The bytes as a text that can stand behind the anchor; None for parts of a character."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return None if text[:1] in ("", "\n", "\r") else text


def _token_after_anchor(table: TokenTable, ids: list[int], text: str) -> int | None:
    try:
        spans = tile(table, ids, text)
    except AlignmentError:  # the tokenizer changes this text, so it never says these bytes
        return None
    start = len(ANCHOR)
    return next((index for index, (a, b) in zip(ids, spans, strict=True)
                 if a == start and b > a and table.text[index] is not None), None)


def _connected(teacher: Numbers, student: Numbers) -> Cells:
    """Connected components of the graph with an edge from teacher[i] to student[i].

    Cells, and the tokens in each, are in the order in which the edges name them.
    """
    offset = int(teacher.max(initial=-1)) + 1
    edges = np.stack([student + offset, teacher])
    named = _distinct(edges.T.ravel())
    label = np.arange(int(named.max(initial=-1)) + 1)  # the least node known to be connected
    while edges.size:
        low = label[edges].min(0)
        for end in edges:
            np.minimum.at(label, label[end], low)
        while (label[label] != label).any():
            label = label[label]
        edges = edges[:, label[edges[0]] != label[edges[1]]]
    roots = _distinct(label[named])
    number = np.empty_like(label)
    number[roots] = np.arange(len(roots))
    named = named[np.argsort(number[label[named]], kind="stable")]
    sides = named[named < offset], named[named >= offset]
    cell_t, cell_s = (number[label[side]] for side in sides)
    return Cells((sides[0], sides[1] - offset), (cell_t, cell_s))


def _distinct(values: Numbers) -> Numbers:
    """Each value once, in order of first appearance."""
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]
