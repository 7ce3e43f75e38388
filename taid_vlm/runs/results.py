"""results.json of a distillation, typed: one shape for who writes it and for all who read it.

What is not finite is null in the file and NaN here. Plain data: nothing of torch is imported.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from taid_vlm.errors import TaidError
from taid_vlm.io.files import read_json, write_json

SCHEMA: Literal[2] = 2
KIND: Literal["distillation"] = "distillation"

Number = Annotated[float, BeforeValidator(lambda x: math.nan if x is None else x)]


class Part(BaseModel):
    """Read strictly: a key that is missing or not known makes a broken file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Means(Part):
    """Figures as means per answer token, each NAME with its standard error NAME_stderr.

    n_tokens: how many answer tokens they are of.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]
    n_tokens: int

    @property
    def figures(self) -> dict[str, float]:
        """By name, only those that were measured; NaN where a value is not finite."""
        return self.__pydantic_extra__


def of_teacher(means: Means, name: str) -> Means:
    """The figures against one of several teachers, under their own names."""
    own = {figure: value for key, value in means.figures.items() for figure, _, rest in [
        key.partition("/")] if rest == name}
    errors = {f"{figure}_stderr": means.figures[f"{figure}/{name}_stderr"]
              for figure in own if f"{figure}/{name}_stderr" in means.figures}
    return Means.model_validate({**own, **errors, "n_tokens": int(own.get("n_tokens", 0))})


class Figures(Means):
    """Held-out figures of a student; standard errors are over answers.

    Of the student alone: nll (of the data, nats), token_accuracy (its most likely token is the
    data's), confidence (in its most likely token), ece (expected calibration error),
    student_entropy (nats). Against the teacher (of several the one that a token has, or their mean
    by share; as NAME/TEACHER those of each, with n_tokens/TEACHER): kl = KL(teacher || student),
    reverse_kl, jsd (nats), agreement (both have the same most likely token), head_mass and
    tail_mass (the student's probability on the teacher's 10 most likely tokens, and on the fifth
    that it ranks last). Of the teacher: teacher_nll, teacher_entropy, teacher_head_mass,
    teacher_tail_mass.
    Outside what is compared: {student,teacher}_{rest,padding}_mass. Per chunk, where tokenizers
    differ: chunk_kl, chunk_reverse_kl, chunk_jsd.

    n_answers: how many answers they are of.
    """

    n_answers: int


class HeldOut(Figures):
    """All held-out figures of one moment.

    coverage: share of the answers' tokens that are compared with the teacher token by token.
    chunk_coverage: share that is compared by the likelihood of a piece of text only.
    dropped: records left out, by reason. calibration: bins of confidence, unsure to sure, each with
    its number of tokens, mean confidence and accuracy. by_category: the figures of every category.
    """

    coverage: float
    chunk_coverage: float
    dropped: dict[str, int]
    calibration: list[dict[Literal["tokens", "confidence", "accuracy"], float]] = []
    by_category: dict[str, Figures]


class Evaluations(Part):
    """Of the student before and after training; None without held-out records."""

    before: HeldOut | None
    after: HeldOut | None


class HeldOutData(Part):
    """What was measured on; runs with one sha256 were measured on the same records.

    path, split: as in the recipe. records: how many. sha256: of their texts and images.
    """

    path: str
    split: str
    records: int
    sha256: str


class Look(Means):
    """How much the images matter to a model; see `evaluation.canary.canary` for the figures.

    n_records: with images, whose answers they are of. without_partner: how many of these have no
    other record to swap images with.
    """

    n_records: int
    without_partner: int


class Looks(Part):
    """Of the student before and after training."""

    before: Look
    after: Look


class Canary(Part):
    """Whether the models look at their images; warnings: sentences about those that do not.
    teachers: of several by name."""

    teacher: Look | None
    student: Looks
    warnings: list[str]
    teachers: dict[str, Look] = {}


class Alignment(Part):
    """How the two models' predictions are brought together.

    case: a, b or c of docs/architecture.md. reason: why. warnings: sentences about the pair.
    """

    case: str
    reason: str
    warnings: list[str]


class Cache(Part):
    """Of a cached teacher.

    folder: as in the recipe. identity: of what it holds. signal: what is kept of the records to
    train on. bytes_per_token: on disk, of an answer's.
    """

    folder: str
    identity: str
    signal: str
    bytes_per_token: float


class Model(Part):
    """A model of the run.

    name, revision: as in the recipe. model_type: transformers' name of its family. parameters: how
    many. parts: of a student, {part: {"parameters": how many, "trained": of these}}. saved: as what
    a LoRA student was written, its adapter or its base model with the adapter merged.
    quantization: how its weights are rounded in memory; None if they are not. shared_parameters: of
    a teacher that is the student's base model, those that lie in memory once. Of a served
    teacher, whose name is the server's: top_logprobs: how many most likely tokens it gave;
    bytes_per_token: of its answers, on the wire, per answer token. cache: of a teacher that was
    asked once, where its hidden states lie and how many bytes a token takes.
    """

    name: str
    revision: str | None = None
    model_type: str
    parameters: int
    parts: dict[str, dict[Literal["parameters", "trained"], int]] = {}
    saved: Literal["adapter", "merged"] | None = None
    quantization: str | None = None
    shared_parameters: int | None = None
    top_logprobs: int | None = None
    bytes_per_token: float | None = None
    cache: Cache | None = None


class OneTeacher(Part):
    """One of several teachers: the model, and how it is compared with the student."""

    model: Model
    alignment: Alignment


class LossImplementation(Part):
    """How the loss was computed.

    name: on hidden states without all logits in memory, from logits, or from logits against a few
    entries of the teacher's laws; "several" where that differs between teachers. reason: why it is
    not the first one; of several teachers how each is. bodies: what computed chunks of a fused
    loss ("eager", "compiled", "triton_body").
    """

    name: Literal["fused", "reference", "sparse", "several"]
    reason: str | None = None
    bodies: list[str] = []


class Engine(Part):
    """A server that sampled the student's answers.

    name: its model's. syncs: how often it was given the student's weights, and the sync_seconds
    that took. gap: mean difference of sampled tokens' log-probabilities there and here, in nats,
    over those that were compared. redone: steps whose answers were taken from those written down.
    """

    name: str
    syncs: int
    sync_seconds: float
    gap: float
    redone: int


class OnPolicy(Part):
    """Answers that the student gave itself, over all processes and resumptions.

    share: of the rows, those learned from a sampled answer. asked: how often one was to be sampled;
    sampled: how many were learned, reused among them; stale: too old to be learned again. cut: by
    max_new_tokens; repeating: ended in copies of a few tokens. tokens: sampled; seconds: of
    sampling, in all processes together. unused: answers that were not learned, by reason. engine:
    None where the student sampled in this process. look: how much the images of held-out records
    matter to what the trained student says itself, sampled here as in training.
    """

    share: float
    asked: int
    sampled: int
    reused: int
    stale: int
    cut: int
    repeating: int
    tokens: int
    seconds: float
    unused: dict[str, int]
    look: Look | None = None
    engine: Engine | None = None


class Train(Part):
    """What training did.

    steps: optimizer steps. resumed_from: the checkpoint that this process went on from. seconds:
    since then. answer_tokens: trained on, over all processes and resumptions. records_left_out: how
    often records were, by reason. texts_cut: plain texts shortened to max_length. unread_columns:
    that nothing reads, with how many records had them. sources: of several, the rows of each.
    Of TAID, None without: t: where it ended. alpha: how fast it may move. adaptive_share: the share
    of steps in which the adaptive term and not the linear floor moved it. skipped_updates: steps
    that were not applied or had no finite loss, in which it did not move.
    loss_implementation: None where no step was trained, or nothing is known.
    skipped_steps: optimizer steps that were not applied, by reason.
    without_effect: what of the records was not read or not shown to a model, and how often.
    on_policy: None where all answers were the data's.
    """

    steps: int
    resumed_from: str | None
    seconds: float
    answer_tokens: int | None
    records_left_out: dict[str, int]
    texts_cut: int
    unread_columns: dict[str, int] = {}
    sources: dict[str, dict[Literal["read", "used", "left_out"], int]] = {}
    t: float | None
    alpha: float | None
    adaptive_share: float | None
    skipped_updates: int | None
    loss_implementation: LossImplementation | None
    skipped_steps: dict[str, int] = {}
    without_effect: dict[str, int] = {}
    on_policy: OnPolicy | None = None


class Example(Part):
    """A held-out question and the answers to it.

    source, turn: the record, and which of its answers. category, prompt, reference: as in the data.
    answers: greedy, by "teacher" (several are not asked), student "before" and "after" training.
    progress: the student's at evaluations in training, by step.
    """

    source: str
    turn: int
    category: str
    prompt: str
    reference: str
    answers: dict[str, str]
    progress: dict[int, str] = {}


class Stage(Part):
    """An earlier stage of the same recipe.

    name: its own. folder: from the recipe's output_dir. recipe_hash, steps, eval: of its
    results.
    """

    name: str
    folder: str
    recipe_hash: str
    steps: int
    eval: Evaluations


class Results(Part):
    """A finished run.

    schema, kind: of this file. objective: as in the recipe. seed: of training. recipe_hash: of the
    resolved recipe. memory: peak_rss_bytes, and peak_device_bytes where there is one. machine:
    system, architecture, device, threads, processes. versions: by package. history: the trainer's
    log lines, in order. stages: those before this one. teachers: where there are several, by name;
    `models` and `alignment` then have none. Others: see their types.
    """

    version: Literal[2] = Field(SCHEMA, alias="schema")
    kind: Literal["distillation"] = KIND
    objective: Any
    seed: int
    recipe_hash: str
    data: dict[Literal["eval"], HeldOutData | None]
    eval: Evaluations
    canary: Canary | None
    alignment: Alignment | None
    models: dict[Literal["teacher", "student"], Model]
    teachers: dict[str, OneTeacher] = {}
    train: Train
    memory: dict[str, int]
    machine: dict[str, str | int]
    versions: dict[str, str]
    history: list[dict[str, Any]]
    examples: list[Example]
    stages: list[Stage]

    def write(self, path: Path) -> Path:
        """Whole or not at all; raises TaidError."""
        return write_json(self.model_dump(by_alias=True), path)


def read_results(path: Path) -> Results:
    """The results of a finished distillation, of this schema or the one before.

    Raises:
        TaidError: no such file, or one that holds something else; with what and where.
    """
    return parse_results(read_json(path, "a run's results"), path)


def parse_results(tree: Any, path: Path) -> Results:
    """The same from JSON that has been read from `path`."""
    try:
        return Results.model_validate(_upgraded(tree) if tree["schema"] == 1 else tree)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (KeyError, TypeError) as error:
        problem = f"{error!r:.80}"
    raise TaidError(f"'{path}' is not a run's results ({problem}).")


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 did not name its kind, nor how the loss was computed; its first files did not have
    all the others either."""
    train = {"answer_tokens": None, **tree["train"], "loss_implementation": None}
    return {"data": {"eval": None}, "canary": None, "stages": [], "examples": [], **tree,
            "schema": SCHEMA, "kind": KIND, "train": train}
