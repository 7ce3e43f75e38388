"""Free answers to instructions, compared with references: the tests of MiniLLM and its line.

They sample at temperature 1 with five seeds (10, 20, 30, 40, 50) and report the mean.
"""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.rouge import ROUGE_L, words
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError


def read(row: Row) -> list[Question]:
    """From `prompt`, or `instruction` and `input`, and `output` or `references`."""
    references, images = _references(row), row.images("image", "images")
    return [Question(row.id("id", "idx", "question_id"), (*[None] * len(images), _prompt(row)),
                     images, references, tags=row.tags("category"))]


def _prompt(row: Row) -> str:
    if "prompt" in row or "instruction" not in row:
        return row.text("prompt")
    return "\n\n".join(row.text(column) for column in ("instruction", "input") if column in row)


def _references(row: Row) -> tuple[str, ...]:
    """All of them; raises RecordError without one, and for one that no answer could match."""
    if "output" not in row and "references" not in row:
        raise RecordError(f"{row.where}: no references, in a column 'output' or 'references' "
                          f"(found: {', '.join(sorted(row))}). ROUGE-L compares with them; "
                          "prompts alone, as those of Vicuna and MT-Bench, cannot be scored here.")
    value = row["references"] if "references" in row else row["output"]
    references = (value.strip(),) if isinstance(value, str) else row.golds("references", "output")
    for reference in (reference for reference in references if not words(reference)):
        raise RecordError(f"{row.where}: reference {reference!r:.60} has none of the letters a-z "
                          "and digits that ROUGE-L sees.")
    return references


BENCHMARK = Benchmark("open_ended", "Open-ended (ROUGE-L)", read, (ROUGE_L,), max_new_tokens=256)
