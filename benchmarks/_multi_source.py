"""Bytes from several sources: what they hold in common, and what a stranger shows.

Every source has its own kind of text.  Its last tenth is held out, and one more source
is never trained on, so a model can be asked how it does on text of a kind it has not
seen.  By default the sources are parts of the Python standard library, which are on
every machine; five Debian packages hold text of far more different kinds and are taken
where all of them are installed.
"""

import gzip
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from basinax.benchmarks._bytes import SEPARATOR, library_files
from basinax.benchmarks._tasks import Usage

HELD_OUT = 10  # one byte in ten, at the end of every source
MAX_BYTES = 8 * 2**20  # of one source

# Files and folders of the standard library; Python versions differ in which exist.
LIBRARY = {
    "codec tables": ("encodings/",),
    "manual": ("pydoc_data/",),
    "network": ("asyncio/", "http/", "urllib/", "socketserver.py", "ftplib.py"),
    "mail and markup": ("email/", "html/", "xml/"),
    "numbers": (
        "_pydatetime.py",
        "_pydecimal.py",
        "datetime.py",
        "fractions.py",
        "random.py",
        "statistics.py",
    ),
}
LIBRARY_UNSEEN = (
    "introspection",
    ("ast.py", "dataclasses.py", "dis.py", "enum.py", "inspect.py", "typing.py"),
)


class Domain(NamedTuple):
    """Where one Debian package keeps text of one kind."""

    package: str
    folder: str
    pattern: str


DOMAINS = {
    "documentation": Domain(
        "python3.11-doc", "usr/share/doc/python3.11/html/_sources", "**/*.rst.txt"
    ),
    "Go": Domain("golang-1.19-src", "usr/share/go-1.19/src", "**/*.go"),
    "proofs": Domain("metamath-databases", "usr/share/metamath/databases", "set.mm"),
    "dictionary": Domain("dict-gcide", "usr/share/dictd", "gcide.dict.dz"),
    "essays": Domain("anarchism", "usr/share/doc/anarchism/markdown", "*.md.gz"),
}
INSTALL = "apt-get install " + " ".join(d.package for d in DOMAINS.values())


class MultiSource(NamedTuple):
    """Training text and held-out text of every source, and text of one more."""

    names: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    unseen_name: str
    unseen: np.ndarray
    origin: str

    @property
    def text(self) -> np.ndarray:
        """All training text, source after source."""
        return np.concatenate(self.train)

    @property
    def digest(self) -> str:
        """Short hash that tells two collections apart."""
        sha = hashlib.sha256()
        for part in (*self.train, *self.held_out, self.unseen):
            sha.update(part.tobytes())
        return sha.hexdigest()[:12]


def join(texts: Iterable[bytes], limit: int = MAX_BYTES) -> np.ndarray:
    """Put texts one after the other, up to a number of bytes."""
    chosen, total = [], 0
    for text in texts:
        if not text or SEPARATOR in text:
            continue
        chosen.append(text)
        total += len(text)
        if total >= limit:
            break
    return np.frombuffer(SEPARATOR.join(chosen)[:limit], np.uint8)


def collect(
    texts: dict[str, np.ndarray], unseen: tuple[str, np.ndarray], origin: str
) -> MultiSource:
    """Hold out the end of every source.

    Raises:
      Usage: a source is empty.
    """
    for name, text in (*texts.items(), unseen):
        if len(text) < HELD_OUT:
            raise Usage(f"the source {name!r} has no text ({origin})")
    cuts = [len(text) - len(text) // HELD_OUT for text in texts.values()]
    pairs = list(zip(texts.values(), cuts, strict=True))
    return MultiSource(
        tuple(texts),
        tuple(text[:cut] for text, cut in pairs),
        tuple(text[cut:] for text, cut in pairs),
        *unseen,
        origin,
    )


def _library_texts(groups: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Read what starts with certain paths in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in library_files()}
    return {
        group: join(
            path.read_bytes()
            for name, path in files.items()
            if name.startswith(prefixes)
        )
        for group, prefixes in groups.items()
    }


def standard_library() -> MultiSource:
    """Read the sources from the Python standard library."""
    name, prefixes = LIBRARY_UNSEEN
    texts = _library_texts({**LIBRARY, name: prefixes})
    unseen = name, texts.pop(name)
    return collect(texts, unseen, "parts of the Python standard library")


def _domain_text(folder: Path, pattern: str) -> Iterator[bytes]:
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and not path.name.endswith("_test.go"):
            # Dictionaries are in a format that gzip can read.
            packed = path.suffix in (".gz", ".dz")
            yield gzip.decompress(path.read_bytes()) if packed else path.read_bytes()


def domains(root: Path = Path("/")) -> MultiSource:
    """Read five Debian packages; the standard library is the source not trained on.

    Args:
      root: folder that the packages are unpacked in.

    Raises:
      Usage: a package is not there.
    """
    missing = [
        domain.package
        for domain in DOMAINS.values()
        if not any((root / domain.folder).glob(domain.pattern))
    ]
    if missing:
        raise Usage(
            f"the text of {', '.join(missing)} is not installed; all five: {INSTALL}"
        )
    texts = {
        name: join(_domain_text(root / domain.folder, domain.pattern))
        for name, domain in DOMAINS.items()
    }
    (unseen,) = _library_texts({"Python": ("",)}).items()
    return collect(texts, unseen, "five Debian packages")


def load() -> MultiSource:
    """Read the five packages where they are installed, else the standard library."""
    try:
        return domains()
    except Usage as missing:
        sources = standard_library()
        return sources._replace(origin=f"{sources.origin} ({missing})")


def pure(
    sources: MultiSource, rng: np.random.Generator, steps: int, size: int, length: int
) -> np.ndarray:
    """Draw where windows of one source per micro-batch start.

    The sources take turns in an order that is drawn anew for every step.

    Args:
      sources: where to draw from.
      rng: source of randomness.
      steps: training steps.
      size: windows per micro-batch.
      length: bytes that have to follow a start, the window included.

    Returns:
      Positions in `sources.text`, shape (steps, number of sources, size).
    """
    ends = np.cumsum([len(text) for text in sources.train])
    starts = [
        rng.integers(end - len(text), end - length, (steps, 1, size), endpoint=True)
        for text, end in zip(sources.train, ends, strict=True)
    ]
    order = rng.permuted(np.tile(np.arange(len(starts)), (steps, 1)), axis=1)
    return np.take_along_axis(np.concatenate(starts, axis=1), order[:, :, None], axis=1)


def mixed(starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deal the windows of every step to its micro-batches regardless of source."""
    flat = starts.reshape(len(starts), -1)
    return rng.permuted(flat, axis=1).reshape(starts.shape)
