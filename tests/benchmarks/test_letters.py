"""Reading an option out of an answer: tables checked by hand, broken answers, and time."""

import random
import time

import pytest

from taid_vlm.benchmarks.metrics import letters
from taid_vlm.benchmarks.metrics.letters import (
    LETTERS,
    lmms_blink_option,
    lmms_full_stop_option,
    lmms_mmbench_option,
    lmms_option,
    lmms_scienceqa_option,
    mmstar_option,
    read_option,
    vlmevalkit_option,
)

READERS = (read_option, vlmevalkit_option, lmms_option, lmms_mmbench_option, mmstar_option,
           lmms_full_stop_option, lmms_scienceqa_option, lmms_blink_option)
PETS = ("cat", "dog", "bird", "fish")
VITAMINS = ("vitamin C", "vitamin A", "both A and B", "none of the above")


@pytest.mark.parametrize(("answer", "wanted"), [
    # a letter and nothing else
    ("A", "A"), ("A.", "A"), ("(A)", "A"), ("**A**", "A"), ("a", "A"), (" b) ", "B"), ("[B]", "B"),
    ("'B'", "B"), ("__B__", "B"), ("`B`", "B"), ("$\\boxed{\\text{B}}$", "B"), ("\n\nD\n", "D"),
    # a phrase
    ("Answer: A", "A"), ("The answer is B because A is fuzzy.", "B"), ("the answer is b.", "B"),
    ("The correct option is (C).", "C"), ("So my answer is **C. bird**.", "C"),
    ("I choose option D", "D"), ("Final Answer: B", "B"), ("<answer>B</answer>", "B"),
    ("The answer is B. A is a cat.", "B"), ("Answer: B (A is wrong)", "B"),
    ("Perhaps the answer is A. No, on reflection the answer is C.", "C"),
    ("A and C both look like it, but B is the correct one", "B"),
    # a marked letter first
    ("B: dog", "B"), ("b) dog", "B"), ("(b) dog", "B"), ("A.cat", "A"),
    ("A. cat, for B is blurred", "A"), ("- B. dog", "B"),
    ("B because A is fuzzy", "B"), ("B, since there is no cat", "B"), ("A: The tail is short", "A"),
    # one letter alone
    ("I think it's B.", "B"), ("B dog", "B"), ("It must be (D) here", "D"), ("C C C C", "C"),
    ("Option A shows one, option B shows two, so (C)", None),
    # the text
    ("dog", "B"), ("A dog", "B"), ("A cat", "A"), ("The answer is A dog", "B"), ("DOG!", "B"),
    ("the answer is a fish", "D"), ("a black   dog", "B"), ("A cat is sitting there", "A"),
    ("hotdog", None), ("a cat and a dog", None), ("dogs", None),
    # negations: what follows "not" does not count
    ("It is not A.", None), ("Not A but C", "C"), ("A is wrong, B is right", "B"),
    ("the answer is A, not B", "A"), ("It isn't the dog, it is the cat", "A"),
    ("It cannot be B", None), ("I don't think it's B", None), ("I do not think that it is B", None),
    ("I don’t believe the answer is B. It's C.", "C"), ("It isn't the correct option (B)", None),
    ("I wouldn't say the right answer is B, it's A", "A"), ("I don't think it's the dog", None),
    ("I don't think A is right, so I choose B", "B"), ("I can't go wrong with B", "B"),
    ("It does not show a lamp, so it's B", "B"), ("I'm not sure, but I think B.", "B"),
    ("It is not clear because the answer is B", "B"), ("Why not? The answer is B", "B"),
    ("This is not A. It is B.", "B"), ("A is not the answer, B is", "B"),
    # "right" as a word of geometry
    ("The correct answer is (D), 0.96, where angle A is the right angle.", "D"),
    ("The answer is C: side A is right of side B", "C"), ("It's D. Corner B is right-angled", None),
    ("A is not on the left. B is right", "B"), ("(C) is the right one", "C"),
    ("B is right, since A is the right angle", "B"), ("B is right because it barks", "B"),
    # several letters and nothing that decides
    ("A B C D", None), ("A, B, C, D", None), ("Both A and B", None), ("A or B", None),
    ("option A or option B", None), ("Answer: A, B, C, D", None), ("ABCD", None),
    ("A. cat\nB. dog\nC. bird\nD. fish", None), ("A\nB\nC\nD", None),
    ("Answer: A\nAnswer: B\nAnswer: C\nAnswer: D", None), ("(A) (B)", None),
    # the letter says one thing and the text another
    ("Plan B shows the cat", None), ("B. The cat is not there", "B"),
    # no option, or nothing at all
    ("None", None), ("E", None), ("The answer is E", None), ("", None), (" \n", None),
    ("...", None), ("I cannot tell.", None), ("1", None), ("It has 25 °C", None), ("C++", None),
    ("C#", None),
    ("D's", None), ("9 A.M.", None), ("Washington D.C.", None), ("a T-shirt, size C-3", None),
    # other scripts
    ("Ａ", "A"), ("（Ｂ）", "B"), ("选B", "B"), ("答案：C", "C"), ("答案是C。", "C"),
    ("应该选择D", "D"), ("A.猫", "A"), ("A是正确的", "A"), ("정답은 B입니다", "B"),
    ("答えはBです", "B"), ("ⓑ", "B"), ("Ответ: B", "B"), ("La respuesta es B porque A no", "B"),
    ("А", None), ("这是一只狗", None),
])
def test_what_an_answer_takes(answer: str, wanted: str | None) -> None:
    assert read_option(answer, PETS) == wanted


