"""A secret that all of a service share: who does not have it is neither a member nor an operator.

It keeps out who should not be there, on a network that nobody listens to: it travels as it is, and the groups and the
store of torch.distributed know no secret.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket

VARIABLE = "EVENMOE_SECRET"


def shared_secret() -> str:
    """Of this process's environment; empty where there is none."""
    return os.environ.get(VARIABLE, "")


def is_same(theirs: str, ours: str) -> bool:
    return hmac.compare_digest(theirs.encode(), ours.encode())


def require_secret(bind: str, secret: str, *, open_to_all: bool) -> None:
    """Where other machines can ask, they need one."""
    if not secret and not open_to_all and not ipaddress.ip_address(socket.gethostbyname(bind)).is_loopback:
        raise ValueError(
            f"{bind} can be reached from other machines; set {VARIABLE} here, for all members and for operators, or "
            f"say --open (Server(open_to_all=True)) where everybody may ask"
        )
