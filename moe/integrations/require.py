"""What an integration needs installed, and one clear error where it is not."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, *, at_least: str, extra: str) -> None:
    """Raise ImportError unless the package is installed in this version or a later one."""
    advice = f"pip install 'evenmoe[{extra}]' brings one that works"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; {advice}") from None
    if _numbers(found) < _numbers(at_least):
        raise ImportError(f"found {package} {found}; evenmoe works with {at_least} and later: {advice}")


def _numbers(release: str) -> list[int]:
    """The leading numbers of a version: 5.23.0.dev1 -> [5, 23, 0]"""
    leading = re.match(r"\d+(\.\d+)*", release)
    return [int(part) for part in leading[0].split(".")] if leading else []
