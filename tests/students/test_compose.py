"""Composed students: they load anywhere, say what their language model says, and see."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from students.composing import TEXT, Parts, inputs_of, loaded
from tokenizers.pre_tokenizers import ByteLevel
from training.runs import make_trainer, rows
from zoo import build
from zoo.images import image

import taid_vlm.students.language as language
from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.cli import main
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.runs.save import save_student
from taid_vlm.students.compose import compose
from taid_vlm.students.towers import find_tower

# ----- language models ----------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [
    ("llama", False), ("qwen2", True), ("gpt2", False), ("gpt2", True), ("gemma3_text", True)])
def test_text_alone_gives_the_language_models_logits(
    parts: Parts, tmp_path: Path, family: str, tied: bool
) -> None:
    """Also with scaled embeddings (Gemma), and where rows have to be added (padded_rows = 0)."""
    name = parts.text(family, tied, padded_rows=0)
    made = compose(parts.tower("siglip"), name, tmp_path / "student")
    model, processor = loaded(tmp_path / "student")
    source = hf.AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    ids = tokenizer("naïve: the red square, 10\n  图片", return_tensors="pt")["input_ids"]
    assert processor.tokenizer("naïve: the red square, 10\n  图片")["input_ids"] == ids[0].tolist()
    before, after = made.rows
    assert (before, after) == (len(tokenizer), 576) and made.image_token_id == len(tokenizer)
    with torch.no_grad():
        found, wanted = model(input_ids=ids).logits, source(ids).logits
        hidden = source.base_model(ids).last_hidden_state
        assert model.model(input_ids=ids).last_hidden_state.equal(hidden)
    assert (found[..., :before] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    rows = [module.weight for module in (model.get_input_embeddings(), model.lm_head)]
    olds = [source.get_input_embeddings().weight, source.lm_head.weight]
    for row, old in zip(rows, olds, strict=True):
        assert row[:before].equal(old) and len(row) == after
        torch.testing.assert_close(row[before:], old.mean(0).expand(after - before, -1))
    assert (rows[0] is rows[1]) == (tied and family != "gpt2")
    assert made.tied == (tied, tied and family != "gpt2")
    assert ("untied" in made.table()) == (family == "gpt2" and tied)
    theirs = source.generation_config
    assert model.generation_config.eos_token_id == theirs.eos_token_id


def test_rows_that_are_there_already_are_used(parts: Parts, tmp_path: Path) -> None:
    """Padding rows take the image token; more rows than tokens are never cut away."""
    made = compose(parts.tower("siglip"), parts.text("llama", padded_rows=250), tmp_path / "a")
    assert made.rows == (768, 768)
    old = hf.AutoModelForCausalLM.from_pretrained(parts.text("llama", padded_rows=250))
    assert loaded(tmp_path / "a")[0].lm_head.weight.equal(old.lm_head.weight)


def test_half_precision_is_the_language_models_too(parts: Parts, tmp_path: Path) -> None:
    made = compose(parts.tower("clip"), parts.text("llama"), tmp_path / "a", dtype="bfloat16")
    model, processor = loaded(tmp_path / "a")
    assert made.dtype == "bfloat16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = compose(parts.tower("clip"), str(half(parts, tmp_path)), tmp_path / "b")
    assert again.dtype == "bfloat16"
    assert model(**inputs_of(processor, image())).logits.isfinite().all()


def half(parts: Parts, folder: Path) -> Path:
    source = hf.AutoModelForCausalLM.from_pretrained(parts.text("llama")).bfloat16()
    source.save_pretrained(folder / "half")
    hf.AutoTokenizer.from_pretrained(parts.text("llama")).save_pretrained(folder / "half")
    return folder / "half"


def cohere(**changes: Any) -> hf.PreTrainedModel:
    return hf.CohereForCausalLM(hf.CohereConfig(
        **{**TEXT, "vocab_size": 576, "logit_scale": 0.25, **changes}))


@pytest.mark.parametrize(("model", "message"), [
    (None, r"final_logit_softcapping = 3.0"),
    (cohere, r"\(cohere\) changes its logits after the head \(logit_scale = 0.25\)"),
    (lambda: hf.PhiForCausalLM(hf.PhiConfig(**TEXT)), "its head has a bias"),
    (lambda: hf.OPTForCausalLM(hf.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99,
        word_embed_proj_dim=16)), "embedding is not as wide as its hidden states"),
    (lambda: hf.BertLMHeadModel(hf.BertConfig(**TEXT, is_decoder=True)), "head has a bias"),
    (lambda: build("llava").model, "sees images already"),
    (lambda: hf.T5ForConditionalGeneration(hf.T5Config(
        d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=99)), "encoder-decoder"),
])
def test_what_cannot_be_carried_is_refused_with_the_reason(
    parts: Parts, tmp_path: Path, model: Any, message: str
) -> None:
    name = parts.text("gemma2")
    if model is not None:
        model().save_pretrained(tmp_path / "lm")
        name = str(tmp_path / "lm")
    with pytest.raises(TaidError, match=message):
        compose(parts.tower("siglip"), name, tmp_path / "student")
    assert not list(tmp_path.glob("*student*"))


def test_the_last_check_finds_what_no_table_names(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "logit_settings", lambda config: ({}, {}))
    with pytest.raises(TaidError, match="on text alone the composed model does not give"):
        compose(parts.tower("siglip"), parts.text("gemma2"), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_survive_is_an_error(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does for some model types: the folder gives another splitting."""
    write = hf.LlavaProcessor.save_pretrained

    def rebuilt(self: Any, folder: Path, **options: Any) -> None:
        write(self, folder, **options)
        self.tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
        self.tokenizer.save_pretrained(folder)

    monkeypatch.setattr(hf.LlavaProcessor, "save_pretrained", rebuilt)
    with pytest.raises(TaidError, match="beside the composed model, changes how it splits"):
        compose(parts.tower("siglip"), parts.text("llama"), tmp_path / "student")
    assert not list(tmp_path.iterdir())


