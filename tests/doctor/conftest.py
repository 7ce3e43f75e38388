"""The command, the checkpoints and the recipes that the doctor's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli.conftest import checkpoints, cli, quiet_session  # noqa: F401
from doctor.patients import Patient


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def patient(
    checkpoints: Any, tmp_path: Path, cli: Callable[..., Any]  # noqa: F811
) -> Patient:
    return Patient(tmp_path, checkpoints, cli)


@pytest.fixture(autouse=True)
def no_weights(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspecting loads processors and configurations only."""
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("taid_vlm.models.loading.load_model", refuse)
    torch.set_num_threads(1)
