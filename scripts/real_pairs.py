"""Objectives on real language models: rates tuned alike, several seeds, held-out figures.

    python scripts/fetch_real.py REAL --only smollm2_model
    python scripts/real_pairs.py --teacher REAL/smollm2_model --data TEXTS --folder runs/pairs

Hours on two cores; one command that goes on where it broke off, since an arm that is finished is
kept in --folder. Arms stand in the order of their worth, so that the table is as useful as it can
be whenever it is made: --table makes it from what is there. --minutes starts no arm that would end
later. The student is the teacher without some layers (`taid-vlm shrink`); --other names a teacher
with another tokenizer, without which that block is left out. TEXTS holds gsm8k_train.jsonl,
gsm8k_test.jsonl (question, answer), tinyshakespeare.txt and mt_bench_questions.jsonl (turns).
"""

import sys

from real_pairs.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
