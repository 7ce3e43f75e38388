"""One set of saved checkpoints for all command-line tests; nothing may reach the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from cli.hub import TOKEN, Hub, serve
from cli.recipes import Checkpoints, Outcome, command

from taid_vlm.models import loading
from taid_vlm.runs import run


@pytest.fixture(scope="session", autouse=True)
def quiet_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, no hub, and no traces in the user's cache of data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    for module in (run, loading):
        monkeypatch.setattr(module, "load_model", load)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command and catch what it prints."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = command(*arguments)
        caught = capsys.readouterr()
        return Outcome(status, caught.out, caught.err)

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in that this process takes for the hub, with a token and an empty cache."""
    constants = huggingface_hub.constants
    with serve() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
