"""
The fork server: a process that has imported torch, and forks a child for every script that the
tests run.

Why it exists: importing torch takes about two seconds of a core, and the tests start hundreds of
scripts. A forked child has torch already and otherwise behaves like a new interpreter: same
arguments, environment, folder, streams and exit status. Each pytest process starts one server, on
Linux. Elsewhere, and with

    POCKETGPT_FORK_SERVER=0 pytest

every script gets an interpreter of its own: the same tests, but slower.

How it works: the tests (start_python) send a request over a socket, a line of JSON {argv, cwd, env}
together with four file descriptors: stdin, stdout, stderr and a status pipe. The server forks a
child that runs the script, and writes the child's process id to the status pipe. When the child has
ended, it writes how. Only a parent can wait for a process, so the server waits for all children and
for the next request at once.

                 request              fork
    pytest ----------------> server ------> child: python ARGV
       ^                       |
       +-----------------------+ process id, exit status
"""
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback

# --------------------------------------------------------------------------------------------------
# The tests' side

SWITCHED_ON = sys.platform == 'linux' and os.environ.get('POCKETGPT_FORK_SERVER', '1') != '0'
server = None  # the socket to this process's server, once it has been started


def start_python(argv, cwd, env):
    """Start `python ARGV` and return a running Process or, without the fork server, a
    subprocess.Popen.
    """
    if not SWITCHED_ON:
        return subprocess.Popen(
            [sys.executable, *argv], cwd=cwd, env=env, text=True, encoding='utf-8',
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    status_read, status_write = os.pipe()
    request = json.dumps({'argv': argv, 'cwd': str(cwd), 'env': env}).encode()
    theirs = [stdin_read, stdout_write, stderr_write, status_write]
    socket.send_fds(connect(), [request], theirs)
    for fd in theirs:
        os.close(fd)
    return Process(stdin_write, stdout_read, stderr_read, status_read)


def connect():
    """The socket to the server, which is started at the first call."""
    global server
    if server is None:
        server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdin=subprocess.DEVNULL,
        )
        theirs.close()
        assert server.recv(10) == b'ready'
    return server


class Process:
    """A running child of the server, with the part of subprocess.Popen's interface that the tests
    use.
    """

    def __init__(self, stdin, stdout, stderr, status):
        self.stdin = open(stdin, 'w', encoding='utf-8')
        self.stdout = open(stdout, encoding='utf-8', errors='replace')
        self.stderr = open(stderr, encoding='utf-8', errors='replace')
        self.status = open(status)
        self.pid = int(self.status.readline())
        self.returncode = None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def ended_within(self, seconds):
        """Whether the process ends within so many seconds (None: wait for ever)."""
        readable, _, _ = select.select([self.status], [], [], seconds)
        return bool(readable)

    def poll(self):
        if self.returncode is None and self.ended_within(0):
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not self.ended_within(timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self.status.readline())
        return self.returncode

    def communicate(self, typed=None, timeout=None):
        """Write to stdin, read stdout and stderr to their ends, wait. A process that takes longer
        than timeout is killed.
        """
        output = {}

        def read(name, stream):
            output[name] = stream.read()

        readers = []
        # Threads, because a pipe that nobody reads fills up, and the process waits for ever
        for name in ('stdout', 'stderr'):
            reader = threading.Thread(target=read, args=(name, getattr(self, name)), daemon=True)
            reader.start()
            readers.append(reader)
        try:
            self.stdin.write(typed or '')
            self.stdin.close()
        except BrokenPipeError:  # it ended without reading all of it
            pass
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in readers:
            reader.join(10)
        return output.get('stdout', ''), output.get('stderr', '')


# --------------------------------------------------------------------------------------------------
# The server's side: python fork_server.py SOCKET

def import_what_scripts_import():
    """What takes long to import. Nothing of pocketGPT: each child imports its own project's files.
    """
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


def serve(channel):
    """Fork a child for each request and say how it ended, until the tests close their end of the
    socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    # Children would copy, page by page, the objects that their garbage collectors look at. None of
    # those that there are now is ever garbage
    gc.collect()
    gc.freeze()

    running = {}  # {a file descriptor that is readable when the child has ended: (pid, status)}
    channel.send(b'ready')
    while True:
        readable, _, _ = select.select([channel, *running], [], [])
        for ended in readable:
            if ended is not channel:
                say_how_it_ended(ended, *running.pop(ended))
        if channel not in readable:
            continue

        request, fds, _, _ = socket.recv_fds(channel, 2**20, 4)
        if not request:
            return
        child = os.fork()
        if child == 0:
            channel.close()
            for ended, (_, status) in running.items():
                os.close(ended)
                os.close(status)
            be_child(request, fds)
        *streams, status = fds
        for fd in streams:  # or the tests would wait for us to close them
            os.close(fd)
        os.write(status, f'{child}\n'.encode())
        running[os.pidfd_open(child)] = (child, status)


def say_how_it_ended(ended, child, status):
    """Write a child's exit status, negative if it was killed, to its status pipe."""
    _, how = os.waitpid(child, 0)
    os.close(ended)
    try:
        os.write(status, f'{os.waitstatus_to_exitcode(how)}\n'.encode())
    except BrokenPipeError:
        pass  # nobody wants to know any more
    os.close(status)


def be_child(request, fds):
    """In the child: run the script with the streams of the request, and exit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    stdin, stdout, stderr, _ = fds
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for fd in fds:
        os.close(fd)
    os._exit(run_python(**json.loads(request)))


def run_python(argv, cwd, env):
    """In the child: be `python ARGV`. Returns the exit status."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    open_streams(env.get('PYTHONIOENCODING', 'utf-8'))

    status = 0
    try:
        try:
            run_script(argv)
        except SystemExit:
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())  # ours raises SystemExit with a status of its own
    except SystemExit as e:
        if e.code is None:
            status = 0
        elif isinstance(e.code, int):
            status = e.code
        else:
            status = 1
    except BaseException:
        traceback.print_exc()

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120  # as the interpreter does
    return status


def run_script(argv):
    """Run a script (argv: its path and arguments) or a module (argv: -m, its name, arguments)."""
    if argv[0] == '-m':
        sys.argv = argv[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name='__main__')


def open_streams(encoding):
    """Make sys.stdin, sys.stdout and sys.stderr anew, as a new interpreter would for these file
    descriptors.
    """
    options = {'encoding': encoding, 'errors': 'backslashreplace'}
    sys.stdin = io.TextIOWrapper(open(0, 'rb'), **options)
    sys.stdout = io.TextIOWrapper(open(1, 'wb'), **options)
    unbuffered = {'line_buffering': True, 'write_through': True}
    sys.stderr = io.TextIOWrapper(open(2, 'wb', buffering=0), **unbuffered, **options)
    sys.__stdin__ = sys.stdin
    sys.__stdout__ = sys.stdout
    sys.__stderr__ = sys.stderr


if __name__ == '__main__':
    import_what_scripts_import()
    serve(socket.socket(fileno=int(sys.argv[1])))
