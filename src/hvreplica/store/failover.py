"""Which failover verb may follow which, and what of it is durable: one table and pure functions over it.

    state                         verb        steps                     leads to
    Replicating                   prepare     -                         PreparedForFailover
    Replicating                   unplanned   finish revert promote     FailedOverWaitingCompletion
    PreparedForFailover           planned     finish promote            FailedOverWaitingCompletion
    PreparedForFailover           unplanned   finish revert promote     FailedOverWaitingCompletion
    PreparedForFailover           cancel      -                         Replicating
    FailedOverWaitingCompletion   cancel      remove restore            Replicating
    FailedOverWaitingCompletion   commit      delete                    FailedOver
    FailedOverWaitingCompletion   reverse     reverse                   Replicating, mode Primary
    FailedOver                    reverse     reverse                   Replicating, mode Primary
    Replicating, mode Primary     adopt       finish remove             Replicating

A verb with steps is an *intent* from its first instant to its last: the VM's record names the verb, the step
that is being done, and all that was chosen, before that step changes anything. Each step may be done twice.
So a verb that was cut is called again and goes on with the recorded step. Only `cancel` may take the place of
an unplanned or planned one that was cut.

A VM that never failed over has no record. From the moment that an intent or a state of failing over is
recorded until cancel has ended, the replica's disks are frozen: nothing is applied, and no primary may claim
the VM, whatever its generation. That, and nobody's goodwill, keeps two active sides from growing out of one
replica. A test failover is independent of it: replication goes on beside it, and so may any verb here.
"""

from __future__ import annotations

import uuid  # noqa: TC003 - msgspec reads the annotations when the program runs
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from hvreplica.clock import iso_time
from hvreplica.errors import Fenced, InvalidTransition, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

REVISION = 1

Mode = Literal["Replica", "Primary"]
State = Literal["Replicating", "PreparedForFailover", "FailedOverWaitingCompletion", "FailedOver"]
Verb = Literal["prepare", "planned", "unplanned", "cancel", "commit", "reverse", "adopt"]
Step = Literal["finish", "revert", "promote", "remove", "restore", "delete", "reverse"]
PointType = Literal["regular", "application-consistent", "planned", "initial"]

TEST_STATE = "FiredrillInProgress"
TEST_MODE = "TestReplica"
_COMMANDS: dict[Verb, str] = {
    "prepare": "replicate --prepare-failover",  # at the primary
    "adopt": "store adopt",
}
_NOT_PREPARED = (
    "shut the VM down and call `hvreplica replicate --prepare-failover` at its primary, then this again;"
    " where the primary is lost it is `hvreplica failover unplanned`"
)
STATES = get_args(State)
VERBS = get_args(Verb)
_APPLYING_STEPS: tuple[Step, ...] = ("finish", "revert")
_INTERRUPTIBLE = ("planned", "unplanned")

_Text = Annotated[str, Meta(max_length=255)]
_DiskIndex = Annotated[int, Meta(ge=0, le=63)]
_Bytes = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Generation = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Rule(NamedTuple):
    """One row of the table."""

    mode: Mode
    state: State
    verb: Verb
    steps: tuple[Step, ...]
    to_mode: Mode
    to_state: State


_PROMOTION: tuple[Step, ...] = ("finish", "revert", "promote")
TABLE = (
    Rule("Replica", "Replicating", "prepare", (), "Replica", "PreparedForFailover"),
    Rule("Replica", "Replicating", "unplanned", _PROMOTION, "Replica", "FailedOverWaitingCompletion"),
    Rule(
        "Replica",
        "PreparedForFailover",
        "planned",
        ("finish", "promote"),
        "Replica",
        "FailedOverWaitingCompletion",
    ),
    Rule("Replica", "PreparedForFailover", "unplanned", _PROMOTION, "Replica", "FailedOverWaitingCompletion"),
    Rule("Replica", "PreparedForFailover", "cancel", (), "Replica", "Replicating"),
    Rule("Replica", "FailedOverWaitingCompletion", "cancel", ("remove", "restore"), "Replica", "Replicating"),
    Rule("Replica", "FailedOverWaitingCompletion", "commit", ("delete",), "Replica", "FailedOver"),
    Rule("Replica", "FailedOverWaitingCompletion", "reverse", ("reverse",), "Primary", "Replicating"),
    Rule("Replica", "FailedOver", "reverse", ("reverse",), "Primary", "Replicating"),
    Rule("Primary", "Replicating", "adopt", ("finish", "remove"), "Replica", "Replicating"),
)


