"""Models behind a URL that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, TGI ...)."""

from __future__ import annotations

import base64
import json
import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from taid_vlm.benchmarks.answering import Answer, Given, Settings, generate_settings, hold_back
from taid_vlm.benchmarks.question import Question
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.endpoint import SHOWN, Endpoint, Failure, GivenUp, persistently, send
from taid_vlm.records.images import ImageRef

CHAT = "/chat/completions"
REASONING = ("reasoning_content", "reasoning")  # where servers put a thought that they take off


class Remote:
    """Answers from a server, `requests` questions at once.

    As many again are made ready meanwhile (reading an image takes a while), so that the server
    never waits for a question.

    Args:
        settings: of `generate_settings`. At temperature 0 an answer is greedy as far as the server
            is; otherwise every question has a seed of its own, which servers may ignore.
    """

    def __init__(self, endpoint: Endpoint, requests: int, **settings: Any) -> None:
        self.endpoint, self.requests = endpoint, requests
        self.settings: Settings = generate_settings(**settings)
        self._closing = threading.Event()
        self._slots = threading.Semaphore(requests)

    def answers(
        self, questions: Sequence[Question], done: Collection[str], seed: int
    ) -> Iterator[Given]:
        pending = [question for question in questions if question.id not in done]
        return hold_back(self._ask_all(pending, seed), bool(done),
                         f"'{self.endpoint.address(CHAT)}' refuses every question: {{}}")

    def _ask_all(
        self, questions: Sequence[Question], seed: int
    ) -> Iterator[tuple[Given, list[str]]]:
        """Questions with their answers, and the server's words where it refused."""
        self._closing.clear()
        waiting, rest = dict[Future[tuple[Answer, str]], Question](), iter(questions)
        ahead = 2 * self.requests if self.requests > 1 else 1  # one after the other, in order
        with ThreadPoolExecutor(ahead) as pool:
            try:
                while True:
                    for question in (next(rest, None) for _ in range(ahead - len(waiting))):
                        if question is not None:
                            waiting[pool.submit(self._ask, question, seed)] = question
                    if not waiting:
                        return
                    done = wait(waiting, return_when=FIRST_COMPLETED).done
                    for future in [each for each in waiting if each in done]:
                        answer, words = future.result()
                        yield [(waiting.pop(future), answer)], [words] if words else []
            finally:
                self._closing.set()  # wakes up those who wait for another attempt

    def _ask(self, question: Question, seed: int) -> tuple[Answer, str]:
        try:
            body = json.dumps(self._request(question, seed)).encode()
        except SampleDropped as problem:
            return Answer(problem=problem.reason), ""
        end = self.endpoint
        try:
            with self._slots:
                if self._closing.is_set():
                    return Answer(problem="not asked"), ""
                return persistently(end, lambda: send(end, CHAT, body, read_completion),
                                    self._closing), ""
        except Failure as failure:
            return Answer(problem="refused by the server"), str(failure)
        except GivenUp as last:
            raise TaidError(f"'{end.address(CHAT)}' gives no answer after {last.attempts} "
                            f"attempts; the last one: {last}. The answers so far are kept; run "
                            "again to go on.") from last

    def _request(self, question: Question, seed: int) -> dict[str, Any]:
        how = self.settings
        sampling = {"top_p": how["top_p"], "seed": own_seed(seed, question.id)}
        return {"model": self.endpoint.model, "messages": chat_messages(question),
                "max_tokens": how["max_new_tokens"], "temperature": how["temperature"],
                **(sampling if how["temperature"] else {})}


def chat_messages(question: Question) -> list[dict[str, Any]]:
    """The question as typed parts, its images inline; raises SampleDropped."""
    if any(image.kind == "video" for image in question.images):
        raise SampleDropped("video for a served model", "a server is sent images only")
    images = iter(question.images)
    content = [{"type": "text", "text": part} if part is not None else
               {"type": "image_url", "image_url": {
                   "url": "data:{};base64,{}".format(*in_base64(next(images)))}}
               for part in question.prompt if part != ""]
    return [{"role": "user", "content": content}]


def read_completion(data: bytes) -> Answer:
    """The answer of a chat completion; ValueError where `data` is none."""
    tree = json.loads(data)
    try:
        choice = tree["choices"][0]
        message = choice["message"]
        content, reasoning = message.get("content"), [message.get(key) for key in REASONING]
        if "content" not in message and not any(reasoning):
            raise LookupError
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"no chat completion: {data[:SHOWN].decode(errors='replace')}") from None
    text, cut = _text(content, "text"), choice.get("finish_reason") == "length"
    thought = next(filter(None, (_text(each, "text") for each in reasoning)), "") or (
        _text(content, "thinking") if isinstance(content, list) else "")
    return Answer(text, cut=cut, thought=thought,
                  thought_tokens=_thought_tokens(tree.get("usage"), bool(thought) and not text))


def _text(content: Any, kind: str) -> str:
    """What a server sends as text, or as parts of which those of a kind count."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text(part.get(kind, ""), "text") for part in content
                          if isinstance(part, Mapping))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"no text in the answer: {content!r:.100}")
    return (content or "").encode(errors="replace").decode().strip()  # JSON can hold half a
    # character


def _thought_tokens(usage: Any, all_thought: bool) -> int:
    """As a server counts them: under a name of their own, or all where there is no answer."""
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("completion_tokens_details")
    tokens = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    tokens = usage.get("completion_tokens") if all_thought and not tokens else tokens
    return tokens if isinstance(tokens, int) and tokens > 0 else 0


def own_seed(seed: int, name: str) -> int:
    """A question's own seed, in what servers take: 31 bits."""
    return random.Random(f"{seed}/{name}").getrandbits(31)


def in_base64(image: ImageRef) -> tuple[str, str]:
    """MIME type and base64 of an image's file; raises SampleDropped."""
    kind, data = image.as_file()
    return kind, base64.b64encode(data).decode("ascii")
