"""Centred kernel alignment: how alike two sets of features of the same examples are.

For features X (n, p) and Y (n, q) of n examples, both centred, and their Gram matrices
K = X Xᵀ, L = Y Yᵀ,

    CKA = <K, L> / (‖K‖ ‖L‖),    <K, L> = Σ_ij K_ij L_ij = ‖Xᵀ Y‖²_F.

It does not change when either side is rotated, reflected, shifted or scaled; in
particular hidden units may be permuted. The sum over i = j biases it upwards for few
examples and many features. Without that bias, with the U-centred matrix

    K̃_ij = K_ij - Σ_l K_il / (n - 2) - Σ_l K_lj / (n - 2) + Σ_lm K_lm / ((n-1)(n-2))

off the diagonal and zero on it (all sums leave out l = m), HSIC₁ = <K̃, L̃> / (n (n-3)).

References: Kornblith, Norouzi, Lee, Hinton, *Similarity of neural network
representations revisited* (ICML 2019, arXiv:1905.00414). Song, Smola, Gretton, Bedo,
Borgwardt, *Feature selection via dependence maximization* (JMLR 13, 2012). Nguyen,
Raghu, Kornblith, *Do wide and deep networks learn the same things?* (ICLR 2021,
arXiv:2010.15327).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from basinax.landscape._stacked import power_of_two
from basinax.landscape._vectors import check_concrete, widen


def cka(
    features_a: Float[Array, "n *p"],
    features_b: Float[Array, "n *q"],
    *,
    unbiased: bool = False,
) -> Float[Array, ""]:
    """Compare two representations of the same examples by linear CKA.

    Take the features of one layer of two models on the same inputs, row by row the same
    example. The value says how alike the two geometries of the examples are, whatever
    the units are called: 1 for features that agree up to rotation, shift and scale.

    Untrained networks of equal shape agree to a good part already, since random
    features keep much of the geometry of the inputs; compare with such a pair before
    reading much into a value.

    It can be traced and differentiated, and works with whichever is smaller of the
    p x q and the n x n products. For sets too large for one call see `minibatch_cka`.

    Args:
        features_a: real features of n examples, one row each; axes after the first are
            flattened.
        features_b: features of the same examples in the same order, of any width.
        unbiased: leave out the terms of an example with itself (HSIC₁). Needs four
            examples; near zero, of either sign, for unrelated features, where the
            plain form grows with the number of features over that of examples.

    Returns:
        The alignment in at least float32, in [0, 1], or [-1, 1] if unbiased, up to
        rounding. NaN where a side does not vary over examples, as nothing can be
        compared then, and where a feature is NaN or infinite.

    Raises:
        ValueError: if the numbers of examples differ or are below two (four if
            unbiased), or features are absent or not real.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import cka
        >>> def model(params, x):  # returns the hidden layer beside the output
        ...     hidden = jnp.tanh(x @ params["in"])
        ...     return hidden, hidden @ params["out"]
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.5]])
        >>> a = {"in": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "out": jnp.ones((2, 1))}
        >>> b = {"in": a["in"][:, ::-1], "out": a["out"]}  # hidden units swapped
        >>> round(float(cka(model(a, x)[0], model(b, x)[0])), 4)
        1.0

    Reference:
        arXiv:1905.00414.
    """
    _check(features_a, features_b, unbiased, "cka")
    return _aligned(features_a, features_b, unbiased=unbiased)


def minibatch_cka(
    batches: Iterable[tuple[Float[Array, "n *p"], Float[Array, "n *q"]]],
    *,
    unbiased: bool = True,
) -> Float[Array, ""]:
    """Compare two representations of a set that is gone through batch by batch.

    The mean over batches of HSIC(a, b), divided by the roots of the means of HSIC(a, a)
    and HSIC(b, b). Since HSIC₁ is unbiased for any number of examples, numerator and
    denominator tend to those of the whole set; a mean of the batches' own CKA does not.
    Memory is that of a batch. Batches of different sizes count by their examples, and
    every size is compiled once.

    Args:
        batches: pairs of features of the same examples, as for `cka`; a generator will
            do.
        unbiased: as for `cka`; without it the result depends on the batch size.

    Returns:
        The alignment, in the dtype that `cka` returns; NaN as there.

    Raises:
        ValueError: for no batches, or a batch that `cka` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import minibatch_cka
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.5], [3.0, 1.0]])
        >>> batches = [(x, 2 * x[:, ::-1]), (x + 1, 2 * x[:, ::-1])]
        >>> round(float(minibatch_cka(batches)), 4)
        1.0

    Reference:
        arXiv:2010.15327.
    """
    total, weight, dtype, unit = np.zeros(3), 0, jnp.dtype(jnp.float32), None
    for pair in batches:
        check_concrete(pair, "minibatch_cka")
        _check(*pair, unbiased, "minibatch_cka")
        products, scales = _products(*pair, unbiased=unbiased)
        n, dtype = len(pair[0]), products.dtype
        a, b = (float(scale) for scale in scales)
        unit = unit or (a, b)
        # In units of the first batch, whose fourth powers might overflow.
        a, b = a / unit[0], b / unit[1]
        norm = n * (n - 3) if unbiased else (n - 1) ** 2
        sizes = np.array([a * b, a * a, b * b]) ** 2
        total += n / norm * sizes * np.asarray(products, np.float64)
        weight += n
    if not weight:
        raise ValueError("minibatch_cka got no batches.")
    ab, aa, bb = total / weight
    value = ab / np.sqrt(aa * bb) if aa > 0 and bb > 0 else np.nan
    return jnp.asarray(value, dtype)


def _check(features_a: Any, features_b: Any, unbiased: bool, caller: str) -> None:
    shapes = jnp.shape(features_a), jnp.shape(features_b)
    least = 4 if unbiased else 2
    need = f"{caller} needs two arrays of features, one row per example"
    for name, x, shape in zip("ab", (features_a, features_b), shapes, strict=True):
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"{need}, of real numbers; features_{name} is {dtype}.")
        if len(shape) < 2 or 0 in shape[1:]:
            raise ValueError(
                f"{need}, so of shape (examples, features); features_{name} has shape "
                f"{shape}."
            )
    if shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"{need}, of the same examples in the same order; got {shapes[0][0]} and "
            f"{shapes[1][0]} examples."
        )
    if shapes[0][0] < least:
        form = "the unbiased form" if unbiased else "centring"
        raise ValueError(
            f"{need}; {form} takes at least {least} examples, got {shapes[0][0]}."
        )


@functools.partial(jax.jit, static_argnames="unbiased")
def _aligned(features_a: Array, features_b: Array, unbiased: bool) -> Float[Array, ""]:
    ab, aa, bb = _products(features_a, features_b, unbiased=unbiased)[0]
    scale = jnp.sqrt(jnp.maximum(aa, 0)) * jnp.sqrt(jnp.maximum(bb, 0))
    varies = ~(scale <= 0)  # which keeps a NaN
    return jnp.where(varies, ab / jnp.where(varies, scale, 1), jnp.nan)


@functools.partial(jax.jit, static_argnames="unbiased")
def _products(
    features_a: Array, features_b: Array, unbiased: bool
) -> tuple[Float[Array, "3"], tuple[Array, Array]]:
    """Return <K, L>, <K, K>, <L, L>, and what X and Y were divided by before that."""
    (x, scale_x), (y, scale_y) = _centred(features_a), _centred(features_b)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    inner = _from_features if max(x.shape[1], y.shape[1]) <= len(x) else _from_grams
    return inner(x, y, unbiased), (scale_x, scale_y)


def _centred(features: Array) -> tuple[Float[Array, "n p"], Float[Array, ""]]:
    """Centre every feature and divide all by a power of two near the largest."""
    x = widen(_flat(features))
    first, inverse = _scale_of(x)
    x = x * inverse
    # The middle of its range is exactly a constant feature, as its mean may not be.
    x = x - 0.5 * (jnp.min(x, 0, keepdims=True) + jnp.max(x, 0, keepdims=True))
    x = x - jnp.mean(x, 0, keepdims=True)
    second, inverse = _scale_of(x)
    return x * inverse, first * second


def _scale_of(x: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return a power of two near the largest entry, and its inverse."""
    return power_of_two(jnp.max(jnp.abs(x)))


