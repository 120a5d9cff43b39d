"""Test-wide numerics: eight CPU devices, no silent rank promotion."""

import gc
import os
import pathlib

# More threads than simulated devices, or a blocking routine can occupy the whole pool.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

# Before any backend starts: the sharding tests need a mesh, the others use device 0.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# A compiled function maps some ten pieces of memory, of which Linux grants a process
# 65,530; a run of the whole suite would end in a segmentation fault.
MAPPINGS = pathlib.Path("/proc/self/maps")
ENOUGH = 25_000
_tests = 0


def pytest_runtest_teardown():
    """Drop compiled functions before there are too many."""
    global _tests
    _tests += 1
    due = _tests % 20 == 0 and MAPPINGS.exists()
    if due and MAPPINGS.read_bytes().count(b"\n") > ENOUGH:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compile():
    """Compile without the costly passes.

    For tests of types, trees, layouts and wiring, which do not depend on them and spend
    nearly all of their time compiling. The numbers of optimized code are tested method
    by method.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
