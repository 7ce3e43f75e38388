"""Cells: tokens of two vocabularies that begin the same bytes, and exact sums over them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from adapters.samples import adapter, head_rows
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from zoo.tokenizers import BYTE_TOKENS, VARIANTS

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.alignment import VocabularyMap, build_vocabulary_map, pair_models
from taid_vlm.alignment.cells import ANCHOR, Cell, build_cell_map, find_cells
from taid_vlm.alignment.vocabulary import grouped_logsumexp
from taid_vlm.errors import AlignmentError
from taid_vlm.objectives import diagnose

PAIRS = list(itertools.product(VARIANTS, repeat=2))
EVERY = pytest.mark.parametrize(("teacher", "student"), PAIRS)
SPACE = b" "
GLUES = ((b"", b""), (SPACE, b""), (b"", SPACE))


@cache
def cells(teacher: str, student: str, glue: tuple[bytes, bytes] = (b"", b"")) -> tuple[Cell, ...]:
    t, s = adapter("llama", "teacher", teacher), adapter("llama", "student", student)
    return tuple(find_cells(t, s, [(t.end_of_turn_id, s.end_of_turn_id)], glue))


@cache
def cell_map(teacher: str, student: str, glue: tuple[bytes, bytes] = (b"", b"")) -> VocabularyMap:
    return build_cell_map(
        adapter("llama", "teacher", teacher), adapter("llama", "student", student),
        head_rows("llama", teacher), head_rows("llama", student), (), glue)


def as_sets(found: Sequence[Cell]) -> set[tuple[frozenset[int], frozenset[int]]]:
    return {(frozenset(t), frozenset(s)) for t, s in found}


def cell_of(found: Sequence[Cell], side: int, index: int) -> Cell:
    (one,) = [cell for cell in found if index in cell[side]]
    return one


def texts(variant: str, ids: Sequence[int], family: str = "llama") -> set[bytes | None]:
    table = adapter(family, "student", variant).table
    return {table.text[index] for index in ids}


def spelled(variant: str, name: bytes) -> int:
    """The token that is not a byte's name."""
    table = adapter("llama", "student", variant).table
    (found,) = [i for i, text in enumerate(table.text)
                if text == name and table.strings[i] not in BYTE_TOKENS]
    return found


# ----- who is together ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "internvl", "qwen3_vl"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_tokenizers_have_one_token_on_each_side(variant: str, family: str) -> None:
    t, s = adapter(family, "teacher", variant), adapter(family, "student", variant)
    found = find_cells(t, s)
    assert all(cell == ([i], [i]) for cell in found for i in cell[0])
    named = {i for i, name in enumerate(s.table.strings) if name is not None}
    assert {cell[1][0] for cell in found} == named


def entries(found: VocabularyMap) -> set[tuple[int, int]]:
    return set(zip(found.teacher.shared.tolist(), found.student.shared.tolist(), strict=True))


@pytest.mark.parametrize(("teacher", "student"), [
    ("llama", "llama"), ("gemma2", "llama"), ("internvl", "llava"), ("qwen3_vl", "internvl"),
    ("smolvlm", "idefics3"), ("gemma3", "qwen2_5_vl")])
def test_equal_merges_give_the_map_of_case_b(teacher: str, student: str) -> None:
    models_ = adapter(teacher, "teacher"), adapter(student, "student", "permuted")
    rows = head_rows(teacher), head_rows(student, "permuted")
    b, c = (pair_models(*models_, *rows, alignment=a) for a in ("shared", "chunks"))
    assert (b.case, c.case) == ("b", "c")
    for shared, celled in zip(b.maps, c.maps, strict=True):
        assert (celled.cells, celled.has_rest) == (0, shared.has_rest)
        assert entries(celled) == entries(shared)
        for side in ("teacher", "student"):
            for part in ("rest", "padding"):
                assert torch.equal(getattr(getattr(celled, side), part),
                                   getattr(getattr(shared, side), part))


@EVERY
def test_sides_can_be_exchanged(teacher: str, student: str) -> None:
    swapped = {(s, t) for t, s in as_sets(cells(student, teacher))}
    assert as_sets(cells(teacher, student)) == swapped