def _flat(x: Any) -> Float[Array, "n p"]:
    """Give every example one axis of features."""
    x = jnp.asarray(x)
    place = jax.typeof(x).sharding
    if x.ndim > 2 and AxisType.Explicit in place.mesh.axis_types:
        rows = NamedSharding(place.mesh, PartitionSpec(place.spec[0]))
        x = jax.sharding.reshard(x, rows)
    return x.reshape(len(x), -1)


def _multiply(form: str, x: Array, y: Array) -> Array:
    """Multiply two matrices; the product is small enough for every device."""
    mesh = jax.typeof(x).sharding.mesh
    typed = AxisType.Explicit in mesh.axis_types
    return jnp.einsum(
        form,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=NamedSharding(mesh, PartitionSpec()) if typed else None,
    )


def _from_features(
    x: Float[Array, "n p"], y: Float[Array, "n q"], unbiased: bool
) -> Float[Array, "3"]:
    """Take <K, L> from Xᵀ Y.

    As the features are centred, the rows of K sum to zero, and of the sums in K̃ only
    its diagonal k is left: <K̃, L̃> = <K, L> - n k·l / (n-2) + Σk Σl / ((n-1)(n-2)).
    """
    n = len(x)

    def inner(u: Array, v: Array) -> Float[Array, ""]:
        product = jnp.sum(_multiply("np,nq->pq", u, v) ** 2)
        if not unbiased:
            return product
        k, l = jnp.sum(u**2, 1), jnp.sum(v**2, 1)  # noqa: E741
        trace = jnp.sum(k) * jnp.sum(l) / ((n - 1) * (n - 2))
        return product - n / (n - 2) * jnp.sum(k * l) + trace

    return jnp.stack([inner(x, y), inner(x, x), inner(y, y)])


def _from_grams(
    x: Float[Array, "n p"], y: Float[Array, "n q"], unbiased: bool
) -> Float[Array, "3"]:
    """Take <K, L> from the Gram matrices themselves."""
    k, l = (_multiply("ip,jp->ij", u, u) for u in (x, y))  # noqa: E741
    if unbiased:
        k, l = _u_centred(k), _u_centred(l)  # noqa: E741
    return jnp.stack([jnp.sum(k * l), jnp.sum(k * k), jnp.sum(l * l)])


def _u_centred(k: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Compute K̃."""
    n = len(k)
    others = ~jnp.eye(n, dtype=bool)
    k = jnp.where(others, k, 0)
    rows = jnp.sum(k, 1, keepdims=True) / (n - 2)
    total = jnp.sum(k) / ((n - 1) * (n - 2))
    return jnp.where(others, k - rows - rows.T + total, 0)
