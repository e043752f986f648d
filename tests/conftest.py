"""The scripts are tested through their own doors: a copy of the checkout in a temporary folder, and a new process for each command."""
import csv
import http.server
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # for this process, too: pytest runs one a core, and small models gain nothing from threads

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED = CHECKOUT.parent / 'shared' / 'data'
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / 'prepare')]

# Small and quick, but with dropout and accumulation, so that what could go wrong has its chance
TINY = ['--dataset=toy', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=16', '--batch_size=4', '--device=cpu',
        '--gradient_accumulation_steps=2', '--dropout=0.2', '--max_iters=8', '--eval_interval=4', '--log_interval=2']


def toy_text(n, seed=0):
    """About n characters of made-up sentences, the same for the same seed."""
    rng = random.Random(seed)
    words = ['ba', 'dodo', 'fu', 'gimme', 'kilo', 'lamp', 'ni', 'opal', 'qua', 'rust']
    text = ''
    while len(text) < n:
        text += ' '.join(rng.choices(words, k=rng.randint(2, 7))) + '.\n'
    return text[:n]


class Zygote:
    """A process that has torch imported and forks for every script (tests/zygote.py): one a worker, where there is fork."""
    channel = None

    @classmethod
    def start(cls, argv, cwd, env):
        """A running script, as a Process."""
        if cls.channel is None:
            cls.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            subprocess.Popen([sys.executable, str(CHECKOUT / 'tests' / 'fork_server.py'), str(theirs.fileno())], pass_fds=[theirs.fileno()],
                             env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdin=subprocess.DEVNULL)
            theirs.close()
            assert cls.channel.recv(10) == b'ready'
        pipes = [os.pipe() for _ in range(4)]  # of (read end, write end)
        theirs = [pipes[0][0], *(w for _, w in pipes[1:])]
        socket.send_fds(cls.channel, [json.dumps({'argv': argv, 'cwd': str(cwd), 'env': env}).encode()], theirs)
        for fd in theirs:
            os.close(fd)
        return Process(pipes[0][1], *(r for r, _ in pipes[1:]))


