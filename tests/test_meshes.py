"""Sharded updates on Auto and Explicit meshes equal those of a single device."""

import jax
import pytest
from jax.sharding import AxisType
from registry import CASES, with_variants_later

from basinax.testing import checks_for

pytestmark = pytest.mark.usefixtures("quick_compile")
CHECK = {AxisType.Auto: "auto_mesh", AxisType.Explicit: "explicit_mesh"}


@pytest.mark.parametrize("axis_type", list(CHECK), ids=str)
@pytest.mark.parametrize("case", with_variants_later(CASES))
def test_sharded_steps_equal_those_of_one_device(case, axis_type):
    checks_for(case)[CHECK[axis_type]](case)


def test_there_are_eight_devices():
    """The checks make do with fewer."""
    assert jax.device_count() == 8
