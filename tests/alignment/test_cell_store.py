"""Cells are found as they are defined, and once: later commands read them from the cache folder."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters.samples import adapter, head_rows
from alignment.test_cells import GLUES, PAIRS, letters, random_merges
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.adapters.tokens import tile
from taid_vlm.alignment import cell_store, pair_models
from taid_vlm.alignment.cell_store import CellStore, cache_folder, fingerprint
from taid_vlm.alignment.cells import ANCHOR, Cell, _connected, _spelling, find_cells
from taid_vlm.alignment.vocabulary import pair_tokens, token_keys
from taid_vlm.errors import AlignmentError
from taid_vlm.io import files
from taid_vlm.io.hashing import sha256

# ----- as they are defined: one text at a time, one link at a time --------------------------------


def first_token(data: bytes, model: ModelAdapter, known: dict[bytes, int], glue: bytes) -> int:
    """The token that a model begins these bytes with; -1 for none."""
    longest = next((known[data[:n]] for n in range(len(data), 0, -1) if data[:n] in known), -1)
    try:
        text = (glue + data).decode()
    except UnicodeDecodeError:
        return longest
    if text[:1] in ("", "\n", "\r"):
        return longest
    ids = model.tokenizer(ANCHOR + text, add_special_tokens=False)["input_ids"]
    alone = model.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    first = ids[-1] if ids == [*alone, known.get(data)] else None
    if first is None:
        try:
            spans = tile(model.table, ids, ANCHOR + text)
        except AlignmentError:
            return longest
        first = next((i for i, (a, b) in zip(ids, spans, strict=True)
                      if a == 1 and b > a and model.table.text[i] is not None), None)
    return first if first in known.values() else longest


def defined(
    teacher: ModelAdapter, student: ModelAdapter, roles: list[tuple[int, int]],
    glue: tuple[bytes, bytes],
) -> list[Cell]:
    keys = [token_keys(m.table, g) for m, g in zip((teacher, student), glue, strict=True)]
    t_known, s_known = map(_spelling, keys)
    links = [(t, s) for t, s in pair_tokens(*keys, roles)
             if t not in t_known.values() and s not in s_known.values()]
    s_first = {data: first_token(data, student, s_known, glue[1]) for data in t_known}
    t_first = {data: first_token(data, teacher, t_known, glue[0]) for data in s_known}
    for data in t_known.keys() & s_known.keys():
        if s_first[data] != s_known[data] and t_first[data] != t_known[data]:
            s_first[data], t_first[data] = s_known[data], t_known[data]
    links += [(t_known[data], first) for data, first in s_first.items() if first >= 0]
    links += [(first, s_known[data]) for data, first in t_first.items() if first >= 0]
    return flooded(links)


def flooded(links: list[tuple[int, int]]) -> list[Cell]:
    """Connected groups, each with its ids in the order of the links."""
    near: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for t, s in links:
        near[1, s].append((0, t))
        near[0, t].append((1, s))
    group: dict[tuple[int, int], int] = {}
    for start in near:
        waiting = [start] if start not in group else []
        number = len(set(group.values()))
        while waiting:
            node = waiting.pop()
            if node not in group:
                group[node] = number
                waiting += near[node]
    cells: list[Cell] = [([], []) for _ in set(group.values())]
    for side, index in near:
        cells[group[side, index]][side].append(index)
    return cells


@pytest.mark.parametrize("glue", GLUES)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_zoo_as_defined(teacher: str, student: str, glue: tuple[bytes, bytes]) -> None:
    t, s = adapter("llama", "teacher", teacher), adapter("llama", "student", student)
    roles = [(t.end_of_turn_id, s.end_of_turn_id)]
    assert list(find_cells(t, s, roles, glue)) == defined(t, s, roles, glue)


def byte_level(seed: int, merges: int = 200) -> ModelAdapter:
    """A byte-level BPE of random merges of a few bytes, parts of characters among them."""
    rng = random.Random(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, rules = [c for c in alphabet if c in "abĠ"] + ["æ", "ķ", "°", "Ģ"], []
    while len(rules) < merges:
        pair = rng.choice(known), rng.choice(known)
        if len("".join(pair)) < 7:
            rules.append(pair)
            known.append("".join(pair))
    names = dict.fromkeys(["<s>", *alphabet, *known])
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, rules))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return make_adapter(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>"), "x")


@pytest.mark.parametrize("glue", GLUES)
@pytest.mark.parametrize("seed", range(5))
def test_random_vocabularies_as_defined(
    seed: int, glue: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taid_vlm.alignment.cells.BATCH", 7)
    teacher, student = byte_level(seed), byte_level(seed + 100)
    cells = list(find_cells(teacher, student, [(0, 0)], glue))
    assert cells == defined(teacher, student, [(0, 0)], glue)
    assert max(len(t) + len(s) for t, s in cells) > 2


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_random_links(seed: int) -> None:
    rng = random.Random(seed)
    links = [(rng.randrange(90), rng.randrange(70)) for _ in range(rng.choice((0, 5, 60, 90)))]
    t, s = np.array(links, np.int64).reshape(-1, 2).T
    cells = _connected(t, s)
    assert list(cells) == flooded(links)
    assert len(cells) == len(flooded(links))


def test_a_long_chain_is_one_group() -> None:
    chain = np.random.default_rng(0).permutation(5000)
    t, s = np.concatenate([chain, chain[1:]]), np.concatenate([chain, chain[:-1]])
    assert len(_connected(t, s)) == 1


# ----- kept on disk -------------------------------------------------------------------------------

ROLES = [(0, 0)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAID_VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cells"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each search."""
    calls: list[int] = []

    def counted(*args: object) -> object:
        calls.append(1)
        return find_cells(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cell_store, "find_cells", counted)
    return calls


