"""A VLM with real words and real pictures, made and distilled on a CPU by this toolkit's commands.

    python scripts/real_vlm.py LANGUAGE_MODEL --output-dir runs/real_vlm --minutes 60
    python scripts/real_vlm.py LANGUAGE_MODEL --nlvr FILE --icons FILE ...

A small vision tower learns what drawings show; `compose` puts it before a language model with a
real vocabulary; a run in two stages teaches both together to answer and to describe; `shrink` cuts
half of the layers away, and SFT, KL and TAID train what is left, with several seeds. Then held-out
pictures are asked about: by kind of question, with standard errors, and with blank pictures, too.
The same command goes on where it was, whenever and however it was stopped.
"""

import sys

from real_vlm.command import main

if __name__ == "__main__":
    sys.exit(main())
