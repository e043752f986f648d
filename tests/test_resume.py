"""
train.py --resume: a run that was stopped, by whatever, continues exactly, bit for bit.

    pytest -n 0 tests/test_resume.py                 half a minute
    pytest -n 0 -m slow tests/test_resume.py         with a real terminal

Kills at random moments are in test_fault_injection.py, several processes in test_distributed.py.
"""
import copy
import os
import pathlib
import signal
import sys

import pytest
import torch
from conftest import CHECKOUT, TINY, assert_same_run, read_log, same, same_run
from wrapped import stop_in_evaluation, stop_in_step

from model import GPT, GPTConfig
from pocket import checkpoint, training
from pocket.checkpoint import TrainState
from pocket.configurator import read_options
from pocket.data import load_meta
from pocket.errors import OutputError, UserError
from pocket.optim import make_optimizers, split_parameters
from pocket.tokenizer import tokenizer_from_dict

POSIX_ONLY = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
ENDLESS = ['--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1']


def wait_for_line(process, beginning):
    """Read what a process prints up to a line that begins so."""
    assert any(line.startswith(beginning) for line in iter(process.stdout.readline, ''))


# --------------------------------------------------------------------------------------------------
# Resuming is exact

ANOTHER_RECIPE = [
    '--optimizer=adamw', '--schedule=cosine', '--attn_dropout=0.1', '--label_smoothing=0.1',
    '--gradient_checkpointing',
]


def check_resume_is_exact(project, whole, stop_after, recipe):
    """Stop a run after so many steps, resume it, and compare it with the folder of a whole run."""
    script = stop_in_step(project, stop_after)
    out, _ = project.run(script, *TINY, *recipe, '--out_dir=parts', status=130)
    assert f'stopped by SIGINT at step {stop_after}; resume with: python train.py' in out
    assert '--out_dir=parts --resume' in out
    path = project.root / 'parts' / 'last.pt'
    assert torch.load(path, weights_only=True)['step'] == stop_after

    project.run('train.py', '--resume', '--out_dir=parts')
    same_run(whole, project.root / 'parts')
    assert len(read_log(project.root / 'parts')) == 2


@POSIX_ONLY
@pytest.mark.parametrize('stop_after', [3, 4, 8])
def test_resume_is_exact(project, trained, stop_after):
    """Stopped between evaluations, just before one, and at the end: weights, optimizers, scores
    and log are those of a run that was never stopped.
    """
    check_resume_is_exact(project, trained.root / 'out' / 'toy', stop_after, recipe=[])


@POSIX_ONLY
def test_resume_is_exact_with_another_recipe(project):
    project.train(*ANOTHER_RECIPE, '--out_dir=whole')
    check_resume_is_exact(project, project.root / 'whole', 3, ANOTHER_RECIPE)


@pytest.mark.slow
def test_run_older_than_an_option_continues_without_it(project):
    """Its checkpoint does not know token_shift, which was not there, so it was off."""
    project.train('--token_shift=False', '--out_dir=whole')
    project.train('--token_shift=False', '--out_dir=parts', '--max_iters=4')
    path = project.root / 'parts' / 'last.pt'
    state = torch.load(path, weights_only=True)
    del state['config']['token_shift']
    del state['model_args']['token_shift']
    torch.save(state, path)

    project.run('train.py', '--resume', '--out_dir=parts', '--max_iters=8')
    whole = torch.load(project.root / 'whole' / 'last.pt', weights_only=True)
    parts = torch.load(path, weights_only=True)
    assert_same_run(whole, parts)


# --------------------------------------------------------------------------------------------------
# Signals


@POSIX_ONLY
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_signal_saves_first(project, name):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip(f'{name} is ignored here, as under nohup')
    process = project.start('train.py', *TINY, *ENDLESS)
    wait_for_line(process, 'step 5:')
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert 'Traceback' not in err
    assert f'stopped by {name}' in out
    assert '--resume' in out
    assert project.checkpoint('toy')['step'] >= 5


