"""Two images in one: each overlaps the other, and both are to be recognized.

Sabour et al. (2017, arXiv:1710.09829) and Sener and Koltun (2018, arXiv:1810.04650)
made MultiMNIST so: one image at the upper left, one at the lower right of a larger
field, the brighter pixel where they overlap.
"""

import numpy as np

from basinax.benchmarks._digits import Images
from basinax.benchmarks._multi_task import Deal, Examples


def overlay(left: np.ndarray, right: np.ndarray, offset: int) -> np.ndarray:
    """Lay squares of shape (n, side, side) over one another, the second further down.

    Args:
      left: images at the upper left corner.
      right: images ``offset`` rows and columns further.
      offset: at most the side.

    Returns:
      Fields of shape (n, side + offset, side + offset).
    """
    n, side, _ = left.shape
    field = np.zeros((n, side + offset, side + offset), left.dtype)
    field[:, :side, :side] = left
    lower = field[:, offset:, offset:]
    np.maximum(lower, right, out=lower)
    return field


def compose(
    images: Images, size: int, offset: int, rng: np.random.Generator
) -> Examples:
    """Draw pairs of images and lay them over one another."""
    side = round(images.inputs.shape[1] ** 0.5)
    squares = images.inputs.reshape(-1, side, side)
    pairs = rng.integers(0, len(squares), (2, size))
    fields = overlay(squares[pairs[0]], squares[pairs[1]], offset)
    return Examples(fields.reshape(size, -1), images.labels[pairs].T.copy())


def spoil(
    labels: np.ndarray, share: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Replace a share of every task's labels by uniform ones, some of them right."""
    labels = labels.copy()
    number = round(share * len(labels))
    for column in labels.T:
        rows = rng.permutation(len(labels))[:number]
        column[rows] = rng.integers(0, classes, number)
    return labels


def deal_pairs(
    parts: tuple[Images, Images, Images],
    sizes: tuple[int, int, int],
    *,
    offset: int,
    classes: int,
    noise: float,
    seed: int,
) -> Deal:
    """Compose training, validation and test pairs, each from its own images.

    Args:
      parts: source images of the three splits.
      sizes: composites of each.
      offset: rows and columns between the two images of a pair.
      classes: values of a label.
      noise: share of the training labels that are replaced; the others stay clean.
      seed: of pairs and noise.
    """
    rng = np.random.default_rng(seed)
    train, *held = (
        compose(part, size, offset, rng)
        for part, size in zip(parts, sizes, strict=True)
    )
    labels = spoil(train.labels, noise, classes, rng)
    return Deal(Examples(train.inputs, labels), *held)
