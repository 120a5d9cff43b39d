"""SAM and ASAM as links of an optax chain.

The gradients that come in are the clean ones, ∇L(w); the link climbs along them to
w + ε and hands on ∇L(w + ε), for which it is given the loss.  See `_sam` for equations
and papers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from basinax.optimizers._ascent import check_radius
from basinax.optimizers._sam import gradient_ahead, perturbation


class SAMState(NamedTuple):
    """State of `sam`.

    Attributes:
        count: number of updates so far, int32 scalar; the argument of the radius's
            schedule.
    """

    count: Int[Array, ""]


def sam(
    rho: optax.ScalarOrSchedule,
    *,
    adaptive: bool = False,
    eta: Any = 0.0,
    mask: Any = None,
    unscaled: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by that at the worst point nearby.

    Put it first in a chain, and hand the loss to `update` as for optax's line searches:

        tx = optax.chain(sam(0.05), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss_fn(p, batch)
        )

    The incoming gradients are reused for the ascent, so that a step costs one gradient
    more than without; the parameters that the loop holds are always the clean ones.
    Updates are bit for bit those of the same optimizer on `sam_value_and_grad`, which
    suits auxiliary outputs, microbatches and gradients over several devices better.

    What stands in front steers the ascent only: clipping there does not bound what
    comes out.  Around it:

    - `optax.MultiSteps`: the ascent follows the accumulated gradient and the descent
      takes the last call's `value_fn`, which should therefore be the loss of the whole
      batch; the extra gradient is computed in every call.  `optax.chain(sam(rho),
      MultiSteps(...).gradient_transformation())` accumulates the gradients of SAM on
      every microbatch instead (m-sharpness), and for SAM on the whole batch without
      its memory see `sam_value_and_grad`.
    - `optax.masked` and `optax.partition`: `value_fn` is called with `optax.MaskedNode`
      in place of the hidden parameters, which most losses refuse.  Put `sam` in front
      and choose leaves with `mask`.
    - `optax.inject_hyperparams`: list callables `mask` and `unscaled` in `static_args`,
      or they are taken for schedules.

    Args:
        rho: radius ρ >= 0 in the units of the parameters (0.05 in the SAM paper), or
            relative to them if adaptive (0.5); a number or a schedule of the step.
            0 gives the plain gradient.
        adaptive: whether A = |w| + η rather than 1.
        eta: η >= 0 (0.01 in the ASAM paper).  With 0, zero weights stay put.
        mask: tree (prefix) of booleans, or callable of the parameters returning one;
            leaves marked False stay put and do not count in the norm.  They still get
            their gradient at w + ε.
        unscaled: likewise; leaves marked True have A = 1 although `adaptive`, as the
            biases have in the ASAM authors' code.

    Returns:
        A transformation with `SAMState` that needs `params` and `value_fn`.  Updates
        keep the dtype of the incoming gradients; half-precision parameters reach
        `value_fn` in float32, see `sam_value_and_grad`.  A zero gradient gives ε = 0;
        one that is not finite gives NaN.

    Raises:
        TypeError: `rho` is no number; a parameter is not real floating point.
        ValueError: `rho` or `eta` is negative or NaN, `eta` is set without `adaptive`,
            `mask` or `unscaled` does not fit; in `update`, `params` or `value_fn` is
            missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from basinax.optimizers import sam
        >>> loss_fn = lambda w: jnp.sum(w**2)
        >>> params = jnp.array([3.0, 4.0])
        >>> tx = optax.chain(sam(2.5), optax.sgd(1.0))
        >>> updates, _ = tx.update(
        ...     jax.grad(loss_fn)(params), tx.init(params), params, value_fn=loss_fn
        ... )
        >>> updates.tolist()  # minus the gradient at (4.5, 6)
        [-9.0, -12.0]

    Reference:
        arXiv:2010.01412, equations 2 and 3; arXiv:2102.11600, algorithm 1.
    """
    if not callable(rho):
        check_radius(rho)
    perturb = perturbation(adaptive, eta, mask, unscaled)

    def init_fn(params: optax.Params) -> SAMState:
        del params
        return SAMState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SAMState]:
        del extra_args
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"sam climbs the loss from the params, but {missing} is missing: call "
                "tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, batch))."
            )
        radius = rho(state.count) if callable(rho) else rho
        step = perturb(updates, params, radius)
        gradient = gradient_ahead(jax.grad(value_fn), updates, params, step)
        return gradient, SAMState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def asam(
    rho: optax.ScalarOrSchedule,
    *,
    eta: Any = 0.0,
    mask: Any = None,
    unscaled: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Return `sam` with `adaptive=True`; see there.

    The authors' code has η = 0.01 and leaves biases unscaled: `asam(0.5, eta=0.01,
    unscaled=lambda params: jax.tree.map(lambda w: w.ndim < 2, params))`.

    Args:
        rho: radius, relative to the weights; a number or a schedule of the step.
        eta: added to |w|, as in `sam`.
        mask: leaves to perturb, as in `sam`.
        unscaled: leaves with A = 1, as in `sam`.

    Returns:
        The transformation.

    Example:
        >>> import optax
        >>> from basinax.optimizers import asam
        >>> tx = optax.chain(asam(0.5, eta=0.01), optax.adamw(1e-3))
    """
    return sam(rho, adaptive=True, eta=eta, mask=mask, unscaled=unscaled)
