"""The page."""

from pathlib import Path

from weft.interpret.history.suite import Suite


def write_page(suite: Suite, path: Path) -> None:
    """Writes it."""
