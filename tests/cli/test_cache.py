"""A cached teacher: training on its hidden states is training on itself; all else is refused."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import (
    Checkpoints,
    Outcome,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from taid_vlm.adapters import ImageTextAdapter
from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import TaidError
from taid_vlm.runs import cache as building
from taid_vlm.runs.ingredients import gather
from taid_vlm.runs.run import _make_trainer
from taid_vlm.teachers import TeacherCache
from taid_vlm.teachers.shards import AGAIN

# by the case of alignment: teacher, student, the student's tokenizer, rows
CASES: dict[str, tuple[str, str, str, Callable[..., Any]]] = {
    "a": ("llama", "llama", "plain", lambda folder, *n: pairs(*n)),
    "b": ("internvl", "llava", "permuted", picture_rows),
    "c": ("internvl", "llava", "metaspace", picture_rows),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
Cli = Callable[..., Outcome]


def tree(folder: Path, checkpoints: Checkpoints, case: str = "b", **train: Any) -> dict[str, Any]:
    """A recipe with two epochs of single records, in an order that is drawn."""
    teacher, student, tokenizer, rows = CASES[case]
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "teacher": {"model_name_or_path": checkpoints(teacher)},
        "student": {"model_name_or_path": checkpoints(student, tokenizer, seed=1)},
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", rows(folder, number, number)))
                 for side, number in (("train", 6), ("eval", 3))},
        "objective": {"name": "taid"},
        "train": {"learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True,
                  "logging_steps": 1, "num_train_epochs": 2, "per_device_train_batch_size": 1,
                  "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 3,
                  "save_strategy": "no", **train},
        "evaluate": {"examples": 0},
        "output_dir": str(folder / "live"),
    }


def cached(live: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same recipe with a cache in the teacher's place, and nothing of the teacher beside it."""
    return {**live, "teacher": {"cache": str(folder)}, "output_dir": live["output_dir"] + "-cached"}


def built(cli: Cli, folder: Path, live: dict[str, Any], *options: str) -> Path:
    done = cli("cache", write_recipe(folder, live), "--output", folder / "cache", *options)
    assert done.status == 0, done.err
    return folder / "cache"


def carried_out(cli: Cli, folder: Path, recipe: dict[str, Any], *words: str) -> dict[str, Any]:
    done = cli("distill", write_recipe(folder, recipe), *words)
    assert done.status == 0, done.err
    output = Path(recipe["output_dir"])
    return {**loaded(output / "results.json"),
            "weights": load_file(output / "student/model.safetensors")}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["weights"].keys() == other["weights"].keys()
    return max(float((one["weights"][name] - other["weights"][name]).abs().max())
               for name in one["weights"])


def figures(results: dict[str, Any]) -> Any:
    """Everything that was measured of training and held-out records."""
    clock = ("answer_tokens_per_second", "train_runtime", "train_samples_per_second",
             "train_steps_per_second")
    return results["eval"], [{key: value for key, value in line.items() if key not in clock}
                             for line in results["history"]]


@pytest.mark.parametrize("case", CASES)
def test_single_records_train_bit_for_bit(
    case: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tree(tmp_path, checkpoints, case)
    folder = built(cli, tmp_path, live)
    expected = carried_out(cli, tmp_path, live)
    assert expected["alignment"]["case"] == case
    monkeypatch.setattr("taid_vlm.runs.run.load_model", only_the_student)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) == 0.0
    assert figures(results) == figures(expected)
    assert results["train"]["loss_implementation"]["name"] == "fused"
    teacher = results["models"]["teacher"]
    assert teacher["cache"]["bytes_per_token"] == TeacherCache(folder).bytes_per_token
    assert {key: teacher[key] for key in ("name", "parameters", "model_type")} == {
        key: expected["models"]["teacher"][key] for key in ("name", "parameters", "model_type")}
    page = (Path(live["output_dir"] + "-cached") / "report.html").read_text()
    assert "bytes an answer token" in page


