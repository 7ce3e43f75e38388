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

from collections import defaultdict
from collections.abc import Iterable, Sequence

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
ANCHOR = "\n"  # a text before the token, so that no virtual space is put in front of it


def build_cell_map(
    teacher: ModelAdapter, student: ModelAdapter, teacher_rows: int, student_rows: int,
    roles: Sequence[tuple[int, int]] = (), glue: tuple[bytes, bytes] = (b"", b""),
) -> VocabularyMap:
    """The vocabulary map of two different tokenizers.

    Args:
        teacher, student: the adapters.
        teacher_rows, student_rows: rows of the heads.
        roles: (teacher id, student id) that play the same part, such as the end of a turn.
        glue: bytes that a token carries in front at this position, on the two sides.

    Raises:
        AlignmentError: a head with too few rows, or nothing in common.
    """
    check_rows(teacher.table, student.table, teacher_rows, student_rows)
    cells = find_cells(teacher, student, roles, glue)
    if not cells:
        raise AlignmentError("no token of the teacher begins the same text as one of the student.")
    single = [(t[0], s[0]) for t, s in cells if len(t) == len(s) == 1]
    several = [cell for cell in cells if len(cell[0]) + len(cell[1]) > 2]
    t_side, s_side = (
        side_map([pair[side] for pair in single], model.table, rows,
                 [(token, index) for index, cell in enumerate(several) for token in cell[side]])
        for side, (model, rows) in enumerate(((teacher, teacher_rows), (student, student_rows)))
    )
    return VocabularyMap(t_side, s_side, False, len(s_side.rest) > 0, len(several))


def find_cells(
    teacher: ModelAdapter, student: ModelAdapter, roles: Sequence[tuple[int, int]] = (),
    glue: tuple[bytes, bytes] = (b"", b""),
) -> list[Cell]:
    """All cells; each holds at least one token of either model.

    Special tokens are paired by role or name only. Of several tokens that spell the same bytes
    (a byte token beside a character) one stands for them; the others are paired by kind.
    """
    keys_t, keys_s = token_keys(teacher.table, glue[0]), token_keys(student.table, glue[1])
    spelled_t, spelled_s = _spelling(keys_t), _spelling(keys_s)
    spoken_t, spoken_s = set(spelled_t.values()), set(spelled_s.values())
    links = [(t, s) for t, s in pair_tokens(keys_t, keys_s, roles)
             if t not in spoken_t and s not in spoken_s]
    begun_s = _first_tokens(spelled_t, student, spelled_s, glue[1])
    begun_t = _first_tokens(spelled_s, teacher, spelled_t, glue[0])
    # a token that both have and neither says here (its merges are never reached) stays by itself
    unsaid = {data for data in begun_s.keys() & begun_t.keys()
              if begun_s[data] != spelled_s[data] and begun_t[data] != spelled_t[data]}
    links += [(spelled_t[data], spelled_s[data] if data in unsaid else first)
              for data, first in begun_s.items()]
    links += [(spelled_t[data] if data in unsaid else first, spelled_s[data])
              for data, first in begun_t.items()]
    return _connected(links)


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
    splits = target.tokenizer([ANCHOR + text for text in texts.values()],
                              add_special_tokens=False)["input_ids"] if texts else []
    alone = target.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    begun = {}
    for (data, text), ids in zip(texts.items(), splits, strict=True):
        whole = ids[:-1] == alone and ids[-1:] == [spelled.get(data)]  # saves laying out most texts
        begun[data] = ids[-1] if whole else _token_after_anchor(target.table, ids, ANCHOR + text)
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


def _connected(links: Iterable[tuple[int, int]]) -> list[Cell]:
    """Connected components of the graph between teacher's and student's tokens (union-find)."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for t, s in links:
        parent[root((0, t))] = root((1, s))
    cells: dict[tuple[int, int], Cell] = defaultdict(lambda: ([], []))
    for side, index in parent:
        cells[root((side, index))][side].append(index)
    return list(cells.values())
