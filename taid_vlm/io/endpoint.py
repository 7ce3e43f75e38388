"""Servers that speak OpenAI's protocol: a request, its answer, and how patiently it is sent."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from taid_vlm.config.server import Server
from taid_vlm.errors import TaidError, nearest

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})  # worth another attempt
REFUSING = frozenset({400, 413, 422})  # of one request: too long, filtered, ...
LONGEST_WAIT = 60.0  # seconds between two attempts
SHOWN = 300  # characters of a server's own words in a message

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Endpoint:
    """A server and how patiently it is asked.

    Args:
        url: up to and with the version, for example "http://localhost:8000/v1".
        model: the name under which the server knows the model.
        key: sent as bearer token, and never written or shown.
        timeout: seconds until a request that says nothing is given up.
        attempts: how often a request is sent before it is given up.
        backoff: seconds before the second attempt, doubled before every further one.
        settings: what a user calls url, timeout and the variable that holds the key.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    settings: tuple[str, str, str] = ("--base-url", "--timeout", "--api-key-env")

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise TaidError(f"{self.settings[0]} = '{self.url}', but it must begin with http:// or "
                            "https://, as in http://localhost:8000/v1.")

    def address(self, path: str) -> str:
        """Where a method ("/chat/completions") is; `url` may end in it."""
        return self.url.rstrip("/").removesuffix(path) + path

    def hide(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:SHOWN]


class Failure(Exception):
    """No answer; `passing`: another attempt may help, after the `seconds` the server asks for."""

    def __init__(self, reason: str, passing: bool = True, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.passing, self.seconds = passing, seconds


class GivenUp(Exception):
    """No answer after `attempts` of them; its text is the last one's failure."""

    def __init__(self, failure: Failure, attempts: int) -> None:
        super().__init__(str(failure))
        self.attempts = attempts


class ServerLost(TaidError):
    """A server that a run needs does not answer any more, or with something else than it was asked
    for."""


class WrongAnswer(TaidError):
    """What a server says cannot be what it was asked for; asking again would not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another machine."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def persistently(end: Endpoint, attempt: Callable[[], Answer], closing: threading.Event) -> Answer:
    """What `attempt` returns, tried again after failures that may pass, with longer and longer
    pauses.

    Args:
        closing: set by whoever no longer wants the answer; wakes up from a pause.

    Raises:
        Failure: one that does not pass. GivenUp: too many that might have.
    """
    for number in range(end.attempts):
        try:
            return attempt()
        except Failure as failure:
            if not failure.passing:
                raise
            last = failure
        pause = min(max(end.backoff * 2**number, last.seconds), LONGEST_WAIT)
        if number + 1 == end.attempts or closing.wait(pause):
            break
    raise GivenUp(last, number + 1)


def send(end: Endpoint, path: str, body: bytes | None, read: Callable[[bytes], Answer]) -> Answer:
    """Send one request (without a body: GET), and what `read` makes of the answer.

    Raises:
        Failure: no answer, or one of which `read` raises ValueError.
        TaidError: the server refuses whatever is sent (wrong address, key, name).
    """
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {end.key}"} if end.key else {}
    request = urllib.request.Request(end.address(path), body, headers)
    try:
        with _OPENER.open(request, timeout=end.timeout) as response:
            return read(response.read())
    except TaidError:
        raise
    except urllib.error.HTTPError as error:
        raise _refused(end, path, error) from error
    except TimeoutError:
        raise Failure(f"nothing within {end.timeout:g} seconds ({end.settings[1]})") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Failure(end.hide(f"{type(error).__name__}: {reason}")) from None


def endpoint_of(server: Server, called: str) -> Endpoint:
    """The server of a recipe's section `called`; raises TaidError without the key it names."""
    key = None if server.api_key_env is None else os.environ.get(server.api_key_env)
    if server.api_key_env is not None and not key:
        raise TaidError(f"{called}.api_key_env = '{server.api_key_env}', but there is no such "
                        "environment variable.")
    return Endpoint(server.url, server.model, key, server.timeout, server.retries + 1, 0.5,
                    (f"{called}.url", f"{called}.timeout", f"{called}.api_key_env"))


def longest_row(
    end: Endpoint, called: str, lost: type[ServerLost], closing: threading.Event
) -> int | None:
    """How many tokens a server takes, if it says so; raises TaidError where its model is not
    served, `lost` without an answer."""
    try:
        tree = persistently(end, lambda: send(end, "/models", None, json.loads), closing)
        models = {card["id"]: card for card in tree["data"]}
    except GivenUp as last:
        raise lost(f"{called}.url = '{end.url}' gives no answer after {last.attempts} attempts; "
                   f"the last one: {last}.") from last
    except (Failure, LookupError, TypeError) as problem:
        raise TaidError(f"{called}.url = '{end.url}' lists no models: {problem}.") from problem
    if end.model not in models:
        raise TaidError(f"{called}.model = '{end.model}' is not served at '{end.url}'."
                        f"{nearest(end.model, models)}")
    length = models[end.model].get("max_model_len")
    return length if isinstance(length, int) else None


def insist(
    end: Endpoint, path: str, attempt: Callable[[], Answer], closing: threading.Event, *,
    called: str, about: str, lost: type[ServerLost], mend: Callable[[str], str] = lambda words: "",
) -> Answer:
    """As `persistently`; raises `lost` with one message for whatever else comes.

    Args:
        called: the recipe's section. about: what is asked for. mend: of a refusal's words.
    """
    address = end.address(path)
    try:
        return persistently(end, attempt, closing)
    except Failure as failure:
        raise lost(f"{called}: '{address}' refuses {about}: {failure}.{mend(str(failure))}"
                   ) from failure
    except GivenUp as last:
        raise lost(f"{called}: '{address}' gives no answer after {last.attempts} attempts; the "
                   f"last one: {last}.") from last
    except WrongAnswer as wrong:
        raise lost(f"{called}: '{address}' answers wrongly: {wrong}.") from wrong


def _refused(end: Endpoint, path: str, error: urllib.error.HTTPError) -> Exception:
    code, body = error.code, b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        body = error.read()
    words = end.hide(f"{code} {error.reason}: {body.decode(errors='replace')}")
    if code in PASSING | REFUSING:
        return Failure(words, code in PASSING, _seconds(error.headers.get("Retry-After")))
    url, _, key = end.settings
    hint = f"; check {url} (it mostly ends in /v1) and the model's name" if code == 404 \
        else f"; set the variable that {key} names to a valid key" if code in (401, 403) else ""
    return TaidError(f"'{end.address(path)}' answers {words}{hint}")


def _seconds(value: str | None) -> float:
    """Of a Retry-After; 0 where there is none, or a date."""
    with contextlib.suppress(ValueError):
        return max(float(value or 0), 0.0)
    return 0.0
