"""
A copy of the checkout in a temporary folder, whose scripts the tests run as a person would: by
their command lines.
"""
import atexit
import functools
import importlib.util
import os
import py_compile
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch is imported: pytest runs a process per core, and small models gain nothing from more
# threads
os.environ['OMP_NUM_THREADS'] = '1'

from fork_server import start_python

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED = CHECKOUT.parent / 'shared' / 'data'
sys.path.insert(0, str(CHECKOUT))

# Options of a run that is small and quick, but has dropout and gradient accumulation, because both
# can break a resume. The sample at its end is short: most tests don't look at it
TINY = [
    '--dataset=toy', '--device=cpu', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=16',
    '--batch_size=4', '--gradient_accumulation_steps=2', '--dropout=0.2',
    '--max_iters=8', '--eval_interval=4', '--log_interval=2', '--final_sample_tokens=10',
]
COPIED = ('*.py', 'pocket/*', 'prepare/*.py', 'prepare/characters/*.txt', 'config/*.py')


@functools.cache
def compiled_modules():
    """A folder with model.py and pocket/ as compiled files, as Python keeps them in __pycache__.

    Each project gets a copy: else each of the hundreds of scripts would compile them again.
    """
    folder = Path(tempfile.mkdtemp(prefix='pocketgpt-compiled-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in (CHECKOUT / 'model.py', *CHECKOUT.glob('pocket/*.py')):
        name = importlib.util.cache_from_source(path.relative_to(CHECKOUT))
        py_compile.compile(path, cfile=folder / name)
    return folder


class Project:
    """A copy of the scripts, without datasets and runs.

    script is the path of a script ('train.py', 'prepare/text.py'), or '-m' with a module as the
    first of args.
    """

    def __init__(self, root):
        self.root = root
        for pattern in COPIED:
            for path in CHECKOUT.glob(pattern):
                if path.is_file():
                    copy = root / path.relative_to(CHECKOUT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    # copy2 keeps the modification time, by which compiled files are valid
                    shutil.copy2(path, copy)
        shutil.copytree(compiled_modules(), root, dirs_exist_ok=True)

    def start(self, script, *args, cwd=None, env=None, fresh=False, **popen_options):
        """Start `python SCRIPT ARGS` and return the running process.

        fresh: start a new interpreter, not a child of the fork server. Some environment variables
        and all popen_options (of subprocess.Popen) imply it.
        """
        env = env or {}
        # cp1252: as in a Windows console
        variables = {**os.environ, 'PYTHONIOENCODING': 'cp1252', 'OMP_NUM_THREADS': '1', **env}
        argv = [script if script == '-m' else str(self.root / script), *map(str, args)]
        cwd = cwd or self.root

        read_at_startup = any(name.startswith(('PYTHON', 'OMP')) for name in env)
        if fresh or read_at_startup or popen_options:
            return subprocess.Popen(
                [sys.executable, *argv], cwd=cwd, env=variables, text=True, encoding='utf-8',
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                **popen_options,
            )
        return start_python(argv, cwd, variables)

    def run(self, script, *args, status=0, typed='', timeout=100, **options):
        """Run `python SCRIPT ARGS` to its end and return (stdout, stderr).

        Checks the exit status, and that no traceback was shown. typed: its stdin. options: as in
        start().
        """
        process = self.start(script, *args, **options)
        out, err = process.communicate(typed, timeout=timeout)
        assert process.returncode == status, f'status {process.returncode}\n{out}\n{err}'
        assert 'Traceback' not in err, err
        return out, err

    def fails(self, script, *args, **options):
        """Run `python SCRIPT ARGS`, which must end with status 2 and one line on stderr; returns
        that line.
        """
        _, err = self.run(script, *args, status=2, **options)
        assert len(err.strip().splitlines()) == 1, err
        return err

    def train(self, *args, **options):
        """Run train.py with the options of TINY, then args."""
        return self.run('train.py', *TINY, *args, **options)

    def checkpoint(self, run, name='last.pt'):
        """The checkpoint out/RUN/NAME as a dict."""
        import torch

        return torch.load(self.root / 'out' / run / name, weights_only=True)


def ranks(project, world_size, script, *args, **env):
    """Start a script as torchrun would, but without torchrun: returns a list of world_size running
    processes.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        free_port = s.getsockname()[1]
    env['WORLD_SIZE'] = env['LOCAL_WORLD_SIZE'] = str(world_size)
    env['MASTER_ADDR'] = '127.0.0.1'
    env['MASTER_PORT'] = str(free_port)
    if sys.platform == 'linux':
        env['GLOO_SOCKET_IFNAME'] = 'lo'

    processes = []
    for rank in range(world_size):
        of_rank = {**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        processes.append(project.start(script, *args, env=of_rank))
    return processes
