"""
train.py: every mistake in options and data has an answer, one sentence on stderr and status 2.

    pytest -n 0 tests/test_train_options.py          a quarter of a minute

How options are read is in test_configurator.py; what files from strangers can do wrong is in
test_untrusted_files.py.
"""
import re
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, make_pairs, make_toy

from pocket import training
from pocket.configurator import read_options
from pocket.data import load_meta
from pocket.errors import UserError
from pocket.tokenizer import tokenizer_from_dict

OPTIONS = read_options((CHECKOUT / 'train.py').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def defaults(trained):
    """All options of train.py, with values that fit each other."""
    return trained.checkpoint('toy')['config']


# --------------------------------------------------------------------------------------------------
# Options


@pytest.fixture
def check(defaults):
    """A function: what check_options() makes of typed options and of those of a config file."""

    def check(typed, from_file):
        explicit = dict.fromkeys(from_file, 'config/mine.py')
        explicit.update(dict.fromkeys(typed, 'command line'))
        return training.check_options({**defaults, **from_file, **typed}, explicit, OPTIONS)

    return check


def test_options_out_of_range_are_reported_together(project):
    error = project.fails(
        'train.py', '--batch_size=0', '--learning_rate=-1', '--dropout=2', '--beta2=1')
    for part in [
        'batch_size must be in [1, inf), got 0', 'learning_rate must be in [0, inf), got -1',
        'dropout must be in [0, 1), got 2', 'beta2 must be in [0, 1), got 1',
    ]:
        assert part in error


def test_no_heads_are_a_sentence(check):
    with pytest.raises(UserError, match='n_head must be from 1 to 16,777,216, got 0'):
        check({}, {'n_head': 0})


def test_contradictions_are_reported_together(check):
    with pytest.raises(UserError) as caught:
        check({
            'n_embd': 384, 'n_head': 5, 'cutoffs': (10,), 'label_smoothing': 0.1,
            'tie_weights': True, 'max_minutes': 1.0, 'max_iters': 5,
        }, from_file={'batch_size': 0})
    for part in [
        'batch_size must be in [1, inf), got 0',
        'n_embd must be divisible by n_head, got 384 and 5',
        'adaptive softmax (cutoffs) can\'t do label_smoothing',
        'cutoffs (adaptive softmax) do not work with tie_weights',
        'max_iters and max_minutes each set the length of the run: give one of them',
    ]:
        assert part in str(caught.value)


def test_contradictions_end_train(project):
    error = project.fails('train.py', '--n_embd=384', '--n_head=5')
    assert 'n_embd must be divisible by n_head, got 384 and 5' in error
    error = project.fails('train.py', '--max_minutes=1', '--max_iters=5')
    assert 'max_iters and max_minutes each set the length of the run' in error


def test_typed_length_wins_over_a_config_file(check):
    config = check({'max_minutes': 3.0}, from_file={'max_epochs': 2.0})
    assert config['max_minutes'] == 3.0
    assert config['max_epochs'] is None

    config = check({'max_iters': 7}, from_file={'max_minutes': 2.0})
    assert config['max_iters'] == 7
    assert config['max_minutes'] is None

    config = check({}, from_file={'max_epochs': 2.0})
    assert config['max_epochs'] == 2.0


def test_options_without_problems_stay_as_they_are(check, defaults):
    assert check({}, from_file={}) == defaults


# --------------------------------------------------------------------------------------------------
# Data and machine


def truncate_train(folder):
    path = folder / 'train.bin'
    path.write_bytes(path.read_bytes()[:-7])


def write_impossible_id(folder):
    ids = bytearray((folder / 'train.bin').read_bytes())
    ids[100:102] = b'\xff\xff'
    (folder / 'train.bin').write_bytes(ids)


def damage_meta(folder):
    (folder / 'meta.json').write_text('{"kind": 5', encoding='utf-8')


def name_unknown_tokenizer(folder):
    make_toy(folder.parent.parent, tokenizer={'kind': 'word'})


def lie_about_vocab_size(folder):
    make_toy(folder.parent.parent, vocab_size=5)


def assert_refused(project, message, *args):
    """train.py with args ends with a message, before it makes the folder of a run."""
    options = ['--dataset=toy', '--device=cpu', '--block_size=16', *args]
    assert message in project.fails('train.py', *options)
    assert not (project.root / 'out').exists()


@pytest.mark.parametrize('damage, message', [
    (truncate_train, 'train.bin has 9,993 bytes'),
    (write_impossible_id, 'train.bin has id 65535'),
    (damage_meta, 'meta.json is not'),
    (name_unknown_tokenizer, "unknown kind of tokenizer 'word'"),
    (lie_about_vocab_size, 'vocab_size is 5, but the tokenizer has'),
])
def test_damaged_dataset_is_refused(project, damage, message):
    damage(project.root / 'data' / 'toy')
    assert_refused(project, message)


@pytest.mark.parametrize('option, message', [
    ('--dataset=nope', "no dataset 'nope'"),
    ('--block_size=5000', 'only 5,000 ids'),
    ('--device=tpu', "got 'tpu'"),
    ('--dtype=float16', 'needs a GPU'),
])
def test_impossible_option_is_refused(project, option, message):
    assert_refused(project, message, option)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason='has MPS')
