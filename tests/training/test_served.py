"""A served teacher: what it is asked, what it says, what is refused, and what a lost one leaves."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training.runs import rows, weights
from training.vllm import NAME, StandIn, Tree, standing_in, wide_llama
from zoo import Built, build, save

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.cli import main
from taid_vlm.config.model import ServerSpec
from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.io.manifest import read_manifest
from taid_vlm.teachers import ServedTeacher, TeacherLost
from taid_vlm.teachers.protocol import Question, WrongAnswer, read_laws, request
from taid_vlm.teachers.served import to_signal

RECORDED = json.loads((Path(__file__).parent / "vllm_0_32.json").read_text())
ROWS = rows(16, text_only=True)
SEEING = rows(8, kinds=("one", "turns", "text"))
STEPS, K = 3, 24


@pytest.fixture(scope="module")
def teacher() -> Built:
    return wide_llama()


@pytest.fixture
def server(teacher: Built) -> Iterator[StandIn]:
    with standing_in(teacher) as made:
        yield made


def served(server: StandIn, **options: Any) -> ServedTeacher:
    spec = {"url": server.url, "model": NAME, "top_logprobs": K, "timeout": 20.0, "retries": 2}
    return ServedTeacher(ServerSpec(**{**spec, **options}), server.built.model)


def train(
    output: Path, teacher: Any, processor: Any, student: Built, data: list[Any] | None = None,
    resume: str | None = None, **arguments: Any,
) -> DistillationTrainer:
    """Three steps, of a served teacher or of a local one that also says its top k only."""
    defaults = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3,
                "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
                "logging_steps": 1, "dataloader_pin_memory": False, "seed": 7}
    trainer = DistillationTrainer(
        student.model, teacher, DistillationConfig(str(output), **{**defaults, **arguments}),
        ROWS if data is None else data, None, student.processor, processor)
    if not isinstance(teacher, ServedTeacher):
        assert trainer.teacher is not None
        trainer.teacher.top = K
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def pupil(family: str = "llama", **options: Any) -> Built:
    return build(family, seed=5, **options)


def logged(trainer: DistillationTrainer, *keys: str) -> list[list[float]]:
    return [[row[key] for key in keys] for row in trainer.state.log_history if "kl" in row]


FIGURES = ("loss", "loss/taid", "kl", "reverse_kl", "nll", "teacher_nll", "agreement", "t")

# ----- the protocol -------------------------------------------------------------------------


def shape(tree: Any) -> Any:
    """Keys and kinds of values; of a list its first and last, of a law (ids are keys) one."""
    if isinstance(tree, dict):
        if tree and all(key.isdigit() for key in tree):
            return {"id": shape(next(iter(tree.values())))}
        return {key: shape(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shape(tree[0]), shape(tree[-1])] if tree else []
    return type(tree).__name__


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_stand_in_speaks_as_vllm_does(server: StandIn, kind: str) -> None:
    """Same keys and kinds of values, same ids, and of the same weights the same figures."""
    recorded = RECORDED[kind]
    path = "/v1/completions" if kind == "completion" else "/v1/chat/completions"
    status, answer = server.answer(path, copy.deepcopy(recorded["request"]), 0)
    assert (status, shape(answer)) == (200, shape(recorded["response"]))
    mine, vllm = (tree if kind == "chat" else tree["choices"][0]
                  for tree in (answer, recorded["response"]))
    assert mine["prompt_token_ids"] == vllm["prompt_token_ids"]
    for here, there in zip(mine["prompt_logprobs"][1:], vllm["prompt_logprobs"][1:], strict=True):
        assert here.keys() == there.keys()
        for token, law in here.items():
            assert law["rank"] == there[token]["rank"]
            assert law["logprob"] == pytest.approx(there[token]["logprob"], abs=1e-4)


def test_the_stand_in_refuses_as_vllm_does(server: StandIn) -> None:
    body = RECORDED["completion"]["request"] | {"prompt_logprobs": 600}
    assert server.answer("/v1/completions", body, 0) == (
        RECORDED["refused"]["status"], RECORDED["refused"]["response"])


def question() -> Question:
    ids = RECORDED["completion"]["request"]["prompt"]
    return Question(ids, [1, 3], None, "train.jsonl:1")


def test_what_is_asked_is_what_was_recorded() -> None:
    path, body = request(question(), NAME, 3)
    assert (path, json.loads(body)) == ("/completions", RECORDED["completion"]["request"])


def test_what_vllm_said_is_the_models_law(teacher: Built) -> None:
    """Top k, own token and exact rest of the recording, against the model's own law in float64."""
    response = json.dumps(RECORDED["completion"]["response"]).encode()
    signal = to_signal(read_laws(response, question(), NAME, 3, 576), 576)
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([question().ids])).logits[0]
    law = logits.double().log_softmax(-1)[[0, 2]]
    values, ids = law.topk(3, dim=-1)
    rest = law.scatter(-1, ids, -torch.inf).logsumexp(-1)
    own = law[[0, 1], [question().ids[1], question().ids[3]]]
    assert torch.equal(signal.ids, ids)
    for said, known in ((signal.log_probs, values), (signal.log_rest, rest), (signal.own, own)):
        torch.testing.assert_close(said.double(), known, rtol=0, atol=5e-5)


