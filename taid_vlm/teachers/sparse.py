"""A few entries of every law in the place of the whole: the k most likely ones with the exact rest,
or k draws.

Entries are those that a pair compares (`alignment.VocabularyMap`): the mapped law of the teacher is
what is cut down, so that k = all of them is the dense comparison in cases a and b, and draws are
unbiased under any map. How the student is compared with them: `batch/sparse.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from taid_vlm.alignment import Pairing
from taid_vlm.batch.sparse import check_sparse
from taid_vlm.errors import TaidError
from taid_vlm.io.hashing import SHORT, sha256
from taid_vlm.objectives import Objective
from taid_vlm.teachers.shards import HIDDEN
from taid_vlm.teachers.signal import SparseSignal, most_likely

Kind = Literal["hidden", "topk", "sampled"]
DEFAULT_K: dict[Kind, int] = {"topk": 64, "sampled": 12}
TRAINS = {"topk": ("forward_kl", "taid", "ce"), "sampled": ("forward_kl", "ce")}
WHY = {"topk": "needs the teacher's whole law",
       "sampled": "is not linear in the teacher's probabilities, so draws of them would be biased"}


@dataclass(frozen=True)
class Signal:
    """What a cache keeps of the records to train on.

    kind: hidden states; or of the entries that the pair compares the "topk" most likely ones with
    the exact rest, or as many "sampled" ones with their share of the draws. k: how many, 0 for
    hidden states.
    """

    kind: Kind = "hidden"
    k: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.k}" if self.is_sparse else "hidden states"

    @property
    def is_sparse(self) -> bool:
        return self.kind != HIDDEN

    def token_bytes(self, learned: bool, width: int, item: int) -> int:
        """Of a token on disk, with its position.

        Args:
            learned: of a record to train on; of others hidden states are kept in any case.
            width, item: of the teacher's hidden states, how many numbers, and bytes of each.
        """
        return 8 + 8 * self.k if self.is_sparse and learned else width * item + 4

    def of(self, log_probs: Tensor, generator: torch.Generator) -> SparseSignal:
        """Of laws [n, W] over W entries."""
        if self.kind == "topk":
            return most_likely(log_probs, self.k)
        return drawn(log_probs, self.k, generator)

    def check(self, pairing: Pairing | None, objective: Objective) -> None:
        """Raise TaidError for a pair or an objective that needs whole laws."""
        if not self.is_sparse:
            return
        flag = f"--signal {self.kind}"
        if pairing is not None and pairing.has_chunks:
            raise TaidError(f"{flag}: the models split some texts differently, and chunks need "
                            "single tokens' whole laws. Keep hidden states (--signal hidden).")
        for term in objective.terms:
            if term.name not in TRAINS[self.kind]:
                raise TaidError(f"{flag}: the loss '{term.name}' {WHY[self.kind]}. Take one of "
                                f"{', '.join(TRAINS[self.kind])}, or keep hidden states (--signal "
                                "hidden).")
        check_sparse(objective, flag)
        widths = [] if pairing is None else [vocabulary.width for vocabulary in pairing.maps]
        if widths and self.k > min(widths):
            raise TaidError(f"--k = {self.k}, but the pair compares {min(widths)} entries.")


def drawn(log_probs: Tensor, k: int, generator: torch.Generator) -> SparseSignal:
    """k draws from each of the laws [n, W]: the entries drawn with their share of the draws, the
    rest with nothing.

    The shares' expectation is the law itself, and so the gradient of a loss that is linear in the
    law is right on average (RS-KD: "Sparse Logit Sampling", ACL 2025). Where an entry is drawn more
    than once, others stand in the places left over, with a share of 0.
    """
    draws = torch.multinomial(log_probs.exp(), k, replacement=True, generator=generator)
    counts = torch.zeros_like(log_probs).scatter_add(
        -1, draws, torch.ones_like(draws, dtype=log_probs.dtype))
    top, entries = counts.topk(k, dim=-1)
    return SparseSignal(entries, (top / k).log(), log_probs.new_full((len(draws),), -torch.inf))


def cut_down(
    signal: Signal, pairing: Pairing, map_index: Tensor, logits: Tensor, seed: bytes
) -> dict[str, Tensor]:
    """`entries` and `log_probs` [n, k] and `log_rest` [n] of a record's teacher logits [n, V].

    Args:
        map_index: [n] under which vocabulary map each token is compared.
        seed: of the draws: a record's are the same in every build.
    """
    # torch's generator on a CPU looks at 32 bits of its seed
    generator = torch.Generator().manual_seed(int.from_bytes(sha256([seed])[:4], "little"))
    entries = torch.zeros(len(logits), signal.k, dtype=torch.int32)
    log_probs, log_rest = torch.zeros(len(logits), signal.k), torch.zeros(len(logits))
    for index, vocabulary in enumerate(pairing.maps):
        rows = (map_index == index).nonzero()[:, 0]
        law = vocabulary.map_teacher(logits[rows]).float().log_softmax(-1)
        kept = signal.of(law, generator)
        entries[rows], log_probs[rows], log_rest[rows] = kept.ids.int(), kept.log_probs, \
            kept.log_rest
    return {"entries": entries, "log_probs": log_probs, "log_rest": log_rest}


def maps_hash(pairing: Pairing) -> str:
    """Of the entries that a pair compares, and of which tokens they are."""
    parts: list[bytes] = []
    for vocabulary in pairing.maps:
        parts.append(repr((vocabulary.identity, vocabulary.has_rest, vocabulary.cells)).encode())
        for side in (vocabulary.teacher, vocabulary.student):
            parts += [x.cpu().numpy().tobytes() for x in _tensors(side)]
    return sha256(parts).hex()[:SHORT]


def _tensors(side: object) -> Sequence[Tensor]:
    return list(vars(side).values())
