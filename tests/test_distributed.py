"""
Several processes: the same mathematics on 1, 2 and 4 of them; one that prints and writes; and an
end for all when one ends.

    pytest -n 0 tests/test_distributed.py            a minute
    pytest -n 0 -m slow tests/test_distributed.py    under the real torchrun
"""
import csv
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, make_pairs, ranks
from wrapped import report_soon, stop_in_evaluation, write_preparation

from model import GPT, GPTConfig
from pocket import distributed
from pocket.checkpoint import build, load
from pocket.data import Pairs, Stream, load_meta
from pocket.errors import UserError

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')

TOY = ['--dataset=toy', '--block_size=16']
SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=16']
ENDLESS = ['--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1']

# Three steps without what makes the result depend on the number of processes
EXACT = [
    '--device=cpu', '--dtype=float32', '--dropout=0', '--max_iters=3', '--eval_interval=3',
    '--log_interval=1', *SMALL,
]


def start(project, world_size, *args):
    """Start train.py on so many processes."""
    return ranks(project, world_size, 'train.py', *args)


def finish(processes, timeout=60):
    """Wait for the end of processes. Returns their stdouts, stderrs and exit statuses."""
    outs = []
    errs = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        outs.append(out)
        errs.append(err)
    return outs, errs, [process.returncode for process in processes]


def wait_for_line(process, beginning):
    """Read what a process prints up to a line that begins so."""
    assert any(line.startswith(beginning) for line in iter(process.stdout.readline, ''))


# --------------------------------------------------------------------------------------------------
# The same mathematics


class Run:
    """A run of train.py that has ended well: its losses, the rows of its log, its checkpoint."""

    COLUMNS = ('step', 'tokens', 'train_loss', 'val_loss', 'grad_norm')  # not those of time

    def __init__(self, folder, out):
        losses = re.findall(r'^step \d+: loss ([\d.]+)', out, re.M)
        self.losses = [float(loss) for loss in losses]
        with open(folder / 'log.csv', encoding='utf-8') as f:
            rows = list(csv.DictReader(f))
        self.log = [[float(row[column]) for column in self.COLUMNS] for row in rows]
        self.state = torch.load(folder / 'last.pt', weights_only=True)


def train(project, world_size, name, *args):
    """Train on so many processes, of which one prints and writes. Returns the Run."""
    processes = start(project, world_size, *args, f'--out_dir={name}')
    outs, errs, statuses = finish(processes, timeout=100)
    assert statuses == [0] * world_size, errs
    assert outs[1:] == [''] * (world_size - 1)
    assert not any('Traceback' in err for err in errs), errs

    run = Run(project.root / name, outs[0])
    files = ['.lock', 'best.pt', 'config.json', 'last.pt', 'log.csv']
    if len(run.log) > 1:
        files.append('loss.png')
    assert sorted(path.name for path in (project.root / name).iterdir()) == files
    return run


def assert_same_weights(a, b):
    """Two checkpoints hold the same weights, to float32's precision."""
    assert a['tokens'] == b['tokens']
    assert a['model'].keys() == b['model'].keys()
    for name in a['model']:
        assert torch.allclose(a['model'][name], b['model'][name], atol=2e-5), name


def assert_same(a, b):
    """Two Runs are the same, to float32's precision."""
    assert len(a.losses) > 0
    assert a.losses == pytest.approx(b.losses, abs=2e-4)
    assert len(a.log) == len(b.log)
    assert np.allclose(a.log, b.log, rtol=1e-4, atol=2e-5)
    assert_same_weights(a.state, b.state)


@pytest.mark.parametrize('world_sizes, recipe', [
    ([2, 4], [
        '--gradient_accumulation_steps=3', '--batch_size=4', '--optimizer=adamw',
        '--gradient_checkpointing', '--tie_weights']),
    ([4], ['--gradient_accumulation_steps=1', '--batch_size=3']),  # 3 windows for 4 processes
])
def test_stream_trains_the_same_on_any_number_of_processes(project, world_sizes, recipe):
    args = [*TOY, *EXACT, *recipe]
    one = train(project, 1, 'one', *args)
    for world_size in world_sizes:
        several = train(project, world_size, f'on_{world_size}', *args)
        assert_same(several, one)


@pytest.mark.parametrize('world_size, recipe', [
    (2, [
        '--arch=seq2seq', '--gradient_accumulation_steps=1', '--label_smoothing=0.1',
        '--batch_tokens=400']),
    (4, [  # buckets of one and two pairs
        '--arch=seq2seq', '--gradient_accumulation_steps=2', '--optimizer=adamw',
        '--batch_tokens=90']),
    (2, [  # clusters without a target
        '--cutoffs=4,20', '--gradient_accumulation_steps=2', '--optimizer=adamw',
        '--batch_tokens=64']),
])
def test_pairs_train_the_same_on_any_number_of_processes(project, world_size, recipe):
    make_pairs(project.root)
    args = ['--dataset=talk', '--block_size=24', *EXACT, *recipe]
    several = train(project, world_size, 'several', *args)
    one = train(project, 1, 'one', *args)
    assert_same(several, one)


