"""Thoughts are taken off answers by named rules, as families of models write them."""

from __future__ import annotations

import pytest

from taid_vlm.benchmarks.metrics.thoughts import (
    AUTO,
    KEEP,
    MARKS,
    RULES,
    rule_version,
    take_off_thoughts,
    taken_by,
)
from taid_vlm.errors import TaidError

WRITTEN = [  # as models write it, the rule that reads it, the answer, the thought
    ("<think>It is red.</think>\n\nB", "think", "B", "It is red."),
    ("<think>\n\n</think>\n\n14", "think", "14", ""),
    ("It is red.\n</think>\n\nB", "think", "B", "It is red."),  # the prompt holds <think>
    ("<think>a <think> in it</think> B", "think", "B", "a <think> in it"),
    ("<think>a</think> more </think> B", "think", "B", "a\n\nmore"),
    ("<think>a</think>A<think>b</think>B", "think", "B", "a\n\nb"),
    ("B\n<think>because</think>", "think", "B", "because"),
    ("<think>a</think>\n\nB\n<think>no, wait", "think", "B", "a\n\nno, wait"),
    ("<think>a</think>\n<answer>B</answer>", "think", "B", "a"),
    ("<think>a</think><|begin_of_box|>B<|end_of_box|>", "think", "B", "a"),
    ("<thinking>a</thinking>B", "thinking", "B", "a"),
    ("<Thought>a</Thought>\n<Output>B</Output>", "thought", "B", "a"),
    ("<SUMMARY>x</SUMMARY> <REASONING>a</REASONING> <CONCLUSION> B </CONCLUSION>", "reasoning",
     "B", "a"),
    ("<seed:think>a</seed:think>B", "seed-oss", "B", "a"),
    ("◁think▷a◁/think▷B", "kimi-vl", "B", "a"),
    ("[THINK]a[/THINK]B", "magistral", "B", "a"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>B"
     "<|return|>", "gpt-oss", "B", "a"),
    ("<|channel|>analysis<|message|>aassistant<|channel|>final<|message|>B", "gpt-oss", "B", "a"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final "
     "<|constrain|>json<|message|>B", "gpt-oss", "B", "a"),
    ("analysisWe look.assistantfinalB", "gpt-oss", "B", "We look."),
    ("<|channel|>final<|message|>B", "gpt-oss", "B", ""),
    ("<|channel>thought\na<channel|>B", "gemma-4", "B", "a"),
    ("<|channel>thought\n<channel|>B", "gemma-4", "B", ""),
    ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|>", "cohere", "B", "a"),
    ("<|inner_prefix|>a<|inner_suffix|>B", "apertus", "B", "a"),
    ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>B<|end_of_solution|>",
     "sky-t1", "B", "a"),
    ("Here is my thought process: a Here is my response: B", "granite-3.2", "B", "a"),
    ("## Thinking\n\na\n\n## Final Response\n\nB", "huatuo-o1", "B", "a"),
]


@pytest.mark.parametrize(("text", "rule", "answer", "thought"), WRITTEN)
def test_what_families_write(text: str, rule: str, answer: str, thought: str) -> None:
    assert take_off_thoughts(text) == (answer, thought, False)
    assert taken_by(text) == (rule, (answer, thought, False)) == taken_by(text, rule)


def test_every_rule_is_met_above() -> None:
    assert {rule for _, rule, _, _ in WRITTEN} == set(RULES)


@pytest.mark.parametrize("text", [
    "<think>It is red, so", "<think>", "<|channel|>analysis<|message|>It is red",
    "analysisWe look", "<|channel>thought\nIt is", "[THINK]It is", "\n<thinking>\nIt is"])
def test_an_answer_cut_inside_its_thought_is_none(text: str) -> None:
    answer, thought, cut = take_off_thoughts(text)
    assert (answer, cut) == ("", True)
    assert thought == "" or thought in text


def test_the_prompt_may_have_opened_the_thought() -> None:
    assert take_off_thoughts("It is red, so", opened=True) == ("", "It is red, so", True)
    assert take_off_thoughts("It is red.</think>B", opened=True) == ("B", "It is red.", False)
    assert take_off_thoughts("It is red, so") == ("It is red, so", "", False)


@pytest.mark.parametrize("text", [
    "B", "", "analysis of the chart shows B", "The sign says <think>.", "I think</b> so",
    "an answer <answer>", "thought\nB"])
def test_an_answer_without_a_thought_stays(text: str) -> None:
    assert taken_by(text) == ("", (text, "", False))


def test_rules_can_be_chosen() -> None:
    text = "<think>a</think>B"
    assert take_off_thoughts(text, KEEP) == (text, "", False)
    assert take_off_thoughts(text, "magistral") == (text, "", False)
    with pytest.raises(TaidError, match=r"--thoughts thnk: there is no such rule.*think"):
        take_off_thoughts(text, "thnk")
    assert [rule_version(rule) for rule in (AUTO, KEEP, *RULES)] == [1] * (2 + len(RULES))


def test_marks_are_what_the_rules_read() -> None:
    for mark in MARKS:
        assert any(mark.lower() in text.lower() for text, *_ in WRITTEN), mark


def test_long_thoughts_are_read_at_once() -> None:
    """No rule takes more than time in proportion to the text."""
    text = "<think>" + "so <think> it is <answer> Here is analysis " * 20_000 + "</think>B"
    assert take_off_thoughts(text).answer == "B"
    assert take_off_thoughts("so <think> it is " * 100_000).thought == ""
