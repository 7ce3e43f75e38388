"""Reading which option an answer takes: A, B, C ..., or nothing; never a guess.

Every reader takes the answer and the texts of the options ("" where a text is not known) and
returns the option's letter, or None where the answer cannot be read.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from taid_vlm.benchmarks.rows import LETTERS

MOST_SAID = 2  # different options that phrases may name: a first thought and its correction
_FAR = 64  # characters: no sign that begins an answer and no list's comma is as long

# A word character of a script with spaces between words. Thai, Lao, kana, Han and Hangul stand
# right beside a Latin letter that is an option.
_WORD = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_WORD_CHARACTER, _NO_WORD_BEFORE, _NO_WORD_AFTER = map(
    re.compile, (_WORD, rf"(?<!{_WORD})", rf"(?!{_WORD})"))
_ALONE = re.compile(  # not within "T-shirt", "D's", "C++", "9 A.M.", "U.S.A", "20 °C"
    rf"(?<!{_WORD})(?<!\w[-'’+])(?<!\b[A-Za-z]\.)(?<!°)(?<!° )([A-Za-z])"
    rf"(?!{_WORD})(?![-'’]\w|[#+]|\.[A-Za-z](?![A-Za-z]))")
_MARKUP = re.compile(r"[*`$]|\b_+|_+\b|\\(?:boxed|text\w*|math\w+|left|right|[()\[\]])")
_AROUND = " \t\r\n.,:;!?()[]{}<>\"'“”‘’「」【】。、-–—"
_OPENING, _CLOSING = re.escape("([{<\"'“‘「【"), re.escape(")]}>\"'”’」】")
_WRAPPED = re.compile(rf"[{_OPENING}]\s?[A-Za-z]\s?[{_CLOSING}]")
_MARKED = re.compile(r"\s?[.:)\]】、]|\s[-–—]\s|\s*\n|\s*$|,?\s+(?:because|since|as|due to)\b")
# "A cat" and "I think": a letter only before a word that cannot follow an article or a pronoun
_ARTICLE = re.compile(
    r"[ \t]+(?!(?:is|was|because|since|as|for|and|or|but|so|due|based|seems|appears|would|should"
    r"|must|matches|fits|which|while|rather|not|then|therefore|the|this|that|it)\b)"
    rf"{_WORD}{{2}}", re.IGNORECASE)
_SAYS = re.compile(
    r"(?:\b(?:answer|option|choice|letter|selection|respuesta|réponse|resposta|risposta|antwort"
    r"|ответ)\b\W{0,3}(?:is|was|be|are|es|est|é|è|ist|[:=>])"
    r"|答案?(?:应该|應該|应|應)?(?:是|为|為|选|選|:)|答えは|选择?|選択?|정답은|답은|정답:|답:"
    r"|\b(?:choose|chose|select|pick|go with|answer with)\b)"
    r"(?:[\s:=>]|\b(?:clearly|definitely|therefore|probably|most likely|the|option|choice|letter"
    rf")\b|选项|選項|옵션)*[{_OPENING}]?\s?", re.IGNORECASE)
_IS_RIGHT = re.compile(
    rf"[{_CLOSING}]?\s+(?:is|must be|would be|should be)\s+(?:the\s+|clearly\s+|therefore\s+"
    r"|most\s+likely\s+)*(?:correct|best|answer|right(?![-/])(?!\s+(?!(?:answer|option|choice|one"
    r"|letter|because|since|as|for|and|but|so|here|based|given|according)\b)\w))\b",
    re.IGNORECASE)  # "angle A is the right angle" says nothing
_NOT = re.compile(
    r"(?:\b(?:not|cannot|nor|neither|never|except|without|than)|n['’]t|不是|不选|不選)"
    r"(?:\s+(?:be|(?-i:an?)|the|option|letter|think|believe|say|choose|pick|select|go\s+with|that"
    r"|it['’]?s?|this|is|was|(?:would|could|should|can)(?:\s+be)?|(?:correct|right|best)\s+option"
    r"|(?:(?:correct|right|best)\s+)?(?:answer|choice)\s+(?:is|was|would\s+be|should\s+be))\b)*+"
    rf"\s*[{_OPENING}]?", re.IGNORECASE)
_NOT_AFTER = re.compile(
    rf"[{_CLOSING}]?(?:\s+(?:is|was|are|can)(?:\s*not\b|n['’]t\b|\s+wrong\b|\s+incorrect\b)"
    r"|\s?(?:不是|不对|不對|不正确|不正確|错|錯))", re.IGNORECASE)
_JOINED = re.compile(
    r"\s+|\)?\s*(?:[,/&、]\s*)?(?:(?:and|or|和|或|及)\s*)?(?:option\s+)?\(?", re.IGNORECASE)


@dataclass(frozen=True)
class _Letter:
    """An option's letter that stands alone.

    marked: as one marks an option, "B." or "(b)". said: within a phrase that decides.
    """

    name: str
    start: int
    end: int
    marked: bool
    said: bool


def read_option(answer: str, choices: Sequence[str]) -> str | None:
    """The option an answer takes, whatever words and markup are around it.

    In this order: the whole answer is one letter, or one option's text; a phrase decides ("the
    answer is B", "B is correct", "选B"; the last one counts, since reasoning ends with its
    answer); it begins with a marked letter ("B. cat", "B because ..."); one letter stands alone
    in it, and no other option's text; one option's text occurs in it. The article of "A cat" is
    no letter, nor is a letter of an option's text ("vitamin C"). What follows "not" does
    not count, nor does what it is not thought to be ("I don't think it's B"); other negations are
    not understood. Everything else cannot be read.
    """
    text, letters = _plain(answer), LETTERS[:len(choices)]
    bare = text.strip(_AROUND)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    texts = [_plain(choice) for choice in choices]
    same = [index for index, choice in enumerate(texts) if _same(choice, text)]
    if same:
        return letters[same[0]] if len(same) == 1 else None
    hidden = _without_lettered(text, texts)
    found = list(_letters_of(hidden, letters))
    named = _texts_in(text, texts)
    if found:
        return _decided(hidden, found, {letters[index] for index in named})
    return letters[named.pop()] if len(named) == 1 else None


def _decided(text: str, found: Sequence[_Letter], named: set[str]) -> str | None:
    """The option that the letters found in a text agree on; `named` are those whose text occurs."""
    said = [letter.name for letter, after in zip(found, [*found[1:], None], strict=True)
            if letter.said and not _is_listed(text, letter, after)]
    if said:
        return said[-1] if len(set(said)) <= MOST_SAID else None
    first = found[0]
    others = [letter for letter in found if letter.name != first.name]
    if first.marked and _begins(text, first.start) and not any(x.marked for x in others):
        return first.name
    return first.name if not others and named <= {first.name} else None


def _is_listed(text: str, letter: _Letter, after: _Letter | None) -> bool:
    """Whether another option follows as in "A, B and C"."""
    return after is not None and after.name != letter.name and after.start - letter.end < _FAR \
        and _JOINED.fullmatch(text, letter.end, after.start) is not None


def _letters_of(text: str, letters: str) -> Iterator[_Letter]:
    """Letters that stand alone, are options, and are neither an article nor negated."""
    after_phrases, after_not = _ends(_SAYS, text), _ends(_NOT, text)
    for match in _ALONE.finditer(text):
        start, end, name = match.start(), match.end(), match[1].upper()
        if name not in letters or start in after_not or _NOT_AFTER.match(text, end):
            continue
        wrapped = _WRAPPED.match(text, max(0, start - 1)) is not None
        marked = wrapped or _MARKED.match(text, end) is not None
        said = start in after_phrases
        if match[1].islower() and not (wrapped or said or (marked and _begins(text, start))):
            continue
        if name in "AI" and not wrapped and _ARTICLE.match(text, end):
            continue
        said = said or _IS_RIGHT.match(text, end) is not None
        yield _Letter(name, start, end, marked, said)


def _ends(pattern: re.Pattern[str], text: str) -> set[int]:
    return {match.end() for match in pattern.finditer(text)}


def _begins(text: str, start: int) -> bool:
    """Whether only brackets and the like stand before a place."""
    return start < _FAR and not text[:start].strip(_AROUND)


def _plain(text: str) -> str:
    """Without markup and full-width forms: "**Ｂ**" and "\\boxed{B}" as "B" and "{B}"."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).replace("−", "-")).strip()