@pytest.mark.parametrize("glue", GLUES)
@EVERY
def test_every_token_is_in_one_place(
    teacher: str, student: str, glue: tuple[bytes, bytes]
) -> None:
    found = cell_map(teacher, student, glue)
    for side, variant in ((found.teacher, teacher), (found.student, student)):
        parts = torch.cat([side.shared, side.members, side.rest, side.padding])
        assert sorted(parts.tolist()) == list(range(head_rows("llama", variant)))
        assert set(side.cell.tolist()) == set(range(found.cells))
    assert len(found.teacher.shared) == len(found.student.shared)


@pytest.mark.parametrize("glue", GLUES)
@EVERY
def test_cells_are_of_one_first_byte(
    teacher: str, student: str, glue: tuple[bytes, bytes]
) -> None:
    for theirs, ours in cells(teacher, student, glue):
        assert theirs and ours
        said = [(text, glue[side]) for side, (variant, ids) in
                enumerate(((teacher, theirs), (student, ours))) for text in texts(variant, ids)]
        if any(text is None for text, _ in said):
            assert len(theirs) == len(ours) == 1  # special tokens by themselves
            continue
        assert all(text.startswith(prefix) for text, prefix in said)
        assert len({text[len(prefix)] for text, prefix in said}) == 1


@EVERY
def test_all_that_is_said_has_a_cell(teacher: str, student: str) -> None:
    """Only twins (a byte beside its character) and names of one side alone are left over."""
    spare = {"<|spare_0|>", "<|spare_1|>", "<|spare_2|>", "<unk>"}
    for side, variant in ((cell_map(teacher, student).teacher, teacher),
                          (cell_map(teacher, student).student, student)):
        strings = adapter("llama", "student", variant).table.strings
        assert {strings[i] for i in side.rest.tolist()} <= spare | set(BYTE_TOKENS)


def test_a_byte_beside_its_character() -> None:
    """Characters speak for the bytes "A" and " "; the byte's own token is paired by its kind."""
    strings = adapter("llama", "student", "metaspace").table.strings
    byte, letter = strings.index("<0x41>"), strings.index("A")
    assert byte in cell_map("plain", "metaspace").student.rest
    assert byte not in {i for _, s in cells("plain", "metaspace") for i in s}
    assert spelled("plain", b"A") in cell_of(cells("plain", "metaspace"), 1, letter)[0]
    other = adapter("llama", "student", "unigram").table.strings.index("<0x41>")
    assert cell_of(cells("unigram", "metaspace"), 1, byte) == ([other], [byte])


def test_a_byte_that_is_no_character() -> None:
    """A newline has no other token there: whatever begins with one goes with it."""
    newline = adapter("llama", "student", "metaspace").table.strings.index("<0x0A>")
    theirs, ours = cell_of(cells("plain", "metaspace"), 1, newline)
    assert ours == [newline]
    assert b"\n" in texts("plain", theirs)


# ----- by brute force -----------------------------------------------------------------------------


