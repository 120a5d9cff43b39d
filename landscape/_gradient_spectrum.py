"""Singular values of gradient matrices: how many directions a gradient has.

    nuclear norm    Σ s_i
    effective rank  exp(-Σ p_i log p_i),  p_i = s_i / Σ s        (Roy and Vetterli)
    stable rank     Σ s_i² / s_1² = ‖G‖_F² / ‖G‖_2²

For rank r both ranks lie between 1 and r, and they are r for equal singular values.
They come from a singular value decomposition rather than from the smaller Gram matrix,
whose rounding drowns what is below √eps of the largest value: in float32 the tail below
3e-4, which an entropy counts.

Reference: Roy and Vetterli, *The effective rank: a measure of effective
dimensionality*, EUSIPCO 2007.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, PyTree

from basinax.landscape._stacked import power_of_two, replicated
from basinax.landscape._vectors import wide_dtype

Axes = int | Sequence[int] | None
AxesOf = Axes | Callable[[Any, Any], Axes]


class GradientSpectrum(NamedTuple):
    """Spectra of the matrices in a tree: trees of scalars, None for other leaves.

    Attributes:
        nuclear_norm: sum of the singular values.
        effective_rank: exponential of the entropy of their shares in that sum.
        stable_rank: sum of their squares over the largest square.
    """

    nuclear_norm: PyTree
    effective_rank: PyTree
    stable_rank: PyTree


def gradient_spectrum(grads: PyTree, *, axes: AxesOf = None) -> GradientSpectrum:
    """Measure the norm and the ranks of the gradient of each weight matrix.

    Works on any tree of matrices: gradients, updates, momenta or weights. A leaf of a
    stacked tree, such as layers that are scanned over, is a matrix per `jax.vmap`.

    One decomposition per matrix, which a mesh gathers on every device; of a matrix of
    1024 × 1024 it takes a tenth of a second on an idle CPU, so measure now and
    then.
    There, stacks under `jax.vmap` are decomposed one by one, because the batched
    routine can wait for ever for threads that it occupies itself.

    Args:
        grads: tree of real floating-point arrays. Leaves with fewer than two axes are
            not measured.
        axes: the axes of a leaf that are the rows of its matrix, all others being its
            columns: an int, a sequence, or a callable of (path, leaf) returning one of
            these. None there or here means all but the last: a kernel of Flax,
            (height, width, in, out), becomes (height · width · in, out). For PyTorch's
            (out, in, ...) it is `lambda path, leaf: range(1, leaf.ndim)`.

    Returns:
        The spectra in at least float32, of matrices of any size of entries; ranks are 0
        for a matrix that vanishes, NaN if an entry is not finite. Rounding adds up to
        about 1e-6 times the number of singular values to an effective rank in float32.

    Raises:
        TypeError: on a matrix that is not real floating point.
        ValueError: on axes that a leaf does not have, or that leave no rows or columns.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_spectrum
        >>> kernel = jnp.diag(jnp.array([2.0, 2.0, 0.0]))
        >>> grads = {"kernel": kernel, "bias": jnp.ones(3)}
        >>> spectrum = gradient_spectrum(grads)
        >>> [round(float(x["kernel"]), 3) for x in spectrum]
        [4.0, 2.0, 2.0]
        >>> spectrum.stable_rank["bias"] is None
        True

    Reference:
        Roy and Vetterli (2007).
    """
    named, treedef = jax.tree.flatten_with_path(grads)
    spectra = [_measure(path, leaf, axes) for path, leaf in named]
    return GradientSpectrum(*(treedef.unflatten(x) for x in _transposed(spectra)))


def _transposed(spectra: list[tuple]) -> list[tuple]:
    return [*zip(*spectra, strict=True)] if spectra else [()] * 3


def _measure(path: Any, leaf: Any, axes: AxesOf) -> tuple:
    ndim = jnp.ndim(leaf)
    if ndim < 2:
        return (None,) * 3
    name = f"grads{jax.tree_util.keystr(path)}"
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"{name} is {jnp.result_type(leaf)}, but only real floating-point matrices "
            "have a spectrum here; put None in its place."
        )
    chosen = axes(path, leaf) if callable(axes) else axes
    chosen = range(ndim - 1) if chosen is None else chosen
    rows = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    inside = all(-ndim <= axis < ndim for axis in rows)
    if not inside or not 0 < len({axis % ndim for axis in rows}) == len(rows) < ndim:
        raise ValueError(
            f"axes={rows} do not make a matrix of {name} of shape {jnp.shape(leaf)}; "
            "name some of its axes, each once, and leave some for the columns."
        )
    return _spectrum(leaf, rows=tuple(sorted(axis % ndim for axis in rows)))


def _spectrum(leaf: Any, rows: tuple[int, ...]) -> tuple[Array, Array, Array]:
    columns = tuple(axis for axis in range(jnp.ndim(leaf)) if axis not in rows)
    height = int(np.prod([jnp.shape(leaf)[axis] for axis in rows]))
    matrix = jnp.transpose(replicated(jnp.asarray(leaf)), (*rows, *columns))
    return _ranks(matrix.reshape(height, -1) if matrix.size else jnp.zeros((1, 1)))


@jax.jit
def _ranks(matrix: Float[Array, "m n"]) -> tuple[Array, Array, Array]:
    matrix = matrix.astype(wide_dtype(matrix))
    unit, inverse = power_of_two(jnp.max(jnp.abs(matrix)))
    s = jax.lax.platform_dependent(
        inverse * matrix,
        cpu=sequential_vmap(_singular_values),
        default=_singular_values,
    )
    total, largest = jnp.sum(s), jnp.max(s)
    p = s / jnp.where(total == 0, 1, total)
    entropy = jnp.sum(jax.scipy.special.entr(p))
    effective = jnp.where(total == 0, 0, jnp.exp(entropy))
    stable = jnp.sum((s / jnp.where(largest == 0, 1, largest)) ** 2)
    return unit * total, effective, stable


def _singular_values(matrix: Float[Array, "m n"]) -> Float[Array, "k"]:
    return jnp.linalg.svd(matrix, compute_uv=False)