def pair(seed: int = 0) -> CellStore:
    return CellStore(byte_level(seed), byte_level(seed + 100))


def test_a_second_command_searches_no_more(folder: Path, searches: list[int]) -> None:
    first, second = pair().find(ROLES), pair().find(ROLES)
    assert len(searches) == 1
    assert list(first) == list(second) == list(find_cells(byte_level(0), byte_level(100), ROLES))
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_maps_from_the_disk_are_the_same(folder: Path) -> None:
    models_ = adapter("llama", "teacher", "plain"), adapter("gpt2", "student", "metaspace")
    rows = head_rows("llama", "plain"), head_rows("gpt2", "metaspace")
    first, second = (pair_models(*models_, *rows) for _ in range(2))
    assert first.case == "c"
    assert len(list(folder.iterdir())) == len(first.maps)
    for a, b in zip(first.maps, second.maps, strict=True):
        for side in ("teacher", "student"):
            for one, other in zip(vars(getattr(a, side)).values(),
                                  vars(getattr(b, side)).values(), strict=True):
                assert torch.equal(one, other)
        assert (a.cells, a.has_rest) == (b.cells, b.has_rest)


def test_what_cells_follow_from_has_files_of_its_own(folder: Path, searches: list[int]) -> None:
    for store, roles, glue in (
            (pair(), ROLES, (b"", b"")), (pair(), [], (b"", b"")), (pair(), ROLES, (b" ", b"")),
            (pair(), ROLES, (b"", b" ")), (pair(1), ROLES, (b"", b"")),
            (CellStore(byte_level(100), byte_level(0)), ROLES, (b"", b""))):
        store.find(roles, glue)
    assert len(searches) == len(list(folder.iterdir())) == 6


def test_other_merges_of_the_same_tokens_are_another_tokenizer() -> None:
    rules = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    one, other = letters(rules), letters([*rules[:1], *rules[2:], rules[1]])
    same = [sorted(m.table.strings, key=str) for m in (one, other)]
    assert same[0] == same[1]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(letters(rules))


def test_tokens_that_were_added_make_another_tokenizer() -> None:
    model = letters([("a", "b")])
    before = fingerprint(model)
    model.tokenizer.add_tokens(["cab"])
    assert fingerprint(make_adapter(model.tokenizer, "x")) != before