# ----- what a student is for ----------------------------------------------------------------

ELSEWHERE = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert "taid_vlm" not in sys.modules
    needs_timm = model.config.model_type != "llava"
    assert needs_timm == ("timm" in sys.modules), sorted(sys.modules)
    talk = [{"role": "user", "content": [
        {"type": "image", "image": Image.new("RGB", (57, 35), "red")},
        {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs.pop("mm_token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    print(model.config.model_type, ids.shape[1] - inputs["input_ids"].shape[1])
"""


def test_students_load_where_this_package_is_not(parts: Parts) -> None:
    folders = [parts.composed(f"timm:{name}") for name in ("test_vit", "test_vit2", "test_resnet")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["llava", "3", "perception_lm", "3", "fast_vlm", "3"]
    for folder in folders:
        assert not list(Path(folder).glob("*.bin")) and not list(Path(folder).glob("*.py"))
        assert str(parts.folder) not in (Path(folder) / "config.json").read_text()


@pytest.mark.parametrize("tower", ["clip", "timm:test_vit2", "timm:test_resnet"])
def test_a_student_is_distilled_saved_and_used(parts: Parts, tmp_path: Path, tower: str) -> None:
    spec, teacher = ModelSpec(parts.composed(tower)), build("internvl")
    model, processor = load_model(spec, "student"), load_processor(spec, "student")
    trainer = DistillationTrainer(
        model, teacher.model,
        DistillationConfig(str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=8,
                           learning_rate=1e-2, report_to="none", save_strategy="no",
                           disable_tqdm=True, use_cpu=True, eval_strategy="no"),
        rows(8), None, processor, teacher.processor)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {key.split(".")[1] for key, p in trainer.model.named_parameters()
             if not p.equal(before[key])}
    assert {"multi_modal_projector", "vision_tower", "language_model"} <= moved
    save_student(trainer, tmp_path / "student")
    again, processor = loaded(tmp_path / "student")
    given = inputs_of(processor, image())
    with torch.no_grad():
        assert again(**given).logits.equal(trainer.model.eval()(**given).logits)


def test_saving_tells_of_a_tokenizer_that_does_not_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trained weights are kept all the same."""
    trainer = make_trainer(tmp_path / "run", data=rows(8, text_only=True))
    with caplog.at_level(logging.WARNING, "taid_vlm"):
        save_student(trainer, tmp_path / "student")
    assert not caplog.messages
    write = hf.PreTrainedTokenizerFast.save_pretrained

    def rebuilt(self: Any, folder: Path, **options: Any) -> Any:
        other = copy.deepcopy(self)
        other.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
        return write(other, folder, **options)

    monkeypatch.setattr(hf.PreTrainedTokenizerFast, "save_pretrained", rebuilt)
    save_student(trainer, tmp_path / "student")
    assert "tokenizer that was trained with changes how it splits" in caplog.text
    assert (tmp_path / "student" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "student"]


def test_on_text_a_student_is_its_language_model(parts: Parts, tmp_path: Path) -> None:
    """Through both adapters; only the share that the student gives its image token is new."""
    spec, teacher = ModelSpec(parts.composed("siglip", "llama")), ModelSpec(parts.text("llama"))
    trainer = DistillationTrainer(
        load_model(spec, "student"), load_model(teacher, "teacher"),
        DistillationConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True,
                           disable_tqdm=True, per_device_eval_batch_size=4),
        rows(8, text_only=True), rows(8, text_only=True),
        load_processor(spec, "student"), load_processor(teacher, "teacher"))
    figures = trainer.held_out(trainer.eval_dataset)
    assert figures["n_tokens"] > 30 and 0 <= figures["kl"] < 0.003


# ----- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"tower": "timm:vit_tiny_patch16_225"}, "Did you mean 'vit_tiny_patch16_224'"),
    ({"tower": "timm:test_vit.r161_in1k"}, "no weights 'r161_in1k'. Did you mean 'r160_in1k'"),
    ({"tower": "timm/test_vit"}, "write 'timm:test_vit'"),
    ({"tower": "nowhere/at/all"}, "tower: no model at 'nowhere/at/all'"),
    ({"tower": "TEXT"}, r"\(llama\) is none that LLaVA can read"),
    ({"tower": "timm:test_mambaout"}, "neither tokens nor a map with channels first"),
    ({"tower": "timm:hiera_tiny_224"}, "is not as wide as its embed_dim"),
    ({"tower": "timm:vit_small_patch14_reg4_dinov2"}, "5 tokens before the patches"),
    ({"tower": "timm:test_vit2", "architecture": "llava"},
     "no plain ViT: no class token; parameters a ViTModel lacks .*ls1.* Choose 'perception_lm'"),
    ({"tower": "timm:test_resnet", "architecture": "llava"}, "Choose 'fast_vlm'"),
    ({"tower": "timm:test_resnet", "architecture": "perception_lm"}, "gives a feature map; choose"),
    ({"tower": "timm:test_vit", "architecture": "fast_vlm"}, "gives a sequence of tokens; choose"),
    ({"architecture": "perception_lm"}, "takes timm towers only"),
    ({"architecture": "lava"}, "architecture = 'lava' is unknown. Did you mean 'llava'"),
    ({"dtype": "bf16"}, "dtype = 'bf16' is unknown"),
    ({"projector_activation": "gelo"}, "projector_activation = 'gelo' is unknown.*'gelu'"),
    ({"pooling_ratio": 2}, "pooling_ratio is PerceptionLM's"),
    ({"tower": "timm:test_vit2", "pooling_ratio": 11}, "pooling_ratio = 11, but .* 10 x 10"),
    ({"tower": "timm:test_vit2", "projector_activation": "relu"}, "is always 'gelu'"),
    ({"tower": "timm:test_vit2", "vision_feature_layer": -2}, "vision_feature_layer is LLaVA's"),
    ({"vision_feature_layer": -4}, "hidden states -3 to 2"),
    ({"vision_feature_layer": [-1, 3]}, "vision_feature_layer = 3"),
    ({"tower_weights": "x.safetensors"}, "is for timm towers"),
    ({"tower": "timm:test_vit", "tower_weights": "x.bin", "random_tower": True}, "exclude each"),
    ({"tower": "timm:test_vit", "tower_weights": "x.safetensors"}, "x.safetensors' is no file"),
    ({"language_model": "nowhere/at/all"}, "language_model: no model at"),
    ({"chat_template": "nowhere.jinja"}, "neither a file nor a template"),
    ({"chat_template": "{{ 'nothing' }}"}, "does not print a question and an answer"),
])
def test_mistakes_cost_no_weights(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any],
    message: str,
) -> None:
    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("taid_vlm.students.compose.load_language", loads)
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", loads)
    monkeypatch.setattr("taid_vlm.students.towers._load_timm", loads)
    given = {"tower": parts.tower("siglip"), "language_model": parts.text("llama"), **options}
    given["tower"] = parts.text("llama") if given["tower"] == "TEXT" else given["tower"]
    with pytest.raises(TaidError, match=message):
        compose(output_dir=tmp_path / "student", **given)
    assert not list(tmp_path.iterdir())


def test_a_blind_student_is_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeroed(module: Any) -> Any:
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
        return module

    found = find_tower(parts.tower("siglip"))
    load = found.load
    found = dataclasses.replace(found, load=lambda dtype: zeroed(load(dtype)))
    monkeypatch.setattr("taid_vlm.students.compose.find_tower", lambda *a, **k: found)
    with pytest.raises(TaidError, match="the tower is blind"):
        compose(parts.tower("siglip"), parts.text("llama"), tmp_path / "a")


def test_output_folders_are_never_walked_over(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").touch()
    file.touch()
    for folder, message in ((full, "is not empty"), (file, "is a file"), (file / "a", "is a file")):
        with pytest.raises(TaidError, match=message):
            compose(parts.tower("siglip"), parts.text("llama"), folder)
    (tmp_path / "empty").mkdir()
    compose(parts.tower("siglip"), parts.text("llama"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hf.LlavaProcessor, "save_pretrained", no_space)
    with pytest.raises(TaidError, match=r"could not be written .*No space left"):
        compose(parts.tower("siglip"), parts.text("llama"), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_the_command(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compose", parts.tower("clip"), parts.text("llama"), "--output-dir",
                 str(tmp_path / "a")]
    assert main([*arguments, "--vision-feature-layer", "-1", "--projector-activation", "silu",
                 "--dtype", "float32", "--seed", "3"]) == 0
    table = capsys.readouterr().out
    for piece in ("llava", "hidden state -1", "32 x 32 pixels, patches of 8, 16 tokens",
                  "<image>, id 518", "576 -> 576", "text logits equal bit for bit"):
        assert piece in table
    assert loaded(tmp_path / "a")[0].config.projector_hidden_act == "silu"
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: output_dir")
