"""`python -m tokenmill.executor KIND NAME PARENT_PID SEND_ADDRESS RECEIVE_ADDRESS`: a process that a proxy started.

Not for people: the proxy speaks to it over the two addresses. It imports nothing of the user's script.
"""

from __future__ import annotations

import sys

from tokenmill.executor.child import Child


def main() -> None:
    """Run the process that the command line describes."""
    kind, name, parent_pid, send_address, receive_address = sys.argv[1:]
    child = Child(name, int(parent_pid), send_address, receive_address)
    if kind == "worker":
        from tokenmill.executor.worker import run_worker as run
    else:
        from tokenmill.executor.postproc_worker import run_postproc_worker as run
    child.run(run)


if __name__ == "__main__":
    main()
