"""Folders that say of themselves what they are, and whether they are as they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.io.files import write_json
from taid_vlm.io.hashing import file_sha256

NAME = "taid_vlm.json"


def seal(folder: Path, facts: Mapping[str, Any], without: Sequence[str] = ()) -> None:
    """Write the folder's manifest, last of all: facts, and the hash of every file in it but those
    that are named `without`."""
    files = {path.relative_to(folder).as_posix(): file_sha256(path).hex()
             for path in sorted(folder.rglob("*"))
             if path.is_file() and path.name not in (NAME, *without)}
    write_json({**facts, "files": files}, folder / NAME)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none: this program has not written the folder, or not to its end."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return manifest if isinstance(files, dict) else None


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None where it is whole."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no {NAME}"
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path).hex() != digest:
            return f"{name} is not as it was written"
    return None
