"""A vLLM server that samples the student's answers, with the student's weights in it."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.runs import make_trainer, rows
from training.test_invariance import in_processes
from training.test_served import RECORDED as ALL
from training.test_served import shape
from training.vllm import NAME, StandIn, standing_in, wide_llama
from zoo import build

from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.models.generation import prompt_inputs
from taid_vlm.objectives import parse_objective
from taid_vlm.training import on_policy
from taid_vlm.training.engine import EngineLost, fingerprint
from taid_vlm.training.on_policy import SAME_WEIGHTS
from taid_vlm.training.sampled import VIDEO, Drawing, Prompt, prompts, read_sample, request

torch.set_num_threads(1)
TEXTS = {"kinds": ["text"], "max_steps": 2}
RECORDED = ALL["sampled"]
DRAWING = Drawing(8, 1.0, 1.0, (0, 2), (5, 6))


@pytest.fixture
def server() -> Iterator[StandIn]:
    """With other weights than the student's, which are to be given to it."""
    with standing_in(build("llava", seed=9, tokenizer="permuted")) as made:
        yield made


def objective(server: StandIn, **own: Any) -> dict[str, Any]:
    engine = {"url": server.url, "model": NAME, "timeout": 20.0, "retries": 1,
              **own.pop("engine", {})}
    return {"name": "rkl", "on_policy": {"lmbda": 0.6, "max_new_tokens": 6, "engine": engine,
                                         **own}}


def asked(server: StandIn) -> list[dict[str, Any]]:
    return [body for body in server.bodies if "seed" in body]


# ----- what is asked, and what is read ----------------------------------------------------------


def test_prompts_are_the_students_own_tokens(server: StandIn, tmp_path: Path) -> None:
    """As ids where there are no images, else as a chat that the server reads as the same ids."""
    trainer = make_trainer(tmp_path, objective=objective(server))
    records = [on_policy._record(row) for row in rows(8)]
    pairs = [(record, len(record.learned) - 1) for record in records]
    inputs = prompt_inputs(trainer.collator.student, pairs)
    for (record, turn), prompt in zip(
            pairs, prompts(trainer.collator.student, pairs, inputs), strict=True):
        assert isinstance(prompt, Prompt)
        assert (prompt.chat is None) == (not record.images_before(turn))
        body = json.loads(request(prompt, NAME, DRAWING, "7/1")[1])
        assert server.inputs(body)["input_ids"][0].tolist() == prompt.ids


def test_a_video_is_not_sent(server: StandIn, tmp_path: Path, monkeypatch: Any) -> None:
    trainer = make_trainer(tmp_path, objective=objective(server))
    record = on_policy._record(rows(1)[0])
    inputs = prompt_inputs(trainer.collator.student, [(record, 0)])
    monkeypatch.setattr(type(record.images[0]), "load", lambda self: ["a frame"])
    assert list(prompts(trainer.collator.student, [(record, 0)], inputs)) == [VIDEO]


def test_seeds_follow_from_run_step_and_record_alone() -> None:
    def seed(run: str, key: str) -> int:
        return int(json.loads(request(Prompt(key, [1], None), NAME, DRAWING, run)[1])["seed"])

    assert seed("7/1", "a/0") == seed("7/1", "a/0")
    assert len({seed("7/1", "a/0"), seed("7/2", "a/0"), seed("7/1", "a/1"), seed("8/1", "a/0")}) \
        == 4
    assert all(0 <= seed("7/1", str(i)) < 2**63 for i in range(50))


def answer(ids: list[int], **other: Any) -> bytes:
    choice = {"token_ids": ids, "prompt_token_ids": [1, 3],
              "logprobs": {"token_logprobs": [-1.5] * len(ids)}}
    return json.dumps({"model": NAME, "choices": [{**choice, **other}]}).encode()


def test_an_answer_ends_where_the_student_ends_it() -> None:
    prompt = Prompt("a/0", [1, 3], None)
    assert read_sample(answer([7, 8, 2]), prompt, NAME, DRAWING) == ((7, 8), 2, (-1.5, -1.5))
    assert read_sample(answer([7] * 8), prompt, NAME, DRAWING).end is None
    assert read_sample(answer([0]), prompt, NAME, DRAWING) == ((), 0, ())


@pytest.mark.parametrize(("said", "message"), [
    (answer([7, 8]), "neither ends nor is cut"),
    (answer([7] * 9), "at most 8"),
    (answer([]), "0 tokens"),
    (answer([7, 2], prompt_token_ids=[1, 4]), "reads a/0 as other tokens .* from position 1 of 2"),
    (answer([7, 2], logprobs=None), "which vLLM gives"),
    (answer([7, 2], logprobs={"token_logprobs": [-1.0]}), "with 1 log-probabilities"),
    (answer([7, 2], logprobs={"token_logprobs": [1.0, 1.0]}), "that are none"),
    (answer([7, 2]).replace(NAME.encode(), b"other"), "of the model 'other'"),
])
def test_a_wrong_answer_says_what_is_wrong(said: bytes, message: str) -> None:
    with pytest.raises(TaidError, match=message):
        read_sample(said, Prompt("a/0", [1, 3], None), NAME, DRAWING)


