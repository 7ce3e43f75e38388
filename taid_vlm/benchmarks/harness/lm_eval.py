"""lm-eval carried out on one of this package's models, with local data and the same results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import gather_object

from taid_vlm.adapters.template import content_form, has_chat_template
from taid_vlm.benchmarks.evaluate import processes
from taid_vlm.benchmarks.harness.converted import (
    average,
    entry_of,
    figures_of,
    rows_of,
    too_long,
)
from taid_vlm.benchmarks.harness.local_data import TaskChange, source_of, split_files, task_yaml
from taid_vlm.benchmarks.harness.suites import SUITES, changes_of, expand
from taid_vlm.benchmarks.harness.unfinished import Unfinished
from taid_vlm.benchmarks.scoring import summary
from taid_vlm.benchmarks.store import FOLDER
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, at_least, one_of
from taid_vlm.io.files import write_json, write_text
from taid_vlm.io.folders import new_folder, whole_or_absent
from taid_vlm.io.hashing import file_sha256
from taid_vlm.io.jsonl import dump_lines
from taid_vlm.io.quiet import quiet
from taid_vlm.models.loading import (
    load_config,
    load_model,
    load_processor,
    sees_images,
    weights_hash,
)

logger = logging.getLogger(__name__)
ROLE = "model"
TASK_FOLDER = "lm_eval_tasks"  # for `lm_eval run --include_path`
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
DEFAULT_SEED = 1234  # lm-eval's own, of the choice of examples


@dataclass(frozen=True)
class Options:
    """How tasks are run.

    Args:
        num_fewshot: solved examples; None leaves the task's own. A suite has its own.
        limit: only the first so many questions of every task.
        batch_size: requests at a time.
        seed: of the choice of examples and of sampling; None takes lm-eval's own seeds.
        apply_chat_template: put every prompt in the model's chat template, examples as turns.
        device: None takes an accelerator where there is one.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int | None = None
    apply_chat_template: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        at_least("num_fewshot", self.num_fewshot, 0)
        at_least("limit", self.limit, 1)
        at_least("batch_size", self.batch_size, 1)


def run_lm_eval(
    model: ModelSpec | str | Path, tasks: Sequence[str], output_dir: str | Path, *,
    data: Mapping[str, str | Path] | None = None, name: str | None = None, **options: Any,
) -> dict[str, Any]:
    """Measure a model with lm-eval; of several processes each takes its share of the tasks. The
    same call goes on after an interruption: tasks that were finished are not asked again.

    Args:
        tasks: lm-eval's tasks, groups and tags, and this package's suites ("openllm").
        output_dir: new or empty; gets results.json, answers/ and the task files that were used.
        data: task, group or suite -> file or folder with its data in the hub's columns; what is
            not named is read from the hub. A suite's folder has a folder for every task.
        name: what reports call the model; the output folder's name if not given.
        options: fields of `Options`.

    Returns:
        What was written to results.json.

    Raises:
        TaidError: lm-eval is not installed; a name, an option or data that does not fit, before
            any weights are loaded. Nothing is left half-written.
    """
    chosen, output, state = _options(options), new_folder(output_dir), processes()
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model_name_or_path=str(model))
    index = _packaged_tasks()
    requests = expand(tasks, data or {}, chosen.num_fewshot)
    changes = [change for request in requests for change in changes_of(request, index)]
    files = {change.task: task_yaml(change) for change in changes if change.any}
    load_config(spec, ROLE)
    started = time.perf_counter()
    # lm-eval warns of what is meant here: changed tasks, a model that is loaded already
    with quiet("lm_eval"), _no_extras():
        loaded = _load([request.name for request in requests], index, files, changes)
        lm = _language_model(spec, chosen)
        shares = list(loaded.items())[state.process_index::state.num_processes]
        kept = Unfinished(output, _identity(lm, chosen))
        own = [(task, *kept.once(task, _data_of(item, files, changes),
                                 partial(_measured, task, item, lm, changes, chosen)))
               for task, item in shares]
    measured = {task: (entry, rows) for task, entry, rows in gather_object(own)}
    entries = {task: measured[task][0] for task in loaded}
    answers = {task: measured[task][1] for task in loaded}
    results = summary(
        name or output.name, _described(spec, lm), entries,
        DEFAULT_SEED if chosen.seed is None else chosen.seed, started, state.num_processes,
        suites={suite: average(suite, entries) for suite in tasks if suite in SUITES})
    results["versions"]["lm-eval"] = version("lm-eval")
    if state.is_main_process:
        _write(results, answers, files, output)
        kept.discard()
    state.wait_for_everyone()
    return results


