"""Optional packages: imported where they are used, with an error that says which extra brings them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType


class MissingExtra(ImportError):
    """A package that an optional extra of igulora installs is missing."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, which the extra ``extra`` installs.

    Raises:
        MissingExtra: it is not installed; says what for it is needed and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"{purpose} needs the package {module!r}; install igulora with its extra {extra!r}, in its folder: pip install '.[{extra}]'"
        ) from None


def package_folder(package: str, hint: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingExtra: it is not installed; ``hint`` says how to get it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"expected the package {package!r} to be installed, found none; {hint}")
    return Path(next(iter(spec.submodule_search_locations)))
