"""modal_train.py: against a stand-in of Modal's server, with Modal's own client and container; and its train() on its own, for real."""
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import CHECKOUT, TINY, Project, Zygote
from modal_server import Server, copied

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='containers of Modal are Linux')
MODAL = [sys.executable, '-m', 'modal', 'run']

# In place of the scripts, for what is not about them: they do what modal_train.py relies on, without torch. steps.txt has every step taken
TRAIN = '''
import fcntl, os, signal, sys, time
from pathlib import Path
args = dict(arg[2:].partition('=')[::2] for arg in sys.argv[1:] if arg.startswith('--'))
if 'bad' in args:
    print('train.py: unknown knob', file=sys.stderr)
    sys.exit(2)
out, stop = Path(args['out_dir']), []
lock = open(out / '.lock', 'w')
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit('train.py: another run is writing')
step = int((out / 'last.pt').read_text()) if 'resume' in args else 0
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
def save():
    (out / 'last.tmp').write_text(str(step))
    os.replace(out / 'last.tmp', out / 'last.pt')
(out / 'config.json').write_text('{"max_iters": 60}')
while step < 60 and not stop:
    step += 1
    time.sleep(0.02)
    with open(out / 'steps.txt', 'a') as f:
        print(step, file=f)
    if step % 20 == 0:
        (out / 'log.csv').write_text(f'step,seconds,val_loss,tokens_per_s\\n{step},{step * 36},1.5,4321\\n')
        save()
    if step == 40 and 'crash' in args and 'resume' not in args:
        os._exit(1)
    for _ in range(300 * (step == 40 and 'wait' in args and 'resume' not in args)):  # until it is told to stop
        time.sleep(0 if stop else 0.1)
save()
sys.exit(143 if stop else 0)
'''
SAMPLE = '''
import sys
print(sys.argv[1:])
for line in sys.stdin if '--chat' in sys.argv else []:
    if line == '/quit\\n':
        break
    print('you said', line, end='', flush=True)
'''


