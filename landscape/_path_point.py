"""Points on a path between two trees of parameters.

A path from a to b that bends towards a control point c is a weighted mean,

    φ(t) = u(t) a + v(t) c + w(t) b,    u + v + w = 1,

of which each kind has its own weights:

    line       1 - t,            0,             t
    bezier     (1 - t)²,         2 t (1 - t),   t²
    polygon    max(1 - 2t, 0),   1 - |2t - 1|,  max(2t - 1, 0)

so the polygon consists of the two segments a c and c b.

Reference: Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, *Loss surfaces, mode
connectivity, and fast ensembling of DNNs* (NeurIPS 2018, arXiv:1802.10026).
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PyTree

Kind = Literal["bezier", "polygon"]


def curve_weights(t: Float[Array, ""], kind: str) -> tuple[Array, Array, Array]:
    """Return the weights of start, control and end."""
    if kind == "bezier":
        return (1 - t) ** 2, 2 * t * (1 - t), t**2
    if kind == "polygon":
        return (
            jnp.maximum(1 - 2 * t, 0),
            1 - jnp.abs(2 * t - 1),
            jnp.maximum(2 * t - 1, 0),
        )
    return 1 - t, jnp.zeros_like(t), t


def path_point(
    start: PyTree,
    end: PyTree,
    t: Float[ArrayLike, ""],
    control: PyTree | None = None,
    kind: Kind = "bezier",
) -> PyTree:
    """Compute the parameters at one position of a path.

    Made for models on a path that was found, for instance to ensemble their predictions
    or to recompute statistics of normalisation layers there. It can be traced.

    Args:
        start: parameters a, at t = 0.
        end: parameters b, at t = 1, a tree like `start`.
        t: position. Outside [0, 1] the line and the Bezier curve go on.
        control: control point c, a tree like `start`; None for the straight line.
        kind: "bezier" or "polygon"; only matters with a control point.

    Returns:
        A tree like `start`, computed in at least float32 and rounded to the dtypes of
        its leaves. Leaves that are no floating-point numbers, such as counters, are
        those of the nearer end, so that both ends are exact.

    Raises:
        ValueError: for trees that differ in structure or shapes, or an unknown kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import path_point
        >>> a, b = jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0])
        >>> c = jnp.array([0.5, 1.0])
        >>> path_point(a, b, 0.25).tolist()
        [0.25, 0.0]
        >>> path_point(a, b, 0.25, c).tolist()
        [0.25, 0.375]
        >>> path_point(a, b, 0.25, c, kind="polygon").tolist()
        [0.25, 0.5]

    Reference:
        arXiv:1802.10026.
    """
    check_kind(kind)
    check_alike(end, start, "end", "start")
    if control is None:
        return mix(start, end, start, jnp.asarray(t), "line")
    check_alike(control, start, "control", "start")
    return mix(start, end, control, jnp.asarray(t), kind)


def mix(
    start: PyTree, end: PyTree, control: PyTree, t: Float[Array, ""], kind: str
) -> PyTree:
    """Compute φ(t); `control` matters where `start` is floating-point only."""
    weights = curve_weights(t, kind)

    def blend(a: Any, b: Any, c: Any) -> Any:
        if a is None:
            return None
        dtype = jnp.result_type(a, b)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.where(t <= 0.5, a, b)
        wide = jnp.promote_types(dtype, jnp.float32)
        u, v, w = (weight.astype(wide) for weight in weights)
        point = u * jnp.asarray(a, wide) + w * jnp.asarray(b, wide)
        if kind != "line":
            point = point + v * jnp.asarray(c, wide)
        return point.astype(dtype)

    return jax.tree.map(blend, start, end, control, is_leaf=lambda x: x is None)


# What `evaluate_points` calls; functions of module level are compiled once.
def on_line(coordinate: Float[Array, "1"], operands: PyTree) -> PyTree:
    """Return a point of the straight line; operands are both ends."""
    start, end = operands
    return mix(start, end, start, coordinate[0], "line")


def _on_curve(kind: str, coordinate: Float[Array, "1"], operands: PyTree) -> PyTree:
    start, end, control = operands
    return mix(start, end, control, coordinate[0], kind)


ON_CURVE = {kind: functools.partial(_on_curve, kind) for kind in get_args(Kind)}


def check_kind(kind: Any) -> None:
    """Raise ValueError for an unknown kind of curve."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is unknown; use one of bezier, polygon.")


def check_alike(tree: PyTree, like: PyTree, name: str, other: str) -> None:
    """Raise ValueError unless two trees agree in structure and shapes.

    Args:
        tree: tree to check.
        like: tree that sets structure and shapes.
        name: what the message calls `tree`.
        other: what it calls `like`.
    """
    shapes, wanted = (
        {
            jax.tree_util.keystr(path): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(x)
        }
        for x in (tree, like)
    )
    need = f"{name} and {other} must be trees of the same structure and shapes, but"
    structure, needed = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != needed:
        nested = "" not in shapes and "" not in wanted
        for path in sorted(shapes.keys() ^ wanted.keys()) if nested else ():
            there, lacks = (name, other) if path in shapes else (other, name)
            raise ValueError(f"{need} {there}{path} is missing in {lacks}.")
        raise ValueError(f"{need} {name} is {structure} and {other} is {needed}.")
    for path, shape in shapes.items():
        if shape != wanted[path]:
            raise ValueError(
                f"{need} {name}{path} has shape {shape} and {other}{path} has shape "
                f"{wanted[path]}."
            )


def check_ends(start: PyTree, end: PyTree) -> None:
    """Raise ValueError unless there is something to interpolate between two trees."""
    check_alike(end, start, "end", "start")
    floats = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves(start)]
    if not any(floats):
        raise ValueError(
            "start holds no floating-point numbers, so there is no path; pass the "
            "trees of trainable arrays."
        )


def leaves(tree: PyTree) -> list[Any]:
    """Return the leaves that hold any number."""
    return [leaf for leaf in jax.tree.leaves(tree) if np.prod(jnp.shape(leaf))]


def check_positions(
    positions: Any, *, inside: bool
) -> tuple[Float[np.ndarray, "n 1"], Float[Array, "n"]]:
    """Return positions as coordinates for `evaluate_points` and as they were given.

    Args:
        positions: one-dimensional array, or None for 25 from 0 to 1.
        inside: whether to refuse positions outside [0, 1].
    """
    if positions is None:
        positions = np.linspace(0, 1, 25)
    if isinstance(positions, Tracer):
        raise ValueError("positions are traced; pass concrete numbers.")
    values = np.asarray(positions, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            "positions must be a vector of at least one finite number, got shape "
            f"{values.shape}: {values.tolist()}."
        )
    if inside and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"positions on a curve are in [0, 1], got {values.min()} to {values.max()}."
        )
    return values[:, None], jnp.asarray(positions, jnp.result_type(float))
