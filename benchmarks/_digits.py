"""Handwritten digits and a small multilayer perceptron.

The embedded set is scikit-learn's copy of the 1,797 optdigits test images (8x8, 16
grey levels). Thirteen people wrote it one after the other, so it is dealt out in
thirteen contiguous blocks: held-out digits come mostly from other hands than the
training digits, which is harder and more honest than a shuffled split. ``data_dir``
reads any IDX set (the MNIST file format) instead.
"""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from basinax.benchmarks._models import MLP, count, functional
from basinax.benchmarks._tasks import (
    Batch,
    Defaults,
    Options,
    Splits,
    Task,
    Usage,
    classification,
    dimension_numbers,
    uniform_loss,
)

WRITERS = 13
VALIDATION_BLOCKS, TEST_BLOCKS = (1, 5, 9), (3, 7, 11)  # the other seven are training
EVALUATION_BATCH = 1000
CURVATURE_EXAMPLES = 2000
TARGET = 0.15


class Images(NamedTuple):
    """Images flattened to (examples, pixels) in [0, 1] and their integer labels."""

    inputs: np.ndarray
    labels: np.ndarray


def read_idx(path: Path) -> np.ndarray:
    """Read one array in the IDX format, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8:
        raise Usage(f"{path} is not an IDX file of unsigned bytes")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != math.prod(shape):
        raise Usage(f"{path} is truncated: {values.size} bytes for shape {shape}")
    return values.reshape(shape)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """Find e.g. train-images-idx3-ubyte[.gz] in ``folder``."""
    found = sorted(folder.glob(f"{part}-{kind}*idx*"))
    return found[0] if found else None


def _pair(folder: Path, part: str) -> Images | None:
    images, labels = _find(folder, part, "images"), _find(folder, part, "labels")
    if images is None or labels is None:
        return None
    inputs = read_idx(images)
    inputs = inputs.reshape(len(inputs), -1).astype(np.float32) / 255.0
    return Images(inputs, read_idx(labels).astype(np.int32))


def read_folder(folder: Path) -> tuple[Images, Images, Images]:
    """Read train and t10k IDX files; the last tenth of train is validation."""
    train, test = _pair(folder, "train"), _pair(folder, "t10k")
    if train is None or test is None:
        raise Usage(
            f"{folder} needs train-images*, train-labels*, t10k-images* and "
            "t10k-labels* in IDX format (.gz or not)"
        )
    cut = len(train.labels) - len(train.labels) // 10
    return (
        Images(train.inputs[:cut], train.labels[:cut]),
        Images(train.inputs[cut:], train.labels[cut:]),
        test,
    )


def read_embedded() -> tuple[Images, Images, Images]:
    """Return the embedded digits as train, validation and test blocks."""
    bunch: Any = load_digits()
    inputs = np.asarray(bunch["data"], np.float32) / 16.0  # grey levels 0..16
    labels = np.asarray(bunch["target"], np.int32)
    blocks = np.array_split(np.arange(len(labels)), WRITERS)
    held = (*VALIDATION_BLOCKS, *TEST_BLOCKS)
    training = [index for index in range(WRITERS) if index not in held]

    def gather(chosen: Sequence[int]) -> Images:
        rows = np.concatenate([blocks[index] for index in chosen])
        return Images(inputs[rows], labels[rows])

    return gather(training), gather(VALIDATION_BLOCKS), gather(TEST_BLOCKS)


def _batches(images: Images) -> Batch:
    """Cut into equal evaluation batches, dropping a remainder below one batch."""
    size = min(EVALUATION_BATCH, len(images.labels))
    number = len(images.labels) // size
    inputs = images.inputs[: number * size].reshape(number, size, -1)
    labels = images.labels[: number * size].reshape(number, size)
    return jnp.asarray(inputs), jnp.asarray(labels)


def make(options: Options) -> Task:
    """Build the digits task."""
    if options.data_dir is None:
        train, validation, test = read_embedded()
        source = "scikit-learn digits, dealt out by writer"
    else:
        train, validation, test = read_folder(options.data_dir)
        source = "IDX files given with --data-dir"
    pixels, classes = train.inputs.shape[1], int(train.labels.max()) + 1
    # Centred and scaled with the training pixels only.
    mean, scale = train.inputs.mean(), train.inputs.std()
    train, validation, test = (
        Images((part.inputs - mean) / scale, part.labels)
        for part in (train, validation, test)
    )
    sizes = (pixels, *[options.width or 128] * (options.depth or 2), classes)
    model = functional(lambda rngs: MLP(sizes, rngs=rngs))
    loss, metrics = classification(model.apply)
    batch_size = options.batch_size or 64

    def batch(data: Batch, key: jax.Array) -> Batch:
        inputs, labels = data
        rows = jax.random.randint(key, (batch_size,), 0, labels.shape[0])
        return inputs[rows], labels[rows]

    data = jnp.asarray(train.inputs), jnp.asarray(train.labels)
    few = min(CURVATURE_EXAMPLES, len(train.labels))
    return Task(
        name="digits",
        title=f"digits: MLP {'-'.join(map(str, sizes))}, batch {batch_size}",
        source=source,
        chance=uniform_loss(classes),
        target=TARGET,
        data=data,
        splits=Splits(_batches(train), _batches(validation), _batches(test)),
        curvature=(data[0][:few], data[1][:few]),
        init=model.init,
        loss=loss,
        metrics=metrics,
        batch=batch,
        dimension_numbers=dimension_numbers,
        defaults=Defaults(
            steps=300,
            seeds=5,
            grid=5,
            threshold=4.0,
            probes=32,
            max_matvecs=100,
        ),
        details={
            "train examples": len(train.labels),
            "validation examples": len(validation.labels),
            "test examples": len(test.labels),
            "parameters": count(jax.eval_shape(model.init, jax.random.key(0))),
            "batch size": batch_size,
            "curvature": f"training loss on {few} examples",
        },
    )