def change(path: str, value: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        *parents, last = path.split(".")
        for key in parents:
            tree = tree[int(key) if isinstance(tree, list) else key]
        tree[int(last) if isinstance(tree, list) else last] = value

    return apply


LAW = {"17": {"logprob": -0.1, "rank": 1}, "4": {"logprob": -0.2, "rank": 2},
       "5": {"logprob": -3.0, "rank": 3}}


@pytest.mark.parametrize(("changed", "named"), [
    (change("model", "another"), "'another'"),
    (change("choices.0.prompt_token_ids", [5, 18, 200, 31]), "18 in place of 17 at position 1"),
    (change("choices.0.prompt_logprobs", None), "no prompt_token_ids and prompt_logprobs"),
    (change("choices.0.prompt_logprobs.1", None), "no law at a token"),
    (change("choices.0.prompt_logprobs.1", {"4": {"logprob": -1.0, "rank": 1}}), "itself"),
    (change("choices.0.prompt_logprobs.1", LAW), "add up to 1.773"),
    (change("choices.0.prompt_logprobs.1.99.logprob", float("nan")), "not the 3 most likely|nan"),
    (change("choices.0.prompt_logprobs.1.9999", {"logprob": -0.1, "rank": 0}), "token 9999"),
    (change("choices", []), "no prompt_token_ids"),
])
def test_a_wrong_answer_is_named(changed: Callable[[Tree], None], named: str) -> None:
    tree = copy.deepcopy(RECORDED["completion"]["response"])
    changed(tree)
    with pytest.raises(WrongAnswer, match=named):
        read_laws(json.dumps(tree).encode(), question(), NAME, 3, 576)


# ----- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["plain", "permuted"])
def test_served_and_local_train_alike(
    server: StandIn, tokenizer: str, tmp_path: Path
) -> None:
    """Losses, figures and weights are those of a teacher in this process with the same top k."""
    remote, local = (train(tmp_path, teacher, server.built.processor, pupil(tokenizer=tokenizer))
                     for teacher in (served(server), server.built.model))
    torch.testing.assert_close(torch.tensor(logged(remote, *FIGURES)),
                               torch.tensor(logged(local, *FIGURES)), rtol=1e-4, atol=1e-5)
    for name, weight in weights(local).items():
        torch.testing.assert_close(weights(remote)[name], weight, rtol=0, atol=1e-5)
    assert remote.loss_report is not None
    assert remote.loss_report["name"] == "sparse"
    assert isinstance(remote.teacher, ServedTeacher)
    assert remote.teacher.report()["bytes_per_token"] > 8 * K


def test_images_travel_with_the_conversation(tmp_path: Path) -> None:
    """A served teacher with vision: the same ids and laws as the same model in this process."""
    built = build("llava")
    with standing_in(built) as server:
        remote, local = (train(tmp_path, teacher, built.processor, pupil("llava"), SEEING)
                         for teacher in (served(server), built.model))
        chats = [body for body in server.bodies if "messages" in body]
    torch.testing.assert_close(torch.tensor(logged(remote, *FIGURES)),
                               torch.tensor(logged(local, *FIGURES)), rtol=1e-4, atol=1e-5)
    assert chats


def test_workers_ask_for_themselves(server: StandIn, tmp_path: Path) -> None:
    plain, workers = (train(tmp_path, served(server), server.built.processor, pupil(),
                            dataloader_num_workers=number) for number in (0, 1))
    assert logged(workers, *FIGURES) == logged(plain, *FIGURES)
    assert isinstance(workers.teacher, ServedTeacher)
    assert workers.teacher.tokens > 0


def test_requests_are_bounded_and_go_ahead(server: StandIn, tmp_path: Path) -> None:
    """At most `concurrency` at once; the next batch's are sent before the step is done."""
    server.pause, ahead = 0.02, []
    trainer = DistillationTrainer(
        pupil().model, served(server, concurrency=2), DistillationConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True), ROWS, None, pupil().processor,
        server.built.processor)
    step, before = trainer.training_step, len(server.bodies)

    def watched(*args: Any) -> Any:
        result, patience = step(*args), time.monotonic() + 10
        while len(server.bodies) - before <= 4 and time.monotonic() < patience:
            time.sleep(0.01)  # sent from another thread, which has to get its turn first
        server.pause = 0.0
        ahead.append(len(server.bodies) - before)
        return result

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert server.most == 2
    assert ahead[0] > 4


