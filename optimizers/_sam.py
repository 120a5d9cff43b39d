"""Sharpness-aware minimization: the gradient from the worst point nearby.

    g_SAM = ∇L(w + ε),    ε = ρ ∇L(w) / ‖∇L(w)‖₂,

or, in the adaptive form, ε = ρ A² ∇L(w) / ‖A ∇L(w)‖₂ with A = |w| + η elementwise: the
ball is then measured in units of the weights, so that rescaling a network without
changing its function changes nothing.  ε is a constant: no derivative passes through
it.  Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
Generalization" (ICLR 2021, arXiv:2010.01412); Kwon et al., "ASAM: Adaptive
Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks"
(ICML 2021, arXiv:2102.11600).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from basinax.optimizers._ascent import ascent, check_radius, is_none, shifted


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    rho: Any,
    adaptive: bool = False,
    eta: Any = 0.0,
    mask: Any = None,
    unscaled: Any = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
) -> Callable[..., Any]:
    """Return a function like `jax.value_and_grad(loss_fn)` with SAM's gradient.

    Value and auxiliary output come from the clean pass at w, so what is logged, and the
    statistics that normalisation layers hand back, are those of the model itself; only
    the gradient comes from w + ε.  It is an ordinary gradient, for any optimizer.
    Both passes get the same arguments, hence the same dropout key.  A call costs two
    gradients and, while it runs, one more copy of the parameters.

    Whatever combines several gradients composes in two orders, which mean two methods.
    With `accumulate = functools.partial(optax.microbatch, argnums=1,
    microbatch_size=32, accumulator=optax.microbatching.AccumulationType.MEAN)`:

    - `sam_value_and_grad(loss_fn, rho=rho, value_and_grad=lambda f, **kw:
      accumulate(jax.value_and_grad(f, **kw)))` is SAM on the whole batch;
    - `accumulate(sam_value_and_grad(loss_fn, rho=rho))` climbs on every microbatch by
      itself: m-sharpness, which the SAM paper found to generalise better.

    Likewise a mean over devices (`jax.lax.pmean`) inside or outside; under automatic
    sharding the ascent is that of the whole batch.

    Half-precision leaves are perturbed in float32, and `loss_fn` gets them as float32
    in the second pass: rounded to bfloat16, ε would mostly vanish.  A loss that needs
    one dtype throughout casts its parameters itself.

    Args:
        loss_fn: scalar loss, or (loss, aux) with `has_aux`.
        rho: radius ρ >= 0 in the units of the parameters (0.05 in the SAM paper), or
            relative to them if adaptive (0.5).  A number or a scalar array; for a
            schedule pass its value at the call, `fn(params, batch, rho=schedule(i))`.
        adaptive: whether A = |w| + η rather than 1.
        eta: η >= 0 (0.01 in the ASAM paper).  With 0, zero weights stay put.
        mask: tree (prefix) of booleans, or callable of the parameters returning one;
            leaves marked False stay put and do not count in the norm.  They still get
            their gradient at w + ε.
        unscaled: likewise; leaves marked True have A = 1 although `adaptive`, as the
            biases have in the ASAM authors' code.
        argnums: as in `jax.value_and_grad`; several arguments share one ball, and
            `mask` and `unscaled` then see the tuple of them.
        has_aux: as in `jax.value_and_grad`.
        value_and_grad: what both passes use, called as `value_and_grad(loss_fn,
            argnums=argnums, has_aux=has_aux)`.

    Returns:
        A function of `loss_fn`'s arguments, and optionally `rho=` in place of that
        above, that returns what `jax.value_and_grad` does.  A zero gradient gives
        ε = 0; one that is not finite gives NaN.

    Raises:
        TypeError: `rho` is a schedule or no number; a parameter is not real floating
            point.
        ValueError: `rho` or `eta` is negative or NaN, `eta` is set without `adaptive`,
            or `mask` or `unscaled` does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import sam_value_and_grad
        >>> loss_fn = lambda w: jnp.sum(w**2)
        >>> params = jnp.array([3.0, 4.0])
        >>> value, gradient = sam_value_and_grad(loss_fn, rho=2.5)(params)
        >>> float(value), gradient.tolist()  # at (3, 4), and at (4.5, 6)
        (25.0, [9.0, 12.0])

    Reference:
        arXiv:2010.01412, equations 2 and 3; arXiv:2102.11600, algorithm 1.
    """
    if callable(rho):
        raise TypeError(
            "rho is a schedule, but this function counts no steps: give a number here "
            "and the schedule's value at the call, fn(params, batch, rho=schedule(i))."
        )
    check_radius(rho)
    perturb = perturbation(adaptive, eta, mask, unscaled)
    clean_fn = value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)
    default = rho

    def sam_fn(*args: Any, rho: Any = None, **kwargs: Any) -> Any:
        rho = default if rho is None else rho
        check_radius(rho)
        value, gradient = clean_fn(*args, **kwargs)

        def gradient_fn(point: Any) -> Any:
            moved = _replace(args, argnums, point)
            return clean_fn(*moved, **kwargs)[1]

        params = _pick(args, argnums)
        step = perturb(gradient, params, rho)
        return value, gradient_ahead(gradient_fn, gradient, params, step)

    return sam_fn


def asam_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    rho: Any,
    eta: Any = 0.0,
    mask: Any = None,
    unscaled: Any = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
) -> Callable[..., Any]:
    """Return `sam_value_and_grad` with `adaptive=True`; see there.

    The authors' code has η = 0.01 and leaves biases unscaled:
    `asam_value_and_grad(loss_fn, rho=0.5, eta=0.01, unscaled=lambda params:
    jax.tree.map(lambda w: w.ndim < 2, params))`.

    Args:
        loss_fn: as in `sam_value_and_grad`, like all that follows.
        rho: radius, relative to the weights.
        eta: added to |w|.
        mask: leaves to perturb.
        unscaled: leaves with A = 1.
        argnums: arguments to differentiate.
        has_aux: whether the loss returns (loss, aux).
        value_and_grad: what both passes use.

    Returns:
        The function.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import asam_value_and_grad
        >>> loss_fn = lambda w: jnp.sum(w)
        >>> asam_value_and_grad(loss_fn, rho=0.5)(jnp.array([3.0, 4.0]))[1].tolist()
        [1.0, 1.0]
    """
    return sam_value_and_grad(
        loss_fn,
        rho=rho,
        adaptive=True,
        eta=eta,
        mask=mask,
        unscaled=unscaled,
        argnums=argnums,
        has_aux=has_aux,
        value_and_grad=value_and_grad,
    )


def perturbation(
    adaptive: bool, eta: Any, mask: Any, unscaled: Any
) -> Callable[[PyTree, PyTree, Any], PyTree]:
    """Check the options of `ascent` and bind them."""
    check_radius(eta, "eta")
    if not adaptive:
        # An array may be a hyperparameter that optax injected with its default.
        if isinstance(eta, int | float | np.number) and eta != 0:
            raise ValueError(f"eta={eta} has no effect without adaptive=True.")
        if unscaled is not None:
            raise ValueError("unscaled has no effect without adaptive=True.")
    return functools.partial(
        ascent, adaptive=adaptive, eta=eta, mask=mask, unscaled=unscaled
    )


def gradient_ahead(
    gradient_fn: Callable[[PyTree], PyTree],
    gradient: PyTree,
    params: PyTree,
    step: PyTree,
) -> PyTree:
    """Return the gradient at w + ε, in the dtypes of the clean gradient."""
    point = shifted(params, step)
    try:
        ahead = gradient_fn(point)
    except Exception as error:
        _explain(error, params, point)
        raise
    return jax.tree.map(
        lambda clean, g: None if clean is None else g.astype(clean.dtype),
        gradient,
        ahead,
        is_leaf=is_none,
    )


def _explain(error: Exception, params: PyTree, point: PyTree) -> None:
    """Say what this module did to the parameters before a loss refused them."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
        raise ValueError(
            "the loss was called with optax.MaskedNode in place of the parameters that "
            "optax.masked or optax.partition hides. Put sam in front of it and choose "
            "leaves by sam's own mask: optax.chain(sam(rho, mask=mask), "
            "optax.masked(...))."
        ) from error
    dtypes = [
        [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(tree)]
        for tree in (params, point)
    ]
    if dtypes[0] != dtypes[1]:
        error.add_note(
            "The perturbed pass gets half-precision parameters as float32; a loss that "
            "needs one dtype throughout casts them itself."
        )


def _pick(args: tuple[Any, ...], argnums: int | Sequence[int]) -> Any:
    if isinstance(argnums, Sequence):
        return tuple(args[index] for index in argnums)
    return args[argnums]


def _replace(
    args: tuple[Any, ...], argnums: int | Sequence[int], new: Any
) -> list[Any]:
    """Put new values in the places of the differentiated arguments."""
    if not isinstance(argnums, Sequence):
        argnums, new = (argnums,), (new,)
    replaced = list(args)
    for index, value in zip(argnums, new, strict=True):
        replaced[index] = value
    return replaced