@pytest.mark.parametrize("kind", ["completion", "chat", "stopped"])
def test_the_stand_in_samples_as_vllm_does(kind: str) -> None:
    """Same keys and kinds of values; what vLLM said of its tokens is what the model says here."""
    built, recorded = wide_llama(), RECORDED[kind]
    ids = recorded["response"]["choices"][0]["token_ids"]
    chat = None if kind != "chat" else {"messages": recorded["request"]["messages"]}
    with standing_in(built) as server:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        own = copy.deepcopy(recorded["request"]) | ({
            "stop_token_ids": list(range(576))} if kind == "stopped" else {})
        status, answer = server.answer(path, own, 0)
        read = server.inputs(copy.deepcopy(recorded["request"]))["input_ids"][0].tolist()
    assert (status, shape(answer)) == (200, shape(recorded["response"]))
    drawing = Drawing(6, 1.0, 1.0, tuple(recorded["request"]["stop_token_ids"]), ())
    sample = read_sample(json.dumps(recorded["response"]).encode(), Prompt("a", read, chat), NAME,
                         drawing)
    assert [*sample.ids, *([sample.end] if kind == "stopped" else [])] == ids
    with torch.no_grad():
        laws = built.model(input_ids=torch.tensor([read + ids])).logits[0].log_softmax(-1)
    for place, (token, said) in enumerate(zip(sample.ids, sample.log_probs, strict=True)):
        assert float(laws[len(read) - 1 + place, token]) == pytest.approx(said, abs=1e-4)


# ----- the student's weights --------------------------------------------------------------------


def test_the_server_samples_from_the_weights_of_every_step(server: StandIn, tmp_path: Path
                                                           ) -> None:
    """Reloaded before each, and what it says of its tokens is what the student here says."""
    trainer = make_trainer(tmp_path, objective=objective(server), max_steps=3, logging_steps=1)
    trainer.train()
    report = trainer.rollouts.report()
    assert [Path(folder).name for folder in server.reloads] == ["step-1", "step-2", "step-3"]
    assert report["engine"]["syncs"] == 3 and report["engine"]["sync_seconds"] > 0
    assert report["sampled"] > 0 and report["engine"]["gap"] < 1e-5
    assert not list((tmp_path / "engine_weights").iterdir())
    line = next(log for log in trainer.state.log_history if "on_policy/engine_gap" in log)
    assert line["on_policy/engine_gap"] < 1e-5 and 0 < line["on_policy/time_share"] < 1
    bodies = asked(server)
    assert {"messages" in body for body in bodies} == {True, False}
    unsayable = trainer.collator.student.unsayable - set(bodies[0]["stop_token_ids"])
    assert {str(index) for index in unsayable} <= bodies[0]["logit_bias"].keys()


def test_an_adapter_is_given_alone(tmp_path: Path) -> None:
    with standing_in(build("llava", seed=1, tokenizer="permuted")) as server:
        trainer = make_trainer(
            tmp_path, objective=objective(server), max_steps=2, learning_rate=0.05,
            peft={"r": 4, "target_modules": "all-linear"})
        trainer.train()
    assert not server.reloads and server.adapter is not None
    assert trainer.rollouts.report()["engine"]["gap"] < 1e-5
    assert asked(server)[-1]["model"] == server.adapter[0]


def test_weights_are_given_as_often_as_is_said(server: StandIn, tmp_path: Path) -> None:
    """Their age counts: an answer is as old as the weights that it is from."""
    trainer = make_trainer(
        tmp_path, max_steps=5, save_strategy="steps", save_steps=4,
        objective=objective(server, max_age=2, engine={"sync_every": 3}))
    trainer.train()
    assert [Path(folder).name for folder in server.reloads] == ["step-1", "step-4", "step-5"]
    assert {step for step, _, _ in trainer.rollouts._known.values()} <= {4, 5}


def test_weights_that_the_server_does_not_take_are_told(server: StandIn, tmp_path: Path) -> None:
    """A server that keeps its own is found out by what it says of its tokens."""
    control, plain = server.control, server.model

    def keeps(path: str, body: dict[str, Any]) -> Any:
        said = control(path, body)
        server.model = plain
        return said

    server.control = keeps  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, objective=objective(server), **TEXTS)
    with torch.no_grad():
        plain.lm_head.weight.mul_(3.0)
    with pytest.raises(TaidError, match=rf"differ by .* leaves less than {SAME_WEIGHTS:g}"):
        trainer.train()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_head_that_a_server_keeps_is_refused(device: str, server: StandIn, tmp_path: Path
                                               ) -> None:
    """vLLM on a CPU does not take the head of a model whose head is its embedding."""
    trainer = make_trainer(tmp_path, objective=objective(server), **TEXTS)
    server.device = device
    trainer.model.lm_head.weight = trainer.model.get_input_embeddings().weight
    refused = pytest.raises(TaidError, match=r"head is its embedding.*tie_word_embeddings: false")
    with refused if device == "cpu" else contextlib.nullcontext():
        trainer.rollouts.engine._refuse_kept_head(trainer.model)


