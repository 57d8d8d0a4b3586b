"""Run a command in the place of this process, unless one that was started like this still runs in this folder.

    python workflow/alone.py COMMAND [ARGUMENT ...]

The lock belongs to the process: whatever ends it, also a kill, ends the lock.
"""

import fcntl
import os
import sys

LOCK = "_build/lock"


def main(*command):
    """Take the lock and become the command."""
    os.makedirs(os.path.dirname(LOCK), exist_ok=True)
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("a book is being built in this folder already: wait until that build has ended, or use another clone")
    os.set_inheritable(lock, True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
