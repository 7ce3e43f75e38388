"""The report page: honest marks, escaped text, one file, the same text every time."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import zlib
from pathlib import Path

import pytest

from taid_vlm.errors import TaidError
from taid_vlm.report import (
    Column,
    Curve,
    Example,
    Figure,
    Report,
    Row,
    Section,
    Table,
    as_json,
    charts,
    judge,
    page,
    palette,
    render,
    write_report,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=y>"
UP = Column("acc", "Accuracy", "higher")
DOWN = Column("acc", "Loss", "lower")


def png(width: int = 2, height: int = 2) -> bytes:
    """A black greyscale PNG, made here so that no test needs an image library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    out = io.BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)))
    out.write(chunk(b"IDAT", zlib.compress(b"\x00" * (width + 1) * height)))
    out.write(chunk(b"IEND", b""))
    return out.getvalue()


def row(name: str, value: float | None, stderr: float | None, role: str = "baseline") -> Row:
    return Row(name, role, {"acc": Figure(value, stderr, 100)})  # type: ignore[arg-type]


def report(*sections: Section, summary: str = "One sentence.") -> Report:
    return Report("A title", [summary], list(sections), {"seed": "1"}, "steps: 10\n")


def full_report() -> Report:
    rows = [
        row("Teacher", 0.95, 0.01, "teacher"),
        row("Start", 0.4, 0.01, "start"),
        row("KL", 0.6, 0.01),
        row("TAID", 0.7, 0.01, "main"),
    ]
    curves = [
        Curve("Loss", "step", "nats", {"KL": [(0, 2.0), (1, 1.0)], "TAID": [(0, 1.5), (1, 0.5)]}),
        Curve("Loss again", "step", "nats", {"TAID": [(0, 1.5), (1, 0.5)]}, log_y=True),
    ]
    examples = [
        Example(png(), "Which colour?", "Red", "colour", {"KL": "blue", "TAID": " red "}),
        Example(None, "Describe it.", "A dot", "caption", {"KL": "dot", "TAID": "a dot"}),
    ]
    table = Table("Results", [UP], rows, "A caption.")
    return report(Section("Vision", ["Some text."], [table], curves, examples), Section("None"))


# Verdicts


def test_a_clear_leader_is_best() -> None:
    # The gap of 0.10 exceeds 2 * sqrt(0.03^2 + 0.03^2) = 0.0849.
    assert judge.verdicts(UP, [row("a", 0.80, 0.03), row("b", 0.70, 0.03)]) == ["best", ""]


def test_a_leader_within_two_errors_ties() -> None:
    # The gap of 0.10 is below 2 * sqrt(0.04^2 + 0.04^2) = 0.1131; c is clear of a.
    rows = [row("a", 0.80, 0.04), row("b", 0.70, 0.04), row("c", 0.50, 0.04)]
    assert judge.verdicts(UP, rows) == ["tie", "tie", ""]


def test_lower_is_better_turns_the_order() -> None:
    assert judge.verdicts(DOWN, [row("a", 0.8, 0.01), row("b", 0.7, 0.01)]) == ["", "best"]


def test_exactly_two_errors_is_a_tie() -> None:
    # 2 * sqrt(0.03^2 + 0.04^2) = 0.1, the gap, up to rounding of the last binary digit.
    assert judge.verdicts(UP, [row("a", 0.9, 0.03), row("b", 0.8, 0.04)]) == ["tie", "tie"]


def test_best_must_be_clear_of_noisy_competitors_too() -> None:
    rows = [row("a", 0.90, 0.01), row("b", 0.85, 0.01), row("c", 0.80, 0.20)]
    assert judge.verdicts(UP, rows) == ["tie", "", "tie"]


def test_teacher_and_start_do_not_compete() -> None:
    rows = [row("t", 0.99, 0.01, "teacher"), row("s", 0.98, 0.01, "start")]
    rows += [row("a", 0.8, 0.01), row("m", 0.7, 0.01, "main")]
    assert judge.verdicts(UP, rows) == ["", "", "best", ""]


@pytest.mark.parametrize("stderr", [None, math.nan, math.inf, -1.0])
def test_unknown_errors_allow_no_verdict(stderr: float | None) -> None:
    assert judge.verdicts(UP, [row("a", 0.9, 0.01), row("b", 0.1, stderr)]) == ["", ""]


def test_no_competition_without_two_figures_or_a_direction() -> None:
    pair = [row("a", 0.9, 0.01), row("b", 0.1, 0.01)]
    assert judge.verdicts(Column("acc", "Size"), pair) == ["", ""]
    assert judge.verdicts(UP, pair[:1]) == [""]
    assert judge.verdicts(UP, [pair[0], row("b", math.nan, 0.01), row("c", None, 0.0)]) == [""] * 3