def letters(
    merges: Sequence[tuple[str, str]], alphabet: str = "abc", newline: str = "\n", end: str = "<s>"
) -> ModelAdapter:
    """A BPE over letters with these merges; it splits off newlines."""
    names = [end, newline, *alphabet, *dict.fromkeys(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    return make_adapter(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end), "x")


def random_merges(seed: int, number: int) -> list[tuple[str, str]]:
    rng, known, merges = random.Random(seed), list("abc"), []
    while len(merges) < number:
        pair = (rng.choice(known), rng.choice(known))
        if "".join(pair) not in known:
            merges.append(pair)
            known.append("".join(pair))
    return merges


def begins(model: ModelAdapter, text: str) -> str:
    tokens = model.tokenizer.tokenize(ANCHOR + text)
    assert "".join(tokens) == ANCHOR + text
    return tokens[1]


def by_brute_force(
    teacher: ModelAdapter, student: ModelAdapter
) -> set[tuple[frozenset[str], frozenset[str]]]:
    """Groups that a flood over "begins the same text as" reaches, by the tokens' names."""
    names = [[n for n in m.table.strings if n not in ("<s>", "\n")] for m in (teacher, student)]
    unsaid = {n for n in set(names[0]) & set(names[1])
              if begins(teacher, n) != n and begins(student, n) != n}
    links = [(n, n if n in unsaid else begins(student, n)) for n in names[0]]
    links += [(n if n in unsaid else begins(teacher, n), n) for n in names[1]]
    groups = set()
    for name in names[0]:
        t, s = {name}, set()
        for _ in links:
            s |= {b for a, b in links if a in t}
            t |= {a for a, b in links if b in s}
        groups.add((frozenset(t), frozenset(s)))
    return groups


def named(model: ModelAdapter, ids: Sequence[int]) -> frozenset[str | None]:
    return frozenset(model.table.strings[i] for i in ids)


@pytest.mark.parametrize("seed", range(40))
def test_small_vocabularies_by_brute_force(seed: int) -> None:
    teacher, student = (letters(random_merges(seed + shift, 5)) for shift in (0, 1000))
    expected = by_brute_force(teacher, student)
    found = {(named(teacher, t), named(student, s)) for t, s in find_cells(teacher, student)}
    ends = {(frozenset({name}), frozenset({name})) for name in ("<s>", "\n")}
    assert found == expected | ends


def test_a_byte_is_no_partner_where_its_character_speaks() -> None:
    """One side has the letter "a" and its byte, the other the byte alone."""
    teacher, student = (make_adapter(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(
        {name: i for i, name in enumerate(["<s>", *names])}, [], unk_token="<s>",
        byte_fallback=True)), eos_token="<s>"), "x")
        for names in (["<0x0A>", "<0x61>", "a", "b"], ["<0x0A>", "<0x61>", "b"]))
    found = {(named(teacher, t), named(student, s)) for t, s in find_cells(teacher, student)}
    assert found == {(frozenset({t}), frozenset({s})) for t, s in (
        ("<s>", "<s>"), ("<0x0A>", "<0x0A>"), ("a", "<0x61>"), ("b", "b"))}


# ----- an exact oracle: letters drawn one by one --------------------------------------------------

LETTERS = {"a": 0.5, "b": 0.3, "c": 0.2}


def next_tokens(model: ModelAdapter) -> Tensor:
    """log P(first token of an endless text of independent letters), by all texts of 7 letters."""
    p = torch.zeros(len(model.table), dtype=torch.float64)
    for drawn in itertools.product(LETTERS, repeat=7):
        weight = torch.tensor([LETTERS[letter] for letter in drawn]).double().prod()
        p[model.tokenizer.convert_tokens_to_ids(begins(model, "".join(drawn)))] += weight
    assert float(p.sum()) == pytest.approx(1.0)
    return p.log()[None]


@pytest.mark.parametrize(("theirs", "ours"), [
    ([], [("a", "b")]),
    ([], [("a", "b"), ("ab", "c")]),
    ([("a", "b")], [("b", "c")]),
    ([("a", "b")], [("b", "c"), ("a", "bc")]),
    ([("a", "a"), ("b", "c")], [("a", "b"), ("c", "c")]),
])
@pytest.mark.parametrize("swapped", [False, True])
def test_letters_drawn_one_by_one(
    theirs: list[tuple[str, str]], ours: list[tuple[str, str]], swapped: bool
) -> None:
    """Two models of one process say the same over cells, and not over shared tokens and a rest."""
    teacher, student = letters(theirs), letters(ours)
    if swapped:
        teacher, student = student, teacher
    t, s = next_tokens(teacher), next_tokens(student)
    rows = len(teacher.table), len(student.table)

    def divergence(found: VocabularyMap) -> float:
        return float(diagnose(found.map_student(s), found.map_teacher(t))["kl"])

    assert abs(divergence(build_cell_map(teacher, student, *rows))) < 1e-12
    assert divergence(build_vocabulary_map(teacher.table, student.table, *rows)) > 0.01


# ----- glue ---------------------------------------------------------------------------------------


