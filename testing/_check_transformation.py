"""One call that runs every check on a transformation and reports all failures."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from basinax.testing._case import DTYPES, Case, LossFn, arguments_of
from basinax.testing._hints import hint
from basinax.testing._report import (
    Conformance,
    ConformanceError,
    Failure,
    what_went_wrong,
)
from basinax.testing._suite import CHECKS, PLAIN, inapplicable, property_of
from basinax.testing._trees import sample

LEARNING_RATES = (0.3, 0.03, 3.0, 0.003, 30.0)


def check_transformation(
    make_tx: Callable[..., optax.GradientTransformation] | optax.GradientTransformation,
    *,
    name: str | None = None,
    is_optimizer: bool | None = None,
    learning_rate: float | Sequence[float] | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    schedules: Sequence[str] | None = None,
    static_args: Sequence[str] | None = None,
    extra_args: Mapping[str, Any] | Callable[[LossFn], Mapping[str, Any]] | None = None,
    dtypes: Sequence[str] = DTYPES,
    stacked: bool = False,
    reaches_every_point: bool = True,
    uses_gradients: bool = True,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    on_check: Callable[[str, Failure | None], None] | None = None,
) -> Conformance:
    """Check an optax transformation against what JAX and optax expect of one.

    For authors of optimizers, in a test of their own. Some thirty properties are
    tried on small trees: that a step compiles once, keeps dtypes and None leaves,
    stays finite at zero gradients, lets NaN through, may donate its arguments, can be
    mapped, scanned, masked, partitioned, accumulated, injected, saved by orbax and
    sharded, and finds a minimum. Compiling is what takes the time, five to twenty
    seconds for an ordinary optimizer on a CPU.

    What is not given is inferred from the signature of `make_tx`. Its arguments with
    a default of type float, and `learning_rate`, are hyperparameters; all others are
    static. It is an optimizer if it takes `learning_rate`, or if its updates point
    downhill without one; otherwise the convergence checks put `optax.sgd` after it.

    Args:
        make_tx: a factory, called without arguments or with hyperparameters by
            keyword; `functools.partial` supplies what else it needs, and
            `learning_rate` is supplied if it has no default. A finished
            transformation is accepted too, but then nothing that needs another
            hyperparameter can be checked.
        name: how the report calls it; by default the factory's name.
        is_optimizer: whether updates have their sign and size already.
        learning_rate: initial rate with which it finds the minimum of a quadratic in
            400 steps, while the rate falls to zero; or several to try. By default
            0.3, 0.03, 3, 0.003 and 30.
        hyperparameters: values, other than the defaults, to inject and to schedule.
            By default half of each default, zeros left out.
        schedules: those of the hyperparameters that take a schedule; by default
            `learning_rate`.
        static_args: arguments that `optax.inject_hyperparams` must not touch.
        extra_args: what `update` needs beside gradients, state and params: keyword
            arguments, or a function from the loss to them,
            `lambda loss_fn: {"value_fn": loss_fn}`.
        dtypes: dtypes of parameters that it supports.
        stacked: whether a leaf with three axes is a stack of independent matrices.
        reaches_every_point: False if it confines the parameters to a set.
        uses_gradients: False if it ignores those it is given.
        only: names of the checks to run, of those in `CHECKS`; None for all.
        skip: names of checks to leave out.
        on_check: called after every check with its name and the failure, or None.

    Returns:
        A `Conformance` with the names of the checks that passed, and those that say
        nothing about this transformation with the reason.

    Raises:
        ConformanceError: an AssertionError with one paragraph for every property that
            is broken: what it is, which leaf, dtype or step broke it, what was got
            and expected, and how the common cause is repaired.
        ValueError: a check's name is unknown, or `make_tx` needs arguments.
        TypeError: `make_tx` does not give a transformation.

    Example:
        >>> import optax
        >>> from basinax.testing import check_transformation
        >>> result = check_transformation(
        ...     lambda learning_rate=0.1: optax.adam(learning_rate),
        ...     only=["compiles_once", "keeps_dtype", "none_leaves"],
        ... )
        >>> result.passed
        ('keeps_dtype', 'none_leaves', 'compiles_once')

        A scale that is a NumPy scalar is strongly typed, and promotes:

        >>> import jax, numpy as np
        >>> def halve():
        ...     half = lambda g: g * np.float32(0.5)
        ...     return optax.stateless(lambda u, _: jax.tree.map(half, u))
        >>> check_transformation(halve, only=["keeps_dtype"])
        Traceback (most recent call last):
        ...
        basinax.testing._report.ConformanceError: halve breaks 1 of 1 properties ...
    """
    _check_names("only", only or ())
    _check_names("skip", skip)
    make = _as_factory(make_tx)
    given = arguments_of(make)
    hyperparameters = _inferred(given) if hyperparameters is None else hyperparameters
    if schedules is None:
        schedules = [n for n in hyperparameters if n == "learning_rate"]
    if static_args is None:
        static_args = [n for n in given if n not in _inferred(given, zeros=True)]
    if isinstance(learning_rate, Sequence):
        learning_rate = tuple(learning_rate)
    if isinstance(extra_args, Mapping):
        extra_args = functools.partial(lambda constant, _: constant, extra_args)
    case = Case(
        name=name or _name_of(make_tx),
        make=make,
        is_optimizer="learning_rate" in given if is_optimizer is None else is_optimizer,
        learning_rate=learning_rate or LEARNING_RATES,
        hyperparameters=hyperparameters,
        schedules=tuple(schedules),
        static_args=tuple(static_args),
        extra_args=extra_args,
        dtypes=tuple(dtypes),
        stacked=stacked,
        reaches_every_point=reaches_every_point,
        uses_gradients=uses_gradients,
    )
    descends = _first_step(case)
    if "learning_rate" not in given and (is_optimizer or descends):
        case = case._replace(is_optimizer=True, learning_rate=None)
    return _run(case, only, skip, on_check)


def _run(
    case: Case,
    only: Collection[str] | None,
    skip: Collection[str],
    on_check: Callable[[str, Failure | None], None] | None,
) -> Conformance:
    left_out = {n: "not in `only`" for n in CHECKS if only and n not in only}
    left_out |= dict.fromkeys(skip, "in `skip`") | inapplicable(case)
    passed, failures = [], []
    for name in [n for n in CHECKS if n not in left_out]:
        failure = None
        try:
            PLAIN[name](case)
            passed.append(name)
        except Exception as error:
            failure = _failure(name, property_of(PLAIN[name]), error)
            failures.append(failure)
        if on_check:
            on_check(name, failure)
    if failures:
        raise ConformanceError(case.name, tuple(failures), tuple(passed), left_out)
    return Conformance(tuple(passed), left_out)


def _failure(check: str, property_: str, error: Exception) -> Failure:
    detail = what_went_wrong(error)
    return Failure(check, property_, detail, hint(check, detail), error)


def _first_step(case: Case) -> bool:
    """Return whether a step leads downhill, or say why there can be none.

    Without a first step, nearly all checks would fail, for one and the same reason.
    """
    params, grads = sample(), sample(1)
    try:
        tx = case.make()
        updates, _ = case.updater(tx)(grads, tx.init(params), params)
        return sum(float(jnp.sum(updates[k] * g)) for k, g in grads.items()) < 0
    except Exception as error:
        first = "A step on float32 leaves of zero, one and two axes succeeds."
        failure = _failure("first_step", first, error)
        raise ConformanceError(case.name, (failure,)) from error


def _check_names(argument: str, names: Collection[str]) -> None:
    if isinstance(names, str) or (unknown := [n for n in names if n not in CHECKS]):
        wrong = names if isinstance(names, str) else ", ".join(unknown)
        raise ValueError(
            f"{argument} must be a list of names of checks, got {wrong!r}; "
            f"there are: {', '.join(CHECKS)}."
        )


def _as_factory(make_tx: Any) -> Callable[..., optax.GradientTransformation]:
    """Return a factory that works without arguments."""
    if isinstance(make_tx, optax.GradientTransformation):
        return lambda: make_tx
    if not callable(make_tx):
        raise TypeError(
            "make_tx must be a function that returns an optax transformation, or a "
            f"transformation; got {type(make_tx).__name__}."
        )
    needed = [
        n
        for n, p in arguments_of(make_tx).items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed == ["learning_rate"]:
        make_tx, needed = functools.partial(make_tx, learning_rate=0.1), []
    if needed:
        raise ValueError(
            f"make_tx needs {', '.join(needed)}, but is called without arguments: give "
            f"functools.partial({_name_of(make_tx)}, {needed[0]}=...) instead."
        )
    make: Callable[..., Any] = make_tx
    if not isinstance(tx := make(), optax.GradientTransformation):
        raise TypeError(
            "make_tx must return an optax transformation (init and update); it "
            f"returned {type(tx).__name__}."
        )
    return make


def _inferred(given: Mapping[str, Any], zeros: bool = False) -> dict[str, float]:
    """Return half of every default that is a float, and a learning rate's."""
    defaults = {n: p.default for n, p in given.items()}
    return {
        name: 0.5 * default
        for name, default in defaults.items()
        if isinstance(default, float) and math.isfinite(default) and (default or zeros)
    }


def _name_of(make_tx: Any) -> str:
    while isinstance(make_tx, functools.partial):
        make_tx = make_tx.func
    name = getattr(make_tx, "__name__", type(make_tx).__name__)
    return "the transformation" if name == "<lambda>" else name
