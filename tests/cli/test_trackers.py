"""The same run in TensorBoard, Weights & Biases (offline) and trackio, where they are installed."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe

Cli = Callable[..., Outcome]
Curves = dict[str, list[float]]
NAMES = {"train/kl": "kl", "train/loss": "loss", "train/t": "t", "eval/kl": "eval_kl",
         "train/taid/kl_to_teacher": "kl", "train/taid/loss_to_moving_target": "loss",
         "train/taid/t_of_target": "t", "train/agreement": "agreement"}


def history(cli: Cli, checkpoints: Checkpoints, folder: Path, tracker: str) -> list[dict[str, Any]]:
    done = cli("distill", write_recipe(folder, {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", pairs(8))) for side in
                 ("train", "eval")},
        "train": {"max_steps": 3, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
                  "eval_strategy": "steps", "eval_steps": 3, "report_to": tracker,
                  "run_name": "a run"},
        "evaluate": {"examples": 0}, "output_dir": str(folder / "out")}))
    assert done.status == 0, done.err
    lines: list[dict[str, Any]] = loaded(folder / "out/results.json")["history"]
    assert not [key for line in lines for key in line if key.startswith("taid/")]
    return lines


def check(curves: Curves, lines: list[dict[str, Any]]) -> None:
    for name, key in NAMES.items():
        expected = [line[key] for line in lines if key in line]
        assert expected and curves[name] == pytest.approx(expected, rel=1e-5), name


def test_tensorboard(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    lines = history(cli, checkpoints, tmp_path, "tensorboard")
    curves: Curves = {}
    for file in (tmp_path / "logs").rglob("events*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            curves.setdefault(name, []).extend(event.value for event in events.Scalars(name))
    check(curves, lines)


def log_records(data: bytes, block: int = 2**15, head: int = 7) -> Iterator[bytes]:
    """Of a file in LevelDB's log format, behind a header of its own: checksum, length, type."""
    at, whole = head, b""
    while at < len(data):
        left = block - at % block
        if left < head:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + head:at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_weights_and_biases(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    lines = history(cli, checkpoints, tmp_path, "wandb")
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    curves: Curves = {}
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            value = json.loads(item.value_json)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append(value)
    check(curves, lines)


def test_trackio(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        for name in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / "trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    lines = history(cli, checkpoints, tmp_path, "trackio")
    curves: Curves = {}
    for file in (tmp_path / "trackio").rglob("*.db"):
        with sqlite3.connect(file) as base:
            for (row,) in base.execute("select metrics from metrics order by step, id"):
                for name, value in json.loads(row).items():
                    curves.setdefault(name, []).append(value)
    check(curves, lines)