@pytest.mark.parametrize(("answer", "choices", "wanted"), [
    ("vitamin A", VITAMINS, "B"), ("It shows Vitamin C.", VITAMINS, "A"),
    ("A. vitamin C", VITAMINS, "A"), ("C. both A and B", VITAMINS, "C"),
    ("Both A and B", VITAMINS, "C"), ("None of the above.", VITAMINS, "D"),
    ("None", VITAMINS, None),
    ("The answer is vitamin A", VITAMINS, "B"),
    ("a black cat", ("cat", "black cat"), "B"), ("the cat", ("cat", "black cat"), "A"),
    ("It is 10", ("1", "10"), "B"), ("1.5", ("1", "5"), None), ("about 3.", ("3", "4"), "A"),
    ("-5", ("5", "-5"), "B"), ("−5", ("5", "-5"), "B"), ("1,000 m", ("1", "1,000"), "B"),
    (".5", ("5", ".5"), "B"), ("+", ("-", "+"), "B"), ("B", ("B", "A"), "B"),
    ("a dog", ("A", "B"), None), ("it is y", ("x", "y"), "B"), ("I see B", ("B", "A"), None),
    ("这是一只狗", ("猫", "狗"), "B"),
    ("cat", ("cat", "cat"), None), ("B", ("cat", "cat"), "B"),
    ("Yes, it is.", ("Yes", "No"), "A"), ("It is not a dog", ("dog", "cat"), None),
    ("B", ("", "", "", ""), "B"), ("a cat", ("", "", "", ""), None), ("A", (), None),
    ("The answer is Z.", ("x",) * 26, "Z"), ("I think so", ("x",) * 26, None),
    ("I", ("x",) * 26, "I"), ("(I)", ("x",) * 26, "I"), ("I'm sure", ("x",) * 26, None),
    ("(.*", ("(.*", "[ab"), "A"), ("it is [ab", ("(.*", "[ab"), "B"),
])
def test_options_with_letters_numbers_and_signs(
    answer: str, choices: tuple[str, ...], wanted: str | None
) -> None:
    assert read_option(answer, choices) == wanted


def test_every_letter_of_26_is_read_in_every_form() -> None:
    choices = tuple(f"thing {number}" for number in range(26))
    for index, letter in enumerate(LETTERS):
        for form in ("{}", "{}.", "({})", "**{}**", "Answer: {}", "The answer is {}.", "选{}",
                     f"{{}}. thing {index}"):
            assert read_option(form.format(letter), choices) == letter, form
        assert read_option(f"That is thing {index}.", choices) == letter