@pytest.mark.parametrize('world_size', [1, 4])
def test_resume_on_another_number_of_processes(project, world_size):
    """Two steps on two processes, the third on one or on four: as three on one."""
    args = [
        *TOY, *EXACT, '--gradient_accumulation_steps=2', '--batch_size=4', '--lr_decay_iters=4']
    whole = train(project, 1, 'whole', *args)
    half = train(project, 2, 'parts', *args, '--max_iters=2', '--eval_interval=9')
    assert half.state['step'] == 2

    more = ['--max_iters=3', '--eval_interval=3', '--resume']
    rest = train(project, world_size, 'parts', *args, *more)
    assert rest.losses == pytest.approx(whole.losses[2:], abs=2e-4)
    assert len(rest.log) == 2  # at steps 2 and 3
    val_loss_and_grad_norm = rest.log[-1][3:]
    assert np.allclose(val_loss_and_grad_norm, whole.log[-1][3:], rtol=1e-4, atol=2e-5)
    assert_same_weights(rest.state, whole.state)


def test_gradients_are_those_of_the_whole_batch(project):
    """… in one piece, by plain autograd, for the weights that the run began with: AdamW's first
    moments tell them.
    """
    frozen = ['--learning_rate=0', '--grad_clip=0', '--zero_init=False', '--optimizer=adamw']
    steps = ['--max_iters=2', '--eval_interval=2']
    batch = ['--gradient_accumulation_steps=3', '--batch_size=3']
    state = train(project, 2, 'run', *TOY, *EXACT, *frozen, *steps, *batch).state

    model, _ = build(load(project.root / 'run' / 'last.pt'), 'last.pt')
    folder = project.root / 'data' / 'toy'
    data = Stream(folder, load_meta(folder), 'train', block_size=16, batch_size=9)
    parameters = list(model.parameters())
    moments = [torch.zeros_like(p) for p in parameters]
    for step in range(2):
        model.zero_grad()
        batch, = data.batches(1337, step, micro_batches=1)
        _, loss = model(**batch)
        loss.backward()
        for moment, p in zip(moments, parameters):
            moment.lerp_(p.grad, 0.1)

    # In AdamW's order: matrices, then the rest
    ordered = [moment for moment in moments if moment.ndim >= 2]
    ordered += [moment for moment in moments if moment.ndim < 2]
    saved = state['optimizers'][0]['state']
    assert len(saved) == len(ordered)
    for i, moment in enumerate(ordered):
        assert torch.allclose(saved[i]['exp_avg'], moment, atol=1e-6)


def target_rows(data, step, micro_batches, largest=None, **rank):
    """The targets of each row of a step that has any, as tuples."""
    batches = list(data.batches(7, step, micro_batches, **rank))
    assert batches  # also if there is nothing to do: all ranks take part in the all-reduce
    rows = []
    for batch in batches:
        assert largest is None or len(batch['idx']) <= largest
        for targets in batch['targets']:
            real = tuple(targets[targets >= 0].tolist())
            if real:
                rows.append(real)
    return rows


@pytest.mark.parametrize('step', [0, 5])
@pytest.mark.parametrize('micro_batches', [1, 2, 3, 4])
@pytest.mark.parametrize('world_size', [2, 3, 4, 8])
def test_every_window_goes_to_one_rank(tmp_path, world_size, micro_batches, step):
    """Once, in the same order, and no batch is larger than a micro-batch."""
    np.arange(500, dtype='<u2').tofile(tmp_path / 'train.bin')
    meta = {'vocab_size': 500, 'dtype': 'uint16', 'counts': {'train': 500}}
    data = Stream(tmp_path, meta, 'train', block_size=8, batch_size=2)
    shared = []
    for rank in range(world_size):
        shared += target_rows(data, step, micro_batches, 2, rank=rank, world_size=world_size)
    assert shared == target_rows(data, step, micro_batches)


@pytest.mark.parametrize('step', [0, 5])
@pytest.mark.parametrize('micro_batches', [1, 2, 3, 4])
@pytest.mark.parametrize('world_size', [2, 3, 4, 8])
def test_every_pair_goes_to_one_rank(tmp_path, world_size, micro_batches, step):
    folder = make_pairs(tmp_path)
    data = Pairs(folder, load_meta(folder), 'train', [1], 24, 24, batch_tokens=60)
    shared = []
    for rank in range(world_size):
        shared += target_rows(data, step, micro_batches, rank=rank, world_size=world_size)
    assert sorted(shared) == sorted(target_rows(data, step, micro_batches))


def test_config_gpt2_124m(project):
    """Three steps on made-up data, with a small shape and everything else as it stands there."""
    run = train(
        project, 2, 'run', 'config/gpt2_124m.py', *TOY, *SMALL, '--max_iters=3', '--batch_size=1',
        '--device=cpu', '--log_interval=1',
    )
    assert run.state['step'] == 3
    assert len(run.state['optimizers']) == 1
    assert len(run.losses) == 3


