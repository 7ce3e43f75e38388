"""What `gpu_check.py` has to say of its parts: a line of figures each, and the table.

Nothing here imports torch: the driver stays small and outlives what it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(outcomes: Sequence[Row], rehearsal: bool) -> str:
    """The table of all parts, with the machine where a part has told it."""
    where = next((row["conditions"] for outcome in outcomes for row in _rows(outcome["results"])
                  if "conditions" in row), None)
    lines = ["# GPU check" + (", rehearsed on a CPU: no figure here is of worth" * rehearsal), ""]
    if where is not None:
        versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
        lines += [f"{where['device']}; {versions}.", ""]
    lines += ["| part | what | status | seconds (of) | figures |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        reason = f" ({outcome['reason']})" if outcome["reason"] else ""
        spent = f"{outcome['seconds']:.0f} ({outcome['bound']:.0f})" if outcome["bound"] else ""
        cells = (outcome["name"], outcome["about"], outcome["status"] + reason, spent,
                 outcome["figures"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def own_error(results: Sequence[Any]) -> str:
    """Of our own implementation, where a benchmark has it as a row; "" if there is none."""
    return next((row["error"] for row in _rows(results)
                 if row.get("implementation") == "ours" and "error" in row), "")


def _rows(results: Sequence[Any]) -> list[Row]:
    """Of benchmarks, whose results are lists of rows."""
    return [row for result in results if isinstance(result, list) for row in result]


def _kernels(results: Sequence[Any]) -> str:
    rows = [row for row in _rows(results) if "gradient_error" in row]
    worst: dict[str, float] = {}
    for row in rows:
        key = f"{row['body']} {row['dtype']}"
        worst[key] = max(worst.get(key, 0.0), row["gradient_error"])
    return "gradient errors: " + ", ".join(f"{key} {off:.1e}" for key, off in worst.items())


def _objective(results: Sequence[Any]) -> str:
    ratios: dict[str, list[float]] = {}
    for row in _rows(results):
        if row.get("ratio_to_floor") is not None:
            ratios.setdefault(row["implementation"], []).append(row["ratio_to_floor"])
    return "time over the floor's: " + ", ".join(
        f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in ratios.items())


def _step(results: Sequence[Any]) -> str:
    return ", ".join(
        f"{row['implementation']} {row['error']}" if "error" in row else
        f"{row['implementation']} {row['seconds']:.3f} s, {_gigabytes(row['peak_memory_bytes'])}"
        + (f" ({row['differs']})" if row["differs"] else "")
        for row in _rows(results))


def _packing(results: Sequence[Any]) -> str:
    return "; ".join(
        f"{rows[0]['attention']}: " + ", ".join(
            f"{row['arm']} x {row['ratio']:.2f} (gradient off by {row['gradient']:.0e})"
            for row in rows[1:])
        for rows in results)


def _plan(results: Sequence[Any]) -> str:
    """Tensors that are planned beside what the allocator gave out at most."""
    plan = results[0]
    tensors = plan["peak"] - sum(part["at_peak"] for part in plan["stages"][0]["components"]
                                 if part["name"] == "framework")
    said = f"planned {_gigabytes(plan['peak'])}, {_gigabytes(tensors)} of it tensors"
    if len(results) < 2:
        return said
    peak = results[1]["memory"].get("peak_device_bytes")
    if peak is None:
        return f"{said}; no device to measure"
    return f"{said}; measured {_gigabytes(peak)}, {peak / tensors:.2f} of them; {_run(results[1:])}"


def _run(results: Sequence[Any]) -> str:
    """A run of `taid-vlm distill`: its last loss, its time, its memory."""
    result, = results
    losses = [row["loss"] for row in result["history"] if "loss" in row]
    peak = result["memory"].get("peak_device_bytes")
    said = [f"loss {losses[-1]:.4f}",
            f"{result['train']['seconds'] / result['train']['steps']:.3f} s a step"]
    return ", ".join(said + ([] if peak is None else [_gigabytes(peak)]))


def _words(results: Sequence[Any]) -> str:
    before, after = (results[0]["eval"][when]["kl"] for when in ("before", "after"))
    return f"held-out KL {before:.4f} to {after:.4f}; {_run(results)}"


def _gigabytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e9:.2f} GB"


FIGURES: dict[str, Callable[[Sequence[Any]], str]] = {
    "kernels": _kernels, "objective": _objective, "step": _step, "step-lora": _step,
    "plan": _plan, "fsdp": _run, "packing": _packing, "words": _words,
    **{f"teacher-{kind}": _run for kind in ("4bit", "8bit", "fp8")},
}
