"""Groups of settings: validated, frozen dataclasses whose fields name their environment variables.

Each folder that has settings declares its group in a small ``settings.py`` of its own;
:mod:`da3_runtime.settings` combines them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from da3_runtime.errors import SettingError

AUTO = "auto"
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)

Group = TypeVar("Group")


_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}


def _flag(value: object) -> bool:
    """Only these spellings: pydantic's own, such as "on", could open a server by mistake."""
    text = str(int(value)) if isinstance(value, bool) else str(value).strip().lower()
    if text not in _FLAGS:
        raise ValueError("not a flag")
    return _FLAGS[text]


def _is_whole(value: object) -> bool:
    """Whether a value is a whole number, or text that is one; pydantic would also take 2.0 and True."""
    if not isinstance(value, str):
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        int(value)
    except ValueError:
        return False
    return True


_BYTES = re.compile(r"([\d.]+)\s*([kmgt]?)(i?)(?:b(?:ytes?)?|(?<=i))", re.IGNORECASE)
_PIXELS = re.compile(r"([\d.]+)\s*([kmg]?)(?:p|pixels?|px)", re.IGNORECASE)
_SIDES = re.compile(r"(\d{1,9})\s*[x\u00d7*]\s*(\d{1,9})(?:\s*(?:pixels?|px))?", re.IGNORECASE)


def number_with_unit(name: str, value: object) -> object:
    """The number of bytes or pixels that a text states with a unit; any other value as it is.

    Parameters
    ----------
    name : str
        Name of the setting. One of bytes takes texts such as ``64 MiB`` and ``20MB``; one of pixels
        takes ``8192 x 8192`` and ``24 MP``. Only a multiplier with an i is a power of 1024.
    """
    unit = unit_of(name)
    if not isinstance(value, str) or not unit:
        return value
    text = value.strip()
    if unit == "pixels" and (sides := _SIDES.fullmatch(text)):
        return int(sides[1]) * int(sides[2])
    found = (_PIXELS if unit == "pixels" else _BYTES).fullmatch(text)
    if found is None:
        return value
    number, prefix, *binary = found.groups()
    try:
        total = Fraction(number) * (1024 if any(binary) else 1000) ** " kmgt".index(
            prefix.lower() or " "
        )
    except ValueError:  # such as 1.2.3
        return value
    return total.numerator if total.denominator == 1 else value


def unit_of(name: str) -> str:
    """``bytes`` or ``pixels`` if the name of a setting says that it counts them, else nothing."""
    return next((unit for unit in ("bytes", "pixels") if unit in name.split("_")), "")


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def comma_separated(pattern: str, end: str = "") -> BeforeValidator:
    """Validator of a tuple: one comma-separated text, or several texts, each of which must match.

    Parameters
    ----------
    pattern : str
        Regular expression of a text in lower case.
    end : str
        Characters that do not count at the end of a text.
    """

    def split(value: object) -> object:
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            return value
        found = tuple(str(text).strip().lower().rstrip(end) for text in texts if str(text).strip())
        if not all(re.fullmatch(pattern, text) for text in found):
            raise ValueError("not of this pattern")
        return found

    return BeforeValidator(split)


def one_of(*names: str) -> BeforeValidator:
    """Validator of a text that is one of ``names``, in any case."""

    def check(value: object) -> object:
        if _lowered(value) not in names:
            raise ValueError("not one of them")
        return _lowered(value)

    return BeforeValidator(check)


Flag = Annotated[bool, BeforeValidator(_flag)]
Name = Annotated[str, BeforeValidator(_lowered)]


def setting(
    default: object,
    description: str,
    *,
    variables: tuple[str, ...] = (),
    takes: str = "",
    low: int | None = None,
    high: int | None = None,
    multiple: int | None = None,
    is_secret: bool = False,
) -> Any:
    """Declare a field of a group: default value, limits and documentation.

    Parameters
    ----------
    description : str
        What the setting does, its unit, and what an unset variable means.
    variables : tuple[str, ...]
        Environment variables that set it; the field's name in capitals if empty.
    takes : str
        Its valid values in words; derived from type and limits if empty.
    low, high, multiple : int | None
        Smallest and largest value, and the step, of a number.
    is_secret : bool
        Whether ``repr`` hides the value.
    """
    return Field(
        default,
        description=description,
        ge=low,
        le=high,
        multiple_of=multiple,
        repr=not is_secret,
        json_schema_extra={"variables": list(variables), "takes": takes},
    )