def test_a_glued_space_is_left_aside() -> None:
    """ " The" after "Assistant:" is "The" after a newline."""
    found = cells("plain", "other", (SPACE, b""))
    theirs, ours = cell_of(found, 0, spelled("plain", b" The"))
    assert texts("other", ours) & {b"The", b"Th", b"T"}
    assert texts("plain", theirs) <= {b" " + text for text in (b"T", b"Th", b"The", b"There")}
    glued = cells("plain", "plain", (SPACE, b""))
    for text in (b"The", b"t", b"a"):
        assert spelled("plain", text) in cell_of(glued, 0, spelled("plain", SPACE + text))[1]
    assert all(spelled("plain", SPACE) not in t for t, _ in found)  # it says nothing yet


def test_ends_of_turns_are_alone_in_every_map() -> None:
    for teacher, student in (("smolvlm", "internvl"), ("gemma3", "smolvlm"), ("llava", "gemma3")):
        t, s = adapter(teacher, "teacher"), adapter(student, "student", "metaspace")
        pairing = pair_models(t, s, head_rows(teacher), head_rows(student, "metaspace"))
        assert len(pairing.maps) == (2 if "smolvlm" in (teacher, student) else 1)
        for found in pairing.maps:
            assert found.same_token(t.end_of_turn_id, s.end_of_turn_id)


def test_nothing_in_common_is_refused() -> None:
    digits = letters([], alphabet="123", newline="|", end="<e>")
    with pytest.raises(AlignmentError, match="no token of the teacher begins"):
        build_cell_map(letters([]), digits, 5, 5)


# ----- sums over groups ---------------------------------------------------------------------------

GROUP = torch.tensor([2, 0, 0, 3, 2, 0, 5, 3])  # 1 and 4 have no column


def naive_sums(logits: Tensor) -> Tensor:
    columns = [logits[:, index == GROUP] for index in range(6)]
    return torch.stack([c.logsumexp(-1) if c.shape[1] else logits.new_full((len(logits),),
                        -torch.inf) for c in columns], -1)


@pytest.mark.parametrize("scale", [1.0, 50.0, 5000.0])
def test_grouped_sums_and_their_gradient(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(7, len(GROUP), generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    results = []
    for function in (lambda x: grouped_logsumexp(x, GROUP, 6), naive_sums):
        leaf = logits.clone().requires_grad_()
        found = function(leaf)
        filled = [0, 2, 3, 5]
        (found[:, filled] * weight[:, filled]).sum().backward()
        results.append((found.detach(), leaf.grad))
    (found, gradient), (expected, naive) = results
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(gradient, naive, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_without_any_probability(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, len(GROUP), dtype=dtype)
    logits[0, GROUP == 2] = -torch.inf
    logits[1, 0] = -torch.inf  # one of two
    logits[2] = -torch.inf
    logits.requires_grad_()
    found = grouped_logsumexp(logits, GROUP, 6)
    assert torch.equal(found.detach(), naive_sums(logits.detach()))
    found.exp().sum().backward()
    expected = torch.where(logits.detach() == -torch.inf, 0.0, 1.0).to(dtype)
    assert torch.allclose(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_cells_are_exact_sums_of_the_softmax(
    teacher: str, student: str, dtype: torch.dtype
) -> None:
    found = cell_map(teacher, student)
    for name, side, variant, mapped in (
            ("teacher", found.teacher, teacher, found.map_teacher),
            ("student", found.student, student, found.map_student)):
        generator = torch.Generator().manual_seed(1)
        raw = (4 * torch.randn(5, head_rows("llama", variant), generator=generator)).to(dtype)
        p = raw.double().softmax(-1)
        sums = [p[:, side.members[side.cell == i]].sum(-1) for i in range(found.cells)]
        rest = [p[:, side.rest].sum(-1)] if found.has_rest else []
        expected = torch.cat([p[:, side.shared], *(x[:, None] for x in (*sums, *rest))], -1)
        q = mapped(raw).double().softmax(-1)
        assert q.shape == (5, found.width)
        assert torch.allclose(q, expected / expected.sum(-1, keepdim=True), atol=1e-6)
        mass = found.unshared_mass(raw, name)
        whole = sum(mass.values(), torch.zeros(5)).double() + p[:, side.shared].sum(-1)
        assert torch.allclose(whole, torch.ones(5, dtype=torch.float64), atol=1e-5)
        assert (f"{name}_cell_mass" in mass) == (found.cells > 0)
