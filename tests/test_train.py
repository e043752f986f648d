"""
train.py: what a run prints and leaves, its optimizers and their schedule, and how it ends by
itself.

    pytest -n 0 tests/test_train.py                  half a minute
    pytest -n 0 -m slow tests/test_train.py          the default run, as typed: minutes

Stopping and resuming are in test_resume.py, bad input in test_train_options.py, several processes
in test_distributed.py.
"""
import csv
import math
import os
import re

import pytest
import torch
from conftest import TINY, Project, same
from wrapped import explode, fail_to_compile, write_preparation

from pocket import checkpoint, training
from pocket.checkpoint import TrainState
from pocket.data import Stream, load_meta
from pocket.device import pick_dtype
from pocket.errors import UserError

CPU = torch.device('cpu')
CUDA = torch.device('cuda')  # only a name: no test here needs such a device

SMALL_CONFIG = '''
dataset = "toy"
block_size = 16
n_embd = 16
n_layer = 1
batch_size = 4
max_epochs = 1e6
'''


def log_rows(folder):
    """The rows of a run's log.csv, as dicts."""
    with open(folder / 'log.csv', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def last_checkpoint(folder):
    return torch.load(folder / 'last.pt', weights_only=True)


# --------------------------------------------------------------------------------------------------
# What a run prints and leaves


def test_what_a_run_prints(trained):
    for part in [
        'M parameters, about', 'GB of memory', '5,000 training tokens, 128 tokens per step',
        'device: cpu, torch.', 'step 0 of 8; checkpoints go to out/toy', 'step 2: loss', 'tokens/s',
        'left', 'perplexity', 'bits per byte', 'the best so far', 'total time ', 'peak memory',
        'saved as out/toy/best.pt', 'the loss curve is out/toy/loss.png',
        'next: python sample.py --out_dir=out/toy --chat',
    ]:
        assert part.replace('/', os.sep) in trained.stdout.replace('/', os.sep), part
    assert trained.stderr == ''


def test_what_a_run_leaves(trained):
    run = trained.root / 'out' / 'toy'
    names = sorted(path.name for path in run.iterdir())
    assert names == ['.lock', 'best.pt', 'config.json', 'last.pt', 'log.csv', 'loss.png']
    assert (run / 'loss.png').read_bytes().startswith(b'\x89PNG')

    rows = log_rows(run)
    assert [(row['step'], row['tokens']) for row in rows] == [('4', '512'), ('8', '1024')]
    for row in rows:
        assert all(float(value) >= 0 for value in row.values())

    state = trained.checkpoint('toy')
    assert state['step'] == 8
    assert state['config']['n_embd'] == 16
    assert state['tokenizer']['kind'] == 'char'


def test_a_model_takes_over_the_tensors_of_its_checkpoint(trained):
    """A second copy of the weights would double the memory of an export."""
    path = trained.root / 'out' / 'toy' / 'best.pt'
    for mapped in (False, True):
        state = checkpoint.load(path, mapped)
        model, _ = checkpoint.build(state, path)
        for name, parameter in model.state_dict(keep_vars=True).items():
            assert parameter.data_ptr() == state['model'][name].data_ptr()
            assert parameter.requires_grad
        assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_weights


def mean_loss_over_val(project, run):
    """The mean loss of out/RUN/best.pt over all of val, by the plain formula."""
    path = project.root / 'out' / run / 'best.pt'
    model, _ = checkpoint.build(checkpoint.load(path), path)
    folder = project.root / 'data' / 'toy'
    val = Stream(folder, load_meta(folder), 'val', block_size=16)
    ids = torch.from_numpy(val.tokens().astype('int64'))

    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        targets = ids[start + 1:start + 17]
        idx = ids[start:start + len(targets)]
        with torch.no_grad():
            logits, _ = model(idx[None])
        total -= logits[0].log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return total / (len(ids) - 1)


def test_validation_loss_is_the_mean_over_all_of_val(trained):
    """The number in the checkpoint, and what --eval_only prints, are those of the plain formula."""
    expected = mean_loss_over_val(trained, 'toy')
    in_checkpoint = trained.checkpoint('toy', 'best.pt')['best']
    assert abs(in_checkpoint - expected) < 0.02  # training may run in bfloat16

    run = f'--out_dir={trained.root / "out" / "toy"}'
    out, _ = trained.run('train.py', '--eval_only', run, '--dtype=float32')
    loss = float(re.search(r'val loss ([\d.]+)', out)[1])
    bits_per_byte = float(re.search(r'([\d.]+) bits per byte', out)[1])
    assert abs(loss - expected) < 1e-4
    assert abs(bits_per_byte - loss / math.log(2)) < 2e-3  # a character of this text is a byte


def test_run_does_not_depend_on_how_often_it_is_evaluated(project, trained):
    project.train('--eval_interval=2', '--sample_tokens=10', '--out_dir=often')
    seldom = trained.checkpoint('toy')
    often = last_checkpoint(project.root / 'often')
    assert same(seldom['model'], often['model'])
    assert same(seldom['optimizers'], often['optimizers'])


def test_made_up_sentences_are_learned(project):
    """The loss comes near the entropy of the text, whose words are equally probable: about 0.6 nats
    per character.
    """
    project.train(
        '--dropout=0', '--max_iters=300', '--eval_interval=300', '--n_embd=32',
        '--gradient_accumulation_steps=1', '--batch_size=16',
    )
    assert float(log_rows(project.root / 'out' / 'toy')[-1]['val_loss']) < 1.0


@pytest.mark.slow
def test_default_run_learns_python(tmp_path):
    """python train.py, as typed."""
    project = Project(tmp_path / 'clone')
    all_cores = {'OMP_NUM_THREADS': str(os.cpu_count())}
    out, _ = project.run('train.py', timeout=600, env=all_cores)
    losses = [float(row['val_loss']) for row in log_rows(project.root / 'out' / 'stdlib')]
    assert losses == sorted(losses, reverse=True), out
    assert losses[-1] < 1.3, out


# --------------------------------------------------------------------------------------------------
# The folder of a run, and its data


def test_earlier_run_is_never_overwritten(project):
    project.train('--max_iters=1')
    before = (project.root / 'out' / 'toy' / 'last.pt').read_bytes()
    out, _ = project.train('--max_iters=1')
    assert 'held a run' in out
    assert (project.root / 'out' / 'toy.1' / 'last.pt').read_bytes() == before


def test_two_runs_never_share_a_folder(project):
    endless = ['--max_iters=100000', '--eval_interval=20', '--log_interval=1']
    first = project.start('train.py', *TINY, *endless)
    assert any(line.startswith('step 25:') for line in iter(first.stdout.readline, ''))
    try:
        for args in ([], ['--resume']):
            error = project.fails('train.py', '--dataset=toy', '--block_size=16', *args)
            assert 'another run is writing to' in error
    finally:
        first.kill()
        first.communicate()

    # Whatever happened to the first, the folder is free again
    project.run('train.py', '--resume', '--dataset=toy', '--max_iters=1')


def test_missing_dataset_is_prepared(project):
    write_preparation(project)
    out, _ = project.train('--dataset=made', '--max_iters=1', '--data_dir=elsewhere')
    assert 'running prepare/made.py' in out.replace(os.sep, '/')
    assert (project.root / 'elsewhere' / 'made' / 'meta.json').is_file()


# --------------------------------------------------------------------------------------------------
# Optimizers and their schedule


def test_gradient_accumulation_equals_one_large_batch(project):
    options = ['--dropout=0', '--dtype=float32', '--max_iters=3', '--optimizer=adamw']
    project.train(
        *options, '--batch_size=8', '--gradient_accumulation_steps=1', '--out_dir=one')
    project.train(
        *options, '--batch_size=2', '--gradient_accumulation_steps=4', '--out_dir=four')
    one = last_checkpoint(project.root / 'one')['model']
    four = last_checkpoint(project.root / 'four')['model']
    for name in one:
        assert torch.allclose(one[name], four[name], atol=1e-5), name


def test_learning_rates_follow_the_schedule(project):
    """What the optimizer gets, as log.csv has it. All schedules and their corners are in
    test_properties.py.
    """
    project.train(
        '--eval_interval=1', '--learning_rate=0.01', '--schedule=cosine', '--warmup_iters=2',
        '--lr_decay_iters=6', '--min_lr=0.001',
    )
    warmup = [1 / 3, 2 / 3]
    decay = [0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * i / 4)) for i in range(4)]
    floor = [0.1, 0.1]
    expected = [0.01 * factor for factor in warmup + decay + floor]
    lrs = [float(row['lr']) for row in log_rows(project.root / 'out' / 'toy')]
    assert lrs == pytest.approx(expected, rel=1e-3)


