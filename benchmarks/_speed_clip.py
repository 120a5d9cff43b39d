"""Micro-benchmark of the spectral clipping kernels.

Every method clips the same Gaussian matrices at the same kappa, the largest singular
value over the threshold. Timings are interleaved, so that a busy moment hits all of
them, and the ratio is against the authors' iteration (10 coupled Newton-Schulz steps in
float32). Speed means little without the error, which is measured against a float64
singular value decomposition.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._measure import interleaved_times, median
from basinax.benchmarks._table import Table, short
from basinax.optimizers import soft_spectral_clip

METHODS: tuple[Any, ...] = ("auto", "eigh", "polynomial", "newton_schulz", "svd")
REFERENCE = "newton_schulz"
SHAPES = ("256x1024", "512x512", "512x2048")
ACCELERATOR_SHAPES = ("768x2304", "768x3072", "1024x4096", "1536x6144")
MINIMUM_SECONDS = 0.02  # a timing shorter than this repeats the call


def reference(x: np.ndarray, threshold: float) -> np.ndarray:
    """Clip by a float64 singular value decomposition."""
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return (u * (s / np.sqrt(1.0 + (s / threshold) ** 2))) @ vt


def measure(
    shapes: Sequence[tuple[int, int]], methods: Sequence[Any], kappa: float, rounds: int
) -> list[dict[str, Any]]:
    """Time every shape; one row per shape and method."""
    rows = []
    for shape in shapes:
        rows += measure_shape(shape, methods, kappa, rounds)
    return rows


def measure_shape(
    shape: tuple[int, int], methods: Sequence[Any], kappa: float, rounds: int
) -> list[dict[str, Any]]:
    """Time and check every method on one shape; one row per method."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    threshold = float(np.linalg.norm(x.astype(np.float64), 2)) / kappa
    exact = reference(x, threshold)
    on_device = jnp.asarray(x)
    calls: dict[str, Any] = {
        method: partial(
            jax.jit(partial(soft_spectral_clip, method=method)), on_device, threshold
        )
        for method in methods
    }
    errors = {}
    for method, call in calls.items():
        difference = np.asarray(call(), np.float64) - exact
        errors[method] = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    probe = interleaved_times(calls, rounds=1)
    repeats = max(1, int(MINIMUM_SECONDS / min(t[0] for t in probe.values())))
    times = interleaved_times(calls, rounds=rounds, repeats=min(repeats, 50))
    return [
        {
            "shape": list(shape),
            "method": method,
            "milliseconds": 1e3 * median(times[method]),
            "speedup": median(
                [
                    slow / fast
                    for slow, fast in zip(times[REFERENCE], times[method], strict=True)
                ]
            ),
            "relative_error": errors[method],
        }
        for method in methods
    ]


def table(measured: list[dict[str, Any]], kappa: float, rounds: int) -> Table:
    """Tabulate time, speed-up and error by shape and method."""
    rows = []
    for row in measured:
        rows.append(
            (
                "x".join(map(str, row["shape"])),
                row["method"],
                short(row["milliseconds"]),
                f"{row['speedup']:.2f}×",
                f"{row['relative_error']:.1e}",
            )
        )
    return Table(
        "Soft spectral clipping of one float32 matrix",
        ("shape", "method", "ms", f"vs {REFERENCE}", "relative error"),
        tuple(rows),
        (
            f"Gaussian matrices, kappa {kappa:g}; median of "
            f"{rounds} interleaved rounds; larger ratios are faster. "
            "Error: Frobenius norm against a float64 SVD.",
        ),
    )
