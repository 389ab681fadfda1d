"""Command-line options made from the fields of a dataclass: names, types, choices and defaults come from there."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import check_choice

DEVICE_HELP = "cpu, cuda, ...; auto takes a GPU where there is one"


def check_new(output: Path) -> None:
    """Raise ValueError unless a folder to write into is new or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"expected an empty or new folder for --output, found files in {output}; choose another")


def add_fields(
    group: Any,
    cls: type,
    choices: Mapping[str, Iterable[str]],
    help_texts: Mapping[str, str],
    skip: Iterable[str] = (),
) -> None:
    """Add one option for each field of the dataclass ``cls`` to an argument group.

    An option that is not given leaves no attribute, so that presets can tell. Fields of type ``list`` take several values,
    ``dict[str, int]`` takes NAME=NUMBER pairs, ``bool`` becomes ``--x`` / ``--no-x``.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        kinds = _members(hints[field.name])
        text = help_texts.get(field.name, "")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        default = field.default if field.default is not dataclasses.MISSING else None
        if default is not None and default != ():
            text = f"{text} (default: {default})"
        options["help"] = text.strip().replace("%", "%%")
        if field.name in choices:
            names = tuple(choices[field.name])
            group.add_argument(flag, type=_choice(field.name, names), metavar="{" + ",".join(names) + "}", **options)
        elif bool in kinds:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif any(typing.get_origin(kind) is dict for kind in kinds):
            group.add_argument(flag, nargs="+", type=_pair, metavar="NAME=NUMBER", **options)
        elif any(typing.get_origin(kind) in (list, tuple) for kind in kinds):
            group.add_argument(flag, nargs="+", metavar="NAME", **options)
        else:
            kind = next(kind for kind in (float, int, str) if kind in kinds)
            group.add_argument(flag, type=kind, metavar={float: "X", int: "N", str: "TEXT"}[kind], **options)


def add_device(parser: Any) -> None:
    """Add ``--device``, whose value is for :func:`igulora.training.settings.find_device`."""
    parser.add_argument("--device", metavar="NAME", default="auto", help=f"{DEVICE_HELP} (default: auto)")


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that the command line set, in the types that the class takes."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not hasattr(args, field.name):
            continue
        value, kinds = getattr(args, field.name), _members(hints[field.name])
        if any(typing.get_origin(kind) is dict for kind in kinds):
            value = dict(value)
        elif any(typing.get_origin(kind) is tuple for kind in kinds):
            value = tuple(value)
        values[field.name] = value
    return values


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself; None left out."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint,)


def _choice(name: str, options: tuple[str, ...]) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            check_choice(name, value, options)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return check


def _pair(text: str) -> tuple[str, int]:
    name, separator, number = text.rpartition("=")
    if not separator or not name or not number.isdigit():
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER such as q_proj=8, got {text!r}")
    return name, int(number)
