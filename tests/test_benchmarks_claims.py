"""Claims at small sizes, as assertions; the measuring tools they rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

from basinax.benchmarks import (
    _claims_language,
    _claims_spectra,
    _claims_spikes,
    _figures,
    _measure,
)
from basinax.benchmarks._tasks import Options


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """Small decompositions crawl when several threads spin on a busy machine."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def findings():
    return {
        "ceilings": _claims_spectra.ceilings(steps=25, width=32),
        "Frank-Wolfe": _claims_spectra.frank_wolfe(steps=50),
    }


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (1, 7), (10, 10)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
def test_spectral_norm(shape, scale):
    x = scale * np.random.default_rng(0).standard_normal(shape)
    got = _measure.spectral_norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, np.linalg.norm(x, 2), rtol=1e-3)


def test_spectral_norm_of_equal_zero_and_broken_matrices():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    np.testing.assert_allclose(
        _measure.spectral_norm(jnp.asarray(3 * q, jnp.float32)), 3.0, rtol=1e-5
    )
    assert float(_measure.spectral_norm(jnp.zeros((3, 4)))) == 0.0
    assert np.isnan(_measure.spectral_norm(jnp.full((3, 4), jnp.nan)))
    assert float(_measure.max_spectral_norm({"bias": jnp.ones(3)})) == 0.0


def test_median_and_interleaving():
    assert _measure.median([3.0, 1.0, 2.0]) == 2.0
    assert _measure.median([4.0, 1.0, 2.0, 3.0]) == 2.5
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = _measure.interleaved_times(calls, rounds=2, repeats=1)
    assert order == ["a", "b"] * 3  # one warm-up round, two timed
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_ceilings_hold_and_the_control_breaks_them(findings):
    finding = findings["ceilings"]
    assert finding.verdict == "holds"
    runs = finding.numbers["runs"]
    for base in ("adamw", "signum"):
        clipped, plain = runs[f"spectra_{base}"], runs[base]
        assert clipped["step_over_bound"] <= 1.001
        assert clipped["weight_over_bound"] <= 1.001
        assert plain["step_over_bound"] > 3
        assert plain["weight_over_bound"] > 1.2


def test_hard_clipped_spectra_is_composite_frank_wolfe(findings):
    finding = findings["Frank-Wolfe"]
    assert finding.numbers["max_difference"] < 1e-12
    assert finding.numbers["max_relative_gap"] < 1e-12
    assert finding.numbers["max_difference_soft"] > 1e-3
    # The comparison says something only if some singular values were cut.
    assert finding.numbers["clipped_fraction"] > 0.1


def test_the_frank_wolfe_gap_notices_a_wrong_solution():
    m = np.random.default_rng(0).standard_normal((4, 6))
    x = np.zeros_like(m)
    right, gap = _claims_spectra._frank_wolfe_step(x, m, gamma=1.0, b=0.5, radius=1.5)
    assert gap < 1e-14
    nuclear = np.linalg.svd(m + 0.5 * (0.9 * right), compute_uv=False).sum()
    wrong = np.sum((m + 0.45 * right) * 0.9 * right) + 1.5 * nuclear
    assert wrong > 1e-3


def test_spikes_defeat_every_rule_but_the_spectral_ones():
    rivals = {
        name: _claims_spikes.RIVALS[name]._replace(thresholds=thresholds)
        for name, thresholds in {
            "global norm": (30.0,),
            "coordinate": (0.03,),
            "spectral, soft": (0.3,),
        }.items()
    }
    finding = _claims_spikes.spikes(
        steps=200, seeds=(0, 1), rivals=rivals, rates=(0.01, 0.03, 0.3)
    )
    assert finding.verdict == "holds"
    errors = {
        name: found["relative_squared_error"]["mean"]
        for name, found in finding.numbers.items()
    }
    others = min(errors["global norm"], errors["coordinate"])
    assert errors["spectral, soft"] < others / 100


def test_every_finding_can_be_drawn(findings, tmp_path):
    figure = _claims_spectra.draw(findings)
    figure.savefig(tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 10_000
    assert isinstance(figure, type(_figures.new_figure(1, 1)))


@pytest.mark.slow
def test_spikes_in_full():
    finding = _claims_spikes.spikes()
    assert finding.verdict == "holds"
    errors = {
        n: f["relative_squared_error"]["mean"] for n, f in finding.numbers.items()
    }
    # Ten iterations do not reach such spikes, twenty do.
    assert errors["soft by 10 Newton-Schulz steps"] > 2 * errors["spectral, soft"]
    assert errors["soft by 20 Newton-Schulz steps"] < 2 * errors["spectral, soft"]


@pytest.mark.slow
def test_language_model_reports_whatever_it_finds():
    finding = _claims_language.language_model(
        steps=20,
        seeds=(0, 1),
        options=Options(width=64, depth=1, sequence=32, batch_size=8),
    )
    assert finding.verdict in ("holds", "mixed", "does not hold")
    assert set(finding.numbers["runs"]) == set(_claims_language.LANGUAGE_MODEL_RATES)
    assert jax.tree.all(jax.tree.map(np.isfinite, finding.numbers["gains"]))
