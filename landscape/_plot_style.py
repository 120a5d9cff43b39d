"""The common look of the plots, and the rules that several of them share.

Matplotlib is imported inside functions, so that the instruments work without it. Text,
spines and ticks are a grey that is readable on white and on dark pages alike, and the
backgrounds of axes, and of figures made here, are left transparent. Curves take Okabe
and Ito's colours, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # others import it from here
else:
    Axes = Any  # annotations are evaluated by checkers that need no matplotlib

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
# Without black and yellow, which vanish on one of the backgrounds.
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
# The grey of equal contrast, 4 to 1, with white and with #1e1e1e.
INK = "#808080"

Scale = Literal["auto", "linear", "log"]
# Losses that span more than this ask for a logarithmic scale.
_WIDE = 50.0


def new_axis(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """Return the given axis, or that of a new figure without global state."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "basinax.landscape.plots needs matplotlib: pip install 'basinax[plot]'"
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure((width, height), dpi=150, layout=layout, facecolor="none")
    return figure.subplots()


def dress(axis: Axes, title: str, xlabel: str, ylabel: str, grid: bool = True) -> None:
    """Give an axis its texts and the common look."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlabel(xlabel, fontsize=10, color=INK)
    axis.set_ylabel(ylabel, fontsize=10, color=INK)
    axis.patch.set_visible(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[:].set_color(INK)
    axis.tick_params(which="both", colors=INK, labelsize=9)
    axis.grid(visible=False, which="both")
    if grid:
        axis.grid(visible=True, which="major", color=INK, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def legend(axis: Axes, **options: Any) -> None:
    """Name the curves, without a frame."""
    axis.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


def colour_bar(axis: Axes, mapped: Any, label: str, **options: Any) -> None:
    """Draw a colour bar beside the axis, in the common look."""
    bar = axis.figure.colorbar(mapped, ax=axis, **options)
    bar.set_label(label, fontsize=10, color=INK)
    bar.ax.tick_params(which="both", colors=INK, labelsize=9)
    bar.outline.set_edgecolor(INK)


def style(number: int) -> dict[str, Any]:
    """Choose colour and dash of a curve; dashes differ once colours repeat."""
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dash}


def hatch(axis: Axes, corner: tuple[float, float], width: float, height: float) -> None:
    """Hatch a rectangle below everything else; it shows where nothing covers it."""
    from matplotlib.patches import Rectangle

    axis.add_patch(
        Rectangle(
            corner,
            width,
            height,
            facecolor="none",
            edgecolor=INK,
            linewidth=0,
            hatch="////",
            zorder=0,
            label="not finite",
        )
    )


def wants_log(values: np.ndarray, scale: Scale) -> bool:
    """Decide on a logarithmic scale: where no value is negative and they span a lot.

    The smallest twentieth is ignored, because the loss may vanish at a single point.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}.")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if scale != "auto":
        if scale == "log" and not positive.size:
            raise ValueError('scale="log" needs positive values, and there are none.')
        return scale == "log"
    if not positive.size or (finite < 0).any():
        return False
    small = np.quantile(positive, 0.05, method="lower")
    return bool(positive.max() / _WIDE > small)


def vector(x: Any, name: str, length: int | None = None) -> np.ndarray:
    """Convert to a vector in float64, of some length."""
    found = np.asarray(x, np.float64)
    if found.ndim != 1 or not found.size or length not in (None, found.size):
        wanted = "some numbers" if length is None else f"{length} numbers"
        raise ValueError(
            f"{name} must be a vector of {wanted}, got shape {found.shape}."
        )
    return found


def named(results: Any, default: str) -> dict[str, Any]:
    """Return what a mapping names; something else gets the default name."""
    if not isinstance(results, Mapping):
        return {default: results}
    if not results:
        raise ValueError("there is nothing to draw: the mapping is empty.")
    return {str(name): result for name, result in results.items()}


def named_losses(name: str, losses: Any) -> dict[str, Any]:
    """Name every array in a tree of losses by the curve and its place in the tree."""
    paths = jax.tree.leaves_with_path(losses)
    if not paths:
        raise ValueError(f"there is nothing to draw: {name} holds no losses.")
    places = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
    ]
    return {
        f"{name}, {place}" if place else name: leaf
        for place, (_, leaf) in zip(places, paths, strict=True)
    }
