"""Edges of stability: the sharpness beyond which a step size diverges.

Near a minimum with largest Hessian eigenvalue λ the methods are stable for

    gradient descent, rate η         λ < 2 / η
    heavy ball, momentum b           λ < (2 + 2 b) / η
    Nesterov                         λ < (2 + 2 b) / ((1 + 2 b) η)
    averaged gradient, as in Adam    λ < (2 + 2 b) / ((1 - b) η)
    SAM of radius rho                λ + rho λ² / ‖g‖ < 2 / η

and full-batch training drives λ up to that edge and hovers there. For Adam λ is the
largest eigenvalue of D^(-1/2) H D^(-1/2) with D = √v̂ + ε, the divisor of its step.

References: Cohen, Kaur, Li, Kolter, Talwalkar, *Gradient descent on neural networks
typically occurs at the edge of stability* (ICLR 2021, arXiv:2103.00065). Cohen et al.,
*Adaptive gradient methods at the edge of stability* (2022, arXiv:2207.14484). Long and
Bartlett, *Sharpness-aware minimization and the edge of stability* (JMLR 2024,
arXiv:2309.12488).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from basinax.landscape._sandwich import as_partial
from basinax.landscape._vectors import check_same, widen


def edge_of_stability(
    lambda_max: ArrayLike,
    learning_rate: ArrayLike,
    momentum: ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    ema: bool = False,
) -> Float[Array, "..."]:
    """Divide the sharpness by the largest one at which training is stable.

    Above 1 a quadratic of that curvature diverges. Full-batch training rises to about 1
    and stays there, on squared error within a percent; cross-entropy leaves the edge
    again late in training, when the loss and its curvature fall together. Small batches
    keep it below.

    Args:
        lambda_max: largest eigenvalue of the Hessian, for Adam of `preconditioned`.
        learning_rate: step size η.
        momentum: coefficient b; for Adam its b1.
        nesterov: whether the momentum is Nesterov's.
        ema: whether the momentum is an average, b m + (1 - b) g, as in Adam, rather
            than a sum, b m + g, as in `optax.sgd`.

    Returns:
        The ratio, negative for a negative eigenvalue. All arguments broadcast.

    Example:
        >>> from basinax.landscape import edge_of_stability
        >>> float(edge_of_stability(10.0, 0.2))  # 2 / 0.2 = 10
        1.0
        >>> round(float(edge_of_stability(38.0, 1.0, 0.9, ema=True)), 4)
        1.0

    Reference:
        arXiv:2103.00065, arXiv:2207.14484.
    """
    b, rate = jnp.asarray(momentum), jnp.asarray(learning_rate)
    rate = rate * (1 - b) if ema else rate
    rate = rate * (1 + 2 * b) if nesterov else rate
    return jnp.asarray(lambda_max) * rate / (2 + 2 * b)


def sam_edge(
    gradient_norm: ArrayLike, learning_rate: ArrayLike, rho: ArrayLike
) -> Float[Array, "..."]:
    """Compute the sharpness at which SAM stops being stable.

    The positive root of λ + rho λ² / ‖g‖ = 2 / η: the edge 2 / η of gradient descent
    for rho = 0, and ever lower as the gradient vanishes. Divide `lambda_max` by it.

    Args:
        gradient_norm: norm ‖g‖ of the gradient of the loss at the weights.
        learning_rate: step size η.
        rho: radius of SAM.

    Returns:
        The largest stable λ. All arguments broadcast.

    Example:
        >>> from basinax.landscape import sam_edge
        >>> float(sam_edge(1.0, 0.5, 0.0)), float(sam_edge(1.0, 1 / 3, 1.0))
        (4.0, 2.0)

        In the second case 2 + 2² = 2 / η.

    Reference:
        arXiv:2309.12488.
    """
    rate, rho = jnp.asarray(learning_rate), jnp.asarray(rho)
    ratio = jnp.where(rho > 0, 8 * rho / (rate * jnp.asarray(gradient_norm)), 0)
    # The root multiplied by its conjugate, so that nothing cancels for small rho.
    return 4 / (rate * (1 + jnp.sqrt(1 + ratio)))


def preconditioned(operator: Callable[[PyTree], PyTree], diagonal: PyTree) -> Partial:
    """Make D^(-1/2) C D^(-1/2) of an operator C and a positive diagonal D.

    It has the eigenvalues of D⁻¹ C, which decide the stability of a step D⁻¹ g, but is
    symmetric as `eigenpairs` needs.

    Args:
        operator: symmetric linear function on trees like the parameters, such as
            `hessian(...)`.
        diagonal: tree of positive numbers shaped like the parameters, for Adam from
            `adam_diagonal`.

    Returns:
        A function that can be passed through `jax.jit` as an argument if `operator`
        can. Zeros in `diagonal` make its results infinite or NaN.

    Raises:
        ValueError: from the operator if its argument is not shaped like `diagonal`.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import dense, hessian, preconditioned
        >>> w = jnp.ones(2)
        >>> curvature = hessian(lambda w: jnp.sum(jnp.array([4.0, 9.0]) * w**2), w)
        >>> dense(preconditioned(curvature, jnp.array([4.0, 9.0])), w).tolist()
        [[2.0, 0.0], [0.0, 2.0]]

    Reference:
        arXiv:2207.14484.
    """
    return Partial(_preconditioned, as_partial(operator), diagonal)


@jax.jit
def _preconditioned(operator: Partial, diagonal: PyTree, vector: PyTree) -> PyTree:
    check_same(vector, diagonal, "the vector")
    root = jax.tree.map(jnp.sqrt, widen(diagonal))
    inside = jax.tree.map(jnp.divide, widen(vector), root)
    product = operator(optax.tree.cast_like(inside, vector))
    return jax.tree.map(jnp.divide, widen(product), root)


def adam_diagonal(
    opt_state: PyTree, grads: PyTree, *, b2: float = 0.999, eps: float = 1e-8
) -> PyTree:
    """Compute the divisor √v̂ + ε that the next Adam step will use.

    Args:
        opt_state: state of an optimizer that contains one `optax.scale_by_adam`, from
            before the step.
        grads: gradient of the step.
        b2: decay of the second moment, as given to Adam.
        eps: ε, as given to Adam.

    Returns:
        A tree shaped like the parameters, in at least float32.

    Raises:
        ValueError: if `opt_state` holds no `ScaleByAdamState`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.landscape import adam_diagonal
        >>> tx, w, g = optax.adam(0.1), jnp.ones(2), jnp.array([3.0, -4.0])
        >>> [round(float(d), 3) for d in adam_diagonal(tx.init(w), g)]
        [3.0, 4.0]
    """
    adam: Any = optax.tree.get(opt_state, "ScaleByAdamState")
    if adam is None:
        raise ValueError(
            "opt_state holds no ScaleByAdamState; pass the state of an optimizer made "
            "with optax.adam, optax.adamw or optax.scale_by_adam."
        )
    count = adam.count + 1

    def divisor(g: Array, second: Array) -> Array:
        second = b2 * second + (1 - b2) * g**2
        return jnp.sqrt(second / (1 - jnp.asarray(b2, second.dtype) ** count)) + eps

    return jax.tree.map(divisor, widen(grads), widen(adam.nu))