@POSIX_ONLY
def test_interrupted_run_can_get_another_length(project):
    project.run(stop_in_step(project, 5), *TINY, *ENDLESS, status=130)
    out, _ = project.run('train.py', '--resume', '--dataset=toy', '--max_iters=7')
    assert 'step 5 of 7' in out
    assert 'changed since' in out
    assert 'max_iters 1000000 -> 7' in out
    assert project.checkpoint('toy')['step'] == 7


@POSIX_ONLY
def test_signal_stops_an_evaluation(project, trained):
    """Nobody waits for its end: the run stops, and the evaluation is made when it is resumed."""
    out, _ = project.run(stop_in_evaluation(project), *TINY, '--out_dir=parts', status=143)
    assert 'stopped by SIGTERM at step 4' in out
    assert ', val ' not in out
    project.run('train.py', '--resume', '--out_dir=parts')
    same_run(trained.root / 'out' / 'toy', project.root / 'parts')


@pytest.mark.slow  # a new interpreter
@POSIX_ONLY
def test_lost_terminal_saves_first(project):
    """There is nobody left to read what a step prints: no reason to lose the step."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.root)
        os.execv(sys.executable, [sys.executable, 'train.py', *TINY, *ENDLESS])
    printed = ''
    while 'step 5:' not in printed:
        printed += os.read(terminal, 1000).decode()
    os.close(terminal)
    os.waitpid(pid, 0)
    assert project.checkpoint('toy')['step'] >= 5


@pytest.fixture
def clock(monkeypatch):
    """The clock of StopSignals: a list with the time, which tests set."""
    now = [100.0]
    monkeypatch.setattr(training.time, 'monotonic', lambda: now[0])
    return now


def test_second_signal_within_a_second_is_ignored(clock):
    """torchrun passes on what the terminal has sent to us as well."""
    signals = training.StopSignals()
    signals.handle(signal.SIGINT, None)
    clock[0] += 0.9
    signals.handle(signal.SIGTERM, None)
    assert signals.received == 'SIGINT'


def test_second_signal_after_a_second_stops_at_once(clock):
    signals = training.StopSignals()
    signals.handle(signal.SIGINT, None)
    clock[0] += 1.1
    with pytest.raises(KeyboardInterrupt):
        signals.handle(signal.SIGINT, None)


@pytest.mark.parametrize('lose', [
    lambda signals: signals.handle_lost_output(OutputError(OSError('full'))),
    lambda signals: signals.handle_lost_data(UserError('changed')),
    lambda signals: signals.handle_damaged_data(UserError('damaged')),
])
def test_ctrl_c_can_force_an_end_after_something_else_asked_for_a_stop(clock, lose):
    signals = training.StopSignals()
    lose(signals)
    reason = signals.received
    assert reason in (training.LOST_OUTPUT, training.LOST_DATA)
    signals.handle(signal.SIGINT, None)
    assert signals.received == reason
    clock[0] += 1.1
    with pytest.raises(KeyboardInterrupt):
        signals.handle(signal.SIGINT, None)


def test_signal_counts_once_all_processes_know_of_it():
    signals = training.StopSignals()
    assert training.synchronize(signals, 5.0, loss=2.0) == (2.0, 5.0)
    assert signals.agreed is None

    signals.handle(signal.SIGTERM, None)
    assert signals.agreed is None
    training.synchronize(signals, 6.0)
    assert signals.agreed == 'SIGTERM'
    assert signals.exit_status() == 143


@POSIX_ONLY
def test_hangup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert training.StopSignals().names == ['SIGINT', 'SIGTERM']
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert training.StopSignals().names == ['SIGINT', 'SIGTERM', 'SIGHUP']
    finally:
        signal.signal(signal.SIGHUP, before)


# --------------------------------------------------------------------------------------------------
# Options of a run that is resumed

MINE = '''
dataset = "toy"
block_size = 16
n_embd = 16
n_layer = 1
batch_size = 4
max_iters = 3
'''


def test_resumed_run_keeps_its_options(project):
    """Also if a config file says otherwise. What is typed counts, and is reported."""
    (project.root / 'config' / 'mine.py').write_text(MINE, encoding='utf-8')
    project.run('train.py', 'config/mine.py', '--max_iters=2', '--n_layer=2', '--device=cpu')

    out, _ = project.run('train.py', 'config/mine.py', '--resume')
    assert ('config/mine.py says max_iters=3, but the run was started with 2, which is kept; '
            '--max_iters=3 changes it') in out
    assert 'step 2 of 2' in out

    out, _ = project.run(
        'train.py', 'config/mine.py', '--resume', '--max_iters=4', '--gradient_checkpointing',
        f'--data_dir={project.root / "data"}',
    )
    assert 'max_iters 2 -> 4' in out
    assert 'gradient_checkpointing False -> True' in out
    assert 'data_dir' not in out
    assert 'step 2 of 4' in out
    state = project.checkpoint('mine')
    assert state['step'] == 4
    assert state['model_args']['n_layer'] == 2


def test_another_model_or_dataset_is_refused(project, trained):
    run = f'--out_dir={trained.root / "out" / "toy"}'
    error = project.fails('train.py', '--resume', run, '--n_layer=3', '--dataset=other')
    assert 'n_layer 2 -> 3' in error
    assert 'dataset toy -> other' in error
    assert 'start a new run with another --out_dir' in error


@pytest.fixture
def state(trained):
    """The last checkpoint of a finished run. Tests may change it."""
    return copy.deepcopy(trained.checkpoint('toy'))


def resume_config(state, resuming=True, from_file=None, typed=None):
    """The options of a run that is resumed, if a config file and the command line say so."""
    options = read_options((CHECKOUT / 'train.py').read_text(encoding='utf-8'))
    from_file = from_file or {}
    typed = typed or {}
    config = {**state['config'], **from_file, **typed}
    explicit = dict.fromkeys(from_file, 'config/mine.py')
    explicit.update(dict.fromkeys(typed, 'command line'))
    return checkpoint.resume_config(state, 'last.pt', config, explicit, options, resuming)


def test_typed_options_win_over_those_of_the_run(state, capsys):
    config = resume_config(state, typed={'seed': 5, 'dropout': 0.5})
    assert config == {**state['config'], 'seed': 5, 'dropout': 0.5}
    out = capsys.readouterr().out
    assert 'changed since last.pt was written: dropout 0.2 -> 0.5, seed 1337 -> 5' in out


def test_a_run_that_is_only_evaluated_does_not_differ_from_anything(state, capsys):
    resume_config(state, typed={'seed': 5}, resuming=False)
    assert capsys.readouterr().out == 'changed since last.pt was written: seed 1337 -> 5\n'


def test_a_run_keeps_how_its_checkpoints_were_compared(state):
    """By BLEU of replies that a beam search found, for example; --eval_only starts from defaults."""
    state['config'] |= {'num_beams': 5, 'bleu_tokenize': 'none'}
    defaults = {'num_beams': 1, 'bleu_tokenize': 'auto'}
    config = resume_config(state, from_file=defaults)
    assert (config['num_beams'], config['bleu_tokenize']) == (5, 'none')
    config = resume_config(state, resuming=False, from_file=defaults)
    assert (config['num_beams'], config['bleu_tokenize']) == (1, 'auto')


def test_options_of_the_run_win_over_config_files(state, capsys):
    assert resume_config(state, from_file={'seed': 5}) == state['config']
    out = capsys.readouterr().out
    assert 'config/mine.py says seed=5, but the run was started with 1337, which is kept' in out

    # An evaluation does not train, so nobody has to know
    assert resume_config(state, resuming=False, from_file={'seed': 5}) == state['config']
    assert capsys.readouterr().out == ''


def test_options_of_this_command_are_not_those_of_the_run(state):
    typed = {'out_dir': 'elsewhere', 'eval_replies': 4, 'eval_split': 'test'}
    assert resume_config(state, typed=typed) == {**state['config'], **typed}
    assert resume_config(state, from_file=typed) == {**state['config'], **typed}


def test_what_would_be_another_run_is_refused(state):
    typed = {'n_embd': 32, 'optimizer': 'adamw', 'seed': 5}
    with pytest.raises(UserError, match='another n_embd 16 -> 32, optimizer muon -> adamw: omit'):
        resume_config(state, typed=typed)


def test_option_of_another_type_in_a_checkpoint_is_refused(state):
    state['config']['batch_size'] = 'x'
    with pytest.raises(UserError, match='last.pt is damaged: its batch_size should be a whole num'):
        resume_config(state)


def test_exported_checkpoint_can_be_evaluated_but_not_resumed(state):
    del state['optimizers']
    with pytest.raises(UserError, match='without the optimizer.*evaluate it with --eval_only'):
        resume_config(state)
    assert resume_config(state, resuming=False) == state['config']


def test_resume_and_eval_only_together_evaluate_an_exported_file(project, trained):
    state = trained.checkpoint('toy', 'best.pt')
    del state['optimizers']
    run = project.root / 'out' / 'exported'
    run.mkdir(parents=True)
    torch.save(state, run / 'best.pt')
    for option in ('--resume', '--init_from=resume'):
        out, _ = project.run('train.py', option, '--eval_only', '--out_dir=out/exported')
        assert 'best.pt (step ' in out


def test_end_by_patience_is_announced_and_explained_when_resumed(project):
    worse = ['--patience=1', '--max_iters=400', '--eval_interval=20', '--learning_rate=3.0',
             '--muon_lr=1', '--batch_size=1', '--gradient_accumulation_steps=1', '--warmup_iters=0']
    out, _ = project.train(*worse, '--out_dir=out/toy')
    reason = ('val has not improved for 1 evaluations, so --patience ends the run; '
              '--resume --patience=2 would continue it')
    assert reason in out
    out, _ = project.run('train.py', '--resume', '--out_dir=out/toy')
    assert f'checkpoints go to out/toy; {reason}' in out.replace(os.sep, '/')


def check_tokenizer(trained, **change):
    """Does the checkpoint of the finished run still fit, if so much changes in meta.json?"""
    state = trained.checkpoint('toy')
    folder = trained.root / 'data' / 'toy'
    meta = load_meta(folder)
    meta['tokenizer'].update(change)
    tok = tokenizer_from_dict(meta['tokenizer'])
    training.check_dataset_fits(meta, tok, folder, state['config'], {}, state)


def test_dataset_with_another_tokenizer_is_refused(trained):
    with pytest.raises(UserError, match='the tokenizer of this run is not that of .*data.toy'):
        check_tokenizer(trained, chars='abc')


def test_same_tokenizer_in_other_words_is_accepted(trained):
    """Earlier versions wrote more into meta.json, or less."""
    check_tokenizer(trained, specials=[])


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints


def test_resume_without_a_run_is_refused(project):
    error = project.fails('train.py', '--resume', '--out_dir=nowhere', '--dataset=toy')
    assert 'there is no checkpoint in nowhere to resume from' in error
    assert not (project.root / 'out').exists()


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', 'half'])
def test_resume_from_a_truncated_checkpoint_is_refused(project, trained, content):
    if content == 'half':
        good = (trained.root / 'out' / 'toy' / 'last.pt').read_bytes()
        content = good[:len(good) // 2]
    (project.root / 'out' / 'toy').mkdir(parents=True)
    (project.root / 'out' / 'toy' / 'last.pt').write_bytes(content)
    error = project.fails('train.py', '--resume', '--dataset=toy')
    assert 'is not a checkpoint of pocketGPT: it is truncated or something else' in error


def test_resume_from_a_checkpoint_with_code_is_refused(project):
    """Any class but tensors and plain types will do: loading its pickle would run code."""
    (project.root / 'out' / 'toy').mkdir(parents=True)
    state = {'model': pathlib.PurePosixPath('/tmp')}
    torch.save(state, project.root / 'out' / 'toy' / 'last.pt')
    error = project.fails('train.py', '--resume', '--dataset=toy')
    assert 'it contains code, which is never loaded' in error


def restore(state, n_embd=16, beta2=0.5):
    """What restore() makes of a checkpoint: (TrainState, model, optimizers).

    Model and optimizers are those of the run, but with other values for options.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**state['model_args'], 'n_embd': n_embd}))
    matrices, others = split_parameters(model, 'muon')
    optimizers = make_optimizers(
        matrices, others, learning_rate=0.5, betas=(0.9, beta2), muon_lr=0.5, muon_momentum=0.5,
        weight_decay=0.5, muon_dtype=torch.float32)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    train_state = checkpoint.restore(state, 'last.pt', model, optimizers, scaler)
    return train_state, model, optimizers


