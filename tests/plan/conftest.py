"""As for all command-line tests: one thread, and no hub."""

from cli.conftest import checkpoints, cli, quiet_session

__all__ = ["checkpoints", "cli", "quiet_session"]
