"""`python -m taid_vlm`, and with it `accelerate launch -m taid_vlm distill recipe.yaml`."""

import atexit
import os
import sys

from taid_vlm.cli import main


def leave(status: int) -> None:
    """End this process; one of several without what torch does last, which now and then aborts a
    process that has done all its work (SIGABRT, "terminate called without an active exception")."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # what trackers have registered
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