def _key(text: str) -> str:
    """What must be equal of two texts; the signs of "-5" and ".5" are part of them."""
    words = " ".join(text.lower().split())
    return words.lstrip(_AROUND.replace(".", "").replace("-", "")).rstrip(_AROUND)


def _same(choice: str, text: str) -> bool:
    """Whether an answer is an option's text, but for case, spaces and full stops around it."""
    return bool(choice) and (choice == text or _key(choice) == _key(text) != "")


def _without_lettered(text: str, texts: Sequence[str]) -> str:
    """Without option texts such as "vitamin C" or "both A and B", whose letters are no options."""
    keys = {_key(choice) for choice in texts if len(_key(choice)) > 1 and _ALONE.search(choice)}
    pieces, last = [], 0
    for start, end in _occurrences(keys, text):
        pieces.append(text[last:start])
        last = end
    return "\0".join([*pieces, text[last:]])


def _texts_in(text: str, texts: Sequence[str]) -> set[int]:
    """Options whose text occurs: the longest at each place, as words, and not after "not"; "a"
    and "I" are words of every text."""
    keys = [_key(choice) for choice in texts]
    negated = {place for match in _NOT.finditer(text)  # "the" of an option's own, too
               for place in range(match.start() + 1, match.end() + 1)}
    found = {_key(text[start:end]) for start, end in _occurrences({*keys} - {"", "a", "i"}, text)
             if start not in negated}
    return {index for index, key in enumerate(keys) if key in found}


