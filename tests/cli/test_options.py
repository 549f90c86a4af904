"""Sizes, addresses and settings from the environment."""

from __future__ import annotations

import click
import pytest

from hvreplica.cli.main import cli
from hvreplica.cli.options import ADDRESS, SIZE, variable_name


@pytest.mark.parametrize(
    ("text", "size"), [("10G", 10 << 30), ("2M", 2 << 20), ("512", 512), ("1.5T", 3 << 39)]
)
def test_size_is_in_powers_of_1024(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "10Q", "-1", "1..2", "0.3", "9" * 30])
def test_size_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize("text", ["127.0.0.1:8084", "replica.example:0", "[::1]:65535"])
def test_address_stays_as_written(text: str) -> None:
    assert ADDRESS.convert(text, None, None) == text


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:", "host:65536", "::1:80", "host:-1", "host:1e3", "host:\u0661"]
)
def test_address_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter):
        ADDRESS.convert(text, None, None)


def options_of(group: click.Group, prefix: str) -> list[str]:
    names = []
    for name, command in group.commands.items():
        inner = f"{prefix}_{name}"
        if isinstance(command, click.Group):
            names += options_of(command, inner)
        else:
            names += [variable_name(o, inner) for o in command.params if isinstance(o, click.Option)]
    return names


def test_variables_are_named_as_the_options_and_are_unique() -> None:
    names = options_of(cli, "HVREPLICA")
    assert len(names) == len(set(names))
    assert {"HVREPLICA_DISK_CREATE_SIZE", "HVREPLICA_REPLICATE_DISK", "HVREPLICA_POINT_EXPORT_FORMAT"} <= set(
        names
    )


def value_of(env: dict[str, str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> object:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    command = cli.commands["serve"]
    context = command.make_context("serve", arguments, auto_envvar_prefix="HVREPLICA_SERVE")
    return context.params["listen"], str(context.params["store"])


def test_environment_fills_in_and_the_command_line_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HVREPLICA_SERVE_LISTEN": "[::1]:1", "HVREPLICA_STORE": "/s", "HVREPLICA_TLS": "/t"}
    assert value_of(env, monkeypatch, []) == ("[::1]:1", "/s")
    assert value_of(env, monkeypatch, ["--listen", "a:2", "--store", "/x"]) == ("a:2", "/x")
    assert value_of({"HVREPLICA_SERVE_LISTEN": ""}, monkeypatch, []) == ("127.0.0.1:8084", "/s")
