"""Makes PEFT know the method: a name in its enumeration of methods, then its own registration."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "igulora"
PREFIX = "igu_"  # begins the names of what a layer holds for the method


def peft_type() -> PeftType:
    """The method's member of PEFT's enumeration, which is closed to other packages: added here when it is not there yet.

    Raises:
        ImportError: PEFT's enumeration is no enumeration of strings any more.
    """
    name = NAME.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    try:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        type.__setattr__(PeftType, name, member)  # EnumType's own refuses names that it knows already
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        if hasattr(PeftType, "_hashable_values_"):  # what `in` looks at from Python 3.13 on
            PeftType._hashable_values_.append(name)
    except (AttributeError, TypeError) as error:
        raise ImportError(_changed(f"its list of methods takes no new name ({error})")) from error
    if PeftType(name) is not member or PeftType[name] is not member or getattr(PeftType, name) is not member:
        raise ImportError(_changed("its list of methods does not give back the name added to it"))
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method; a second time replaces the classes (a module that was imported again).

    Raises:
        ImportError: PEFT registers methods in another way than this version knows.
    """
    kind: Any = peft_type()
    if kind in PEFT_TYPE_TO_TUNER_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind] = config_cls, model_cls
        return
    try:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    except (KeyError, TypeError, ValueError) as error:
        raise ImportError(_changed(f"it refused the registration ({error})")) from error


def _changed(how: str) -> str:
    from peft import __version__

    return f"expected PEFT to take a new method as its version 0.21 does, got version {__version__}: {how}; install peft==0.21.*"
