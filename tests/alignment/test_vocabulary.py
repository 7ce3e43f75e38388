"""Vocabulary maps: the permuted-vocabulary oracle, and exact coarse-graining."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from adapters.samples import KINDS, TEXT_KINDS, adapter, built, head_rows, paired, row
from torch import Tensor, nn
from zoo import CORE_FAMILIES, CORE_TEXT_FAMILIES

from taid_vlm.adapters import TokenTable
from taid_vlm.alignment import VocabularyMap, build_vocabulary_map, pair_models
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.errors import AlignmentError
from taid_vlm.objectives import parse_objective

OBJECTIVES = ("taid", "forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "adaptive_kl",
              "alpha_beta")
ORACLES = (*CORE_FAMILIES, "llama", "qwen2", "gemma2")
PADDING = 32
Names = Sequence[str | None]


# ----- the oracle: a student that is the teacher under other names -----------------------------


def renamed_rows(family: str) -> list[int]:
    """Teacher id -> student id, by the tokens' names."""
    student = built(family, "permuted").tokenizer.get_vocab()
    teacher = built(family).tokenizer.get_vocab()
    return [student[name] for name in sorted(teacher, key=teacher.get)]


@torch.no_grad()
def twin(family: str) -> nn.Module:
    """The teacher with its vocabulary rows moved, 3 tokens and 32 padding rows of noise more.

    Logits of the three extra tokens are far down, or it would not be the same distribution.
    """
    teacher = built(family).model
    model, rows = copy.deepcopy(teacher), renamed_rows(family)
    tokens = len(built(family, "permuted").tokenizer)
    generator = torch.Generator().manual_seed(3)
    width = teacher.get_input_embeddings().weight.shape[1]
    embedding = torch.randn(tokens + PADDING, width, generator=generator)
    head = torch.randn(tokens + PADDING, width, generator=generator)
    embedding[rows] = teacher.get_input_embeddings().weight[: len(rows)]
    head[rows] = teacher.get_output_embeddings().weight[: len(rows)]
    _put(model.get_input_embeddings(), embedding)
    _put(model.get_output_embeddings(), head)
    _rename_config(model, family)
    return model


def _put(module: Any, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight)
    for name in ("num_embeddings", "out_features"):
        if hasattr(module, name):
            setattr(module, name, len(weight))
    if getattr(module, "padding_idx", None) is not None:
        module.padding_idx = None


def _rename_config(model: nn.Module, family: str) -> None:
    """Image token ids and the like are the student tokenizer's."""
    other = built(family, "permuted").model.config
    for name, value in vars(other).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int):
            setattr(model.config, name, value)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and config is not model.config:
            for name in list(vars(config)):
                if name in ("image_token_id", "image_token_index"):
                    setattr(config, name, getattr(other, name))


@cache
def oracle(family: str) -> tuple[Batch, Tensor, Tensor, Any]:
    """One mixed batch, the student's and the teacher's logits, and the pairing."""
    teacher, student = adapter(family, "teacher"), adapter(family, "student", "permuted")
    model = twin(family).eval()
    pairing = pair_models(teacher, student, head_rows(family),
                          model.get_output_embeddings().weight.shape[0])
    kinds = KINDS if family in CORE_FAMILIES else TEXT_KINDS
    batch = DistillationCollator(student, teacher, pairing)([row(kind) for kind in kinds])
    assert batch["counts"]["aligned_tokens"] == batch["counts"]["supervised_tokens"] > 20
    with torch.no_grad():
        logits = student_forward(model, batch)
    spare = torch.tensor([i for i in range(logits.shape[1] - PADDING)
                          if i not in set(renamed_rows(family))])
    logits[:, spare] = -1000.0
    return batch, logits, teacher_forward(built(family).model, batch), pairing


