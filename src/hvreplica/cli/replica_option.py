"""The option that names a further replica of a captured VM: NAME=HOST:PORT and its settings, by commas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvreplica.cli.options import ADDRESS, DURATION, SecondsType, TextParameter
from hvreplica.cli.policy_options import BudgetType

if TYPE_CHECKING:
    import click

_METAVAR = "NAME=HOST:PORT[,SETTING=VALUE]..."
_POINTS = {"recovery-points", "recovery-point-every", "points-budget", "keep-logs"}


class ReplicaType(TextParameter):
    """Returns a Replica."""

    name = _METAVAR

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from hvreplica.replication.replica_folders import checked_name  # noqa: PLC0415 - start-up of --help
        from hvreplica.replication.replicas import Replica  # noqa: PLC0415

        first, *others = str(value).split(",")
        name, equals, address = first.partition("=")
        if not equals:
            self.fail(f"{first!r} is not NAME=HOST:PORT", param, ctx)
        try:
            checked_name(name)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        given: dict[str, Any] = {"name": name, "to": ADDRESS.convert(address, param, ctx)}
        points: dict[str, Any] = {}
        for setting in others:
            key, equals, text = setting.partition("=")
            if key == "continuous" and not equals:
                given["continuous"] = True
            elif key == "interval" and equals:
                given["interval_s"] = SecondsType().convert(text, param, ctx)
            elif key == "tls" and text:
                given["tls"] = text
            elif key in _POINTS and equals:
                points[key] = self._point_setting(key, text, param, ctx)
            else:
                known = ", ".join(["interval=SECONDS", "continuous", "tls=DIR", *sorted(_POINTS)])
                self.fail(f"{setting!r} is no setting of a replica; there are {known}", param, ctx)
        if given.get("continuous") and "interval_s" in given:
            self.fail("interval and continuous exclude each other", param, ctx)
        return Replica(**given, points=_wish(points))

    def _point_setting(
        self, key: str, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if key == "points-budget":
            return BudgetType().convert(text, param, ctx)
        if key == "keep-logs":
            return DURATION.convert(text, param, ctx)
        most = 24 if key == "recovery-points" else None
        if not text.isdecimal() or (most is not None and int(text) > most):
            self.fail(
                f"{key} is a number{'' if most is None else f' from 0 to {most}'}, not {text!r}", param, ctx
            )
        return int(text)


def _wish(points: dict[str, Any]) -> Any:
    if not points:
        return None
    from hvreplica.replication.retention_verbs import make_wish  # noqa: PLC0415

    order = ("recovery-points", "recovery-point-every", "keep", "points-budget", "keep-logs")
    return make_wish(*(points.get(key) for key in order))
