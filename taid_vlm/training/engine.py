"""A vLLM server that samples the student's answers, with the student's weights in it.

What is asked, and with which seeds, is the same for any number of processes. What the server then
draws is its own: vLLM computes in batches of whatever is under way, whose rounding may turn a near
tie. So that a redone step still learns the same answers, all that was sampled is written down, and
taken from there if the server would have the very weights it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from taid_vlm.adapters import Continuation, ModelAdapter, continued_record
from taid_vlm.config.sampling import EngineSpec
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.endpoint import (
    Failure,
    ServerLost,
    endpoint_of,
    insist,
    longest_row,
    send,
)
from taid_vlm.io.folders import whole_or_absent
from taid_vlm.models.forward import answer_logits, evaluation_mode
from taid_vlm.models.published import use_published_names
from taid_vlm.objectives import label_log_prob
from taid_vlm.records import Record
from taid_vlm.training.sampled import Drawing, Prompt, Sample, read_sample, request

logger = logging.getLogger(__name__)

CALLED = "objective.on_policy.engine"
ADAPTER = "taid-vlm-student"  # what the server calls a student's adapter
FOLDER, JOURNAL = "engine_weights", "engine_samples.jsonl"
CHECKED = 4  # answers of each process, after every reload
# Nats by which a sampled token's log-probability may differ from the student's here, on average. Of
# one model in bfloat16, by vLLM on a CPU and by transformers, it was 0.01 to 0.05.
SAME_WEIGHTS = 0.15
DEV_MODE = " Start the server with VLLM_SERVER_DEV_MODE=1."
LORA = " Start the server with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."


class EngineLost(ServerLost):
    """The server that samples."""


class Engine:
    """Raises TaidError where there is no such server, or none that takes weights.

    Args:
        output_dir: the run's, for the weights and for what was sampled.
    """

    def __init__(self, spec: EngineSpec, output_dir: str | Path) -> None:
        self.spec, self.model = spec, spec.model
        self.folder = Path(spec.weights_dir or Path(output_dir) / FOLDER).expanduser().resolve()
        self.journal = Path(output_dir) / JOURNAL
        self.end = endpoint_of(spec, CALLED)
        self.root = replace(self.end, url=self.end.url.rstrip("/").removesuffix("/v1"))
        self._closing = threading.Event()
        self.longest = longest_row(self.end, CALLED, EngineLost, self._closing)
        self._forget()  # so that a server without this is refused before anything is loaded
        self.synced: int | None = None  # the step before which the server got its weights
        self.mark = ""  # of these weights
        self.syncs, self.sync_seconds, self.redone = 0, 0.0, 0
        self.interrupted = False  # since it got them; it may have been started anew
        self._redone: dict[int, dict[str, Any]] = {}  # lines of the journal by step
        self._mode = "w"  # of the journal: an earlier run's is not gone on with

    # ----- weights --------------------------------------------------------------------------

    def sync(self, model: Any, step: int, accelerator: Accelerator) -> bool:
        """Give the server the student's weights, if they are due; whether they were. All processes
        take part."""
        due = self.synced is None or step - self.synced >= self.spec.sync_every
        if not due and not self.interrupted:
            return False
        started = time.perf_counter()
        outcome: list[Any] = [None, ""]
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            try:
                outcome = [None, self._give(model, weights, step)]
            except TaidError as error:
                outcome = [str(error), ""]
        problem, self.mark = broadcast_object_list(outcome)
        if problem:
            raise EngineLost(problem)
        self.model = ADAPTER if is_adapter(model) else self.spec.model
        self.synced, self.syncs, self.interrupted = step, self.syncs + 1, False
        self.sync_seconds += time.perf_counter() - started
        return True

    def _refuse_kept_head(self, model: Any) -> None:
        """vLLM (0.32) on a CPU packs weights for its kernels when it loads them, but a head that is
        the embedding only when it starts."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if is_adapter(model) or head is None or head.weight is not embedding.weight:
            return
        info = b""
        with contextlib.suppress(Failure, TaidError):  # other versions may not say
            info = send(self.root, "/server_info", None, bytes)
        if b"device_config=cpu" in info:
            raise TaidError(f"{CALLED}: the student's head is its embedding, and vLLM on a CPU "
                            "keeps the head that it started with.", mend="Serve on a GPU, train an "
                            "adapter, or take a student whose head is apart (tie_word_embeddings: "
                            "false, with lm_head.weight in its checkpoint).")

    def _give(self, model: Any, weights: Mapping[str, Tensor], step: int) -> str:
        if not self.syncs:
            self._refuse_kept_head(model)
        folder = self.folder / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
        use_published_names(model)
        with whole_or_absent(folder, "the student's weights could not be written to '{}'") as part:
            model.save_pretrained(str(part), state_dict=dict(weights))
        if is_adapter(model):
            body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
            self._post(self.end, "/load_lora_adapter", body, LORA)
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post(self.root, "/collective_rpc", body, DEV_MODE)
        self._forget()
        for old in self.folder.glob("step-*"):
            if old != folder or not is_adapter(model):  # which the server may read once more
                shutil.rmtree(old, ignore_errors=True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return fingerprint({name: x for name, x in weights.items() if name in trained})

    def _forget(self) -> None:
        """What the server keeps of prompts and of images is of the weights it had. (A worker of
        vLLM 0.32 drops images with its weights, and dies of the first one that its scheduler takes
        for kept.)"""
        self._post(self.root, "/reset_encoder_cache", {}, DEV_MODE)
        said = self._post(self.root, "/reset_prefix_cache", {}, DEV_MODE)
        if b'"success":false' in said.replace(b" ", b""):
            raise EngineLost(f"{CALLED}: the server could not forget the prompts it knows: "
                             "somebody else asks it at the same time.")

    def _post(self, end: Any, path: str, body: Mapping[str, Any], mend: str) -> bytes:
        def attempt() -> bytes:
            try:
                return send(end, path, json.dumps(body).encode(), bytes)
            except Failure as failure:  # weights that it cannot load are not loaded the next time
                once = failure.passing and "failed" not in str(failure)
                raise Failure(str(failure), once, failure.seconds) from None

        try:
            return insist(end, path, attempt, self._closing, called=CALLED, lost=EngineLost,
                          about="the student's weights")
        except ServerLost:
            raise
        except TaidError as problem:
            raise TaidError(f"{CALLED}: {problem}.{mend if '404' in str(problem) else ''}"
                            ) from problem

    # ----- answers --------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[Prompt], drawing: Drawing, seed: str, step: int
    ) -> list[Sample]:
        """An answer to each; those of a step that is redone, if its weights are the same."""
        line = self._redone.get(step, {})
        known = line.get("answers", {}) if line.get("weights") == self.mark else {}
        self.redone += bool(known)
        samples = {key: Sample(tuple(ids), end) for key, (ids, end) in known.items()}
        missing = [prompt for prompt in prompts if prompt.key not in samples]
        with ThreadPoolExecutor(max(1, min(self.spec.concurrency, len(missing)))) as pool:
            asked = [pool.submit(self._ask, prompt, drawing, seed) for prompt in missing]
            try:
                fresh = [future.result() for future in asked]
            except TaidError:
                self._closing.set()  # what waits for another attempt gives up
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        samples |= {prompt.key: said for prompt, said in zip(missing, fresh, strict=True)}
        return [samples[prompt.key] for prompt in prompts]

    def _ask(self, prompt: Prompt, drawing: Drawing, seed: str) -> Sample:
        path, body = request(prompt, self.model, drawing, seed)

        def attempt() -> Sample:
            try:
                return send(self.end, path, body, lambda data: read_sample(
                    data, prompt, self.model, drawing))
            except Failure as failure:
                self.interrupted |= failure.passing
                raise

        return insist(self.end, path, attempt, self._closing, called=CALLED, about=prompt.key,
                      lost=EngineLost)

    # ----- what was sampled -----------------------------------------------------------------

    def note(self, step: int, answers: Mapping[str, tuple[Sequence[int], int | None]]) -> None:
        """Write down a step's answers, of all processes (in one of them)."""
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.journal.open(self._mode, encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "weights": self.mark, "answers": answers}) + "\n")
        self._mode = "a"

    def state(self) -> dict[str, Any]:
        """For a checkpoint. The next step's answers are from that checkpoint's weights, whether the
        run goes on or is gone on with."""
        self.synced = None
        return {"syncs": self.syncs, "sync_seconds": self.sync_seconds, "redone": self.redone}

    def resume(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """Go on behind a step: later ones that were written down are redone ones."""
        self.syncs, self.sync_seconds, self.redone = (saved or self.state()).values()
        if self.journal.is_file():
            for text in self.journal.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last one may be half a line
                    line = json.loads(text)
                    if line["step"] > step:
                        self._redone[line["step"]] = line
        self.synced, self._mode = None, "a"

    def report(self) -> dict[str, Any]:
        return {"name": self.spec.model, "syncs": self.syncs, "sync_seconds": self.sync_seconds,
                "redone": self.redone}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of weights to the last bit, on any device and in any order of their sums."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [(name, int(x.detach().contiguous().view(whole[x.element_size()]).sum(
        dtype=torch.int64))) for name, x in sorted(weights.items())]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def is_adapter(model: Any) -> bool:
    """Whether what is trained is an adapter, which is given without its base model."""
    return hasattr(model, "get_base_model")


