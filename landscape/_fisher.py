"""Fisher information of the model's own predictive distribution.

    F = E_x E_{y ~ p(y | x, w)} ∇log p(y | x, w) ∇log p(y | x, w)ᵀ

The gradient of a row's log-likelihood is Jᵀ s with the score s = ∇_z log p(y | z), so

    F = Jᵀ E[s sᵀ] J / M,   E[s sᵀ] = ∇²_z(-log p)

for the usual likelihoods: the exact Fisher matrix is Gauss-Newton. Here labels are
drawn from the model and the expectation over them becomes a mean over samples.

Reference: Martens, *New insights and perspectives on the natural gradient method*,
J. Mach. Learn. Res. 21, 2020.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._gauss_newton import (
    Criterion,
    check_criterion,
    check_rows,
    gauss_newton,
    row_count,
)
from basinax.landscape._sandwich import as_partial, sandwich


def _cross_entropy(
    key: PRNGKeyArray, logits: Float[Array, "*rows C"]
) -> Float[Array, "*rows C"]:
    labels = jax.random.categorical(key, logits)
    classes = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    return (classes == labels[..., None]) - jax.nn.softmax(logits, -1)


def _squared_error(
    key: PRNGKeyArray, outputs: Float[Array, "*rows outputs"]
) -> Float[Array, "*rows outputs"]:
    return jax.random.normal(key, outputs.shape, outputs.dtype)


def _bernoulli(
    key: PRNGKeyArray, logits: Float[Array, "*rows outputs"]
) -> Float[Array, "*rows outputs"]:
    probability = jax.nn.sigmoid(logits)
    return jax.random.bernoulli(key, probability) - probability


_SCORES = {
    "cross_entropy": _cross_entropy,
    "squared_error": _squared_error,
    "bernoulli": _bernoulli,
}


def outer_products(
    scores: Float[Array, "samples *rows outputs"], u: Float[Array, "*rows outputs"]
) -> Float[Array, "*rows outputs"]:
    """Multiply each row by the mean of s sᵀ, and divide by the number of rows."""
    products = jnp.sum(scores * u[None], -1, keepdims=True)
    return jnp.mean(scores * products, 0) / row_count(u)


@functools.cache
def _sampled_by(
    criterion: Criterion, num_samples: int
) -> Callable[[PRNGKeyArray, PyTree], Partial]:
    """Return one function object per choice, which `jax.jit` tells apart."""

    def sampled(key: PRNGKeyArray, outputs: PyTree) -> Partial:
        outputs = check_rows(outputs, criterion)
        keys = jax.random.split(key, num_samples)
        scores = jax.vmap(_SCORES[criterion], in_axes=(0, None))(keys, outputs)
        return Partial(outer_products, scores)

    return sampled


def fisher(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    *,
    criterion: Criterion = "cross_entropy",
    key: PRNGKeyArray | None = None,
    num_samples: int = 1,
    linearize: bool = False,
) -> Partial:
    """Make the Fisher information matrix of a model a function v -> Fv.

    Without a key it is the exact matrix, which equals `gauss_newton`. With a key labels
    are drawn from the model's own predictions, as natural-gradient methods do: an
    unbiased estimate of rank at most rows x samples that costs the same per product.
    The labels depend on the key only, so that an operator is one fixed matrix,
    symmetric and positive semidefinite, whatever vectors it meets.

    The labels of the training set play no role; for those see `empirical_fisher`, which
    is a different matrix and no approximation of this one.

    Args:
        model_fn: called as `model_fn(params, inputs)`; must allow forward-mode
            differentiation. Rows are all axes of the outputs but the last.
        params: tree of real floating-point arrays.
        inputs: one tree that the model takes; several inputs go in a tuple or dict.
        criterion: the likelihood. "cross_entropy" for a softmax over the last axis,
            "squared_error" for a Gaussian of unit variance around each output,
            "bernoulli" for a sigmoid of each output.
        key: random key of the labels, or None for the exact matrix. In
            `over_batches` give every batch a key of its own.
        num_samples: labels per row. The relative error falls with its square root;
            memory grows by one array of the size of the outputs each.
        linearize: evaluate what does not depend on v now and keep it.

    Returns:
        A function from a tree shaped like `params` to another; see `hessian`.

    Raises:
        ValueError: as `gauss_newton`, for less than one sample, or for several samples
            without a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import dense, fisher
        >>> def model(w, x):
        ...     return x[:, None] * w[None]
        >>> w, x = jnp.zeros(2), jnp.array([1.0, 3.0])
        >>> dense(fisher(model, w, x), w).tolist()
        [[1.25, -1.25], [-1.25, 1.25]]
        >>> dense(fisher(model, w, x, key=jax.random.key(0)), w).tolist()
        [[1.25, -1.25], [-1.25, 1.25]]

    Reference:
        Martens (2020), section 9.
    """
    check_criterion(criterion)
    if num_samples < 1 or (key is None and num_samples > 1):
        raise ValueError(
            "num_samples must be at least 1, and more than 1 needs a key to draw labels"
            f" with; got num_samples={num_samples}, key={key}."
        )
    if key is None:
        return gauss_newton(model_fn, criterion, params, inputs, linearize=linearize)
    middle = Partial(_sampled_by(criterion, num_samples), key)
    return sandwich(as_partial(model_fn), middle, params, (inputs,), linearize)
