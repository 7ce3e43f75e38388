"""The lines that ask for an answer's form, as the benchmarks' own prompts end."""

from __future__ import annotations

SHORT_LINE = "Answer the question using a single word or phrase."
LETTER_LINE = "Answer with the option's letter from the given choices directly."
