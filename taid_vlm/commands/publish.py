"""`taid-vlm publish`: a finished run's student for others, in a folder or on the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from taid_vlm.commands.options import Options, option, positional
from taid_vlm.errors import TaidError

if TYPE_CHECKING:
    from taid_vlm.runs.results import Results


class PublishOptions(Options):
    run: Path = positional("folder of a finished run", "RUN")
    output: Path | None = option("new folder to write to", "DIR")
    repo: str | None = option("repository on the hub to push to", "OWNER/NAME")
    private: bool = option("a repository that is made here is private", default=False)
    compare: Path | None = option("page that `taid-vlm compare --html` wrote", "FILE")
    license: str | None = option(
        "the student's, as the hub names it (apache-2.0); left out, the card names none", "NAME")
    merge: bool = option("write a LoRA student merged into its base model", default=False)


def run(options: PublishOptions) -> None:
    if (options.output is None) == (options.repo is None):
        raise TaidError("where to? Give either --output DIR or --repo OWNER/NAME.")
    if options.private and options.repo is None:
        raise TaidError("--private has no effect without --repo.")

    from taid_vlm.io.folders import new_folder, whole_or_absent
    from taid_vlm.runs.publish import OF_COMMAND, finished_student, open_repository, push_student
    from taid_vlm.runs.results import read_results

    student = finished_student(options.run)
    results = read_results(options.run / "results.json")
    if options.output is not None:
        output = new_folder(options.output)
        with whole_or_absent(output, "'{}' could not be written") as partial:
            _fill(partial, student, results, options)
        print("\n".join(f"{file.stat().st_size:>14,}  {file}" for file in sorted(output.iterdir())))
    elif options.repo is not None:
        with tempfile.TemporaryDirectory() as name:
            _fill(Path(name), student, results, options)
            push = open_repository(options.repo, options.private or None, keys=OF_COMMAND)
            push_student(push, Path(name), "The same command tries again.")


def _fill(folder: Path, student: Path, results: Results, options: PublishOptions) -> None:
    from taid_vlm.models.lora import CONFIG
    from taid_vlm.report.published import CARD, add_pages
    from taid_vlm.runs.publish import copy_student
    from taid_vlm.students.merge import merge

    base = Path(results.models["student"].name).expanduser()
    adapter = (student / CONFIG).is_file()
    if options.merge and not adapter:
        raise TaidError(f"--merge has no effect: '{student}' holds all weights.")
    if adapter and base.exists() and not options.merge:
        raise TaidError(f"'{student}' is an adapter of '{base}', a folder of this machine that "
                        "nobody else has: give --merge to publish it merged into that.")
    if options.merge:
        merge(student, folder)
        card = (student / CARD).read_text(encoding="utf-8")
        (folder / CARD).write_text(
            card.replace("library_name: peft", "library_name: transformers"), encoding="utf-8")
    else:
        copy_student(student, folder)
    add_pages(folder, results, options.compare, options.license)
