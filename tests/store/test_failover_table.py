"""The table of failovers: what follows what, that a cut verb ends as one that was not, and who is let in."""

from __future__ import annotations

import uuid

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from hvreplica.errors import Fenced, InvalidTransition, StoreError
from hvreplica.store import failover as table
from hvreplica.store.failover import AT_WORK, TABLE, Failover, Firedrill, Intent, advance, begin

POINT, OTHER = uuid.UUID(int=7), uuid.UUID(int=8)


def run_to_end(record: Failover, verb: table.Verb, intent: Intent | None = None) -> Failover:
    """Do a verb as a whole, its steps one after the other."""
    record = begin("web01", record, verb, intent=intent)
    while record.intent is not None and record.intent.verb == verb:
        record = advance(record)
    return record


def reach(state: table.State, mode: table.Mode = "Replica") -> Failover:
    """Return the record of a VM in `state`, reached by verbs."""
    ways: dict[tuple[table.Mode, table.State], tuple[table.Verb, ...]] = {
        ("Replica", "Replicating"): (),
        ("Replica", "PreparedForFailover"): ("prepare",),
        ("Replica", "FailedOverWaitingCompletion"): ("unplanned",),
        ("Replica", "FailedOver"): ("unplanned", "commit"),
        ("Primary", "Replicating"): ("unplanned", "reverse"),
    }
    record = AT_WORK
    for verb in ways[mode, state]:
        record = run_to_end(record, verb)
    assert (record.mode, record.state) == (mode, state)
    return record


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.state}-{row.verb}")
def test_every_row_leads_where_it_says(row: table.Rule) -> None:
    record = run_to_end(reach(row.state, row.mode), row.verb)
    assert (record.mode, record.state) == (row.to_mode, row.to_state)
    assert record.intent is None


@pytest.mark.parametrize("state", table.STATES)
@pytest.mark.parametrize("verb", table.VERBS)
def test_what_has_no_row_is_refused_and_says_what_has(state: table.State, verb: table.Verb) -> None:
    record = reach(state)
    if any((row.mode, row.state, row.verb) == ("Replica", state, verb) for row in TABLE):
        begin("web01", record, verb)
        return
    with pytest.raises(InvalidTransition) as caught:
        begin("web01", record, verb)
    assert "web01" in caught.value.message
    for possible in table.possible_verbs(record):
        assert possible in (caught.value.hint or "")


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.steps], ids=lambda row: f"{row.state}-{row.verb}"
)
def test_verb_cut_at_any_step_ends_as_one_that_was_not(row: table.Rule) -> None:
    """What is stored at the cut is all that the repetition has: it must name the step and the choice."""
    wanted = Intent(row.verb, "finish", point=POINT)
    whole = run_to_end(reach(row.state, row.mode), row.verb, wanted)
    record = begin("web01", reach(row.state, row.mode), row.verb, intent=wanted)
    for step in row.steps:
        assert record.intent is not None
        assert (record.intent.step, record.intent.point) == (step, POINT)
        stored = table.unpack_failover(table.pack_failover(record))
        assert begin("web01", stored, row.verb, intent=Intent(row.verb, "finish", point=OTHER)) == record
        record = advance(stored)
    assert record == whole


@pytest.mark.parametrize("verb", ["commit", "reverse", "prepare", "planned"])
def test_cut_verb_lets_no_other_in_but_cancel(verb: table.Verb) -> None:
    cut = begin("web01", AT_WORK, "unplanned", intent=Intent("unplanned", "finish", point=POINT))
    with pytest.raises(InvalidTransition, match="was cut before its end") as caught:
        begin("web01", cut, verb)
    assert "failover cancel" in (caught.value.hint or "")
    assert run_to_end(cut, "cancel") == AT_WORK


def test_cut_commit_and_cut_cancel_cannot_be_cancelled() -> None:
    cut = begin("web01", reach("FailedOverWaitingCompletion"), "commit")
    with pytest.raises(InvalidTransition):
        begin("web01", cut, "cancel")
    cut = begin("web01", reach("FailedOverWaitingCompletion"), "cancel")
    with pytest.raises(InvalidTransition):
        begin("web01", cut, "unplanned")


