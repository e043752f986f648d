"""
modal_train.py, without an account: against a stand-in for Modal's servers (modal_server.py), with
Modal's own client and container code; and its functions on their own, as an imported module.

    pytest -n 0 tests/test_modal.py
"""
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CHECKOUT, TINY, Project
from modal_server import Server

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='Modal\'s containers are Linux')
MODAL_RUN = [sys.executable, '-m', 'modal', 'run']

# Stands for train.py: does what modal_train.py relies on, without torch. steps.txt has every step
# that was taken. --bad is bad input. --crash crashes at step 40, --wait waits there to be stopped,
# unless the run has been resumed.
TRAIN = '''
import fcntl, os, signal, sys, time
from pathlib import Path

args = {}
for arg in sys.argv[1:]:
    if arg.startswith('--'):
        name, _, value = arg[2:].partition('=')
        args[name] = value
if 'bad' in args:
    print('train.py: unknown option', file=sys.stderr)
    sys.exit(2)

out = Path(args['out_dir'])
lock = open(out / '.lock', 'w')
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit('train.py: another run is writing')

stopped = False
def stop(*_):
    global stopped
    stopped = True
signal.signal(signal.SIGTERM, stop)

def save():
    (out / 'last.tmp').write_text(str(step))
    os.replace(out / 'last.tmp', out / 'last.pt')

step = 0
if 'resume' in args:
    step = int((out / 'last.pt').read_text())
(out / 'config.json').write_text('{"max_iters": 60}')
while step < 60 and not stopped:
    step += 1
    time.sleep(0.01)
    with open(out / 'steps.txt', 'a') as f:
        print(step, file=f)
    if step % 20 == 0:
        row = f'{step},{step * 36},1.5,4321'
        (out / 'log.csv').write_text(f'step,seconds,val_loss,tokens_per_s\\n{row}\\n')
        save()
    if step == 40 and 'resume' not in args:
        if 'crash' in args:
            os._exit(1)
        if 'wait' in args:
            deadline = time.monotonic() + 30
            while not stopped and time.monotonic() < deadline:
                time.sleep(0.1)
save()
sys.exit(143 if stopped else 0)
'''
# Stands for sample.py
SAMPLE = '''
import sys

print(sys.argv[1:])
if '--chat' in sys.argv:
    for line in sys.stdin:
        if line == '/quit\\n':
            break
        print('you said', line, end='', flush=True)
'''
# Stands for torchrun: runs the script once. If that fails, its own exit status is 1, and the
# script's is only in the output.
TORCHRUN = f'''#!/bin/sh
echo torchrun "$1" "$2"
shift 2
{sys.executable} "$@" && exit 0
echo "  exitcode  : $? (pid: 1)"
exit 1
'''
ALL_STEPS = list(range(1, 61))


def steps(out):
    """The steps that the stand-in for train.py has taken in a run, over all its attempts."""
    return [int(line) for line in (out / 'steps.txt').read_text().split()]


# --------------------------------------------------------------------------------------------------
# Against the stand-in for Modal's servers

class Cloud(Project):
    """A project whose scripts are stand-ins, run on a stand-in for Modal. volume: a folder."""

    def __init__(self, root):
        super().__init__(root)
        self.volume = root / 'vol'
        self.write('train.py', TRAIN)
        self.write('sample.py', SAMPLE)
        self.write('prepare/toy.py', 'import sys; print("made", *sys.argv[1:])')
        self.write('bin/torchrun', TORCHRUN)
        (root / 'bin' / 'torchrun').chmod(0o755)
        shutil.copy(CHECKOUT / 'requirements.txt', root)

        # What containers must not get
        self.write('data/toy/train.bin')
        self.write('out/old/last.pt')
        self.write('.git/config')
        self.write('tests/test_x.py')
        self.write('.venv/x.py')
        self.write('prepare/__pycache__/toy.pyc')

    def write(self, name, text=''):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')

    def modal_run(self, entrypoint, *args, status=0, typed=None, on_commit=None):
        """Do `modal run modal_train.py[::COMMAND] ARGS` from another folder.

        Returns the Server, with the output as .out and .err.
        """
        path = f'{self.root / "bin"}:{os.environ["PATH"]}'
        with Server(self.root, self.volume, path, on_commit) as server:
            command = [*MODAL_RUN, f'{self.root / "modal_train.py"}{entrypoint}', *args]
            done = subprocess.run(
                command, env=server.env, cwd='/', input=typed, capture_output=True, text=True,
                timeout=60,
            )
        assert done.returncode == status, done.stdout + done.stderr
        assert 'Traceback' not in done.stderr
        server.out = done.stdout
        server.err = done.stderr
        return server


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path / 'project')


