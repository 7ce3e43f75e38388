"""Errors: what they say is what they hold, wherever they are told, and through other processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from taid_vlm.errors import AlignmentError, RecipeError, RecordError, TaidError, with_place


@pytest.mark.parametrize("kind", [TaidError, RecipeError, RecordError, AlignmentError])
def test_the_mend_ends_the_text(kind: type[TaidError]) -> None:
    error = kind("x = 3, but it must be 4.", mend="Set x to 4.", code="three", reasons=["a"])
    assert str(error) == "x = 3, but it must be 4. Set x to 4."
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):  # out of a worker
        assert type(other) is kind and str(other) == str(error)
        assert vars(other) == {"message": "x = 3, but it must be 4.", "mend": "Set x to 4.",
                               "code": "three", "reasons": ("a",)}
    assert str(kind("nothing to be done.")) == "nothing to be done."


def test_a_place_in_front_keeps_everything_else() -> None:
    error = AlignmentError("no.", mend="Yes.", code="c", reasons=("r",))
    placed = with_place(with_place(error, "student"), "stages 'one'")
    assert type(placed) is AlignmentError
    assert str(placed) == "stages 'one': student: no. Yes."
    assert (placed.mend, placed.code, placed.reasons) == ("Yes.", "c", ("r",))


def test_a_vague_place_gives_way_and_a_better_one_stays() -> None:
    vague = TaidError("data: 'metadata: x' does not exist.")
    assert str(with_place(vague, "data.eval", "data")) == (
        "data.eval: 'metadata: x' does not exist.")
    known = RecordError("train.jsonl:3: data: no.")
    assert str(with_place(known, "data.eval", "data")) == "train.jsonl:3: data: no."
