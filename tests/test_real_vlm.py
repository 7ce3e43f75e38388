"""scripts/real_vlm.py with a small language model: every part, stopped and gone on with."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from zoo import build

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from real_vlm import parts, tower  # noqa: E402
from real_vlm.command import main  # noqa: E402
from real_vlm.data import Icon, read_sources, scenes, write_records  # noqa: E402
from real_vlm.plan import ARMS  # noqa: E402

from taid_vlm.demo.truth import EXACT, QUESTIONS, HeldOutQuestion, HeldOutTask  # noqa: E402
from taid_vlm.errors import TaidError  # noqa: E402
from taid_vlm.records import ImageRef, Message, Record  # noqa: E402
from taid_vlm.records.images import GREY  # noqa: E402

NAMES = ("dog", "cat", "sun", "key", "cup", "bus", "egg", "map", "pen", "hat", "fox", "bee")


def png(color: str, size: tuple[int, int] = (72, 72)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def language_model(tmp_path: Path) -> str:
    """With four layers, so that half of them can be cut."""
    built = build("llama")
    built.model.config.num_hidden_layers = 4
    hf.LlamaForCausalLM(built.model.config).save_pretrained(tmp_path / "lm")
    built.processor.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    icons = [{"image": png(f"hsl({30 * i}, 90%, 50%)"), "caption": name}
             for i, name in enumerate(NAMES)]
    icons.append({"image": png("black"), "caption": "two words"})
    told = [{"image": png("white", (400, 100)), "statement": f"There is {i}.",
             "label": "yes" if i % 2 else "no", "identifier": f"{i // 2}-{i % 2}"}
            for i in range(16)]
    pq.write_table(pa.Table.from_pylist(icons), tmp_path / "icons.parquet")
    pq.write_table(pa.Table.from_pylist(told), tmp_path / "nlvr.parquet")
    return {"icons": tmp_path / "icons.parquet", "nlvr": tmp_path / "nlvr.parquet"}


def arguments(language_model: str, output: Path, *more: str) -> list[str]:
    return [language_model, "--output-dir", str(output), "--steps", "3,1,2,1", "--minutes", "1",
            "--seeds", "1", *more]


# ----- the whole ----------------------------------------------------------------------------


def test_it_goes_on_where_it_was_and_says_what_came_of_it(
    language_model: str, files: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    more = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    command = arguments(language_model, output, *more)
    monkeypatch.delitem(ARMS, "KL")  # which is trained as TAID is
    with monkeypatch.context() as stopped:
        stopped.setattr(parts, "shrink", interrupt)
        assert main(command) == 130 and not (output / "cut").exists()
    trained = stamps(output)
    assert main(command) == 0
    assert stamps(output).items() >= trained.items()  # nothing was done twice
    results = json.loads((output / "results.json").read_text())
    kinds = results["by_kind"]
    assert {"all", "color", "icon, seen", "icon, new", "statement"} <= kinds.keys()
    assert set(kinds["all"]) == {"Teacher", "Teacher, blank pictures", "Cut, untrained", "SFT",
                                 "TAID", "Always the most frequent answer"}
    assert kinds["all"]["TAID"]["n"] == sum(own["TAID"]["n"] for kind, own in kinds.items()
                                            if kind != "all")
    assert results["finished_seeds"] == [0]
    assert set(results["canary"]) == {"Teacher", "SFT", "TAID"}
    assert "caption KL" in (output / "table.md").read_text()
    assert "icon, new" in (output / "report.html").read_text()
    model = hf.AutoModelForImageTextToText.from_pretrained(output / "seed-0" / "TAID" / "student")
    assert model.config.text_config.num_hidden_layers == 2
    done = stamps(output)
    assert main(command) == 0 and stamps(output) == done


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def stamps(output: Path) -> dict[str, int]:
    """When every model and every run was written."""
    return {str(path): path.stat().st_mtime_ns for pattern in ("model.safetensors", "recipe.yaml")
            for path in output.rglob(pattern)}


@pytest.mark.slow
def test_killed_at_any_time_it_comes_to_the_same(language_model: str, tmp_path: Path) -> None:
    """Killed inside of four of its parts, without icons and statements."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(language_model, whole)) == 0
    killed.mkdir()
    (killed / "plan.json").write_text((whole / "plan.json").read_text())
    command = [sys.executable, "-u", str(SCRIPTS / "real_vlm.py"),
               *arguments(language_model, killed)]
    for part in ("tower:", "teacher:", "cache:", "TAID, seed 0:"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(f"] {part}" in line for line in process.stdout), part
            next(process.stdout)  # it has begun
            process.send_signal(signal.SIGKILL)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    first, second = (json.loads((output / "results.json").read_text())
                     for output in (whole, killed))
    assert first["by_kind"] == second["by_kind"] and first["canary"] == second["canary"]


# ----- the tower ----------------------------------------------------------------------------


def test_a_tower_that_goes_on_is_the_one_that_was_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "SAVE_SECONDS", -1)
    plan = tower.TowerPlan(steps=3, width=64, layers=1, batch=4)

    def stop_at_two(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    tower.train_tower(plan, (), tmp_path / "whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        tower.train_tower(plan, (), tmp_path / "stopped", stop_at_two)
    assert (tmp_path / "stopped.state.safetensors").exists()
    tower.train_tower(plan, (), tmp_path / "stopped", lambda *_: None)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors")
                      for name in ("whole", "stopped"))
    assert all(tensor.equal(stopped[name]) for name, tensor in whole.items())
    assert not (tmp_path / "stopped.state.safetensors").exists()


def test_patches_are_called_what_is_drawn_there() -> None:
    """Every colour that is written down is seen: labels and pixels agree."""
    rng, kinds = random.Random(5), set()
    for _ in range(60):
        image, scene = scenes.draw(rng)
        labels, pixels = tower.labels_of(scene, image), np.asarray(image, np.int64)
        kinds.add(scene.kind)
        assert labels.any(), scene
        for row, column in zip(*np.nonzero(labels[..., 0]), strict=True):
            color = list(scenes.COLORS.values())[labels[row, column, 0] - 1]
            patch = pixels[16 * row:16 * row + 16, 16 * column:16 * column + 16]
            if not labels[row, column, 4]:  # a bar's column is called so up to the top
                assert (abs(patch - np.array(color)).max(-1) <= 60).any(), scene
    assert len(kinds) == 3


# ----- data, and mistakes -------------------------------------------------------------------


def test_what_is_held_out_is_never_learned(files: dict[str, Path], tmp_path: Path) -> None:
    sources = read_sources(files["icons"], files["nlvr"], 6)
    assert not {icon.name for icon in sources.icons} & {icon.name for icon in sources.new_icons}
    assert "two words" not in {icon.name for icon in sources.icons}
    assert not ({one.sentence for one in sources.statements}
                & {one.sentence for one in sources.new_statements})
    write_records(tmp_path / "data", sources, {"train": 40, "distill": 10, "eval": 20})
    train, held_out = (pq.read_table(tmp_path / "data" / f"{split}-icons.parquet").to_pylist()
                       for split in ("train", "eval"))
    said = {row["messages"][1]["content"][0]["text"] for row in train}
    assert said <= {icon.name for icon in sources.icons}
    assert {row["categories"][0] for row in held_out} == {"icon, seen", "icon, new"}
    statement = pq.read_table(tmp_path / "data" / "eval-nlvr.parquet").to_pylist()[0]
    assert len(statement["images"]) == 3  # one for each box


def test_an_icon_lies_within_its_picture() -> None:
    icon = Icon("x", png("red")["bytes"])
    picture = icon.drawn(random.Random(0))
    assert picture.size == (64, 64) and (255, 0, 0) in {
        color for _, color in picture.getcolors(10_000)}


def test_a_mistake_is_told_before_anything_is_made(
    language_model: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for more, words in ((["--icons", "absent.parquet"], "is no file"),
                        (["--nlvr", str(files["icons"])], "lacks the column 'statement'")):
        assert main(arguments(language_model, output, *more)) == 2
        assert words in capsys.readouterr().err and not (output / "data").exists()


def test_another_command_does_not_go_on(language_model: str, tmp_path: Path) -> None:
    from real_vlm.command import make_parser
    from real_vlm.plan import make_plan

    def parsed(*more: str) -> Any:
        return make_parser().parse_args(arguments(language_model, tmp_path / "out", *more))

    first = make_plan(parsed(), lambda text: None)
    assert make_plan(parsed("--seeds", "3"), lambda text: None) == first
    with pytest.raises(TaidError, match="begun with another --minutes"):
        make_plan(parsed("--minutes", "2"), lambda text: None)


def test_blank_pictures_leave_the_questions() -> None:
    image = ImageRef(Image.new("RGB", (8, 8), "red"), "red")
    record = Record("r", (Message("user", (None, "What?")), Message("assistant", ("x",))),
                    (image,))
    question = HeldOutQuestion("r/0", ("What?",), (image,), ("x",), conversation=record, turn=0)
    blind = parts.with_blank_pictures(HeldOutTask(QUESTIONS, EXACT, None, [question]))
    (asked,) = blind.questions
    assert asked.prompt == question.prompt and asked.answers == question.answers
    assert asked.images[0].load().getcolors()[0][1] == GREY
    assert asked.asked()[0].images[0].load().getcolors()[0][1] == GREY
