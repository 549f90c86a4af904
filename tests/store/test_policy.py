"""What is asked of another replica makes it keep the very same, whatever it kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvreplica.store.policy import Policy, follow, wish_of

RULES = ("last 3", "last 2, hourly 4, daily 7")


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that follow() may have made."""
    keep = draw(st.sampled_from((None, *RULES)))
    numbers = st.integers(0, 24)
    budget = draw(st.sampled_from(("none", "bytes", "percent")))
    return Policy(
        recovery_points=draw(numbers if keep is None else st.none() | numbers),
        recovery_point_every_s=draw(st.sampled_from((0.0, 60.0, 3600.0))),
        keep=keep,
        budget_bytes=draw(st.integers(1, 1 << 40)) if budget == "bytes" else None,
        budget_percent=draw(st.sampled_from((0.5, 15.0))) if budget == "percent" else None,
        keep_logs_s=draw(st.sampled_from((None, 7200.0))),
        app_consistent=draw(st.booleans()),
        compress_after_points=draw(st.none() | st.integers(1, 9)),
    )


@given(policies(), policies())
def test_wish_makes_any_replica_keep_the_same(wanted: Policy, before: Policy) -> None:
    assert follow(before, wish_of(wanted)) == wanted


def test_policies_of_the_test_have_every_field() -> None:
    """A new field must be passed on, too: name it above."""
    assert set(Policy.__struct_fields__) == {
        "recovery_points",
        "recovery_point_every_s",
        "keep",
        "budget_bytes",
        "budget_percent",
        "keep_logs_s",
        "app_consistent",
        "compress_after_points",
    }
