"""
A process that has imported torch and waits: asked to run a script it forks, and the child runs it as a fresh interpreter would.

Importing torch takes two seconds of a core, and the tests start hundreds of scripts. conftest.py asks over a socket, with a line of JSON
{argv, cwd, env} and four file descriptors: stdin, stdout, stderr, and one that is told the child's pid and, at last, its status.
"""
import io
import json
import os
import runpy
import signal
import socket
import sys
import traceback


def run(argv, cwd, env):
    """Be `python ARGV` in this process; returns the exit status."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    encoding = env.get('PYTHONIOENCODING', 'utf-8')
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(open(fd, mode, buffering=b), encoding=encoding, errors='backslashreplace', line_buffering=b == 0 and fd == 2,
                                                          write_through=b == 0)
                                         for fd, mode, b in ((0, 'rb', -1), (1, 'wb', -1), (2, 'wb', 0)))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    status = 0
    try:
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit:
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    return status


def main():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot  # noqa: F401
    import numpy  # noqa: F401
    import requests  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import torch.optim  # noqa: F401
    import tqdm  # noqa: F401
    torch.set_num_threads(1)
    asked = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need not be waited for
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked.send(b'ready')
    while True:
        request, fds, _, _ = socket.recv_fds(asked, 2**20, 4)
        if not request:
            return
        if os.fork() == 0:  # the keeper of one child: says its pid, waits for it, says how it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.setpgid(0, 0)
                for fd, here in zip(fds, (0, 1, 2)):
                    os.dup2(fd, here)
                for fd in fds:
                    os.close(fd)
                os._exit(run(**json.loads(request)))
            for fd in fds[:3]:
                os.close(fd)
            for here in (0, 1, 2):
                os.close(here)
            os.write(fds[3], f'{child}\n'.encode())
            _, status = os.waitpid(child, 0)
            os.write(fds[3], f'{os.waitstatus_to_exitcode(status)}\n'.encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == '__main__':
    main()
