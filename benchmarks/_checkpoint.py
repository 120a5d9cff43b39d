"""Parameters in an ``.npz`` file, one array per name."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._tasks import Params, Usage


def _names(params: Params) -> list[str]:
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def check_name(path: Path) -> None:
    """Refuse a name that numpy would append a suffix to."""
    if path.suffix != ".npz":
        raise Usage(f"--save {path}: the name must end in .npz")


def save(path: Path, params: Params) -> None:
    """Write parameters as one array per name into an ``.npz`` file."""
    check_name(path)
    leaves = map(np.asarray, jax.tree.leaves(params))
    arrays: dict[str, Any] = dict(zip(_names(params), leaves, strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    except OSError as error:
        raise Usage(f"--save {path}: {error.strerror}") from error


def load(path: Path, like: Params) -> Params:
    """Read parameters that ``save`` wrote.

    Args:
      path: the ``.npz`` file.
      like: tree of arrays or shapes that the parameters must match.

    Raises:
      Usage: the file cannot be read or is of another model.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "not an .npz file"
        raise Usage(f"--checkpoint {path}: {reason}") from error
    leaves, treedef = jax.tree.flatten(like)
    names = _names(like)
    if set(arrays) != set(names):
        raise Usage(
            f"--checkpoint {path}: holds {', '.join(sorted(arrays)) or 'nothing'}; "
            f"this model needs {', '.join(sorted(names))}"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if arrays[name].shape != leaf.shape:
            raise Usage(
                f"--checkpoint {path}: {name} has shape {arrays[name].shape}, this "
                f"model needs {leaf.shape}; give the same --width and --depth"
            )
    kept = [
        jnp.asarray(arrays[name], leaf.dtype)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return treedef.unflatten(kept)
