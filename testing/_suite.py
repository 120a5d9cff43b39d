"""The checks by name, and which of them a case calls for."""

import functools
import importlib.util
from collections.abc import Callable

import jax

from basinax.testing import _checks, _convergence, _meshes, _wrappers
from basinax.testing._case import Case

Check = Callable[[Case], None]


def _explained(check: Check) -> Check:
    """Make every failure an AssertionError that begins with the case and property."""

    @functools.wraps(check)
    def run(case: Case) -> None:
        try:
            check(case)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else type(error).__name__
            prefix = f"{case.name} breaks '{property_of(check)}'"
            raise AssertionError(f"{prefix}\n{kind} {error}") from error

    return run


def property_of(check: Check) -> str:
    """Return the one line that says what a check demands."""
    return (check.__doc__ or check.__name__).splitlines()[0]


PLAIN: dict[str, Check] = {
    name.removeprefix("check_"): function
    for module in (_checks, _convergence, _wrappers, _meshes)
    for name, function in vars(module).items()
    if name.startswith("check_")
}
CHECKS = {name: _explained(check) for name, check in PLAIN.items()}


def inapplicable(case: Case) -> dict[str, str]:
    """Return the checks that say nothing about a case, each with the reason."""
    no_schedules = "" if case.schedules else "no hyperparameter takes a schedule"
    if not case.reaches_every_point:
        no_target = "the targets may lie out of reach"
    elif not case.learning_rates:
        no_target = (
            "the learning rate cannot be set: pass a factory that takes `learning_rate`"
        )
    else:
        no_target = ""
    one_device = ""
    if jax.device_count() < 2:
        one_device = (
            "there is one device; before JAX is first used, "
            'jax.config.update("jax_num_cpu_devices", 8) simulates several'
        )
    reasons = {
        "float64": "" if "float64" in case.dtypes else "float64 is not among `dtypes`",
        "stacked_leaves": "" if case.stacked else "`stacked` is False",
        "inject_hyperparams": "" if case.arguments else "the factory takes no argument",
        "schedules": no_schedules,
        "constant_schedules": no_schedules,
        "converges_on_parabola": no_target,
        "converges_on_mixed_target": no_target,
        "checkpoint_round_trip": ""
        if importlib.util.find_spec("orbax")
        else "orbax is missing: pip install orbax-checkpoint",
        "auto_mesh": one_device,
        "explicit_mesh": one_device,
    }
    return {name: reason for name, reason in reasons.items() if reason}


def checks_for(case: Case) -> dict[str, Check]:
    """Return the checks that a case calls for, by name.

    For suites that want one test per property: each check takes the case, and returns
    None or raises an AssertionError that names the case, the property and, where there
    is one, the leaf that broke it. `check_transformation` runs them all at once.

    Args:
        case: the transformation and what it promises.

    Returns:
        Those of `CHECKS` that say something about it here: the checks of meshes need
        two devices, that of checkpoints needs orbax.

    Example:
        >>> import optax
        >>> from basinax.testing import Case, checks_for
        >>> case = Case("rms", optax.scale_by_rms, is_optimizer=False)
        >>> checks = checks_for(case)
        >>> checks["zero_gradients"](case)

        In a test file:

        ```
        @pytest.mark.parametrize("name", list(checks_for(case)))
        def test_rms(name):
            checks_for(case)[name](case)
        ```
    """
    without = inapplicable(case)
    return {name: check for name, check in CHECKS.items() if name not in without}
