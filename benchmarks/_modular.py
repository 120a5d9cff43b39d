"""Addition modulo p, the task on which delayed generalization was found.

    (a, b) ↦ a + b mod p,       input: one-hot of a beside one-hot of b

All p² ordered pairs are the examples; a seed deals a fraction of them out for training.
The network has no biases, so its logits are homogeneous in the weights of every layer:
scaling weights up lowers a fitted loss without changing a prediction.
Power et al. (2022, arXiv:2201.02177); the setting is that of Prieto et al. (2025,
arXiv:2501.04697).
"""

import numpy as np

from basinax.benchmarks._full_batch import Examples, Problem, as_task, relu_network
from basinax.benchmarks._tasks import Defaults, Options, Task, Usage

TARGET = 1.0  # of a validation loss that starts at log p


def table(p: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all p² pairs as two one-hot vectors side by side, and their sums mod p."""
    a, b = np.divmod(np.arange(p * p), p)
    one_hot = np.eye(p, dtype=np.float32)
    return np.concatenate([one_hot[a], one_hot[b]], axis=1), (a + b) % p


def problem(p: int, fraction: float, width: int, depth: int = 2) -> Problem:
    """Pose addition mod p.

    Args:
      p: the modulus and number of classes.
      fraction: share of the p² pairs to train on, rounded down.
      width: units of each hidden layer.
      depth: hidden layers.

    Raises:
      Usage: the modulus or the fraction leaves nothing to learn or to predict.
    """
    size = int(fraction * p * p)
    if p < 2 or not 0 < size < p * p:
        raise Usage(
            f"addition mod {p} with a training fraction of {fraction:g}: needs a "
            "modulus of at least 2, at least one pair to train on and one to predict"
        )

    def deal(seed: int) -> Examples:
        inputs, labels = table(p)
        order = np.random.default_rng(seed).permutation(p * p)
        train, test = order[:size], order[size:]
        return Examples((inputs[train], labels[train]), (inputs[test], labels[test]))

    network = relu_network((2 * p, *[width] * depth, p), bias=False)
    return Problem(
        name="modular",
        title=f"addition mod {p}, {fraction:.0%} of all pairs, "
        f"hidden {'-'.join([str(width)] * depth)}",
        deal=deal,
        classes=p,
        init=network.init,
        apply=network.apply,
    )


def make(options: Options) -> Task:
    """Build the modular-addition task."""
    return as_task(
        problem(
            options.modulus or 59,
            options.fraction or 0.5,
            options.width or 128,
            options.depth or 2,
        ),
        options,
        Defaults(steps=400, seeds=3, grid=3, threshold=4.0, probes=16, max_matvecs=60),
        target=TARGET,
    )
