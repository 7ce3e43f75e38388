"""Alignment: which predictions of teacher and student are about the same thing."""

from taid_vlm.alignment.pairing import (
    Aligned,
    AlignedChunk,
    AlignedToken,
    Pairing,
    align_alone,
    check_modalities,
    pair_models,
    student_positions,
    supervised_positions,
    teacher_positions,
)
from taid_vlm.alignment.vocabulary import VocabularyMap, build_vocabulary_map

__all__ = [
    "Aligned", "AlignedChunk", "AlignedToken", "Pairing", "VocabularyMap", "align_alone",
    "build_vocabulary_map", "check_modalities", "pair_models", "student_positions",
    "supervised_positions", "teacher_positions",
]
