"""scripts/convert_internvl2.py on a look-alike whose forward pass stands here as published."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from zoo.images import shape
from zoo.tokenizers import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import convert_internvl2

WIDE, DEEP, HEADS, HIDDEN, LAYERS, KV = 32, 2, 2, 64, 2, 2  # of the tower, of the language model
Weights = dict[str, Tensor]
VISION = {
    "hidden_size": WIDE, "num_hidden_layers": DEEP, "num_attention_heads": HEADS,
    "intermediate_size": 48, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "dropout": 0.0, "attention_dropout": 0.0,
    "drop_path_rate": 0.1, "initializer_factor": 0.1, "initializer_range": 0.02,
    "model_type": "intern_vit_6b", "use_flash_attn": True}
LANGUAGE = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2 * KV,
    "num_key_value_heads": KV, "intermediate_size": 96, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False}


class Checkpoint:
    """Random weights under the names of the remote code, and what it makes of them."""

    def __init__(self, language: str, rms: bool, bias: bool) -> None:
        self.language, self.rms, self.bias = language, rms, bias
        self.tokenizer = deepcopy(make_tokenizer("internvl"))
        self.tokenizer.add_tokens(["</quad>"], special_tokens=True)
        self.rows, self.weights = len(self.tokenizer) + 3, Weights()
        torch.manual_seed(0)
        self._tower()
        if language == "Qwen2ForCausalLM":
            self.qwen2 = Qwen2ForCausalLM(Qwen2Config(
                **LANGUAGE, vocab_size=self.rows, attn_implementation="eager")).eval()
            for parameter in self.qwen2.parameters():
                parameter.data.normal_(std=0.2)
            self.weights |= {f"language_model.{name}": tensor.clone()
                             for name, tensor in self.qwen2.state_dict().items()}
        else:
            self._internlm2()

    def add(self, name: str, *size: int) -> None:
        self.weights[name] = torch.randn(size) * 0.2

    def norm(self, name: str, width: int, rms: bool) -> None:
        for kind in ("weight",) if rms else ("weight", "bias"):
            self.add(f"{name}.{kind}", width)

    def _tower(self) -> None:
        place = "vision_model.embeddings."
        self.add(f"{place}class_embedding", 1, 1, WIDE)
        self.add(f"{place}position_embedding", 1, 17, WIDE)
        self.add(f"{place}patch_embedding.weight", WIDE, 3, 8, 8)
        self.add(f"{place}patch_embedding.bias", WIDE)
        for layer in (f"vision_model.encoder.layers.{i}." for i in range(DEEP)):
            self.add(f"{layer}attn.qkv.weight", 3 * WIDE, WIDE)
            if self.bias:
                self.add(f"{layer}attn.qkv.bias", 3 * WIDE)
            if self.rms:
                self.norm(f"{layer}attn.q_norm", WIDE, True)
                self.norm(f"{layer}attn.k_norm", WIDE, True)
            for name, out, into in (("attn.proj", WIDE, WIDE), ("mlp.fc1", 48, WIDE),
                                    ("mlp.fc2", WIDE, 48)):
                self.add(f"{layer}{name}.weight", out, into)
                self.add(f"{layer}{name}.bias", out)
            for number in (1, 2):
                self.norm(f"{layer}norm{number}", WIDE, self.rms)
                self.add(f"{layer}ls{number}", WIDE)
        self.norm("mlp1.0", 4 * WIDE, False)
        for number, into in ((1, 4 * WIDE), (3, HIDDEN)):
            self.add(f"mlp1.{number}.weight", HIDDEN, into)
            self.add(f"mlp1.{number}.bias", HIDDEN)

    def _internlm2(self) -> None:
        self.add("language_model.model.tok_embeddings.weight", self.rows, HIDDEN)
        self.add("language_model.model.norm.weight", HIDDEN)
        self.add("language_model.output.weight", self.rows, HIDDEN)
        for layer in (f"language_model.model.layers.{i}." for i in range(LAYERS)):
            self.add(f"{layer}attention.wqkv.weight", 2 * HIDDEN, HIDDEN)
            self.add(f"{layer}attention.wo.weight", HIDDEN, HIDDEN)
            self.add(f"{layer}attention_norm.weight", HIDDEN)
            self.add(f"{layer}ffn_norm.weight", HIDDEN)
            for name, out, into in (("w1", 96, HIDDEN), ("w2", HIDDEN, 96), ("w3", 96, HIDDEN)):
                self.add(f"{layer}feed_forward.{name}.weight", out, into)

    def save(self, folder: Path, **changes: Any) -> Path:
        folder.mkdir()
        language = {**LANGUAGE, "vocab_size": self.rows, "architectures": [self.language]}
        if self.language == "InternLM2ForCausalLM":
            language |= {"bias": False, "attn_implementation": "eager", "model_type": "internlm2",
                         "rope_scaling": {"type": "dynamic", "factor": 2.0}}
        config = {
            "model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1,
            "downsample_ratio": 0.5, "dynamic_image_size": True, "use_thumbnail": True,
            "min_dynamic_patch": 1, "max_dynamic_patch": 4, "force_image_size": 32,
            "torch_dtype": "float32", "llm_config": language,
            "vision_config": VISION | {"qkv_bias": self.bias, "qk_normalization": self.rms,
                                       "norm_type": "rms_norm" if self.rms else "layer_norm"}}
        (folder / "config.json").write_text(json.dumps(config | changes))
        save_file(self.weights, folder / "model.safetensors")
        self.tokenizer.save_pretrained(folder)
        return folder

    # ----- what the remote code computes ----------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def normed(self, x: Tensor, name: str, rms: bool) -> Tensor:
        weight = self[f"{name}.weight"]
        if not rms:
            eps = 1e-5 if name == "mlp1.0" else 1e-6
            return F.layer_norm(x, weight.shape, weight, self[f"{name}.bias"], eps)
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def tower(self, pixels: Tensor) -> Tensor:
        place = "vision_model.embeddings."
        x = F.conv2d(pixels, self[f"{place}patch_embedding.weight"],
                     self[f"{place}patch_embedding.bias"], stride=8).flatten(2).transpose(1, 2)
        x = torch.cat([self[f"{place}class_embedding"].expand(len(x), 1, -1), x], 1)
        x = x + self[f"{place}position_embedding"]
        for layer in (f"vision_model.encoder.layers.{i}." for i in range(DEEP)):
            attended = self.attended(self.normed(x, f"{layer}norm1", self.rms), f"{layer}attn.")
            x = x + attended * self[f"{layer}ls1"]
            inner = self.linear(self.normed(x, f"{layer}norm2", self.rms), f"{layer}mlp.fc1")
            x = x + self.linear(F.gelu(inner), f"{layer}mlp.fc2") * self[f"{layer}ls2"]
        return x

    def attended(self, x: Tensor, place: str) -> Tensor:
        sizes = (*x.shape[:2], 3, HEADS, WIDE // HEADS)
        q, k, v = self.linear(x, f"{place}qkv").reshape(sizes).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rms:
            q, k = (self.normed(y.transpose(1, 2).flatten(-2), f"{place}{name}", True).view(
                *x.shape[:2], HEADS, -1).transpose(1, 2) for y, name in ((q, "q_norm"),
                                                                        (k, "k_norm")))
        weights = ((q * (WIDE // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(x.shape), f"{place}proj")

    def features(self, pixels: Tensor) -> Tensor:
        x = self.tower(pixels)[:, 1:].reshape(len(pixels), 4, 4, WIDE)
        x = x.view(len(x), 4, 2, 2 * WIDE).permute(0, 2, 1, 3).contiguous()  # pixel shuffle,
        x = x.view(len(x), 2, 2, 4 * WIDE).permute(0, 2, 1, 3).contiguous()  # version 2
        x = self.linear(self.normed(x.flatten(1, 2), "mlp1.0", False), "mlp1.1")
        return self.linear(F.gelu(x), "mlp1.3")

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        of_qwen2 = self.language == "Qwen2ForCausalLM"
        table = self["language_model.model." + (
            "embed_tokens.weight" if of_qwen2 else "tok_embeddings.weight")]
        x = F.embedding(ids, table)
        place = ids == self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        x[place] = x[place] * 0.0 + self.features(pixels).reshape(-1, HIDDEN)
        return self.qwen2(inputs_embeds=x).logits if of_qwen2 else self.decoded(x)

    def decoded(self, x: Tensor) -> Tensor:
        """InternLM2."""
        length, wide = x.shape[1], HIDDEN // (2 * KV)
        angles = torch.arange(length)[:, None] * (1 / 1e6 ** (torch.arange(0, wide, 2) / wide))
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        future = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)

        def rotated(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat((-second, first), -1) * sin

        for layer in (f"language_model.model.layers.{i}." for i in range(LAYERS)):
            fused = self.linear(self.normed(x, f"{layer}attention_norm", True),
                                f"{layer}attention.wqkv").view(1, length, KV, 4, wide)
            q = fused[..., :2, :].flatten(2, 3).transpose(1, 2)
            k, v = (fused[..., i, :].transpose(1, 2).repeat_interleave(2, 1) for i in (2, 3))
            weights = rotated(q) @ rotated(k).transpose(2, 3) / wide ** 0.5 + future
            y = (weights.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
            x = x + self.linear(y, f"{layer}attention.wo")
            y, forward = self.normed(x, f"{layer}ffn_norm", True), f"{layer}feed_forward."
            x = x + self.linear(F.silu(self.linear(y, f"{forward}w1"))
                                * self.linear(y, f"{forward}w3"), f"{forward}w2")
        return self.linear(self.normed(x, "language_model.model.norm", True),
                           "language_model.output")


@pytest.mark.parametrize(("language", "rms", "bias"), [
    ("Qwen2ForCausalLM", False, True), ("InternLM2ForCausalLM", False, True),
    ("InternLM2ForCausalLM", True, False)], ids=["1B", "8B", "26B"])
@torch.inference_mode()
def test_the_logits_are_the_remote_codes(
    language: str, rms: bool, bias: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(language, rms, bias)
    output = tmp_path / "out"
    assert convert_internvl2.main([
        str(checkpoint.save(tmp_path / "in")), "--output-dir", str(output)]) == 0
    processor = AutoProcessor.from_pretrained(output)
    model = AutoModelForImageTextToText.from_pretrained(output, attn_implementation="eager")
    assert processor.tokenizer.convert_tokens_to_ids(
        "<|im_end|>") in model.generation_config.eos_token_id
    text = processor.apply_chat_template([{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "What is it?"}]}], add_generation_prompt=True)
    inputs = processor(images=[shape(80, 40)], text=text, return_tensors="pt")
    assert len(inputs["pixel_values"]) == 3  # two tiles and the thumbnail
    expected = checkpoint.logits(inputs["input_ids"], inputs["pixel_values"])
    logits = model(**inputs).logits
    assert expected.std() > 0.1
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert difference == 0, f"{difference:.1e}"
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(features, checkpoint.features(inputs["pixel_values"]))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "llava"}, "model_type = 'llava', but it must be internvl_chat"),
    ({"ps_version": "v1"}, "ps_version = 'v1', but transformers' InternVL computes only"),
    ({"force_image_size": 64}, "force_image_size = 64, but"),
    ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}},
     "llm_config.architectures = 'Phi3ForCausalLM'. Did you mean"),
    ({"vision_config": VISION | {"qk_normalization": True, "layer_norm_eps": 1e-5}},
     "vision_config.layer_norm_eps = 1e-05, but"),
])
def test_what_the_classes_cannot_hold_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: Any
) -> None:
    folder = Checkpoint("Qwen2ForCausalLM", False, True).save(tmp_path / "in", **changes)
    assert convert_internvl2.main([str(folder), "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_weight_too_many_or_too_few_is_named(tmp_path: Path, capsys: Any) -> None:
    checkpoint = Checkpoint("Qwen2ForCausalLM", False, True)
    moved = checkpoint.weights.pop("mlp1.3.bias")
    for name, weights in (("few", {}), ("many", {"mlp1.3.bias": moved, "mlp1.5.bias": moved + 1})):
        checkpoint.weights |= weights
        folder = checkpoint.save(tmp_path / name)
        assert convert_internvl2.main([str(folder), "--output-dir", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert ("linear_2.bias" if name == "few" else "mlp1.5.bias") in message
        assert not (tmp_path / "out").exists()
