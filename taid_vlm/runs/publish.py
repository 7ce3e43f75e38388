"""The student on the hub: checked before any weights are loaded, pushed once, when all is done; and
what of a finished run may be published."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from safetensors import SafetensorError, safe_open

from taid_vlm import __version__
from taid_vlm.config.recipe import Recipe
from taid_vlm.config.secrets import HIDDEN, redact_text
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.models.loading import is_finite
from taid_vlm.runs.folders import RESULTS, STUDENT

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# of an earlier student in the repository, where this one has no such file: left beside it, they
# would be loaded with it or in its place
STALE = ("*.safetensors*", "*config.json")
LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or write train.hub_token."


@dataclass(frozen=True)
class Push:
    """Where a student goes.

    repository: OWNER/NAME, which is there. private: of one that is yet to be made.
    """

    repository: str
    private: bool | None
    token: str = field(repr=False)

    def command(self, folder: Path, message: str) -> str:
        """What pushes the student by hand."""
        words = ["hf", "upload", self.repository, str(folder), ".", "--commit-message", message]
        words += [word for pattern in STALE for word in ("--delete", pattern)]
        return shlex.join([*words, "--private"] if self.private else words)


def prepare_push(recipe: Recipe, saves_adapter: bool = False) -> Push | None:
    """Make what `train.push_to_hub` needs sure: token, write access, and the repository itself.

    The first process asks the hub, and the others hear of it: all of them call this.

    Args:
        recipe: of the run, or of its last stage.
        saves_adapter: whether the student's folder will hold an adapter without its base model.

    Returns:
        Where to push to; None if the recipe does not ask for it, and in other processes.

    Raises:
        TaidError: whatever the hub would refuse at the end.
    """
    if not recipe.train.get("push_to_hub"):
        return None
    if saves_adapter and Path(recipe.student.model_name_or_path).expanduser().exists():
        raise RecipeError(
            "train.push_to_hub: the student is an adapter, which would name "
            f"'{recipe.student.model_name_or_path}' as its base model, a folder of this machine. "
            "Name the base model as it is on the hub, or take push_to_hub out, and push what "
            "`taid-vlm merge` makes of the student.")
    push, failure = None, [""]
    train = recipe.train
    if PartialState().is_main_process:
        try:
            push = open_repository(
                train.get("hub_model_id") or Path(recipe.output_dir).expanduser().resolve().name,
                train.get("hub_private_repo"), train.get("hub_token"))
        except TaidError as error:
            failure = [str(error)]
    broadcast_object_list(failure)
    if failure[0]:
        raise RecipeError(failure[0])
    return push


@dataclass(frozen=True)
class Keys:
    """How messages call what asks for a push, and what names its repository."""

    push: str = "train.push_to_hub"
    name: str = "train.hub_model_id"
    without: str = "take push_to_hub out and push the student later with `hf upload`"
    log_in: str = LOG_IN


OF_RECIPE = Keys()
OF_COMMAND = Keys("--repo", "--repo", "write to a folder with --output",
                  "Log in with `hf auth login`, or set HF_TOKEN.")


def open_repository(
    name: str, private: bool | None, token: str | None = None, keys: Keys = OF_RECIPE
) -> Push:
    """Make sure of a repository on the hub that can be written to, and make it if it is not there.

    Raises:
        RecipeError: whatever the hub would refuse at the end.
    """
    token = token or get_token()
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(f"{keys.name} = {name!r} is no name of a repository: {error} "
                          "Write OWNER/NAME.") from None
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{keys.push}: the hub is switched off (HF_HUB_OFFLINE or "
                          f"TRANSFORMERS_OFFLINE is set). Unset it, or {keys.without}.")
    if not token:
        raise RecipeError(f"{keys.push}: there is no token for the hub. {keys.log_in}")
    api = HfApi(token=token)

    def ask(refused: str, mend: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # which ones, depends on the library under huggingface_hub
            if getattr(error, "response", None) is None:
                refused = f"the hub '{constants.ENDPOINT}' cannot be asked"
                mend = f"Connect this machine, or {keys.without}."
            raise RecipeError(f"{keys.push}: {refused}: {_reason(error, token)} {mend}") from None

    user: Any = ask("the token is not accepted", keys.log_in, api.whoami)
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise RecipeError(f"{keys.push}: the token can only read. Make one that can write at "
                          f"{api.endpoint}/settings/tokens, and use that. {keys.log_in}")
    push = Push(name if "/" in name else f"{user['name']}/{name}", private, token)
    refused = f"'{push.repository}' cannot be written to"
    mend = f"Use a token that can write there, or another {keys.name}."
    ask(refused, mend, api.create_repo, push.repository, private=private, exist_ok=True)
    # `create_repo` is content with one that is there; this asks what a commit would, and writes
    # nothing
    ask(refused, mend, api.preupload_lfs_files, push.repository,
        [CommitOperationAdd("README.md", b"-\n")])
    return push


def finished_student(run: Path) -> Path:
    """The student's folder of a run that may be published.

    Raises:
        TaidError: the run is not finished, its student is not whole, or holds weights that are no
            numbers.
    """
    student = run / STUDENT
    if not (run / RESULTS).is_file():
        raise TaidError(f"'{run}' holds no finished run: there is no {RESULTS} in it. Name a run's "
                        "output_dir, or finish it with taid-vlm distill ... --resume.")
    if not (files := sorted(student.glob("*.safetensors"))):
        raise TaidError(f"'{student}' holds no weights, so there is nothing to publish.")
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                bad = next((name for name in weights.keys()  # noqa: SIM118
                            if not is_finite(weights.get_tensor(name))), None)
        except SafetensorError as error:
            raise TaidError(f"'{file}' cannot be read ({error}): the student is not whole, and is "
                            "not published.") from None
        if bad is not None:
            raise TaidError(f"'{file}': '{bad}' holds weights that are no numbers, so the student "
                            "is not published. Train again with a lower train.learning_rate.")
    return student


def copy_student(student: Path, folder: Path) -> None:
    """All of a student's folder that may be published; no pickles, nothing hidden."""
    for file in sorted(student.iterdir()):
        if file.is_file() and not any(map(file.match, (*PICKLES, ".*"))):
            shutil.copyfile(file, folder / file.name)


def push_student(push: Push, folder: Path, again: str = "") -> None:
    """Push the folder of a finished run's student, and nothing else, in one commit.

    Args:
        again: how to push it once more, if not with `hf upload`.

    Raises:
        TaidError: it was refused; the folder is as it was, and the message says how to push it.
    """
    message = f"{_title(folder)} (taid-vlm {__version__})"
    logger.info("Pushing the student to %s", push.repository)
    try:
        with _no_bars():
            commit = HfApi(token=push.token).upload_folder(
                repo_id=push.repository, folder_path=folder, commit_message=message,
                ignore_patterns=list(PICKLES), delete_patterns=list(STALE))
    except Exception as error:
        raise TaidError(
            f"the run is done and its student whole in '{folder}', but it could not be pushed to "
            f"'{push.repository}': {_reason(error, push.token)}",
            mend=again or f"Push it with: {push.command(folder, message)}") from None
    logger.info("The student is at %s", commit.repo_url)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """A bar that ends in an error leaves no line for its message."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _title(folder: Path) -> str:
    """What the student's card calls it."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.exists() else []
    return next((line[2:] for line in lines if line.startswith("# ")), "Student")


def _reason(error: Exception, token: str) -> str:
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    text = " ".join(" ".join(str(one).split()) or type(one).__name__ for one in causes)
    text = redact_text(text).replace(token, HIDDEN)
    return f"{text[:400].rstrip('.')}."
