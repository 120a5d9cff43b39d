"""Test-wide numerics: eight CPU devices, no silent rank promotion."""

import os

# More threads than simulated devices, or a blocking routine can occupy the whole pool.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

# Before any backend starts: the sharding tests need a mesh, the others use device 0.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