class Setting(NamedTuple):
    """One setting as documentation and error messages describe it.

    Attributes
    ----------
    group : str
        Title of its group.
    variables : tuple[str, ...]
        Environment variables that set it, the preferred one first.
    takes : str
        Type and range in words.
    default : str
        Default value as text; ``unset`` for None.
    description : str
        What the setting does.
    name : str
        Name of the field, and of the keyword argument of :func:`da3_runtime.load`.
    is_number, is_secret : bool
        Whether it is a whole number; whether its value is hidden.
    """

    group: str
    variables: tuple[str, ...]
    takes: str
    default: str
    description: str
    name: str
    is_number: bool
    is_secret: bool


def settings_of_group(group: type[Any]) -> list[Setting]:
    """Every setting of a group, in the order of its fields."""
    fields: dict[str, FieldInfo] = group.__pydantic_fields__
    return [_described(group.title, name, field) for name, field in fields.items()]


def _described(title: str, name: str, field: FieldInfo) -> Setting:
    extra: Any = field.json_schema_extra
    variables = tuple(extra["variables"]) or (name.upper(),)
    return Setting(
        title,
        variables,
        extra["takes"] or _takes(name, field),
        _default_text(field.default),
        field.description or "",
        name,
        int in (field.annotation, *get_args(field.annotation)),
        not field.repr,
    )


_SPELLINGS = {"": "", "bytes": ", such as 64 MiB", "pixels": ", such as 4096 x 4096 or 24 MP"}


def _takes(name: str, field: FieldInfo) -> str:
    """Type and range of a field in words, to follow "must be"."""
    types = {field.annotation, *get_args(field.annotation)}
    if bool in types:
        return "0 or 1"
    if Path in types:
        return "a path"
    if int not in types:
        return "text"
    limits = {
        name: getattr(each, name)
        for each in field.metadata
        for name in ("ge", "le", "multiple_of")
        if hasattr(each, name)
    }
    multiple = f" that is a multiple of {limits['multiple_of']}" if "multiple_of" in limits else ""
    return f"a whole number from {limits['ge']} to {limits['le']}{multiple}{_SPELLINGS[unit_of(name)]}"


def _default_text(value: object) -> str:
    if value is None or value == ():
        return "unset"
    return str(int(value) if isinstance(value, bool) else value)


def variables_given(group: type[Any], env: Mapping[str, str]) -> dict[str, str]:
    """Field name -> the variable in ``env`` that sets it; an empty variable counts as unset."""
    given = {}
    for each in settings_of_group(group):
        found = [variable for variable in each.variables if env.get(variable)]
        if found:
            given[each.name] = found[0]
    return given


def make_group(
    group: type[Group], values: Mapping[str, object], names: Mapping[str, str] | None = None
) -> Group:
    """A group of settings from values by field name.

    Parameters
    ----------
    names : Mapping[str, str] | None
        Names for error messages, by field name; a field without one keeps its own.

    Raises
    ------
    SettingError
        If a value is invalid; the message names the setting and its valid values.
    """
    known = {each.name: each for each in settings_of_group(group)}

    def invalid(name: str, value: object) -> SettingError:
        if name not in known:
            return SettingError(f"{name} is not a setting; the settings are: {', '.join(known)}.")
        shown = (names or {}).get(name, name)
        given = "" if known[name].is_secret else f", not {value!r}"
        return SettingError(f"{shown} must be {known[name].takes}{given}.")

    values = {name: number_with_unit(name, value) for name, value in values.items()}
    for name, value in values.items():
        if name in known and known[name].is_number and value is not None and not _is_whole(value):
            raise invalid(name, value)
    try:
        return group(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise invalid(str(first["loc"][0]), first["input"]) from None