class Process:
    """What the tests use of subprocess.Popen, for a child of the zygote."""

    def __init__(self, stdin, stdout, stderr, told):
        self.stdin = open(stdin, 'w', encoding='utf-8')
        self.stdout, self.stderr = (open(fd, encoding='utf-8', newline=None) for fd in (stdout, stderr))
        self.told, self.returncode = open(told), None
        self.pid = int(self.told.readline())

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def poll(self):
        if self.returncode is None and select.select([self.told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self.told.readline())
        return self.returncode

    def communicate(self, typed=None, timeout=None):
        said = {}
        readers = [threading.Thread(target=lambda f=f: said.setdefault(f, f.read()), daemon=True) for f in (self.stdout, self.stderr)]
        [t.start() for t in readers]
        try:
            self.stdin.write(typed or '')
            self.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        [t.join(10) for t in readers]
        return said.get(self.stdout, ''), said.get(self.stderr, '')


class Project:
    """A copy of the scripts in a folder of its own; the name has a space and an umlaut, as folders of people have."""

    def __init__(self, root):
        self.root = root
        for pattern in ('*.py', '*.html', 'pocket/*', 'prepare/*.py', 'config/*.py', '__pycache__/*', '*/__pycache__/*'):
            for path in filter(Path.is_file, CHECKOUT.glob(pattern)):
                (root / path.relative_to(CHECKOUT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, root / path.relative_to(CHECKOUT))  # with its time: what is compiled already stays valid

    def start(self, script, *args, **kwargs):
        """A running process of `python SCRIPT ARGS`."""
        cwd, mine = kwargs.pop('cwd', self.root), kwargs.pop('env', {})
        env = {**os.environ, 'PYTHONIOENCODING': 'cp1252', 'OMP_NUM_THREADS': '1', **mine}  # cp1252: as in a Windows console
        fresh = kwargs.pop('fresh', False) or any(name.startswith(('PYTHON', 'OMP')) for name in mine)  # a new interpreter
        if sys.platform == 'linux' and not fresh and not kwargs:
            return Zygote.start([str(self.root / script), *map(str, args)], cwd, env)
        return subprocess.Popen([sys.executable, str(self.root / script), *map(str, args)], cwd=cwd, env=env,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', **kwargs)

    def run(self, script, *args, status=0, typed='', timeout=100, **kwargs):
        """`python SCRIPT ARGS`, to its end. Checks the exit status, and that no traceback was shown; returns (stdout, stderr)."""
        process = self.start(script, *args, **kwargs)
        out, err = process.communicate(typed, timeout=timeout)
        assert process.returncode == status, f'status {process.returncode}\n{out}\n{err}'
        assert 'Traceback' not in err, err
        return out, err

    def fails(self, script, *args, **kwargs):
        """`python SCRIPT ARGS` must end with status 2 and one line on stderr, which is returned."""
        _, err = self.run(script, *args, status=2, **kwargs)
        assert len(err.strip().splitlines()) == 1, err
        return err

    def train(self, *args, **kwargs):
        """train.py with TINY's settings, then args."""
        return self.run('train.py', *TINY, *args, **kwargs)

    def checkpoint(self, run, name='last.pt'):
        import torch
        return torch.load(self.root / 'out' / run / name, weights_only=True)


def ranks(project, world, script, *args, **env):
    """A script as torchrun would start it on so many processes, without torchrun: a list of them."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env |= {'WORLD_SIZE': str(world), 'LOCAL_WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    env |= {'GLOO_SOCKET_IFNAME': 'lo'} if sys.platform == 'linux' else {}
    return [project.start(script, *args, env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}) for r in range(world)]


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    import torch
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a, b):
    """Two checkpoints: the same but for how long it took and where it lies."""
    for part in ('model', 'optimizers', 'step', 'tokens', 'best', 'bad_evals', 'evaluated', 'loss_sum', 'loss_tokens', 'grad_norm', 'val_loss', 'scaler'):
        assert same(a[part], b[part]), part


def read_log(folder):
    """log.csv of a run, without what depends on the clock."""
    with open(folder / 'log.csv', encoding='utf-8') as f:
        return [[v for k, v in row.items() if k not in ('seconds', 'tokens_per_s')] for row in csv.DictReader(f)]


def same_run(a, b):
    """Two folders of runs: both checkpoints and the log are the same."""
    import torch
    for name in ('last.pt', 'best.pt'):
        assert_same_run(*(torch.load(folder / name, weights_only=True) for folder in (a, b)))
    assert read_log(a) == read_log(b), (read_log(a), read_log(b))


def make_toy(root, **meta):
    """data/toy in a project: a char dataset; meta overrides what its meta.json says."""
    from pocket.tokenizer import CharTokenizer
    text = toy_text(6000)
    tok = CharTokenizer.train(text)
    ids = tok.encode_to_numpy(text).astype('<u2')
    folder = root / 'data' / 'toy'
    folder.mkdir(parents=True, exist_ok=True)
    ids[:5000].tofile(folder / 'train.bin')
    ids[5000:].tofile(folder / 'val.bin')
    content = {'format': 1, 'kind': 'stream', 'dtype': 'uint16', 'vocab_size': tok.vocab_size, 'tokenizer': tok.to_dict(),
               'counts': {'train': 5000, 'val': 1000}, **meta}
    (folder / 'meta.json').write_text(json.dumps(content), encoding='utf-8')
    return folder


@pytest.fixture
def project(tmp_path):
    """A fresh copy of the project with a small dataset data/toy."""
    p = Project(tmp_path / 'pocket übung')
    make_toy(p.root)
    return p


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A project with a finished run out/toy: look at it, don't change it."""
    p = Project(tmp_path_factory.mktemp('trained'))
    make_toy(p.root)
    p.stdout, p.stderr = p.train()
    return p


def make_pairs(root, **meta):
    """data/talk in a project: pairs of made-up turns, with a format of conversations; a reply repeats the last word said."""
    from pocket.template import encode_conversation
    from pocket.tokenizer import make_tokenizer
    rng = random.Random(0)
    words = ['ba', 'dodo', 'fu', 'gimme', 'kilo', 'lamp', 'ni', 'opal', 'qua', 'rust']
    tok = make_tokenizer('char', [' '.join(words) + 'UB:.'], special_tokens=('pad', 'bos', 'eos', 'sep'))
    style = {'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '<bos>', 'turns': 3, 'you': 'U', 'me': 'B', 'reply': 'B: '}
    folder = root / 'data' / 'talk'
    folder.mkdir(parents=True, exist_ok=True)
    counts, pairs = {}, {}
    for split, n in (('train', 200), ('val', 30)):
        offsets, ids = [0], []
        for _ in range(n):
            turns = [('UB'[(i + 1) % 2], ' '.join(rng.choices(words, k=rng.randint(1, 3)))) for i in range(rng.choice((1, 3)))]
            source = encode_conversation(tok, style, turns)
            target = tok.encode(style['reply'] + turns[-1][1].split()[-1] + '.') + [tok.eos_id]
            ids += source + target
            offsets += [offsets[-1] + len(source), offsets[-1] + len(source) + len(target)]
        np.array(ids, dtype='<u2').tofile(folder / f'{split}.bin')
        np.array(offsets, dtype='<i8').tofile(folder / f'{split}.idx')
        counts[split], pairs[split] = len(ids), n
    content = {'format': 1, 'kind': 'pairs', 'dtype': 'uint16', 'vocab_size': tok.vocab_size, 'tokenizer': tok.to_dict(), 'counts': counts,
               'pairs': pairs, 'chat': style, **meta}
    (folder / 'meta.json').write_text(json.dumps(content), encoding='utf-8')
    return folder


class SlowServer(http.server.BaseHTTPRequestHandler):
    """A slow server of one file that changes; its class says what it has and how well it behaves."""
    content, tag, blocks = b'', '', 40

    def do_GET(self):
        content, tag = self.content, self.tag
        have = int(self.headers.get('Range', 'bytes=0-')[6:-1]) if self.headers.get('If-Range', tag) == tag else 0
        if have >= len(content):
            return self.send_error(416)
        self.send_response(206 if have else 200)
        self.send_header('Content-Length', str(len(content) - have))
        if tag:
            self.send_header('ETag' if '"' in tag else 'Last-Modified', tag)
        self.end_headers()
        with suppress(OSError):
            for i in range(have, len(content), size := len(content) // self.blocks + 1):
                self.wfile.write(content[i:i + size])
                time.sleep(0.004)

    def log_message(self, *args):
        pass


@contextmanager
def server(handler):
    """The address of a file on a server of our own, on 127.0.0.1."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/x'
    httpd.shutdown()
    httpd.server_close()


# what tests/torture.py needs
LIMITED = '''import os, resource, runpy, sys
if os.environ.get('RANK', '0') == '0':
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['LIMIT']),) * 2)
sys.argv = [sys.argv[0].replace('limited', 'train'), *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
FETCH = '''import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from pocket.errors import show_user_errors
show_user_errors('fetch.py')
from pocket.files import download
download(sys.argv[1].split(','), sys.argv[2], sys.argv[3] or None, 'Do something.')
'''


class Lab:
    """A project to be mistreated, what its runs should have come to, and how often what was seen."""

    def __init__(self, folder):
        self.project, self.known, self.seen = Project(Path(folder) / 'pocket übung'), {}, Counter()
        self.root = self.project.root
        make_toy(self.root)
        make_pairs(self.root)
        train = (self.root / 'train.py').read_text(encoding='utf-8').replace('write_sample(300)', 'write_sample(3)')
        (self.root / 'train.py').write_text(train, encoding='utf-8')  # the same, but in less time
        (self.root / 'limited.py').write_text(LIMITED, encoding='utf-8')
        (self.root / 'fetch.py').write_text(FETCH, encoding='utf-8')
        (self.root / 'text.txt').write_text(toy_text(700_000), encoding='utf-8')
        for name, seed in (('src', 1), ('tgt', 2)):
            lines = [f'{i} {line}' for i, line in enumerate(toy_text(200_000, seed).splitlines()[:4000])]
            (self.root / f'{name}.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

    def once(self, key, make):
        """make(), the first time that it is asked for under this key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def timed(self, key, script, *args):
        """Seconds that a script takes, undisturbed; run once."""
        def run():
            begin = time.monotonic()
            self.project.run(script, *args)
            return time.monotonic() - begin
        return self.once((key, 'seconds'), run)

    def fresh(self, name):
        """A path in the project where nothing is."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return self.root / name


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at folder, where we may mount one; its value says whether."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and not subprocess.call(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)], stderr=subprocess.DEVNULL)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.check_call(['umount', str(folder)])