def test_config_gpt2_124m_is_gpt2(project):
    """Its size, half a million tokens per step, and ten billion in all."""
    settings = {}
    source = (project.root / 'config' / 'gpt2_124m.py').read_text(encoding='utf-8')
    exec(source, settings)
    model_args = {}
    for name in GPTConfig.__dataclass_fields__:
        if name in settings:
            model_args[name] = settings[name]
    with torch.device('meta'):
        assert GPT(GPTConfig(**model_args)).num_params() == 124_439_808

    windows_per_step = settings['batch_size'] * settings['gradient_accumulation_steps']
    assert windows_per_step * settings['block_size'] == 2**19
    assert settings['max_iters'] == round(10e9 / 2**19)


# --------------------------------------------------------------------------------------------------
# One speaks and writes


def test_one_process_prepares_and_the_others_wait(project):
    write_preparation(project)
    args = ['--dataset=made', '--block_size=16', *EXACT, '--max_iters=1']
    outs, errs, statuses = finish(start(project, 2, *args))
    assert statuses == [0, 0], errs
    assert 'running prepare/made.py' in outs[0]
    assert 'shared by 2 processes' in outs[0]
    assert outs[1] == errs[1] == ''


@pytest.mark.parametrize('args, message', [
    (['--n_head=5'], 'n_embd must be divisible by n_head'),
    (['--block_size=9999'], 'only 5,000 ids'),
    (['--learning_rate=1e30', '--muon_lr=1e30'], 'training diverged'),
])
def test_error_is_reported_once(project, args, message):
    first, second = start(project, 2, *TOY, *EXACT, '--eval_interval=9', *args)
    _, err = first.communicate(timeout=60)
    second.send_signal(signal.SIGTERM)  # as torchrun does as soon as one process has ended
    assert first.returncode == 2
    assert message in err
    assert len(err.splitlines()) == 1

    out, err = second.communicate(timeout=60)
    assert out == ''
    assert err == ''
    assert second.returncode != 0


def test_error_of_one_process_is_reported_by_itself(project):
    """As if nobody had ended the second process."""
    _, second = ranks(project, 2, report_soon(project), *TOY, *EXACT, '--n_head=5')
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert err.startswith('train.py: process 1: n_embd must be divisible')


# --------------------------------------------------------------------------------------------------
# An end for all


@pytest.mark.parametrize('victim', [0, 1])
def test_if_one_process_is_killed_the_other_ends(project, victim):
    """… by itself, at once, although it waits for the one that is gone."""
    processes = ranks(project, 2, report_soon(project), *TINY, *ENDLESS)
    wait_for_line(processes[0], 'step 3:')
    processes[victim].kill()

    survivor = processes[1 - victim]
    _, err = survivor.communicate(timeout=30)
    assert survivor.returncode == 1
    assert 'lost another process of this run' in err
    assert len(err.splitlines()) == 1
    processes[victim].communicate()


def test_signal_to_one_process_stops_the_evaluation_of_all(project):
    """All leave at the same step; the evaluation is made when the run is resumed. A second signal,
    that comes when a process has heard of the first from another, does not kill it.
    """
    script = stop_in_evaluation(project, rank=1, interrupt_at_the_end=True)
    outs, errs, statuses = finish(ranks(project, 2, script, *TOY, *EXACT, '--batch_size=4'))
    assert statuses == [143, 143], errs
    assert 'stopped by SIGTERM at step 3' in outs[0]
    assert ', val ' not in outs[0]

    out, _ = project.run('train.py', '--dataset=toy', '--resume')
    assert 'step 3 of 3' in out
    assert ', val ' in out


@pytest.mark.slow
def test_ctrl_c_under_torchrun(project):
    """torchrun passes the signal on: the run is saved, no process is left, and it can be resumed
    without torchrun.
    """
    torchrun = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    process = subprocess.Popen(
        [*torchrun, str(project.root / 'train.py'), *TINY, *ENDLESS], cwd=project.root,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8',
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    wait_for_line(process, 'step 3:')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.count('stopped by SIGINT') == 1
    assert 'resume with: torchrun --standalone --nproc_per_node=2 train.py --dataset=toy' in out
    assert 'SIGKILL' not in err
    assert 'train.py:' not in err

    step = project.checkpoint('toy')['step']
    assert step >= 3
    out, _ = project.run('train.py', '--resume', '--dataset=toy', f'--max_iters={step + 1}')
    assert f'step {step} of {step + 1}' in out


# --------------------------------------------------------------------------------------------------
# What can't be shared


def test_several_processes_without_torchrun_are_refused(project):
    env = {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}
    error = project.fails('train.py', *TINY, env=env)
    assert 'WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set: start with torchrun' in error


@pytest.mark.parametrize('device, message', [
    ('mps', "2 processes can't share mps"),
    ('cuda:1', "can't share cuda:1"),
    ('cuda', 'lower --nproc_per_node'),
])
def test_device_that_processes_cannot_share_is_refused(monkeypatch, device, message):
    """Local rank 3 on a machine with two GPUs."""
    monkeypatch.setattr(distributed, 'world_size', 2)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '3')
    with pytest.raises(UserError, match=message):
        distributed.init(torch.device(device))
