"""Functions of yeast genes: fourteen labels that one gene may have all at once.

The 2,417 genes of MULAN's multi-label set (Elisseeff and Weston, NeurIPS 2001), 103
numbers each, come inside the package river.  Every label is a task with two classes.
"""

import csv
import gzip
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from basinax.benchmarks._multi_task import (
    Deal,
    Examples,
    MultiTask,
    as_task,
    multi_task,
)
from basinax.benchmarks._tasks import Defaults, Options, Task, Usage

FILE = Path("datasets/yeast.csv.gz")
SHARES = (0.6, 0.2)  # of the genes, to train on and to validate with


def find() -> Path | None:
    """Find the file in the package, which is not imported."""
    spec = importlib.util.find_spec("river")
    folders: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    return next((p for f in folders if (p := Path(f) / FILE).is_file()), None)


def read(path: Path) -> tuple[Examples, tuple[str, ...]]:
    """Read a gzipped table whose columns Class1, Class2, ... are labels of 0 or 1.

    Raises:
      Usage: the table has no such columns.
    """
    with gzip.open(path, "rt", newline="") as file:
        names, *rows = csv.reader(file)
    values = np.array(rows, np.float32)
    labelled = np.array([name.startswith("Class") for name in names], bool)
    if not labelled.any() or labelled.all():
        raise Usage(f"{path} needs columns of features and columns Class1, Class2, ...")
    found = Examples(values[:, ~labelled], values[:, labelled].astype(np.int32))
    return found, tuple(name for name in names if name.startswith("Class"))


def split(examples: Examples, seed: int) -> Deal:
    """Deal the genes out; features have mean 0 and spread 1 among those to train on."""
    number = len(examples.labels)
    order = np.random.default_rng(seed).permutation(number)
    cuts = np.cumsum([round(share * number) for share in SHARES])
    parts = np.split(order, cuts)
    known = examples.inputs[parts[0]]
    mean, spread = known.mean(axis=0), known.std(axis=0)
    inputs = (examples.inputs - mean) / np.where(spread > 0, spread, 1)
    return Deal(*(Examples(inputs[rows], examples.labels[rows]) for rows in parts))


def problem(options: Options | None = None) -> MultiTask:
    """Pose the problem.

    Raises:
      Usage: the package with the data is not installed.
    """
    options = options or Options()
    if (path := find()) is None:
        raise Usage("the task yeast needs the package river: pip install river")
    examples, tasks = read(path)
    width, depth = options.width or 128, options.depth or 2
    sizes = (examples.inputs.shape[1], *[width] * depth)
    return multi_task(
        "yeast",
        f"functions of yeast genes, trunk {'-'.join(map(str, sizes))}",
        "MULAN's yeast, in the package river",
        tasks=tasks,
        classes=2,
        sizes=sizes,
        batch_size=options.batch_size or 64,
        deal=lambda seed: split(examples, seed),
    )


def make(options: Options) -> Task:
    """Build the task of all labels' mean loss."""
    return as_task(
        problem(options),
        options,
        Defaults(steps=400, seeds=3, grid=3, threshold=4.0, probes=16, max_matvecs=60),
    )
