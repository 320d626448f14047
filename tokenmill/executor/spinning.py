"""`limit_spinning`: how long threads of torch's pool wait for each other before they give back their core.

Called before torch is loaded, for this process or a child: OpenMP reads its variables once.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final

SPIN_COUNT: Final = "2000"
"""Turns of a waiting loop, about 0.1 ms in all. See docs/log.md for measurements."""

_USERS_CHOICE: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Ask for short waits, unless the user has asked for something.

    By default a thread waits in a loop for milliseconds. If anything else runs on the machine (a client, a server's
    event loop, another worker), the one waited for may have lost its core, and each of the hundreds of small parallel
    operations of a step takes that long.
    """
    if not any(name in environment for name in _USERS_CHOICE):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
