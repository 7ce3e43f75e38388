"""A stand-in for vLLM: a zoo model behind the parts of its protocol that a teacher is asked with.

`vllm_0_32.json` holds what vLLM 0.32 answered for `wide_llama()`; `test_served.py` holds the
stand-in's answers against it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from PIL import Image
from zoo import Built, build, families

Tree = dict[str, Any]
NAME = "zoo-llama"


def wide(family: str, **sizes: Any) -> Built:
    """With other sizes; heads have 32 at least where vLLM runs on a CPU."""
    plain = families._text_args
    with mock.patch.object(families, "_text_args", lambda *args: {**plain(*args), **sizes}):
        return build(family, seed=sizes.pop("seed", 3))


def wide_llama(seed: int = 3) -> Built:
    return wide("llama", seed=seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


class StandIn:
    """Serves `built`. `twist` may change an answer (a tree) or take its place with (status, tree);
    it is called with the request's body, the answer and how many there were before.

    Args:
        max_logprobs: as vLLM's option; -1: the model's vocabulary.
        dev_mode: as with VLLM_SERVER_DEV_MODE=1, so that its weights can be set.
    """

    def __init__(
        self, built: Built, name: str = NAME, max_logprobs: int = -1, dev_mode: bool = True
    ) -> None:
        self.dev_mode, self.model, self.reloads = dev_mode, built.model, list[str]()
        self.adapter: tuple[str, Any] | None = None
        self.device = "cpu"
        self.stale = set[str]()  # what is kept of the weights before
        self.built, self.name, self.length = built, name, 512
        self.processor = copy.deepcopy(built.processor)  # the trainer uses the other one meanwhile
        self.twist: Callable[[Tree, Tree, int], Any] = lambda body, answer, number: answer
        self.bodies: list[Tree] = []
        self.now = self.most = 0
        self.pause, self.closing = 0.0, threading.Event()
        self.lock, self.one = threading.Lock(), threading.Lock()
        rows = built.model.get_output_embeddings().weight.shape[0]
        self.max_logprobs = rows if max_logprobs < 0 else max_logprobs
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/server_info":
                    self._reply(200, {"vllm_config": f"seed=0, device_config={server.device}, "})
                    return
                card = {"id": server.name, "object": "model", "created": 0, "owned_by": "vllm",
                        "root": server.name, "parent": None, "max_model_len": server.length,
                        "permission": []}
                self._reply(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    if server.closing.wait(server.pause):
                        return
                    status, tree = server.answer(self.path, body, number)
                finally:  # before the client knows, who may then send the next one
                    with server.lock:
                        server.now -= 1
                self._reply(status, tree)

            def _reply(self, status: int, tree: Any) -> None:
                data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Tree, number: int) -> tuple[int, Any]:
        if not path.endswith("/completions"):
            with self.one:
                return self.control(path, body)
        if body["model"] not in (self.name, self.adapter and self.adapter[0]):
            return 404, error(404, f"The model `{body['model']}` does not exist.")
        if "seed" in body:
            with self.one:
                tree = self.sample(path, body)
            plain = self.twist(body, tree, number)
            return plain if isinstance(plain, tuple) else (200, plain)
        k = body["prompt_logprobs"]
        if k > self.max_logprobs:
            return 400, error(400, f"Requested prompt logprobs of {k}, which is greater than max "
                              f"allowed: {self.max_logprobs} (parameter=prompt_logprobs, value={k})"
                              , "prompt_logprobs")
        ids, entries = self.laws(body, k)
        plain = self.twist(body, self.tree(path, ids, entries), number)
        return plain if isinstance(plain, tuple) else (200, plain)

    # ----- the student's engine -------------------------------------------------------------

    def control(self, path: str, body: Tree) -> tuple[int, Any]:
        """What sets the weights and forgets prompts, of a server in its development mode."""
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path in ("/reset_prefix_cache", "/reset_encoder_cache"):
            self.stale.discard(path)
            return 200, {"success": True} if "prefix" in path else b""
        self.stale = {"/reset_prefix_cache", "/reset_encoder_cache"}
        if path == "/v1/load_lora_adapter":
            self.adapter = body["lora_name"], PeftModel.from_pretrained(
                copy.deepcopy(self.built.model), body["lora_path"]).eval()
            return 200, b""
        assert (path, body["method"]) == ("/collective_rpc", "reload_weights")
        folder = body["kwargs"]["weights_path"]
        self.reloads.append(folder)
        try:
            self.model = type(self.built.model).from_pretrained(folder)
        except OSError:
            return 500, error(500, "Call to collective_rpc method failed: Worker failed with error "
                              f"'{folder}', please check the stack trace above for the root cause")
        return 200, {"results": [None]}

    @torch.no_grad()
    def sample(self, path: str, body: Tree) -> Tree:
        """One token after the other, each of its own random number."""
        assert not self.stale, "Encoder cache miss"  # as vLLM's worker dies of it
        inputs = dict(self.inputs(body))
        model = self.adapter[1] if self.adapter and body["model"] == self.adapter[0] else self.model
        draws, prompt = torch.Generator().manual_seed(body["seed"] % 2**63), inputs["input_ids"]
        bias = torch.zeros(model.get_output_embeddings().weight.shape[0])
        for token, value in body["logit_bias"].items():
            bias[int(token)] = value
        ids, values = list[int](), list[float]()
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
            logits = model(**inputs).logits[0, -1].float()
            law = ((logits + bias) / body["temperature"]).softmax(-1)
            token = int(torch.multinomial(law, 1, generator=draws))
            ids.append(token)
            values.append(float(logits.log_softmax(-1)[token]))
            for key, x in inputs.items():
                if x.shape == inputs["attention_mask"].shape and key != "input_ids":
                    tail = x.new_full((1, 1), key == "attention_mask")
                    inputs[key] = torch.cat([x, tail], 1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        tree = self.tree(path, prompt[0].tolist(), []) | {"model": body["model"]}
        choice, text = tree["choices"][0], self.built.tokenizer.decode(ids)
        stopped = ids[-1] in body["stop_token_ids"]
        choice |= {"token_ids": ids, "finish_reason": "stop" if stopped else "length",
                   "stop_reason": ids[-1] if stopped else None}
        if path.endswith("/chat/completions"):
            choice["message"]["content"] = text
            choice["logprobs"] = {"content": [
                {"token": "", "logprob": value, "bytes": [], "top_logprobs": []}
                for value in values]}
            tree["prompt_logprobs"] = None
        else:
            choice |= {"text": text, "prompt_logprobs": None, "logprobs": {
                "text_offset": [0] * len(ids), "token_logprobs": values,
                "tokens": [""] * len(ids), "top_logprobs": [{"": value} for value in values]}}
        return tree

    # ----- a teacher ------------------------------------------------------------------------

    @torch.no_grad()
    def laws(self, body: Tree, k: int) -> tuple[list[int], list[Any]]:
        with self.one:
            inputs = self.inputs(body)
            log_p = self.built.model(**inputs).logits[0].float().log_softmax(-1)
        ids = inputs["input_ids"][0].tolist()
        entries: list[Any] = [None]
        for law, token in zip(log_p, ids[1:], strict=False):
            order = law.argsort(descending=True).tolist()
            shown = [token, *(i for i in order[:k] if i != token)]
            entries.append({str(i): {"logprob": float(law[i]), "rank": order.index(i) + 1,
                                     "decoded_token": self.built.tokenizer.decode([i])}
                            for i in shown})
        return ids, entries

    def inputs(self, body: Tree) -> Mapping[str, Any]:
        if "prompt" in body:
            ids = torch.tensor([body["prompt"]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image_url":
                    data = part.pop("image_url")["url"].removeprefix("data:image/png;base64,")
                    part |= {"type": "image", "image": Image.open(io.BytesIO(
                        base64.b64decode(data)))}
        encoded: Mapping[str, Any] = self.processor.apply_chat_template(
            body["messages"], add_generation_prompt=body["add_generation_prompt"], tokenize=True,
            return_dict=True, return_tensors="pt")
        return encoded

    def tree(self, path: str, ids: list[int], entries: list[Any]) -> Tree:
        shared = {"created": 0, "model": self.name, "service_tier": None,
                  "system_fingerprint": "vllm-0.32.0", "kv_transfer_params": None,
                  "ec_transfer_params": None, "metrics": None,
                  "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1,
                            "completion_tokens": 1, "prompt_tokens_details": None,
                            "completion_tokens_details": None}}
        choice = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None,
                  "token_ids": [0], "routed_experts": None}
        if path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": "", "refusal": None, "annotations": None,
                       "audio": None, "function_call": None, "reasoning": None}
            return {"id": "chatcmpl-0", "object": "chat.completion", **shared,
                    "choices": [{**choice, "message": message}], "prompt_logprobs": entries,
                    "prompt_token_ids": ids, "prompt_text": None}
        return {"id": "cmpl-0", "object": "text_completion", **shared, "choices": [
            {**choice, "text": "", "prompt_logprobs": entries, "prompt_token_ids": ids}]}


def error(status: int, words: str, param: str = "model") -> Tree:
    return {"error": {"message": words, "type": "BadRequestError", "param": param, "code": status}}


@contextlib.contextmanager
def standing_in(built: Built, **options: Any) -> Iterator[StandIn]:
    server = StandIn(built, **options)
    try:
        yield server
    finally:
        server.close()