@pytest.mark.parametrize('preemption', [
    signal.SIGINT,
    pytest.param(getattr(signal, 'SIGKILL', 9), marks=pytest.mark.slow),
])
def test_preempted_run_resumes_by_itself(cloud, preemption):
    preempted = []

    def preempt_once(server):
        if not preempted and (server.volume / 'out/stdlib/last.pt').exists():
            preempted.append(server.containers[0])
            server.containers[0].send_signal(preemption)

    server = cloud.modal_run('', '--overrides=--wait', on_commit=preempt_once)
    assert preempted[0].returncode is not None
    assert len(server.containers) == 2
    assert steps(cloud.volume / 'out/stdlib') == ALL_STEPS  # each step once, over both containers
    assert 'out/stdlib starts from scratch' in server.out
    assert 'out/stdlib resumes where it stopped' in server.out
    assert 'the result is in out/stdlib' in server.out

    # The volume was committed after checkpoints, and at the end
    committed = [files.get('out/stdlib/last.pt') for files in server.commits]
    times = [time for time in committed if time is not None]
    assert len(set(times)) >= 2  # one that the preempted container left, one of the end
    assert committed[-1] == max(times)


def test_modal_is_asked_for_the_right_image_gpus_volume_and_retries(cloud):
    server = cloud.modal_run('', '--overrides=--quick')

    # One definition of the function for each GPU that may run it
    ranked = server.requests('FunctionCreate')[0].function_data.ranked_functions
    assert [r.function.resources.gpu_config.gpu_type for r in ranked] == ['L4', 'A10', 'T4']
    for function in [r.function for r in ranked]:
        assert function.timeout_secs == 24 * 3600
        assert function.single_use_containers
        assert not function.secret_ids
        assert (function.retry_policy.retries, function.retry_policy.initial_delay_ms) == (10, 0)
        assert [mount.mount_path for mount in function.volume_mounts] == [str(cloud.volume)]
    wanted_volume = server.requests('VolumeGetOrCreate')[0]
    create_if_missing = 1
    assert wanted_volume.deployment_name == 'pocketgpt'
    assert wanted_volume.object_creation_type == create_if_missing

    # The image has our requirements
    images = [request.image for request in server.requests('ImageGetOrCreate')]
    dockerfile = '\n'.join(line for image in images for line in image.dockerfile_commands)
    assert 'FROM python:3.11' in dockerfile
    assert 'HF_HOME' in dockerfile
    files = {file.filename: file.data.decode() for image in images for file in image.context_files}
    requirements = (CHECKOUT / 'requirements.txt').read_text(encoding='utf-8')
    wanted = re.findall(r'^[a-z]\w+', requirements, re.M)
    assert 'torch' in wanted
    for name in wanted:
        assert re.search(rf'^{name}\b', files['/.requirements.txt'], re.M)

    # Containers get our scripts and the folders that they read, and nothing else
    sent = set()
    for request in server.requests('MountGetOrCreate'):
        sent.update(file.filename for file in request.files)
    ours = set()
    for pattern in ('*.py', 'pocket/**/*', 'prepare/**/*', 'config/**/*'):
        for path in cloud.root.glob(pattern):
            if path.is_file() and '__pycache__' not in path.parts:
                ours.add(f'/root/pocketgpt/{path.relative_to(cloud.root)}')
    assert '/root/pocketgpt/pocket/tokenizer.py' in ours
    assert sent == ours | {'/root/modal_train.py'}


