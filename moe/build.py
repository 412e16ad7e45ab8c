"""Builds the compiled path, once; nothing needs it. `python -m moe.build`, or `make native`."""

from __future__ import annotations

from moe.blocks import KERNELS
from routing import DECIDERS

LIBRARIES = (DECIDERS, KERNELS)


def main() -> None:
    try:
        for library in LIBRARIES:
            library.build()
            print(f"{library.name}: {library.in_use()}")
    except ValueError as failure:
        raise SystemExit(str(failure)) from None


if __name__ == "__main__":
    main()
