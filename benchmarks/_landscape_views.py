"""Planes of the training loss through one model, for the curvature report.

The same point along three pairs of axes: the Hessian's sharpest eigenvectors, random
directions normalised filter by filter, and, if the model was trained here, the two
directions along which the path of training stretched most. That they look so different
is the point: a picture of a loss is a picture of its axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._tasks import Params, Task
from basinax.landscape import (
    Eigenpairs,
    plane,
    random_directions,
    trajectory_directions,
)

EXTENT = 1.0  # of the random plane, in filter norms
MARGIN = 0.2  # of the path's extent, on each side
RISE = 1.0  # nats that the quadratic model adds at the end of the sharpest axis


def _around(coordinates: np.ndarray, points: int) -> np.ndarray:
    """Cover one coordinate of the path and its end, with a margin."""
    low, high = min(coordinates.min(), 0.0), max(coordinates.max(), 0.0)
    margin = MARGIN * max(high - low, 1e-6)
    return np.linspace(low - margin, high + margin, points)


def views(
    task: Task,
    params: Params,
    pairs: Eigenpairs,
    path: Sequence[Params],
    *,
    points: int,
    key: jax.Array,
    on_points: Callable[[int, int | None], None] = lambda *_: None,
) -> dict[str, Any]:
    """Evaluate the training loss in up to three planes.

    Args:
      task: gives the loss and the batch that it is looked at on.
      params: the model, the origin of every plane.
      pairs: at least two of its largest eigenpairs, else their plane is left out.
      path: the parameters during training, in order, the last being ``params``; fewer
        than three leave their plane out.
      points: grid points along each axis.
      key: draws the random directions.
      on_points: called with the points done and their total, for each plane.

    Returns:
      By name of the axes, ``x``, ``y`` and ``losses`` of shape (x, y); for the path
      also its ``coordinates`` and the ``explained`` shares of its variation.
    """

    def look(first: Params, second: Params, x: np.ndarray, y: np.ndarray) -> Any:
        seen = plane(
            task.loss,
            params,
            first,
            second,
            task.curvature,
            x=x,
            y=y,
            progress=on_points,
        )
        return {"x": x, "y": y, "losses": np.asarray(seen.losses)}

    found: dict[str, Any] = {}
    if len(pairs.values) > 1 and pairs.values[0] > 0:
        first, second = (
            jax.tree.map(lambda leaf, i=i: leaf[i], pairs.vectors) for i in (0, 1)
        )
        reach = float(jnp.sqrt(2 * RISE / pairs.values[0]))
        axis = np.linspace(-reach, reach, points)
        found["hessian"] = look(first, second, axis, axis)
    axis = np.linspace(-EXTENT, EXTENT, points)
    first, second = random_directions(params, key, "filter")
    found["random"] = look(first, second, axis, axis)
    if len(path) > 2:
        main = trajectory_directions(path)
        first, second = main.directions
        coordinates = np.asarray(main.coordinates)
        x, y = (_around(column, points) for column in coordinates.T)
        found["path"] = {
            **look(first, second, x, y),
            "coordinates": coordinates,
            "explained": np.asarray(main.explained),
        }
    return found