def test_norms_and_biases_do_not_decay(trained):
    adamw, _ = trained.checkpoint('toy')['optimizers']
    matrices, others = adamw['param_groups']
    assert matrices['weight_decay'] == 0.1
    assert len(matrices['params']) == 2  # token embedding and head
    assert others['weight_decay'] == 0.0
    assert len(others['params']) == 5  # LayerNorms


def test_muon_trains_the_matrices_of_the_blocks(trained):
    _, muon = trained.checkpoint('toy')['optimizers']
    group, = muon['param_groups']
    assert len(group['params']) == 8  # four in each of two layers
    assert group['lr'] < 0.015  # 'lr' is of the latest step


def test_gradient_is_clipped(project):
    """AdamW's first moment is a tenth of the gradient after the first step."""
    largest = {}
    for clip in ('1e-9', '0'):
        project.train(
            '--max_iters=1', '--optimizer=adamw', f'--grad_clip={clip}', f'--out_dir={clip}')
        moments = last_checkpoint(project.root / clip)['optimizers'][0]['state'].values()
        largest[clip] = max(moment['exp_avg'].norm().item() for moment in moments)
    assert 0 < largest['1e-9'] <= 1e-9
    assert largest['0'] > 1e-5  # 0: no limit


def test_label_smoothing_is_for_training_only(project):
    frozen = [
        '--learning_rate=0', '--muon_lr=0', '--zero_init=False', '--dropout=0', '--max_iters=1']
    project.train(*frozen, '--label_smoothing=0', '--out_dir=plain')
    project.train(*frozen, '--label_smoothing=0.3', '--out_dir=smoothed')
    plain = log_rows(project.root / 'plain')[0]
    smoothed = log_rows(project.root / 'smoothed')[0]
    assert plain['val_loss'] == smoothed['val_loss']
    assert plain['train_loss'] != smoothed['train_loss']


