"""Line: a connection to the server. One line of JSON a message, either way."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any


class Line:
    """member: at the other end, 0 for nobody. seen: the version of the view it was sent. known: it has the secret."""

    def __init__(self, link: socket.socket, known: bool) -> None:
        self.link, self.member, self.seen, self.rest = link, 0, -1, b""
        self.known = known
        self.out = b""

    def lines(self) -> list[dict[str, Any]] | None:
        """What came; None where the other end is gone."""
        try:
            data = self.link.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in whole]

    def say(self, message: Mapping[str, Any]) -> None:
        self.out += json.dumps(message).encode() + b"\n"

    def flush(self) -> None:
        """As much as goes; who does not read does not keep the others waiting."""
        while self.out:
            try:
                self.out = self.out[self.link.send(self.out) :]
            except BlockingIOError:
                return
            except OSError:
                self.out = b""