def test_missing_mps_is_refused(project):
    assert_refused(project, 'this machine has: cpu', '--device=mps')


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason='has as many GPUs')
def test_missing_gpu_is_refused(project):
    assert_refused(project, '--device=cuda:7 is not available here', '--device=cuda:7')


def test_out_dir_that_cannot_be_written_is_refused(project):
    (project.root / 'file').write_text('', encoding='utf-8')
    options = ['--dataset=toy', '--block_size=16', '--out_dir=file/run']
    assert 'cannot write to' in project.fails('train.py', *options)


def test_out_of_memory_says_what_to_lower(project):
    huge = ['--n_embd=4000000', '--n_head=1', '--n_layer=1']
    error = project.fails('train.py', '--dataset=toy', '--device=cpu', '--block_size=16', *huge)
    assert 'out of memory: lower --batch_size' in error


# --------------------------------------------------------------------------------------------------
# Does the dataset fit the options?


@pytest.fixture
def check_fits(defaults):
    """A function: raises UserError if a dataset does not fit options. explicit: as in train.py."""

    def check_fits(folder, explicit, **options):
        meta = load_meta(folder)
        tok = tokenizer_from_dict(meta['tokenizer'])
        config = {**defaults, **options}
        training.check_dataset_fits(meta, tok, folder, config, explicit, state=None)

    return check_fits


def test_datasets_that_fit(tmp_path, check_fits):
    check_fits(make_toy(tmp_path), {'batch_size': 'command line'})
    talk = make_pairs(tmp_path)
    check_fits(talk, {'batch_tokens': 'command line'})
    check_fits(talk, {}, arch='seq2seq')


def test_encoder_decoder_needs_pairs(tmp_path, check_fits):
    with pytest.raises(UserError, match='an encoder-decoder learns from pairs: train a GPT on it'):
        check_fits(make_toy(tmp_path), {}, arch='seq2seq')


def test_batch_tokens_are_for_pairs(tmp_path, check_fits):
    message = r'batch_tokens \(config/x.py\) has no effect .* a stream: set --batch_size instead'
    with pytest.raises(UserError, match=message):
        check_fits(make_toy(tmp_path), {'batch_tokens': 'config/x.py'})


def test_batch_size_is_for_streams(tmp_path, check_fits):
    message = r'batch_size \(command line\) has no effect .* pairs: set --batch_tokens instead'
    with pytest.raises(UserError, match=message):
        check_fits(make_pairs(tmp_path), {'batch_size': 'command line'})


def test_missing_split_is_refused(tmp_path, check_fits):
    with pytest.raises(UserError, match='has no test split: it has train, val'):
        check_fits(make_toy(tmp_path), {}, eval_split='test')


def test_run_folder_is_named_after_the_last_config_file():
    out = training.ROOT / 'out'
    arguments = ['config/a.py', '--seed=1', 'config/b.py']
    assert training.run_folder(None, 'toy', arguments, False) == training.short_path(out / 'b')
    assert training.run_folder(None, 'toy', ['--seed=1'], False) == training.short_path(out / 'toy')
    assert training.run_folder('mine', 'toy', arguments, False) == Path('mine')


@pytest.mark.parametrize('changes, typed, message', [
    ({'min_lr': 0.1}, {}, 'min_lr .0.1. is above the peak'),
    ({'warmup_iters': 900}, {'warmup_iters'}, 'warmup_iters .900. is beyond the end of the run'),
    ({'warmup_iters': 900}, {}, None),  # the default, in a short trial
    ({'warmup_iters': 900, 'max_minutes': 5.0}, {'warmup_iters'}, None),
    ({'min_lr': 0.1, 'schedule': 'constant'}, {}, None),
])
def test_learning_rates_that_contradict_themselves(defaults, changes, typed, message):
    config = {**defaults, 'max_iters': 800, **changes}
    problems = training.check_schedule(config, dict.fromkeys(typed, 'command line'))
    if message is None:
        assert problems == []
    else:
        [problem] = problems
        assert re.match(message, problem)


@pytest.mark.parametrize('option', [
    '--sample_tokens=-1', '--lr_decay_iters=-5', '--div_value=nan', '--learning_rate=inf',
    '--gradient_accumulation_steps=1e12', '--max_iters=1e30', '--batch_size=1e308',
    '--max_epochs=1e300', '--sample_tokens=1e18', '--final_sample_tokens=1e9', '--num_beams=1e9',
])
def test_option_out_of_range_is_refused_before_anything_else(project, option):
    name = option[2:].split('=')[0]
    assert f'{name} must be ' in project.fails('train.py', option)


def test_environment_that_is_no_number_is_a_sentence(project):
    error = project.fails('train.py', fresh=True, env={'WORLD_SIZE': 'abc'})
    assert "WORLD_SIZE must be a whole number, got 'abc'" in error


@pytest.mark.parametrize('error', [UserError('of the data'), RuntimeError('CUDA out of memory')])
@pytest.mark.parametrize('mode', [True, 'auto'])
def test_errors_that_are_not_of_the_compiler_are_not_blamed_on_it(monkeypatch, mode, error):
    monkeypatch.setattr(torch, 'compile', lambda model: model)

    def fail(model):
        raise error

    with pytest.raises(type(error), match=str(error)):
        training.compile_or_stay_eager(torch.nn.Linear(1, 1), mode, torch.device('cuda'), fail)