def test_restore_brings_back_weights_numbers_and_moments(state):
    train_state, model, optimizers = restore(state)
    for name, number in vars(train_state).items():
        assert number == state[name], name
    assert same(dict(model.state_dict()), dict(state['model']))
    for optimizer, saved in zip(optimizers, state['optimizers']):
        assert same(optimizer.state_dict()['state'], saved['state'])


def test_restore_keeps_the_settings_of_today(state):
    """The momentum is the checkpoint's, the options for it are those of the command line."""
    _, _, (adamw, muon) = restore(state, beta2=0.5)
    assert adamw.param_groups[0]['betas'] == (0.9, 0.5)
    assert adamw.param_groups[0]['weight_decay'] == 0.5
    assert muon.param_groups[0]['momentum'] == 0.5


def test_restore_of_an_old_checkpoint_without_token_count(state):
    del state['tokens']
    train_state, _, _ = restore(state)
    assert train_state.tokens == 0
    assert train_state.step == 8


def drop_step(state):
    del state['step']


def drop_optimizer(state):
    del state['optimizers'][1]


def damage_moment(state):
    state['optimizers'][0]['state'][1]['exp_avg'] = torch.ones(3)


def drop_momentum(state):
    del state['optimizers'][1]['state'][0]['momentum']


@pytest.mark.parametrize('damage, message', [
    (drop_step, "'step'"),
    (drop_optimizer, '1 optimizers instead of 2'),
    (damage_moment, "the optimizer's state is damaged"),
    (drop_momentum, "the optimizer's state is damaged"),
])
def test_restore_refuses_what_does_not_fit(state, damage, message):
    damage(state)
    with pytest.raises(UserError, match=f'last.pt does not fit this model and optim.*: {message}'):
        restore(state)


