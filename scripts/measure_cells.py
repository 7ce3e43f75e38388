"""How much of a real teacher's predictions the cells of a pair of tokenizers keep.

    python scripts/measure_cells.py TEACHER_FOLDER STUDENT_TOKENIZER_FOLDER

Entropy of the teacher's next-token distributions in nats per token: over its own tokens, over the
cells, and over the groups of its tokens that the student begins with one and the same token. The
last is a bound: a student's single prediction cannot tell more of the teacher's tokens apart.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.alignment.cell_store import CellStore
from taid_vlm.alignment.cells import _first_tokens, _spelling, build_cell_map
from taid_vlm.alignment.vocabulary import token_keys

TEXTS = {
    "Japanese": "昔々、あるところにおじいさんとおばあさんが住んでいました。おじいさんは山へ"
    "柴刈りに、おばあさんは川へ洗濯に行きました。日本の首都は東京です。人口は約一千四百万人で、"
    "世界でも有数の大都市です。機械学習とは、データから規則を学ぶ技術のことであり、画像認識や自然言語処理に広く使われ"
    "ています。",
    "Chinese": "北京是中华人民共和国的首都，是全国的政治中心和文化中心。今天天气很好，"
    "我们一起去公园散步吧。人工智能是计算机科学的一个分支，它试图了解智能的实质，并生产出一种新的能以人类智能相似的方式"
    "作出反应的智能机器。",
    "English": "The capital of France is Paris. It lies on the river Seine and has about two "
    "million inhabitants. Machine learning is the study of algorithms that improve through "
    "experience; it is widely used for images and language. Once upon a time there was an old man "
    "who lived near the sea.",
    "code": "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n    a, b = 0, "
    "1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\nclass Stack:\n"
    "    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n",
}


def entropy(p: Tensor) -> float:
    """Mean over rows [N, V], in nats."""
    return float(-(p * p.clamp(min=1e-300).log()).sum(-1).mean())


def begun_groups(teacher: ModelAdapter, student: ModelAdapter, rows: int) -> Tensor:
    """[rows] the student's token that each of the teacher's begins with; one of its own if none."""
    spelled_t, spelled_s = (_spelling(token_keys(m.table, b"")) for m in (teacher, student))
    group = torch.arange(rows) + len(student.table)
    for data, first in _first_tokens(spelled_t, student, spelled_s, b"").items():
        group[spelled_t[data]] = first
    return group.unique(return_inverse=True)[1]


def main(teacher_folder: str, student_folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    teacher, student = (
        make_adapter(AutoTokenizer.from_pretrained(folder), role) for folder, role in
        ((teacher_folder, "teacher"), (student_folder, "student")))
    rows = model.config.get_text_config().vocab_size
    roles = [(teacher.tokenizer.eos_token_id, student.tokenizer.eos_token_id)]
    cells = build_cell_map(teacher, student, rows, len(student.table), roles,
                           find=CellStore(teacher, student).find)
    group = begun_groups(teacher, student, rows)
    print("| text | tokens | NLL | entropy | over cells | kept at most |")
    print("|---|---|---|---|---|---|")
    for name, text in TEXTS.items():
        ids = teacher.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        p = log_p.exp()
        kept = entropy(cells.map_teacher(log_p).softmax(-1))
        bound = entropy(p.new_zeros(len(p), int(group.max()) + 1).index_add(1, group, p))
        nll, whole = float(-log_p.gather(1, ids[0, 1:, None]).mean()), entropy(p)
        print(f"| {name} | {len(p)} | {nll:.3f} | {whole:.4f} "
              f"| {kept:.4f} (−{1 - kept / whole:.2%}) "
              f"| {bound:.4f} (−{1 - bound / whole:.2%}) |")


if __name__ == "__main__":
    main(*sys.argv[1:])
