"""Secrets are never written or shown, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from taid_vlm.config.recipe import load_recipe, parse_recipe
from taid_vlm.config.secrets import HIDDEN, redact, redact_text
from taid_vlm.errors import RecipeError

HUB, OPEN = "hf_" + "aB3" * 11, "sk-" + "proj-1a2B3c" * 3
TREE: dict[str, Any] = {"student": "s", "teacher": "t", "data": {"train": "x.jsonl"},
                        "output_dir": "o"}


@pytest.mark.parametrize("value", [
    {"token": "plain words"}, {"init_kwargs": {"token": HUB}}, {"hub_token": "abc"},
    {"use_auth_token": "abc"}, {"api_key": "abc"}, {"OPENAI_API_KEY": "abc"}, {"password": "abc"},
    {"client_secret": "abc"}, {"Authorization": "Bearer abc"}, {"aws_secret_access_key": "abc"},
    [{"headers": ["x", f"Bearer {HUB}"]}], {"path": f"a {OPEN} b"},
    "https://me:abc@host/data.jsonl", "https://abc@host:8000/v1", "s3://id:abc@bucket/x",
    "https://host/data?token=abc", "https://host/x?a=b&X-Amz-Signature=abc&c=d",
])
def test_a_secret_is_taken_out(value: Any) -> None:
    shown = str(redact(value))
    assert HIDDEN in shown
    assert not any(secret in shown.replace("abc_", "") for secret in ("abc", HUB, OPEN, "plain"))
    assert redact(redact(value)) == redact(value)


@pytest.mark.parametrize("value", [
    {"token": True, "max_new_tokens": 5, "pad_token": "<pad>", "image_token": "<image>"},
    {"token_weights": "visual_advantage", "loss_per_token": 0.3, "tokens": "all", "secret": ""},
    {"path": "hf_internal/tiny", "name": "task-learn-2-of-some-things", "x": (1, [None, "a@b.de"])},
    "https://huggingface.co/datasets/a?split=test&page=2", "git@host:a/b", "data/token=3/x.parquet",
    "What is a? b&c", {"key": "value", 3: {"monkey": "x"}},
])
def test_nothing_else_is(value: Any) -> None:
    assert redact(value) == value
    assert type(redact(value)) is type(value)


@pytest.mark.parametrize("text", [
    "student.init_kwargs = {'token': 'abc', 'x': 1}", "override 'student.init_kwargs.token=abc'",
    "train.hub_token = 'abc', but", "load(token=abc)", "Authorization: Bearer abc",
    '{"api_key": "abc"}', "GET https://me:abc@host/x failed", "train={hub_token: abc}",
])
def test_prose_tells_none(text: str) -> None:
    assert "abc" not in redact_text(text) and HIDDEN in redact_text(text)


@pytest.mark.parametrize("text", [
    "0.31 nats per answer token: 3", "the token 'x' of the teacher", "{'kl': 0.3, 'loss': 2}",
    "train.max_new_tokens = 3", "pad_token = '<pad>'", "a token is a number of bytes: 3",
])
def test_prose_stays(text: str) -> None:
    assert redact_text(text) == text


def test_a_recipe_is_written_without_its_secrets(tmp_path: Any) -> None:
    tree = {**TREE, "student": {"model_name_or_path": "s", "init_kwargs": {"token": HUB, "a": 1}},
            "data": {"train": "https://me:pw1@host/x?token=pw2"}}
    recipe = parse_recipe(tree)
    assert recipe.student.init_kwargs["token"] == HUB
    for written in (recipe.to_yaml(), recipe.resolved().to_yaml()):
        assert not any(secret in written for secret in (HUB, "pw1", "pw2"))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    with pytest.raises(RecipeError, match=r"student\.init_kwargs\.token was a secret") as caught:
        load_recipe(tmp_path / "again.yaml")
    assert "student.init_kwargs.token=..." in str(caught.value)
    again = load_recipe(tmp_path / "again.yaml", [f"student.init_kwargs.token={HUB}",
                                                  "data.train=https://me:pw3@host/x?token=pw4"])
    assert again.digest() == recipe.digest()


def test_a_refusal_tells_none() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**TREE, "student": {"model_name_or_path": "s", "dtype": HUB}})
    assert HUB not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**TREE, "train": {"hub_token": ["open sesame"]}})
    assert "sesame" not in str(caught.value)


def test_arguments_are_kept_without_secrets(tmp_path: Any) -> None:
    from taid_vlm import DistillationConfig

    plain = DistillationConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"dtype": "auto"})
    assert plain.without_secrets() is plain
    args = DistillationConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"token": HUB})
    assert HUB not in str(args.without_secrets().to_dict())
    assert args.model_init_kwargs == {"token": HUB}