@pytest.mark.parametrize(("reader", "answer", "wanted"), [
    (vlmevalkit_option, "A", "A"), (vlmevalkit_option, "(B).", "B"),
    (vlmevalkit_option, "A cat", "A"),  # the article, as there
    (vlmevalkit_option, "B is what I take from all of this", None),  # not among the last five
    (vlmevalkit_option, "it is a DOG", "B"), (vlmevalkit_option, "hotdog", "B"),
    (vlmevalkit_option, "dog " * 20, None),  # longer than twice the options
    (vlmevalkit_option, "a", None), (vlmevalkit_option, "A B", None),
    (vlmevalkit_option, "Cannot determine the answer: dog", None),
    (vlmevalkit_option, "Z dog", None),
    (lmms_mmbench_option, "A", "A"), (lmms_mmbench_option, "(B)", "B"),
    (lmms_mmbench_option, ":C", "C"), (lmms_mmbench_option, "A dog is what this is", "B"),
    (lmms_mmbench_option, "E", "E"), (lmms_mmbench_option, "**B**", None),
    (mmstar_option, "b", "B"), (mmstar_option, "(C) bird", "C"), (mmstar_option, "Option D", "D"),
    (mmstar_option, "The answer is A.", "A"), (mmstar_option, "Because", "B"),
    (mmstar_option, "It is A", None), (mmstar_option, "", None),
    (lmms_option, "The correct answer is (B).", "B"), (lmms_option, "Cat", "C"),
    (lmms_option, "A or B", "A"), (lmms_option, "(A) is not it. B", "B"), (lmms_option, "b", None),
    (lmms_option, "A. cat", "A"), (lmms_option, " ", None), (lmms_option, "정답은 D", "D"),
    (lmms_full_stop_option, "B. dog", "B"), (lmms_full_stop_option, "(b)", "B"),
    (lmms_full_stop_option, "B dog", None), (lmms_full_stop_option, "b. dog", None),
    (lmms_scienceqa_option, "b", "B"), (lmms_scienceqa_option, "B. dog", "B"),
    (lmms_scienceqa_option, "b. dog", None), (lmms_scienceqa_option, "(B)", None),
    (lmms_scienceqa_option, "dog", None),
])
def test_the_rules_of_others(reader, answer: str, wanted: str | None) -> None:
    """Worked out from the functions named in each rule's source."""
    assert reader(answer, PETS) == wanted


@pytest.mark.parametrize("reader", READERS)
def test_noise_never_reads_as_something_that_is_no_letter(reader) -> None:
    draw = random.Random(0)
    pieces = ["A", "B", "e", " ", "(", ")", "\n", "cat", "dog", "not ", "answer is ", "é", "狗",
              ".", ",", "\\boxed{", "\x00", "\u202e", "😀", "İ", "*", "选", "°", "`", "_"]
    for _ in range(3000):
        answer = "".join(draw.choices(pieces, k=draw.randrange(12)))
        read = reader(answer, PETS)
        assert read is None or read in "ABCDE", answer
        assert reader(answer, PETS) == read


@pytest.mark.parametrize("piece", [
    "A ", "(A) B ", "answer is ", "The answer is not a ", "((((", " ", "\n", "选", "_", "not ",
    "- ", "cat dog ", "\\boxed{", "the option "])
def test_long_answers_take_linear_time(piece: str) -> None:
    """Quadratic time would take minutes for 200,000 characters."""
    answer = piece * (200_000 // len(piece))
    for reader in READERS:
        since = time.perf_counter()
        reader(answer, PETS)
        assert time.perf_counter() - since < 5, reader.__name__


def test_options_that_no_answer_had_before_cost_little() -> None:
    """Every question has options of its own; 8 s if each of their texts were compiled with the
    classes of word characters."""
    since = time.perf_counter()
    for number in range(200):
        choices = tuple(f"the {number} {pet}s" for pet in PETS)
        assert read_option(f"I can see the {number} birds, not the {number} cats", choices) == "C"
    assert time.perf_counter() - since < 3


def test_a_long_answer_is_read_to_its_end() -> None:
    reasoning = "The picture shows many things, none of them clear. " * 4000
    assert read_option(reasoning + "So the answer is C.", PETS) == "C"
    assert read_option("B. dog\n" + reasoning, PETS) == "B"
    assert read_option(reasoning, PETS) is None


def test_every_reader_of_the_module_is_tested() -> None:
    found = {name for name in vars(letters) if name.endswith("_option")}
    assert found == {reader.__name__ for reader in READERS}