# Answers


def test_answers_match_after_strip_and_lower() -> None:
    example = Example(None, "?", "Red", "colour", {"a": " RED\n", "b": "blue"})
    assert [judge.mark(example, name) for name in example.answers] == ["right", "wrong"]
    assert judge.disagreement(example) == 2


def test_a_rule_marks_even_what_is_no_match() -> None:
    example = Example(None, "?", "red", "caption", {"a": "It is red.", "b": "r", "c": "red"},
                      {"a": 1.0, "b": 0.3, "c": 0.0})
    assert [judge.mark(example, name) for name in "abc"] == ["right", "partly", "wrong"]
    assert judge.disagreement(example) == 2
    html = render(report(Section("S", examples=[example])))
    assert html.count("◐</span>") == 1
    assert "the benchmark" in html
    assert "exact match" not in html
    same = Example(None, "?", "red", "colour", {"a": "x", "b": "y"}, {"a": 0.0, "b": 0.0})
    assert judge.disagreement(same) == 0


def test_free_form_answers_are_not_marked() -> None:
    caption = Example(None, "?", "A dot", "Caption", {"a": "A dot", "b": "dots"})
    no_reference = Example(None, "?", " ", "colour", {"a": "red", "b": "blue"})
    assert [judge.mark(caption, "A dot"), judge.mark(no_reference, "red")] == ["", ""]
    assert [judge.disagreement(caption), judge.disagreement(no_reference)] == [0, 0]


def test_a_student_on_its_way_stands_between_before_and_after() -> None:
    example = Example(None, "?", "red", "colour", {"before": "x", "after": "red"},
                      progress={10: "blue", 30: "red", 20: "blue", 40: HOSTILE})
    other = Example(None, "first?", "red", "colour", {"before": "red", "after": "blue"})
    html = render(report(Section("S", examples=[other, example])))
    assert re.findall(r"<b>(.*?)</b>", html) == [
        "before", "steps 10 to 20", "step 30", "step 40", "after", "before", "after"]
    assert [html.count(f">{sign}</span>") for sign in "✓✗"] == [3, 4]
    assert "<script>alert" not in html and "evaluations in training.</span>" in html
    long = Example(None, "?", "red", "colour", {"after": "red"},
                   progress={step: str(step) for step in range(50)})
    html = render(report(Section("S", examples=[long])))
    assert len(re.findall(r"<b>step", html)) == page.MOST_STEPS
    assert f"{page.MOST_STEPS} at most; all are in results.json" in html


def test_disagreements_come_first() -> None:
    same = Example(None, "all agree", "1", "count", {"a": "1", "b": "1"})
    wrong = Example(None, "both wrong", "1", "count", {"a": "2", "b": "3"})
    split = Example(None, "one right", "1", "count", {"a": "1", "b": "3"})
    html = render(report(Section("S", examples=[same, wrong, split])))
    order = [html.index(example.prompt) for example in (split, wrong, same)]
    assert order == sorted(order)


def test_verdicts_of_pairs_overrule_the_errors() -> None:
    rows = [Row(name, "", {"acc": Figure(value, 0.5, verdict=verdict)}) for name, value, verdict in
            (("a", 0.9, "best"), ("b", 0.8, ""))]
    assert judge.verdicts(UP, rows) == ["best", ""]
    rows.append(Row("c", "", {}))
    assert judge.verdicts(Column("acc", "A"), rows) == ["best", "", ""]


# The page


def test_differences_show_their_interval_and_where_nothing_lies() -> None:
    column = Column("d", "Difference", "lower", "+.2f")
    rows = [Row(name, "", {"d": Figure(value, None, 9, value - 0.1, value + 0.1, "", mark,
                                       "p = 0.01")})
            for name, value, mark in (("a", -0.5, "better"), ("b", 0.4, "worse"), ("c", 0, "even"))]
    html = render(report(Section("S", tables=[Table("T", [column], rows, key="The key.")])))
    assert "\u22120.60 to \u22120.40" in html
    assert [html.count(f">{sign}</span>") for sign in "▲▼≈"] == [1, 1, 1]
    assert 'title="95 % interval, n = 9, p = 0.01"' in html
    assert html.count('class="zero" style="left:54.55%"') == 3
    assert "The key." in html
    assert "standard error" not in html


def test_a_distant_teacher_does_not_blur_the_others() -> None:
    rows = [row("t", 9.0, 0.01, "teacher"), row("a", 0.5, 0.05), row("b", 0.6, 0.05)]
    bars = [cell.bar for cell in page._cells(UP, rows)]
    assert bars[0] is None
    assert (bars[1].low, bars[2].high) == (0.0, 100.0)


