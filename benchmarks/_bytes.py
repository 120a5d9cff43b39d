"""Byte-level language modelling of the Python standard library's own source.

The text is on every machine that runs this. Files are taken in sorted order and split
whole, so nothing held out shares a file with the training text; the test suites of the
library are left out because some distributions do not ship them. Python versions
differ, therefore the digest of the text is part of the results. ``data_dir`` reads a
user's own text files instead.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from basinax.benchmarks._models import Transformer, count, functional
from basinax.benchmarks._tasks import (
    Batch,
    Defaults,
    Options,
    Params,
    Splits,
    Task,
    Usage,
    classification,
    dimension_numbers,
    uniform_loss,
)

VOCABULARY = 256
SEPARATOR = b"\0"  # between files; does not occur in source text
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
EVERY = 20  # one file in twenty is validation, another one is test
MAX_BYTES = 64 * 2**20
VALIDATION_WINDOWS, TEST_WINDOWS, CURVATURE_WINDOWS = 32, 256, 8
EVALUATION_BATCH = 16
TARGET = 2.0


class Corpus(NamedTuple):
    """Text as bytes, cut into splits, and how it was cut."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    files: int
    cut: str

    @property
    def digest(self) -> str:
        """Short hash that tells two corpora apart."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            sha.update(part.tobytes())
        return sha.hexdigest()[:12]


def library_files() -> list[Path]:
    """List the standard library's source files in a deterministic order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (
        path
        for path in root.rglob("*.py")
        if not SKIPPED.intersection(path.relative_to(root).parts[:-1])
    )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _texts(files: list[Path]) -> Iterator[bytes]:
    """Read files that are text, leaving out what goes beyond ``MAX_BYTES`` in all."""
    total = 0
    for path in files:
        if total + path.stat().st_size > MAX_BYTES:
            continue
        text = path.read_bytes()
        if text and SEPARATOR not in text:
            total += len(text)
            yield text


def read_corpus(data_dir: Path | None) -> Corpus:
    """Read and split the standard library, or the text files below ``data_dir``."""
    if data_dir is None:
        files = library_files()
    else:
        files = sorted(path for path in data_dir.rglob("*") if path.is_file())
    texts = list(_texts(files))

    def join(chosen: list[bytes]) -> np.ndarray:
        return np.frombuffer(SEPARATOR.join(chosen), np.uint8)

    if len(texts) >= EVERY:
        held = {0: [], EVERY // 2: []}
        train = []
        for index, text in enumerate(texts):
            held.get(index % EVERY, train).append(text)
        validation, test = held.values()
        return Corpus(
            join(train), join(validation), join(test), len(texts), "whole files"
        )
    # Too few files to hold whole ones out: the last tenth is held out instead.
    everything = join(texts)
    a, b = int(0.9 * len(everything)), int(0.95 * len(everything))
    return Corpus(
        everything[:a], everything[a:b], everything[b:], len(texts), "last tenth"
    )


def windows(text: np.ndarray, number: int, length: int) -> np.ndarray:
    """Cut ``number`` evenly spaced windows of ``length`` + 1 bytes."""
    starts = np.linspace(0, len(text) - length - 1, number).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)[None, :]]


def _pairs(rows: jax.Array) -> Batch:
    tokens = rows.astype(jnp.int32)
    return tokens[..., :-1], tokens[..., 1:]


def _batches(text: np.ndarray, number: int, length: int) -> Batch:
    rows = windows(text, number, length)
    return _pairs(jnp.asarray(rows.reshape(-1, EVALUATION_BATCH, length + 1)))


def make(options: Options) -> Task:
    """Build the byte-level language-model task."""
    width, depth = options.width or 128, options.depth or 4
    length, batch_size = options.sequence or 128, options.batch_size or 8
    if width % 32:
        raise Usage(f"--width {width}: the transformer needs a multiple of 32")
    corpus = read_corpus(options.data_dir)
    if min(map(len, corpus[:3])) < 4 * (length + 1):
        place = options.data_dir or "the standard library"
        raise Usage(f"too little text in {place}: {sum(map(len, corpus[:3]))} bytes")
    model = functional(
        lambda rngs: Transformer(VOCABULARY, width, depth, width // 32, rngs=rngs)
    )
    loss, metrics = classification(model.apply)

    def batch(data: jax.Array, key: jax.Array) -> Batch:
        starts = jax.random.randint(key, (batch_size,), 0, data.shape[0] - length)
        return _pairs(data[starts[:, None] + jnp.arange(length + 1)[None, :]])

    def numbers(params: Params) -> object:
        return dimension_numbers(params, transposed=("embedding",))

    return Task(
        name="bytes",
        title=f"bytes: transformer, width {width}, depth {depth}, "
        f"{batch_size} x {length} bytes per step",
        source="Python standard library source"
        if options.data_dir is None
        else "text files given with --data-dir",
        chance=uniform_loss(VOCABULARY),
        target=TARGET,
        data=jnp.asarray(corpus.train),
        splits=Splits(
            _batches(corpus.train, VALIDATION_WINDOWS, length),
            _batches(corpus.validation, VALIDATION_WINDOWS, length),
            _batches(corpus.test, TEST_WINDOWS, length),
        ),
        curvature=_pairs(jnp.asarray(windows(corpus.train, CURVATURE_WINDOWS, length))),
        init=model.init,
        loss=loss,
        metrics=metrics,
        batch=batch,
        dimension_numbers=numbers,
        defaults=Defaults(
            steps=200,
            seeds=3,
            grid=3,
            threshold=4.0,
            probes=8,
            max_matvecs=30,
            surface=7,
        ),
        details={
            "files": corpus.files,
            "held out by": corpus.cut,
            "train bytes": len(corpus.train),
            "validation bytes": len(corpus.validation),
            "test bytes": len(corpus.test),
            "text digest": corpus.digest,
            "parameters": count(jax.eval_shape(model.init, jax.random.key(0))),
            "batch size": batch_size,
            "curvature": f"training loss on {CURVATURE_WINDOWS} windows",
        },
    )
