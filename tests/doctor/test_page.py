"""Streams, text and page: nothing is lost, partners find each other, hostile text stays text."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from doctor.patients import ANSWER, TEXT_ROWS, Patient

from taid_vlm.doctor import Inspection
from taid_vlm.doctor.page import render
from taid_vlm.doctor.streams import Stream, Trace
from taid_vlm.doctor.text import as_text
from taid_vlm.report.page import csp_hash

VOID = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = "<script>alert(1)</script> \" ' & {{ 7 * 7 }} </span></body> naïve"


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.pieces: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if "data-group" in dict(attrs):
            self.pieces.append(dict(attrs))
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert (value or "").startswith(("data:image/png;base64,", "#"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def chunks(patient: Patient, answer: str = ANSWER, **others: Any) -> Path:
    rows = [{**row, "completion": answer} for row in patient.pictures()]
    models = {"teacher": patient.checkpoints("qwen3_vl"),
              "student": patient.checkpoints("smolvlm", "other")}
    return patient.recipe(**(models | others), rows=rows)


@pytest.fixture
def hostile(patient: Patient) -> Inspection:
    return patient.inspect(chunks(patient, HOSTILE), everything=True)


def record_of(found: Inspection) -> Trace:
    assert found.record is not None
    return found.record


def groups(stream: Stream) -> dict[int, str]:
    return {piece.group: "".join(token.text for token in piece.tokens)
            for piece in stream.pieces if piece.group is not None}


# ----- streams ------------------------------------------------------------------------------


def test_partners_cover_the_same_text(hostile: Inspection) -> None:
    """Beyond a space that a template glues to the first token, and the names of the ends."""
    sides = record_of(hostile).sides
    teacher, student = groups(sides["teacher"]), groups(sides["student"])
    assert teacher.keys() == student.keys()
    *middle, last = sorted(teacher)
    assert [teacher[g].lstrip() for g in middle] == [student[g].lstrip() for g in middle]
    assert (teacher[last], student[last]) == ("<|im_end|>", "<end_of_utterance>")


def test_chunks_hold_several_tokens_against_one(hostile: Inspection) -> None:
    sides = record_of(hostile).sides
    sizes = {role: {piece.group: len(piece.tokens) for piece in side.pieces
                    if piece.kind == "chunk"} for role, side in sides.items()}
    assert sizes["teacher"].keys() == sizes["student"].keys()
    assert any(sizes["teacher"][g] != sizes["student"][g] for g in sizes["student"])
    assert record_of(hostile).chunk == sum(sizes["student"].values())


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2"])
@pytest.mark.parametrize("tokenizer", ["plain", "unigram", "metaspace"])
def test_no_token_and_no_text_is_lost(family: str, tokenizer: str, patient: Patient) -> None:
    path = patient.recipe(None, patient.checkpoints(family, tokenizer), objective="ce")
    found = patient.inspect(path)
    stream = record_of(found).sides["student"]
    assert sum(piece.count for piece in stream.pieces) == stream.length
    text = "".join(piece.text for piece in stream.pieces)
    assert "what is it" in text
    assert ANSWER in text
    positions = [token.position for piece in stream.pieces for token in piece.tokens]
    assert positions == sorted(set(positions))


def test_characters_cut_in_two_are_spelled_out(hostile: Inspection) -> None:
    shown = groups(record_of(hostile).sides["teacher"]).values()
    assert any(r"\xc3" in text for text in shown)


def test_a_text_that_is_cut_is_shown_cut(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"),
                          [{"text": ANSWER * 9}], train={"max_length": 12})
    record = record_of(patient.inspect(path))
    assert record.cut
    assert all(stream.length == 12 for stream in record.sides.values())


def test_a_record_that_is_too_long_is_shown_and_said_to_be_left_out(patient: Patient) -> None:
    rows = [{**TEXT_ROWS[0], "completion": ANSWER * 9}, *TEXT_ROWS]
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"), rows,
                          train={"max_length": 50})
    done = patient.cli("inspect", path)
    assert done.status == 2
    assert "train.jsonl:1 would be left out: longer than max_length" in done.err
    assert ANSWER * 9 in re.sub("[⟦⟧⟨⟩]", "", done.out)


def test_the_supervised_side_is_the_recipes(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"))
    answers, everything = (record_of(patient.inspect(path, f"train.supervise={what}"))
                           for what in ("answers", "all"))
    assert everything.supervised > answers.supervised
    assert "what is it" in "".join(groups(everything.sides["student"]).values())
    assert "what" not in "".join(groups(answers.sides["student"]).values())


# ----- the page -----------------------------------------------------------------------------


def test_the_page_is_well_formed_and_self_contained(hostile: Inspection) -> None:
    text = render(hostile)
    page = Page(text)
    assert page.counts["script"] == 1
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"@import|url\(|<link|<iframe", text)
    script = text[text.index("<script>") + len("<script>") : text.index("</script>")]
    assert f"script-src '{csp_hash(script)}'" in text
    assert render(hostile) == text


def test_hostile_text_stays_text(hostile: Inspection) -> None:
    text = render(hostile)
    assert "<script>alert" not in text
    shown = [html.unescape(re.sub(r"<[^>]+>", "", part)) for part in
             re.findall(r'<div class="tokens">(.*?)</div>', text, re.DOTALL)]
    assert len(shown) == 2
    for side in shown:
        assert "<script>alert(1)</script> \" ' & {{ 7 * 7 }} </span></body> n" in side


def test_partners_have_one_colour_and_one_link(hostile: Inspection) -> None:
    by_group: dict[str, dict[str, str]] = {}
    for piece in Page(render(hostile)).pieces:
        colour = re.search(r"\bc(\d)\b", piece["class"] or "")
        assert colour
        by_group.setdefault(piece["data-group"] or "", {})[piece["data-role"] or ""] = colour[1]
    assert len(by_group) == len(groups(record_of(hostile).sides["student"]))
    for colours in by_group.values():
        assert colours.keys() == {"teacher", "student"}
        assert len(set(colours.values())) == 1


def test_images_are_folded_and_shown(hostile: Inspection) -> None:
    text = render(hostile)
    assert text.count('<img src="data:image/png;base64,') == 2
    counts = {piece.count for side in record_of(hostile).sides.values()
              for piece in side.pieces if piece.kind == "image"}
    for count in counts:
        assert f"image · {count:,} tokens" in text


def test_differences_are_marked(patient: Patient) -> None:
    rows = Page(render(patient.inspect(chunks(patient)))).counts["tr"]
    assert rows > 30
    same = patient.inspect(patient.recipe(
        patient.checkpoints("llama"), patient.checkpoints("llama", seed=1)))
    assert '<tr class="differs">' not in render(same)
    assert "≠" not in as_text(same)


def test_a_refused_pair_has_a_page(patient: Patient) -> None:
    page = patient.folder / "deep" / "page.html"
    path = chunks(patient, teacher=patient.checkpoints("llama"))
    done = patient.cli("inspect", path, "--html", page)
    assert done.status == 2
    text = page.read_text()
    Page(text)
    assert "What to change" in text
    assert "Name a vision-language model" in text


def test_the_preflight_is_on_the_page(hostile: Inspection) -> None:
    text = render(hostile)
    assert "Tokens per record" in text
    assert "0 of 4 records will be left out (0.0%)" in text


def test_a_page_that_cannot_be_written_is_one_message(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"))
    done = patient.cli("inspect", path, "--html", patient.folder)
    assert done.status == 2
    assert "could not be written" in done.err
    assert len(done.errors) == 1


def test_json_alone_is_printed_and_holds_what_the_text_holds(patient: Patient) -> None:
    path = chunks(patient, HOSTILE)
    done = patient.cli("inspect", path, "--json", "--all")
    found = json.loads(done.out)
    assert done.status == 0
    assert found.keys() == {"verdict", "problem", "facts", "record", "preflight"}
    assert found["record"]["images"] == 1
    assert found["preflight"][0]["sentence"] == "0 of 4 records will be left out (0.0%)"
    text = " ".join(patient.cli("inspect", path, "--all").out.split())
    for side in found["facts"].values():
        assert f"{side['tokenizer']['tokens']:,}" in text
        assert side["end_of_turn"] in text
    assert found["verdict"]["headline"] in text
    spelled = "".join(token["text"] for piece in found["record"]["sides"]["student"]["pieces"]
                      for token in piece["tokens"])
    assert "<script>alert(1)</script>" in spelled


def test_narrow_terminals_lose_nothing(hostile: Inspection) -> None:
    wide, narrow = (re.sub(r"\s", "", as_text(hostile, width=width)) for width in (200, 60))
    for side in hostile.facts.values():
        assert side.tokenizer is not None
        assert side.tokenizer.kind.replace(" ", "") in wide
    assert sorted(narrow) == sorted(wide)


def test_templates_are_part_of_the_package() -> None:
    import taid_vlm.doctor

    folder = Path(taid_vlm.doctor.__file__).with_name("templates")
    assert {"doctor.html.j2", "doctor.css", "doctor.js"} <= {path.name for path in folder.iterdir()}
