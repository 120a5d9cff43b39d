"""Numbers taken from parameters and steps: norms, curvature, step times."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from basinax.benchmarks._tasks import Params, Task
from basinax.landscape import eigenpairs, hessian, trace

SQUARINGS = 12


def spectral_norm(x: jax.Array) -> jax.Array:
    """Return the largest singular value, within 0.1 %.

    The smaller Gram matrix is squared twelve times, which leaves G^4096: the share of
    the largest eigenvalue, trace(G G^4096) / trace(G^4096), is at most log(m) / 4096
    below it whatever the gaps. Products only: quick inside a compiled loop on any
    device, unlike an eigensolver.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x))
    x = x / jnp.where(scale > 0, scale, 1.0)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x

    def square(power: jax.Array, _: None) -> tuple[jax.Array, None]:
        power = power @ power
        trace = jnp.trace(power)
        return power / jnp.where(trace > 0, trace, 1.0), None

    start = jnp.trace(gram)
    power, _ = jax.lax.scan(
        square, gram / jnp.where(start > 0, start, 1.0), length=SQUARINGS
    )
    return scale * jnp.sqrt(jnp.sum(gram * power))


def max_spectral_norm(tree: Any) -> jax.Array:
    """Return the largest spectral norm among the matrices of a tree."""
    norms = [spectral_norm(x) for x in jax.tree.leaves(tree) if x.ndim == 2]
    return jnp.max(jnp.stack(norms)) if norms else jnp.zeros(())


class Curvature(NamedTuple):
    """Largest Hessian eigenvalue and Hessian trace of the training loss."""

    lambda_max: float
    residual: float
    converged: bool
    trace: float
    trace_standard_error: float


def curvature(
    task: Task, params: Params, key: jax.Array, *, probes: int, max_matvecs: int
) -> Curvature:
    """Measure the Hessian of the loss on the task's curvature batch."""
    operator = hessian(task.loss, params, task.curvature)
    eigen_key, trace_key = jax.random.split(key)
    top = eigenpairs(
        operator,
        params,
        1,
        key=eigen_key,
        which="LA",
        tol=1e-2,
        max_matvecs=max_matvecs,
    )
    total = trace(operator, params, key=trace_key, num_probes=probes)
    return Curvature(
        float(top.values[0]),
        float(top.residuals[0]),
        bool(top.converged[0]),
        float(total.value),
        float(total.standard_error),
    )


def interleaved_times(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Time several functions in turn, so that a busy moment hits all of them.

    Args:
      calls: what to time; each returns arrays, which are waited for.
      rounds: how many times to go through all of them after one warm-up round.
      repeats: calls per timing, for functions shorter than the clock is good for.

    Returns:
      Seconds per call for every round.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                out = call()
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median of some numbers."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return 0.5 * (ordered[middle - 1] + ordered[middle])
