"""The diagnosis of a pair: how it is compared, what is wrong with it, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from taid_vlm.alignment import Pairing
from taid_vlm.batch.several import role_of
from taid_vlm.doctor.conversation import TemplateFacts
from taid_vlm.doctor.facts import TYPICAL, Facts
from taid_vlm.doctor.preflight import REMEDIES, Preflight
from taid_vlm.errors import TaidError

Outcome = Literal["exact", "shared", "chunks", "alone", "refused"]
OUTCOMES: dict[str | None, Outcome] = {"a": "exact", "b": "shared", "c": "chunks", None: "alone"}
HEADLINES: dict[Outcome, str] = {
    "exact": "This pair can be distilled exactly: every logit has its partner.",
    "shared": "This pair can be distilled: the two models cut text in the same places, and the "
              "tokens that both have are compared one by one.",
    "chunks": "This pair can be distilled in chunks: the two models cut text differently, so "
              "tokens that begin the same text are compared in groups, and longer pieces by their "
              "likelihood.",
    "alone": "There is no teacher: the student learns from the data alone.",
    "refused": "This recipe cannot be carried out as it is.",
}
ADVICE = {  # by `TaidError.code`: what to do, for whom reads the message for the first time
    "alignment_shared": "Take objective.alignment out of the recipe (or set it to auto or chunks), "
        "or choose a student that has the teacher's tokenizer: models of one family and generation "
        "usually share it.",
    "alignment_exact": "Take objective.alignment out of the recipe, or set it to auto.",
    "blind": "Name a vision-language model in place of the text model, or train on records without "
        "images.",
    "encoder_decoder": "Name a decoder-only model; T5, BART and Florence-2 read the prompt apart "
        "from the answer and cannot be compared token by token.",
    "no_language_model": "Name a model that writes text: a causal language model or an "
        "image-text-to-text model.",
    "no_chat_template": "Save the template of the instruction-tuned model as a file, and name it: "
        "chat_template: template.jinja under the model in the recipe.",
    "no_typed_parts": "Use the template that came with the processor of the model; that of its "
        "language model alone has no place for images.",
    "unfaithful_template": "Look at the template: for messages of user and assistant it has to "
        "print both contents, once each. Name another with chat_template under the model in the "
        "recipe.",
    "small_head": "Tokens were added to the tokenizer but not to the model: call "
        "model.resize_token_embeddings(len(tokenizer)) and save it, or name the tokenizer that "
        "belongs to it with processor_name_or_path.",
    "no_tokenizer": "Save the tokenizer or processor into the model's folder, or name another "
        "folder with processor_name_or_path.",
    "unspellable": "A tokenizer changes the text (its normaliser is among the facts) or lacks its "
        "characters; normalise the data the same way.",
    "no_images": "Compare the paths in the data with the folder they start from; "
        "data.train.image_root sets another.",
}
MANY_REST = 0.05  # share of a vocabulary without a partner that is worth a word


@dataclass(frozen=True)
class Diagnosis:
    """What comes of a recipe.

    headline: one sentence for everybody; reason: the whole truth, with counts or the message.
    changes: what to change (of a refusal), most important first.
    warnings: what will be worse than it could be.
    """

    outcome: Outcome
    case: str | None
    headline: str
    reason: str
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def refuse(error: TaidError) -> Diagnosis:
    """The diagnosis of what training would refuse."""
    remedies = (f"{reason.capitalize()}: {REMEDIES[reason]}" for reason in error.reasons
                if reason in REMEDIES)
    changes = tuple(filter(None, (ADVICE.get(error.code, error.mend), *remedies)))
    return Diagnosis("refused", None, HEADLINES["refused"], str(error),
                     changes or ("Change what the message names, and run inspect again.",))


def accept(
    pairing: Pairing | Mapping[str, Pairing] | None, facts: Mapping[str, Facts],
    checks: Sequence[Preflight], hint: str = "",
) -> Diagnosis:
    """The diagnosis of a pair that can be trained, or of the pairs with several teachers by name;
    `hint`: a warning about the objective."""
    pairs = {role_of(name): one for name, one in pairing.items()} if isinstance(pairing, Mapping) \
        else {} if pairing is None else {"": pairing}
    case = max((one.case for one in pairs.values()), default=None)
    outcome = OUTCOMES[case]
    reason = "; ".join(f"{role} (case {one.case}): {one.reason}" if role else one.reason
                       for role, one in pairs.items()) or "every supervised token counts"
    warnings = [f"{role}: {warning}" if role else warning for role, one in pairs.items()
                for warning in (*one.warnings, *_vocabulary(one))]
    warnings += [hint] * bool(hint)
    warnings += [*_conversation(facts), *_lengths(facts), *_records(checks)]
    return Diagnosis(outcome, case, HEADLINES[outcome], reason, (), tuple(dict.fromkeys(warnings)))


def _vocabulary(pairing: Pairing) -> Iterator[str]:
    vocabulary = pairing.maps[0]
    if vocabulary.identity:
        return
    for role, side in (("teacher", vocabulary.teacher), ("student", vocabulary.student)):
        named = len(side.shared) + len(side.members) + len(side.rest)
        if len(side.rest) > MANY_REST * named:
            yield (f"{len(side.rest):,} of the {role}'s {named:,} tokens "
                   f"({len(side.rest) / named:.0%}) have no partner; their probability is compared "
                   "as one sum, not token by token")
    if not vocabulary.has_rest and len(vocabulary.teacher.rest):
        yield (f"the student has no place for the {len(vocabulary.teacher.rest):,} tokens that "
               "only the teacher has; the teacher is compared as if it could not say them")


def _conversation(facts: Mapping[str, Facts]) -> Iterator[str]:
    """Where the two models are not asked the same thing, or the student not what it learned."""
    student = facts["student"].template
    if student is not None and student.thought != student.asked_thought:
        yield (f"the student's template prints a thought ({student.thought}) before the answers "
               f"it learns, and another ({student.asked_thought}) in its generation prompt; ask "
               "the trained student as it learned (many templates take "
               "student.chat_template_kwargs: {enable_thinking: false})")
    for role, side in facts.items():
        if role != "student" and side.template is not None and student is not None:
            yield from _asked_alike(role, side.template, student)


def _asked_alike(role: str, teacher: TemplateFacts, student: TemplateFacts) -> Iterator[str]:
    if teacher.thought != student.thought:
        yield (f"the templates think differently before an answer ({role}: {teacher.thought}; "
               f"student: {student.thought}), so the two models answer after different texts; a "
               "chat_template without thoughts in the recipe makes them alike")
    if teacher.system != student.system:
        prompts = ["none" if x.system is None else repr(x.system) for x in (teacher, student)]
        yield (f"the default system prompts differ ({role}: {prompts[0]}; student: {prompts[1]}); "
               "a system turn in the records makes them alike")


def _lengths(facts: Mapping[str, Facts]) -> Iterator[str]:
    for role, side in facts.items():
        count = side.images.tokens.get(TYPICAL) if side.images else None
        if count is not None and side.max_length is not None and count >= side.max_length:
            yield (f"an image of {TYPICAL} pixels is {count:,} tokens for the {role}, but a record "
                   f"may have {side.max_length:,}: records with such images are left out. Raise "
                   "train.max_length, or make the images smaller")


def _records(checks: Sequence[Preflight]) -> Iterator[str]:
    for check in checks:
        if check.usable < check.records:
            reasons = ", ".join(f"{one.count:,} x {one.reason}" for one in check.dropped)
            yield f"{check.name}: {check.sentence}: {reasons}"
        if check.cut:
            yield (f"{check.name}: {check.cut:,} texts are longer than the maximum length and are "
                   "cut")
        for note, count in check.notes.items():
            yield f"{check.name}: in {count:,} records: {note}"
