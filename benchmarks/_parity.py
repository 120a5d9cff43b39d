"""Parity of a few bits hidden among many.

    x ∈ {0, 1}ⁿ ↦ x₁ + … + x_k mod 2,       the other n - k bits are noise

The examples are distinct random vectors, so half of them say little about the other
half: a network can memorize them by the noise and finds the k bits late.
Barak et al. (2022, arXiv:2207.08799); the setting is that of Prieto et al. (2025,
arXiv:2501.04697).
"""

import numpy as np

from basinax.benchmarks._full_batch import Examples, Problem, as_task, relu_network
from basinax.benchmarks._tasks import Defaults, Options, Task, Usage

TARGET = 0.2  # of a validation loss that starts at log 2
MAX_BITS = 62  # of a vector as a 64-bit integer


def problem(
    bits: int, k: int, train: int, test: int, width: int, depth: int = 2
) -> Problem:
    """Pose the parity of the first k of some bits.

    Args:
      bits: length of the vectors, relevant and noise bits together.
      k: how many leading bits the label depends on.
      train: number of training examples.
      test: number of held-out examples.
      width: units of each hidden layer.
      depth: hidden layers.

    Raises:
      Usage: the numbers contradict one another.
    """
    if not 1 <= k <= bits <= MAX_BITS:
        raise Usage(f"parity of {k} out of {bits} bits: needs 1 <= k <= {MAX_BITS}")
    if train < 1 or test < 1 or train + test > 2**bits:
        raise Usage(
            f"parity with {train} + {test} examples: needs at least one of each and "
            f"no more than the {2**bits} vectors of {bits} bits"
        )

    def deal(seed: int) -> Examples:
        codes = np.random.default_rng(seed).choice(
            2**bits, size=train + test, replace=False
        )
        vectors = (codes[:, None] >> np.arange(bits)[None, :]) & 1
        inputs, labels = vectors.astype(np.float32), vectors[:, :k].sum(axis=1) % 2
        return Examples(
            (inputs[:train], labels[:train]), (inputs[train:], labels[train:])
        )

    network = relu_network((bits, *[width] * depth, 2), bias=True)
    return Problem(
        name="parity",
        title=f"parity of {k} among {bits} bits, {train} examples, "
        f"hidden {'-'.join([str(width)] * depth)}",
        deal=deal,
        classes=2,
        init=network.init,
        apply=network.apply,
    )


def make(options: Options) -> Task:
    """Build the sparse-parity task: 3 of 20 bits, 1000 examples."""
    train = int((options.fraction or 0.5) * 1000)
    return as_task(
        problem(20, 3, train, 1000 - train, options.width or 100, options.depth or 2),
        options,
        Defaults(steps=400, seeds=3, grid=3, threshold=4.0, probes=32, max_matvecs=100),
        target=TARGET,
    )