@pytest.mark.parametrize("state", ["FailedOverWaitingCompletion", "PreparedForFailover"])
def test_cancel_to_another_point_leaves_no_gap_for_a_primary(state: table.State) -> None:
    record = begin("web01", reach(state), "cancel", intent=Intent("cancel", "remove", then_point=OTHER))
    points = set()
    while record.intent is not None:
        assert table.is_frozen(record)
        points.add(record.intent.point)
        record = advance(record)
    assert record.state == "FailedOverWaitingCompletion"
    assert OTHER in points


def test_cut_unplanned_of_a_prepared_vm_is_cancelled_as_any() -> None:
    cut = begin(
        "web01", reach("PreparedForFailover"), "unplanned", intent=Intent("unplanned", "finish", POINT)
    )
    assert run_to_end(cut, "cancel") == AT_WORK


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (reach("FailedOverWaitingCompletion"), "failover cancel"),
        (begin("web01", AT_WORK, "unplanned"), "failover cancel"),
        (reach("FailedOver"), "failover reverse"),
        (run_to_end(reach("FailedOver"), "reverse"), "primary"),
    ],
)
def test_primary_of_a_frozen_vm_is_told_what_happened_and_what_to_do(record: Failover, words: str) -> None:
    with pytest.raises(Fenced) as caught:
        table.require_thawed("web01", replace(record, generation=9))
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.generation == 9


@pytest.mark.parametrize("record", [AT_WORK, reach("PreparedForFailover")])
def test_primary_of_a_vm_at_work_is_let_in(record: Failover) -> None:
    table.require_thawed("web01", record)


def test_test_failover_is_beside_everything_and_one_at_a_time() -> None:
    test = Firedrill(POINT, [0], 1.0)
    record = table.with_test("web01", AT_WORK, test)
    table.require_thawed("web01", record)
    for verb in ("unplanned", "cancel"):
        record = run_to_end(record, verb)
        assert record.test == test
    with pytest.raises(InvalidTransition, match="test failover already"):
        table.with_test("web01", record, test)


@pytest.mark.parametrize("text", ["", "{}x", '{"state":"Elsewhere"}', '{"active":[{"disk":99}]}', "[]"])
def test_damaged_record_is_told_as_such(text: str) -> None:
    with pytest.raises(StoreError, match="damaged"):
        table.unpack_failover(text)


def test_record_of_a_newer_version_is_refused() -> None:
    with pytest.raises(StoreError, match="newer"):
        table.unpack_failover('{"revision":2}')


@given(st.text())
@settings(max_examples=200)
def test_any_text_is_a_record_or_a_store_error(text: str) -> None:
    try:
        table.unpack_failover(text)
    except StoreError:
        return


class TableModel(RuleBasedStateMachine):
    """Verbs in any order, cut anywhere, against what a person would say of the two sites.

    The person knows: which side writes. `here` is whether the disks of this store may be written by somebody
    who runs the VM here; while that is so, or about to be, no primary may be let in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record = AT_WORK
        self.here = False

    @rule(verb=st.sampled_from(table.VERBS))
    def call(self, verb: table.Verb) -> None:
        allowed = verb in table.possible_verbs(self.record)
        try:
            self.record = begin("web01", self.record, verb)
        except InvalidTransition:
            assert not allowed
        else:
            assert allowed
        self.look()

    @rule()
    @precondition(lambda self: self.record.intent is not None)
    def step(self) -> None:
        before = self.record
        self.record = advance(before)
        intent = before.intent
        assert intent is not None
        if intent.step == "promote":
            self.here = True
        if intent.step == "remove":
            self.here = False
        self.look()

    @rule()
    def restart(self) -> None:
        self.record = table.unpack_failover(table.pack_failover(self.record))

    def look(self) -> None:
        """Nothing that is done is left to be done again, and nothing is lost on the way back."""
        if self.record.intent is None and (self.record.mode, self.record.state) == ("Replica", "Replicating"):
            assert table.pack_failover(self.record) is None

    @invariant()
    def two_sides_never_write(self) -> None:
        if self.here:
            with pytest.raises(Fenced):
                table.require_thawed("web01", self.record)

    @invariant()
    def there_is_always_a_way_on(self) -> None:
        assert table.possible_verbs(self.record) or self.record.mode == "Primary"


TableModel.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestTableModel = TableModel.TestCase
