"""`python -m taid_vlm`, and with it `accelerate launch -m taid_vlm distill recipe.yaml`."""

import sys

from taid_vlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
