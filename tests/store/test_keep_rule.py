"""The text of a retention rule: what it says, and where it stops being one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import FieldOutOfRange
from hvreplica.store.keep_rule import KEEP_MAX, KeepRule, parse_keep_rule

COUNTS = st.integers(0, KEEP_MAX)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("last 5", KeepRule(last=5)),
        ("last 0", KeepRule()),
        ("last 12, hourly 24, daily 7, weekly 4, app-consistent 3", KeepRule(12, 24, 7, 4, 3)),
        (" app-consistent  3 ,last 1", KeepRule(last=1, app_consistent=3)),
        (f"weekly {KEEP_MAX}", KeepRule(weekly=KEEP_MAX)),
    ],
)
def test_rule_is_read_as_written(text: str, rule: KeepRule) -> None:
    assert parse_keep_rule(text) == rule


@given(st.builds(KeepRule, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS))
def test_text_of_a_rule_is_read_back(rule: KeepRule) -> None:
    assert parse_keep_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "offset", "message", "actual"),
    [
        ("", 0, "not a word and a number", "nothing"),
        ("last", 0, "not a word and a number", "last"),
        ("last 5,", 7, "not a word and a number", "nothing"),
        ("last -1", 0, "not a word and a number", "last -1"),
        ("last 5 hourly 3", 0, "not a word and a number", "last 5 hourly 3"),
        ("last 5, yearly 3", 8, "unknown word", "yearly"),
        ("Last 5", 0, "not a word and a number", "Last 5"),
        ("last 5, hourly 2, last 6", 17, "says 'last' twice", "last 6"),
        (f"daily {KEEP_MAX + 1}", 6, "too many points", str(KEEP_MAX + 1)),
        ("daily " + "9" * 200, 6, "too many points", "9" * 200),
        ("last 5" + " " * 300, 0, "too long", "306"),
        ("last \u0665", 0, "not a word and a number", "last \u0665"),
    ],
)
def test_text_that_is_no_rule_is_refused_with_its_place(
    text: str, offset: int, message: str, actual: str
) -> None:
    with pytest.raises(FieldOutOfRange, match=message) as caught:
        parse_keep_rule(text)
    assert (caught.value.field, caught.value.offset, caught.value.actual) == ("keep", offset, actual)
    assert caught.value.hint


@given(st.text(max_size=300))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse_keep_rule(text)
    except FieldOutOfRange:
        return
    assert parse_keep_rule(str(rule)) == rule