def test_padding_and_truncation_do_not_matter() -> None:
    model = letters([("a", "b")])
    before = fingerprint(model)
    model.tokenizer(["ab", "abc" * 9], padding=True, truncation=True, max_length=3)
    assert fingerprint(model) == before


def another(path: Path) -> None:
    """A whole file of the same shape with other numbers."""
    parts = load_file(path)
    parts["teacher_cell"] = parts["teacher_cell"][::-1].copy()
    save_file(parts, path)


def replaced(path: Path) -> None:
    """Another pair's file under this name."""
    before = set(path.parent.iterdir())
    pair(7).find(ROLES)
    (new,) = set(path.parent.iterdir()) - before
    os.replace(new, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "torn in the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "no safetensors": lambda path: path.write_bytes(b"\x80\x04K\x01." * 99),
    "other numbers": another,
    "of another pair": replaced,
    "other tensors": lambda path: save_file({"x": np.zeros(3)}, path),
    "a type without a name in numpy": lambda path: save_torch(
        {"digest": torch.zeros(32, dtype=torch.bfloat16)}, path),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_not_as_written_are_replaced(
    damage: str, folder: Path, searches: list[int]
) -> None:
    expected = list(pair().find(ROLES))
    (path,) = folder.iterdir()
    DAMAGE[damage](path)
    searches.clear()
    assert list(pair().find(ROLES)) == list(pair().find(ROLES)) == expected
    assert len(searches) == 1


def test_a_folder_in_the_place_of_a_file(folder: Path, searches: list[int]) -> None:
    expected = list(pair().find(ROLES))
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert list(pair().find(ROLES)) == expected
    assert list(folder.iterdir()) == [path]


def test_an_older_definition_is_not_read(
    folder: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair().find(ROLES)
    monkeypatch.setattr(cell_store, "VERSION", cell_store.VERSION + 1)
    pair().find(ROLES)
    assert len(searches) == 2


def test_a_new_definition_needs_a_new_version() -> None:
    """Where this fails, `find_cells` gives other cells than before: count `VERSION` up."""
    cells = [[sorted(cell[0] + cell[1]) for cell in find_cells(
        letters(random_merges(seed, 8)), letters(random_merges(seed + 1000, 8)))]
        for seed in range(20)]
    assert (cell_store.VERSION, sha256([repr(cells).encode()]).hex()[:16]) == (
        1, "bc1accc06ef5d251")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_folder_costs_time_only(
    number: int, folder: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", refuse)
    first, second = pair().find(ROLES), pair().find(ROLES)
    assert list(first) == list(second)
    assert len(searches) == 2
    assert list(folder.iterdir()) == []


def test_a_cache_that_is_a_file_costs_time_only(
    tmp_path: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAID_VLM_CACHE", str(tmp_path / "file"))
    assert list(pair().find(ROLES)) == list(pair().find(ROLES))
    assert len(searches) == 2


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, base, expected in itertools.chain(
            [("/a/b", "/c", "/a/b"), ("", "/c", "/c/taid-vlm")],
            (("", base, str(tmp_path / ".cache" / "taid-vlm")) for base in ("", "relative"))):
        monkeypatch.setenv("TAID_VLM_CACHE", named)
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache_folder() == Path(expected)


def test_without_a_home_nothing_is_stored(
    searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TAID_VLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert list(pair().find(ROLES)) == list(pair().find(ROLES))
    assert len(searches) == 2


TWO = """
from alignment.test_cell_store import ROLES, pair
from taid_vlm.io.hashing import sha256
for _ in range(5):
    print(sha256([repr(list(pair().find(ROLES))).encode()]).hex())
"""


def test_two_processes_at_once(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])}
    running = [subprocess.Popen([sys.executable, "-c", TWO], env=environment,
                                stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {line for process in running for line in process.communicate()[0].split()}
    assert [process.returncode for process in running] == [0, 0]
    assert len(printed) == 1
    assert len(list(folder.iterdir())) == 1
