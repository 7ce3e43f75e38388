"""A server of the tests' own that speaks chat completions, or does not."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.remote import Remote
from taid_vlm.io.endpoint import Endpoint

KEY = "sk-secret-0123456789"
Reply = tuple[int, dict[str, str], bytes]
Body = dict[str, Any]


def completion(text: Any, finish: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    tree = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return 200, {}, json.dumps(tree).encode()


def failure(status: int, words: str = "no", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": words}}).encode()


def asked_text(body: Body) -> str:
    return "".join(part.get("text", "") for part in body["messages"][0]["content"])


class Server:
    """Counts what it is asked; `reply` is called with a request's body and how often it came."""

    def __init__(self) -> None:
        self.reply: Callable[[Body, int], Reply] = lambda body, _: completion(asked_text(body))
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    server.seen[json.dumps(body)] += 1
                    times = server.seen[json.dumps(body)]
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    status, headers, data = server.reply(body, times)
                finally:
                    with server.lock:
                        server.now -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as it was meant to

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def ask(self, asked: list[Question], requests: int = 4, seed: int = 0,
            done: tuple[str, ...] = (), temperature: float = 0.0, **how: Any) -> dict[str, Answer]:
        endpoint = Endpoint(**{"url": self.url, "model": "served", "key": KEY, "timeout": 5.0,
                               "attempts": 4, "backoff": 0.01, **how})
        remote = Remote(endpoint, requests, max_new_tokens=9, temperature=temperature, top_p=0.9)
        return {question.id: answer for given in remote.answers(asked, done, seed)
                for question, answer in given}


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.http.shutdown()
        made.http.server_close()
