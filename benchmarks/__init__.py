"""Tasks on real data, the comparison runner, reports and micro-benchmarks.

This package is a command line: ``python -m basinax.benchmarks --help``.
"""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line from Python.

    Args:
      argv: what would follow ``python -m basinax.benchmarks``.

    Returns:
      The exit code: 0, 2 for a mistake in the arguments, 130 after an interruption.

    Example:
      >>> from basinax.benchmarks import main
      >>> main(["compare", "--task", "nothing"])
      2
    """
    # Imported here so that importing the package stays cheap.
    from basinax.benchmarks._cli import main as run

    return run(argv)