class ActiveDisk(msgspec.Struct, frozen=True):
    """A disk of the active side, a child of the frozen replica's disk. virtual_bytes: as it was made."""

    disk: _DiskIndex
    virtual_bytes: _Bytes


class DiskBefore(msgspec.Struct, frozen=True):
    """What the catalog said of a disk before an older point was made the newest one; cancel puts it back."""

    disk: _DiskIndex
    virtual_bytes: _Bytes
    last_log_id: uuid.UUID
    removed_s: float | None = None
    digest: _Text | None = None


class Reverted(msgspec.Struct, frozen=True):
    """An older point that is made the newest one, recorded before the disks change.

    id: of the point of kind manual that equals it. from_point: the newest one before; it must stay for as
    long as this can be taken back. disks: as they were. returning: since the disks began to be put back.
    """

    id: uuid.UUID
    from_point: uuid.UUID
    disks: list[DiskBefore]
    returning: bool = False


class Intent(msgspec.Struct, frozen=True):
    """A verb that is not done. step: the one that is being done, to be done again after a cut.

    point: that an unplanned failover brings up. then_point: what a cancel fails over to in the end.
    delete_points: whether a commit lets go of all points but the newest.
    """

    verb: Verb
    step: Step
    point: uuid.UUID | None = None
    then_point: uuid.UUID | None = None
    delete_points: bool = False


class Firedrill(msgspec.Struct, frozen=True):
    """A test failover: the point, which stays for as long, and the disks of it that have an overlay."""

    point: uuid.UUID
    disks: Annotated[list[_DiskIndex], Meta(max_length=64)]
    started_s: float
    removing: bool = False