def test_pixels_that_the_cache_knows_are_not_shown_to_the_teacher_again(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But once for each size, in a collator's life: here before training, as it checks the data."""
    live = tree(tmp_path, checkpoints)
    recipe = parse_recipe(cached(live, built(cli, tmp_path, live)))
    trainer = _make_trainer(recipe, gather(recipe))
    records, shown, process = list(trainer.train_dataset), [], ImageTextAdapter._process

    def count(adapter: Any, rendered: Any, *rest: Any) -> Any:
        shown.append(adapter.role)
        return process(adapter, rendered, *rest)

    monkeypatch.setattr(ImageTextAdapter, "_process", count)
    batch = trainer.collator(records)
    assert shown == ["student"]
    monkeypatch.setattr(TeacherCache, "holds", lambda *_: False)
    again = trainer.collator(records)
    assert shown[1:].count("teacher") == len(records), "what is not known is looked at"
    assert again["teacher_hidden"].equal(batch["teacher_hidden"])
    assert again["teacher_mask"].equal(batch["teacher_mask"])


def test_a_template_and_its_variables_come_with_the_cache(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints, "a")
    own = (Path(checkpoints("llama")) / "chat_template.jinja").read_text()
    template = tmp_path / "greeting.jinja"
    template.write_text("{% if greet %}hello there {% endif %}" + own)
    plain = carried_out(cli, tmp_path, live)
    live["teacher"] |= {"chat_template": str(template), "chat_template_kwargs": {"greet": True}}
    folder = built(cli, tmp_path, live)
    expected = carried_out(cli, tmp_path, live, "--overwrite")
    assert expected["eval"]["before"]["kl"] != plain["eval"]["before"]["kl"]
    template.unlink()
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) == 0.0
    assert figures(results) == figures(expected)


def test_one_cache_serves_all_stages(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Every stage's records are in it, once."""
    live = {**tree(tmp_path, checkpoints), "stages": [
        {"name": "first", "train": {"freeze": ["tower"]}},
        {"name": "second", "objective": "forward_kl",
         "data": {"train": str(tmp_path / "more.jsonl")}}]}
    write_jsonl(tmp_path / "more.jsonl", picture_rows(tmp_path, 4, 9))
    folder = built(cli, tmp_path, live)
    assert TeacherCache(folder).records == 6 + 4 + 3
    expected = carried_out(cli, tmp_path, live)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) == 0.0
    assert figures(results) == figures(expected)


def only_the_student(spec: Any, role: str, *others: Any) -> Any:
    from taid_vlm.models.loading import load_model

    assert role == "student", "no weights of the teacher"
    return load_model(spec, role, *others)


@pytest.mark.parametrize("train", [
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 2, "padding_side": "left"},
    {"per_device_train_batch_size": 2, "loss_implementation": "reference"},
    {"per_device_train_batch_size": 2, "dataloader_num_workers": 2, "optim": "sgd"},
], ids=["3", "2 left", "2 reference", "2 workers"])
def test_other_batches_train_within_rounding(
    train: dict[str, Any], cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A live teacher's own hidden states differ in the last bit with other padding; Adam, which
    divides by its gradient's size, would make more of that in weights hardly any gradient has."""
    live = tree(tmp_path, checkpoints, **{"optim": "sgd", "learning_rate": 0.05, **train})
    folder = built(cli, tmp_path, live)
    expected = carried_out(cli, tmp_path, live)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) < 1e-6
    for moment in ("before", "after"):
        assert results["eval"][moment]["kl"] == pytest.approx(
            expected["eval"][moment]["kl"], abs=1e-6)


def test_bfloat16_is_half_of_it_and_near(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints, "a", bf16=True)
    folder = built(cli, tmp_path, live)
    sizes = [TeacherCache(folder).bytes_per_token]
    expected = carried_out(cli, tmp_path, live)
    shutil.rmtree(folder)
    built(cli, tmp_path, live, "--dtype", "bfloat16")
    sizes.append(TeacherCache(folder).bytes_per_token)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert sizes[1] < 0.7 * sizes[0]
    assert results["eval"]["before"]["kl"] == pytest.approx(
        expected["eval"]["before"]["kl"], rel=2e-2)


# ----- building ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[bytes, bytes]:
    """Hidden states by record, whatever shard they lie in."""
    held = {}
    for path in sorted((folder / "shards").glob("*.safetensors")):
        shard = load_file(path)
        starts = shard["starts"].tolist()
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            held[shard["places"][i].numpy().tobytes()] = \
                shard["hidden"][start:end].numpy().tobytes()
    return held