# --------------------------------------------------------------------------------------------------
# How a run ends by itself


def test_early_stopping_keeps_the_best(project):
    project.train(
        '--patience=2', '--max_iters=400', '--eval_interval=20', '--learning_rate=0.03',
        '--dropout=0', '--gradient_accumulation_steps=1',
    )
    rows = log_rows(project.root / 'out' / 'toy')
    losses = [float(row['val_loss']) for row in rows]
    best_row = losses.index(min(losses))
    assert len(losses) < 20
    assert best_row == len(losses) - 3  # the best, and two that are not

    best = project.checkpoint('toy', 'best.pt')
    assert best['step'] == int(rows[best_row]['step'])
    assert f'{best["val_loss"]:.5f}' == rows[best_row]['val_loss']
    assert project.checkpoint('toy')['step'] == int(rows[-1]['step'])


def test_max_minutes_ends_a_run_and_its_schedule(project):
    """Learning rates fall with the clock, to nearly nothing when the time is over. The length that
    a config file gives yields to the one that is typed.
    """
    (project.root / 'config' / 'mine.py').write_text(SMALL_CONFIG, encoding='utf-8')
    out, _ = project.run(
        'train.py', 'config/mine.py', '--max_minutes=0.03', '--device=cpu', '--eval_interval=100000',
        '--log_interval=1', '--warmup_iters=0',
    )
    assert 'step 0 of what fits into 0.03 minutes' in out
    lrs = [float(lr) for lr in re.findall(r'^step \d+: loss .*, lr ([\d.e+-]+)', out, re.M)]
    assert len(lrs) > 10
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[0] > 9e-3
    assert lrs[-1] < 2e-3
    state = project.checkpoint('mine')
    assert state['step'] == len(lrs)
    assert 1 < state['seconds'] < 10

    # Going on for two more steps needs no other option than the new length
    more = f'--max_iters={len(lrs) + 2}'
    out, _ = project.run('train.py', 'config/mine.py', '--resume', more)
    assert 'max_minutes 0.03 -> None' not in out
    assert project.checkpoint('mine')['step'] == len(lrs) + 2


