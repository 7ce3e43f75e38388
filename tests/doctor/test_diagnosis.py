"""What to change after a refusal: by the error's code, its reasons, or its mend."""

from __future__ import annotations

import re
from pathlib import Path

import taid_vlm
from taid_vlm.doctor.diagnosis import ADVICE, refuse
from taid_vlm.doctor.preflight import REMEDIES
from taid_vlm.errors import TaidError


def test_a_code_has_advice_of_its_own() -> None:
    found = refuse(TaidError("it cannot see.", mend="Look away.", code="blind"))
    assert (found.outcome, found.reason) == ("refused", "it cannot see. Look away.")
    assert found.changes == (ADVICE["blind"],)


def test_reasons_have_remedies_each() -> None:
    found = refuse(TaidError("no record: 2 x empty answer, 1 x odd, 1 x no answer",
                             reasons=("empty answer", "odd", "no answer")))
    assert found.changes == (f"Empty answer: {REMEDIES['empty answer']}",
                             f"No answer: {REMEDIES['no answer']}")


def test_without_a_code_the_mend_is_the_advice() -> None:
    assert refuse(TaidError("x.", mend="Do y.")).changes == ("Do y.",)
    assert refuse(TaidError("x.", mend="Do y.", code="unheard")).changes == ("Do y.",)
    # words decide nothing
    (change,) = refuse(TaidError("they cannot see; 3 x empty answer")).changes
    assert change.startswith("Change what the message names")


def test_every_code_with_advice_is_raised_somewhere() -> None:
    sources = "".join(path.read_text() for path in Path(taid_vlm.__file__).parent.rglob("*.py"))
    raised = set(re.findall(r'code=f?"([^"]+)"', sources))
    raised |= {f"alignment_{name}" for name in ("exact", "shared")} - raised
    assert "alignment_{alignment}" in raised
    assert raised - {"alignment_{alignment}"} == set(ADVICE)