def _occurrences(keys: set[str], text: str) -> list[tuple[int, int]]:
    """Where one of the texts stands as whole words and numbers: the longest at each place."""
    flat = " ".join(text.lower().split())
    spans = {match.span() for key in keys if key in flat
             for match in _spelled(key).finditer(text) if _is_whole(text, *match.span())}
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no word goes on beyond either end of a piece of the text."""
    return bool(
        (_NO_WORD_BEFORE.match(text, start) or not _WORD_CHARACTER.match(text, start))
        and (_NO_WORD_AFTER.match(text, end) or not _WORD_CHARACTER.match(text, end - 1)))


@functools.lru_cache(4096)
def _spelled(key: str) -> re.Pattern[str]:
    """A text in any case and with any spaces, and not within a number.

    What asks for word characters is not part of it: their class takes re milliseconds.
    """
    words = r"\s+".join(map(re.escape, key.split()))
    left = r"(?<!\d[.,])(?<!-)" if key[0].isdigit() else ""
    right = r"(?![.,]\d)" if key[-1].isdigit() else ""
    return re.compile(f"{left}(?:{words}){right}", re.IGNORECASE)


# ----- the rules of others ------------------------------------------------------------------

_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
             "I'm sorry, but without the image provided", "Cannot determine the answer",
             "Failed to obtain answer via API")
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_THE_END = 5  # words: where VLMEvalKit looks for the letter


def vlmevalkit_option(answer: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit's `can_infer` without its judge: the only letter among the words, first found
    among the last five, else the only option whose text occurs, in an answer at most twice as
    long as all options. It takes the article of "A cat" for option A."""
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_TO_SPACES).split()
    named = sorted(set(words).intersection(LETTERS[:len(choices)]))
    if len(named) == 1 and words.index(named[0]) > len(words) - NEAR_THE_END:
        return named[0]
    refused = not named and "Z" in words  # its letter for no option
    if refused or len(answer.lower()) > 2 * sum(map(len, choices)):
        return None
    return _only_substring(answer, choices)


