"""What tests with Hypothesis share: settings, and values of all kinds."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: The speed of the machine must not matter.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: Values that JSON holds exactly, and the infinities.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)

#: Values that JSON lacks.
OTHERS = (
    st.datetimes()
    | st.decimals(allow_nan=False)
    | st.binary()
    | st.uuids()
    | st.sets(st.integers())
    | st.text(st.characters(categories=["Cs"]), min_size=1)
    | st.dictionaries(st.integers(), st.text(), min_size=1)
)
