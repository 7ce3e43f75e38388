"""A model behind a URL, against a server of the test's own that behaves and misbehaves."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from benchmarks.quiz import questions
from benchmarks.serving import (
    KEY,
    Body,
    Reply,
    Server,
    asked_text,
    completion,
    failure,
    serving,
)
from PIL import ExifTags, Image, ImageChops
from zoo.images import noise

from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.remote import Remote, own_seed
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.records import ImageRef


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as made:
        yield made


def test_a_question_arrives_as_it_is(server: Server) -> None:
    """Texts and images in their order, the images bit for bit as PNG."""
    asked = questions(6)
    found = server.ask(asked)
    assert found == {q.id: Answer("".join(filter(None, q.prompt)).strip()) for q in asked}
    bodies = {asked_text(body): body for body in server.bodies}
    for question in asked:
        body = bodies["".join(filter(None, question.prompt))]
        parts = body["messages"][0]["content"]
        assert [part["type"] for part in parts] == [
            "image_url" if part is None else "text" for part in question.prompt]
        for part, image in zip(parts, question.images, strict=False):
            head, data = part["image_url"]["url"].split(",")
            shown = Image.open(io.BytesIO(base64.b64decode(data)))
            assert head == "data:image/png;base64"
            assert shown.format == "PNG"
            assert ImageChops.difference(shown, image.load()).getbbox() is None
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 9, 0.0)
        assert "seed" not in body
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all(each["Authorization"] == f"Bearer {KEY}" for each in server.headers)


def test_without_a_key_none_is_sent(server: Server) -> None:
    server.ask(questions(2, seen=False), key=None, url=server.url + "/chat/completions/")
    assert not any("Authorization" in each for each in server.headers)
    assert set(server.paths) == {"/v1/chat/completions"}


def test_sampling_sends_every_question_a_seed_of_its_own(server: Server) -> None:
    asked = questions(8, seen=False)
    server.ask(asked, seed=3, temperature=0.7)
    server.ask(asked, seed=4, temperature=0.7)
    assert {body["seed"] for body in server.bodies} == {
        own_seed(seed, question.id) for question in asked for seed in (3, 4)}
    assert len({body["seed"] for body in server.bodies}) == 16
    assert all(body["top_p"] == 0.9 and 0 <= body["seed"] < 2**31 for body in server.bodies)


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    """Whether it happens so soon; however busy the machine is, nothing is measured."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.005)
    return happened()


def test_requests_are_made_at_once_and_no_more_than_asked_for(server: Server) -> None:
    def together(body: Body, times: int) -> Reply:
        assert within(20, lambda: server.most >= 8)
        return completion("yes")

    server.reply = together
    assert len(server.ask(questions(16, seen=False), requests=8)) == 16
    assert server.most == 8


