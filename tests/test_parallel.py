"""Several processes: the same mathematics on 1, 2 and 4 of them, one that speaks and writes, and an end for all when one ends."""
import csv
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, make_pairs, ranks

from model import GPT, GPTConfig
from pocket import distributed, memory
from pocket.checkpoint import build, load
from pocket.data import Pairs, Stream, load_meta
from pocket.errors import UserError

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
SAME = ['--device=cpu', '--dtype=float32', '--dropout=0', '--max_iters=3', '--eval_interval=3', '--log_interval=1', '--n_layer=1', '--n_head=2', '--n_embd=16']


def start(project, world, *args):
    return ranks(project, world, 'train.py', *args)


def train(project, world, out, *args):
    """A run on so many processes: (what it said, its log without what is of time, last.pt)."""
    ended = [(*p.communicate(timeout=100), p.returncode) for p in start(project, world, *args, f'--out_dir={out}')]
    assert [status for *_, status in ended] == [0] * world, ended
    assert all(said == '' for said, *_ in ended[1:]) and not any('Traceback' in err for _, err, _ in ended), ended
    folder = project.root / out
    with open(folder / 'log.csv', encoding='utf-8') as f:
        log = [[float(row[k]) for k in ('step', 'tokens', 'train_loss', 'val_loss', 'grad_norm')] for row in csv.DictReader(f)]
    assert sorted(p.name for p in folder.iterdir()) == ['.lock', 'best.pt', 'config.json', 'last.pt', 'log.csv'] + ['loss.png'] * (len(log) > 1)
    losses = [float(x) for x in re.findall(r'^step \d+: loss ([\d.]+)', ended[0][0], re.M)]
    return losses, log, torch.load(folder / 'last.pt', weights_only=True)


def assert_same(a, b):
    """Two runs of train(): the same to float32's precision."""
    assert a[0] == pytest.approx(b[0], abs=2e-4) and len(a[0]) > 0
    assert np.allclose(a[1], b[1], rtol=1e-4, atol=2e-5) and len(a[1]) == len(b[1])
    assert a[2]['tokens'] == b[2]['tokens'] and a[2]['model'].keys() == b[2]['model'].keys()
    assert all(torch.allclose(a[2]['model'][k], b[2]['model'][k], atol=2e-5) for k in a[2]['model'])


@pytest.mark.parametrize('worlds, args', [
    ((2, 4), ['--gradient_accumulation_steps=3', '--batch_size=4', '--optimizer=adamw', '--gradient_checkpointing', '--tie_weights']),
    ((4,), ['--gradient_accumulation_steps=1', '--batch_size=3'])])  # 3 windows for 4 processes
def test_streams(project, worlds, args):
    args = ['--dataset=toy', '--block_size=16', *SAME, *args]
    one = train(project, 1, 'one', *args)
    for world in worlds:
        assert_same(train(project, world, f'w{world}', *args), one)


@pytest.mark.parametrize('world, args', [
    (2, ['--arch=seq2seq', '--gradient_accumulation_steps=1', '--label_smoothing=0.1', '--batch_tokens=400']),
    (4, ['--arch=seq2seq', '--gradient_accumulation_steps=2', '--batch_tokens=90', '--optimizer=adamw']),   # groups of one and two pairs
    (2, ['--gradient_accumulation_steps=2', '--cutoffs=4,20', '--optimizer=adamw', '--batch_tokens=64'])])  # clusters without a target
def test_pairs(project, world, args):
    make_pairs(project.root)
    args = ['--dataset=talk', '--block_size=24', *SAME, *args]
    assert_same(train(project, world, 'many', *args), train(project, 1, 'one', *args))


def test_a_run_goes_on_with_another_number_of_processes(project):
    """Two steps on two, the third on one or on four: as three on one."""
    args = ['--dataset=toy', '--block_size=16', *SAME, '--gradient_accumulation_steps=2', '--batch_size=4', '--lr_decay_iters=4']
    whole = train(project, 1, 'whole', *args)
    half = train(project, 2, 'half', *args, '--max_iters=2', '--eval_interval=9')
    assert half[2]['step'] == 2
    shutil.copytree(project.root / 'half', project.root / 'other')
    for world, out in ((1, 'half'), (4, 'other')):
        rest = train(project, world, out, *args, '--max_iters=3', '--eval_interval=3', '--resume')
        assert_same((whole[0][2:], [row[3:] for row in whole[1]], whole[2]), (rest[0], [row[3:] for row in rest[1][1:]], rest[2]))


