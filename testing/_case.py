"""The subject of the conformance checks: a transformation and what it promises."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from basinax.testing._trees import Tree, quadratic

LossFn = Callable[[Tree], jax.Array]
Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]

DTYPES = ("bfloat16", "float16", "float32", "float64")


class Case(NamedTuple):
    """A transformation under test, and what it promises.

    `check_transformation` makes one from its arguments. Make your own to run every
    check as a test of its own, by `checks_for` and pytest's parametrization.

    Attributes:
        name: identifies the case in test reports.
        make: builds the transformation; called without arguments, or with numeric
            keyword overrides (always `learning_rate` where `is_optimizer`). A
            `functools.partial` of the public factory is the usual choice.
        is_optimizer: True if the transformation carries its own learning rate and
            sign; False if it only transforms a direction, in which case the
            convergence checks put `optax.sgd` after it.
        learning_rate: initial rate with which the convergence checks succeed, or
            several of which one does; they lower it linearly to zero. None if it
            cannot be set, which leaves the convergence checks out.
        hyperparameters: numeric keyword arguments of `make`, with values that differ
            from its defaults.
        schedules: those of `hyperparameters` that also accept a schedule.
        static_args: arguments that `optax.inject_hyperparams` must leave alone.
        extra_args: the keyword arguments of `update` that the transformation cannot
            do without, given the loss; None if it needs none.
        dtypes: parameter dtypes it supports.
        stacked: True if a leaf with three axes is a stack of independent matrices.
        reaches_every_point: False if it confines the parameters to a set, so that the
            targets of the convergence checks may lie outside; its own tests then show
            that the nearest point of the set is found.
        uses_gradients: False if it takes gradients of the loss itself and ignores
            those it is given.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    is_optimizer: bool = True
    learning_rate: float | tuple[float, ...] | None = 0.3
    hyperparameters: Mapping[str, float] = {}
    schedules: tuple[str, ...] = ()
    static_args: tuple[str, ...] = ()
    extra_args: Callable[[LossFn], Mapping[str, Any]] | None = None
    dtypes: tuple[str, ...] = DTYPES
    stacked: bool = False
    reaches_every_point: bool = True
    uses_gradients: bool = True

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The initial rates to try, in this order."""
        rate = self.learning_rate
        return rate if isinstance(rate, tuple) else () if rate is None else (rate,)

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """What `make` can be given; empty where that is not known."""
        return arguments_of(self.make)

    def compiled(self, **overrides: Any) -> tuple[optax.GradientTransformation, Update]:
        """Return `make(**overrides)` and its jitted updater.

        Checks that need nothing special share it, since compiling is nearly all of
        what they cost.
        """
        return _compiled(self, tuple(sorted(overrides.items())))

    def as_optimizer(
        self, learning_rate: optax.ScalarOrSchedule
    ) -> optax.GradientTransformation:
        """Return something whose updates descend, whatever the case is."""
        if self.is_optimizer:
            return self.make(learning_rate=learning_rate)
        return optax.chain(self.make(), optax.sgd(learning_rate))

    def extras(self, loss_fn: LossFn) -> Mapping[str, Any]:
        """Return the extra keyword arguments that `update` cannot do without."""
        return self.extra_args(loss_fn) if self.extra_args else {}

    def updater(self, tx: Any, loss_fn: LossFn | None = None) -> Update:
        """Return `update(grads, state, params)` of `tx` with its extra arguments.

        The extra arguments are closed over rather than passed, because they may be
        functions, which `jax.jit` does not accept as arguments.
        """
        extra = self.extras(loss_fn or quadratic)

        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            return tx.update(grads, state, params, **extra)

        return update


def arguments_of(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters in a factory's signature; none if it has no signature."""
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}


# A bound, so that a long test run does not keep every program it ever compiled.
@functools.lru_cache(maxsize=64)
def _compiled(
    case: Case, overrides: tuple[tuple[str, Any], ...]
) -> tuple[optax.GradientTransformation, Update]:
    tx = case.make(**dict(overrides))
    return tx, jax.jit(case.updater(tx))
