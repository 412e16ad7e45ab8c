"""A host that is missing or too old is named, with what works."""

from __future__ import annotations

import pytest

from moe.integrations import require as module
from moe.integrations.require import require

pytestmark = pytest.mark.fast


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"no-such-host is not installed; pip install 'evenmoe\[hf\]'"):
        require("no-such-host", at_least="1.0", extra="hf")
    monkeypatch.setattr(module, "version", lambda package: "4.57.6")
    with pytest.raises(ImportError, match=r"found host 4.57.6; evenmoe works with 5.22.2 and later"):
        require("host", at_least="5.22.2", extra="hf")
    for good in ("5.22.2", "5.23.0.dev1", "10.0", "6"):
        monkeypatch.setattr(module, "version", lambda package, good=good: good)
        require("host", at_least="5.22.2", extra="hf")