def test_gradients_are_those_of_the_whole_batch(project):
    """… in one piece, by plain autograd, of the weights that the run began with."""
    args = ['--dataset=toy', '--block_size=16', *SAME, '--max_iters=2', '--eval_interval=2', '--gradient_accumulation_steps=3', '--batch_size=3', '--optimizer=adamw',
            '--learning_rate=0', '--grad_clip=0', '--zero_init=False']
    state = train(project, 2, 'run', *args)[2]
    model, _ = build(load(project.root / 'run' / 'last.pt'), 'last.pt')
    folder = project.root / 'data' / 'toy'
    data = Stream(folder, load_meta(folder), 'train', 16, 9)
    moments = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(2):
        model.zero_grad()
        batch, = data.batches(1337, step, 1)
        model(**batch)[1].backward()
        moments = [0.9 * m + 0.1 * p.grad for m, p in zip(moments, model.parameters())]
    order = [p for rank in (2, 1) for p in range(len(moments)) if min(moments[p].ndim, 2) == rank]  # AdamW's groups: matrices, then the rest
    for i, p in enumerate(order):
        assert torch.allclose(state['optimizers'][0]['state'][i]['exp_avg'], moments[p], atol=1e-6)


@pytest.mark.parametrize('micro_batches', [1, 2, 3, 4])
@pytest.mark.parametrize('world', [2, 3, 4, 8])
def test_every_sample_is_somebodys(tmp_path, micro_batches, world):
    """Once, in the same order; the rows of who would have none are without targets; and none is larger than a micro-batch."""
    ids = np.arange(500, dtype='<u2')
    ids.tofile(tmp_path / 'train.bin')
    stream = Stream(tmp_path, {'vocab_size': 500, 'dtype': 'uint16', 'counts': {'train': 500}}, 'train', 8, 2)
    folder = make_pairs(tmp_path)
    pairs = Pairs(folder, load_meta(folder), 'train', [1], 24, 24, 60)
    for data in (stream, pairs):
        def rows(step, **told):
            batches = list(data.batches(7, step, micro_batches, **told))
            assert batches and (data is pairs or all(len(b['idx']) <= 2 for b in batches))
            return [tuple(t[t >= 0].tolist()) for b in batches for t in b['targets'] if (t >= 0).any()]
        for step in (0, 5):
            shared = [row for r in range(world) for row in rows(step, rank=r, world=world)]
            assert shared == rows(step) if data is stream else sorted(shared) == sorted(rows(step))


def test_one_prepares_and_the_others_wait(project):
    (project.root / 'prepare' / 'made.py').write_text(
        'from common import dataset_folder, write_stream\nfrom configurator import configure\nfrom tokenizer import ByteTokenizer\n'
        'data_dir: str | None = None\nconfigure(__file__, globals())\ntok = ByteTokenizer()\nids = tok.encode_to_numpy("hello world " * 50)\n'
        'write_stream(dataset_folder(data_dir, "made"), tok, ids, ids[:50], {}, "none")\n', encoding='utf-8')
    ended = [(*p.communicate(timeout=60), p.returncode) for p in start(project, 2, '--dataset=made', '--block_size=16', *SAME, '--max_iters=1')]
    assert [status for *_, status in ended] == [0, 0] and 'running prepare/made.py' in ended[0][0] and ended[1][:2] == ('', '')
    assert 'shared out to 2 processes' in ended[0][0]


@pytest.mark.parametrize('args, said', [(['--n_head=5'], 'n_embd must be divisible by n_head'), (['--block_size=9999'], 'only 5,000 ids'),
                                        (['--learning_rate=1e30', '--muon_lr=1e30'], 'training diverged')])
def test_a_mistake_is_told_once(project, args, said):
    first, second = start(project, 2, '--dataset=toy', '--block_size=16', *SAME, '--eval_interval=9', *args)
    _, err = first.communicate(timeout=60)
    second.send_signal(signal.SIGTERM)  # as torchrun does as soon as one has ended
    assert first.returncode == 2 and said in err and len(err.splitlines()) == 1
    out, err = second.communicate(timeout=60)
    assert (out, err) == ('', '') and second.returncode != 0


def test_what_only_one_finds_it_says_itself(project):
    run = start(project, 2, '--dataset=toy', '--block_size=16', *SAME, '--n_head=5')[1]  # as if nobody had ended it
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and err.startswith('train.py: process 1: n_embd must be divisible')


@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_is_killed_the_other_ends(project, victim):
    """… by itself, at once, though it waits for the one that is gone."""
    run = start(project, 2, *TINY, '--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1')
    assert any(line.startswith('step 3:') for line in iter(run[0].stdout.readline, ''))
    run[victim].kill()
    _, err = run[1 - victim].communicate(timeout=30)
    assert run[1 - victim].returncode == 1 and 'lost another process of this run' in err and len(err.splitlines()) == 1
    run[victim].communicate()