def test_share_of_time_left():
    assert training.share_of_time_left(None, 100.0, 5.0) is None
    assert training.share_of_time_left(2, 0.0, 0.0) == 1.0
    assert training.share_of_time_left(2, 30.0, 20.0) == pytest.approx(0.7)  # 100 s without the end
    assert training.share_of_time_left(2, 100.0, 20.0) == 0.0
    assert training.share_of_time_left(2, 500.0, 20.0) == 0.0
    assert training.share_of_time_left(0.01, 0.5, 60.0) == 0.5  # training has a second at least


DIVERGING = ['--learning_rate=1e30', '--muon_lr=1e30', '--grad_clip=0']


@pytest.mark.parametrize('max_iters, message', [
    (9, 'loss nan'),             # in training
    (2, 'validation loss nan'),  # in the last step: only the evaluation after it can tell
])
def test_divergence_keeps_the_checkpoint(project, max_iters, message):
    project.train('--max_iters=1', '--eval_interval=1')
    before = project.checkpoint('toy')
    assert before['step'] == 1
    assert before['val_loss'] < 10

    length = [f'--max_iters={max_iters}', f'--eval_interval={max_iters}']
    error = project.fails('train.py', '--resume', '--dataset=toy', *length, *DIVERGING)
    assert f'({message}, learning rate' in error
    assert 'training diverged at step' in error
    assert 'lower --learning_rate and --muon_lr' in error
    assert 'are from before this' in error
    assert same(project.checkpoint('toy'), before)


def test_divergence_without_a_checkpoint(project):
    error = project.fails('train.py', *TINY, *DIVERGING)
    assert 'training diverged at step 1 (loss nan, learning rate 9.524e+28)' in error
    assert 'there is no checkpoint yet' in error


def test_infinite_gradient_is_divergence(project):
    """Although the loss of that step, which is from before, is fine."""
    error = project.fails(explode(project), *TINY)
    assert 'training diverged at step 0 (gradient norm inf, learning rate' in error
    assert 'there is no checkpoint yet' in error


def advise(train_loss, dropout=0.0, **numbers):
    """Advice after an evaluation, for a vocabulary of 1,000 and a warm-up of 20 steps."""
    config = {'warmup_iters': 20, 'dropout': dropout}
    return training.advise([(train_loss, train_loss)], TrainState(**numbers), config,
                           vocab_size=1000)


def test_advice_if_the_loss_stays_at_chance_level():
    chance = math.log(1000)
    assert 'still at chance level' in advise(chance, step=40)
    assert '--learning_rate=1e-2 --muon_lr=0.015' in advise(chance, step=40)
    assert advise(chance, step=39) is None  # too early to tell
    assert advise(0.9 * chance, step=40) is None


@pytest.mark.parametrize('explicit, prepared_by, steps, expected', [
    ({}, 'prepare/text.py', 100, (100, 10, 3)),
    ({}, 'prepare/text.py', 5, (60, 6, 3)),
    ({}, 'prepare/text.py', 900, (800, 200, 0)),
    ({}, None, 100, (800, 200, 0)),
    ({'max_iters': 'command line'}, 'prepare/text.py', 100, (800, 200, 0)),
    ({'max_epochs': 'config/x.py'}, 'prepare/text.py', 100, (800, 200, 0)),
    ({'eval_interval': 'command line'}, 'prepare/text.py', 100, (100, 200, 3)),
    ({'patience': 'command line'}, 'prepare/text.py', 100, (100, 10, 0)),
])
def test_a_small_text_of_ones_own_is_not_memorized_by_default(explicit, prepared_by, steps, expected):
    class Data:
        def steps_for(self, epochs, micro_batches):
            return steps * epochs // training.EPOCHS_OF_OWN_TEXT

    config = {'max_iters': 800, 'eval_interval': 200, 'patience': 0,
              'gradient_accumulation_steps': 1, 'max_epochs': None}
    meta = {} if prepared_by is None else {'prepared_by': prepared_by}
    config = training.settle_length(config, explicit, meta, Data(), is_new=True)
    assert (config['max_iters'], config['eval_interval'], config['patience']) == expected


