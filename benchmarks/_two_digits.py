"""Two overlaid handwritten digits, a small MultiMNIST that needs no download.

Scikit-learn's digits of 8x8 pixels lie over one another in a field of 11x11.  Three
tenths of the training labels are replaced at random, which leaves something to gain
for methods that claim to generalize better; held-out labels are clean, and held-out
pairs are made of digits that no training pair contains.
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from basinax.benchmarks._digits import Images
from basinax.benchmarks._multi_task import MultiTask, as_task, multi_task
from basinax.benchmarks._multi_task_images import deal_pairs
from basinax.benchmarks._tasks import Defaults, Options, Task

OFFSET, CLASSES = 3, 10
SOURCES = (1200, 298, 299)  # digits to train on, to validate with, to test with
SIZES = (2000, 1000, 3000)  # composites made of them
NOISE = 0.3


def sources(seed: int) -> tuple[Images, Images, Images]:
    """Deal the digits out in three parts."""
    bunch: Any = load_digits()
    order = np.random.default_rng(seed).permutation(sum(SOURCES))
    inputs = np.asarray(bunch["data"], np.float32)[order] / 16.0  # grey levels 0..16
    labels = np.asarray(bunch["target"], np.int32)[order]
    cuts = np.cumsum(SOURCES)[:-1]
    pairs = zip(np.split(inputs, cuts), np.split(labels, cuts), strict=True)
    first, second, third = (Images(x, y) for x, y in pairs)
    return first, second, third


def problem(options: Options | None = None, noise: float = NOISE) -> MultiTask:
    """Pose the problem.

    Args:
      options: width, depth and batch size.
      noise: share of the training labels that are replaced; 0 for the clean variant.
    """
    options = options or Options()
    side = 8 + OFFSET
    sizes = (side * side, *[options.width or 96] * (options.depth or 2))
    return multi_task(
        "two-digits",
        f"two overlaid digits, trunk {'-'.join(map(str, sizes))}, "
        + (f"{noise:.0%} of the labels random" if noise else "clean labels"),
        "scikit-learn digits, two in one image",
        tasks=("upper left", "lower right"),
        classes=CLASSES,
        sizes=sizes,
        batch_size=options.batch_size or 100,
        deal=lambda seed: deal_pairs(
            sources(seed), SIZES, offset=OFFSET, classes=CLASSES, noise=noise, seed=seed
        ),
    )


def make(options: Options) -> Task:
    """Build the task of both labels' mean loss."""
    return as_task(
        problem(options),
        options,
        Defaults(steps=400, seeds=3, grid=3, threshold=4.0, probes=16, max_matvecs=60),
    )
