"""The model card that goes with a student: what is in results.json, without paths of a machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from taid_vlm.config.yaml import dump_yaml, parse_yaml

FIGURES = {"kl": "KL(teacher ‖ student), nats/token", "agreement": "top-1 agreement",
           "nll": "NLL of the data, nats/token", "token_accuracy": "token accuracy"}
LOADING = """\
```python
from transformers import {auto}, {processor}

model = {auto}.from_pretrained("PATH_OR_NAME")
processor = {processor}.from_pretrained("PATH_OR_NAME")
```
"""


def model_card(results: Mapping[str, Any], recipe_yaml: str) -> str:
    """Markdown with the hub's metadata; what is not known (a licence, say) is left out.

    Args:
        results: as in results.json.
        recipe_yaml: the recipe of the whole run.
    """
    recipe = parse_yaml(recipe_yaml)
    student, teachers = _model(recipe["student"]), _teachers(results)
    teacher = " and ".join(public_name(model["name"]) for model in teachers.values())
    sees = bool(results["models"]["student"]["parts"].get("tower", {}).get("parameters"))
    auto, processor = (("AutoModelForImageTextToText", "AutoProcessor") if sees else
                       ("AutoModelForCausalLM", "AutoTokenizer"))
    title = f"{public_name(student)}, distilled from {teacher}" if teacher else \
        f"{public_name(student)}, fine-tuned"
    return "\n".join([
        "---", dump_yaml(_metadata(results, student, sees)) + "---", "", f"# {title}", "",
        *_facts(results, recipe, student, teachers), "", *_table(results["eval"]), "## Loading", "",
        LOADING.format(auto=auto, processor=processor)])


def _paths(side: Any) -> Iterator[str]:
    """Of one source, or of a list of them; each may be a list of files."""
    for source in side if isinstance(side, list) else [side]:
        yield from [source["path"]] if isinstance(source["path"], str) else source["path"]


def public_name(name: str) -> str:
    """A name on the hub as it is; of a path only the last part."""
    return name if _on_hub(name) else Path(name).name


def _on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _model(spec: Any) -> str:
    if spec is None:
        return ""
    return str(spec["server"]["model"] if spec.get("server") else spec["model_name_or_path"])


def _teachers(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What they are called, with their models (of a cached one, too)."""
    several = {f"Teacher {name}": one["model"] for name, one in results.get(
        "teachers", {}).items()}
    single = results["models"].get("teacher")
    return several if single is None else {"Teacher": single}


def _metadata(results: Mapping[str, Any], student: str, sees: bool) -> dict[str, Any]:
    adapter = results["models"]["student"].get("saved") == "adapter"  # and not merged
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        **({"base_model": student} if _on_hub(student) else {}),
        "tags": ["distillation", "taid-vlm"],
    }


def _facts(
    results: Mapping[str, Any], recipe: Mapping[str, Any], student: str,
    teachers: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    train, held_out = results["train"], results["data"]["eval"]
    steps = [(stage["name"], stage["steps"]) for stage in results["stages"]]
    said = ", after " + ", ".join(f"{n} of stage {name}" for name, n in steps) if steps else ""
    yield f"- Base model: {public_name(student)} ({results['models']['student']['model_type']})"
    for who, model in teachers.items():
        yield f"- {who}: {public_name(model['name'])} ({model['model_type']})"
    yield f"- Objective: `{results['objective']}`"
    sides = [recipe["data"], *(stage.get("data", {}) for stage in recipe.get("stages", ()))]
    paths = dict.fromkeys(public_name(path) for side in sides if "train" in side
                          for path in _paths(side["train"]))
    yield f"- Training data: {', '.join(paths)}"
    if held_out:
        yield f"- Held-out data: {public_name(held_out['path'])} ({held_out['records']:,} records)"
    yield (f"- Training: {train['steps']:,} steps{said}, {train['answer_tokens']:,} tokens learned "
           f"from, seed {results['seed']}")
    yield f"- Recipe hash: {results['recipe_hash']}"
    yield "- Versions: " + ", ".join(f"{k} {v}" for k, v in results["versions"].items())


def _table(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Held-out figures before and after, with standard errors."""
    before, after = evaluation["before"], evaluation["after"]
    if not before or not after:
        return
    yield from ("## Held-out figures", "",
                f"Means per token ± standard error, over {after['n_tokens']:,} tokens of "
                f"{after['n_answers']:,} answers; one run with one seed.", "",
                "| figure | before | after |", "| --- | --- | --- |")
    for key, name in FIGURES.items():
        if key in after:
            cells = (f"{side[key]:.4f} ± {side[f'{key}_stderr'] or 0:.4f}"
                     for side in (before, after))
            yield f"| {name} | {' | '.join(cells)} |"
    yield ""
