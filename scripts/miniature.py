"""A miniature of the TAID paper: what it claims, measured in minutes on a CPU.

    python scripts/miniature.py [--parts NAME,NAME] [--seeds N] ...

An exactly known language, a capacity gap, the theory, sweeps of the schedule, objectives since
TAID, signals of a few entries, exposure bias off and on policy, and small VLMs and LLMs through the
ordinary recipe path; with 95 % intervals over seeds, and for every claim whether it is reproduced.
Writes results.json, report.html and table.md.
"""

from miniature.command import main

if __name__ == "__main__":
    main()
