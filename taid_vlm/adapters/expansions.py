"""Rows of pictures whose pixels a processor need not see: what sizes like theirs became is known.

How many tokens a picture becomes, and which, a processor decides by its size. That is observed, not
promised, so whoever takes such rows has to know them by their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taid_vlm.adapters.adapter import ModelAdapter
from taid_vlm.adapters.encoded import EncodedBatch, EncodedRow, Side
from taid_vlm.adapters.template import Rendered
from taid_vlm.records.images import SIZES
from taid_vlm.records.videos import Clip, Picture

Holds = Callable[[Sequence[int], Sequence[Picture]], bool]


class SeenSizes:
    """What one processor has put in the places of pictures, by the sizes of all of a row's."""

    def __init__(self) -> None:
        self._texts: dict[tuple[Any, ...], list[str]] = {}

    def encode(
        self, adapter: ModelAdapter, rendered: Sequence[Rendered],
        images: Sequence[Sequence[Picture]], side: Side, holds: Holds,
    ) -> EncodedBatch | None:
        """The batch without its pixels: ids and attention mask are all of its inputs.

        Args:
            holds: whether there is a row with these ids and images. The processor is shown a row
                that is not known, and one of sizes that it has not been shown.

        Returns:
            None where that cannot be said without the processor: of videos, and where it makes
            something else of a row than of others of its sizes.
        """
        texts = []
        for item, row in zip(rendered, images, strict=True):
            stills = [image for image in row if not isinstance(image, Clip)]
            if len(stills) < len(row):
                return None
            key = tuple((image.size, repr(image.info.get(SIZES))) for image in stills)
            if key not in self._texts:
                self._texts[key] = _replacements(adapter.encode([item], [row]).rows[0])
            texts.append(self._texts[key])
            if len(texts[-1]) != len(row):
                return None
        encoded = adapter.encode(rendered, texts, side, shown=False)
        for item, row, known in zip(rendered, images, encoded.rows, strict=True):
            if not holds(known.ids, row) and adapter.encode([item], [row]).rows[0].ids != known.ids:
                return None
        return encoded


def _replacements(row: EncodedRow) -> list[str]:
    data = row.text.encode()
    return [data[start:end].decode() for start, end in row.images]
