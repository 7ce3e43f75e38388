"""Output folders that are whole or not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from taid_vlm.errors import TaidError
from taid_vlm.io.files import usual_mode


def new_folder(output_dir: str | Path) -> Path:
    """The folder, which must be new or empty; raises TaidError if something stands there."""
    output = Path(output_dir).expanduser()
    refuse_file_in_the_way(output)
    if output.exists() and any(output.iterdir()):
        raise TaidError(f"output_dir = '{output}' is not empty; choose another folder.")
    return output


@contextlib.contextmanager
def whole_or_absent(folder: Path, failed: str, main: bool = True) -> Iterator[Path]:
    """A hidden folder to write to, put in place of `folder` once all went well.

    Args:
        failed: what to say of an error that is not a TaidError; {} stands for the folder.
        main: whether this process makes the folder and puts it in place. The others have to wait
            until it has, at both ends.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        if main:
            for path in partial.rglob("*"):
                if path.is_file():  # safetensors writes its own for their owner alone
                    path.chmod(usual_mode() | path.stat().st_mode & 0o111)
            if folder.exists():
                folder.rmdir()  # it is empty
            partial.replace(folder)
    except TaidError:
        raise
    except Exception as error:  # disks fill up, transformers checks what it saves in its own ways
        raise TaidError(f"{failed.format(folder)}: {error}") from error
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_file_in_the_way(folder: Path) -> None:
    """Raise TaidError if an output folder cannot be made because a file stands there or above."""
    blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        raise TaidError(f"output_dir = '{folder}', but '{blocking}' is a file.")
