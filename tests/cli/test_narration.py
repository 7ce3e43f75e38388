"""What `distill` says: an opening in words, a short line for every log, one bar, one speaker."""

from __future__ import annotations

import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe

from taid_vlm.runs.narration import log_line

STEPS = 3


def recipe(folder: Path, checkpoints: Checkpoints, **train: object) -> Path:
    return write_recipe(folder, {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", pairs(8))) for side in
                 ("train", "eval")},
        "train": {"max_steps": STEPS, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
                  "per_device_train_batch_size": 2, **train},
        "evaluate": {"examples": 0}, "output_dir": str(folder / "out")})


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_a_run_opens_with_words_and_logs_in_short_lines(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = recipe(tmp_path, checkpoints, eval_strategy="steps", eval_steps=STEPS)
    done = subprocess.run([sys.executable, "-m", "taid_vlm", "distill", str(path)],
                          capture_output=True, text=True, check=True, env=environment())
    lines = done.stderr.splitlines()
    heads = [line.split()[0] for line in lines[:8]]
    assert heads == ["teacher", "student", "pair", "records", "trained", "memory", "logs", "steps"]
    assert lines[3] == "records   8 to train on, 8 held out"
    assert re.fullmatch(r"trained   ([\d,]+) of \1 parameters", lines[4])
    assert lines[7] == f"steps     {STEPS} of 2 records each"
    logged = [line for line in lines if re.match(rf"\d/{STEPS}  ", line)]
    assert len(logged) == STEPS + 1 and max(map(len, logged)) <= 100
    number = r"\d+\.\d+"
    for step, line in enumerate(logged[:-1], start=1):
        assert re.fullmatch(rf"{step}/{STEPS}  loss {number}  kl {number}  agree {number}%  "
                            rf"t {number}  lr {number}e[-+]\d\d  tok/s [\d,]+  ETA 0:00:\d\d", line)
    last = loaded(tmp_path / "out/results.json")["history"]
    held_out = next(row for row in last if "eval_kl" in row)
    assert logged[-1] == (f"{STEPS}/{STEPS}  held-out  kl {held_out['eval_kl']:.4f}  "
                          f"agree {held_out['eval_agreement']:.1%}")
    assert "{" not in done.stderr and "\x1b" not in done.stderr + done.stdout  # no dictionaries
    assert "|" not in done.stderr  # no bar where nobody looks
    assert "Warning" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("verdict       ")
    assert "of the gap to the teacher" in done.stdout and "\nheld-out KL   " in done.stdout


def test_a_terminal_has_a_bar_with_the_time_left(checkpoints: Checkpoints, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "110"], stdin=theirs, check=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "taid_vlm", "distill", str(recipe(tmp_path, checkpoints))],
        stderr=theirs, stdout=subprocess.DEVNULL, env=environment())
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: nobody writes any more
            break
        if not part:
            break
        seen += part
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]+", seen.decode()) if "step/s" in line]
    assert bars and re.search(rf"0/{STEPS} \[00:00<\?", bars[0])


@pytest.mark.parametrize("processes", [2])
def test_only_the_main_process_speaks(
    processes: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", "-m", "taid_vlm", "distill",
         str(recipe(tmp_path, checkpoints))],
        capture_output=True, text=True, check=True, env=environment(), timeout=300)
    for head in ("teacher ", "pair ", "steps ", f"2/{STEPS}  loss", "TAID's loss"):
        assert len([line for line in done.stderr.splitlines() if line.startswith(head)]) == 1, head
    assert f"steps     {STEPS} of {2 * processes} records each" in done.stderr


def test_log_lines_of_all_kinds() -> None:
    assert log_line({"train_runtime": 3.0, "train_loss": 1.0}) == ""
    assert log_line({"loss": math.nan, "learning_rate": 1e-4, "skipped_steps": 2}) == \
        "loss nan  lr 1.0e-04"  # every one has been named
    assert log_line({"loss": 2.5, "nll": 2.5}) == "loss 2.5000  nll 2.5000"  # without a teacher
    assert log_line({"eval_nll": 2.5, "eval_loss": 2.5}) == "held-out  nll 2.5000"
    widest = {"loss": 123.4567, "kl": 123.4567, "agreement": 1.0, "t": 0.5, "learning_rate": 1e-5,
              "answer_tokens_per_second": 12345.6}
    assert len(f"10000/10000  {log_line(widest)}  ETA 10:10:10") <= 100


def test_an_adapter_without_a_teacher_is_named(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("peft")
    done = cli("distill", recipe(tmp_path, checkpoints), "objective=ce", "teacher=null",
               "student.peft={target_modules: [q_proj]}")
    assert done.status == 0, done.err
    assert "teacher   none" in caplog.text and "parameters, an adapter" in caplog.text
    assert "pair  " not in caplog.text
