"""Results on disk: plain JSON, the environment they come from, means and spreads."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

SCHEMA = 1
PACKAGES = ("basinax", "jax", "jaxlib", "optax", "flax", "numpy")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (source tree)"


def _processor() -> str:
    """Name the processor as its maker does, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Describe versions and hardware, without names of machines or users."""
    device = jax.devices()[0]
    cores = os.cpu_count()
    hardware = f"{_processor()}, {cores} cores"
    if device.platform != "cpu":
        hardware = f"{device.device_kind}; host {hardware}"
    return {
        "hardware": hardware,
        "backend": device.platform,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def plain(value: Any) -> Any:
    """Turn NamedTuples, arrays and non-finite numbers into what JSON can hold."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or none: an interruption leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain(value), indent=1) + "\n")
    partial.replace(path)


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample standard deviation and how many values were finite."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    mean = sum(finite) / len(finite) if finite else None
    sd = None
    if mean is not None and len(finite) > 1:
        sd = math.sqrt(sum((v - mean) ** 2 for v in finite) / (len(finite) - 1))
    return {"mean": mean, "sd": sd, "finite": len(finite), "of": len(values)}
