"""Generalised Gauss-Newton operator G = Jᵀ (∇²_z ℓ) J, z the outputs of the model.

It is the part of the Hessian that remains if the model is replaced by its
linearisation; what is dropped is Σ_z (∂ℓ/∂z) ∇²z. For M rows of outputs the usual
losses have

    softmax cross-entropy  ∇²_z ℓ u = (p ⊙ u - p ⟨p, u⟩) / M,   p = softmax(z)
    squared error          ∇²_z ℓ u = u / M
    Bernoulli              ∇²_z ℓ u = s (1 - s) u / M,          s = sigmoid(z)

row by row, which takes two arrays of the size of z; differentiating the loss twice
takes three, and not all losses allow it.

Reference: Schraudolph, *Fast curvature matrix-vector products for second-order
gradient descent*, Neural Comput. 14, 2002.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._sandwich import as_partial, elementwise, sandwich, scalar
from basinax.landscape._vectors import widen

Criterion = Literal["cross_entropy", "squared_error", "bernoulli"]


def softmax_hessian(
    p: Float[Array, "*rows C"], u: Float[Array, "*rows C"]
) -> Float[Array, "*rows C"]:
    """Multiply by the Hessian of mean cross-entropy at probabilities p."""
    return p * (u - jnp.sum(p * u, -1, keepdims=True)) / row_count(p)


def row_count(outputs: Float[Array, "*rows outputs"]) -> int:
    """Count the rows that a named criterion averages over."""
    return math.prod(outputs.shape[:-1])


def _cross_entropy(outputs: PyTree) -> Partial:
    outputs = check_rows(outputs, "cross_entropy")
    return Partial(softmax_hessian, jax.nn.softmax(outputs, -1))


def _squared_error(outputs: PyTree) -> Partial:
    outputs = check_rows(outputs, "squared_error")
    weight = jnp.asarray(1 / row_count(outputs), outputs.dtype)
    return Partial(elementwise, weight)


def _bernoulli(outputs: PyTree) -> Partial:
    outputs = check_rows(outputs, "bernoulli")
    # 1 - s would round to zero for the confident outputs.
    variance = jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)
    return Partial(elementwise, variance / row_count(outputs))


def _by_differentiation(criterion: Partial, targets: PyTree, outputs: PyTree) -> Any:
    def loss(z: PyTree) -> Float[Array, ""]:
        return scalar(criterion(z, targets), "criterion")

    return jax.linearize(jax.grad(loss), widen(outputs))[1]


_HESSIANS = {
    "cross_entropy": _cross_entropy,
    "squared_error": _squared_error,
    "bernoulli": _bernoulli,
}


def check_criterion(criterion: Any, otherwise: str = "") -> None:
    """Raise ValueError unless a criterion is one of the named ones."""
    if criterion not in get_args(Criterion):
        known = ", ".join(get_args(Criterion))
        raise ValueError(f"criterion={criterion!r} is unknown; use {known}{otherwise}.")


def check_rows(outputs: PyTree, criterion: str) -> Float[Array, "*rows outputs"]:
    """Return outputs in at least float32 if a named criterion applies to them."""
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0] is not outputs:
        raise ValueError(
            f"criterion={criterion!r} needs a model that returns one array, got "
            f"{jax.tree.structure(outputs)}; for other outputs pass a function "
            "criterion(outputs, targets)."
        )
    if not outputs.size:
        raise ValueError(f"the outputs are empty, of shape {outputs.shape}.")
    # A vector of logits can only be one example; a vector of predictions is more
    # often many examples than one, and the mean is over examples.
    if outputs.ndim < 1 + (criterion != "cross_entropy"):
        raise ValueError(
            f"criterion={criterion!r} needs outputs of shape (rows, outputs per row), "
            f"got {outputs.shape}; for one output per row return outputs[:, None]."
        )
    return widen(outputs)


def gauss_newton(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    criterion: Criterion | Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree,
    inputs: PyTree,
    targets: PyTree = None,
    *,
    linearize: bool = False,
) -> Partial:
    """Make the Gauss-Newton matrix of a loss criterion(model(params)) a function.

    For a convex criterion it is positive semidefinite, has no negative tail, and its
    large eigenvalues resemble those of the Hessian. A product costs about 1.5 gradients
    and two arrays of the size of the outputs, also with a vocabulary of 50,000. As with
    `hessian`, new parameters and data of the same shapes reuse the compiled code as
    long as the functions are the same objects.

    The named criteria average over all rows of the outputs, that is over all axes but
    the last: examples, or sequences and positions. Their Hessians do not depend on the
    targets, which therefore may be left out.

    - "cross_entropy": of the softmax over the last axis with integer labels;
    - "squared_error": half the squared error, summed over the last axis;
    - "bernoulli": of the sigmoid of each output, summed over the last axis.

    The output Hessian is evaluated in at least float32, the passes through the model
    in the dtypes of `params`.

    Args:
        model_fn: called as `model_fn(params, inputs)`; must allow forward-mode
            differentiation, which excludes `jax.custom_vjp`.
        criterion: one of the names, or a function `criterion(outputs, targets)` that
            returns a scalar, such as a mean over those tokens that are not padding.
            It is differentiated twice. Arrays it needs belong in `targets`.
        params: tree of real floating-point arrays.
        inputs: one tree that the model takes; several inputs go in a tuple or dict.
        targets: one tree that a criterion function takes.
        linearize: evaluate what does not depend on v now and keep it. Products then
            cost 1.0 to 1.3 gradients, for memory in proportion to the activations.

    Returns:
        A function from a tree shaped like `params` to another; see `hessian`.

    Raises:
        ValueError: for an unknown criterion or parameters that are empty or not real
            floating point; from the operator if its argument is not shaped like
            `params`, if the outputs do not fit the criterion, or if a criterion
            function does not return a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import dense, gauss_newton
        >>> def model(w, x):
        ...     return x @ w
        >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [3.0, 2.0]])
        >>> dense(gauss_newton(model, "squared_error", w, x), w).tolist()  # xᵀx / 2
        [[5.0, 3.0], [3.0, 2.0]]

    Reference:
        Schraudolph (2002).
    """
    if callable(criterion):
        middle = Partial(_by_differentiation, as_partial(criterion), targets)
    else:
        check_criterion(criterion, ", or pass a function criterion(outputs, targets)")
        middle = Partial(_HESSIANS[criterion])
    return sandwich(as_partial(model_fn), middle, params, (inputs,), linearize)
