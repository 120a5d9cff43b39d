"""What `check_transformation` returns when all is well and raises when it is not."""

import pathlib
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import optax

WIDTH = 88
MOST_LINES, LONGEST_LINE = 12, 500  # of what one failed check says
HERE = pathlib.Path(__file__).parent


class Conformance(NamedTuple):
    """What `check_transformation` found out about a sound transformation.

    Attributes:
        passed: names of the checks that it passed.
        inapplicable: names of those that were left out, each with the reason.
    """

    passed: tuple[str, ...]
    inapplicable: Mapping[str, str]


class Failure(NamedTuple):
    """One property that a transformation breaks.

    Attributes:
        check: the check's name, as in `CHECKS`.
        property: what the check demands, in one line.
        detail: the leaf, dtype or step that broke it; what was got and expected.
        hint: how the common cause is repaired; empty if none is known.
        error: the exception as it was raised, with its traceback.
    """

    check: str
    property: str
    detail: str
    hint: str
    error: Exception

    def __str__(self) -> str:
        """Write it as one paragraph."""
        hint = [f"Hint: {self.hint}"] if self.hint else []
        lines = [_wrapped(line, "    ") for line in [*_shortened(self.detail), *hint]]
        return "\n".join([f"{self.check}: {self.property}", *lines])


class ConformanceError(AssertionError):
    """All properties that a transformation breaks, with a paragraph for each.

    Attributes:
        failures: a tuple of `Failure`.
        passed: names of the checks that it passed.
        inapplicable: names of those that were left out, each with the reason.
    """

    def __init__(
        self,
        name: str,
        failures: tuple[Failure, ...],
        passed: tuple[str, ...] = (),
        inapplicable: Mapping[str, str] | None = None,
    ) -> None:
        self.failures = failures
        self.passed = passed
        self.inapplicable = dict(inapplicable or {})
        count = len(failures) + len(passed)
        title = (
            f"{name} breaks {len(failures)} of {count} properties of a gradient "
            f"transformation (jax {jax.__version__}, optax {optax.__version__})."
        )
        super().__init__("\n\n".join([_wrapped(title), *map(str, failures)]))


def what_went_wrong(error: Exception) -> str:
    """Return an exception's message, with its type and place if it is no verdict."""
    if isinstance(error, AssertionError):
        return str(error).strip()
    *_, place = [None, *_places_outside(error)]
    where = f" ({place})" if place else ""
    return f"{type(error).__name__}{where}: {error}".strip()


def _places_outside(error: Exception) -> Iterator[str]:
    """Iterate over the traceback's lines in the code under test, outermost first."""
    for frame in traceback.extract_tb(error.__traceback__):
        path = pathlib.Path(frame.filename)
        library = {"jax", "jaxlib", "contextlib.py", "functools.py"} & set(path.parts)
        if path.parent != HERE and not library:
            yield f"{path.name}:{frame.lineno}, in {frame.name}"


def _shortened(text: str) -> list[str]:
    lines = text.splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... ({len(lines) - MOST_LINES} more lines)"]
    return [x if len(x) <= LONGEST_LINE else f"{x[:LONGEST_LINE]} ..." for x in lines]


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
