"""Benchmarks by name, and users' own by their file."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from taid_vlm.benchmarks import tasks
from taid_vlm.benchmarks.question import Benchmark
from taid_vlm.errors import RecipeError, TaidError, nearest

_YAML = (".yaml", ".yml")


def benchmark_names() -> list[str]:
    """The benchmarks that come with the package; nothing of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def find_benchmark(name_or_path: str) -> Benchmark:
    """A benchmark of the package by its name, or a user's own by its YAML file.

    Raises:
        TaidError: no such benchmark.
        RecipeError: a file that does not describe one.
    """
    names = benchmark_names()
    if name_or_path in names:
        module = importlib.import_module(f"{tasks.__name__}.{name_or_path}")
        benchmark: Benchmark = module.BENCHMARK
        return benchmark
    if Path(name_or_path).suffix.lower() in _YAML:
        from taid_vlm.benchmarks.user import load_benchmark

        own = load_benchmark(name_or_path)
        if own.name in names:
            raise RecipeError(f"{name_or_path}: '{own.name}' is a benchmark of the package; give "
                              "yours another name.")
        return own
    raise TaidError(f"no benchmark '{name_or_path}'.{nearest(name_or_path, names)} A benchmark of "
                    "your own is named by its file, for example charts.yaml.")
