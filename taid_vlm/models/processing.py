"""`processor_kwargs` of a recipe, on a model's processor: how it cuts and resizes pictures.

They become the processor's own settings, so that what is saved beside the student holds them and
whoever loads it sees pictures as they were in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from taid_vlm.adapters import Processor
from taid_vlm.errors import TaidError, nearest
from taid_vlm.records.images import GREY

VIDEOS = "videos_kwargs"
PROBE_SIZE = (448, 336)
# what a call decides (or this package), and no property of how pictures are shown
CALL = frozenset(("data_format", "device", "disable_grouping", "input_data_format",
                  "return_metadata", "return_row_col_info", "return_tensors", "video_metadata"))
# what the weights of a model were made for
WEIGHTS = frozenset(("crop_size", "downsample_factor", "encoder_patch_size", "image_grid_pinpoints",
                     "image_seq_length", "max_image_size", "merge_size", "patch_size",
                     "pooling_kernel_size", "temporal_patch_size", "tile_size"))
SAMPLING = frozenset(("do_sample_frames", "fps", "max_frames", "min_frames", "num_frames",
                      "video_sampling"))


def set_processor(processor: Processor, settings: Mapping[str, Any], role: str) -> None:
    """Change a processor's settings in place.

    Args:
        settings: names of its image processor; those of its video processor under `videos_kwargs`.

    Raises:
        TaidError: no such name or value, with the nearest name.
    """
    if not settings:
        return
    key = f"{role}.processor_kwargs"
    if isinstance(processor, PreTrainedTokenizerBase):
        raise TaidError(f"{key} has no effect on a text model, which has a tokenizer alone; take "
                        "it out.")
    own = dict(settings)
    videos = own.pop(VIDEOS, None)
    _set(processor, "image_processor", own, key)
    if videos is not None:
        if not isinstance(videos, Mapping):
            raise TaidError(f"{key}.{VIDEOS} = {videos!r:.60}, but it must be a mapping.")
        _set(processor, "video_processor", dict(videos), f"{key}.{VIDEOS}")
    _probe(processor, key)


def _set(processor: Any, part: str, settings: dict[str, Any], key: str) -> None:
    current = getattr(processor, part, None)
    if current is None:
        raise TaidError(f"{key}: {type(processor).__name__} has no {part.replace('_', ' ')}.")
    fixed = getattr(processor, part.replace("_processor", "s_kwargs"), None) or {}
    for name in settings:
        _check_name(name, current, fixed, key)
    try:
        changed = type(current).from_dict({**current.to_dict(), **settings})
    except Exception as error:  # they raise anything
        raise TaidError(f"{key}: {type(current).__name__} refuses {settings}: {error}") from error
    setattr(processor, part, changed)


def _check_name(name: str, part: Any, fixed: Mapping[str, Any], key: str) -> None:
    kind, names = type(part).__name__, set(part.valid_kwargs.__annotations__)
    if name not in names - CALL:
        raise TaidError(f"{key}: {kind} has no '{name}'."
                        f"{nearest(name, names - CALL - WEIGHTS - SAMPLING - set(fixed))}")
    if name in WEIGHTS or (name == "size" and _is_fixed(part)):
        raise TaidError(f"{key}.{name} cannot be set: the model's weights are made for its own, "
                        f"{getattr(part, name, None)}.")
    if name in SAMPLING:
        raise TaidError(f"{key}.{name} cannot be set: data.video says which frames are taken, for "
                        "both models alike.")
    if name in fixed:
        raise TaidError(f"{key}.{name} cannot be set: the processor itself always says "
                        f"{name} = {fixed[name]!r}, and a saved one would go back to it.")


def _is_fixed(part: Any) -> bool:
    """Whether a vision tower sees pictures of one size, and no limits between which they vary."""
    size = getattr(part, "size", None) or {}
    return all(key in dict(size) and dict(size)[key] for key in ("height", "width"))


def _probe(processor: Any, key: str) -> None:
    """A wrong value shows when a picture is processed, which is not to be after an hour."""
    try:
        processor.image_processor(Image.new("RGB", PROBE_SIZE, GREY), return_tensors="pt")
        if hasattr(processor, "video_processor"):
            frames = [Image.new("RGB", PROBE_SIZE, GREY)] * 2
            processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
    except Exception as error:
        raise TaidError(f"{key}: {type(processor).__name__} cannot show a picture with them: "
                        f"{error!s:.300}") from error
