"""The headline phenomenon in seconds: ⊥AdamW generalizes, AdamW only memorizes."""

import time

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import _claims_grokking_perp

CPU_SECONDS = 10.0


@pytest.fixture(scope="module")
def run():
    jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
    starts = {"data": time.process_time()}

    def say(text):
        starts.setdefault(text.partition(",")[0], time.process_time())

    finding = _claims_grokking_perp.orthogonal(say, seeds=(0, 1, 2, 3), steps=200)
    return finding, starts["AdamW"] - starts["data"]


def curves(run, name):
    """Return the training and held-out accuracies, (seeds, looks)."""
    found = run[0].numbers["runs"][name]["curves"]
    return np.array(found["train_accuracy"]), np.array(found["test_accuracy"])


def test_orthogonal_gradients_generalize_on_every_seed(run):
    train, test = curves(run, "⊥AdamW")
    assert test.shape == (4, 20)
    assert (test.max(axis=1) >= 0.95).all()
    assert (train[:, -1] >= 0.99).all()
    assert run[0].verdict == "holds"


def test_adamw_from_the_same_start_memorizes(run):
    train, test = curves(run, "AdamW")
    assert (train[:, -1] == 1).all()
    assert (test < 0.05).all()  # at every look, so also where its rival is at 95 %


def test_it_takes_seconds(run):
    """Data, compilation and four runs of ⊥AdamW, before the control begins."""
    assert 0 < run[1] < CPU_SECONDS
