"""The table in Markdown, of nothing but what the JSON beside it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.common import markdown_table

from real_pairs.plan import METHODS, PAIRS
from real_pairs.results import CATEGORIES, COMPARED, RIVALS, open_by_block

HEADS = {"kl": "KL", "reverse_kl": "reverse KL", "agreement": "agreement",
         "nll": "NLL of the references"}
HIGHER = ("agreement",)
KINDS = {"gsm8k": "gsm8k's answers", "text": "plain text (plays)", "prompts": "prompts"}
READING = """\
Figures are of test records, per answer token (plain text: per token), against the live teacher,
whatever a student was trained on: KL(teacher ‖ student) and KL(student ‖ teacher) in nats,
agreement of the most likely token, and the negative log-likelihood of the references. In brackets
are 95 % intervals of a mean over seeds: of the seeds' error and the records', with Student's t of
as many seeds, and of as many records. Differences are paired by seed and by record. A method
**wins** or **loses** where the whole interval of a difference is on one side of zero, and ties
otherwise; nothing is corrected for the number of comparisons, and intervals of three seeds are
wide: a tie is not equality."""
Document = Mapping[str, Any]


def markdown(document: Document) -> str:
    return "\n\n".join(_page(document)) + "\n"


def _page(document: Document) -> Iterator[str]:
    yield "# Objectives on real models"
    yield f"```bash\n{document['command']}\n```"
    yield _conditions(document)
    yield READING
    for account in document["blocks"].values():
        if account["methods"]:
            yield from _block(document, account)
    yield from _rates(document["rates"], document["candidates"])
    yield from _again(document["again"])
    yield from _open(document)


def _conditions(document: Document) -> str:
    found, settings = document["conditions"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"On a CPU ({found['processor']}), {found['threads']} thread(s), "
        f"{'bf16 mixed precision' if settings['bf16'] == 'True' else 'float32'}; {versions}. "
        f"The teacher is {settings['teacher']}, its hidden states cached in bfloat16 "
        "where nothing else is said; the student is the teacher without some of its layers, "
        f"with no other training before. A seed draws {settings['batch']} records a step from "
        f"{settings['pool']} of at most {settings['characters']} characters and orders them; rates "
        f"were chosen among {', '.join(document['candidates'])} for every method alike, by "
        f"KL and reverse KL together on {settings['validation']} other records after a fifth of "
        "the steps, by one other seed: after so few a choice can be wrong for all of them, so KL "
        f"and TAID are also given each other's. Tested on {settings['test']} records of gsm8k's "
        f"test split and {settings['elsewhere']} of each other kind of text, which no arm but "
        "plain text's was trained on.")


# ----- a block ------------------------------------------------------------------------------


def _block(document: Document, account: Document) -> Iterator[str]:
    pair, methods = account["pair"], account["methods"]
    own = PAIRS[pair].data
    yield f"## {account['title']}"
    yield (f"Student: {PAIRS[pair].title}; {account['steps']} steps, {document['seeds']} seeds. "
           f"{_untrained(document['before'].get(pair, {}), own)}")
    yield markdown_table(("objective", "rate", *HEADS.values()), (
        (METHODS[name].title, f"{method['rate']:g}",
         *(_interval(method["figures"][own][figure]) for figure in COMPARED))
        for name, method in methods.items()))
    for rival in RIVALS:
        against = {name: method["against"][rival] for name, method in methods.items()
                   if rival in method["against"]}
        if against:
            yield f"Less {METHODS[rival].title} ({KINDS[own]}):"
            yield markdown_table(("objective", *HEADS.values()), (
                (METHODS[name].title, *(_verdict(difference[own][figure], figure)
                                        for figure in COMPARED))
                for name, difference in against.items()))
    others = [kind for kind in CATEGORIES if kind != own]
    yield "On text of other kinds, mean ± standard error over seeds:"
    yield markdown_table(("objective", *(f"{HEADS[figure]}, {KINDS[kind]}" for kind in others
                                 for figure in ("kl", "nll"))), (
        (METHODS[name].title, *(_mean(method["figures"][kind][figure]) for kind in others
                                for figure in ("kl", "nll")))
        for name, method in methods.items()))


def _untrained(figures: Document, category: str) -> str:
    if not figures:
        return ""
    own = figures[category]
    return (f"Before training: KL {own['kl']:.3f}, agreement {own['agreement']:.3f}, over "
            f"{own['n_tokens']:,} tokens of {own['n_answers']} records, of which the teacher's own "
            f"NLL is {own['teacher_nll']:.3f}.")


def _interval(pooled: Document, sign: str = "") -> str:
    """The JSON has null where an end is not known."""
    low, high = pooled["low"], pooled["high"]
    if low is None or high is None:
        return f"{pooled['value']:{sign}.3f}"
    return f"{pooled['value']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _mean(pooled: Document) -> str:
    return f"{pooled['value']:.3f} ± {pooled['over_seeds']:.3f}"


def _verdict(pooled: Document, figure: str) -> str:
    return f"{_interval(pooled, '+')} {verdict(pooled, figure)}"


def verdict(pooled: Document, figure: str) -> str:
    if pooled["low"] <= 0 <= pooled["high"]:
        return "ties"
    return "**wins**" if (pooled["low"] > 0) == (figure in HIGHER) else "**loses**"


# ----- what else there is to say ------------------------------------------------------------


def _rates(
    rates: Mapping[str, Mapping[str, float]], columns: Sequence[str]
) -> Iterator[str]:
    if not rates:
        return
    yield "## Learning rates"
    yield ("KL and reverse KL together on validation records; the lowest was taken (**bold**), at "
           "the end of the row perhaps not the best there is.")
    rows = []
    for name, tried in rates.items():
        pair, method = name.split("/")
        best = min(tried, key=lambda rate: tried[rate])
        cells = [f"{tried[rate]:.3f}" if rate in tried else "" for rate in columns]
        rows.append((pair, METHODS[method].title, *(
            f"**{cell}**" if rate == best and len(tried) == len(columns) else cell
            for rate, cell in zip(columns, cells, strict=True))))
    yield markdown_table(("student", "objective", *columns), rows)


def _again(again: Document | None) -> Iterator[str]:
    if again is not None:
        apart = ", ".join(f"{HEADS[name]} {value:.1e}" for name, value in again["figures"].items())
        yield "## The same once more"
        yield (f"{again['arm']} carried out a second time: its logged losses are at most "
               f"{again['losses']:.1e} from the first ones; figures: {apart}.")


def _open(document: Document) -> Iterator[str]:
    left = list(open_by_block(document))
    if left:
        yield "## Not run"
        yield ("The same command goes on with these arms (those that choose a rate included); "
               "nothing above says anything of them:\n\n" + "\n".join(
                   f"- {title}: {arms} of {all_arms} arms" for title, arms, all_arms in left))
