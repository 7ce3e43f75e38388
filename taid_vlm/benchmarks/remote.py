"""Models behind a URL that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, TGI ...)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from taid_vlm.benchmarks.answering import Answer, Given, Settings, generate_settings, hold_back
from taid_vlm.benchmarks.question import Question
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.images import png

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})  # worth another attempt
REFUSING = frozenset({400, 413, 422})  # of one question: too long, filtered, ...
LONGEST_WAIT = 60.0  # seconds between two attempts
SHOWN = 300  # characters of a server's own words in a message


@dataclass(frozen=True)
class Endpoint:
    """A server and how patiently it is asked.

    Args:
        url: up to and with the version, for example "http://localhost:8000/v1".
        model: the name under which the server knows the model.
        key: sent as bearer token, and never written or shown.
        timeout: seconds until a request that says nothing is given up.
        attempts: how often a question is asked before the evaluation stops.
        backoff: seconds before the second attempt, doubled before every further one.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise TaidError(f"--base-url = '{self.url}', but it must begin with http:// or "
                            "https://, as in http://localhost:8000/v1.")

    @property
    def address(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    def hide(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:SHOWN]


class _Failure(Exception):
    """No answer; `passing`: another attempt may help, after the `seconds` the server asks for."""

    def __init__(self, reason: str, passing: bool = True, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.passing, self.seconds = passing, seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another machine."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Remote:
    """Answers from a server, `requests` questions at once.

    Args:
        settings: of `generate_settings`. At temperature 0 an answer is greedy as far as the server
            is; otherwise every question has a seed of its own, which servers may ignore.
    """

    def __init__(self, endpoint: Endpoint, requests: int, **settings: Any) -> None:
        self.endpoint, self.requests = endpoint, requests
        self.settings: Settings = generate_settings(**settings)
        self._closing = threading.Event()

    def answers(
        self, questions: Sequence[Question], done: Collection[str], seed: int
    ) -> Iterator[Given]:
        pending = [question for question in questions if question.id not in done]
        return hold_back(self._ask_all(pending, seed), bool(done),
                         f"'{self.endpoint.address}' refuses every question: {{}}")

    def _ask_all(
        self, questions: Sequence[Question], seed: int
    ) -> Iterator[tuple[Given, list[str]]]:
        """Questions with their answers, and the server's words where it refused."""
        self._closing.clear()
        waiting, rest = dict[Future[tuple[Answer, str]], Question](), iter(questions)
        with ThreadPoolExecutor(self.requests) as pool:
            try:
                while True:
                    for question in (next(rest, None) for _ in range(self.requests - len(waiting))):
                        if question is not None:
                            waiting[pool.submit(self._ask, question, seed)] = question
                    if not waiting:
                        return
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
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
        for attempt in range(end.attempts):
            try:
                return self._post(body), ""
            except _Failure as failure:
                if not failure.passing:
                    return Answer(problem="refused by the server"), str(failure)
                last = failure
            pause = min(max(end.backoff * 2**attempt, last.seconds), LONGEST_WAIT)
            if attempt + 1 == end.attempts or self._closing.wait(pause):
                break
        raise TaidError(f"'{end.address}' gives no answer after {attempt + 1} attempts; the last "
                        f"one: {last}. The answers so far are kept; run again to go on.")

    def _request(self, question: Question, seed: int) -> dict[str, Any]:
        how = self.settings
        sampling = {"top_p": how["top_p"], "seed": own_seed(seed, question.id)}
        return {"model": self.endpoint.model, "messages": chat_messages(question),
                "max_tokens": how["max_new_tokens"], "temperature": how["temperature"],
                **(sampling if how["temperature"] else {})}

    def _post(self, body: bytes) -> Answer:
        end = self.endpoint
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {end.key}"} if end.key else {}
        request = urllib.request.Request(end.address, body, headers)
        try:
            with _OPENER.open(request, timeout=end.timeout) as response:
                return read_completion(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error) from error
        except TimeoutError:
            raise _Failure(f"nothing within {end.timeout:g} seconds (--timeout)") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise _Failure(end.hide(f"{type(error).__name__}: {reason}")) from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        end, code = self.endpoint, error.code
        body = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read()
        words = end.hide(f"{code} {error.reason}: {body.decode(errors='replace')}")
        if code in PASSING | REFUSING:
            return _Failure(words, code in PASSING, _seconds(error.headers.get("Retry-After")))
        hint = "; check --base-url (it mostly ends in /v1) and the model's name" if code == 404 \
            else "; set the variable that --api-key-env names to a valid key" \
            if code in (401, 403) else ""
        return TaidError(f"'{end.address}' answers {words}{hint}")


def chat_messages(question: Question) -> list[dict[str, Any]]:
    """The question as typed parts, its images inline as PNG; raises SampleDropped."""
    if any(image.kind == "video" for image in question.images):
        raise SampleDropped("video for a served model", "a server is sent images only")
    images = iter(question.images)
    content = [{"type": "text", "text": part} if part is not None else
               {"type": "image_url", "image_url": {
                   "url": f"data:image/png;base64,{png_base64(next(images).load())}"}}
               for part in question.prompt if part != ""]
    return [{"role": "user", "content": content}]


def read_completion(data: bytes) -> Answer:
    """The answer of a chat completion; ValueError where `data` is none."""
    tree = json.loads(data)
    try:
        choice = tree["choices"][0]
        content = choice["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError(f"no chat completion: {data[:SHOWN].decode(errors='replace')}") from None
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content
                          if isinstance(part, Mapping))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"no text in the answer: {content!r:.100}")
    text = (content or "").encode(errors="replace").decode()  # JSON can hold half a character
    return Answer(text.strip(), cut=choice.get("finish_reason") == "length")


def own_seed(seed: int, name: str) -> int:
    """A question's own seed, in what servers take: 31 bits."""
    return random.Random(f"{seed}/{name}").getrandbits(31)


def png_base64(image: Any) -> str:
    """A PIL image as PNG in base64."""
    return base64.b64encode(png(image, longest=None)).decode("ascii")


def _seconds(value: str | None) -> float:
    """Of a Retry-After; 0 where there is none, or a date."""
    with contextlib.suppress(ValueError):
        return max(float(value or 0), 0.0)
    return 0.0