@pytest.mark.parametrize("family", ORACLES)
def test_renamed_teacher_does_not_diverge(family: str) -> None:
    batch, student, teacher, pairing = oracle(family)
    figures = token_figures(batch, student, teacher, pairing)
    assert figures["kl"].values.abs().max() < 1e-6
    assert figures["reverse_kl"].values.abs().max() < 1e-6
    entropies = [figures[f"{role}_entropy"].values for role in ("teacher", "student")]
    assert torch.allclose(*entropies, atol=1e-5)
    assert figures["agreement"].values.min() == 1.0
    assert figures["teacher_entropy"].values.mean() > 0.1  # it is a real distribution


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "gemma2"])
def test_every_loss_is_zero_for_the_renamed_teacher(family: str, name: str) -> None:
    batch, student, teacher, pairing = oracle(family)
    student = student.clone().requires_grad_()
    losses = token_losses(parse_objective(name), batch, student, teacher, pairing, t=0.4)
    assert losses[name].shape == batch["labels"].shape
    assert losses[name].abs().max() < 1e-6
    losses[name].sum().backward()
    # the gradient of the total variation is a sign, which rounding decides where p = q
    assert name == "tvd" or student.grad.abs().max() < 1e-4
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("family", ORACLES)
def test_naive_slice_does_diverge(family: str) -> None:
    """What one gets from cutting both logits to the same width."""
    batch, student, teacher, _ = oracle(family)
    width = min(student.shape[1], teacher.shape[1])
    losses = token_losses(parse_objective("forward_kl"), batch, student[:, :width],
                          teacher[:, :width], naive(width))
    assert losses["forward_kl"].mean() > 0.1


def naive(width: int) -> Any:
    from taid_vlm.alignment import Pairing

    table = table_of([f"t{i}" for i in range(width)])
    return Pairing("a", "naive", (build_vocabulary_map(table, table, width, width),))


@pytest.mark.parametrize("family", ORACLES)
def test_padding_rows_of_the_oracle_carry_mass_that_is_reported(family: str) -> None:
    batch, student, teacher, pairing = oracle(family)
    figures = token_figures(batch, student, teacher, pairing)
    assert len(pairing.maps[0].student.padding) == PADDING
    expected = student.double().softmax(-1)[:, -PADDING:].sum(-1)
    assert torch.allclose(figures["student_padding_mass"].values.double(), expected, atol=1e-6)
    assert expected.mean() > 1e-3


@pytest.mark.parametrize("family", ORACLES)
def test_both_labels_name_one_token(family: str) -> None:
    batch, *_ = oracle(family)
    names = built(family).tokenizer.convert_ids_to_tokens(batch["teacher_labels"])
    assert built(family, "permuted").tokenizer.convert_ids_to_tokens(batch["labels"]) == names


def test_moved_positions_do_diverge() -> None:
    """The oracle can fail: the same logits one token further."""
    batch, student, teacher, pairing = oracle("llava")
    figures = token_figures(batch, student.roll(1, 0), teacher, pairing)
    assert figures["kl"].values.mean() > 0.1


# ----- exact coarse-graining ---------------------------------------------------------------------


def table_of(names: Names, special: Sequence[str] = ()) -> TokenTable:
    text = [None if n is None or n in special else n.encode() for n in names]
    return TokenTable(text, {i: n.encode() for i, n in enumerate(names) if n in special},
                      list(names))


def tables(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "teacher": table_of(["a", "b", "c", "onlyT", "</s>"], ["</s>"]),
        "student": table_of(["c", "<pad>", "onlyS", "a", "more", "b", "</s>"], ["</s>", "<pad>"]),
        "teacher_rows": 8, "student_rows": 9,
    }
    return base | changes