_WAYS = (("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
         (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))


def lmms_mmbench_option(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's rule for MMBench without its judge: the only letter of A to E among the words,
    as it is or in one of twelve ways of marking it, else the only option whose text occurs."""
    words = answer.split()
    present, article = set(words), "A" in words and len(words) > 3
    for before, after in _WAYS[article:]:
        named = [letter for letter in "ABCDE" if before + letter + after in present]
        if len(named) == 1:
            return named[0]
    return _only_substring(answer, choices)


def _only_substring(answer: str, choices: Sequence[str]) -> str | None:
    lower = answer.lower()
    named = [letter for letter, choice in zip(LETTERS, choices, strict=False)
             if choice and choice.lower() in lower]
    return named[0] if len(named) == 1 else None


def mmstar_option(answer: str, choices: Sequence[str]) -> str | None:
    """MMStar's own rule: the answer's first character, or the one after "(", "option " or "the
    answer is ". It takes "Because ..." for option B."""
    text = answer.lower().strip().replace("\n", " ")
    letters = (text.removeprefix(before)[:1].upper() for before in (
        "", "(", "option ", "the answer is ") if text.startswith(before))
    return next((x for x in letters if x and x in LETTERS[:len(choices)]), None)


_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is",
    "the best answer is", "best answer is", "the correct option is", "correct option is",
    "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick",
    "my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选",
    "答えは")


def lmms_option(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's `extract_mcq_answer`: all places where a letter may be meant, the surest kind of
    place first, the last of a kind. It finds a letter in almost every text: "Cat" is C."""
    bare = answer.strip()
    for char in ",.!?;:'\"":
        bare = bare.strip(char)
    text = f" {bare} "
    bare = text.strip()
    places: list[tuple[int, int, str]] = []  # how sure, where, letter
    for letter in LETTERS[:len(choices)]:
        for sure, marked in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"),
                             (3, f"{letter})"), (2, f"{letter} ")):
            places.append((sure, text.rfind(marked), letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            places.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            places.append((9, len(text) - 1, letter))
        places.extend((7, text.find(letter, after), letter) for after in _after_phrases(text))
    found = [place for place in places if place[1] >= 0] or [
        (0, at, letter) for letter in LETTERS[:len(choices)] if (at := text.rfind(letter)) >= 0]
    return max(found)[2] if found else None


def _after_phrases(text: str) -> list[int]:
    lower = text.lower()
    return [at + len(phrase) for phrase in _PHRASES if (at := lower.find(phrase)) >= 0]


_FULL_STOP = re.compile(r"\s*([A-Z])\.")


def lmms_full_stop_option(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's rule for AI2D: a letter and a full stop at the start, or else nothing but the
    letter once case and punctuation are gone."""
    match = _FULL_STOP.match(answer)
    text = match[1] if match else answer.strip()
    letter = text.upper().translate(str.maketrans("", "", string.punctuation))
    return letter if len(letter) == 1 and letter in LETTERS[:len(choices)] else None


def lmms_scienceqa_option(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's rule for ScienceQA: the letter alone, or a capital and a full stop first."""
    text = answer.strip()
    letter = text.upper() if len(text) == 1 else text[0] if text[1:2] == "." else ""
    return letter if letter and letter in LETTERS[:len(choices)] else None


def lmms_first_character(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's rule for SEED-Bench: the answer's first character. It takes "Because" for B."""
    letter = answer.strip()[:1].upper()
    return letter if letter and letter in LETTERS[:len(choices)] else None


def exact_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The answer is an option's letter and nothing else, as lmms-eval has it for MMMU-Pro vision.
    """
    return answer if len(answer) == 1 and answer in LETTERS[:len(choices)] else None


def lmms_blink_option(answer: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's rule for BLINK: a first line that is all but the letter, else the last "answer
    is B", else the last "(B)", else the first character. It takes "As ..." for option A."""
    text, letters = answer.strip(), f"[{LETTERS[:len(choices)]}]"
    first = text.split("\n", 1)[0].strip()
    bare = re.match(rf"\(?({letters})\)?[.\s:,)]*$", first, re.IGNORECASE)
    if bare and len(first) <= 4:
        return bare[1].upper()
    text = " ".join(text.split())  # else a long gap takes quadratic time
    said = re.findall(rf"answers?(?:\s+is)?\s*[:\-]?\s*\(?({letters})\)?(?![A-Za-z])", text,
                      re.IGNORECASE) or re.findall(rf"\(({letters})\)", text)
    if said:
        return str(said[-1]).upper()
    start = re.match(rf"[(\s]*({letters})", text, re.IGNORECASE)
    return start[1].upper() if start else None
