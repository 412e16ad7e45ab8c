"""A member that a launcher starts: `python -m tests.moe.live.worker found|join FOLDER`. It says there who it is, and at
its end what it saw. The coordinator is where EVENMOE_COORDINATOR says."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tests.moe.live.member import Part, even, serve

EXPERTS = 8


def main(role: str, folder: Path) -> None:
    (folder / f"{role}-{os.getpid()}").touch()
    plan = even(EXPERTS, int(os.environ["WORLD_SIZE"])) if role == "found" else None
    ours, theirs = multiprocessing.Pipe()
    serve(Part(address=os.environ["EVENMOE_COORDINATOR"], experts=EXPERTS, plan=plan), theirs)
    ours.recv()  # its number
    told = ours.recv()
    (folder / f"told-{told.pid}").write_text(json.dumps(asdict(told)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