def test_images_are_made_ready_while_the_server_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many again as are being answered, before the first answer is there."""
    ready: list[str] = []

    def answered(body: Body, times: int) -> Reply:
        assert within(20, lambda: len(ready) >= 8)
        return completion("yes")

    def made(question: Question) -> list[Any]:
        ready.append(question.id)
        return [{"role": "user", "content": [{"type": "text", "text": question.id}]}]

    server.reply = answered
    monkeypatch.setattr("taid_vlm.benchmarks.remote.chat_messages", made)
    assert len(server.ask(questions(24, seen=False), requests=4)) == 24
    assert server.most <= 4


def test_a_file_is_sent_as_it_is_where_every_decoder_sees_the_same() -> None:
    """Otherwise a PNG of what a local model is shown."""
    picture = noise(20, 12)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, kind, options, alike in (
        ("RGB", "JPEG", {}, True), ("L", "JPEG", {}, True), ("RGB", "PNG", {}, True),
        ("RGB", "WEBP", {}, True), ("RGB", "JPEG", {"exif": turned}, False),
        ("RGBA", "PNG", {}, False), ("P", "PNG", {}, False), ("RGB", "GIF", {}, False),
        ("RGB", "BMP", {}, False), ("I;16", "PNG", {}, False), ("CMYK", "JPEG", {}, False),
        ("RGB", "WEBP", {"save_all": True, "append_images": [noise(20, 12, 1)]}, False),
    ):
        file = io.BytesIO()
        (picture.convert("L") if name == "I;16" else picture).convert(name).save(
            file, kind, **options)
        image = ImageRef(file.getvalue(), "row 0")
        mime, data = image.as_file()
        assert (data == file.getvalue(), mime == f"image/{kind.lower()}") == (
            alike, alike or kind == "PNG"), (name, kind)
        seen = Image.open(io.BytesIO(data)).convert("RGB")
        assert (seen.size, seen.tobytes()) == (image.load().size, image.load().tobytes())


@pytest.mark.parametrize("trouble", [
    failure(429), failure(500), failure(503, **{"Retry-After": "0.02"}), (200, {}, b"<html>"),
    (200, {}, b'{"choices": []}'), (200, {}, b'{"choices": [{"message": {"content": 7}}]}'),
    (200, {}, b"\xff\xfe"), (200, {"Content-Length": "1000"}, b"{"), (502, {}, b"bad gateway"),
    failure(429, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
])
def test_what_passes_is_tried_again(server: Server, trouble: Reply) -> None:
    server.reply = lambda body, times: trouble if times < 3 else completion("A")
    how = {"timeout": 0.3} if "Content-Length" in trouble[1] else {}
    found = server.ask(questions(3, seen=False), **how)
    assert {answer.text for answer in found.values()} == {"A"}
    assert sorted(server.seen.values()) == [3, 3, 3]


def test_a_silent_server_is_given_up(server: Server) -> None:
    def silent(body: Body, times: int) -> Reply:
        if times < 2:
            time.sleep(0.6)
        return completion("A")

    server.reply = silent
    assert server.ask(questions(1, seen=False), timeout=0.2)["q00"].text == "A"
    server.seen.clear()
    with pytest.raises(TaidError, match=r"after 1 attempts; .*within 0.2 seconds \(--timeout\)"):
        server.ask(questions(1, seen=False), timeout=0.2, attempts=1)


def test_a_server_that_is_not_there_ends_the_evaluation() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, backoff=0.01)
    with pytest.raises(TaidError, match=r"'http://127.0.0.1:9/v1/chat/completions' gives no answer "
                                        r"after 2 attempts.*refused.*run again"):
        list(Remote(endpoint, 2, max_new_tokens=3).answers(questions(2, seen=False), (), 0))


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    server.reply = lambda body, times: failure(429, **{"Retry-After": "0.4"}) if times < 2 else \
        completion("A")
    started = time.perf_counter()
    server.ask(questions(1, seen=False))
    assert time.perf_counter() - started >= 0.4


@pytest.mark.parametrize(("status", "hint"), [
    (401, "--api-key-env"), (403, "--api-key-env"), (404, "--base-url"), (302, "302")])
def test_what_will_not_pass_ends_at_once(server: Server, status: int, hint: str) -> None:
    server.reply = lambda body, times: failure(status, "who are you", Location="/elsewhere")
    with pytest.raises(TaidError, match=f"answers {status} .*who are you.*{hint}|{hint}"):
        server.ask(questions(40, seen=False), requests=2)
    assert len(server.bodies) <= 4  # those that were under way
    assert set(server.paths) == {"/v1/chat/completions"}  # a key never follows a redirect


def test_the_key_is_never_shown(
    server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    for status in (401, 500, 400):
        server.reply = lambda body, times, status=status: failure(status, f"bad key {KEY}!")
        with pytest.raises(TaidError) as caught:
            server.ask(questions(2, seen=False), attempts=1)
        shown.append(f"{caught.value} {caught.value.__cause__}")
    shown += [repr(Endpoint(server.url, "m", KEY)), caplog.text, *capsys.readouterr()]
    assert not any(KEY in text for text in shown)
    assert all("***" in text for text in shown[:3])


def test_one_refused_question_costs_only_itself(server: Server) -> None:
    asked = questions(12, seen=False)
    bad = asked[0]
    server.reply = lambda body, times: failure(400, "too long") if \
        asked_text(body) == "".join(filter(None, bad.prompt)) else completion("A")
    found = server.ask(asked, requests=1)
    assert found.pop(bad.id) == Answer(problem="refused by the server")
    assert set(found.values()) == {Answer("A")}
    assert len(found) == 11


def test_a_server_that_refuses_everything_is_told_and_nothing_counts(server: Server) -> None:
    server.reply = lambda body, times: failure(400, "max_tokens is not supported")
    for number in (3, 50):
        with pytest.raises(TaidError, match=r"refuses every question: 400 .*max_tokens is not"):
            server.ask(questions(number, seen=False))
    assert len(server.bodies) < 30


def test_broken_images_cost_only_their_questions(server: Server) -> None:
    broken = Question("broken", (None, "what"), (ImageRef(b"no image", "row"),))
    assert server.ask([broken]) == {"broken": Answer(problem="unreadable image")}
    assert not server.bodies
    found = server.ask([broken, *questions(3)])
    assert len(found) == 4


def test_answers_in_all_their_forms(server: Server) -> None:
    replies = iter([completion(" B \n"), completion(None), completion("ab", "length"),
                    completion([{"type": "text", "text": "par"}, {"type": "text", "text": "ts"}]),
                    completion("\ud800 x")])
    server.reply = lambda body, times: next(replies)
    found = server.ask(questions(5, seen=False), requests=1)
    assert list(found.values()) == [Answer("B"), Answer(""), Answer("ab", cut=True),
                                    Answer("parts"), Answer("? x")]


def test_what_is_done_is_not_asked(server: Server) -> None:
    asked = questions(6, seen=False)
    found = server.ask(asked, done=("q01", "q04"))
    assert set(found) == {"q00", "q02", "q03", "q05"}
    assert len(server.bodies) == 4


def test_a_url_must_be_one() -> None:
    with pytest.raises(TaidError, match=r"--base-url = 'localhost:8000'.*http://"):
        Endpoint("localhost:8000", "m")