def test_tables_can_be_sorted_and_say_by_what() -> None:
    html = render(full_report())
    assert html.count("<table data-sortable>") == 1
    assert re.findall(r'data-sort="([\d.]+)"', html) == ["0.95", "0.4", "0.6", "0.7"]
    assert 'data-better="higher"' in html


def test_everything_is_escaped() -> None:
    figure = {"k": Figure(1.0, 0.1, 5)}
    table = Table(
        HOSTILE,
        [Column("k", HOSTILE, "higher", ".1f", HOSTILE, HOSTILE)],
        [Row(HOSTILE, "main", figure, HOSTILE)],
        HOSTILE,
    )
    curve = Curve(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: [(0, 1), (1, 2)]}, caption=HOSTILE)
    example = Example(png(), HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE * 20, "b": HOSTILE})
    section = Section(HOSTILE, [HOSTILE], [table], [curve], [example])
    html = render(Report(HOSTILE, [HOSTILE], [section], {HOSTILE: HOSTILE}, HOSTILE))
    assert "alert(" in html
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert html.count("<script") == 1


def test_rendering_is_deterministic() -> None:
    first, second = render(full_report()), render(full_report())
    assert first == second
    assert not re.search(r"<dc:date>|\d{4}-\d\d-\d\dT", first)


def test_nothing_is_loaded_from_outside() -> None:
    html = render(full_report())
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"<link|@import|url\((?!#)|src=\"(?!data:)", html)


def test_ids_are_unique_and_references_resolve() -> None:
    html = render(full_report())
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_only_our_own_script_may_run() -> None:
    html = render(full_report())
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    assert f"script-src '{page.csp_hash(script)}'" in html


def test_missing_figures_print_as_a_dash() -> None:
    values = [Figure(None), Figure(math.nan, 0.1), Figure(math.inf)]
    rows = [Row(f"r{i}", "", {"acc": figure}) for i, figure in enumerate(values)]
    rows.append(Row("absent", "", {}))
    html = render(report(Section("S", tables=[Table("T", [UP], rows)])))
    assert html.count('<span class="value">\u2013</span>') == 4
    assert not re.search(r"\b(nan|inf)\b", html)


def test_figures_show_their_error_and_their_n() -> None:
    html = render(full_report())
    assert "0.700" in html
    assert "± 0.010" in html
    assert "± 0.010 (standard error), n = 100" in html
    assert "n = 100." in html
    assert html.count(">★</span>") == 1


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.1234, ".1%", "12.3%"),
        (-0.5, ".2f", "\u22120.50"),
        (7.6, "d", "8"),
        (1234.0, ",.0f", "1,234"),
        (-0.3, ".0f", "0"),
        (-0.0, "+.1f", "0.0"),
    ],
)
def test_number_format(value: float, spec: str, text: str) -> None:
    assert page.number(value, spec) == text


def test_empty_parts_do_not_crash() -> None:
    tables = [Table("T", [], []), Table("T", [UP], []), Table("T", [], [row("a", 1.0, None)])]
    curves = [Curve("C", "x", "y", {}), Curve("C", "x", "y", {"a": []})]
    html = render(report(Section("Empty"), Section("S", [], tables, curves, [])))
    assert "Nothing was measured here." in html
    assert html.count("Nothing to draw.") == 2
    assert "A title" in render(Report("A title", [], []))


def test_long_answers_are_clipped_with_the_whole_in_the_tooltip() -> None:
    long = "word " * 200
    html = render(report(Section("S", examples=[Example(None, "?", "x", "c", {"a": long})])))
    assert f'title="{long.strip()}"' in html
    assert "…</span>" in html


def test_text_that_no_file_can_hold_is_cleaned() -> None:
    bad = "a\x00b\ud800c"
    curve = Curve(bad, bad, bad, {bad: [(0, 1), (1, 2)]})
    examples = [Example(None, bad, bad, bad, {bad: bad})]
    render(report(Section(bad, curves=[curve], examples=examples))).encode("utf-8")


# Charts


@pytest.mark.parametrize("log_y", [False, True])
def test_values_that_are_not_finite_leave_gaps(log_y: bool) -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (math.nan, 1.0), (3.0, 1e300), (4.0, 2)]
    curve = Curve("C", "x", "y", {"KL": points, "none": [(0.0, math.nan)]}, log_y)
    assert charts.left_out(curve) == 5
    assert "<path" in charts.draw(curve, palette.assign(report(Section("S", curves=[curve]))), "c")


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("y", [3.0, 1e-12, 0.0, -2.0])
def test_a_single_point_is_drawn_where_it_has_a_place(y: float, log_y: bool) -> None:
    curve = Curve("C", "x", "y", {"TAID": [(5.0, y)]}, log_y)
    svg = charts.draw(curve, palette.assign(report(Section("S", curves=[curve]))), "c")
    assert bool(svg) == (y > 0 or not log_y)


