"""Tokens, passwords and keys, which must not reach a disk or a screen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
_NAMES = (r"(?:(?:hf|hub|auth|access|api|bearer|session|refresh|security)[_-]?token|api[_-]?key|"
          r"(?:access|private|secret)[_-]?key|password|passwd|secret|authorization|credentials?)")
# a key of a mapping; no `pad_token`, and no number of tokens
_KEY = re.compile(rf"(?:^|[\W_]){_NAMES}$|^token$", re.IGNORECASE)
_VALUES = re.compile(
    r"(?<![\w/+-])(?:hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|"
    r"github_pat_\w{20,}|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16}(?![\w/+])|AIza[\w-]{30,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})")
_USER = re.compile(r"([a-z][a-z0-9+.-]*:/+)[^/?#@\s'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password|signature|credential|sig)=)"
                    r"[^&#\s'\"<>]+", re.IGNORECASE)
# in prose, a log or a traceback: token=x, 'token': 'x', Authorization: Bearer x
_ANY = rf"(?<![a-z])(?:{_NAMES}|(?<![a-z]_)token)"
_PAIR = re.compile(
    rf"({_ANY}(?:\s*=\s*|['\"]\s*[:=]\s*)[\[(]*(?:bearer )?|[{{,]\s*(?:\w+_)?{_ANY}:\s*|bearer )"
    rf"(?!['\"]?<redacted>)('[^']+'|\"[^\"]+\"|[^\s'\",;)}}\]]+)", re.IGNORECASE)


def redact(value: Any) -> Any:
    """The value with `HIDDEN` for every secret in it; nothing else changes.

    A secret is a text under a key such as token, password, api_key, secret or authorization, a text
    that looks like one (hf_..., sk-..., ...), and what a URL carries before its host or as a token
    of its query.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if isinstance(inner, str) and inner and _KEY.search(str(key))
                else redact(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redact(inner) for inner in value)
    return _shown(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """The same for a message, a log line or a traceback, in which keys stand as text, too."""
    return _PAIR.sub(rf"\1{HIDDEN}", _shown(text))


def holds_hidden(value: Any) -> str | None:
    """Path of the first value that `redact` has taken a secret out of; None if there is none."""
    if isinstance(value, str):
        return "" if HIDDEN in value else None
    items = value.items() if isinstance(value, Mapping) else \
        enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        if (path := holds_hidden(inner)) is not None:
            return f"{key}.{path}" if path else str(key)
    return None


def _shown(text: str) -> str:
    if ":/" in text or "?" in text or "&" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
    return _VALUES.sub(HIDDEN, text)