def _options(given: Mapping[str, Any]) -> Options:
    for name in given:
        one_of("lm-eval: option", name, [field.name for field in dataclasses.fields(Options)])
    return Options(**given)


# ----- lm-eval's tasks ----------------------------------------------------------------------


@functools.cache
def _packaged_tasks() -> dict[str, Any]:
    """lm-eval's index of its tasks; reading its 14,000 files takes ten seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise TaidError('lm-eval is not installed: pip install "taid-vlm[lm-eval]".') from None
    return dict(TaskManager().task_index)


def _load(names: Sequence[str], index: Mapping[str, Any], files: Mapping[str, str],
          changes: Sequence[TaskChange]) -> dict[str, Any]:
    """Name -> lm-eval's task, or group where it has a figure of its own; data is read here.

    Args:
        index: of the packaged tasks; files: those that take the place of some, name -> YAML.
    """
    from lm_eval.tasks import TaskManager

    loaded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            write_text(text, Path(folder) / f"{name}.yaml")
        manager = TaskManager(include_path=folder, include_defaults=False)
        manager.task_index.update({**index, **manager.task_index})
        for name in names:
            try:
                items = manager.load([name])
            except Exception as error:  # of datasets, of templates, of the task's own code
                raise _unread(name, error, changes) from error
            group = items["groups"].get(name)
            whole = group is not None and group.has_aggregation
            loaded |= {name: group} if whole else items["tasks"]
    return loaded


def _unread(name: str, error: Exception, changes: Sequence[TaskChange]) -> TaidError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    hub = next((str(c.config.get("dataset_path")) for c in changes if c.path is None), None)
    return TaidError(
        f"lm-eval could not read '{name}': {type(error).__name__}: {reason}.",
        mend="Local data must have the columns it has on the hub." if hub is None else
        f"Its data is on the hub ('{hub}'); without a connection, name a local copy: "
        f"{name}=FOLDER.")


# ----- the model ----------------------------------------------------------------------------


def _language_model(spec: ModelSpec, options: Options) -> Any:
    """The model as lm-eval's `hf` sees it; a VLM is asked without images."""
    from lm_eval.models.huggingface import HFLM

    config, processor = load_config(spec, ROLE), load_processor(spec, ROLE)
    tokenizer = getattr(processor, "tokenizer", processor)
    if options.apply_chat_template and not has_chat_template(processor):
        raise TaidError(f"apply_chat_template: '{spec.model_name_or_path}' has no chat template.")
    model = load_model(spec, ROLE).to(options.device or processes().device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    probe = "a b"
    if options.apply_chat_template:
        tokenizer.apply_chat_template = functools.partial(
            tokenizer.apply_chat_template, **spec.chat_template_kwargs)
        tokenizer.chat_template = getattr(processor, "chat_template", None)
        form = content_form(processor, "parts" if sees_images(config) else "string", ROLE)
        if form == "parts":
            lm.apply_chat_template = functools.partial(_templated, lm.apply_chat_template)
        probe = lm.apply_chat_template([{"role": "user", "content": probe}])
    check_ends(probe, [lm.tok_encode(probe), lm.tok_batch_encode([probe])[0][0].tolist()],
               tokenizer)
    return lm


def _templated(render: Any, chat_history: list[dict[str, str]], *args: Any, **kwargs: Any) -> str:
    """For templates that drop plain strings: every content as typed parts."""
    parts = [{**said, "content": [{"type": "text", "text": said["content"]}]}
             for said in chat_history]
    return render(parts, *args, **kwargs)


def check_ends(text: str, encoded: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Raise TaidError where lm-eval would ask with two BOS, or behind an EOS.

    A second BOS (the template's and the tokenizer's) lowers figures without a word. Behind an EOS
    that the tokenizer adds, lm-eval scores the wrong tokens.
    """
    for ids in encoded:
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise TaidError("lm-eval would put two BOS tokens before every prompt: the chat "
                            "template prints one and the tokenizer adds one.")
        if ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            raise TaidError("the tokenizer puts an EOS behind every text, so lm-eval would score "
                            "the wrong tokens; save it with add_eos_token = false.")


@contextlib.contextmanager
def _no_extras() -> Iterator[None]:
    """Every file read would draw a bar, lm-eval asks the machine's tools for half a minute what
    they are, and it keeps the results of a process to itself that a launcher has numbered."""
    from lm_eval import evaluator

    bars, tools = datasets.is_progress_bar_enabled(), evaluator.add_env_info
    rank = os.environ.pop("LOCAL_RANK", None)
    datasets.disable_progress_bars()
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = tools
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
        if bars:
            datasets.enable_progress_bars()


# ----- results ------------------------------------------------------------------------------


def _identity(lm: Any, options: Options) -> dict[str, Any]:
    """What the figures of every task depend on."""
    return {"lm-eval": version("lm-eval"), "weights": weights_hash(lm.model),
            "dtype": str(lm.model.dtype), "tokenizer": lm.tokenizer.backend_tokenizer.to_str(),
            "chat_template": lm.tokenizer.chat_template, **dataclasses.asdict(options)}


def _data_of(item: Any, files: Mapping[str, str], changes: Sequence[TaskChange]
             ) -> dict[str, Any]:
    """The task files that were written for a task or group, and the local data that they name."""
    return {task.task_name: [files.get(task.task_name), [
        file_sha256(*paths).hex() for change in changes
        if change.task == task.task_name and change.path is not None
        for paths in split_files(change).values()]] for task in _inside(item)}


def _inside(item: Any) -> list[Any]:
    return list(item.get_all_tasks()) if hasattr(item, "get_all_tasks") else [item]


def _measured(name: str, item: Any, lm: Any, changes: Sequence[TaskChange], options: Options
              ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What results.json says of a task or group, and its rows of answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    started, chat = time.perf_counter(), options.apply_chat_template
    seeds = {} if options.seed is None else dict.fromkeys(SEEDS, options.seed)
    raw = simple_evaluate(lm, tasks=[item], task_manager=TaskManager(include_defaults=False),
                          limit=options.limit, apply_chat_template=chat,
                          fewshot_as_multiturn=chat, **seeds)
    inside = _inside(item)
    names = [task.task_name for task in inside]
    headline = next(iter(figures_of(raw["results"][name], name)), "")
    rows = [row for task in inside for row in rows_of(
        task.task_name, raw["samples"][task.task_name], headline,
        task.doc_to_choice if task.OUTPUT_TYPE == "multiple_choice" else None,
        task.doc_to_text if task.multiple_input else None)]
    samples = [sample for one in names for sample in raw["samples"][one]]
    cut = too_long(samples, lm.tok_encode, lm.max_length, lm.max_gen_toks)
    if cut:
        logger.warning("%s: %d of %d prompts are longer than the model's %d tokens; lm-eval cut "
                       "them at the start.", name, cut, len(rows), lm.max_length)
    shots = {raw["n-shot"].get(one) for one in names}
    answering = {
        "method": "generate" if inside[0].OUTPUT_TYPE == "generate_until" else "likelihood",
        "num_fewshot": shots.pop() if len(shots) == 1 else sorted(shots, key=str),
        "limit": options.limit, "batch_size": options.batch_size, "apply_chat_template": chat,
        "prompts_cut": cut, "generation": inside[0].config.generation_kwargs}
    by_task = {} if names == [name] else {
        "task": {one: figures_of(raw["results"][one], one) for one in names}}
    source = source_of([change for change in changes if change.task in names])
    return entry_of(name, raw, rows, rule=f"lm-eval {version('lm-eval')}", source=source,
                    answering=answering, by_tag=by_task,
                    seconds=time.perf_counter() - started), rows


def _described(spec: ModelSpec, lm: Any) -> dict[str, Any]:
    model = lm.model
    return {"name": spec.model_name_or_path, "revision": spec.revision,
            "model_type": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch.")}


def _write(results: dict[str, Any], answers: Mapping[str, Sequence[Any]],
           files: Mapping[str, str], output: Path) -> None:
    with whole_or_absent(output, "the evaluation could not be written to '{}'") as folder:
        for name, rows in answers.items():
            write_text(dump_lines(rows), folder / FOLDER / f"{name}.jsonl")
        for name, text in files.items():
            write_text(text, folder / TASK_FOLDER / f"{name}.yaml")
        write_json(results, folder / "results.json")
