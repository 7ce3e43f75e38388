"""Suites: lm-eval tasks with the shots and the figure that a leaderboard averages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One task of a suite.

    Args:
        task: lm-eval's task or group.
        title: as it stands in a table.
        num_fewshot: solved examples before every question.
        figure: which of lm-eval's figures the suite averages.
        fewshot_split: where the examples are drawn from. None leaves it to the task; naming the
            task's own training split is not the same, for lm-eval then draws one example fewer.
    """

    task: str
    title: str
    num_fewshot: int
    figure: str
    fewshot_split: str | None = None


# Shots and splits: lm_eval/tasks/benchmarks/openllm.yaml. Of TruthfulQA's three tasks and GSM8K's
# two filters, the leaderboard showed these.
SUITES: dict[str, tuple[Member, ...]] = {
    "openllm": (
        Member("arc_challenge", "ARC", 25, "acc_norm", "train"),
        Member("hellaswag", "HellaSwag", 10, "acc_norm", "train"),
        Member("mmlu", "MMLU", 5, "acc"),
        Member("truthfulqa_mc2", "TruthfulQA", 0, "acc"),
        Member("winogrande", "Winogrande", 5, "acc", "train"),
        Member("gsm8k", "GSM8K", 5, "exact_match,strict-match"),
    ),
}


def member_of(task: str) -> Member | None:
    """How a suite sees a task; None for a task of no suite."""
    found = (member for suite in SUITES.values() for member in suite if member.task == task)
    return next(found, None)
