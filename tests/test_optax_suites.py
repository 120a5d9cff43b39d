"""Optax's own test suites, run unchanged over our aliases.

Optax ships its tests in its wheel: the suite that every optimizer contributed to it
must pass, and the one for sharding. Both list the optimizers that they test. This file
runs them in a fresh process, from the installed files, with those lists replaced by
ours where the lists are handed to absl's decorators.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import unittest
import unittest.mock

import jax
import optax
import pytest

# The suites have leaves with three axes, where the last two are meant as the matrix.
COMMON_ARGUMENTS = {
    "threshold": 1.0,
    "weight_decay": 0.0,
    "dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1),
}
LEARNING_RATES = {
    "spectra_adamw": 1e-2,
    "spectra_signum": 1e-3,
    "spectra_ademamix": 1e-3,
}

FOLDER = pathlib.Path(optax.__file__).parent
SUITES = {
    "common": FOLDER / "contrib" / "_common_test.py",
    "sharding": FOLDER / "_src" / "sharding_test.py",
}
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    # Threads for XLA. A batched decomposition holds one and waits for another, so with
    # no more threads than devices it may wait forever.
    "NPROC": "16",
}
# Tests in each suite's decorated methods: seven over four targets, two or four dtypes;
# three over one layout.
TESTS_PER_ALIAS = {"common": 2 + 4 + 1 + 2 + 2 + 4 + 1, "sharding": 3}


def load_with_our_optimizers(path):
    """Execute a suite's file with our aliases in the place of its optimizers."""
    from absl.testing import parameterized

    import basinax.optimizers

    entries, instances = [], {}
    for name, rate in LEARNING_RATES.items():
        factory = getattr(basinax.optimizers, name)
        arguments = COMMON_ARGUMENTS | {"learning_rate": rate}
        # The suite looks names up here.
        setattr(optax.contrib, name, factory)
        unwrapped = {"wrapper_name": None, "wrapper_kwargs": None}
        entries.append({"opt_name": name, "opt_kwargs": arguments} | unwrapped)
        instances[name] = factory(**arguments)

    product, named_parameters = parameterized.product, parameterized.named_parameters

    def our_product(*lists, **grid):
        assert all("opt_name" in entry for entries in lists for entry in entries)
        return product(*[entries for _ in lists], **grid)

    def our_named_parameters(*parameters):
        if len(parameters) == 1:  # the items of its dict of optimizers
            return named_parameters(instances.items())
        return lambda test: None  # a test of something else

    spec = importlib.util.spec_from_file_location("suite", path)
    suite = importlib.util.module_from_spec(spec)
    parameterized.product = our_product
    parameterized.named_parameters = our_named_parameters
    try:
        spec.loader.exec_module(suite)
    finally:
        parameterized.product = product
        parameterized.named_parameters = named_parameters
    return suite


def main(path):
    """Run a suite and write its outcome to the last line of standard output."""
    suite = load_with_our_optimizers(path)
    tests = unittest.defaultTestLoader.loadTestsFromModule(suite)
    # The sharding suite skips itself on versions of JAX before "0.7.2", but compares
    # them as strings, so that "0.10.0" counts as one of them.
    with unittest.mock.patch.object(jax, "__version__", "9.9.9"):
        result = unittest.TextTestRunner(stream=sys.stderr).run(tests)
    outcome = {
        "run": result.testsRun,
        "bad": [f"{test}\n{text}" for test, text in result.failures + result.errors],
        "skipped": [f"{test}: {why}" for test, why in result.skipped],
    }
    print(json.dumps(outcome))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_optax_suite(name):
    path = SUITES[name]
    if not path.exists():
        pytest.skip("this version of optax does not ship its tests")
    process = subprocess.run(
        [sys.executable, __file__, path],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    outcome = json.loads(process.stdout.splitlines()[-1])
    assert not outcome["bad"], "\n".join(outcome["bad"])
    assert not outcome["skipped"]
    assert outcome["run"] >= len(LEARNING_RATES) * TESTS_PER_ALIAS[name]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
