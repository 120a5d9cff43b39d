"""Curvature operators: matrix-free maps v -> Cv on trees shaped like the parameters.

The Hessian of L at w acts on v as the directional derivative of the gradient,

    H v = d/dε ∇L(w + ε v)  at  ε = 0,

forward-mode differentiation of reverse mode. A dense layer takes 3 matrix products per
gradient and 8 per H v, or 6 if what does not depend on v is kept.

An operator is a `jax.tree_util.Partial` whose leaves are the parameters and the data.
It therefore crosses `jax.jit` as data: new parameters do not recompile anything, and
nothing becomes a constant, which XLA would spend minutes on folding.

Reference: Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Comput. 6,
1994.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree

from basinax.landscape._sandwich import as_partial, scalar
from basinax.landscape._vectors import (
    check_concrete,
    check_same,
    check_vector,
    size,
    widen,
)


def _gradient(loss_fn: Partial, args: tuple[PyTree, ...]) -> Callable[[PyTree], PyTree]:
    return jax.grad(lambda params: scalar(loss_fn(params, *args), "loss_fn"))


@jax.jit
def _hessian_product(
    loss_fn: Partial, params: PyTree, args: tuple[PyTree, ...], vector: PyTree
) -> PyTree:
    check_same(vector, params, "the vector")
    tangent = optax.tree.cast_like(vector, params)
    return jax.jvp(_gradient(loss_fn, args), (params,), (tangent,))[1]


@jax.jit
def _linearized_gradient(
    loss_fn: Partial, params: PyTree, args: tuple[PyTree, ...]
) -> Callable[[PyTree], PyTree]:
    return jax.linearize(_gradient(loss_fn, args), params)[1]


@jax.jit
def _linearized_product(
    linear_map: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree
) -> PyTree:
    check_same(vector, params, "the vector")
    return linear_map(optax.tree.cast_like(vector, params))


def hessian(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    *args: PyTree,
    linearize: bool = False,
) -> Partial:
    """Make the Hessian of a loss a function v -> Hv.

    The product is exact, compiled, and costs about two gradients. The loss is traced
    once for given shapes: an operator at new parameters or on new data reuses the
    compiled code as long as `loss_fn` is the same function object, so define the loss
    once rather than as a new lambda per call. Let the loss be deterministic, with
    dropout off and batch statistics frozen.

    Products are evaluated in the dtypes of `params`: in bfloat16 they carry relative
    errors of 1e-2, so cast the parameters to float32 first if the model allows.

    Args:
        loss_fn: scalar loss, called as `loss_fn(params, *args)`. Arrays it needs
            belong in `args` or in a `jax.tree_util.Partial`, not in its closure.
        params: tree of real floating-point arrays at which to take the Hessian.
        *args: further arguments, such as a batch; trees of arrays of any dtype.
        linearize: evaluate everything that does not depend on v now and keep it. Each
            product then saves about a fifth (1.8 gradients rather than 2.25 measured
            on a perceptron, 1.6 rather than 1.9 on a convolutional net), which repays
            the evaluation after two products; the price is memory in proportion to
            the activations of the whole batch for as long as the operator lives. Use
            it for many products on one batch that fits.

    Returns:
        A function from a tree shaped like `params` to another, which can be called,
        passed through `jax.jit` as an argument and handed to `eigenpairs` or `trace`.

    Raises:
        ValueError: if `params` is empty or holds leaves that are not real floating
            point; from the operator if its argument is not shaped like `params` or
            the loss does not return one real number.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import hessian
        >>> def loss(w, x):
        ...     return jnp.sum(x * w**3)
        >>> operator = hessian(loss, jnp.array([1.0, 2.0]), jnp.array([1.0, 10.0]))
        >>> operator(jnp.array([1.0, 1.0])).tolist()
        [6.0, 120.0]
    """
    check_vector(params, "params")
    loss = as_partial(loss_fn)
    if linearize:
        linear_map = _linearized_gradient(loss, params, args)
        return Partial(_linearized_product, linear_map, params)
    return Partial(_hessian_product, loss, params, args)


@jax.jit
def _unit_vector(like: PyTree, index: Int[Array, ""] | int) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([jnp.size(leaf) for leaf in leaves])
    units = [
        (jnp.arange(jnp.size(leaf)) == index - (end - jnp.size(leaf)))
        .astype(jnp.result_type(leaf))
        .reshape(jnp.shape(leaf))
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return treedef.unflatten(units)


def dense(
    operator: Callable[[PyTree], PyTree], like: PyTree
) -> Float[Array, "size size"]:
    """Make the matrix of an operator, for problems of up to a few thousand numbers.

    One product per column. Useful to check the other instruments, and where the whole
    spectrum of a small model is wanted.

    Args:
        operator: linear function on trees shaped like `like`.
        like: tree of the parameters; only structure, shapes and dtypes matter.

    Returns:
        The matrix in at least float32. Rows and columns follow `jax.tree.leaves`, each
        leaf in C order.

    Raises:
        ValueError: if `like` is empty, traced, or holds leaves that are not real
            floating point, or if the operator returns another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import dense, hessian
        >>> point = {"x": jnp.array(3.0), "y": jnp.array(5.0)}
        >>> dense(hessian(lambda p: p["x"] ** 2 * p["y"], point), point).tolist()
        [[10.0, 6.0], [6.0, 0.0]]
    """
    check_vector(like, "like")
    check_concrete(like, "dense")
    columns = []
    for index in range(size(like)):
        column = operator(_unit_vector(like, index))
        check_same(column, like, "the operator's result")
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(widen(column))]
        columns.append(np.concatenate([leaf.ravel() for leaf in leaves]))
    return jnp.asarray(np.stack(columns, axis=1))