def test_a_longer_row_than_the_server_takes_is_left_out(server: StandIn, tmp_path: Path) -> None:
    server.length = 60
    data = [*ROWS, {"prompt": "hello " * 60, "completion": "a red square"}]
    trainer = train(tmp_path, served(server), server.built.processor, pupil(), data,
                    num_train_epochs=1, max_steps=-1, per_device_train_batch_size=17)
    assert trainer.dropped == {"longer than max_length": 1}


def test_passing_failures_are_waited_out(server: StandIn, tmp_path: Path) -> None:
    """An overloaded server and a cut-off answer: asked again, and nothing differs."""
    plain = train(tmp_path, served(server), server.built.processor, pupil())
    first, failed = len(server.bodies), list[int]()

    def twist(body: Tree, answer: Tree, number: int) -> Any:
        if number - first in (12, 15):
            failed.append(number - first)
        match number - first:
            case 12:
                return 503, {"error": {"message": "overloaded"}}
            case 15:
                return 200, json.dumps(answer).encode()[:-40]
        return answer

    server.twist = twist
    again = train(tmp_path, served(server), server.built.processor, pupil())
    assert sorted(failed) == [12, 15]
    assert logged(again, *FIGURES) == logged(plain, *FIGURES)


# ----- a teacher that is lost ---------------------------------------------------------------


def other_name(body: Tree, answer: Tree, number: int) -> Tree:
    return {**answer, "model": "another"}


def other_ids(body: Tree, answer: Tree, number: int) -> Tree:
    answer["choices"][0]["prompt_token_ids"][-1] += 1
    answer["choices"][0]["prompt_token_ids"][0] += 1
    return answer


def dead(body: Tree, answer: Tree, number: int) -> tuple[int, Tree]:
    return 503, {"error": {"message": "the engine died"}}


def refused(body: Tree, answer: Tree, number: int) -> tuple[int, Tree]:
    return 400, {"error": {"message": "maximum context length is 512 tokens"}}


