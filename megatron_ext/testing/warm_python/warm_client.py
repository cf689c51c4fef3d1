"""Runs a Python command in a process of `warm_server`, with this process's streams, directory and environment.

`python -I -S warm_client.py SOCKET ARGUMENTS` does the same as `python ARGUMENTS`: it passes signals on, and ends
with the same exit code or signal. Options other than -u and -m need a new interpreter, which then replaces this
process. This file imports only the standard library, so that it starts quickly.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(path: str, arguments: list[str]) -> int:
    """Runs the command; returns the exit code, which is negative for a signal, as in `subprocess`."""
    arguments = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "process": os.getpid(),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"x"], [0, 1, 2])
        with server.makefile("rw", encoding="utf-8") as lines:
            print(json.dumps(request), file=lines, flush=True)
            process = int(lines.readline())
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: os.kill(process, number))
            return int(lines.readline())


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
