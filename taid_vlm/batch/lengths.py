"""How many tokens records are for each model, without making a batch of them.

What decides which records share a batch may be a little wrong, and so it is cheap: a picture is not
decoded where one of its size was shown to the model's processor before, and nothing is aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taid_vlm.adapters import ModelAdapter, Rendered
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.records import Record, parse_record
from taid_vlm.records.images import ImageRef

UNKNOWN = -1


class Lengths:
    """Tokens of a data set's records, which are read when they are first asked for.

    Args:
        data: with a length, of records or rows.
        collator: says which models a record is shown to, and how.
    """

    def __init__(self, data: Any, collator: DistillationCollator) -> None:
        self.data, self.collator = data, collator
        self.known = np.full((len(data), len(collator.adapters)), UNKNOWN, np.int32)
        self._pictures: dict[tuple[Any, ...], int] = {}

    def missing(self, rows: np.ndarray) -> list[int]:
        """Those that are not known yet."""
        unknown: list[int] = rows[self.known[rows, 0] == UNKNOWN].tolist()
        return unknown

    def measure(self, index: int) -> list[int]:
        """A record's tokens for every model after image expansion, as training will have them: 0
        for a model that is not shown it, and of a record that is left out."""
        try:
            return self._measure(self.data.__getitems__([index])[0] if hasattr(
                self.data, "__getitems__") else self.data[index])
        except Exception:  # whatever it is, the collator will come to it, and say so
            return [0] * len(self.collator.adapters)

    def _measure(self, row: Any) -> list[int]:
        record = row if isinstance(row, Record) else parse_record(row, "a row")
        shown = [adapter.role for adapter in self.collator.adapters_of(record)]
        lengths = []
        for adapter in self.collator.adapters:
            length = self._length(adapter, record) if adapter.role in shown else 0
            if adapter.max_length and length > adapter.max_length:
                if record.text is None:  # left out
                    return [0] * len(self.collator.adapters)
                length = adapter.max_length
            lengths.append(length)
        return lengths

    def _length(self, adapter: ModelAdapter, record: Record) -> int:
        rendered = adapter.render(record, self.collator.supervise)
        ids = adapter.tokenizer(rendered.text, add_special_tokens=rendered.add_special)["input_ids"]
        return len(ids) + (self._of_pictures(adapter, record, rendered, len(ids))
                           if record.images else 0)

    def _of_pictures(
        self, adapter: ModelAdapter, record: Record, rendered: Rendered, without: int
    ) -> int:
        """What a row is longer than its text alone, which goes by the pictures' sizes."""
        stills = [image for image in record.images if type(image) is ImageRef]
        key = (adapter.role, *((image.size(), image.sizes) for image in stills))
        if len(stills) == len(record.images) and key in self._pictures:
            return self._pictures[key]
        pictures = [image.load() for image in record.images]
        (row,) = adapter.encode([rendered], [pictures]).rows
        self._pictures[key] = len(row.ids) - without
        return self._pictures[key]
