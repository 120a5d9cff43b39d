"""Curvature weighed by the weights: Fisher-Rao norm and relative flatness.

With F a Fisher or Gauss-Newton matrix and H_{s,u} the block of the Hessian that couples
the incoming weights of neurons s and u of one layer,

    Fisher-Rao    ‖w‖²_fr = wᵀ F w,
    relative flatness   κ = Σ_{s,u} ⟨w_s, w_u⟩ tr H_{s,u}.

Neither changes if two consecutive layers of a ReLU net are scaled against each other.
For random signs z over the inputs and ξ over the rows of W, the rank-one direction
V = z (ξᵀ W) has E[⟨V, H V⟩] = κ, at one product per probe.

References: Liang, Poggio, Rakhlin, Stokes, *Fisher-Rao metric, geometry, and complexity
of neural networks* (AISTATS 2019, arXiv:1711.01530). Petzka, Kamp, Adilova,
Sminchisescu, Boley, *Relative flatness and generalization* (NeurIPS 2021,
arXiv:2001.00939).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._probes import Estimate, mean, on_host
from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    check_vector,
    inner,
    widen,
)


def fisher_rao_norm(
    operator: Callable[[PyTree], PyTree], params: PyTree
) -> Float[Array, ""]:
    """Compute the squared Fisher-Rao norm wᵀ F w with one product.

    It bounds capacity without depending on the scale of single layers. The operator
    decides which Fisher matrix is meant: `gauss_newton` with "cross_entropy" for the
    one of the model's own distribution, `empirical_fisher` for observed labels; in a
    bias-free ReLU net of depth l the latter gives l² E[⟨∂ℓ/∂z, z⟩²], z the logits.

    Args:
        operator: symmetric linear function on trees shaped like `params`.
        params: tree of weights w.

    Returns:
        wᵀ F w, not its root, in at least float32.

    Raises:
        ValueError: if `params` is empty or not real floating point, or the operator
            returns another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import fisher_rao_norm, gauss_newton
        >>> x, w = jnp.array([[1.0], [3.0]]), jnp.array([[2.0]])
        >>> fisher = gauss_newton(lambda w, x: x @ w, "squared_error", w, x)
        >>> float(fisher_rao_norm(fisher, w))  # mean of x² = 5, times w²
        20.0

    Reference:
        arXiv:1711.01530.
    """
    check_vector(params, "params")
    product = operator(params)
    check_same(product, params, "the operator's result")
    return inner(params, product)


def relative_flatness(
    operator: Callable[[PyTree], PyTree],
    params: PyTree,
    layer: Callable[[PyTree], Array],
    *,
    num_probes: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Estimate:
    """Compute the relative flatness of one layer, exactly or from random probes.

    Small values mean flat. The paper relates it to the generalisation gap for the
    layer that feeds a classifier, usually the last or the one before.

    The loop runs in Python over products.

    Args:
        operator: Hessian on trees shaped like `params`, from `hessian`.
        params: tree of weights.
        layer: picks the layer's kernel out of a tree, for instance
            `lambda params: params["dense"]["kernel"]`. Neurons are on its last axis, as
            in Flax; all other axes are inputs.
        num_probes: number of random probes, at one product each; None for the exact
            value at one product per weight of the layer at most.
        key: random key, needed with `num_probes`.

    Returns:
        The estimate; its standard error is 0 for the exact value.

    Raises:
        ValueError: if `layer` does not pick one array with at least two axes, probes
            come without key or are fewer than one, `params` is empty, traced or not
            real floating point, or the operator returns another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import hessian, relative_flatness
        >>> params = {"w": jnp.array([[3.0, 4.0]])}
        >>> operator = hessian(lambda p: 0.5 * jnp.sum(p["w"] ** 2), params)
        >>> float(relative_flatness(operator, params, lambda p: p["w"]).value)
        25.0

    Reference:
        arXiv:2001.00939.
    """
    check_vector(params, "params")
    check_concrete(params, "relative_flatness")
    leaves, treedef = jax.tree.flatten(params)
    index = _index_of(layer, treedef)
    kernel = leaves[index]
    if jnp.ndim(kernel) < 2:
        raise ValueError(
            "layer must pick a kernel with inputs and neurons on different axes, got "
            f"shape {jnp.shape(kernel)}."
        )
    if num_probes is None:
        directions = _exact_directions(kernel)
    elif num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}.")
    elif key is None:
        raise ValueError("Random probes need key=jax.random.key(...).")
    else:
        keys = (jax.random.fold_in(key, probe) for probe in range(num_probes))
        directions = (_random_direction(kernel, probe) for probe in keys)
    zeros = [jnp.zeros_like(leaf) for leaf in leaves]
    samples = []
    for direction in directions:
        vector = treedef.unflatten([*zeros[:index], direction, *zeros[index + 1 :]])
        product = operator(vector)
        check_same(product, params, "the operator's result")
        samples.append(inner(direction, jax.tree.leaves(product)[index]))
    values = on_host(samples)
    if num_probes is None:
        total = jnp.asarray(values.sum(), samples[0].dtype)
        return Estimate(total, jnp.zeros_like(total))
    return mean(values, samples[0].dtype)


def _index_of(layer: Callable[[PyTree], Any], treedef: Any) -> int:
    """Return which leaf a function picks, by running it on a tree of numbers."""
    picked = layer(treedef.unflatten(range(treedef.num_leaves)))
    if not isinstance(picked, int):
        raise ValueError(
            "layer must return one array of params, as in lambda params: "
            f"params['kernel']; it returned {type(picked).__name__}."
        )
    return picked


def _exact_directions(kernel: Array) -> Iterator[Array]:
    """Yield e_a rᵀ for every input a and row r of the R in W = Q R.

    Only WᵀW = RᵀR matters, and R has no more rows than neurons.
    """
    matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
    for a, row in itertools.product(range(len(matrix)), np.linalg.qr(matrix, "r")):
        direction = np.zeros_like(matrix)
        direction[a] = row
        yield jnp.asarray(direction.reshape(kernel.shape), kernel.dtype)


@jax.jit
def _random_direction(kernel: Array, key: PRNGKeyArray) -> Array:
    wide = widen(kernel)
    inputs = kernel.shape[:-1]
    z, xi = jax.random.rademacher(key, (2, *inputs), wide.dtype)
    row = jnp.sum(xi[..., None] * wide, tuple(range(len(inputs))), keepdims=True)
    return (z[..., None] * row).astype(kernel.dtype)
