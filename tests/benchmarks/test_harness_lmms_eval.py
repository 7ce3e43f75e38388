"""The model for lmms-eval: by lmms-eval itself where it is installed, else by what it calls.

Without lmms-eval its base class and its manifest are stood in for by the few lines of them that
the model touches (lmms_eval 0.7.3, api/model.py and models/registry_v2.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from zoo import build, save
from zoo.images import image

from taid_vlm.adapters import make_adapter
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.generation import generate_answers
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.records import ImageRef, Message, Record

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
MODULE = "taid_vlm.benchmarks.harness.lmms_eval"
FAMILIES = ("qwen2_5_vl", "smolvlm", "llava")
QUESTIONS = ("What is in this picture?", "Is it red?", "How many objects are above the line?")


class Base:
    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, dict[str, Any]()


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name, held in (("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.models", {}),
                               ("lmms_eval.api.model", {"lmms": Base}),
                               ("lmms_eval.models.registry_v2", {"ModelManifest": Manifest})):
                module = ModuleType(name)
                vars(module).update(held)
                patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
        sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save(build(family), root / family)
    return root


def documents(count: int = 6) -> list[dict[str, Any]]:
    return [{"question": QUESTIONS[i % 3], "image": image(("wide", "square")[i % 2], i)}
            for i in range(count)]


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    """As api/task.py: _build_user_turn makes them."""
    return [{"role": "user", "content": [{"type": "image", "url": document["image"]},
                                         {"type": "text", "text": document["question"]}]}]


def requests(count: int, to_messages: Any = messages, **settings: Any) -> list[Any]:
    given = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, **settings}
    return [SimpleNamespace(idx=0, args=("", to_messages, dict(given), i, "tiny", "test"))
            for i in range(count)]


def model(harness: Any, folder: Path, family: str, batch_size: int, count: int = 6) -> Any:
    made = harness.TaidVlm(str(folder / family), batch_size=batch_size, device="cpu")
    made.task_dict = {"tiny": {"test": documents(count)}}
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_this_packages_at_any_batch_size(
    harness: Any, folder: Path, family: str
) -> None:
    spec = ModelSpec(str(folder / family))
    adapter = make_adapter(load_processor(spec, "model"), "model")
    records = [(Record(f"{i}", (Message("user", (None, doc["question"])),),
                       (ImageRef(doc["image"], f"{i}"),)), 0) for i, doc in enumerate(documents())]
    expected = generate_answers(load_model(spec, "model"), adapter, records, max_new_tokens=8,
                                batch_size=1)
    for batch_size in (1, 4):
        said = model(harness, folder, family, batch_size).generate_until(requests(6))
        assert said == expected
    assert len(set(expected)) > 1, "the model must not say one thing to everything"


def test_settings_differ_by_request(harness: Any, folder: Path) -> None:
    mixed = requests(6)
    mixed[1].args[2]["max_new_tokens"] = mixed[4].args[2]["max_new_tokens"] = 2
    one = model(harness, folder, "llava", 4)
    said, long = one.generate_until(mixed), one.generate_until(requests(6))
    for index in range(6):
        same = said[index] == long[index]
        assert same if index not in (1, 4) else long[index].startswith(said[index]) and not same


def test_a_picture_that_cannot_be_read_is_told_and_costs_one_answer(
    harness: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = model(harness, folder, "llava", 4)
    one.task_dict["tiny"]["test"][2]["image"] = str(tmp_path / "gone.png")
    with caplog.at_level(logging.WARNING):
        said = one.generate_until(requests(6))
    whole = model(harness, folder, "llava", 4).generate_until(requests(6))
    assert said == [*whole[:2], "", *whole[3:]]
    assert "tiny/test/2/0 has no answer: unreadable image" in caplog.text


def test_system_messages_are_shown(harness: Any, folder: Path) -> None:
    def told(document: dict[str, Any]) -> list[dict[str, Any]]:
        system = {"role": "system", "content": [{"type": "text", "text": "Answer in Greek."}]}
        return [system, *messages(document)]

    one = model(harness, folder, "qwen2_5_vl", 2)
    assert one.generate_until(requests(4, told)) != one.generate_until(requests(4))


@pytest.mark.parametrize(("content", "message"), [
    ({"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}, "'video' cannot be shown"),
    ({"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}, "an answer stands in"),
])
def test_what_cannot_be_asked_is_refused(
    harness: Any, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaidError, match=message):
        harness.conversation([content], "tiny/test/0/0", 0)


def test_generation_settings(harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = partial(harness.generation_settings, max_new_tokens=1024)
    assert settings({}) == {"max_new_tokens": 1024, "temperature": 0.0, "top_p": 1.0}
    assert settings({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}) == {
        "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9}
    assert settings({"temperature": 0.7, "do_sample": False})["temperature"] == 0.0
    assert settings({"temperature": None, "do_sample": True, "top_p": None}) == {
        "max_new_tokens": 1024, "temperature": 1.0, "top_p": 1.0}
    with pytest.raises(TaidError, match="num_beams = 3"):
        settings({"num_beams": 3})
    settings({"repetition_penalty": 1.2})
    assert "without effect on this model: repetition_penalty" in caplog.text


def test_an_answer_ends_before_the_first_stop(harness: Any) -> None:
    assert harness.until("a cat\n\nQ: next", ["\n\n", "Q:"]) == "a cat"
    assert harness.until("a cat. A dog", ".") == "a cat"
    assert harness.until(" a cat ", None) == harness.until("a cat", [""]) == "a cat"


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_lmms_eval_itself(harness: Any, folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    MODEL_REGISTRY_V2.register_manifest(harness.MANIFEST, overwrite=True)
    held = [{"question": d["question"], "answer": "yes", "image": d["image"]} for d in documents()]
    datasets.Dataset.from_list(held).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "q.parquet")
    (tmp_path / "utils.py").write_text(
        "def visual(doc): return [doc['image'].convert('RGB')]\n"
        "def text(doc, lmms_eval_specific_kwargs=None): return doc['question']\n")
    (tmp_path / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {tmp_path / 'q.parquet'}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
""")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        "taid_vlm", model_args=f"pretrained={folder / 'qwen2_5_vl'}", tasks=["tiny"],
        batch_size=4, device="cpu", task_manager=manager)
    said = [sample["resps"][0][0] for sample in found["samples"]["tiny"]]
    assert said == model(harness, folder, "qwen2_5_vl", 1).generate_until(requests(6))


