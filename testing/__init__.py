"""Is an optax transformation sound? One call tries some thirty properties of it.

>>> import optax
>>> from basinax.testing import check_transformation
>>> check_transformation(optax.sgd, only=["donation", "vmap"]).passed
('vmap', 'donation')

`check_transformation` runs every check that applies, and raises a `ConformanceError`
that reports all broken properties at once as `Failure`s, or returns a `Conformance`.
Test suites that want one test per property make a `Case` and run `checks_for` it.
`CHECKS` holds all checks by name; the first line of a check's docstring is the property
that it demands.
"""

# Said before anything is imported that takes long.
if not __debug__:
    raise ImportError("basinax.testing consists of assertions: run Python without -O.")

from basinax.testing._case import Case
from basinax.testing._check_transformation import check_transformation
from basinax.testing._report import Conformance, ConformanceError, Failure
from basinax.testing._suite import CHECKS, checks_for

__all__ = [
    "CHECKS",
    "Case",
    "Conformance",
    "ConformanceError",
    "Failure",
    "check_transformation",
    "checks_for",
]
