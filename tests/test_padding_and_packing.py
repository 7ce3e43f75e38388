"""What padding on the left and several texts in one row do to every kind of model.

Padding never matters here (test_contract.py); several texts in one row, told apart by positions
that start again, are the same as rows of their own only for models all of whose layers are
attention that looks at positions. README.md says which.
"""

from __future__ import annotations

import pytest
import torch
from zoo import TEXT_FAMILIES, build

# A convolution and a state space carry over from text to text; gpt-oss's mask (transformers 5.23
# and 5.24) does not look at positions.
NEVER_PACKED = {"lfm2", "falcon_h1", "gpt_oss"}


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_which_families_may_share_a_row(family: str) -> None:
    model = build(family).model
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(20, 90, (1, n), generator=generator) for n in (9, 14, 6)]
    alone = torch.cat([model(input_ids=text, use_cache=False).logits for text in texts], dim=1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    packed = model(input_ids=torch.cat(texts, dim=1), position_ids=positions,
                   use_cache=False).logits
    gap = float((alone - packed).abs().max())
    assert gap > 0.1 if family in NEVER_PACKED else gap < 1e-4, gap