def test_two_processes_build_and_train_on_the_same(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints, optim="sgd", learning_rate=0.05)
    alone = contents(built(cli, tmp_path, live))
    shutil.rmtree(tmp_path / "cache")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "-m", "taid_vlm"]
    done = subprocess.run(
        [*launcher, "cache", str(write_recipe(tmp_path, live)), "--output",
         str(tmp_path / "cache")], env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "cache") == alone
    assert {path.name[:5] for path in (tmp_path / "cache/shards").iterdir()} == {"00000", "00001"}
    half = {**live, "train": {**live["train"], "gradient_accumulation_steps": 1}}
    recipe = write_recipe(tmp_path, cached(half, tmp_path / "cache"))
    done = subprocess.run([*launcher, "distill", str(recipe)], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = loaded(Path(live["output_dir"] + "-cached") / "results.json")
    assert two["machine"]["processes"] == 2
    weights = load_file(Path(live["output_dir"] + "-cached") / "student/model.safetensors")
    assert difference(carried_out(cli, tmp_path, live), {"weights": weights}) < 1e-6


def test_a_killed_build_goes_on(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = tree(tmp_path, checkpoints)
    whole = contents(built(cli, tmp_path, live))
    shutil.rmtree(tmp_path / "cache")
    recipe, shards = write_recipe(tmp_path, live), tmp_path / "cache/shards"
    script = ("import sys, time; from taid_vlm.runs import cache; from taid_vlm.config.recipe "
              "import load_recipe; f = cache.ShardWriter.flush\n"
              "def slow(self):\n    f(self)\n    time.sleep(0.5)\n"
              "cache.ShardWriter.flush = slow\n"
              "cache.build_cache(load_recipe(sys.argv[1]), sys.argv[2], shard_bytes=1)")
    process = subprocess.Popen([sys.executable, "-c", script, str(recipe),
                                str(tmp_path / "cache")], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list(shards.glob("*.safetensors"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.safetensors")}
    assert 3 <= len(kept) < 9
    with pytest.raises(TaidError, match="not finished"):
        TeacherCache(tmp_path / "cache")
    (shards / ".00000-000099.safetensors.partial").write_bytes(b"half")
    torn = sorted(kept)[0]
    (shards / torn).write_bytes((shards / torn).read_bytes()[:-20])
    done = cli("cache", recipe, "--output", tmp_path / "cache")
    assert done.status == 0, done.err
    assert f"{torn}' is not as it was written" in caplog.text
    assert contents(tmp_path / "cache") == whole
    assert all((shards / name).stat().st_mtime_ns == kept[name] for name in kept if name != torn)
    assert not list(shards.glob(".*"))


def test_an_interrupted_build_of_another_teacher_is_refused(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints)
    folder = built(cli, tmp_path, live)
    done = cli("cache", write_recipe(tmp_path, live), "--output", folder)
    assert done.status == 2
    assert "holds a finished cache" in done.err
    (folder / "taid_vlm.json").unlink()
    other = {**live, "teacher": checkpoints("internvl", seed=5)}
    done = cli("cache", write_recipe(tmp_path, other), "--output", folder)
    assert done.status == 2
    assert "interrupted build of another cache: its " in done.err


def test_a_disk_without_room_is_named_before_weights(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "load_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(building.shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(10, 9, 1))
    live = tree(tmp_path, checkpoints)
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache")
    assert done.status == 2
    assert "GB of room" in done.err
    assert not (tmp_path / "cache").exists()


def test_the_size_is_that_which_was_estimated(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints)
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache")
    cache = TeacherCache(tmp_path / "cache")
    assert f"about {cache.facts['tokens']:,} answer tokens of 9 records" in done.out
    assert f"{cache.facts['tokens']:,} answer tokens, " in done.out.partition("holds")[2]


def test_records_left_out_are_counted(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> None:
    live = tree(tmp_path, checkpoints)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    write_jsonl(tmp_path / "train.jsonl", [*rows, {**rows[0], "image": "broken.png"}])
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache")
    assert "left out      1 x unreadable image" in done.out
    results = carried_out(cli, tmp_path, cached(live, tmp_path / "cache"))
    assert results["train"]["records_left_out"] == {"unreadable image": 2}


# ----- what is refused ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A cache, and the recipe that it was built of."""
    folder = tmp_path_factory.mktemp("original")
    from cli.recipes import command

    live = tree(folder, checkpoints)
    assert command("cache", write_recipe(folder, live), "--output", folder / "cache") == 0
    return folder, live


def spoiled(original: tuple[Path, dict[str, Any]], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Copies of both, to be spoiled."""
    source, live = original
    for path in source.iterdir():
        if path.is_dir() and path.name == "cache":
            shutil.copytree(path, folder / "cache")
        elif path.is_file():
            shutil.copy(path, folder)
    sides = {side: str(folder / f"{side}.jsonl") for side in ("train", "eval")}
    changed = {"data": sides, "output_dir": str(folder / "out")}
    return folder / "cache", cached({**copy.deepcopy(live), **changed}, folder / "cache")


def refused(
    cli: Cli, folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    weights: bool = False
) -> str:
    if not weights:
        monkeypatch.setattr("taid_vlm.runs.run.load_model",
                            lambda *_: pytest.fail("weights were loaded"))
    done = cli("distill", write_recipe(folder, recipe))
    assert done.status == 2, done.err
    assert len(done.errors) == 1
    return done.errors[0]


def test_keys_that_contradict_a_cache_are_named(
    original: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = spoiled(original, tmp_path)
    for key, value in (("model_name_or_path", "other"), ("dtype", "float32"),
                       ("chat_template_kwargs", {"enable_thinking": False})):
        message = refused(cli, tmp_path, {**recipe, "teacher": {"cache": str(folder), key: value}},
                          monkeypatch)
        assert f"teacher.{key} = " in message
        assert "take one of the two out" in message


@pytest.mark.parametrize(("harm", "says"), [
    ("none", "is no folder"), ("unfinished", "not finished"), ("cut", "is not as it was written"),
    ("gone", "is missing"), ("head", "head.safetensors' is not as it was written"),
    ("foreign", "belongs to another cache"),
])
def test_a_broken_cache_is_named_before_weights(
    harm: str, says: str, original: Any, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = spoiled(original, tmp_path)
    shard = next((folder / "shards").iterdir())
    if harm == "none":
        shutil.rmtree(folder)
    elif harm == "unfinished":
        (folder / "taid_vlm.json").unlink()
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "gone":
        shard.unlink()
    elif harm == "head":
        data = bytearray((folder / "head.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "head.safetensors").write_bytes(bytes(data))
    else:
        tensors, size = load_file(shard), shard.stat().st_size
        save_file(tensors, shard, {"identity": "0" * 16})
        assert shard.stat().st_size == size
    assert says in refused(cli, tmp_path, recipe, monkeypatch)


@pytest.mark.parametrize(("harm", "says"), [
    ("text", "eval.jsonl:3 with the same images, but other tokens"),
    ("image", "with the same tokens, but other images"),
    ("more", "does not hold eval.jsonl:4"),
    ("bit", "has another checksum"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_is_not_in_it_is_named(
    harm: str, says: str, workers: int, original: Any, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = spoiled(original, tmp_path)
    recipe["train"]["dataloader_num_workers"] = workers
    path = tmp_path / "eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if harm == "text":
        rows[2]["completion"] += " the red square"
    elif harm == "image":
        path_of_image = tmp_path / rows[2]["image"]
        Image.open(path_of_image).rotate(180).save(path_of_image)
    elif harm == "more":
        rows.append({**rows[0], "completion": "two naïve circle", "image": "3.png"})
    else:
        shard = next((folder / "shards").iterdir())
        tensors = load_file(shard)
        tensors["hidden"][-1] += 1
        facts = json.loads((folder / "taid_vlm.json").read_text())["identity"]
        save_file(tensors, shard, {"identity": facts})
    write_jsonl(path, rows)
    message = refused(cli, tmp_path, recipe, monkeypatch, weights=True)
    assert says in message
    assert AGAIN in message
    assert not (tmp_path / "out/student").exists()


def test_another_students_tokens_are_named_before_weights(
    original: Any, cli: Cli, checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positions of a cache are those that its pair compares."""
    _, recipe = spoiled(original, tmp_path)
    recipe["train"]["supervise"] = "all"
    message = refused(cli, tmp_path, recipe, monkeypatch)
    assert "built for another student, alignment or supervision" in message


@pytest.mark.parametrize("objective", [
    {"name": "taid", "token_weights": {"name": "visual_advantage"}},
    {"terms": ["taid", {"name": "visual_relation", "weight": 0.1}]},
])
def test_terms_that_show_the_teacher_images_are_refused(
    objective: Any, original: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = spoiled(original, tmp_path)
    message = refused(cli, tmp_path, {**recipe, "objective": objective}, monkeypatch)
    assert "shows images to the teacher while training" in message


def test_plan_and_inspect_know_a_cache(
    original: Any, cli: Cli, tmp_path: Path
) -> None:
    folder, recipe = spoiled(original, tmp_path)
    done = cli("plan", write_recipe(tmp_path, recipe), "--json")
    assert done.status == 0, done.err
    (stage,) = json.loads(done.out)["stages"]
    head = sum(x.numel() * 4 for x in load_file(folder / "head.safetensors").values())
    (teacher,) = (part for part in stage["components"] if part["name"] == "teacher parameters")
    assert teacher["most"] == head
    assert any(str(folder) in note and "bytes on disk" in note for note in stage["notes"])
    done = cli("inspect", write_recipe(tmp_path, recipe))
    assert done.status == 0, done.err


@pytest.mark.parametrize(("case", "objective", "options", "without"), [
    ("b", "forward_kl", "", []),
    ("b", "taid", "--signal topk --k 64", ["sampled"]),
    ("c", "forward_kl", "--dtype bfloat16", ["topk", "sampled"]),
])
def test_plan_says_what_a_cache_would_take(
    case: str, objective: str, options: str, without: list[str], cli: Cli,
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Bytes of the cache that is then built, but for the heads of its files."""
    live = tree(tmp_path, checkpoints, case) | {"objective": objective}
    live["data"].pop("eval")
    live["train"].pop("per_device_eval_batch_size")
    done = cli("plan", write_recipe(tmp_path, live), "--json")
    assert done.status == 0, done.err
    (stage,) = json.loads(done.out)["stages"]
    size = stage["cache"]
    assert [why.partition(":")[0] for why in size["refused"]] == [
        f"--signal {kind}" for kind in without]
    assert [form["exact"] for form in size["forms"]] == [True] + [False] * (3 - len(without))
    (form,) = (form for form in size["forms"] if form["options"] == options)
    cache = TeacherCache(built(cli, tmp_path, live, *options.split()))
    assert (size["tokens"], size["records"]) == (cache.facts["tokens"], cache.records)
    head = (cache.folder / "head.safetensors").stat().st_size
    assert form["bytes"] == pytest.approx(cache.bytes + head, abs=2500)
    text = cli("plan", write_recipe(tmp_path, live)).out
    assert f"taid-vlm cache {options}".strip() in text
    assert text.count("not for this recipe") == len(without)


# ----- a few entries of every law ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_all_entries_train_as_hidden_states_do(
    case: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints, case, optim="sgd", learning_rate=0.05)
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache",
               "--signal", "topk", "--k", "100000")
    assert done.status == 2
    width = int(done.err.split("the pair compares ")[1].split()[0])
    folder = built(cli, tmp_path, live, "--signal", "topk", "--k", str(width))
    expected = carried_out(cli, tmp_path, live)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) < 1e-6
    for moment in ("before", "after"):  # of held-out records hidden states are kept
        assert results["eval"][moment]["kl"] == pytest.approx(
            expected["eval"][moment]["kl"], abs=1e-6)
    assert results["models"]["teacher"]["cache"]["signal"] == f"topk {width}"
    assert results["train"]["loss_implementation"]["name"] == "sparse"
    assert f"{width} topk entries" in results["train"]["loss_implementation"]["reason"]


def test_draws_train_and_refuse_what_they_cannot(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = {**tree(tmp_path, checkpoints), "objective": "forward_kl"}
    folder = built(cli, tmp_path, live, "--signal", "sampled")
    recipe = {**cached(live, folder), "evaluate": {"examples": 2, "max_new_tokens": 4}}
    results = carried_out(cli, tmp_path, recipe)
    assert results["train"]["steps"] == 6
    assert [{*example["answers"]} for example in results["examples"]] == [{"before", "after"}] * 2
    assert cli("plan", write_recipe(tmp_path, recipe)).status == 0
    message = refused(cli, tmp_path, {**recipe, "objective": "taid"}, monkeypatch)
    assert "the loss 'taid' is not linear in the teacher's probabilities" in message
    other = {**recipe, "student": checkpoints("llava", "plain", seed=1)}
    assert "entries of another pair's vocabulary" in refused(cli, tmp_path, other, monkeypatch)


def test_chunks_need_whole_laws(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> None:
    live = {**tree(tmp_path, checkpoints, "c"), "objective": "forward_kl"}
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache",
               "--signal", "topk")
    assert done.status == 2
    assert "chunks need single tokens' whole laws" in done.err


def test_several_sources_are_cached_as_one(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tree(tmp_path, checkpoints, "a")
    more = write_jsonl(tmp_path / "more.jsonl", pairs(4, 9))
    live["data"]["train"] = [{"path": live["data"]["train"]}, {"path": str(more), "weight": 2}]
    folder = built(cli, tmp_path, live)
    expected = carried_out(cli, tmp_path, live)
    results = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(expected, results) == 0.0
    sources = loaded(folder / "identity.json")["data"][0]["sources"]
    assert [Path(source["path"]).name for source in sources] == ["train.jsonl", "more.jsonl"]
    assert [source["weight"] for source in sources] == [None, 2]
    assert all(source["files"] for source in sources)


def test_windows_are_not_cached(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> None:
    live = tree(tmp_path, checkpoints, "a", window=64, max_steps=2)
    done = cli("cache", write_recipe(tmp_path, live), "--output", tmp_path / "cache")
    assert done.status == 2
    assert "train.window" in done.err
    assert not (tmp_path / "cache" / "shards").exists()