@pytest.fixture
def cloud(tmp_path):
    """A project for the stand-in, with a folder as the volume. cloud.modal(ref, …) is `modal run modal_train.py…` from elsewhere."""
    p = Project(tmp_path / 'project')
    for name, text in (('train.py', TRAIN), ('sample.py', SAMPLE), ('prepare/toy.py', 'import sys; print("made", *sys.argv[1:])')):
        (p.root / name).write_text(text, encoding='utf-8')
    for name in ('data/toy/train.bin', 'out/old/last.pt', '.git/config', 'tests/test_x.py', '.venv/x.py', 'config/mine/deep.py'):
        (p.root / name).parent.mkdir(parents=True, exist_ok=True)
        (p.root / name).touch()
    shutil.copy(CHECKOUT / 'requirements.txt', p.root)
    torchrun = p.root / 'bin' / 'torchrun'
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\necho torchrun "$1" "$2"\nshift 2\n{sys.executable} "$@" || echo "  exitcode  : $? (pid: 1)"\ntest -z "$fail"\n')
    torchrun.chmod(0o755)
    copied(p)
    p.volume = p.root / 'vol'

    def run(ref, *args, status=0, typed=None, on_commit=lambda server: None, how=None):
        with Server(p.root, p.volume) as server:
            server.on_commit, server.how, server.path = on_commit, how, f'{torchrun.parent}:{os.environ["PATH"]}'
            done = subprocess.run([*MODAL, f'{p.root / "modal_train.py"}{ref}', *args], env=server.env, cwd='/', input=typed, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr
        assert 'Traceback' not in done.stderr
        server.out, server.err = done.stdout, done.stderr
        return server
    p.modal = run
    return p


def preempt_once(server):
    if len(server.containers) == 1 and (server.volume / 'out/stdlib/last.pt').exists() and not hasattr(server, 'preempted'):
        server.preempted = server.containers[0]
        server.preempted.send_signal(server.how)


def steps(cloud, run):
    return [int(line) for line in (cloud.volume / 'out' / run / 'steps.txt').read_text().split()]


@pytest.mark.parametrize('how', [signal.SIGINT, getattr(signal, 'SIGKILL', 9)])
def test_a_preempted_run_goes_on_by_itself_and_the_platform_is_asked_for_what_it_needs(cloud, how):
    server = cloud.modal('', '--overrides=--wait', on_commit=preempt_once, how=how)
    assert server.preempted.returncode is not None and len(server.containers) == 2
    assert steps(cloud, 'stdlib') == list(range(1, 61))  # each step once, over both containers
    assert 'out/stdlib starts anew' in server.out and 'out/stdlib goes on where it stopped' in server.out
    assert 'lies in out/stdlib' in server.out
    states = [commit.get('out/stdlib/last.pt') for commit in server.commits]
    assert len(set(states) - {None}) >= 3 and states[-1] == max(filter(None, states))  # after checkpoints, and at the end

    ranked = [f.function for f in server.requests('FunctionCreate')[0].function_data.ranked_functions]
    assert [f.resources.gpu_config.gpu_type for f in ranked] == ['L4', 'A10', 'T4']
    for f in ranked:
        assert f.timeout_secs == 24 * 3600 and f.single_use_containers and not f.secret_ids
        assert (f.retry_policy.retries, f.retry_policy.initial_delay_ms) == (10, 0)
        assert [m.mount_path for m in f.volume_mounts] == [str(cloud.volume)]
    assert server.requests('VolumeGetOrCreate')[0].deployment_name == 'pocketgpt'
    assert server.requests('VolumeGetOrCreate')[0].object_creation_type == 1  # create if missing
    images = [r.image for r in server.requests('ImageGetOrCreate')]
    layers = '\n'.join(line for image in images for line in image.dockerfile_commands)
    assert 'FROM python:3.11' in layers and 'HF_HOME' in layers
    files = {f.filename: f.data.decode() for image in images for f in image.context_files}
    wanted = re.findall(r'^[a-z]\w+', (CHECKOUT / 'requirements.txt').read_text(encoding='utf-8'), re.M)
    assert 'torch' in wanted and all(re.search(rf'^{name}\b', files['/.requirements.txt'], re.M) for name in wanted)
    sent = {f.filename for r in server.requests('MountGetOrCreate') for f in r.files}
    here = {str(Path(p).relative_to(cloud.root)) for pattern in ('*.py', 'prepare/*.py', 'config/*.py') for p in cloud.root.glob(pattern)}
    assert sent == {f'/root/pocketgpt/{name}' for name in here} | {'/root/modal_train.py'}


def test_a_crash_is_tried_again_bad_input_is_not(cloud):
    server = cloud.modal('', '--gpu=A100', '--gpus', '2', '--secret=mine', '--config=config/shakespeare_char.py', '--overrides=--crash')
    assert 'torchrun --standalone --nproc_per_node=2' in server.out
    definition = server.requests('FunctionCreate')[0].function
    assert (definition.resources.gpu_config.gpu_type, definition.resources.gpu_config.count) == ('A100', 2)
    assert server.requests('SecretGetOrCreate')[0].deployment_name == 'mine'
    assert list(server.requests('FunctionBindParams')[0].function_options.secret_ids) == ['st-1']
    server = cloud.modal('', '--overrides=--bad', '--name=shakespeare_char', status=2)
    assert server.err.strip() == 'train.py: unknown knob' and len(server.containers) == 1
    assert sorted(p.name for p in (cloud.volume / 'out').iterdir()) == ['shakespeare_char']  # nothing was moved


def test_a_run_comes_home_whole_or_not_at_all_and_is_listed(cloud):
    run = cloud.volume / 'out' / 'toy'
    run.mkdir(parents=True)
    with zipfile.ZipFile(run / 'last.pt', 'w') as f:  # as torch.save() writes it
        f.writestr('last/data.pkl', os.urandom(9000))
    (run / 'log.csv').write_text('step,seconds,val_loss,tokens_per_s\n20,720,1.5,4321\n')
    (run / 'config.json').write_text('{"max_iters": 100}')
    (run / 'modal.json').write_text(json.dumps({'gpus': ['NVIDIA L4', 'NVIDIA L4']}))
    source = cloud.root / 'modal_train.py'
    source.write_text(source.read_text(encoding='utf-8').replace("'L4': None", "'L4': 0.5"), encoding='utf-8')
    row = next(line for line in cloud.modal('::ls', '--steps=200').out.splitlines() if line.startswith('toy'))
    assert row.split()[1:9] == ['20', 'of', '100', '1.5000', '4321', '2.00', '2.00', 'NVIDIA']  # two hours, of two GPUs
    out = cloud.root / 'out'
    cloud.modal('::download', '--name=toy')
    assert (out / 'toy' / 'last.pt').read_bytes() == (run / 'last.pt').read_bytes()
    broken = bytearray((run / 'last.pt').read_bytes())
    broken[len(broken) // 2] ^= 1
    (run / 'last.pt').write_bytes(broken)
    before = sorted(str(p) for p in out.rglob('*'))
    assert 'did not come whole' in cloud.modal('::download', '--name=toy', status=2).err
    assert sorted(str(p) for p in out.rglob('*')) == before


@pytest.mark.slow
def test_other_scripts_run_there_too(cloud):
    server = cloud.modal('::prepare', '--dataset=toy', '--args=--limit=3')
    assert f'made --limit=3 --data_dir={cloud.volume}/data' in server.out
    assert not server.requests('FunctionCreate')[0].function.resources.gpu_config.gpu_type and server.commits
    server = cloud.modal('::sample', '--name=toy', '--args=--start="a b"', '--gpu=T4')
    assert f"['sample.py', '--out_dir={cloud.volume}/out/toy', '--start=a b']"[14:] in server.out
    assert server.requests('FunctionCreate')[0].function.resources.gpu_config.gpu_type == 'T4'
    assert cloud.modal('::chat', '--name=toy', typed='hello\nyou\n/quit\n').out.count('you said') == 2


@pytest.mark.parametrize('ref, options', [('', '--config --overrides --name --gpu --gpus --fresh --secret'), ('::download', '--name')])
def test_help_without_account_or_network(tmp_path, ref, options):
    env = {**os.environ, 'MODAL_CONFIG_PATH': str(tmp_path / 'none'), 'MODAL_SERVER_URL': 'http://127.0.0.1:9'}
    out = subprocess.run([*MODAL, f'{CHECKOUT / "modal_train.py"}{ref}', '--help'], env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(option in out for option in options.split())


class Child:
    """subprocess.Popen with train.py from the zygote; everything else is what it is."""

    def __new__(cls, command, **kwargs):
        if command[0] != sys.executable:
            return subprocess.Popen(command, **kwargs)
        process = Zygote.start([str(kwargs['cwd'] / command[1]), *command[2:]], kwargs['cwd'], {**os.environ, 'OMP_NUM_THREADS': '1'})
        process.terminate = lambda: process.poll() is None and process.send_signal(15)
        return process


class Volume:
    """Notes commits, and is interrupted, as by a signal that comes just then, at the first checkpoint of `interrupted`."""

    def __init__(self, interrupted=None):
        self.commits, self.interrupted = 0, interrupted

    def commit(self):
        self.commits += 1
        if self.interrupted and self.interrupted.exists():
            self.interrupted = None
            raise KeyboardInterrupt


@pytest.fixture
def local(tmp_path, monkeypatch):
    """modal_train, imported, with the folder local.VOLUME as the volume: its functions are called through .local()."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.syspath_prepend(str(CHECKOUT))
    before = signal.getsignal(signal.SIGTERM)
    module = importlib.import_module('modal_train')
    (tmp_path / 'train.py').write_text(TRAIN, encoding='utf-8')
    for name, value in (('HERE', tmp_path), ('VOLUME', str(tmp_path)), ('volume', Volume())):
        monkeypatch.setattr(module, name, value)
    yield module
    signal.signal(signal.SIGTERM, before)


@pytest.mark.filterwarnings('ignore:The train function is executing locally')
def test_train_is_stopped_and_goes_on_to_the_same_weights(local, project, monkeypatch):
    import torch
    args = [*TINY, '--max_iters=60', '--eval_interval=5', '--log_interval=50']
    for name, value in (('HERE', project.root), ('VOLUME', str(project.root)), ('Popen', Child), ('volume', Volume(project.root / 'out/half/last.pt'))):
        monkeypatch.setattr(local, name, value)
    with pytest.raises(KeyboardInterrupt):
        local.train.local(' '.join(args), 'half')
    assert 5 <= project.checkpoint('half')['step'] < 60
    assert local.train.local(' '.join(args), 'half')[0] == 0
    project.run('train.py', *args, '--out_dir=out/whole')
    whole, half = project.checkpoint('whole'), project.checkpoint('half')
    assert half['step'] == 60 and all(torch.equal(half['model'][name], value) for name, value in whole['model'].items())


@pytest.mark.filterwarnings('ignore:The train function is executing locally')
def test_what_goes_on_and_what_starts_anew(local, tmp_path, monkeypatch, capsys):
    def steps(run):
        return [int(line) for line in (tmp_path / 'out' / run / 'steps.txt').read_text().split()]

    def train(*args, **kwargs):
        return local.train.local(' '.join(args), 'x', **kwargs)

    def stopped(*args, **kwargs):
        monkeypatch.setattr(local, 'volume', Volume(tmp_path / 'out/x/last.pt'))
        with pytest.raises(KeyboardInterrupt):
            train(*args, **kwargs)

    once = list(range(1, 61))
    stopped('--a=1')
    assert train('--bad')[0] == 2  # what is refused changes nothing
    assert train('--a=1')[0] == 0 and steps('x') == once
    status, words = train('--a=1')
    assert status == 0 and 'finished' in words and steps('x') == once
    monkeypatch.setattr(local, 'volume', Volume())
    with pytest.raises(RuntimeError, match='status 1'):
        train('--crash', '--a=2')  # another command: a new run
    assert steps('x.1') == once and steps('x') == once[:40]
    assert train('--crash', '--a=3', '--resume')[0] == 0 and steps('x') == once  # with other settings, where that is asked for
    with pytest.raises(RuntimeError):
        train('--crash', fresh=True, when='now')
    assert train('--crash', fresh=True, when='now')[0] == 0 and steps('x') == steps('x.2') == once  # attempts of one call
    monkeypatch.setattr(local, 'TIMEOUT', 0.5)
    with pytest.raises(TimeoutError):
        train('--a=1')
    assert 0 < len(steps('x')) < 60
    monkeypatch.setattr(local, 'TIMEOUT', 60)
    assert train('--a=1')[0] == 0 and steps('x') == once
    assert 'goes on where it stopped' in capsys.readouterr().out
    with pytest.raises(ValueError, match='copy it there'):
        local.main(config=str(tmp_path / 'train.py'))
    with pytest.raises(ValueError, match='plain word'):
        local.main(name='../x')
