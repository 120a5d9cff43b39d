"""A few products that tell whether a function is a symmetric linear operator.

Everything built on an operator C assumes, for all u and v,

    C u = C u        the same twice: no dropout, no fresh batch
    C (u + v) = C u + C v
    ⟨u, C v⟩ = ⟨v, C u⟩
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    check_vector,
    inner,
    norm,
    random_bits,
    size,
    widen,
)


@jax.jit
def _spread(bits: PyTree, like: PyTree) -> PyTree:
    """Turn random integers into numbers in [-1, 1) in the dtypes of the parameters."""
    return jax.tree.map(
        lambda b, x: (b.astype(jnp.float32) / 32768 - 1).astype(jnp.result_type(x)),
        bits,
        like,
    )


@jax.jit
def _sum(u: PyTree, v: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, u, v)


@jax.jit
def _defects(
    u: PyTree, v: PyTree, cu: PyTree, again: PyTree, cv: PyTree, csum: PyTree
) -> tuple[Float[Array, ""], ...]:
    """Return the relative violation of each assumption."""
    length = norm(cu) + norm(cv)
    unit = jnp.where(length > 0, length, 1)
    cu, again, cv, csum = (
        jax.tree.map(lambda x: x / unit.astype(x.dtype), widen(product))
        for product in (cu, again, cv, csum)
    )
    subtract = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731
    # Random u and v make <u, Cv> no larger than the root mean square of u times |Cv|,
    # however many parameters there are.
    entry = (norm(u) + norm(v)) / size(u) ** 0.5
    return (
        norm(subtract(cu, again)),
        norm(subtract(subtract(csum, cu), cv)),
        jnp.abs(inner(u, cv) - inner(v, cu)) / entry,
    )


_ADVICE = {
    "deterministic": "two products with one vector differ. Switch off dropout, and "
    "use the same batch every time",
    "linear": "the product of a sum is not the sum of the products. A finite "
    "difference has this error",
    "symmetric": "<u, Cv> and <v, Cu> differ. The operator may mix different batches "
    "or parameters, or stop a gradient",
}


def check_operator(
    operator: Callable[[PyTree], PyTree],
    like: PyTree,
    *,
    key: PRNGKeyArray,
    tol: float | None = None,
) -> None:
    """Raise if an operator is not deterministic, linear, symmetric and finite.

    Worth its four products before a long computation with a loss of your own: with
    dropout left on, say, eigenvalues come out wrong without any sign of it. Operators
    of this package are right for every deterministic loss that can be differentiated
    twice.

    Args:
        operator: function on trees shaped like `like`.
        like: tree of the parameters; only structure, shapes, dtypes and placement
            matter.
        key: random key of the two test vectors.
        tol: largest violation, relative to the products. The default is the square root
            of the rounding unit of the coarsest leaf: 3e-4 in float32, 0.09 in
            bfloat16.

    Raises:
        ValueError: naming what is violated and by how much, for a product that is not
            finite or not shaped like `like`, or a `like` that is empty, traced or not
            real floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import check_operator, hessian
        >>> w, key = jnp.ones(3), jax.random.key(0)
        >>> check_operator(hessian(lambda w: jnp.sum(w) ** 3, w), w, key=key)
        >>> check_operator(lambda v: jnp.cumsum(v), w, key=key)
        Traceback (most recent call last):
            ...
        ValueError: the operator is not symmetric: ...
    """
    check_vector(like, "like")
    check_concrete(like, "check_operator")
    u, v = (
        _spread(random_bits(jax.random.fold_in(key, i), like), like) for i in range(2)
    )
    products = [operator(x) for x in (u, u, v, _sum(u, v))]
    for product in products:
        check_same(product, like, "the operator's result")
    found = [float(x) for x in _defects(u, v, *products)]
    coarsest = max(
        float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(like)
    )
    limit = coarsest**0.5 if tol is None else tol
    for (name, advice), defect in zip(_ADVICE.items(), found, strict=True):
        if defect != defect:
            raise ValueError(
                "the operator returns NaN or infinity; check the loss at these "
                "parameters."
            )
        if defect > limit:
            raise ValueError(
                f"the operator is not {name}: {advice} (relative violation "
                f"{defect:.1e}, tolerance {limit:.1e})."
            )
