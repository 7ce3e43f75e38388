"""Vision towers of composed students: the same features as where they came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from students.composing import TOWERS, Parts, inputs_of, loaded
from timm.models.vision_transformer import VisionTransformer
from zoo.images import image

from taid_vlm.errors import TaidError
from taid_vlm.students.compose import compose
from taid_vlm.students.towers import find_tower
from taid_vlm.students.vit import obstacles, vit_config, vit_state

# ----- towers of transformers ---------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_llava_sees_through_the_towers_own_features(parts: Parts, name: str) -> None:
    prefix, layer = TOWERS[name][2:]
    model, processor = loaded(parts.composed(name, "llama"))
    assert isinstance(model, hf.LlavaForConditionalGeneration)
    assert model.config.vision_feature_layer == layer
    strategy = "default" if prefix else "full"
    assert model.config.vision_feature_select_strategy == strategy
    assert processor.vision_feature_select_strategy == strategy
    assert (processor.patch_size, processor.num_additional_image_tokens) == (8, prefix)
    assert not hasattr(model.model.vision_tower, "head")  # SigLIP's pooling, which nothing trains
    whole = hf.AutoConfig.from_pretrained(parts.tower(name))
    tower = hf.AutoModel.from_pretrained(
        parts.tower(name), config=getattr(whole, "vision_config", whole)).eval()
    given = inputs_of(processor, image("wide"))
    count = int((given["input_ids"] == model.config.image_token_id).sum())
    assert count == model.config.image_seq_length == 16
    with torch.no_grad():
        hidden = tower(given["pixel_values"], output_hidden_states=True).hidden_states[layer]
        features = model.get_image_features(given["pixel_values"]).pooler_output[0]
        assert features.equal(model.model.multi_modal_projector(hidden[:, prefix:])[0])
    other = inputs_of(processor, image("wide", seed=1))
    assert not model(**given).logits.equal(model(**other).logits)


def test_layers_and_activation_are_options(parts: Parts, tmp_path: Path) -> None:
    made = compose(parts.tower("clip"), parts.text("llama"), tmp_path / "a",
                   vision_feature_layer=[-2, -1], projector_activation="relu")
    model, _ = loaded(tmp_path / "a")
    assert made.vision_feature_layer == [-2, -1] and "[-2, -1]" in made.table()
    projector = model.model.multi_modal_projector
    assert projector.linear_1.in_features == 64 and isinstance(projector.act, torch.nn.ReLU)
    assert made.parameters["projector"] == sum(p.numel() for p in projector.parameters())
    assert made.parameters["total"] == model.num_parameters()


def test_one_seed_gives_one_model(parts: Parts, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compose(parts.tower("vit"), parts.text("llama"), tmp_path / name, seed=seed)
    assert torch.random.get_rng_state().equal(wanted)
    a, b, c = (loaded(tmp_path / name)[0].state_dict() for name in "abc")
    assert all(a[key].equal(b[key]) for key in a)
    changed = {key for key in a if not a[key].equal(c[key])}
    fresh = {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}
    assert changed == fresh | {"model.vision_tower.pooler.dense.weight"}  # the classifier has none


def test_a_random_tower_keeps_nothing_of_the_checkpoint(parts: Parts, tmp_path: Path) -> None:
    compose(parts.tower("siglip"), parts.text("llama"), tmp_path / "a", random_tower=True)
    key = "model.vision_tower.embeddings.patch_embedding.weight"
    found, kept = (loaded(folder)[0].state_dict()[key]
                   for folder in (tmp_path / "a", parts.composed("siglip", "llama")))
    assert found.std() > 0 and not found.equal(kept)


# ----- towers of timm -----------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"qkv_bias": False}, {"img_size": (32, 48)}, {"depth": 1, "num_heads": 2},
    {"act_layer": "gelu_tanh"}, {"norm_layer": "layernorm"}])
def test_a_converted_vit_is_the_same_function(changes: dict[str, Any]) -> None:
    """In float64, where a wrong formula cannot hide behind rounding."""
    torch.manual_seed(0)
    model = VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3,
                                 "num_heads": 4, "num_classes": 0, **changes}).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert obstacles(model) == []
    config, state = vit_config(model), vit_state(model)
    vit = hf.ViTModel(config, add_pooling_layer=False).double().eval()
    vit.load_state_dict(state, strict=True)
    assert sum(map(torch.numel, state.values())) == sum(p.numel() for p in model.parameters())
    pixels = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels).last_hidden_state, model.forward_features(pixels),
                                   rtol=0, atol=1e-12)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"init_values": 0.1}, "parameters a ViTModel lacks (blocks.ls1.gamma, blocks.ls2.gamma)"),
    ({"qk_norm": True}, "blocks.attn.k_norm"),
    ({"reg_tokens": 2}, "3 tokens before the patches"),
    ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ({"global_pool": "avg"}, "no norm.bias, norm.weight"),
    ({"pre_norm": True}, "norm_pre"),
    ({"no_embed_class": True}, "no position embedding for the class token"),
    ({"act_layer": "relu"}, "its activation is ReLU"),
    ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "its blocks are ResPostBlock"),
    ({"patch_size": (8, 4)}, "patches are not square"),
])
def test_what_a_vit_model_cannot_express_is_named(changes: dict[str, Any], reason: str) -> None:
    model = VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2,
                                 "num_heads": 4, "num_classes": 0, **changes})
    assert reason in "; ".join(obstacles(model))


@pytest.mark.parametrize(("name", "architecture", "tokens"), [
    ("test_vit", "llava", 100), ("test_vit2", "perception_lm", 100),
    pytest.param("test_vit_relpos", "perception_lm", 100, marks=pytest.mark.skipif(
        not timm.is_model("test_vit_relpos"), reason="this timm does not have it yet")),
    ("test_resnet", "fast_vlm", 25),
    ("test_convnext", "fast_vlm", 25)])
def test_timm_towers_give_their_features(
    parts: Parts, name: str, architecture: str, tokens: int
) -> None:
    model, processor = loaded(parts.composed(f"timm:{name}"))
    assert model.config.model_type == architecture
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    images = processor.image_processor
    assert tuple(images.image_mean) == data["mean"] and tuple(images.image_std) == data["std"]
    assert images.resample == {"bicubic": 3, "bilinear": 2}[data["interpolation"]]
    given = inputs_of(processor, image("tall"))
    assert given["pixel_values"].shape[-2:] == data["input_size"][1:]
    assert int((given["input_ids"] == model.config.image_token_id).sum()) == tokens
    if architecture == "llava":
        return
    inner = model.model.vision_tower.timm_model
    with torch.no_grad():
        features = inner.forward_features(given["pixel_values"].view(1, 3, 160, 160))
        features = features.flatten(2).mT if features.ndim == 4 else \
            features[:, inner.num_prefix_tokens:]
        found = model.model.get_image_features(given["pixel_values"]).pooler_output
        assert found.equal(model.model.multi_modal_projector(features))


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet_ln"])
def test_images_enter_with_timms_own_mean_and_deviation(name: str) -> None:
    images = find_tower(f"timm:{name}", random=True).image_processor
    assert tuple(images.image_mean) == timm.data.IMAGENET_DEFAULT_MEAN
    assert tuple(images.image_std) == timm.data.IMAGENET_DEFAULT_STD


def test_pooling_leaves_a_quarter_of_the_tokens(parts: Parts, tmp_path: Path) -> None:
    made = compose("timm:test_vit", parts.text("qwen2"), tmp_path / "a", random_tower=True,
                   architecture="perception_lm", pooling_ratio=2)
    model, processor = loaded(tmp_path / "a")
    given = inputs_of(processor, image(), image("tall"))
    count = int((given["input_ids"] == model.config.image_token_id).sum())
    assert made.image_tokens == 25 and count == 50 and made.needs_timm
    assert model(**given).logits.isfinite().all()


def timm_file(folder: Path, name: str = "test_vit", **changes: Any) -> Path:
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=10).state_dict()
    state = {key: value for key, value in (state | changes).items() if value is not None}
    path = folder / f"{name}.safetensors"
    save_file(state, path)
    return path


def test_weights_of_a_file_and_of_the_hub_are_the_towers(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = timm_file(tmp_path)
    compose("timm:test_vit", parts.text("qwen2"), tmp_path / "a", tower_weights=file)
    asked = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    compose("timm:test_vit.r160_in1k", parts.text("qwen2"), tmp_path / "b")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    original = timm.create_model("test_vit", num_classes=0)
    torch.manual_seed(0)
    original.load_state_dict(timm.create_model("test_vit", num_classes=10).state_dict(),
                             strict=False)
    wanted = vit_state(original)
    for name in "ab":
        found = loaded(tmp_path / name)[0].model.vision_tower.state_dict()
        assert all(found[key].equal(tensor) for key, tensor in wanted.items())


# ----- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"cls_token": None}, "it lacks cls_token"),
    ({"blocks.0.extra": torch.zeros(1)}, "it has more: blocks.0.extra"),
    ({"cls_token": torch.zeros(1, 1, 3)}, r"cls_token has shape \(1, 1, 3\), not \(1, 1, 64\)"),
])
def test_a_file_of_other_weights_is_refused(
    parts: Parts, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = timm_file(tmp_path, **change)
    with pytest.raises(TaidError, match=message):
        compose("timm:test_vit", parts.text("qwen2"), tmp_path / "a", tower_weights=file)
    assert not list(tmp_path.glob("*a"))


def test_files_that_are_no_safetensors_are_refused(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"pickle")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    for name, message in (("x.bin", "no safetensors file"), ("x.safetensors", "cannot be read")):
        with pytest.raises(TaidError, match=message):
            compose("timm:test_vit", parts.text("qwen2"), tmp_path / "a",
                    tower_weights=tmp_path / name)


def test_without_a_hub_the_message_says_so(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"cannot load .timm/test_vit\.r160_in1k/model"):
        compose("timm:test_vit", parts.text("qwen2"), tmp_path / "a")


@pytest.mark.parametrize(("images", "message"), [
    (hf.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False), "different sizes"),
    (hf.SiglipImageProcessor(size={"height": 48, "width": 48}), "does not take the images"),
])
def test_image_processors_must_fit_the_tower(
    parts: Parts, tmp_path: Path, images: Any, message: str
) -> None:
    TOWERS["clip_vision"][0]().save_pretrained(tmp_path / "tower")
    with pytest.raises(TaidError, match="tower: cannot load"):
        find_tower(str(tmp_path / "tower"))  # no image processor at all
    images.save_pretrained(tmp_path / "tower")
    with pytest.raises(TaidError, match=message):
        find_tower(str(tmp_path / "tower"))


def test_towers_that_lose_something_on_disk_are_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that keeps a table outside its state dict: here, the order of the patches."""
    found = find_tower(parts.tower("vit"))

    def load(dtype: torch.dtype) -> Any:
        module = found.load(dtype)
        module.get_submodule("layers.0").register_forward_hook(lambda *call: call[-1].flip(1))
        return module

    monkeypatch.setattr("taid_vlm.students.compose.find_tower",
                        lambda *names, **options: dataclasses.replace(found, load=load))
    with pytest.raises(TaidError, match="gives other logits after it was loaded again"):
        compose(parts.tower("vit"), parts.text("llama"), tmp_path / "a")
    assert not list(tmp_path.iterdir())
