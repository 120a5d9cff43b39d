"""Products with Jᵀ B J, the form that all positive curvature estimates share.

J is the Jacobian of some outputs z with respect to the parameters, B a symmetric map
between tangents and cotangents of z:

    B = ∇²_z ℓ                      Gauss-Newton
    B = Σ_s s sᵀ over sampled scores   Fisher
    B = I / N, z the losses          empirical Fisher
    B = (I - 11ᵀ/N) / (N - 1)        covariance of the gradients

One forward pass, one with tangents (J v) and one backward (Jᵀ) make a product, so
neither J nor anything of size z × z is ever held. Both directions use the same
linearisation, hence the product is symmetric to rounding.

Reference: Schraudolph, *Fast curvature matrix-vector products for second-order
gradient descent*, Neural Comput. 14, 2002.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._vectors import check_same, check_vector, widen


def _check_outputs(outputs: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(outputs):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                "the outputs must be real floating-point arrays, but "
                f"outputs{jax.tree_util.keystr(path)} is {leaf.dtype}; return only "
                "what the criterion depends on."
            )


def _factors(
    function: Partial, middle: Partial, params: PyTree, data: tuple[PyTree, ...]
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Return J and B as linear functions."""
    outputs, jacobian = jax.linearize(lambda p: function(p, *data), params)
    _check_outputs(outputs)
    return jacobian, middle(outputs)


def _multiply(
    jacobian: Callable[[PyTree], PyTree],
    middle: Callable[[PyTree], PyTree],
    params: PyTree,
    vector: PyTree,
) -> PyTree:
    check_same(vector, params, "the vector")
    tangent = jacobian(optax.tree.cast_like(vector, params))
    # Narrow outputs are enough for one pass, not for the sums over classes inside B.
    cotangent = optax.tree.cast_like(middle(widen(tangent)), tangent)
    return jax.linear_transpose(jacobian, params)(cotangent)[0]


_linearized_factors = jax.jit(_factors)
_linearized_product = jax.jit(_multiply)


@jax.jit
def _product(
    function: Partial,
    middle: Partial,
    params: PyTree,
    data: tuple[PyTree, ...],
    vector: PyTree,
) -> PyTree:
    return _multiply(*_factors(function, middle, params, data), params, vector)


def elementwise(weight: Float[Array, "..."], u: Float[Array, "..."]) -> Array:
    """Multiply by a diagonal B, given as a number or per output."""
    return weight * u


def as_partial(function: Callable[..., PyTree]) -> Partial:
    """Wrap a function for `jax.jit`, where it is compared by identity.

    A `Partial` already brings its own arrays along as data and stays as it is.
    """
    return function if isinstance(function, Partial) else Partial(function)


def sandwich(
    function: Partial,
    middle: Partial,
    params: PyTree,
    data: tuple[PyTree, ...],
    linearize: bool,
) -> Partial:
    """Make v -> Jᵀ B J v an operator.

    Args:
        function: makes the outputs, called as `function(params, *data)`.
        middle: makes B, a linear function of trees like the outputs in at least
            float32, called as `middle(outputs)`.
        params: tree of parameters.
        data: further arguments of `function`.
        linearize: whether to evaluate J and B now and keep them.
    """
    check_vector(params, "params")
    if linearize:
        factors = _linearized_factors(function, middle, params, data)
        return Partial(_linearized_product, *factors, params)
    return Partial(_product, function, middle, params, data)


def scalar(value: PyTree, name: str) -> PyTree:
    """Return a loss, or raise ValueError if it is not one real number.

    Args:
        value: what the loss function returned.
        name: what the message calls that function.
    """
    if not isinstance(value, tuple | list | dict) and value is not None:
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape == () and jnp.issubdtype(dtype, jnp.floating):
            return value
        value = f"an array of shape {shape} and type {dtype}"
    else:
        value = f"a {type(value).__name__}"
    raise ValueError(
        f"{name} must return one real floating-point number, but returned {value}; "
        "reduce over examples inside it, and return no auxiliary outputs."
    )
