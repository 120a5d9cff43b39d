"""Two overlaid pieces of clothing: MultiFashionMNIST, from files on disk.

Debian packages Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747); any set in its IDX
format, such as MNIST, can be given with ``data_dir``.  Two images of 28x28 pixels lie
over one another in a field of 36x36.
"""

from pathlib import Path

from basinax.benchmarks._digits import Images, read_folder
from basinax.benchmarks._multi_task import MultiTask, as_task, multi_task
from basinax.benchmarks._multi_task_images import deal_pairs
from basinax.benchmarks._tasks import Defaults, Options, Task, Usage

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
OFFSET = 8
SIZES = (10_000, 2000, 5000)  # composites to train on, to validate with, to test with


def read(folder: Path | None) -> tuple[Images, Images, Images]:
    """Read the source images of the three splits.

    Raises:
      Usage: they are not there.
    """
    if folder is None and not DEBIAN.is_dir():
        raise Usage(
            "the task multi-fashion needs Debian's package: apt-get install "
            "dataset-fashion-mnist; or files in IDX format: --data-dir DIR"
        )
    parts = read_folder(folder or DEBIAN)
    pixels = parts[0].inputs.shape[1]
    if round(pixels**0.5) ** 2 != pixels:
        raise Usage(f"the task multi-fashion needs square images, not {pixels} pixels")
    return parts


def problem(
    options: Options | None = None,
    noise: float = 0.0,
    sizes: tuple[int, int, int] = SIZES,
) -> MultiTask:
    """Pose the problem.

    Args:
      options: folder, width, depth and batch size.
      noise: share of the training labels that are replaced by random ones.
      sizes: composites of the three splits.

    Raises:
      Usage: the images are not there.
    """
    options = options or Options()
    parts = read(options.data_dir)
    classes = int(parts[0].labels.max()) + 1
    side = round(parts[0].inputs.shape[1] ** 0.5) + OFFSET
    widths = (side * side, *[options.width or 128] * (options.depth or 2))
    return multi_task(
        "multi-fashion",
        f"two overlaid images, trunk {'-'.join(map(str, widths))}"
        + (f", {noise:.0%} of the labels random" if noise else ""),
        "Fashion-MNIST as packaged by Debian, two in one image"
        if options.data_dir is None
        else "IDX files given with --data-dir",
        tasks=("upper left", "lower right"),
        classes=classes,
        sizes=widths,
        batch_size=options.batch_size or 128,
        deal=lambda seed: deal_pairs(
            parts, sizes, offset=OFFSET, classes=classes, noise=noise, seed=seed
        ),
    )


def make(options: Options) -> Task:
    """Build the task of both labels' mean loss."""
    return as_task(
        problem(options),
        options,
        Defaults(steps=400, seeds=3, grid=3, threshold=4.0, probes=8, max_matvecs=60),
    )
