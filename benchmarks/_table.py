"""Result tables: built once as text, shown by rich in the terminal and by the report.

Everything is read from the results dictionary, so a table can be made again from
``results.json``.
"""

import math
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

GRID_END = "†"
UNCONVERGED = "~"


class Table(NamedTuple):
    """A table as text; ``best`` holds (row, column) cells to emphasise."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    best: frozenset[tuple[int, int]] = frozenset()


def short(value: float | None, digits: int = 3) -> str:
    """Write a number with a few significant digits and no exponent when small."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def spread(numbers: dict[str, Any], scale: float = 1.0) -> str:
    """Write ``mean ± sd`` with as many decimals as the spread justifies.

    One digit of the spread, two where it starts with 1.
    """
    mean, sd = numbers["mean"], numbers["sd"]
    if mean is None:
        return "diverged"
    mean *= scale
    if sd is None or sd == 0:
        text = short(mean, 4)
    else:
        sd *= scale
        exponent = math.floor(math.log10(abs(mean))) if 0 < abs(mean) < 1e-3 else 0
        mean, sd = mean / 10.0**exponent, sd / 10.0**exponent
        leading = math.floor(math.log10(sd))
        decimals = max(0, -leading + (sd / 10.0**leading < 1.95))
        text = f"{mean:.{decimals}f} ± {sd:.{decimals}f}"
        if exponent:
            text = f"({text})e{exponent}"
    if numbers["finite"] < numbers["of"]:
        text += f" ({numbers['finite']}/{numbers['of']})"
    return text


def steps_to(numbers: dict[str, Any]) -> str:
    """Write steps to the target, saying how many seeds got there if not all did."""
    return "not reached" if numbers["mean"] is None else spread(numbers)


def _lowest(results: dict[str, Any], key: str) -> int | None:
    means = [o["summary"][key]["mean"] for o in results["optimizers"].values()]
    finite = [(mean, row) for row, mean in enumerate(means) if mean is not None]
    return min(finite)[1] if finite else None


def performance(results: dict[str, Any]) -> Table:
    """Tabulate losses, accuracy and steps to target."""
    settings, rows, notes = results["settings"], [], []
    for name, numbers in results["optimizers"].items():
        found = numbers["summary"]
        mark = GRID_END if numbers["at_grid_end"] else ""
        rows.append(
            (
                name,
                f"{numbers['learning_rate']:g}{mark}",
                spread(found["train_loss"]),
                spread(found["test_loss"]),
                spread(found["test_accuracy"], 100.0),
                steps_to(found["steps_to_target"]),
            )
        )
    seeds, grid = len(settings["seeds"]), settings["grid_points"]
    chosen = (
        f"at the learning rate with the best validation loss among {grid} (one other "
        "seed)"
        if grid > 1
        else "at one fixed learning rate each, not tuned"
    )
    notes.append(
        f"Mean ± standard deviation over {seeds} seeds {chosen}; "
        f"{settings['steps']} steps each; weight decay {settings['weight_decay']:g}; "
        f"SPECTRA threshold c = {settings['threshold']:g}."
    )
    notes.append(
        f"Steps to a validation loss of {settings['target_validation_loss']:g}, looked "
        f"at every {settings['look_every']} steps."
    )
    if any(o["at_grid_end"] for o in results["optimizers"].values()):
        notes.append(
            f"{GRID_END} The best learning rate is an end of its grid: a wider grid "
            "might do better."
        )
    best = _lowest(results, "test_loss")
    return Table(
        "Training and held-out performance",
        (
            "optimizer",
            "lr",
            "train loss",
            "test loss",
            "test accuracy %",
            "steps to target",
        ),
        tuple(rows),
        tuple(notes),
        frozenset() if best is None else frozenset({(best, 3)}),
    )


def _trace(numbers: dict[str, Any]) -> str:
    if numbers["trace"]["mean"] is None:
        return "–"
    errors = numbers["trace_standard_error"]["mean"]
    return f"{spread(numbers['trace'])} (se {short(errors, 2)})"


def geometry(results: dict[str, Any]) -> Table:
    """Tabulate step time, spectral norms and curvature."""
    timing, rows = results["timing"], []
    seeds = len(results["settings"]["seeds"])
    unconverged = False
    for name, numbers in results["optimizers"].items():
        found = numbers["summary"]
        doubtful = found["lambda_converged"] < seeds
        unconverged |= doubtful
        rows.append(
            (
                name,
                short(1e3 * timing["step_seconds"][name]) if timing else "–",
                f"{timing['ratio'][name]:.2f}×" if timing else "–",
                short(found["max_update_norm"]["mean"]),
                short(found["max_weight_norm"]["mean"]),
                (UNCONVERGED if doubtful else "") + spread(found["lambda_max"]),
                _trace(found),
            )
        )
    baseline = timing["baseline"] if timing else "adamw"
    notes = [
        "Step norm: largest spectral norm of a step without weight decay, over the "
        "peak learning rate, sampled at every look; SPECTRA keeps it at or below "
        f"{short(results['settings']['step_norm_ceiling'])}.",
        "W norm: largest spectral norm of any matrix during training.",
        "λmax and trace: Hessian of the training loss at the end "
        f"({results['task']['curvature']}); se is the standard error of the "
        "stochastic trace.",
    ]
    if unconverged:
        notes.append(
            f"{UNCONVERGED} The eigenvalue solver ran out of products on some seeds."
        )
    return Table(
        "Cost and geometry",
        (
            "optimizer",
            "ms/step",
            f"vs {baseline}",
            "step norm",
            "W norm",
            "λmax",
            "trace",
        ),
        tuple(rows),
        tuple(notes),
    )


def pairs(results: dict[str, Any]) -> Table | None:
    """Tabulate what each method adds to its base, or None without pairs."""
    if not results["paired"]:
        return None
    rows = []
    for name, numbers in results["paired"].items():
        mean = numbers["mean"]
        sign = "+" if mean is not None and mean > 0 else ""
        rows.append(
            (
                f"{name} − {numbers['base']}",
                sign + spread(numbers).replace("-", "−"),
                f"{numbers['better']} of {numbers['of']}",
            )
        )
    return Table(
        "What each method adds to its base (test loss, negative is better)",
        ("pair", "difference", "seeds improved"),
        tuple(rows),
        ("Paired by seed: same starting weights, same minibatches.",),
    )


def tables(results: dict[str, Any]) -> list[Table]:
    """Build every table of a comparison that has at least one optimizer done."""
    if not results["optimizers"]:
        return []
    found = [performance(results), geometry(results), pairs(results)]
    return [table for table in found if table is not None]


def show(table: Table, console: Console) -> None:
    """Print one table with its notes."""
    rich = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(table.columns):
        rich.add_column(
            column, justify="left" if index == 0 else "right", overflow="fold"
        )
    for row, cells in enumerate(table.rows):
        rich.add_row(
            *(
                Text(cell, style="bold green" if (row, column) in table.best else "")
                for column, cell in enumerate(cells)
            )
        )
    console.print(Text(table.title, style="bold"))
    console.print(rich)
    for note in table.notes:
        console.print(Text(note, style="dim"))
    console.print()
