"""Micro-benchmark of the curvature operators: a product in units of one gradient.

The unit is the gradient of the same loss on the same batch, timed in turn with the
products, so the ratios carry over from machine to machine better than the times.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks._digits import read_embedded
from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.landscape import (
    empirical_fisher,
    fisher,
    gauss_newton,
    gradient_covariance,
    hessian,
)

REFERENCE = "gradient"
EXAMPLES = {"perceptron": 1797, "convolutional": 256}

Params = dict[str, jax.Array]
Model = Callable[[Params, jax.Array], jax.Array]


def perceptron(params: Params, x: jax.Array) -> jax.Array:
    """Apply 64-256-256-10 with tanh to rows of pixels."""
    for layer in ("0", "1"):
        x = jnp.tanh(x @ params["w" + layer] + params["b" + layer][None])
    return x @ params["w2"] + params["b2"][None]


def convolutional(params: Params, x: jax.Array) -> jax.Array:
    """Apply two 3x3 convolutions, 2x2 means and two dense layers with ReLU."""
    x = x.reshape(-1, 8, 8, 1)
    for layer in ("0", "1"):
        kernel, order = params["w" + layer], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=order
        )
        x = jax.nn.relu(x + params["b" + layer][None, None, None])
    x = x.reshape(-1, 4, 2, 4, 2, x.shape[-1]).mean((2, 4)).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["w2"] + params["b2"][None])
    return x @ params["w3"] + params["b3"][None]


SHAPES = {
    "perceptron": ((64, 256), (256, 256), (256, 10)),
    "convolutional": ((3, 3, 1, 16), (3, 3, 16, 32), (512, 128), (128, 10)),
}
MODELS: dict[str, Model] = {"perceptron": perceptron, "convolutional": convolutional}


def initial(name: str, seed: int = 0) -> Params:
    """Draw weights of unit gain."""
    rng = np.random.default_rng(seed)
    params = {}
    for layer, shape in enumerate(SHAPES[name]):
        scale = 1 / np.sqrt(np.prod(shape[:-1]))
        params[f"w{layer}"] = jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        params[f"b{layer}"] = jnp.zeros(shape[-1])
    return params


def operators(
    model: Model, params: Params, x: jax.Array, y: jax.Array
) -> dict[str, Callable[[Params], Params]]:
    """Make every operator of cross-entropy, fresh and with a kept linearisation."""
    rows_loss = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(rows_loss(model(params, x), y))

    def one(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return rows_loss(model(params, x[None]), y[None])[0]

    key = jax.random.key(0)
    made: dict[str, Callable[[Params], Params]] = {}
    for kept in (False, True):
        suffix = ", kept" if kept else ""
        made |= {
            f"hessian{suffix}": hessian(loss, params, x, y, linearize=kept),
            f"gauss_newton{suffix}": gauss_newton(
                model, "cross_entropy", params, x, linearize=kept
            ),
            f"fisher, sampled{suffix}": fisher(
                model, params, x, key=key, linearize=kept
            ),
            f"empirical_fisher{suffix}": empirical_fisher(
                one, params, (x, y), linearize=kept
            ),
            f"gradient_covariance{suffix}": gradient_covariance(
                one, params, (x, y), linearize=kept
            ),
        }
    gradient = jax.jit(jax.grad(loss))
    return {REFERENCE: lambda _: gradient(params, x, y)} | made


def measure_products(
    rounds: int = 15, examples: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Time every operator on two networks; one row per operator.

    Args:
      rounds: interleaved timings per operator.
      examples: digits per network.
    """
    parts = read_embedded()
    inputs, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows = []
    for name, count in (examples or EXAMPLES).items():
        params = initial(name)
        x, y = jnp.asarray(inputs[:count]), jnp.asarray(labels[:count])
        calls = {
            kind: lambda operator=operator, params=params: operator(params)
            for kind, operator in operators(MODELS[name], params, x, y).items()
        }
        times = interleaved_times(calls, rounds=rounds)
        for kind, found in times.items():
            pairs = [a / b for a, b in zip(found, times[REFERENCE], strict=True)]
            rows.append(
                {
                    "network": name,
                    "examples": count,
                    "operator": kind,
                    "milliseconds": 1e3 * median(found),
                    "ratio": median(pairs),
                    "fastest_ratio": min(found) / min(times[REFERENCE]),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Tabulate products against the gradient of the same loss."""
    groups = itertools.groupby(rows, lambda row: (row["network"], row["examples"]))
    networks = ", ".join(f"{name} on {count} digits" for (name, count), _ in groups)
    return Table(
        "Curvature products in units of their own gradient",
        ("network", "operator", "ms", "gradients", "fastest"),
        tuple(
            (
                row["network"],
                row["operator"],
                short(row["milliseconds"]),
                f"{row['ratio']:.2f}×",
                f"{row['fastest_ratio']:.2f}×",
            )
            for row in rows
        ),
        (
            f"{networks[0].upper()}{networks[1:]}; float32. Medians of {rounds} "
            "interleaved rounds and the ratio of the fastest. Kept: what does not "
            "depend on the vector was evaluated beforehand.",
        ),
    )
