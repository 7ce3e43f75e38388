"""Every kind of page in a browser: read by axe-core light and dark, on a desk and on a phone; used
by pointer and keyboard; and as it is without its script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, axe_source
from cli.conftest import checkpoints, quiet_session  # noqa: F401
from cli.recipes import Checkpoints
from compare.made import answers, distillation, evaluation, tally
from doctor.patients import Patient
from test_report import HOSTILE, png

from taid_vlm.compare import compare_runs, comparison_report, read_method, read_reference
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.demo.arms import WORLDS
from taid_vlm.demo.page import demo_report
from taid_vlm.doctor.page import render as render_inspection
from taid_vlm.evaluation.answers import read_answers
from taid_vlm.records import ImageRef
from taid_vlm.report import Report, render
from taid_vlm.report.run import run_report
from taid_vlm.runs.results import Results, read_results

LONG = 22  # categories, more rows than a table shows without tools
STEPS = [*range(10, 310, 10)]
ALIGNMENT = {"case": "c", "reason": "tokenizers differ", "warnings": ["Few tokens are shared."]}
LOOK = {"n_tokens": 90, "n_records": 12, "without_partner": 1, "kl_blank": 0.8,
        "kl_blank_stderr": 0.1, "gain_blank": 0.2, "gain_blank_stderr": 0.1}


def history() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 2 / step, "kl": 3 / step, "agreement": 0.5 + step / 900,
         "t": 0.4 + step / 600,
         **({"answer_tokens_per_second": 900.0 + step / 40} if step > 150 else {}),
         "learning_rate/tower": 1e-5, "learning_rate/decoder": 1e-4} for step in STEPS]
    return [*rows, *({"step": step, "eval_kl": 4 / step, "eval_agreement": 0.6}
                     for step in (100, 200, 300))]


def vlm(folder: Path) -> Report:
    """Of a run with pictures, many categories and texts that would like to be more than that."""
    examples = [{"source": f"eval.jsonl:{i}", "turn": 0, "category": HOSTILE if i == 2 else "odd",
                 "prompt": f"what? {HOSTILE if i == 1 else ''}", "reference": "red",
                 "answers": {"teacher": "red " * 90, "before": HOSTILE, "after": "red"},
                 "progress": {100: HOSTILE, 200: "red", 300: "red"} if i == 0 else {}}
                for i in range(3)]
    path = distillation(
        folder / "vlm", 0.6, history=history(), examples=examples, alignment=ALIGNMENT,
        models__student__name=f"lab/student {HOSTILE}", memory__peak_device_bytes=2**33,
        canary={"teacher": LOOK, "student": {"before": LOOK, "after": LOOK},
                "warnings": ["The student may be blind."]})
    results = read_results(path / "results.json")
    tree = results.model_dump(by_alias=True)
    after = [*answers(0.6, 17)]
    many = [type(a)(a.source, a.turn, f"kind {i % LONG}", a.tokens, a.totals)
            for i, a in enumerate(after)]
    tree["eval"]["after"]["by_category"] = {
        name: part | {"n_answers": 3} for name, part in tally(many)["by_category"].items()}
    return run_report(Results.model_validate(tree), [ImageRef(png(), "a"), None, None],
                      "seed: 1\n", read_answers(path / "eval_answers.jsonl"))


def text(folder: Path) -> Report:
    """Of a run without a teacher, whose gap there is none of."""
    path = distillation(folder / "text", objective="ce")
    tree = read_results(path / "results.json").model_dump(by_alias=True)
    del tree["models"]["teacher"]
    for moment in tree["eval"].values():
        for part in (moment, *moment["by_category"].values()):
            for key in [k for k in part if k.startswith(("kl", "reverse", "jsd", "agree", "teach",
                                                         "head", "tail"))]:
                del part[key]
    return run_report(Results.model_validate(tree), [None], "seed: 1\n")


GAINS = {"SFT": 0.2, "KL": 0.4, "a long name of a method": 0.5, "TAID": 0.7}


def several(folder: Path, *names: str) -> Any:
    arguments = []
    for name, gain in [(name, GAINS[name]) for name in names]:
        run = distillation(folder / name, gain, alignment=ALIGNMENT, history=history())
        scores = [float((i * 7) % 10 < 10 * gain) for i in range(50)]
        arguments.append(f"{name}={run},{evaluation(folder / f'{name} e', scores, 'questions')}")
    ends = [evaluation(folder / name, [1.0] * right + [0.0] * (50 - right), "questions")
            for name, right in (("t", 48), ("b", 5))]
    return compare_runs([read_method(a) for a in arguments], read_reference(TEACHER, ends[0]),
                        read_reference(BASE, ends[1]))


def demo(comparison: Any) -> Report:
    facts = {"seed": 0, "real": False, "seconds": 60.0, "cpu_seconds": 90.0,
             "memory": {"largest_worker_rss_bytes": 2**30}, "machine": {"device": "cpu"}}
    return demo_report([(world, comparison) for world in WORLDS],
                       {world.name: {} for world in WORLDS}, facts)


def inspection(folder: Path, models: Checkpoints) -> str:
    patient = Patient(folder, models, lambda *_: None)  # type: ignore[arg-type,return-value]
    rows = [{**row, "completion": f"a naïve {HOSTILE} one"} for row in patient.pictures()]
    rows.append({"prompt": "no answer", "completion": ""})
    recipe = patient.recipe(models("qwen3_vl"), models("smolvlm", "other"), rows)
    return render_inspection(patient.inspect(recipe, everything=True))


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints  # noqa: F811
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    html = {"run": render(vlm(folder)), "text": render(text(folder)),
            "compare": render(comparison_report(several(folder / "compare", *GAINS))),
            "demo": render(demo(several(folder / "demo", "SFT", "TAID"))),
            "inspect": inspection(folder, checkpoints)}
    for name, page in html.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in html}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def test_every_page_says_first_whose_it_is_and_how_it_came_out(pages: dict[str, Path]) -> None:
    html = {name: page.read_text(encoding="utf-8") for name, page in pages.items()}
    first = {name: re.search(r"<title>(.*?)</title>.*?<(?:li|h1 class=\"headline\")>?(.*?)<", text,
                             re.DOTALL) for name, text in html.items()}
    said = {name: match.groups() for name, match in first.items() if match}
    for name, (title, lead) in {
        "run": (r".* distilled from big by taid", r"\d+ % \[\d+, \d+\] of the gap to the teacher"),
        "text": (r"small fine-tuned by ce",
                 r"Held-out NLL of the data went from \d\.\d+ to \d\.\d+ nats"),
        "compare": (r"SFT, KL, a long name of a method and TAID, compared",
                    r"This student against"),
        "demo": (r"TAID on two small worlds", r"[^:]+: This student against"),
        "inspect": (r"qwen3_vl-plain-0 and smolvlm-other-0: chunks",
                    r"This pair can be distilled"),
    }.items():
        assert re.match(title, said[name][0]) and re.match(lead, said[name][1]), said[name]
    assert "answer tokens/s (median)" in html["run"] and "GiB on the device" in html["run"]
    assert "throughput" in html["compare"] and "peak memory" in html["compare"]
    assert "Tied" not in html["run"] and "★" not in html["run"]  # categories do not compete


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["run", "text", "compare", "demo", "inspect"])
def test_axe_finds_nothing(
    name: str, width: int, pages: dict[str, Path], browser: Browser
) -> None:
    """By every rule, and by those that look at colours and sizes once more for the dark and for
    the phone."""
    axe = axe_source()
    browser.open(pages[name], width)
    rules = () if width == 1280 else ("color-contrast", "scrollable-region-focusable")
    assert browser.violations(axe, *rules) == []
    assert browser.ask("document.documentElement.scrollWidth") == width
    browser.show("dark")
    assert browser.ask("matchMedia('(prefers-color-scheme: dark)').matches")
    assert browser.violations(axe, "color-contrast") == []
    assert browser.problems == []


READ = """Object.fromEntries([...document.querySelectorAll('[data-axis=step]')].map(plot => [
    plot.getAttribute('aria-label'), [plot.getAttribute('aria-valuetext'),
                                      plot.nextElementSibling.textContent]]))"""


def test_values_are_read_in_all_charts_at_once(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["run"])
    ends = {title: said for title, (_, said) in browser.ask(READ).items()}
    assert ends["Interpolation t"] == "step 300: student: 0.9"  # before anyone has pointed
    assert len(ends) == 6
    x, y = browser.ask("(() => { const mark = document.querySelector('[data-x=\"150\"]');"
                       "mark.scrollIntoView({block: 'center', behavior: 'instant'});"
                       "const box = mark.getBoundingClientRect();"
                       "return [box.x + box.width / 2, box.y + box.height / 2]; })()")
    browser.point(x, y + 9)
    said = browser.ask(READ)
    assert all(spoken == shown for spoken, shown in said.values())
    assert said["KL(teacher ‖ student)"][0] == \
        "step 150: student: 0.02 · held-out: 0.04 at 100"  # the evaluation that is nearest
    assert said["Interpolation t"][0] == "step 150: student: 0.65"
    assert said["Throughput"][0] == "step 160: student: 904"  # not logged before
    lines = browser.ask("[...document.querySelectorAll('.cursor')].map(x => x.getBBox().height)")
    assert len(lines) == 6 and min(lines) > 100
    seen = browser.ask("[...document.querySelectorAll('[data-axis=step] [data-x]')].filter("
                       "x => getComputedStyle(x).fillOpacity > 0).length")
    assert seen == sum(1 + spoken.count(" · ") for spoken, _ in said.values())
    browser.point(1, 1)
    assert {title: shown for title, (_, shown) in browser.ask(READ).items()} == ends


def test_charts_are_read_by_keys(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["run"])
    plot = "document.querySelectorAll('[data-axis=step]')[0]"
    browser.ask(f"{plot}.focus({{preventScroll: true}})")
    for key, step in (("ArrowLeft", 290), ("Home", 10), ("ArrowLeft", 10), ("ArrowRight", 20),
                      ("End", 300)):
        browser.press(key)
        now = browser.ask("[...document.querySelectorAll('[data-axis=step]')].map("
                          "plot => plot.getAttribute('aria-valuenow'))")
        assert set(now) == {str(step)}, key
    browser.press("Tab")
    assert browser.ask(f"document.activeElement === {plot.replace('[0]', '[1]')}")


def test_charts_over_one_axis_have_the_same_ends(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["run"], script=False)
    places = browser.ask("[...document.querySelectorAll('[data-axis=step] svg')].map(svg => {"
                         "const frame = svg.querySelector('[data-frame]').getBBox();"
                         "const mark = svg.querySelector('[data-x=\"200\"]');"
                         "return (mark.getAttribute('x') - frame.x) / frame.width; })")
    assert len(places) == 6
    assert max(places) - min(places) < 1e-3  # throughput begins later and ends where all do


def test_only_long_tables_have_tools(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["run"])
    table = "[...document.querySelectorAll('table')].find(t => t.tBodies[0].rows.length > 20)"
    tools = browser.ask("[...document.querySelectorAll('table')].map(t => [t.rows.length - 1 > 20,"
                        "t.querySelectorAll('.sort').length, t.closest('figure').querySelectorAll("
                        "'input[type=search]').length])")
    assert {bool(buttons) for long, buttons, _ in tools if long} == {True}
    assert all((buttons > 0, fields) == (long, int(long)) for long, buttons, fields in tools)

    def names(shown: str = "!row.hidden") -> list[str]:
        return browser.ask(f"[...{table}.tBodies[0].rows].filter(row => {shown}).map("
                           "row => row.cells[0].textContent.trim())")

    def column(number: int) -> list[float]:
        return browser.ask(f"[...{table}.tBodies[0].rows].map(row => Number("
                           f"row.cells[{number}].dataset.sort))")

    given = names()
    assert len(given) == LONG
    browser.ask(f"{table}.querySelectorAll('.sort')[1].focus()")
    for order in ("ascending", "descending", None):  # of a figure that is better when lower
        browser.press("Enter")
        heads = browser.ask(f"[...{table}.tHead.rows[0].cells].map(x => x.ariaSort)")
        assert heads == [None, order, *[None] * (len(heads) - 2)]
        figures = column(1)
        assert figures == sorted(figures, reverse=order == "descending") or order is None
    assert names() == given
    browser.ask(f"{table}.querySelector('.sort').focus()")
    browser.press("Enter")
    assert names() == sorted(given, key=lambda name: int(name.split()[1]))
    browser.ask(f"{table}.closest('figure').querySelector('input').focus()")
    browser.press(*"KIND 1")
    assert sorted(names()) == sorted(name for name in given if name.startswith("kind 1"))
    assert f"of {LONG} rows" in browser.ask(f"{table}.closest('figure').querySelector("
                                            "'output').textContent")


def test_without_a_script_everything_is_there(pages: dict[str, Path], browser: Browser) -> None:
    for page in pages.values():
        browser.open(page, script=False)
        assert browser.ask("document.querySelectorAll('.sort, input').length") == 0
        hidden = browser.ask("[...document.querySelectorAll('tr, .card, figure')].filter("
                             "x => !x.getBoundingClientRect().height).length")
        assert hidden == 0
        assert browser.ask("document.querySelectorAll('.reading:not([hidden])').length") == 0


def test_paper_is_white(pages: dict[str, Path], browser: Browser) -> None:
    for page in pages.values():
        browser.open(page)
        browser.show("dark", media="print")
        ink, cell = browser.ask("[document.body, document.querySelector('td')].map("
                                "x => getComputedStyle(x).color)")
        assert all(max(map(int, colour[4:-1].split(","))) < 110 for colour in (ink, cell))
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