def test_restore_refuses_another_model(state):
    with pytest.raises(UserError, match='last.pt does not fit this model and optimizer: size mis'):
        restore(state, n_embd=32)


# --------------------------------------------------------------------------------------------------
# log.csv of a run that is resumed


@pytest.fixture
def log(tmp_path):
    """A RunLog with evaluations at steps 4, 8 and 12, written to tmp_path."""
    log = training.RunLog(tmp_path, last_step=0)
    for step in (4, 8, 12):
        state = TrainState(step=step, tokens=100 * step, val_loss=1 / step, grad_norm=0.5)
        log.add(state, seconds=step, train_loss=2.0, lr=0.01, tokens_per_second=99.6)
    log.write()
    return log


def test_log_is_csv(log, tmp_path):
    lines = (tmp_path / 'log.csv').read_text(encoding='utf-8').splitlines()
    assert lines[0] == 'step,tokens,seconds,train_loss,val_loss,lr,grad_norm,tokens_per_s'
    assert lines[1] == '4,400,4.00,2.00000,0.25000,1.000e-02,0.5000,100'
    assert len(lines) == 4


@pytest.mark.parametrize('last_step, kept', [(0, []), (8, ['4', '8']), (99, ['4', '8', '12'])])
def test_log_is_cut_back_to_the_checkpoint(log, tmp_path, last_step, kept):
    """Rows after it are written again."""
    rows = training.RunLog(tmp_path, last_step).rows
    assert [row[0] for row in rows] == kept


def test_log_is_kept_up_to_its_damage(log, tmp_path):
    path = tmp_path / 'log.csv'
    path.write_text(path.read_text(encoding='utf-8').replace('\n8,', '\nx,'), encoding='utf-8')
    assert [row[0] for row in training.RunLog(tmp_path, 99).rows] == ['4']


def test_curve_that_cannot_be_drawn_is_reported(log, tmp_path, capsys):
    (tmp_path / 'loss.png').mkdir()
    log.draw()
    assert 'no loss.png: ' in capsys.readouterr().out


def test_single_evaluation_is_no_curve(log, tmp_path):
    del log.rows[1:]
    log.draw()
    assert not (tmp_path / 'loss.png').exists()