def test_charts_keep_text_as_text_and_follow_the_scheme() -> None:
    html = render(full_report())
    assert re.search(r"<text[^>]*>step</text>", html)
    assert "stroke: var(--s-taid)" in html
    assert "var(--muted)" in html


def test_thinning_keeps_the_ends_and_the_spikes() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234] = (1234.0, 9.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MAX_POINTS + 2
    assert points[1234] in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert charts.thin(points[:10]) == points[:10]


# Colours


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("TAID", "taid"),
        ("Reverse-KL", "rkl"),
        ("RKL", "rkl"),
        ("forward KL", "kl"),
        ("SFT", "sft"),
        ("warm_start", "start"),
        ("Teacher 7B", "teacher"),
        ("skewed", ""),
    ],
)
def test_known_names_have_their_colour(name: str, slot: str) -> None:
    assert palette.known_slot(name) == slot


def test_every_name_gets_its_own_style() -> None:
    names = ["TAID", "TAID, linear", "KL", *(f"method {i}" for i in range(20))]
    curve = Curve("C", "x", "y", {name: [(0, 1)] for name in names})
    styles = palette.assign(report(Section("S", curves=[curve])))
    assert len(set(styles.values())) == len(names)
    assert styles["TAID"] == palette.Style("taid")


def test_names_beyond_the_palette_repeat_a_style() -> None:
    curve = Curve("C", "x", "y", {f"method {i}": [(0, 1)] for i in range(70)})
    assert len(palette.assign(report(Section("S", curves=[curve])))) == 70


# Files


def test_write_report_writes_one_file(tmp_path: Path) -> None:
    path = write_report(full_report(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render(full_report())
    assert os.listdir(path.parent) == ["report.html"]


def test_a_failed_rendering_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    broken = Table("T", [Column("acc", "A", format="no such format")], [row("a", 1.0, None)])
    with pytest.raises(ValueError, match="format"):
        write_report(report(Section("S", tables=[broken])), path)
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_failed_replacement_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TaidError, match=r"report.html' could not be written: disk"):
        write_report(full_report(), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "report.html").mkdir()
    for path in (tmp_path / "file" / "report.html", tmp_path / "report.html"):
        with pytest.raises(TaidError, match=rf"'{path}' could not be written: "):
            write_report(full_report(), path)
    assert sorted(os.listdir(tmp_path)) == ["file", "report.html"]


def test_json_is_strict() -> None:
    rows = [row("a", math.nan, None)]
    section = Section("S", [], [Table("T", [UP], rows)], [], full_report().sections[0].examples)
    data = json.loads(as_json(report(section)))
    assert data["sections"][0]["tables"][0]["rows"][0]["values"]["acc"]["value"] is None
    assert data["sections"][0]["examples"][0]["image"].startswith("iVBOR")


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_can_be_read(scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn, on every ground that a page has."""
    css = page.stylesheet()
    colours = [re.findall(rf"--{name}: *(#[0-9a-f]{{6}})", css)[scheme] for name in (
        "ink", "soft", "muted", "good", "bad", "s-taid")]
    grounds = [re.findall(rf"--{name}: *(#[0-9a-f]{{6}})", css)[scheme] for name in (
        "paper", "panel", "tint")]
    worst = min((contrast(text, ground), text, ground) for text in colours for ground in grounds)
    assert worst[0] >= 4.5, worst
    for slot, pair in palette.SLOTS.items():
        assert contrast(pair[scheme], grounds[0]) >= 2.9, slot
    assert "opacity: 0.75" not in css  # of a small text, which the colours do not know of


def test_no_head_of_a_table_is_empty() -> None:
    html = render(report(Section("Figures", tables=[Table("t", [Column("kl", "KL")], [
        Row("a", "main", {"kl": Figure(1.0)})])])))
    heads = re.findall(r"<th[^>]*>(.*?)</th>", html, re.DOTALL)
    assert heads and all(re.sub(r"<[^>]*>", "", head).strip() for head in heads)


def test_a_pointer_reads_the_values_of_a_curve() -> None:
    points = [(float(x), 1.0 / (x + 1)) for x in range(5)]
    html = render(report(Section("Curves", curves=[
        Curve("KL", "step", "nats", {"student": points, "held-out": points[-1:]})])))
    for text in ("student: 1 at 0", "student: 0.3333 at 2", "held-out: 0.2 at 4",
                 "student: last 0.2 at 4"):
        assert html.count(f"<title>{text}</title>") == 1, text
