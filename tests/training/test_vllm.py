"""A real vLLM server as the teacher. TAID_VLM_VLLM names the Python of an environment that has
vLLM on CPU (`scripts/setup_vllm_cpu.sh` makes one); without it nothing here runs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from training.runs import rows, weights
from training.test_served import FIGURES, STEPS, K, logged, pupil, train
from training.vllm import wide, wide_llama
from zoo import Built, save

from taid_vlm import DistillationTrainer
from taid_vlm.config.model import ModelSpec, ServerSpec
from taid_vlm.models.generation import prompt_inputs
from taid_vlm.models.loading import load_model, load_processor, load_skeleton
from taid_vlm.models.published import use_published_names
from taid_vlm.students.compose import compose
from taid_vlm.teachers import ServedTeacher, TeacherLost
from taid_vlm.training.on_policy import _record
from taid_vlm.training.sampled import drawing_of, prompts

PYTHON = os.environ.get("TAID_VLM_VLLM")
READY_WITHIN = 300  # seconds
pytestmark = pytest.mark.skipif(not PYTHON, reason="TAID_VLM_VLLM names no Python with vLLM")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Vllm:
    """A server process of a saved model."""

    def __init__(self, folder: Path) -> None:
        assert PYTHON is not None
        port, home = free_port(), Path(PYTHON).parent
        self.url, self.log = f"http://127.0.0.1:{port}/v1", folder.parent / "vllm.log"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {
            "PATH": f"{home}:{environment['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1"}
        command = [str(home / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port",
                   str(port), "--served-model-name", "teacher", "--max-model-len", "512",
                   "--max-num-seqs", "8", "--max-logprobs", "-1", "--enforce-eager", "--dtype",
                   "float32"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + READY_WITHIN
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"vLLM does not serve: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.terminate()  # it ends its engine itself
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(save(wide_llama(), tmp_path_factory.mktemp("vllm") / "model"))
    yield server
    server.stop()


def test_vllm_teaches_as_the_same_model_here(vllm: Vllm, tmp_path: Path) -> None:
    """Three steps: losses and figures within 1e-4 of a local teacher with the same top k."""
    built = wide_llama()
    spec = ServerSpec(url=vllm.url, model="teacher", top_logprobs=K, timeout=60.0, retries=1)
    teacher = ServedTeacher(spec, built.model)
    remote = train(tmp_path, teacher, built.processor, pupil())
    local = train(tmp_path, built.model, built.processor, pupil())
    ours, theirs = (torch.tensor(logged(run, *FIGURES), dtype=torch.float64)
                    for run in (remote, local))
    apart = max(float((weights(remote)[name] - weight).abs().max())
                for name, weight in weights(local).items())
    print(f"vLLM against transformers over {STEPS} steps, k = {K}: largest difference of a logged "
          f"figure {float((ours - theirs).abs().max()):.2g}; of a weight "
          f"{apart:.2g}; {teacher.report()}")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert apart < 1e-4


def composed(folder: Path) -> Path:
    """A LLaVA of a SigLIP tower and a Qwen2, under the weights' published names, which vLLM reads:
    as `taid-vlm compose` and `taid-vlm distill` write it."""
    tower = hf.SiglipVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=2, image_size=32, patch_size=8)
    torch.manual_seed(0)
    hf.SiglipVisionModel(tower).save_pretrained(folder / "tower")
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "tower")
    save(wide("qwen2", hidden_size=128), folder / "language")
    compose(str(folder / "tower"), str(folder / "language"), folder / "composed")
    spec = ModelSpec(model_name_or_path=str(folder / "composed"))
    model = load_model(spec, "teacher")
    with torch.no_grad():  # a fresh projector hardly looks
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(5.0)
    use_published_names(model)
    model.save_pretrained(folder / "model")
    load_processor(spec, "teacher").save_pretrained(folder / "model")
    return folder / "model"


def test_vllm_sees_what_the_same_model_sees_here(tmp_path: Path) -> None:
    """The same with images: one, two, in several turns, beside texts."""
    folder = composed(tmp_path)
    spec = ModelSpec(model_name_or_path=str(folder))
    data, processor = rows(8), load_processor(spec, "teacher")

    def run(teacher: Any) -> list[list[float]]:
        model = load_model(spec, "student")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        student = Built("llava", processor, model)
        return logged(train(tmp_path / "run", teacher, processor, student, data), *FIGURES)

    server = Vllm(folder)
    try:
        served = ServerSpec(url=server.url, model="teacher", top_logprobs=K, timeout=60.0)
        remote = run(ServedTeacher(served, load_skeleton(spec, "teacher")))
    finally:
        server.stop()
    ours, theirs = (torch.tensor(figures, dtype=torch.float64)
                    for figures in (remote, run(load_model(spec, "teacher"))))
    print(f"with images: largest difference of a logged figure "
          f"{float((ours - theirs).abs().max()):.2g}")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_vllm_samples_for_the_student(tmp_path: Path) -> None:
    """With images and without, from weights that change every step; the same weights, question and
    seed, asked one at a time, give the same tokens again."""
    folder = composed(tmp_path)
    spec, server = ModelSpec(model_name_or_path=str(folder)), Vllm(folder)
    model = load_model(spec, "student")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    processor = load_processor(spec, "student")
    engine = {"url": server.url, "model": "teacher", "timeout": 60.0, "concurrency": 1}
    objective = {"name": "taid", "on_policy": {"lmbda": 1.0, "max_new_tokens": 12,
                                               "engine": engine}}
    try:
        trainer = train(tmp_path / "run", load_model(spec, "teacher"), processor,
                        Built("llava", processor, model), rows(8), objective=objective)
        lines = [json.loads(line) for line in trainer.rollouts.engine.journal.open()]
        rollouts, adapter = trainer.rollouts, trainer.collator.student
        pairs = [(_record(row), 0) for row in rows(8)]
        asked = list(prompts(adapter, pairs, prompt_inputs(adapter, pairs)))
        drawing = drawing_of(rollouts.spec, trainer.model, adapter)
        first, again = (rollouts.engine.sample(asked, drawing, "0", step) for step in (8, 9))
    finally:
        server.stop()
    report = trainer.rollouts.report()
    print(f"sampled by vLLM: {report}")
    assert report["sampled"] > 8 and report["engine"]["syncs"] == STEPS
    assert report["engine"]["gap"] < 1e-3
    assert len({line["weights"] for line in lines}) == STEPS
    assert [each.ids for each in first] == [each.ids for each in again]


def test_a_vllm_that_is_stopped_leaves_a_checkpoint(
    vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run; the last test here, for the server is gone after it."""
    built, finish = wide_llama(), DistillationTrainer.finish_step
    spec = ServerSpec(url=vllm.url, model="teacher", top_logprobs=K, timeout=60.0, retries=1)

    def stops(trainer: DistillationTrainer) -> None:
        finish(trainer)
        if trainer.state.global_step == 1:
            vllm.stop()

    monkeypatch.setattr(DistillationTrainer, "finish_step", stops)
    with pytest.raises(TeacherLost, match="no answer after 2 attempts"):
        train(tmp_path, ServedTeacher(spec, built.model), built.processor, pupil(), max_steps=9)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