def test_crash_is_retried_but_bad_input_is_not(cloud):
    server = cloud.modal_run('', '--gpu=A100', '--gpus', '2', '--secret=mine',
                             '--config=config/shakespeare_char.py', '--overrides=--crash')
    assert 'torchrun --standalone --nproc_per_node=2' in server.out
    assert len(server.containers) == 2
    assert steps(cloud.volume / 'out/shakespeare_char') == ALL_STEPS
    gpu = server.requests('FunctionCreate')[0].function.resources.gpu_config
    assert (gpu.gpu_type, gpu.count) == ('A100', 2)
    assert server.requests('SecretGetOrCreate')[0].deployment_name == 'mine'
    assert list(server.requests('FunctionBindParams')[0].function_options.secret_ids) == ['st-1']

    server = cloud.modal_run('', '--gpus', '2', '--overrides=--bad', '--name=shakespeare_char',
                             status=2)
    assert server.err.strip() == 'train.py: unknown option'
    assert len(server.containers) == 1
    assert os.listdir(cloud.volume / 'out') == ['shakespeare_char']  # nothing was renamed


@pytest.mark.slow
def test_download_is_complete_or_changes_nothing(cloud):
    run = make_run(cloud.volume / 'out' / 'toy')
    out = cloud.root / 'out'
    cloud.modal_run('::download', '--name=toy')
    assert (out / 'toy' / 'last.pt').read_bytes() == (run / 'last.pt').read_bytes()
    assert not (out / 'toy' / '.lock').exists()

    damaged = bytearray((run / 'last.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (run / 'last.pt').write_bytes(damaged)
    before = sorted(out.rglob('*'))
    assert 'is incomplete' in cloud.modal_run('::download', '--name=toy', status=2).err
    assert sorted(out.rglob('*')) == before
    assert 'no run other' in cloud.modal_run('::download', '--name=other', status=2).err


def test_runs_and_datasets_are_listed(cloud):
    make_run(cloud.volume / 'out' / 'toy')
    (cloud.volume / 'data' / 'stdlib').mkdir(parents=True)
    (cloud.volume / 'data' / 'stdlib' / 'meta.json').touch()
    lines = cloud.modal_run('::ls', '--steps=200').out.splitlines()
    assert 'datasets: stdlib' in lines
    row = next(line for line in lines if line.startswith('toy'))
    columns = re.split(r'\s\s+', row)
    assert columns == ['toy', '20 of 100', '1.5000', '4321', '2.00', '?', 'NVIDIA L4, NVIDIA L4']


def make_run(out):
    """Make a run's folder on the volume: 20 of 100 steps on two GPUs, at 36 seconds per step."""
    out.mkdir(parents=True)
    with zipfile.ZipFile(out / 'last.pt', 'w') as f:  # as torch.save() writes it
        f.writestr('last/data.pkl', os.urandom(9000))
    (out / '.lock').touch()
    (out / 'log.csv').write_text('step,seconds,val_loss,tokens_per_s\n20,720,1.5,4321\n')
    (out / 'config.json').write_text('{"max_iters": 100}')
    (out / 'modal.json').write_text(json.dumps({'gpus': ['NVIDIA L4', 'NVIDIA L4']}))
    return out


@pytest.mark.slow
def test_prepare_sample_and_chat(cloud):
    server = cloud.modal_run('::prepare', '--dataset=toy', '--args=--limit=3')
    assert f'made --limit=3 --data_dir={cloud.volume}/data' in server.out
    assert not server.requests('FunctionCreate')[0].function.resources.gpu_config.gpu_type
    assert server.commits

    server = cloud.modal_run('::sample', '--name=toy', '--args=--start="a b"', '--gpu=T4')
    assert f"['--out_dir={cloud.volume}/out/toy', '--start=a b']" in server.out
    assert server.requests('FunctionCreate')[0].function.resources.gpu_config.gpu_type == 'T4'

    server = cloud.modal_run('::chat', '--name=toy', typed='hello\nyou\n/quit\n')
    assert server.out.count('you said') == 2


@pytest.mark.parametrize('command, options', [
    ('', ['--config', '--overrides', '--name', '--gpu', '--gpus', '--fresh', '--secret']),
    ('::download', ['--name']),
])
def test_help_needs_no_account_and_no_network(tmp_path, command, options):
    no_server = 'http://127.0.0.1:9'
    no_account = str(tmp_path / 'none')
    env = {**os.environ, 'MODAL_CONFIG_PATH': no_account, 'MODAL_SERVER_URL': no_server}
    done = subprocess.run(
        [*MODAL_RUN, f'{CHECKOUT / "modal_train.py"}{command}', '--help'], env=env, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )
    for option in options:
        assert option in done.stdout


# --------------------------------------------------------------------------------------------------
# As an imported module

class FakeVolume:
    """Stands for a modal.Volume.

    The first commit after the file `interrupt_at` exists raises KeyboardInterrupt, as a signal does
    that arrives at that moment.
    """

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at

    def commit(self):
        if self.interrupt_at is not None and self.interrupt_at.exists():
            self.interrupt_at = None
            raise KeyboardInterrupt


@pytest.fixture
def modal_train(monkeypatch):
    """modal_train.py as a module. Afterwards signals and exceptions are handled as before."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.syspath_prepend(str(CHECKOUT))
    sigterm = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module('modal_train')
    signal.signal(signal.SIGTERM, sigterm)


@pytest.fixture
def in_container(modal_train, tmp_path, monkeypatch):
    """modal_train.py as in a container, with tmp_path as the volume, and TRAIN as train.py. It looks
    for checkpoints more often than it really does.
    """
    (tmp_path / 'train.py').write_text(TRAIN, encoding='utf-8')
    monkeypatch.setattr(modal_train, 'HERE', tmp_path)
    monkeypatch.setattr(modal_train, 'VOLUME', str(tmp_path))
    monkeypatch.setattr(modal_train, 'volume', FakeVolume())
    clock = SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 10))
    monkeypatch.setattr(modal_train, 'time', clock)
    return modal_train


def test_volume_is_at_vol_unless_a_test_says_otherwise(modal_train):
    assert modal_train.VOLUME == '/vol'


def test_containers_get_all_files_that_the_scripts_need(modal_train, project):
    for path in project.root.rglob('*'):
        name = path.relative_to(project.root)
        if path.is_file() and name.parts[0] != 'data' and modal_train.not_copied(name):
            path.unlink()
    project.train('--max_iters=2', '--eval_interval=2')
    project.run('sample.py', '--out_dir=out/toy', '--max_new_tokens=5')
    project.run('sample.py', '--out_dir=out/toy', '--chat', typed='/quit\n')
    project.run('prepare/character.py', '--conversations=100', '--beginnings=50',
                '--vocab_size=300')


@pytest.mark.parametrize('name, is_copied', [
    ('train.py', True),
    ('pocket/chat.html', True),
    ('pocket/bundled/shakespeare/best.pt', True),
    ('prepare/characters/plunkett.txt', True),
    ('pocket/__pycache__/data.cpython-311.pyc', False),
    ('data/mine/train.bin', False),
    ('out/mine/best.pt', False),
    ('tests/conftest.py', False),
    ('README.md', False),
])
def test_containers_get_no_more_than_that(modal_train, name, is_copied):
    assert modal_train.not_copied(Path(name)) != is_copied


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The train function is executing locally')
def test_interrupted_run_resumes_to_the_same_weights(in_container, project, monkeypatch):
    import torch

    def popen(command, **options):
        """subprocess.Popen, but train.py is started by the tests' fork server, which is quicker."""
        if command[0] != sys.executable:
            return subprocess.Popen(command, **options)
        process = project.start(*command[1:])
        process.terminate = lambda: process.poll() is None and process.send_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(in_container, 'VOLUME', str(project.root))
    monkeypatch.setattr(in_container, 'Popen', popen)
    volume = FakeVolume(interrupt_at=project.root / 'out/half/last.pt')
    monkeypatch.setattr(in_container, 'volume', volume)
    args = [*TINY, '--max_iters=40', '--eval_interval=5', '--log_interval=50']
    with pytest.raises(KeyboardInterrupt):
        in_container.train.local(' '.join(args), 'half')
    assert 5 <= project.checkpoint('half')['step'] < 40
    status, _ = in_container.train.local(' '.join(args), 'half')
    assert status == 0

    project.run('train.py', *args, '--out_dir=out/whole')
    half = project.checkpoint('half')
    whole = project.checkpoint('whole')
    assert half['step'] == 40
    for name, weight in whole['model'].items():
        assert torch.equal(half['model'][name], weight), name


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The train function is executing locally')
def test_what_is_resumed_and_what_starts_over(in_container, tmp_path, monkeypatch, capsys):
    def train(*args, **options):
        return in_container.train.local(' '.join(args), 'x', **options)

    out = tmp_path / 'out' / 'x'

    # An interrupted run is resumed by the same command. One that is refused changes nothing
    monkeypatch.setattr(in_container, 'volume', FakeVolume(interrupt_at=out / 'last.pt'))
    with pytest.raises(KeyboardInterrupt):
        train('--a=1')
    assert train('--bad')[0] == 2
    assert train('--a=1')[0] == 0
    assert steps(out) == ALL_STEPS

    # A finished run is left alone
    status, message = train('--a=1')
    assert status == 0
    assert 'finished' in message
    assert steps(out) == ALL_STEPS

    # Another command starts a new run, and keeps the old one under another name
    monkeypatch.setattr(in_container, 'volume', FakeVolume())
    with pytest.raises(RuntimeError, match='status 1'):
        train('--crash', '--a=2')
    assert steps(tmp_path / 'out' / 'x.1') == ALL_STEPS
    assert steps(out) == ALL_STEPS[:40]

    # --resume resumes with other options, too
    assert train('--crash', '--a=3', '--resume')[0] == 0
    assert steps(out) == ALL_STEPS

    # --fresh starts over, but only once: a retry of the same call resumes
    with pytest.raises(RuntimeError):
        train('--crash', fresh=True, when='now')
    assert train('--crash', fresh=True, when='now')[0] == 0
    assert steps(out) == steps(tmp_path / 'out' / 'x.2') == ALL_STEPS

    # A run is stopped shortly before the time limit
    monkeypatch.setattr(in_container, 'TIMEOUT', 0.5)
    with pytest.raises(TimeoutError):
        train('--a=1')
    assert 0 < len(steps(out)) < 60
    monkeypatch.setattr(in_container, 'TIMEOUT', 60)
    assert train('--a=1')[0] == 0
    assert steps(out) == ALL_STEPS
    assert 'resumes where it stopped' in capsys.readouterr().out


def test_bad_names_and_configs_are_refused(modal_train, tmp_path):
    (tmp_path / 'mine.py').touch()
    with pytest.raises(ValueError, match='copy it there'):
        modal_train.main(config=str(tmp_path / 'mine.py'))
    with pytest.raises(ValueError, match='plain word'):
        modal_train.main(name='../x')


def test_cost_is_hours_times_price_times_gpus(modal_train, monkeypatch):
    monkeypatch.setitem(modal_train.PRICES, 'L4', 0.5)
    monkeypatch.setitem(modal_train.PRICES, 'A10', 1.0)
    log = [
        {'step': '10', 'seconds': '360', 'val_loss': '1.2', 'tokens_per_s': '4000'},
        {'step': '20', 'seconds': '720', 'val_loss': '1.5', 'tokens_per_s': '4321'},
    ]

    def columns(cards, **lengths):
        return re.split(r'\s\s+', modal_train.format_run('toy', log, cards, **lengths))

    figures = ['toy', '20 of 100', '1.2000', '4321']
    two_cards = ['NVIDIA L4', 'NVIDIA L4']
    expected = [*figures, '2.00', '2.00', 'NVIDIA L4, NVIDIA L4']
    assert columns(two_cards, max_iters=100, steps=200) == expected
    assert columns(['NVIDIA A10G'], max_iters=100) == [*figures, '1.00', '1.00', 'NVIDIA A10G']
    assert modal_train.price_per_hour(['NVIDIA A100-SXM4-80GB']) is None  # which is no A10
    assert modal_train.price_per_hour([]) is None
