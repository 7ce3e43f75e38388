"""The models of an evaluation: folders, runs, hub names or URLs, checked without their weights."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from taid_vlm.adapters import ModelAdapter, check_image_token, make_adapter
from taid_vlm.benchmarks.store import weights_hash
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import load_recipe
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.io.hashing import text_hash
from taid_vlm.models import loading
from taid_vlm.models.lora import find_adapter
from taid_vlm.runs.folders import RECIPE, STUDENT
from taid_vlm.runs.stages import parts_by_name


@dataclass(frozen=True)
class Candidate:
    """A model that is to answer, and what it is called in results."""

    name: str
    source: ModelSpec | Endpoint


def parse_candidates(
    texts: Sequence[str], spec: ModelSpec, kwargs: dict[str, Any] | None = None
) -> list[Candidate]:
    """`[NAME=]MODEL` each: a folder, the folder of a run (its student), or NAME[@REVISION] on the
    hub.

    Args:
        spec: what holds for all of them (dtype, chat template).
        kwargs: variables of all chat templates; None takes those of a run's recipe for its student.
    """
    candidates: list[Candidate] = []
    for text in texts:
        name, path, revision = split_model(text)
        folder = Path(path).expanduser()
        path = str(folder) if folder.exists() else path
        if not (folder / "config.json").exists() and (folder / STUDENT).is_dir():
            path = str(folder / STUDENT)
        candidates.append(Candidate(name, spec.model_copy(update={
            "model_name_or_path": path, "revision": revision,
            "chat_template_kwargs": _kwargs_of_run(Path(path)) if kwargs is None else kwargs})))
    return distinct(candidates)


def _kwargs_of_run(student: Path) -> dict[str, Any]:
    """What a run's recipe says of its student: it is asked as it was taught."""
    recipe = student.parent / RECIPE
    if not _is_run(student):
        return {}
    recipes = [stage for _, stage in parts_by_name(load_recipe(recipe))]
    return dict(recipes[-1].student.chat_template_kwargs)


def _is_run(student: Path) -> bool:
    """Whether a model's folder is a run's student."""
    return student.name == STUDENT and (student.parent / RECIPE).is_file()


def parse_served(texts: Sequence[str], url: str, key_variable: str | None, timeout: float
                 ) -> list[Candidate]:
    """`[NAME=]MODEL` each, as the server at `url` calls them; raises TaidError.

    Args:
        key_variable: the environment variable that holds the server's key.
        timeout: seconds that one request may say nothing.
    """
    key = None if key_variable is None else os.environ.get(key_variable)
    if key_variable is not None and not key:
        raise TaidError(f"--api-key-env: the environment variable '{key_variable}' is not set.")
    if not timeout > 0:
        raise TaidError(f"--timeout = {timeout}, but it must be more than 0 seconds.")
    parts = [(text, *text.rpartition("=")[::2]) for text in texts]
    return distinct([Candidate(_name(text, named, model.rsplit("/", 1)[-1]),
                               Endpoint(url, model, key, timeout)) for text, named, model in parts])


def split_model(text: str) -> tuple[str, str, str]:
    """Name, path or hub name, and revision of "[NAME=]MODEL[@REVISION]"."""
    named, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        named, path = "", text
    revision = "main"
    if "@" in path and not Path(path).expanduser().exists():
        path, _, revision = path.rpartition("@")
    if not path:
        raise TaidError(f"--model '{text}' must be a folder or a hub name, or NAME=one of them.")
    return _name(text, named, Path(path).expanduser().resolve().name), path, revision


def _name(text: str, named: str, own: str) -> str:
    """The name that was given, or the model's own made fit for a folder."""
    if named and not re.fullmatch(r"\w[\w.-]*", named):
        raise TaidError(f"--model '{text}': the name '{named}' must be letters, digits, '_', '-' "
                        "and '.' (it names a folder).")
    return named or re.sub(r"[^\w.-]", "_", own)


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The same; raises TaidError where two have one name."""
    for name, number in Counter(candidate.name for candidate in candidates).items():
        if number > 1:
            raise TaidError(f"--model: two models are called '{name}'; name them, as in --model "
                            "teacher=PATH student=PATH.")
    return candidates


class LocalModel:
    """A model on this machine, without its weights.

    Raises:
        TaidError: nothing there, or nothing that can answer.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.config: PretrainedConfig = loading.load_config(spec, "model")
        self.adapter: ModelAdapter = make_adapter(
            loading.load_processor(spec, "model"), "model",
            chat_template_kwargs=spec.chat_template_kwargs)
        self.adapter.as_learned = _is_run(Path(spec.model_name_or_path))
        check_image_token(self.adapter, self.config)
        folder = Path(spec.model_name_or_path)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise TaidError(f"model: '{folder}' holds no weights (*.safetensors).")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on, beside the settings of answering."""
        adapter, template = find_adapter(self.spec, "model"), self.spec.chat_template
        folder = Path(self.spec.model_name_or_path) if adapter is None else adapter.folder
        digest = None if template is None else text_hash(loading.read_template(template, "model"))
        kwargs = self.spec.chat_template_kwargs
        base = None if adapter is None else Path(adapter.base.model_name_or_path)
        return {"weights_sha256": weights_hash(folder) if folder.is_dir() else None,
                **({"base_sha256": weights_hash(base)} if base and base.is_dir() else {}),
                "commit": getattr(self.config, "_commit_hash", None), "dtype": self.dtype,
                "asked": "as learned" if self.adapter.as_learned else "by its template",
                "chat_template_sha256": digest, **self._shown,
                **({"chat_template_kwargs": kwargs} if kwargs else {})}

    @property
    def _shown(self) -> dict[str, Any]:
        """How pictures are cut and resized, which the processor's files say and not the weights."""
        names = ("image_processor", "video_processor")
        parts = [getattr(self.adapter.processor, name, None) for name in names]
        settings = [part.to_json_string() for part in parts if part is not None]
        return {"pictures_sha256": text_hash("".join(settings))} if settings else {}

    def count_tokens(self, text: str) -> int:
        """Of a text, as this model's tokenizer splits it."""
        return len(self.adapter.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def dtype(self) -> str:
        """Of the weights, as they are loaded."""
        dtype = loading.weights_dtype(self.spec, "model", self.config)
        if dtype == "auto":
            dtype = self.config.dtype or self.config.get_text_config().dtype or torch.float32
        return str(dtype).removeprefix("torch.")

    def describe(self) -> dict[str, Any]:
        """For results.json."""
        skeleton, name = loading.load_skeleton(self.spec, "model"), self.spec.model_name_or_path
        return {"name": name, "revision": None if Path(name).is_dir() else self.spec.revision,
                "model_type": self.config.model_type,
                "parameters": sum(p.numel() for p in skeleton.parameters()), **self.identity}


class ServedModel:
    """A model behind a URL; what answers there is only known by name."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.identity: dict[str, Any] = {"name": endpoint.model, "url": endpoint.url}

    def describe(self) -> dict[str, Any]:
        """For results.json."""
        return dict(self.identity)