class Failover(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is recorded of a VM that is failed over, on the way there or back, or being tested.

    generation: of the side that is active here; above the one that the VM's primary had. point: what the
    active disks began as. started_s: of the failover, Unix seconds.
    """

    mode: Mode = "Replica"
    state: State = "Replicating"
    intent: Intent | None = None
    generation: _Generation = 0
    point: uuid.UUID | None = None
    point_type: PointType = "regular"
    started_s: float = 0.0
    active: Annotated[list[ActiveDisk], Meta(max_length=64)] = []
    reverted: Reverted | None = None
    test: Firedrill | None = None
    revision: Annotated[int, Meta(ge=1)] = REVISION


AT_WORK = Failover()
_DECODER = msgspec.json.Decoder(Failover)


def pack_failover(failover: Failover) -> str | None:
    """Return what is stored of it; None, as for a VM without a record, where there is nothing to say."""
    return None if failover == AT_WORK else msgspec.json.encode(failover).decode()


def unpack_failover(text: str | None) -> Failover:
    """Return what was stored. Raises: StoreError for what is no record, or that of a newer version."""
    if text is None:
        return AT_WORK
    try:
        found = _DECODER.decode(text)
    except msgspec.MsgspecError as error:
        raise StoreError(
            f"the catalog's record of a failover is damaged: {error}",
            field="failover",
            hint="restore catalog.db from a copy; the disks beside it are plain VHDX files",
        ) from None
    if found.revision != REVISION:
        raise StoreError(
            "the record of a failover is of a newer hvreplica",
            field="revision",
            expected=REVISION,
            actual=found.revision,
            hint="use the hvreplica that wrote it, or a newer one",
        )
    return found


def is_frozen(failover: Failover) -> bool:
    """Return whether the replica's disks must stay as they are, but for the verb that is recorded."""
    if failover.intent is not None or failover.mode != "Replica":
        return True
    return failover.state in {"FailedOverWaitingCompletion", "FailedOver"}


def may_apply(failover: Failover) -> bool:
    """Return whether what was received may be applied: the replica is at work, or a failover waits for it."""
    return not is_frozen(failover) or (
        failover.intent is not None and failover.intent.step in _APPLYING_STEPS
    )


def begin(name: str, failover: Failover, intent_verb: Verb, *, intent: Intent | None = None) -> Failover:
    """Return the record with which the verb begins, or goes on where it was cut; to be stored before acting.

    name: of the VM, for errors. intent: what was chosen, where this is not a repetition; its step is set
    here. Raises: InvalidTransition where the table has no such row.
    """
    running = failover.intent
    if running is not None and running.verb == intent_verb:
        return failover
    if running is not None and not (intent_verb == "cancel" and running.verb in _INTERRUPTIBLE):
        raise _unfinished(name, running, intent_verb)
    rule = _cancel_rule() if running is not None else find_rule(name, failover, intent_verb)
    if not rule.steps:
        return _arrive(replace(failover, intent=intent), rule)
    chosen = intent or Intent(intent_verb, rule.steps[0])
    return replace(failover, intent=replace(chosen, verb=intent_verb, step=rule.steps[0]))


def advance(failover: Failover) -> Failover:
    """Return the record after the recorded step was done; to be stored with what the step has to record."""
    intent = failover.intent
    if intent is None:
        message = "no verb is under way"
        raise AssertionError(message)
    rule = _rule_of(failover, intent)
    following = rule.steps[rule.steps.index(intent.step) + 1 :]
    if following:
        return replace(failover, intent=replace(intent, step=following[0]))
    return _arrive(failover, rule)


def find_rule(name: str, failover: Failover, verb: Verb) -> Rule:
    """Return the row for `verb`. Raises: InvalidTransition, which says what may be done instead."""
    for rule in TABLE:
        if (rule.mode, rule.state, rule.verb) == (failover.mode, failover.state, verb):
            return rule
    possible = possible_verbs(failover)
    raise InvalidTransition(
        f"VM {name!r} is {describe(failover)}: `{command_of(verb)}` does not follow that",
        field="state",
        expected=" or ".join(_states_of(verb)),
        actual=failover.state if failover.mode == "Replica" else f"{failover.state} as {failover.mode}",
        hint=_NOT_PREPARED if "prepare" in possible and verb == "planned" else _hint_of(possible),
    )


def possible_verbs(failover: Failover) -> list[Verb]:
    """Return the verbs that may be called now, in the order of the table."""
    if failover.intent is not None:
        again: list[Verb] = [failover.intent.verb]
        return again + (["cancel"] if failover.intent.verb in _INTERRUPTIBLE else [])
    return [rule.verb for rule in TABLE if (rule.mode, rule.state) == (failover.mode, failover.state)]


def _hint_of(possible: Sequence[Verb]) -> str:
    return f"what may follow: {', '.join(map(command_of, possible)) or 'nothing here'}"


def command_of(verb: Verb) -> str:
    """Return what a person calls for a verb: most are verbs of `failover`, at this side."""
    return _COMMANDS.get(verb, f"failover {verb}")


def describe(failover: Failover) -> str:
    """Return the state in words, to follow "is"."""
    if failover.intent is not None:
        return f"{failover.state}, with an unfinished `{command_of(failover.intent.verb)}`"
    return failover.state if failover.mode == "Replica" else f"{failover.state} as the {failover.mode}"


def frozen_error(name: str, failover: Failover) -> Fenced:
    """Return why a primary may not claim or change the VM now, and what to do about it."""
    since = f" since {iso_time(failover.started_s)}" if failover.started_s else ""
    if failover.mode == "Primary":
        message = f"VM {name!r} runs at this site, which is its primary{since}; here is no replica of it"
        hint = "stop this VM; `hvreplica store adopt` here, then `hvreplica failover reverse` at that site"
    elif failover.state == "FailedOver":
        message = f"VM {name!r} was failed over to this site{since}, and that was committed"
        hint = (
            "stop this VM; `hvreplica store adopt` here, then `hvreplica failover reverse` at the replica's"
            " site make it the replica"
        )
    else:
        message = f"VM {name!r} is failed over to this site{since}: its replica is in use, or about to be"
        hint = (
            "stop this VM; then `hvreplica store adopt` here and `hvreplica failover reverse` at the"
            " replica's site to go on from there, or `hvreplica failover cancel` to give up what was written"
            " there and go on from here"
        )
    error = Fenced(message, field="state", actual=describe(failover), hint=hint)
    error.generation = failover.generation
    return error


def require_thawed(name: str, failover: Failover) -> None:
    """Refuse to let a primary change the replica while it is frozen. Raises: Fenced."""
    if is_frozen(failover):
        raise frozen_error(name, failover)


def pinned_points(failover: Failover) -> frozenset[uuid.UUID]:
    """Return the points that a failover or test rests on: they must not go, whoever asks for it."""
    intent, reverted, test = failover.intent, failover.reverted, failover.test
    found = [] if intent is None else [intent.point, intent.then_point]
    found += [] if reverted is None else [reverted.id, reverted.from_point]
    found += [] if test is None else [test.point]
    return frozenset(point_id for point_id in found if point_id is not None)


def with_test(name: str, failover: Failover, test: Firedrill) -> Failover:
    """Return the record with a test failover, one at a time. Raises: InvalidTransition."""
    if failover.test is not None:
        raise second_test(name, failover.test)
    return replace(failover, test=test)


def second_test(name: str, test: Firedrill) -> InvalidTransition:
    """Return why there is no test of another point beside this one."""
    return InvalidTransition(
        f"VM {name!r} has a test failover already, of point {test.point}",
        field="state",
        actual=TEST_STATE,
        hint="end it with `hvreplica failover test --cleanup`, or go on with it by naming no point",
    )


def _arrive(failover: Failover, rule: Rule) -> Failover:
    if (rule.to_mode, rule.to_state) == ("Replica", "Replicating"):
        cleared = replace(AT_WORK, test=failover.test)
        then_point = None if failover.intent is None else failover.intent.then_point
        if then_point is None:
            return cleared
        # In one step, or a primary could claim the VM between the two failovers.
        following = Intent("unplanned", _PROMOTION[0], point=then_point)
        kept = {"generation": failover.generation, "started_s": failover.started_s}
        return replace(cleared, intent=following, **kept)
    return replace(failover, mode=rule.to_mode, state=rule.to_state, intent=None)


def _rule_of(failover: Failover, intent: Intent) -> Rule:
    if intent.verb == "cancel":
        return _cancel_rule()
    return next(
        rule
        for rule in TABLE
        if (rule.mode, rule.state, rule.verb) == (failover.mode, failover.state, intent.verb)
    )


def _cancel_rule() -> Rule:
    """Return the one cancel that has steps: one that was cut is taken back as a whole one is."""
    return next(rule for rule in TABLE if rule.verb == "cancel" and rule.steps)


def _unfinished(name: str, running: Intent, verb: Verb) -> InvalidTransition:
    others = " or `failover cancel`" if running.verb in _INTERRUPTIBLE else ""
    return InvalidTransition(
        f"`{command_of(running.verb)}` of VM {name!r} was cut before its end;"
        f" `{command_of(verb)}` must wait for it",
        field="intent",
        actual=f"{running.verb}, step {running.step}",
        hint=f"call `{command_of(running.verb)}`{others} again; it goes on where it was cut",
    )


def _states_of(verb: str) -> Sequence[str]:
    return list(dict.fromkeys(rule.state for rule in TABLE if rule.verb == verb))