@pytest.mark.parametrize(("twist", "named"), [
    (other_name, "'another'"), (other_ids, "reads .* as other tokens"),
    (dead, "no answer after 2 attempts.*the engine died"), (refused, "Lower train.max_length"),
    ("stall", "nothing within 3 seconds"), ("swap", "is not the model it was"),
])
def test_a_lost_teacher_leaves_a_whole_checkpoint(
    server: StandIn, twist: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message; then the run goes on from the last step and ends as if nothing had been."""
    whole = train(tmp_path / "whole", served(server), server.built.processor, pupil())
    teacher, student = served(
        server, retries=1, timeout=3.0 if twist == "stall" else 20.0), pupil()
    original, step = server.built, DistillationTrainer.finish_step

    def finish(self: DistillationTrainer) -> None:
        step(self)
        if self.state.global_step == 2:
            if twist == "stall":
                server.pause = 12.0
            elif twist == "swap":
                server.built = wide_llama(seed=9)
                teacher.retried = True  # as after a restart
            else:
                server.twist = twist

    monkeypatch.setattr(DistillationTrainer, "finish_step", finish)
    with pytest.raises(TeacherLost, match=named) as lost:
        train(tmp_path / "lost", teacher, original.processor, student, max_steps=4)
    monkeypatch.undo()
    kept = sorted((tmp_path / "lost").glob("checkpoint-*"))
    assert len(kept) == 1
    assert str(kept[0]) in str(lost.value)
    assert read_manifest(kept[0]) is not None
    server.built, server.pause, server.twist = original, 0.0, lambda body, answer, number: answer
    longer = train(tmp_path / "long", served(server), original.processor, pupil(), max_steps=4)
    resumed = train(tmp_path / "lost", served(server), original.processor, pupil(), max_steps=4,
                    resume=str(kept[0]))
    assert logged(whole, "kl")[:2] == logged(longer, "kl")[:2]
    for name, weight in weights(longer).items():
        assert torch.equal(weights(resumed)[name], weight)


# ----- before anything starts ---------------------------------------------------------------


def test_what_is_not_there_is_refused(server: StandIn) -> None:
    with pytest.raises(TaidError, match=f"'zoo-lama' is not served.*Did you mean '{NAME}'"):
        served(server, model="zoo-lama")
    with pytest.raises(TaidError, match="no answer after 1 attempts"):
        served(server, url="http://127.0.0.1:9/v1", retries=0)
    server.max_logprobs = 20
    with pytest.raises(TaidError, match="--max-logprobs 24, or lower"):
        served(server)
    with pytest.raises(TaidError, match="NO_SUCH_KEY"):
        served(server, api_key_env="NO_SUCH_KEY")


def test_a_shifted_teacher_is_refused(tmp_path: Path) -> None:
    """A model that knows its data, whose laws stand one token further on."""
    built = wide_llama()
    data = [{"prompt": "hello", "completion": "one two three four five six seven"}] * 8
    model = built.model.train()
    ids = built.processor.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant",
                                                "content": data[0]["completion"]}],
        return_dict=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()

    def shift(body: Tree, answer: Tree, number: int) -> Tree:
        entries, read = answer["choices"][0]["prompt_logprobs"], body["prompt"]
        answer["choices"][0]["prompt_logprobs"] = [None, *(
            {**law, str(token): law.get(str(token), {"logprob": -30.0, "rank": 400})}
            for law, token in zip([entries[1], *entries[1:-1]], read[1:], strict=True))]
        return answer

    with standing_in(built) as server:
        train(tmp_path, served(server), built.processor, pupil(), data, max_steps=1)
        server.twist = shift
        with pytest.raises(TaidError, match="is shifted: its laws fit the tokens before"):
            train(tmp_path, served(server), built.processor, pupil(), data)


def test_a_teacher_that_knows_nothing_is_refused(server: StandIn, tmp_path: Path) -> None:
    def sure(body: Tree, answer: Tree, number: int) -> Tree:
        for law in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in law.values():
                entry["logprob"] = -1e-6 if entry["rank"] == 1 else -30.0 - entry["rank"]
        return answer

    server.twist = sure
    with pytest.raises(TaidError, match="knows nothing of the data"):
        train(tmp_path, served(server), server.built.processor, pupil())


def test_a_blind_teacher_is_refused(tmp_path: Path) -> None:
    built = build("llava")
    with torch.no_grad():
        for parameter in built.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    with standing_in(built) as server, pytest.raises(TaidError, match="DOES NOT LOOK"):
        train(tmp_path, served(server), built.processor, pupil("llava"), SEEING)


def test_weights_at_hand_are_compared(server: StandIn, tmp_path: Path) -> None:
    for seed, folder in ((3, "same"), (4, "other")):
        wide_llama(seed=seed).model.save_pretrained(tmp_path / folder)
    train(tmp_path, served(server, check=str(tmp_path / "same")), server.built.processor, pupil(),
          max_steps=1)
    with pytest.raises(TaidError, match=r"is not the model in teacher\.server\.check"):
        train(tmp_path, served(server, check=str(tmp_path / "other")), server.built.processor,
              pupil())


def test_image_tokens_without_an_image_are_refused() -> None:
    built = build("llava")
    token = built.model.config.image_token_id
    ids = torch.tensor([[1, token, token, 2, 3]])
    with standing_in(built) as server, pytest.raises(TeacherLost, match="no image to send"):
        served(server).submit({
            "teacher_inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            "teacher_mask": torch.tensor([[False, False, False, True, False]]),
            "sources": ["train.jsonl:1"]})


def test_other_tokenizers_and_objectives_are_refused(server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match="splits texts differently"):
        train(tmp_path, served(server), server.built.processor, pupil(tokenizer="other"))
    with pytest.raises(TaidError, match="'reverse_kl' needs the teacher's whole"):
        train(tmp_path, served(server), server.built.processor, pupil(), objective="reverse_kl")
    with pytest.raises(TaidError, match="loss_implementation = 'fused'"):
        train(tmp_path, served(server), server.built.processor, pupil(),
              loss_implementation="fused")


# ----- the command --------------------------------------------------------------------------


def recipe(server: StandIn, folder: Path, **changed: Any) -> Path:
    """A recipe on disk; `teacher/` holds configuration and tokenizer, and no weights."""
    save(pupil(), folder / "student")
    server.built.model.config.save_pretrained(folder / "teacher")
    server.built.processor.save_pretrained(folder / "teacher")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree = {"student": str(folder / "student"), "output_dir": str(folder / "run"),
            "teacher": {"processor_name_or_path": str(folder / "teacher"), "server": {
                "url": server.url, "model": NAME, "top_logprobs": K, "retries": 0}},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "train.jsonl")},
            "train": {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True,
                      "bf16": True, "disable_tqdm": True}, "evaluate": {"examples": 1}, **changed}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def test_a_recipe_is_carried_out_without_the_teachers_weights(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16, with results, report and card that name what was served; planned and inspected
    without asking the server."""
    path = recipe(server, tmp_path)
    for command in ("plan", "inspect"):
        assert main([command, str(path)]) == 0
    assert not server.bodies
    assert "it takes no memory here" in capsys.readouterr().out
    assert main(["distill", str(path)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    teacher = results["models"]["teacher"]
    assert (teacher["name"], teacher["top_logprobs"]) == (NAME, K)
    assert teacher["bytes_per_token"] > 8 * K
    assert results["eval"]["after"]["kl"] > 0
    assert f"served: its {K} most likely tokens" in (tmp_path / "run" / "report.html").read_text()
    assert NAME in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.parametrize(("changed", "named"), [
    ({"objective": "jsd"}, "'jsd' needs the teacher's whole distribution"),
    ({"objective": {"name": "taid", "kd_temperature": 2.0}}, "kd_temperature = 2"),
    ({"student": "/nowhere/at/all"}, "/nowhere/at/all"),
])
def test_a_mistake_is_refused_before_the_server_is_asked(
    server: StandIn, changed: Tree, named: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["distill", str(recipe(server, tmp_path, **changed))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert not server.bodies
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_teacher_that_dies_ends_the_command(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one message; `--resume` goes on where it was, at the server's new address."""
    path = recipe(server, tmp_path)
    asked = 1 + 8 + len(ROWS) + 8  # a probe, the check, the held-out records, and two steps

    def dies(body: Tree, answer: Tree, number: int) -> Any:
        return dead(body, answer, number) if number >= asked else answer

    server.twist = dies
    assert main(["distill", str(path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "the engine died" in lines[0]
    assert "--resume" in lines[0]
    with standing_in(server.built) as back:
        assert main(["distill", str(path), "--resume", f"teacher.server.url={back.url}"]) == 0


def test_what_has_no_effect_beside_a_server_is_refused(server: StandIn, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe(server, tmp_path).read_text())
    parsed = parse_recipe(tree)
    assert parse_recipe(parsed.tree()) == parsed
    for changed, named in (({"dtype": "bfloat16"}, "teacher.dtype has no effect"),
                           ({"processor_name_or_path": None}, "processor_name_or_path is missing"),
                           ({"server": {**tree["teacher"]["server"], "top_logprob": 3}},
                            "Did you mean 'top_logprobs'"),
                           ({"server": {**tree["teacher"]["server"], "url": "localhost:8000"}},
                            "must be a URL")):
        with pytest.raises(RecipeError, match=named):
            parse_recipe({**tree, "teacher": {**tree["teacher"], **changed}})