def logits(rows: int, width: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_rows_are_shared_rest_or_padding() -> None:
    found = build_vocabulary_map(**tables())
    assert found.teacher.shared.tolist() == [0, 1, 2, 4]
    assert found.student.shared.tolist() == [3, 5, 0, 6]
    assert found.teacher.rest.tolist() == [3]
    assert found.student.rest.tolist() == [1, 2, 4]
    assert found.teacher.padding.tolist() == [5, 6, 7]
    assert found.student.padding.tolist() == [7, 8]
    assert (found.identity, found.has_rest, found.width) == (False, True, 5)


def check_coarse_graining(mapped: Tensor, raw: Tensor, side: Any, has_rest: bool) -> None:
    """Against sums of the softmax over the rows that are tokens, in float64."""
    named = torch.cat([side.shared, side.rest]) if has_rest else side.shared
    p = raw.double().exp()[:, named]
    p = p / p.sum(-1, keepdim=True)
    shared = p[:, : len(side.shared)]
    rest = p[:, len(side.shared) :].sum(-1, keepdim=True)
    expected = torch.cat([shared, rest], -1) if has_rest else shared
    found = mapped.double().softmax(-1)
    assert torch.allclose(found.sum(-1), torch.ones(len(raw), dtype=torch.float64))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rest_is_the_exact_sum(scale: float) -> None:
    found = build_vocabulary_map(**tables())
    t, s = scale * logits(6, 8), scale * logits(6, 9, seed=1)
    check_coarse_graining(found.map_teacher(t), t, found.teacher, True)
    check_coarse_graining(found.map_student(s), s, found.student, True)


@pytest.mark.parametrize(("teacher", "student"), [
    ("llava", "smolvlm"), ("gemma3", "idefics3"), ("qwen2_5_vl", "internvl"), ("llama", "gemma2")])
def test_rest_is_exact_between_families(teacher: str, student: str) -> None:
    _, _, pairing = paired(teacher, student)
    t, s = logits(5, head_rows(teacher)), logits(5, head_rows(student, "permuted"), seed=1)
    for found in pairing.maps:
        assert found.has_rest
        check_coarse_graining(found.map_teacher(t), t, found.teacher, True)
        check_coarse_graining(found.map_student(s), s, found.student, True)


def test_every_row_is_in_one_place() -> None:
    for teacher, student in (("llava", "smolvlm"), ("idefics3", "gemma3"), ("gpt2", "llama")):
        _, _, pairing = paired(teacher, student)
        for found in pairing.maps:
            for side, rows in ((found.teacher, head_rows(teacher)),
                               (found.student, head_rows(student, "permuted"))):
                every = torch.cat([side.shared, side.rest, side.padding])
                assert sorted(every.tolist()) == list(range(rows))
            assert len(found.teacher.shared) == len(found.student.shared)


def test_student_without_rest_conditions_the_teacher() -> None:
    found = build_vocabulary_map(**tables(student=table_of(["b", "</s>", "a"], ["</s>"]),
                                          student_rows=4))
    assert not found.has_rest
    assert found.width == 3
    assert found.teacher.rest.tolist() == [2, 3]
    t = logits(6, 8)
    check_coarse_graining(found.map_teacher(t), t, found.teacher, False)
    mass = found.unshared_mass(t, "teacher")
    expected = t.double().softmax(-1)[:, [2, 3]].sum(-1)
    assert torch.allclose(mass["teacher_rest_mass"].double(), expected, atol=1e-6)
    assert set(found.unshared_mass(logits(6, 4), "student")) == {"student_padding_mass"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_teacher_without_rest_gives_finite_losses(name: str) -> None:
    """The teacher never says one of the student's own tokens: probability 0, not NaN."""
    found = build_vocabulary_map(**tables(teacher=table_of(["a", "b", "c"]), teacher_rows=3))
    t, s = found.map_teacher(logits(6, 3)), found.map_student(logits(6, 9, seed=1))
    assert (t[:, -1] == -torch.inf).all()
    s = s.detach().requires_grad_()
    loss = parse_objective(name).per_token(s, t, torch.zeros(6, dtype=torch.long), t=0.5)[name]
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(s.grad).all()


def test_rest_without_any_probability() -> None:
    """All rows of the rest are masked out: -inf, and gradients that are no NaN."""
    found = build_vocabulary_map(**tables())
    raw = logits(4, 9)
    raw[:2, found.student.rest] = -torch.inf
    raw.requires_grad_()
    mapped = found.map_student(raw)
    assert (mapped[:2, -1] == -torch.inf).all()
    check_coarse_graining(mapped.detach(), raw.detach(), found.student, True)
    mapped.softmax(-1)[:, 0].sum().backward()
    assert torch.isfinite(raw.grad).all()
    assert (raw.grad[:2, found.student.rest] == 0).all()
    assert (raw.grad[2:, found.student.rest] < 0).all()


def test_mapping_is_differentiable_and_never_touches_padding() -> None:
    found = build_vocabulary_map(**tables())
    s = logits(4, 9).requires_grad_()
    (found.map_student(s).softmax(-1)[:, -1]).sum().backward()
    assert (s.grad[:, found.student.padding] == 0).all()
    assert (s.grad[:, found.student.rest] > 0).all()
    assert (s.grad[:, found.student.shared] < 0).all()


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_unshared_mass_is_what_is_left(side: str) -> None:
    found = build_vocabulary_map(**tables())
    raw = logits(6, 8 if side == "teacher" else 9)
    mass = found.unshared_mass(raw, side)
    assert set(mass) == {f"{side}_rest_mass", f"{side}_padding_mass"}
    shared = raw.softmax(-1)[:, getattr(found, side).shared].sum(-1)
    assert torch.allclose(sum(mass.values()) + shared, torch.ones(6), atol=1e-6)


def test_half_precision_keeps_its_rest_in_float32() -> None:
    found = build_vocabulary_map(**tables())
    raw = logits(6, 9).bfloat16()
    check_coarse_graining(found.map_student(raw), raw, found.student, True)


# ----- who is paired with whom --------------------------------------------------------------------


def pairs(found: VocabularyMap) -> list[tuple[int, int]]:
    return list(zip(found.teacher.shared.tolist(), found.student.shared.tolist(), strict=True))


def test_roles_are_paired_before_names() -> None:
    special = ["<end>", "</s>"]
    teacher = table_of(["a", "<end>", "</s>"], special)
    student = table_of(["<end>", "a", "</s>"], special)
    plain = build_vocabulary_map(teacher, student, 3, 3)
    assert pairs(plain) == [(0, 1), (1, 0), (2, 2)]
    swapped = build_vocabulary_map(teacher, student, 3, 3, roles=[(1, 2)])
    assert pairs(swapped) == [(1, 2), (0, 1)]
    assert (swapped.teacher.rest.tolist(), swapped.student.rest.tolist()) == ([2], [0])


def test_ends_of_turn_are_one_entry_under_any_name() -> None:
    for teacher, student in (("gemma3", "idefics3"), ("idefics3", "llava"), ("llama", "gemma2")):
        t, s, pairing = paired(teacher, student)
        for found in pairing.maps:
            assert pairs(found)[0] == (t.end_of_turn_id, s.end_of_turn_id)


def test_kinds_are_kept_apart() -> None:
    """The text "</s>" is not the special token; the byte <0x61> is not an "a" that is there."""
    teacher = TokenTable([b"</s>", b"a", b"b", b"a"], {}, ["</s>", "<0x61>", "b", "a"])
    student = TokenTable([None, b"a", b"b"], {0: b"</s>"}, ["</s>", "a", "b"])
    assert set(pairs(build_vocabulary_map(teacher, student, 4, 3))) == {(2, 2), (3, 1)}


@pytest.mark.parametrize("swapped", [False, True])
def test_twins_are_paired_with_their_own_kind(swapped: bool) -> None:
    """Two spaces as a merge and as an added token: the same bytes, but not the same token."""
    twins = [b"x", b"  ", b"  "]
    teacher = TokenTable(list(twins), {}, ["x", "ĠĠ", "  "], frozenset({2}))
    student = TokenTable(list(twins), {}, ["x", "  ", "ĠĠ"], frozenset({1}))
    if swapped:
        teacher, student = student, teacher
    found = pairs(build_vocabulary_map(teacher, student, 3, 3))
    assert found[0] == (0, 0)
    assert set(found) == {(0, 0), (1, 2), (2, 1)}


@pytest.mark.parametrize("added", [frozenset(), frozenset({1})])
def test_lone_tokens_are_paired_by_their_bytes(added: frozenset[int]) -> None:
    """Of another kind, but there is nothing nearer: a byte and a letter, a merge and an added."""
    teacher = TokenTable([b"x", b"a", b"  "], {}, ["x", "<0x61>", "ĠĠ"])
    student = TokenTable([b"  ", b"x", b"a"], {}, ["  ", "x", "a"], frozenset({0}) | added)
    assert set(pairs(build_vocabulary_map(teacher, student, 3, 3))) == {(0, 1), (1, 2), (2, 0)}


def test_prefix_pairs_the_glued_token_with_the_bare_one() -> None:
    names = ["The", " The", " A", "A", "  A", " ", "x"]
    found = build_vocabulary_map(table_of(names), table_of(names), 7, 7, (), (b"", b" "))
    spelled = {(names[t], names[s]) for t, s in pairs(found)}
    assert spelled == {("The", " The"), ("A", " A"), (" A", "  A")}
    assert not found.identity
    mirrored = build_vocabulary_map(table_of(names), table_of(names), 7, 7, (), (b" ", b""))
    assert {(s, t) for t, s in pairs(mirrored)} == set(pairs(found))


def test_prefix_map_of_real_pairs() -> None:
    teacher, student, pairing = paired("internvl", "smolvlm")
    specials = set(teacher.table.special)
    for t, s in pairs(pairing.maps[1]):
        if t not in specials:
            assert student.table.text[s] == b" " + teacher.table.text[t]
    bare = {t for t, _ in pairs(pairing.maps[1])} - specials
    assert len(bare) > 20


@pytest.mark.parametrize(("side", "rows"), [("teacher", 4), ("student", 6)])
def test_head_with_too_few_rows(side: str, rows: int) -> None:
    with pytest.raises(AlignmentError, match=rf"{side}: the head has {rows} rows.*resize"):
        build_vocabulary_map(**tables(**{f"{side}_rows": rows}))


def test_nothing_shared_is_an_error() -> None:
    with pytest.raises(AlignmentError, match="share no token"):
        build_vocabulary_map(table_of(["a"]), table_of(["b"]), 1, 1)


@pytest.mark.parametrize(("changes", "identity"), [
    ({}, True), ({"student_rows": 6}, False), ({"roles": [(1, 1)]}, True),
    ({"roles": [(0, 1)]}, False), ({"student": table_of(["b", "a"])}, False),
    ({"glue": (b"", b" ")}, False), ({"glue": (b" ", b" ")}, True),
])
def test_identity_is_found(changes: dict[str, Any], identity: bool) -> None:
    same = {"teacher": table_of(["a", "b", " a"]), "student": table_of(["a", "b", " a"]),
            "teacher_rows": 5, "student_rows": 5}
    found = build_vocabulary_map(**(same | changes))
    assert found.identity == identity
    if identity:
        raw = logits(3, 5)
        assert found.map_student(raw) is raw
        assert found.map_teacher(raw) is raw
        assert found.unshared_mass(raw, "student") == {}
        assert found.width == 5


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *CORE_TEXT_FAMILIES])
def test_own_tokenizer_is_the_identity(family: str) -> None:
    rows = head_rows(family)
    assert pair_models(adapter(family, "teacher"), adapter(family), rows, rows).maps[0].identity
