"""Small problems trained on all their examples at once, by a dense ReLU network.

A problem is a table of examples with exact labels, dealt out by a seed.  The network
has torch's default start, every number uniform in ±1/√fan_in: how late it generalizes
depends on how large it starts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._models import Functional, count
from basinax.benchmarks._tasks import (
    Batch,
    Defaults,
    Options,
    Params,
    Splits,
    Task,
    Usage,
    classification,
    dimension_numbers,
    uniform_loss,
)


class Examples(NamedTuple):
    """Inputs of shape (examples, features) and integer labels, dealt out."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Problem(NamedTuple):
    """What there is to learn and the network that learns it."""

    name: str
    title: str
    deal: Callable[[int], Examples]
    """``deal(seed)``: the shapes are the same for every seed."""
    classes: int
    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]


def relu_network(sizes: Sequence[int], *, bias: bool) -> Functional:
    """Build ``init`` and ``apply`` of a dense network with ReLU between the layers.

    Args:
      sizes: width of the input, of every hidden layer and of the output.
      bias: whether the layers have biases; without, the logits are positively
        homogeneous in the weights of each layer.
    """
    names = [f"layer{i}" for i in range(len(sizes) - 1)]

    def init(key: jax.Array) -> Params:
        params = {}
        keys = jax.random.split(key, (len(names), 2))
        for name, pair, (m, n) in zip(
            names, keys, itertools.pairwise(sizes), strict=True
        ):
            limit = m**-0.5
            shapes = {"kernel": (m, n), "bias": (n,)} if bias else {"kernel": (m, n)}
            params[name] = {
                part: jax.random.uniform(k, shape, jnp.float32, -limit, limit)
                for k, (part, shape) in zip(pair, shapes.items(), strict=False)
            }
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        for name in names:
            x = x @ params[name]["kernel"]
            if bias:
                x = x + params[name]["bias"][None, :]
            x = x if name == names[-1] else jax.nn.relu(x)
        return x

    return Functional(init, apply)


def on_device(examples: tuple[np.ndarray, np.ndarray]) -> Batch:
    """Put inputs and labels on the device in 32 bits."""
    inputs, labels = examples
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32)


def as_task(
    problem: Problem, options: Options, defaults: Defaults, *, target: float
) -> Task:
    """Turn a problem, dealt out with seed 0, into a task of the comparison.

    Half of what is held out becomes the validation split.  A step sees every training
    example unless the options name a batch size.
    """
    if options.data_dir is not None:
        raise Usage(f"--data-dir: the task {problem.name} makes its own data")
    examples = problem.deal(0)
    train, held = on_device(examples.train), on_device(examples.test)
    size, half = len(train[1]), len(held[1]) // 2
    if half < 1:
        raise Usage(f"{problem.title}: {len(held[1])} held-out examples are too few")
    loss, metrics = classification(problem.apply)
    batch_size = min(options.batch_size or size, size)

    def batch(data: Batch, key: jax.Array) -> Batch:
        if batch_size == size:
            return data
        rows = jax.random.randint(key, (batch_size,), 0, size)
        return data[0][rows], data[1][rows]

    def cut(first: int, last: int) -> Batch:
        return held[0][None, first:last], held[1][None, first:last]

    return Task(
        name=problem.name,
        title=f"{problem.title}, "
        + ("full batch" if batch_size == size else f"batch {batch_size}"),
        source="every example generated, labels exact",
        chance=uniform_loss(problem.classes),
        target=target,
        data=train,
        splits=Splits(
            (train[0][None], train[1][None]),
            cut(0, half),
            cut(half, 2 * half),
        ),
        curvature=train,
        init=problem.init,
        loss=loss,
        metrics=metrics,
        batch=batch,
        dimension_numbers=dimension_numbers,
        defaults=defaults,
        details=_details(problem, size, half, batch_size),
    )


def _details(
    problem: Problem, train: int, held: int, batch_size: int
) -> dict[str, Any]:
    return {
        "train examples": train,
        "validation examples": held,
        "test examples": held,
        "parameters": count(jax.eval_shape(problem.init, jax.random.key(0))),
        "batch size": batch_size,
        "curvature": f"training loss on {train} examples, ReLU: of each linear piece",
    }
