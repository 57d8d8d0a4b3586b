"""Run a command in the place of this process, under a lock that ends with the process, whatever ends it.

python workflow/alone.py COMMAND [ARGUMENT ...]         # a build: the only one in this folder
python workflow/alone.py --job COMMAND [ARGUMENT ...]   # one of its jobs, which may outlive a build that is killed
"""

import fcntl
import os
import sys

BUILD, JOBS = "_build/lock", "_build/jobs"


def main(*command):
    """Take the lock and become the command."""
    os.makedirs("_build", exist_ok=True)
    if command[0] == "--job":
        command = command[1:]
        os.set_inheritable(locked(JOBS, fcntl.LOCK_SH), True)
    else:
        build = locked(
            BUILD,
            fcntl.LOCK_EX | fcntl.LOCK_NB,
            "a book is being built in this folder already: wait until that build has ended, or use another clone",
        )
        os.close(
            locked(
                JOBS,
                fcntl.LOCK_EX | fcntl.LOCK_NB,
                "chapters of a build that was killed are still running in this folder: wait until they have ended, or stop them",
            )
        )
        os.set_inheritable(build, True)
    os.execv(command[0], command)


def locked(name, how, refusal=None):
    """A file that is locked as long as it is open."""
    lock = os.open(name, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        sys.exit(refusal)
    return lock


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(
            f"the book cannot be built here ({error}): mend what it names, or use a folder on another disk"
        )