def test_advice_if_the_model_memorizes():
    def advise(*losses, dropout=0.0):
        return training.advise_on_memorizing(losses, {'dropout': dropout, 'patience': 0})

    memorizes = [(3.0, 3.0), (2.0, 2.5), (1.0, 2.6)]
    assert '--patience=2' in advise(*memorizes)
    assert '--dropout=0.2 ' in advise(*memorizes)
    assert '--dropout=0.4 ' in advise(*memorizes, dropout=0.3)
    assert advise((3.0, 3.0)) is None
    assert advise((3.0, 3.0), (2.0, 2.5)) is None
    assert advise(*memorizes, (0.5, 2.9)) is None  # it has been said
    assert advise((3.0, 3.0), (2.0, 2.5), (2.1, 2.6)) is None  # train has not fallen either
    assert advise((3.0, 2.0), (2.5, 2.1)) is None  # train is still above val


def test_advice_if_there_is_too_little_text():
    config = {'max_minutes': None, 'dropout': 0.0, 'patience': 0}
    assert 'each token will be seen 30 times' in training.advise_before(30, config)
    assert training.advise_before(20, config) is None
    assert training.advise_before(30, {**config, 'max_minutes': 5}) is None
    assert training.advise_before(30, {**config, 'dropout': 0.1}) is None


# --------------------------------------------------------------------------------------------------
# Machine


def test_nothing_is_compiled_on_a_cpu(project):
    out, _ = project.run(fail_to_compile(project), *TINY, '--compile', '--max_iters=1')
    assert 'mode: eager' in out


def test_a_c_compiler_is_recommended_where_there_is_none(project):
    out, _ = project.train('--max_iters=1', fresh=True, env={'CC': 'none'})
    assert 'eager (a C compiler with OpenMP, such as gcc, would make it faster)' in out


@pytest.fixture
def model():
    """A tiny module with a gradient, as an attempt to compile would leave it."""
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


def take_step(model):
    model(torch.ones(1, 2)).sum().backward()


class FailsWhenCalled(torch.nn.Module):
    """What torch.compile returns where there is no compiler."""

    def forward(self, x):
        raise RuntimeError('no compiler\nand a long explanation')


def test_compile_off(model, monkeypatch):
    monkeypatch.setattr(torch, 'compile', None)
    assert training.compile_or_stay_eager(model, False, CUDA, take_step) == (model, 'eager')


def test_compile_auto_falls_back_to_eager(model, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: FailsWhenCalled())
    fallback, how = training.compile_or_stay_eager(model, 'auto', CUDA, take_step)
    assert fallback is model
    assert how == 'eager (compiling failed: RuntimeError)'
    assert model.weight.grad is None


def test_compile_auto_is_for_cuda(model, monkeypatch):
    monkeypatch.setattr(torch, 'compile', None)
    mps = torch.device('mps')
    for device in (CPU, mps):
        result = training.compile_or_stay_eager(model, 'auto', device, take_step)
        assert result[0] is model and result[1].startswith('eager')


def test_compile_true_does_not_fall_back(model, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: FailsWhenCalled())
    with pytest.raises(UserError, match=r'does not work here \(RuntimeError: no compiler\)'):
        training.compile_or_stay_eager(model, True, CUDA, take_step)


@pytest.mark.parametrize('mode', [True, 'auto'])
def test_compile_that_works_is_used(model, monkeypatch, mode):
    compiled = torch.nn.Sequential(model)
    monkeypatch.setattr(torch, 'compile', lambda model: compiled)
    result = training.compile_or_stay_eager(model, mode, CUDA, take_step)
    assert result == (compiled, 'compiled')
    assert model.weight.grad is None


@pytest.mark.parametrize('supported, expected', [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_on_a_cpu(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported, raising=False)
    dtype, reason = pick_dtype(CPU, 'auto')
    assert dtype == expected
    assert 'processor' in reason
    assert pick_dtype(CPU, 'float32') == (torch.float32, 'as asked')


@pytest.mark.parametrize('capability, expected', [
    ((7, 5), torch.float16),
    ((9, 0), torch.bfloat16),
])
def test_precision_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert pick_dtype(CUDA, 'auto')[0] == expected


def test_precision_on_mps():
    assert pick_dtype(torch.device('mps'), 'auto')[0] == torch.float32
