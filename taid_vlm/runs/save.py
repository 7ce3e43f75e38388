"""The student on disk: whole or absent, and checked."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from taid_vlm.adapters import check_reloaded, make_adapter
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.folders import whole_or_absent
from taid_vlm.models.loading import load_model, refuse_nonfinite
from taid_vlm.models.lora import LoraFolder, write_merged
from taid_vlm.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def save_student(
    trainer: DistillationTrainer, folder: Path, base: ModelSpec | None = None
) -> None:
    """Write model and processor, check that they load as they were, and only then put them in
    place.

    Args:
        base: an adapter is merged into this model, and written with all its weights.
    """
    main = trainer.is_world_process_zero()
    with whole_or_absent(folder, "the student could not be saved to '{}'", main) as partial:
        trainer.accelerator.wait_for_everyone()  # the main process has emptied it
        refuse_nonfinite(trainer.model, f"the student '{folder}'")
        trainer.save_model(str(partial))
        if main:
            _check_weights(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody needs
            if base is not None:
                write_merged(load_model(base, "student"), LoraFolder(partial, base), "student")
                logger.info("'%s' holds all weights: the adapter was trained on '%s', and is "
                            "merged into it.", folder, base.model_name_or_path)
            _check_reload(trainer, partial)
            shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _check_weights(folder: Path) -> None:
    """FSDP and DeepSpeed can be set up so that transformers writes shards of theirs alone."""
    if not any(folder.glob("*.safetensors")):
        raise TaidError("the student's weights were not gathered, so it is not saved; the last "
                        "checkpoint holds them. Take out fsdp_config.state_dict_type, or set "
                        "stage3_gather_16bit_weights_on_model_save to true for DeepSpeed.")


def _check_reload(trainer: DistillationTrainer, folder: Path) -> None:
    """Warn of a tokenizer that is not the same when it is loaded by its model's type."""
    from transformers import AutoProcessor, AutoTokenizer

    trained = trainer.collator.student
    auto = AutoProcessor if trained.sees_images else AutoTokenizer
    try:
        reloaded = make_adapter(auto.from_pretrained(str(folder)), "student")
    except Exception as error:  # of whatever kind: the weights are worth more than this check
        logger.warning("The student's processor was saved, but does not load again: %s", error)
        return
    check_reloaded(
        trained.tokenizer, reloaded.tokenizer,
        "Saving and loading the tokenizer that was trained with", "transformers rebuilds it by the "
        "model's type; save the tokenizer that belongs to this model type.", fatal=False)
