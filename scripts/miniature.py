"""A miniature of the TAID paper: what it claims, measured in minutes on a CPU.

    python scripts/miniature.py [--parts language,gap,theory,sweeps,scenes,pretrain] [--seeds N] ...

An exactly known language, a capacity gap, the theory, sweeps of the schedule, and small VLMs and
LLMs through the ordinary recipe path; with 95 % intervals over seeds, and for every claim of the
paper whether it is reproduced. Writes results.json, report.html and table.md.
"""

from miniature.command import main

if __name__ == "__main__":
    main()
