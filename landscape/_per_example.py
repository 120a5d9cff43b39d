"""Curvature from per-example gradients g_i, none of which is ever stored.

    empirical Fisher   E v = 1/N Σ_i g_i ⟨g_i, v⟩
    covariance         S v = 1/(N - 1) Σ_i (g_i - ḡ) ⟨g_i - ḡ, v⟩

Let J have the rows g_iᵀ, the Jacobian of the N losses. Then a = J v are N numbers, and
E v = Jᵀ a / N, S v = Jᵀ (a - ā) / (N - 1): the covariance needs no mean gradient, and
nothing of the size of the parameters cancels.

Reference: Kunstner, Balles and Hennig, *Limitations of the empirical Fisher
approximation for natural gradient descent*, NeurIPS 2019.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._sandwich import as_partial, elementwise, sandwich, scalar
from basinax.landscape._vectors import wide_dtype


@functools.cache
def _losses_in_chunks(chunk_size: int | None) -> Callable[..., Float[Array, "N"]]:
    """Return one function object per chunk size, which `jax.jit` tells apart."""

    def losses(loss_fn: Partial, params: PyTree, *batch: PyTree) -> Float[Array, "N"]:
        def one(example: tuple[PyTree, ...]) -> Float[Array, ""]:
            return scalar(loss_fn(params, *example), "per_example_loss_fn")

        if chunk_size is None:
            return jax.vmap(one)(batch)
        # Otherwise the activations of all chunks would be kept for the way back.
        return jax.lax.map(jax.checkpoint(one), batch, batch_size=chunk_size)

    return losses


def _share(losses: Float[Array, "N"], divisor: int) -> Float[Array, ""]:
    return jnp.asarray(1 / divisor, wide_dtype(losses))


def centre(share: Float[Array, ""], a: Float[Array, "N"]) -> Float[Array, "N"]:
    """Subtract the mean and scale."""
    # A rounded mean leaves a sum that Jᵀ multiplies by the mean gradient, which may be
    # far longer than the deviations; the mean of what is left removes it.
    for _ in range(2):
        a = a - jnp.mean(a, keepdims=True)
    return share * a


def _mean(losses: Float[Array, "N"]) -> Partial:
    return Partial(elementwise, _share(losses, len(losses)))


def _biased(losses: Float[Array, "N"]) -> Partial:
    return Partial(centre, _share(losses, len(losses)))


def _unbiased(losses: Float[Array, "N"]) -> Partial:
    return Partial(centre, _share(losses, len(losses) - 1))


def check_batch(
    batch: tuple[PyTree, ...], chunk_size: int | None, smallest: int
) -> None:
    """Raise ValueError for examples that cannot be taken apart.

    Args:
        batch: arguments of the loss after the parameters, with a leading axis each.
        chunk_size: number of examples to work on at a time, or None.
        smallest: least number of examples.
    """
    if type(batch) not in (tuple, list):
        raise ValueError(
            "batch must be a tuple of the arguments of per_example_loss_fn after the "
            f"first, such as (inputs, labels), each with a leading axis of examples; "
            f"got a {type(batch).__name__}."
        )
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or () in counts or min(counts)[0] < smallest:
        raise ValueError(
            "the arrays of a batch must have one leading axis in common, of at least "
            f"{smallest} examples; got shapes {jax.tree.map(jnp.shape, batch)}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


def empirical_fisher(
    per_example_loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    batch: tuple[PyTree, ...],
    *,
    chunk_size: int | None = None,
    linearize: bool = False,
) -> Partial:
    """Make the mean outer product of per-example gradients a function v -> Ev.

    It is cheap, positive semidefinite and of rank at most N, and it vanishes as the
    training set is interpolated, unlike the Fisher information of the model (`fisher`),
    which it does not approximate in general. Its trace is the mean squared gradient
    norm. A product costs about as much as one of `gauss_newton`.

    Args:
        per_example_loss_fn: scalar loss of one example, called as
            `per_example_loss_fn(params, *example)` where the arguments have lost the
            leading axis of `batch`. Must allow forward-mode differentiation.
        params: tree of real floating-point arrays.
        batch: tuple of trees of arrays with a common leading axis of N examples.
        chunk_size: number of examples to hold activations for at a time; None for all.
            Chunks are evaluated in a compiled loop, for a second forward pass. XLA runs
            convolutions inside loops some 30 times slower on CPU; there, and for
            examples that are sharded over devices, average smaller batches by
            `over_batches` instead.
        linearize: evaluate what does not depend on v now and keep it; with chunks
            there is nothing to keep.

    Returns:
        A function from a tree shaped like `params` to another; see `hessian`.

    Raises:
        ValueError: if the batch is no tuple or its leading axes differ, for parameters
            that are empty or not real floating point; from the operator if the loss of
            an example is not a scalar or its argument is not shaped like `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import dense, empirical_fisher
        >>> def loss(w, x, y):
        ...     return 0.5 * (jnp.dot(w, x) - y) ** 2
        >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([1.0, 4.0])
        >>> dense(empirical_fisher(loss, w, (x, y)), w).tolist()
        [[0.5, 0.0], [0.0, 8.0]]

    Reference:
        Kunstner, Balles and Hennig (2019).
    """
    check_batch(batch, chunk_size, smallest=1)
    losses = Partial(_losses_in_chunks(chunk_size), as_partial(per_example_loss_fn))
    return sandwich(losses, Partial(_mean), params, tuple(batch), linearize)


def gradient_covariance(
    per_example_loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    batch: tuple[PyTree, ...],
    *,
    unbiased: bool = True,
    chunk_size: int | None = None,
    linearize: bool = False,
) -> Partial:
    """Make the covariance of per-example gradients a function v -> Sv.

    This is the noise of stochastic gradients: a batch of B examples drawn with
    replacement has a gradient of covariance S / B. Its trace over the squared gradient
    norm is the simple gradient noise scale. A product costs as much as one of
    `empirical_fisher`.

    Args:
        per_example_loss_fn: as in `empirical_fisher`.
        params: as in `empirical_fisher`.
        batch: as in `empirical_fisher`.
        unbiased: divide by N - 1, which estimates the covariance of the distribution
            that the examples come from; False divides by N, the covariance within the
            batch.
        chunk_size: as in `empirical_fisher`, except that the mean over batches is no
            substitute: each would subtract its own mean gradient.
        linearize: as in `empirical_fisher`.

    Returns:
        A function from a tree shaped like `params` to another; see `hessian`.

    Raises:
        ValueError: as in `empirical_fisher`, and for fewer than two examples if
            `unbiased`.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_covariance
        >>> def loss(w, x):  # whose gradient is x
        ...     return w * x
        >>> x = jnp.array([2.0, 4.0, 6.0])
        >>> float(gradient_covariance(loss, jnp.array(0.0), (x,))(jnp.array(1.0)))
        4.0
    """
    check_batch(batch, chunk_size, smallest=2 if unbiased else 1)
    losses = Partial(_losses_in_chunks(chunk_size), as_partial(per_example_loss_fn))
    middle = Partial(_unbiased if unbiased else _biased)
    return sandwich(losses, middle, params, tuple(batch), linearize)
