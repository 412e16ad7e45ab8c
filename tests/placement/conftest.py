"""Planners take as long as the machine is busy: no test of ours has a deadline."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("placement", deadline=None)
settings.load_profile("placement")