# ----- the same weights -------------------------------------------------------------------------


@torch.no_grad()
def differences(
    model: Any, adapter: ModelAdapter, answers: Sequence[tuple[Record, int, Sample]], least: int
) -> tuple[float, int]:
    """The sum over some sampled tokens of |log-probability there - here|, and how many they are.

    Args:
        least: so many forward passes are made in any case: where weights are spread over processes,
            all take part in each.
    """
    total, tokens = 0.0, 0
    for number in range(max(len(answers), least)):
        inputs, mask, labels, there = _row(adapter, answers[number] if number < len(answers)
                                           else None)
        inputs = {key: x.to(model.device) for key, x in inputs.items()}
        with evaluation_mode(model):
            logits = answer_logits(model, inputs, mask.to(model.device))
        here = label_log_prob(logits.float(), labels.to(logits.device)).double().cpu()
        total += float((here - there).abs().sum()) if len(there) == len(here) else 0.0
        tokens += len(there)
    return total, tokens


def _row(
    adapter: ModelAdapter, answer: tuple[Record, int, Sample] | None
) -> tuple[Mapping[str, Tensor], Tensor, Tensor, Tensor]:
    """Inputs of a record with its sampled answer, where its tokens are predicted [1, T], these
    tokens [n] and what the server says of them [n]; of any record, without such, for None."""
    if answer is not None:
        with contextlib.suppress(SampleDropped):
            record, turn, sample = answer
            new, rendered = continued_record(adapter, Continuation(
                record, turn, sample.ids, sample.end))
            encoded = adapter.encode([rendered], [[image.load() for image in new.images]], "right")
            ids, own = encoded.rows[0].ids, list(sample.ids[: len(rendered.own)])
            start = len(ids) - len(rendered.own)  # they stand last
            if own and sample.log_probs is not None:
                mask = torch.zeros(1, len(ids), dtype=torch.bool)
                mask[0, start - 1 : start - 1 + len(own)] = True
                return (encoded.inputs, mask, torch.tensor(own),
                        torch.tensor(sample.log_probs[: len(own)], dtype=torch.float64))
    encoded = adapter.encode([adapter.render(Record("placeholder", text="."))], [[]], "right")
    mask = torch.zeros(1, len(encoded.rows[0].ids), dtype=torch.bool)
    mask[0, 0] = True
    return encoded.inputs, mask, torch.zeros(1, dtype=torch.long), torch.empty(0)

