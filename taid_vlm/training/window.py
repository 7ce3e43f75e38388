"""Means per token (or image) between two log lines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping


class Window:
    """Sums since the last log line, turned into means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()

    def add(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.sums[name] += value

    def take(self) -> dict[str, float]:
        """Means since the last call: what has a count of its own ("tokens/<name>") over that, the
        losses on tokens over what all of them weigh together ("tokens/loss")."""
        now, tokens = time.perf_counter(), self.sums.pop("tokens", 0.0)
        shown = {name: self.sums.pop(name) for name in [*self.sums] if name.startswith("tokens/")}
        weight = shown.get("tokens/loss", tokens)
        logs = {"answer_tokens_per_second": tokens / (now - self.started)}
        for name, total in self.sums.items():
            count = shown.get(f"tokens/{name}", weight if name.startswith("loss/") else tokens)
            if count:
                logs[name] = total / count
        self.sums.clear()
        self.started = now
        return logs
