"""Saved checkpoints, as for the tests of the command."""

from cli.conftest import checkpoints, cli, quiet_session

__all__ = ["checkpoints", "cli", "quiet_session"]