def test_the_mark_of_weights_is_of_every_bit() -> None:
    first = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    other = {**first, "a": first["a"].clone()}
    assert fingerprint(first) == fingerprint(dict(reversed(other.items())))
    other["a"][1, 2] = torch.nextafter(other["a"][1, 2], torch.tensor(9.0))
    assert fingerprint(first) != fingerprint(other)


# ----- runs -------------------------------------------------------------------------------------


def run(folder: Path, server: StandIn, name: str, processes: int = 1, **options: Any
        ) -> dict[str, torch.Tensor]:
    own = {"objective": {**objective(server), "name": "taid"}, "max_steps": 5,
           "save_strategy": "steps", "save_steps": 2, "kinds": ["text", "one"],
           "per_device_train_batch_size": 8 // processes, **options}
    in_processes(processes, folder, **{name: own})
    return load_file(Path(own.get("output", folder / name)) / "final.safetensors")


def test_a_killed_run_learns_the_same_answers_again(server: StandIn, tmp_path: Path) -> None:
    """On one process and on two, even if the server would draw others at a second time: a redone
    step takes what was written down, for the weights are the very same."""
    for number in (1, 2):
        folder = tmp_path / str(number)
        whole = run(folder, server, "whole", number)
        with contextlib.suppress(AssertionError):  # a killed process takes the other along
            run(folder, server, "killed", number, kill_at=3)
        before, killed = len(asked(server)), folder / "killed"
        server.twist = lambda body, tree, n: tree | {"choices": [
            tree["choices"][0] | {"token_ids": [65] * 6, "logprobs": {
                "token_logprobs": [-1.0] * 6, "content": [{"logprob": -1.0}] * 6}}]}
        if number == 1:
            run(folder, server, "redone", output=str(killed), max_steps=3,
                resume=str(killed / "checkpoint-2"))
            assert len(asked(server)) == before  # step 3 was sampled before it was killed
        server.twist = lambda body, tree, n: tree
        again = run(folder, server, "again", number, output=str(killed),
                    resume=str(killed / "checkpoint-2"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_processes_ask_what_one_would(server: StandIn, tmp_path: Path) -> None:
    def seeds(number: int) -> list[int]:
        del server.bodies[:]
        run(tmp_path / str(number), server, "run", number, max_steps=2)
        return sorted(body["seed"] for body in asked(server))

    assert seeds(1) == seeds(2)


def test_a_server_that_was_away_gets_the_weights_again(server: StandIn, tmp_path: Path) -> None:
    """It may have been started anew, with the weights that it began with."""
    failed = threading.Event()

    def twist(body: Any, tree: Any, number: int) -> Any:
        if failed.is_set():
            return tree
        failed.set()
        server.model = server.built.model
        return 503, {"error": {"message": "starting"}}

    server.twist = twist
    trainer = make_trainer(tmp_path, objective=objective(server), **{**TEXTS, "max_steps": 1})
    trainer.train()
    assert len(server.reloads) == 2
    assert trainer.rollouts.report()["engine"]["gap"] < 1e-5


def test_a_lost_server_leaves_a_checkpoint(server: StandIn, tmp_path: Path) -> None:
    def twist(body: Any, tree: Any, number: int) -> Any:
        return tree if len(server.reloads) < 2 else (500, {"error": {"message": "gone"}})

    server.twist = twist
    trainer = make_trainer(tmp_path, objective=objective(server), **TEXTS)
    with pytest.raises(EngineLost, match=r"gives no answer after 2 attempts.*--resume") as lost:
        trainer.train()
    assert str(lost.value).count("engine") == 1
    assert (tmp_path / "checkpoint-1" / "on_policy.json").is_file()


# ----- refused before anything is loaded --------------------------------------------------------


def test_a_server_without_its_development_mode_is_refused(tmp_path: Path) -> None:
    with standing_in(build("llava", seed=9, tokenizer="permuted"), dev_mode=False) as server, \
            pytest.raises(TaidError, match="VLLM_SERVER_DEV_MODE=1"):
        make_trainer(tmp_path, objective=objective(server))


@pytest.mark.parametrize(("engine", "message"), [
    ({"model": "zoo-lama"}, "engine.model = 'zoo-lama' is not served.*Did you mean 'zoo-llama'"),
    ({"url": "http://127.0.0.1:9/v1", "retries": 0}, "engine.url = .* gives no answer"),
    ({"api_key_env": "NO_SUCH_KEY"}, "engine.api_key_env = 'NO_SUCH_KEY'"),
])
def test_a_wrong_server_is_refused(
    engine: dict[str, Any], message: str, server: StandIn, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match=message):
        make_trainer(tmp_path, objective=objective(server, engine=engine))


def test_weights_older_than_answers_may_be_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"up to 3 steps old, and max_age = 1 .* max_age: 3"):
        parse_objective({"name": "rkl", "on_policy": {"max_age": 1, "engine": {
            "url": "http://x/v1", "model": "m", "sync_every": 4}}})
