"""What `check_transformation` infers, reports, leaves out and refuses."""

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.testing import CHECKS, ConformanceError, check_transformation

QUICK = ["keeps_dtype", "none_leaves", "donation"]


def scaled(factor, init=lambda params: ()):
    """Multiply updates; a plain transformation, as small ones often are."""
    scale = lambda u, s, p=None: (jax.tree.map(lambda g: factor * g, u), s)  # noqa: E731
    return optax.GradientTransformation(init, scale)


def promoting_and_aliasing():
    return scaled(np.float32(0.5), init=lambda params: params)


def report_of(*arguments, **options):
    with pytest.raises(ConformanceError) as caught:
        check_transformation(*arguments, **options)
    return caught.value


# --- sound ---------------------------------------------------------------------------


def test_a_sound_optimizer_passes_everything():
    seen = []
    result = check_transformation(
        lambda learning_rate=0.1: optax.sgd(learning_rate),
        skip=["auto_mesh", "explicit_mesh"],
        on_check=lambda name, failure: seen.append((name, failure)),
    )
    assert set(result.passed) | set(result.inapplicable) == set(CHECKS)
    assert result.inapplicable == {
        "stacked_leaves": "`stacked` is False",
        "auto_mesh": "in `skip`",
        "explicit_mesh": "in `skip`",
    }
    assert seen == [(name, None) for name in result.passed]


@pytest.mark.parametrize(
    "make",
    [optax.sgd, functools.partial(optax.sgd, 0.1), optax.sgd(0.1), optax.scale_by_sign],
    ids=["factory", "partial", "transformation", "no arguments"],
)
def test_accepts(make):
    assert set(check_transformation(make, only=QUICK).passed) == set(QUICK)


def test_whole_numbers_and_flags_are_not_injected():
    def halved(times=1, negative=True, factor=0.5):
        sign = -1.0 if negative else 1.0
        return optax.chain(*[optax.scale(sign * factor) for _ in range(times)])

    only = ["inject_hyperparams"]
    assert check_transformation(halved, only=only).passed == ("inject_hyperparams",)


def test_a_rate_that_takes_no_schedule_still_falls():
    """A sign step of constant size would circle the minimum."""

    def signs(learning_rate=0.1):
        return optax.chain(optax.scale_by_sign(), scaled(-learning_rate))

    only = ["converges_on_parabola", "constant_schedules"]
    result = check_transformation(signs, learning_rate=0.3, schedules=(), only=only)
    assert result.passed == ("converges_on_parabola",)


def test_extra_arguments_of_both_kinds():
    descend = optax.chain(optax.contrib.reduce_on_plateau(), optax.sgd(0.1))
    for extra in ({"value": 1.0}, lambda loss_fn: {"value": loss_fn(jnp.zeros(2))}):
        only = ["none_leaves"]
        assert check_transformation(descend, extra_args=extra, only=only).passed


# --- left out ------------------------------------------------------------------------


def test_convergence_needs_a_rate_to_set():
    converges = ["converges_on_parabola", "converges_on_mixed_target"]
    left_out = check_transformation(optax.sgd(0.1), only=["vmap"]).inapplicable
    assert all("`learning_rate`" in left_out[name] for name in converges)
    direction = optax.scale_by_rms()
    assert check_transformation(direction, only=converges[:1]).passed


def test_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left_out = check_transformation(optax.sgd, only=["none_leaves"]).inapplicable
    assert 'jax.config.update("jax_num_cpu_devices", 8)' in left_out["auto_mesh"]
    assert "pip install orbax-checkpoint" in left_out["checkpoint_round_trip"]


# --- broken --------------------------------------------------------------------------


def test_reports_every_broken_property_at_once():
    error = report_of(promoting_and_aliasing, only=QUICK)
    assert isinstance(error, AssertionError)
    assert [failure.check for failure in error.failures] == ["keeps_dtype", "donation"]
    assert error.passed == ("none_leaves",)
    title, *paragraphs = str(error).split("\n\n")
    versions = f"(jax {jax.__version__}, optax {optax.__version__})"
    assert title.startswith("promoting_and_aliasing breaks 2 of 3 properties")
    assert versions in " ".join(title.split())
    for failure, paragraph in zip(error.failures, paragraphs, strict=True):
        assert paragraph.startswith(f"{failure.check}: {failure.property}\n")
        assert "Hint:" in paragraph
    dtypes, buffers = paragraphs
    assert "['bias'] is float32[3], expected bfloat16[3]" in dtypes
    assert "astype(g.dtype)" in dtypes
    assert "['params']['bias'] and ['state']['bias'] are the same buffer" in buffers
    assert "copy=True" in buffers


def test_long_reports_are_shortened():
    def talks(updates, _):
        raise RuntimeError("word " * 500 + "\nword" * 50)

    report = str(report_of(lambda: optax.stateless(talks)))
    assert "more lines" in report
    assert len(report) < 2000


def test_a_crash_names_its_place():
    def crashes(updates, _):
        raise KeyError("nothing here")

    (failure,) = report_of(lambda: optax.stateless(crashes)).failures
    assert failure.check == "first_step"
    assert "test_check_transformation.py" in failure.detail
    assert ", in crashes): 'nothing here'" in failure.detail


def test_without_a_first_step_there_is_one_failure():
    (failure,) = report_of(optax.polyak_sgd).failures
    assert "value" in failure.detail
    assert "extra_args=" in failure.hint


def test_a_range_check_on_a_traced_number_is_explained():
    def picky(factor=0.5):
        if factor < 0:
            raise ValueError("negative")
        return scaled(factor)

    (failure,) = report_of(picky, only=["inject_hyperparams"]).failures
    assert "TracerBoolConversionError" in failure.detail
    assert "in picky" in failure.detail
    assert "concrete number" in failure.hint


def test_every_check_has_a_hint():
    from basinax.testing._hints import HINTS, hint

    explained = {"accepts_unknown_extra_args"}  # by its cause
    assert set(HINTS) | explained == set(CHECKS)
    cause = "TypeError: got an unexpected keyword argument 'for_another_link'"
    assert "**extra_args" in hint("accepts_unknown_extra_args", cause)


# --- refused -------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["only", "skip"])
@pytest.mark.parametrize("names", ["donation", ["donations"]])
def test_unknown_checks(argument, names):
    with pytest.raises(ValueError, match=rf"{argument} .*got 'donations?'; .*donation"):
        check_transformation(optax.sgd, **{argument: names})


def test_missing_arguments():
    with pytest.raises(ValueError, match=r"functools\.partial\(clip, max_delta=\.\.\."):
        check_transformation(optax.clip)


@pytest.mark.parametrize("make", [lambda: 3, 3])
def test_no_transformation(make):
    with pytest.raises(TypeError, match="int"):
        check_transformation(make)


def test_needs_assertions():
    code = [sys.executable, "-O", "-c", "import basinax.testing"]
    result = subprocess.run(code, capture_output=True, text=True, check=False)
    assert "without -O" in result.stderr
