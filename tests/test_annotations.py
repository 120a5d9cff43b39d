"""Shapes in annotations are promises: kernels are called under a type checker."""

import jax.numpy as jnp
import jaxtyping
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation

from basinax import optimizers as bx
from basinax.optimizers import _decompose, _scaling, _spectral_derivative

STACK = jnp.arange(24.0).reshape(2, 3, 4)
SQUARE, RATIO = jnp.ones((2, 3, 3)), jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        (bx.soft_spectral_clip, (STACK, 1.0)),
        (bx.hard_spectral_clip, (STACK, 1.0)),
        (bx.orthogonalize, (STACK,)),
        (bx.project_orthogonal, (STACK, STACK + 1)),
        (bx.symlog, (STACK,)),
        (bx.stablemax, (STACK,)),
        (bx.log_stablemax, (STACK,)),
        (_scaling.unit_scale, (STACK,)),
        (_decompose.keep_numerical_rank, (RATIO, 3)),
        (
            _spectral_derivative.spectral_tangent,
            (STACK, SQUARE, STACK, SQUARE, SQUARE, RATIO),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kernel_keeps_its_promise(kernel, args):
    jaxtyping.jaxtyped(typechecker=beartype)(kernel)(*args)


def test_checker_sees_a_broken_promise():
    def transpose(
        x: jaxtyping.Float[jaxtyping.Array, "m n"],
    ) -> jaxtyping.Float[jaxtyping.Array, "m n"]:
        return x.T

    checked = jaxtyping.jaxtyped(typechecker=beartype)(transpose)
    with pytest.raises((jaxtyping.TypeCheckError, BeartypeCallHintViolation)):
        checked(jnp.ones((2, 3)))