TASK = """
task: tiny
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
process_results: !function utils.process
metric_list: [{metric: odd, aggregation: !function utils.mean, higher_is_better: true}]
metadata: {version: 0.0}
"""
UTILS = """
def visual(doc): return [doc["image"].convert("RGB")]
def text(doc, kwargs=None): return doc["question"]
def process(doc, results): return {"odd": {"question": doc["question"],
                                           "score": float(len(results[0]) % 2)}}
def mean(rows): return sum(row["score"] for row in rows) / len(rows)
"""


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_its_logs_are_an_evaluation(folder: Path, tmp_path: Path) -> None:
    """lmms-eval itself with this package's model on local data; what it logs is read by `compare`,
    with the answers that this package gives and the scores of the harness."""
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.tasks import TaskManager

    from taid_vlm.compare import compare_runs, read_method
    from taid_vlm.compare.folders import read_folder

    rows = datasets.Dataset.from_list([{**doc, "answer": "red"} for doc in documents()])
    rows.to_parquet(str(tmp_path / "tiny.parquet"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.replace("DATA", f"{tmp_path}/tiny.parquet"))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    expected = {}
    for family in ("llava", "smolvlm"):
        raw = simple_evaluate(
            model="taid_vlm", model_args=f"pretrained={folder / family},device=cpu", batch_size=2,
            tasks=["tiny"], task_manager=TaskManager(include_path=str(tmp_path / "tasks"),
                                                     include_defaults=False), log_samples=True)
        tracker = EvaluationTracker(output_path=str(tmp_path / "logs"))
        tracker.general_config_tracker.model_name_sanitized = family
        samples = raw.pop("samples")
        expected[family] = raw["results"]["tiny"]["odd,none"]
        tracker.save_results_aggregated(raw, samples, "20260301_100000")
        tracker.save_results_samples(task_name="tiny", samples=samples["tiny"])
        spec = ModelSpec(str(folder / family))
        adapter = make_adapter(load_processor(spec, "model"), "model")
        records = [(Record(f"{i}", (Message("user", (None, doc["question"])),),
                           (ImageRef(doc["image"], f"{i}"),)), 0)
                   for i, doc in enumerate(documents())]
        said = generate_answers(load_model(spec, "model"), adapter, records, max_new_tokens=8,
                                batch_size=1)
        found = read_folder(tmp_path / "logs" / family)
        assert [row["answer"].strip() for row in found.answers("tiny")] == [
            text.strip() for text in said]
        assert [row["score"] for row in found.answers("tiny")] == [
            float(len(text) % 2) for text in said]
        assert found.results["tasks"]["tiny"]["rule"] == (
            f"lmms-eval {raw['lmms_eval_version']}")
    judged = compare_runs([read_method(str(tmp_path / "logs" / family)) for family in expected]
                          ).benchmarks[0]
    assert judged.paired is not None
    assert {name: figure.value / 100 for name, figure in judged.figures.items()} == pytest.approx(
        expected)
