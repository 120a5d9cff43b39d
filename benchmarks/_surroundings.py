"""The training loss around the point where a run ended.

Two views, which answer different questions:

- a plane along two random directions, normalised filter by filter, so that networks
  with weights of different size can be compared: what the loss does in directions that
  training did not choose;
- a line along the eigenvector of the largest Hessian eigenvalue, in distances of weight
  space: what it does in the worst direction.

Every optimizer is looked at with the same draws and on the same grid.
"""

from typing import Any

import jax
import numpy as np

from basinax.benchmarks._tasks import Params, Task
from basinax.landscape import (
    eigen_directions,
    hessian,
    line,
    plane,
    random_directions,
)

EXTENT = 1.0  # of the plane, in filter norms
REACH = 1.0  # of the line, in weight space
DRAW = 0  # the same for every optimizer


def surroundings(
    task: Task, params: Params, *, points: int, max_matvecs: int
) -> dict[str, Any]:
    """Evaluate the training loss in a plane and along the sharpest direction.

    Args:
      task: gives the loss and the batch that it is looked at on.
      params: where the run ended.
      points: grid points along each axis; at least 2.
      max_matvecs: most Hessian products spent on the sharpest direction.

    Returns:
      ``"plane"`` with ``x`` and ``losses`` (points by points), ``"line"`` with
      ``steps`` and ``losses``.
    """
    key = jax.random.key(DRAW)
    first, second = random_directions(params, key, normalize="filter")
    grid = np.linspace(-EXTENT, EXTENT, points)
    seen = plane(task.loss, params, first, second, task.curvature, x=grid)
    (sharpest,) = eigen_directions(
        hessian(task.loss, params, task.curvature),
        params,
        1,
        key=key,
        tol=1e-2,
        max_matvecs=max_matvecs,
    )
    steps = np.linspace(-REACH, REACH, 2 * points - 1)
    along = line(task.loss, params, sharpest, task.curvature, steps=steps)
    return {
        "plane": {"x": grid, "losses": np.asarray(seen.losses)},
        "line": {"steps": steps, "losses": np.asarray(along.losses)},
    }
