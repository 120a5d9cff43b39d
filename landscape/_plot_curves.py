"""Curves: losses along lines and paths, and what was measured during training."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jax.typing import ArrayLike

from basinax.landscape._barrier import Barrier
from basinax.landscape._bezier_path import CurvedPath
from basinax.landscape._linear_path import Path
from basinax.landscape._plot_style import (
    BLUE,
    INK,
    VERMILION,
    Axes,
    Scale,
    dress,
    legend,
    named,
    named_losses,
    new_axis,
    style,
    vector,
    wants_log,
)
from basinax.landscape._surface import Line

AnyPath = Path | CurvedPath


def _draw_losses(
    axis: Axes, curves: dict[str, tuple[Any, Any]], scale: Scale, marker: str
) -> bool:
    """Draw losses over positions, with gaps where not finite."""
    drawn = []
    for number, (name, (at, losses)) in enumerate(curves.items()):
        at = vector(at, f"the positions of {name}")
        found = vector(losses, f"the losses of {name}", at.size)
        drawn.append(found)
        found = np.where(np.isfinite(found), found, np.nan)
        axis.plot(
            at,
            found,
            label=name,
            linewidth=1.8,
            marker=marker,
            markersize=3,
            **style(number),
        )
    logarithmic = wants_log(np.concatenate(drawn), scale)
    if logarithmic:
        axis.set_yscale("log")
    return logarithmic


def lines(
    found: Line | Mapping[str, Line],
    *,
    ax: Axes | None = None,
    scale: Scale = "auto",
    title: str | None = None,
) -> Axes:
    """Plot the loss along lines through the parameters.

    Args:
        found: result of `line`, whose losses may be a tree, or anything with its
            fields; or a mapping of names to such results.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        scale: of the losses, "linear", "log" or "auto": logarithmic where they are not
            negative and span a factor above 50.
        title: None takes "Loss along a line".

    Returns:
        The axis. Losses that are not finite leave gaps.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for an empty mapping, shapes that do not fit, or an unknown scale.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import Line, plots
        >>> t = jnp.linspace(-1.0, 1.0, 5)
        >>> axis = plots.lines({"sharp": Line(t, 9 * t**2), "flat": Line(t, t**2)})
        >>> [curve.get_label() for curve in axis.lines]
        ['sharp', 'flat']

    Reference:
        Goodfellow, Vinyals, Saxe, *Qualitatively characterizing neural network
        optimization problems*, ICLR 2015.
    """
    axis = new_axis(ax)
    curves = {
        name: (line.steps, losses)
        for label, line in named(found, "loss").items()
        for name, losses in named_losses(label, line.losses).items()
    }
    logarithmic = _draw_losses(axis, curves, scale, "")
    if len(curves) > 1:
        legend(axis)
    text = "Loss along a line" if title is None else title
    dress(axis, text, "step along the direction", _loss_label(logarithmic))
    return axis


def _loss_label(logarithmic: bool) -> str:
    return "loss (log scale)" if logarithmic else "loss"


def paths(
    found: AnyPath | Mapping[str, AnyPath],
    *,
    barriers: Barrier | Mapping[str, Barrier] | None = None,
    ax: Axes | None = None,
    scale: Scale = "linear",
    title: str | None = None,
) -> Axes:
    """Plot the loss along paths between two solutions, and the barriers on them.

    A barrier is drawn as a bracket from the line between the losses of the end points,
    dotted, up to the loss on the path where the two differ most.

    Args:
        found: result of `linear_path` or `bezier_path`, whose losses may be a tree, or
            anything with their fields; or a mapping of names to such results.
        barriers: result of `barrier`, or a mapping of the same names, or of some of
            them, to such results.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        scale: of the losses, "linear", "log" or "auto": logarithmic where they are not
            negative and span a factor above 50.
        title: None takes "Loss between two solutions".

    Returns:
        The axis. Losses that are not finite leave gaps.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for an empty mapping, shapes that do not fit, barriers of paths that
            are not there, or an unknown scale.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import Path, barrier, plots
        >>> t = jnp.linspace(0.0, 1.0, 11)
        >>> hill, flat = Path(t, 4 * t * (1 - t)), Path(t, 0 * t)
        >>> axis = plots.paths(
        ...     {"linear": hill, "curve": flat}, barriers={"linear": barrier(hill)}
        ... )
        >>> [text.get_text() for text in axis.get_legend().get_texts()]
        ['linear, barrier 1', 'curve']

    Reference:
        Garipov et al., *Loss surfaces, mode connectivity, and fast ensembling of DNNs*,
        NeurIPS 2018, arXiv:1802.10026.
    """
    axis = new_axis(ax)
    results = named(found, "loss")
    marks = {} if barriers is None else named(barriers, next(iter(results)))
    if unknown := [name for name in marks if name not in results]:
        raise ValueError(f"barriers of {unknown}, but the paths are {[*results]}.")
    if not isinstance(barriers, Mapping) and marks and len(results) > 1:
        raise ValueError("several paths need a mapping of their names to barriers.")
    curves = {
        name: (path.positions, losses)
        for label, path in results.items()
        for name, losses in named_losses(label, path.losses).items()
    }
    logarithmic = _draw_losses(axis, curves, scale, "")
    named_curves = {line.get_label(): line for line in axis.lines}
    for label, mark in marks.items():
        heights = named_losses(label, mark.height)
        positions = named_losses(label, mark.position)
        for name, height in heights.items():
            _draw_barrier(axis, named_curves[name], float(height), positions[name])
    if len(axis.lines) > 1:
        legend(axis)
    text = "Loss between two solutions" if title is None else title
    dress(axis, text, "position on the path", _loss_label(logarithmic))
    return axis


def _draw_barrier(axis: Axes, curve: Any, height: float, position: Any) -> None:
    name, (at, losses) = curve.get_label(), curve.get_data()
    curve.set_label(f"{name}, barrier {height:.3g}")
    if not (0 in at and 1 in at):
        raise ValueError("a barrier is drawn from the losses at 0 and 1; both lack.")
    first, last = losses[at == 0][0], losses[at == 1][0]
    inside = np.sort(at[(at >= 0) & (at <= 1)])  # bent by a logarithmic scale
    chord = first + inside * (last - first)
    axis.plot(inside, chord, ":", color=INK, linewidth=1.4, label=f"_chord {name}")
    position = float(position)
    if not np.isfinite([height, position]).all():
        return
    base = first + position * (last - first)
    axis.plot(
        [position, position],
        [base, base + height],
        color=curve.get_color(),
        linewidth=1.2,
        marker="_",
        markersize=12,
        markeredgewidth=1.8,
        label=f"_barrier {name}",
    )


def monitored(
    steps: ArrayLike,
    values: ArrayLike | Mapping[str, ArrayLike],
    *,
    ax: Axes | None = None,
    threshold: float | ArrayLike | None = None,
    threshold_label: str = "threshold",
    ylabel: str | None = None,
    title: str | None = None,
) -> Axes:
    """Plot monitored values over training, beside a threshold.

    Made for the sharpness, or the largest eigenvalues, and the edge of stability, from
    values that a training loop collected out of the state of `monitor`.

    Args:
        steps: step of every measurement, shape (n,).
        values: what was measured, shape (n,); eigenvalues of shape (n, k), best first;
            or a mapping of names to vectors (n,). Gaps where not finite.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        threshold: level to draw dotted, such as 2 / learning rate; a number, or one per
            step under a schedule.
        threshold_label: what the level is, for the legend.
        ylabel: what the values are; None takes "measured value", or "eigenvalue" for
            those of shape (n, k).
        title: None takes what the values are, "over training".

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if `steps` and `values` are not vectors of one length.

    Example:
        >>> from basinax.landscape import plots
        >>> axis = plots.monitored([0, 100, 200], [3.0, 4.8, 5.1], threshold=5.0)
        >>> len(axis.lines)
        2

    Reference:
        Cohen, Kaur, Li, Kolter, Talwalkar, *Gradient descent on neural networks
        typically occurs at the edge of stability*, ICLR 2021, arXiv:2103.00065.
    """
    at = np.asarray(steps, np.float64)
    curves = named(values, "measured")
    matrix = not isinstance(values, Mapping) and np.ndim(values) == 2
    if matrix:
        columns = np.asarray(values, np.float64).T
        curves = {f"λ{k + 1}": column for k, column in enumerate(columns)}
    seen = {name: np.asarray(curve, np.float64) for name, curve in curves.items()}
    shapes = {curve.shape for curve in seen.values()}
    if at.ndim != 1 or shapes != {at.shape}:
        raise ValueError(
            "steps and values must be vectors of one length, got shapes "
            f"{at.shape} and {sorted(shapes)}."
        )
    axis = new_axis(ax)
    for number, (name, curve) in enumerate(seen.items()):
        axis.plot(at, curve, linewidth=1.8, label=name, **style(number))
    if threshold is not None:
        level = np.broadcast_to(np.asarray(threshold, np.float64), at.shape)
        axis.plot(at, level, ":", color=INK, linewidth=1.6, label=threshold_label)
    legend(axis)
    quantity = ylabel or ("eigenvalue" if matrix else "measured value")
    text = f"{quantity[:1].upper()}{quantity[1:]} over training"
    dress(axis, text if title is None else title, "step", quantity)
    return axis


Kind = Literal["accuracy", "loss"]


def grokking(
    steps: ArrayLike,
    train: ArrayLike,
    validation: ArrayLike,
    *,
    kind: Kind = "accuracy",
    level: float | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Plot training and validation over the logarithm of steps, and the delay between.

    The delay goes from the first step at which training has reached the level to the
    first at which validation has: at or above it for accuracies, at or below for
    losses.

    Args:
        steps: step of every measurement, ascending, shape (n,). Step 0 has no place on
            a logarithmic axis and is left out.
        train: accuracy or loss on the training data, shape (n,); gaps where not finite.
        validation: the same on data not trained on.
        kind: what they are, "accuracy" or "loss"; the latter is on a logarithmic scale
            where it spans a factor above 50.
        level: at which the delay is measured; None takes 0.95 for accuracies, and
            measures none for losses.
        ax: where to draw; None makes a new figure, which is `ax.figure` of the result.
        title: None takes "Grokking", with the delay if there is one.

    Returns:
        The axis.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for vectors of different lengths, an unknown kind, or no step above
            0.

    Example:
        >>> from basinax.landscape import plots
        >>> steps = [1, 10, 100, 1000]
        >>> axis = plots.grokking(steps, [0.1, 1.0, 1.0, 1.0], [0.1, 0.1, 0.2, 1.0])
        >>> axis.get_title(loc="left")
        'Grokking: validation 990 steps (×100) after training'

    Reference:
        Power et al., *Grokking: generalization beyond overfitting on small algorithmic
        datasets*, 2022, arXiv:2201.02177.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}.")
    at = vector(steps, "steps")
    both = [vector(train, "train", at.size), vector(validation, "validation", at.size)]
    if not (at > 0).any():
        raise ValueError("a logarithmic axis needs a step above 0, and there is none.")
    axis = new_axis(ax)
    level = 0.95 if level is None and kind == "accuracy" else level
    marks = []
    for name, curve, colour in zip(
        ("training", "validation"), both, (BLUE, VERMILION), strict=True
    ):
        axis.plot(at[at > 0], curve[at > 0], color=colour, linewidth=1.8, label=name)
        if level is not None:
            reached = (curve >= level if kind == "accuracy" else curve <= level) & (
                at > 0
            )
            marks.append(at[reached.argmax()] if reached.any() else np.nan)
    axis.set_xscale("log")
    if kind == "loss" and wants_log(np.concatenate(both), "auto"):
        axis.set_yscale("log")
    text = "Grokking"
    if level is not None:
        first, last = marks
        axis.plot(
            marks,
            [level, level],
            color=INK,
            linewidth=1.4,
            marker="|",
            markersize=12,
            markeredgewidth=1.6,
            label=f"{kind} {level:g}",
        )
        if last > first:
            delay = f"{last - first:,.0f} steps (×{last / first:.3g})"
            text = f"{text}: validation {delay} after training"
    legend(axis)
    dress(axis, text if title is None else title, "step", kind)
    return axis