def test_a_signal_to_one_during_evaluation(project):
    """All leave it, at once and alike; the evaluation is made when the run goes on."""
    path = project.root / 'scores.py'
    text = path.read_text(encoding='utf-8')
    line = '            bar.update(count - bar.n)\n'
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + '            if rank == 1 and count:\n                __import__("signal").raise_signal(15)\n'), encoding='utf-8')
    script = (project.root / 'train.py').read_text(encoding='utf-8')
    assert script.count('    if finished or stop:\n') == 1  # and one that comes when another process's has been heard of is no second
    late = script.replace('    if finished or stop:\n', '    if finished or stop:\n        signal.raise_signal(2)\n')
    (project.root / 'train.py').write_text(late, encoding='utf-8')
    ended = [(*p.communicate(timeout=60), p.returncode) for p in start(project, 2, '--dataset=toy', '--block_size=16', *SAME, '--batch_size=4')]
    (project.root / 'train.py').write_text(script, encoding='utf-8')
    assert [status for *_, status in ended] == [143, 143] and 'stopped by SIGTERM at step 3' in ended[0][0] and ', val ' not in ended[0][0]
    path.write_text(text, encoding='utf-8')
    out, _ = project.run('train.py', '--dataset=toy', '--resume')
    assert 'step 3 of 3' in out and ', val ' in out


@pytest.mark.slow
def test_ctrl_c_under_torchrun(project):
    """torchrun passes the signal on: the run is saved, nobody is left, and it goes on without torchrun."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(project.root / 'train.py')]
    p = subprocess.Popen([*launch, *TINY, '--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1'], cwd=project.root, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert any(line.startswith('step 3:') for line in iter(p.stdout.readline, ''))
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert out.count('stopped by SIGINT') == 1 and 'go on with: torchrun --standalone --nproc_per_node=2 train.py --dataset=toy' in out
    assert 'SIGKILL' not in err and 'train.py:' not in err
    step = project.checkpoint('toy')['step']
    assert step >= 3
    out, _ = project.run('train.py', '--resume', '--dataset=toy', f'--max_iters={step + 1}')
    assert f'step {step} of {step + 1}' in out


def test_what_cannot_be_shared(project, monkeypatch):
    env = {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}
    assert 'WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set: start with torchrun' in project.fails('train.py', *TINY, env=env)
    monkeypatch.setattr(distributed, 'world_size', 2)
    for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '3')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for device, said in (('mps', "2 processes can't share mps"), ('cuda:1', "can't share cuda:1"), ('cuda', 'lower --nproc_per_node')):
        with pytest.raises(UserError, match=said):
            distributed.init(torch.device(device))


def test_the_serious_run(project):
    """config/gpt2_124m.py: three steps on made data, shapes made small and everything else as it stands there; and what it describes."""
    out = train(project, 2, 'run', 'config/gpt2_124m.py', '--dataset=toy', '--max_iters=3', '--block_size=16', '--n_layer=1', '--n_head=2', '--n_embd=16',
                '--batch_size=1', '--device=cpu', '--log_interval=1')
    assert out[2]['step'] == 3 and len(out[2]['optimizers']) == 1 and len(out[0]) == 3
    names, settings = GPTConfig.__dataclass_fields__, {}
    exec((project.root / 'config' / 'gpt2_124m.py').read_text(encoding='utf-8'), settings)
    with torch.device('meta'):
        assert GPT(GPTConfig(**{k: v for k, v in settings.items() if k in names})).num_params() == 124_439_808
    assert settings['batch_size'] * settings['block_size'] * settings['gradient_accumulation_steps'] == 2 ** 19
    assert settings['max_iters'] == round(10e9 / 2 ** 19)


@pytest.mark.parametrize('args', [{}, {'act': 'swiglu', 'norm': 'rmsnorm'}, {'pos': 'rotary', 'qk_norm': True, 'act': 'relu2'}, {'gradient_checkpointing': True}])
@pytest.mark.parametrize('T', [256, 1100])  # with and without the scores of attention
def test_memory_estimate(args, T):
    """Activations: against what autograd really keeps, to about a third."""
    model, kept = GPT(GPTConfig(T, 100, 6, 4, 64, **args)), {}
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    idx, targets = torch.randint(100, (2, 1, T))

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.transformer(idx)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in mine)
    c = model.config
    said = memory.estimate(c, model.num_params(), 0, T, torch.float32, 'cpu')['activations']
    at_work = memory.estimate(GPTConfig(T, 100, 0 + 1, 4, 64, **{**args, 'gradient_checkpointing': True}), 0, 0, T, torch.float32, 'cpu')['activations']
    assert 0.67 < (said - at_work) / real < 1.5


def test_memory_table(project):
    out, _ = project.run('memory.py', '--batch_size=1')
    rows = [[float(x.replace(',', '')) for x in line.strip('| ').split(' | ')] for line in out.splitlines()[4:]]
    assert [row[0] for row in rows] == [124.4, 354.8, 774.0, 1557.6]
    for row in rows:
        assert row[3] == pytest.approx(row[0] * 8 / 1000, abs=0.06)  # AdamW's two moments
        assert row[6] == pytest.approx(sum(row[1:6]), abs=0.3) and row[8] == pytest.approx(sum(row[1:5]) + row[7], abs=0.3)
    assert rows[-1][8] < 80  # on one card
    assert 'got 5B' in project.fails('memory.py', '--measure=5B')
