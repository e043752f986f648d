"""
Nothing is lost or mixed up: trials of fault_injection.py at fixed seeds, and what its experiments
have brought to light.

    pytest -n 0 tests/test_fault_injection.py               under a minute
    pytest -n 0 -m slow tests/test_fault_injection.py       all, many trials: a quarter of an hour
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

if sys.platform != 'linux':
    pytest.skip('needs SIGKILL, /proc and limits on files', allow_module_level=True)

import fault_injection
from conftest import TINY, make_toy, read_log, same, same_run
from fault_helpers import Lab, SlowServer, server

from pocket import data, datasets, files, plot, training
from pocket.errors import Output, OutputError, UserError
from pocket.tokenizer import ByteTokenizer


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp('lab'))


# --------------------------------------------------------------------------------------------------
# Trials

A_FEW = {  # {name: number of trials}
    'kill_train': 1, 'kill_download': 1, 'kill_export': 1, 'disk': 1, 'resume': 1, 'two_runs': 1,
    'two_downloads': 1, 'flip_bits': 1, 'lost_output': 1, 'prepared_anew': 1,
}


@pytest.mark.parametrize('name', A_FEW)
def test_experiment(lab, name):
    for number in range(A_FEW[name]):
        fault_injection.EXPERIMENTS[name](lab, Random(f'suite {name} {number}'))


@pytest.mark.parametrize('kind', ['shakespeare_char', 'office'])
def test_killed_preparation(lab, kind):
    fault_injection.kill_prepare(lab, Random(f'suite {kind}'), kind)


@pytest.mark.slow
@pytest.mark.parametrize('name', fault_injection.EXPERIMENTS)
def test_experiment_many_times(lab, name):
    for number in range(1 if name in fault_injection.ONCE else 10):
        fault_injection.EXPERIMENTS[name](lab, Random(f'slow {name} {number}'))


# --------------------------------------------------------------------------------------------------
# Resuming


def test_resume_from_best_checkpoint_if_there_is_no_last(project, trained):
    """A crash between the two files at the first evaluation: the run can be resumed, and a new run
    does not take its folder.
    """
    options = ['--max_iters=8', '--eval_interval=8']
    project.train(*options, '--out_dir=whole')
    project.train(*options, '--out_dir=out/toy')
    run = project.root / 'out' / 'toy'
    (run / 'last.pt').unlink()
    shutil.copytree(run, project.root / 'parts')

    project.run('train.py', '--resume', '--out_dir=parts')
    same_run(project.root / 'whole', project.root / 'parts')

    out, _ = project.train('--max_iters=1')
    assert 'held a run' in out
    assert (project.root / 'out' / 'toy.1' / 'best.pt').is_file()


@pytest.mark.parametrize('option', [
    '--dataset=other', '--block_size=8', '--n_layer=1', '--optimizer=adamw', '--arch=seq2seq',
])
def test_resume_refuses_another_model_or_dataset(project, trained, option):
    shutil.copytree(trained.root / 'out', project.root / 'out')
    before = project.checkpoint('toy')['step']
    name = option[2:].split('=')[0]
    assert f'{name} ' in project.fails('train.py', '--resume', '--out_dir=out/toy', option)
    assert project.checkpoint('toy')['step'] == before


def test_resume_says_what_changed(project):
    project.train('--max_iters=4')
    changes = [
        '--batch_size=8', '--learning_rate=0.001', '--seed=5', '--eval_interval=3', '--max_iters=6',
    ]
    out, _ = project.run('train.py', '--resume', '--out_dir=out/toy', *changes)
    assert ('batch_size 4 -> 8, eval_interval 4 -> 3, learning_rate 0.01 -> 0.001, '
            'max_iters 4 -> 6, seed 1337 -> 5') in out
    steps_and_tokens = [row[:2] for row in read_log(project.root / 'out' / 'toy')]
    assert steps_and_tokens == [['4', '512'], ['6', '1024']]


def test_stopped_run_saves_before_it_draws(project):
    """If loss.png can't be written, the weights are safe all the same."""
    project.train('--max_iters=4', '--eval_interval=2', '--out_dir=out/toy')
    endless = ['--max_iters=100000', '--eval_interval=100000', '--log_interval=1']
    process = project.start('train.py', '--resume', '--out_dir=out/toy', *endless)
    assert any(line.startswith('step 6:') for line in iter(process.stdout.readline, ''))

    picture = project.root / 'out' / 'toy' / 'loss.png'
    picture.unlink()
    picture.mkdir()
    process.send_signal(15)
    out, err = process.communicate(timeout=60)
    assert 'no loss.png: cannot write' in out
    assert err == '' and process.returncode == 143
    assert project.checkpoint('toy')['step'] >= 6


# --------------------------------------------------------------------------------------------------
# Locks and atomic writes


def test_lock_is_refused_while_another_holds_it(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    with files.lock(folder):
        for take in (files.lock, files.back_up, datasets.lock_dataset):
            with pytest.raises(UserError, match=f'another .* {folder}: wait for it'):
                take(folder)


def test_lock_is_refused_if_the_folder_was_just_moved(tmp_path, monkeypatch):
    """… by a process that held the lock a moment ago."""
    folder = tmp_path / 'run'
    folder.mkdir()
    real_flock = __import__('fcntl').flock

    def move_and_flock(*args):
        folder.rename(tmp_path / 'aside')
        real_flock(*args)

    monkeypatch.setattr('fcntl.flock', move_and_flock)
    with pytest.raises(UserError, match='another run is writing'):
        files.lock(folder)
    monkeypatch.undo()
    assert files.back_up(tmp_path / 'aside') == tmp_path / 'aside.1'


def test_dataset_is_written_by_one_process(tmp_path):
    folder = tmp_path / 'x'
    with datasets.lock_dataset(folder):
        with pytest.raises(UserError, match='another process is preparing'):
            datasets.write_stream(folder, ByteTokenizer(), [1], [2], {}, 'none')
    datasets.write_stream(folder, ByteTokenizer(), [1], [2], {}, 'none')


def test_atomic_write_of_a_file_that_is_being_read_on_windows(tmp_path, monkeypatch):
    """os.replace() fails there for as long as somebody has the old file open."""
    real_replace = os.replace
    calls = []

    def busy_twice(source, target):
        calls.append(source)
        if len(calls) < 3:
            raise PermissionError(13, 'Permission denied')
        real_replace(source, target)

    def always_busy(source, target):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(os, 'replace', busy_twice)
    files.atomic_write(tmp_path / 'a', lambda f: f.write(b'new'))
    assert (tmp_path / 'a').read_bytes() == b'new' and len(calls) == 3

    monkeypatch.setattr(os, 'replace', always_busy)
    with pytest.raises(UserError, match='Permission denied'):
        files.atomic_write(tmp_path / 'a', lambda f: f.write(b'newer'))
    assert os.listdir(tmp_path) == ['a']
    assert (tmp_path / 'a').read_bytes() == b'new'


def test_atomic_write_goes_through_links_and_spares_devices(tmp_path):
    (tmp_path / 'target').write_bytes(b'old')
    (tmp_path / 'link').symlink_to('target')
    (tmp_path / 'dangling').symlink_to('new')
    (tmp_path / 'circle').symlink_to('circle')
    os.mkfifo(tmp_path / 'pipe')
    for name in ('link', 'dangling'):
        files.atomic_write(tmp_path / name, lambda f: f.write(b'new'))
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes() == b'new'
    assert (tmp_path / 'target').read_bytes() == b'new'

    for path in (tmp_path / 'pipe', '/dev/null', '/', tmp_path / ('a' * 300), tmp_path / 'circle'):
        with pytest.raises(UserError, match='cannot write'):
            files.atomic_write(path, lambda f: f.write(b'new'))
    assert Path('/dev/null').is_char_device()
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('to, message', [
    ('/', 'it is not a file'),
    ('/dev/null', 'it is not a file'),
    ('a' * 300 + '.png', "can't be a path"),
    ('~nobody9/x.png', "can't be a path"),
    ('circle', "can't be a path"),
])
def test_pictures_are_written_to_files_only(trained, to, message, tmp_path):
    (tmp_path / 'circle').symlink_to('circle')
    run = f'--run={trained.root / "out" / "toy"}'
    assert message in trained.fails('-m', 'pocket.plot', run, f'--to={to}', cwd=tmp_path,
                                    env={'PYTHONPATH': str(trained.root)})
    assert Path('/dev/null').is_char_device()


def test_dollars_in_titles_are_no_formulas(trained, tmp_path):
    log = {'step': [1.0, 2.0], 'val_loss': [2.0, 1.0]}
    for runs in ([('$x', log)], [(r'$\frac{$', log), ('b$', log)]):
        plot.draw(runs, tmp_path / '$.png', title=r'$\frac{$ \x1b')
    assert (tmp_path / '$.png').is_file()


# --------------------------------------------------------------------------------------------------
# Runs in the way


def test_folder_that_holds_other_runs_is_never_moved(project):
    """nanoGPT's default, --out_dir=out, given twice."""
    other = project.root / 'out' / 'other'
    other.mkdir(parents=True)
    (other / '.lock').touch()  # a run that has no checkpoint yet
    project.train('--out_dir=out', '--max_iters=2')
    error = project.fails('train.py', *TINY, '--out_dir=out')
    assert 'holds a run, and other as well' in error and '--out_dir=out/new' in error
    assert (project.root / 'out' / 'best.pt').is_file() and other.is_dir()
    assert os.listdir(project.root).count('out.1') == 0


def test_folder_that_we_are_in_is_never_moved(project):
    shutil.rmtree(project.root / 'data')
    make_toy(project.root / 'elsewhere')
    where = ['--out_dir=.', f'--data_dir={project.root / "elsewhere" / "data"}', '--max_iters=2']
    project.train(*where)
    shutil.rmtree(project.root / 'elsewhere' / 'data')
    make_toy(project.root.parent)
    where[1] = f'--data_dir={project.root.parent / "data"}'
    (project.root / 'elsewhere').rmdir()
    assert 'the folder that we are in' in project.fails('train.py', *TINY, *where)
    assert (project.root / 'train.py').is_file()


# --------------------------------------------------------------------------------------------------
# Datasets that change


def test_damaged_token_files_are_noticed(tmp_path):
    pairs = {'train': [('ab', 'cd')] * 9, 'val': [('ab', 'cd')]}
    tok = ByteTokenizer(('bos', 'eos'))
    datasets.write_pairs(tmp_path / 'x', tok, pairs, {}, 'none')
    meta = data.load_meta(tmp_path / 'x')
    data.Pairs(tmp_path / 'x', meta, 'train', [tok.decoder_start_id], 16)
    for name in ('train.bin', 'train.idx'):
        path = tmp_path / 'x' / name
        content = bytearray(path.read_bytes())
        other = content.copy()
        other[8 if name == 'train.idx' else 0] ^= 1
        path.write_bytes(other)
        with pytest.raises(UserError, match=f'{name} is not what was prepared'):
            data.Pairs(tmp_path / 'x', meta, 'train', [tok.decoder_start_id], 16)
        path.write_bytes(content)

    del meta['files']  # prepared by an earlier version
    data.Pairs(tmp_path / 'x', meta, 'train', [tok.decoder_start_id], 16)


def test_mapped_file_that_is_replaced_or_changed(tmp_path, monkeypatch):
    """Replaced or deleted, the old one is still read; what is written into it is noticed."""
    monkeypatch.setattr(data, 'IN_MEMORY', 100)
    folder = make_toy(tmp_path)
    meta = data.load_meta(folder)
    stream = data.Stream(folder, meta, 'train', 16, 4)
    before = [batch['idx'] for batch in stream.batches(1, 3, 2)]

    other = np.zeros(5000, dtype='<u2')
    other.tofile(folder / 'other')
    os.replace(folder / 'other', folder / 'train.bin')
    assert same([batch['idx'] for batch in stream.batches(1, 3, 2)], before)
    (folder / 'train.bin').unlink()
    assert same([batch['idx'] for batch in stream.batches(1, 3, 2)], before)

    make_toy(tmp_path)
    stream = data.Stream(folder, meta, 'train', 16, 4)
    fingerprint = stream.fingerprint
    os.truncate(folder / 'train.bin', 200)
    with pytest.raises(UserError, match='was written to while it was in use'):
        list(stream.batches(1, 3, 2))
    other.tofile(folder / 'train.bin')
    with pytest.raises(UserError, match='was written to while it was in use'):
        list(stream.batches(1, 3, 2))
    assert data.Stream(folder, meta, 'train', 16, 4).fingerprint != fingerprint


def test_mapped_file_that_is_changed_during_an_evaluation(tmp_path, monkeypatch):
    """Reading on, where a shortened file was, would end the process without a word."""
    monkeypatch.setattr(data, 'IN_MEMORY', 100)
    monkeypatch.setattr(data, 'CHUNK', 100)
    folder = make_toy(tmp_path)
    stream = data.Stream(folder, data.load_meta(folder), 'val', 16, 4)
    passes = [stream.eval_batches(), stream.chunks()]
    for batches in passes:
        next(batches)
    np.zeros(1000, dtype='<u2').tofile(folder / 'val.bin')
    for batches in passes:
        with pytest.raises(UserError, match='was written to while it was in use'):
            next(batches)


def test_large_file_that_is_damaged_is_noticed(tmp_path, monkeypatch):
    """It is not read whole when it is opened: verify() does that."""
    datasets.write_stream(tmp_path / 'x', ByteTokenizer(), [1] * 100, [2] * 100, {}, 'none')
    meta = data.load_meta(tmp_path / 'x')
    monkeypatch.setattr(data, 'IN_MEMORY', 100)
    path = tmp_path / 'x' / 'train.bin'
    stream = data.Stream(tmp_path / 'x', meta, 'train', 16)
    stream.verify()

    content = bytearray(path.read_bytes())
    content[99] ^= 1
    (tmp_path / 'other').write_bytes(content)
    os.replace(tmp_path / 'other', path)
    stream.verify()  # the file that it has open is still right
    stream = data.Stream(tmp_path / 'x', meta, 'train', 16)
    with pytest.raises(UserError, match='train.bin is not what was prepared'):
        stream.verify()


def test_same_ids_in_other_pairs_are_other_data(tmp_path, capsys):
    fingerprints = []
    for number, pairs in enumerate(([('ab', 'cd'), ('e', 'f')], [('ab', 'c'), ('de', 'f')])):
        tok = ByteTokenizer(('bos', 'eos'))
        ids = [([*source.encode()], [*target.encode()]) for source, target in pairs]
        folder = tmp_path / str(number)
        datasets.write_pairs(folder, tok, {'train': ids, 'val': ids}, {}, 'none')
        meta = data.load_meta(folder)
        split = data.Pairs(folder, meta, 'train', [tok.decoder_start_id], 16)
        fingerprints.append(split.fingerprint)
    capsys.readouterr()
    first, second = fingerprints
    assert first != second and first.split()[0] == second.split()[0]

    older = {'data': {'train': first.split()[0]}}  # this is all that earlier versions wrote
    training.check_same_data(older, {'train': split}, {}, resuming=True)
    state = {'data': {'train': first}, 'config': {'dataset': 'x'}}
    with pytest.raises(UserError, match='is not what this run was trained on'):
        training.check_same_data(state, {'train': split}, {'dataset': 'x'}, resuming=True)

    training.check_same_data(state, {'train': split}, {'dataset': 'another'}, resuming=False)
    assert capsys.readouterr().out == ''
    training.check_same_data(state, {'train': split}, {'dataset': 'x'}, resuming=False)
    assert 'may be text that the run has learned' in capsys.readouterr().out


def endless_run_on_a_large_file(project, **meta_entries):
    """Start a run on a file that is too large to be read at once; returns its path, the process."""
    path = project.root / 'data' / 'toy' / 'train.bin'
    os.truncate(path, 2**28 + 2)  # sparse: it takes no room
    meta_path = project.root / 'data' / 'toy' / 'meta.json'
    meta = json.loads(meta_path.read_text().replace('5000', str(2**27 + 1)))
    meta_path.write_text(json.dumps({**meta, **meta_entries}))
    endless = ['--max_iters=100000', '--eval_interval=100000', '--log_interval=1']
    return path, project.start('train.py', *TINY, *endless, '--out_dir=out/toy')


def test_run_whose_large_file_is_damaged_saves_and_stops(project):
    _, process = endless_run_on_a_large_file(project, files={'train.bin': 64 * '0'})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'train.bin is not what was prepared' in err and 'saved at step' in err
    assert len(err.splitlines()) == 1
    assert project.checkpoint('toy')['step'] >= 0


def test_run_whose_mapped_file_is_shortened_saves_first(project):
    path, process = endless_run_on_a_large_file(project)
    assert any(line.startswith('step 5:') for line in iter(process.stdout.readline, ''))
    os.truncate(path, 2**28)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'train.bin was written to while it was in use; saved at step' in err
    assert len(err.splitlines()) == 1
    assert project.checkpoint('toy')['step'] >= 5


# --------------------------------------------------------------------------------------------------
# Output


def run_in_shell(project, command):
    """Run a shell command in a project, `python` in it being this one. Returns what it leaves."""
    command = command.replace('python', shlex.quote(sys.executable))
    return subprocess.run(['sh', '-c', command], cwd=project.root, capture_output=True, text=True,
                          encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.parametrize('command', [
    'python train.py --help=all > /dev/full',
    'python prepare/text.py --input=model.py > /dev/full',
    pytest.param('python sample.py --max_new_tokens=9 > /dev/full', marks=pytest.mark.slow),
    pytest.param('python train.py --dataset=toy > /dev/full', marks=pytest.mark.slow),
    pytest.param('python bench.py --help > /dev/full', marks=pytest.mark.slow),
])
def test_full_disk_under_stdout_is_a_sentence(project, command):
    done = run_in_shell(project, command)
    assert done.returncode == 1
    assert done.stderr.endswith('cannot write to stdout: No space left on device\n'), done.stderr
    assert len(done.stderr.splitlines()) <= 2  # sample.py names its model


def test_reader_that_leaves_is_no_error(project):
    done = run_in_shell(project, 'python train.py --help=all | head -n 1')
    assert done.returncode == 0 and done.stderr == '' and done.stdout


def test_failing_output_is_not_taken_for_a_failing_file(tmp_path, monkeypatch):
    """What a script prints while it writes a dataset."""
    with open('/dev/full', 'w', encoding='utf-8') as full:
        output = Output(full)
        monkeypatch.setattr(sys, 'stdout', output)
        tok = ByteTokenizer()
        with pytest.raises(OutputError, match='^cannot write to stdout: No space left on device$'):
            datasets.write_stream(tmp_path / 'x', tok, [1] * 9000, [2], {'source': 'x' * 9000}, '')
            output.flush()
    assert (tmp_path / 'x' / 'meta.json').is_file()


def test_output_that_fails_is_told_once():
    """… and whatever is printed afterwards goes nowhere."""
    with open('/dev/full', 'w', encoding='utf-8') as full:
        output = Output(full)
        told = []
        output.on_failure = told.append
        for _ in range(3):
            print('text', file=output, flush=True)
        assert [str(error) for error in told] == [
            'cannot write to stdout: No space left on device']


# --------------------------------------------------------------------------------------------------
# Downloads and exports

A_DATE = 'Mon, 01 Jan 2024 00:00:00 GMT'


@pytest.mark.parametrize('tag_before, tag_now, continues', [
    ('"a"', '"a"', True),
    (A_DATE, A_DATE, True),
    ('"a"', '"b"', False),
    ('', '', False),
    ('W/"a"', 'W/"a"', False),  # a weak tag: says that files are alike, not that they are equal
])
def test_download_continues_only_if_the_file_is_the_same(tmp_path, tag_before, tag_now, continues):
    """The connection breaks after 100,000 of 150,000 bytes; the server then may have another file
    of the same length.
    """
    old = b'a' * 150_000
    new = b'b' * 150_000
    ranges_asked = []

    class BreaksOnce(SlowServer):
        content = old
        tag = tag_before
        blocks = 2

        def do_GET(self):
            ranges_asked.append(self.headers.get('Range'))
            if len(ranges_asked) == 1:
                self.wfile = BreaksAfter(self.wfile, 100_000, self.connection)
            else:
                type(self).content = old if continues else new
                type(self).tag = tag_now
            super().do_GET()

    with server(BreaksOnce) as url:
        got = files.download([url], tmp_path / 'x', None, '').read_bytes()
    assert got == (old if continues else new)
    assert len(ranges_asked) == 2
    asks_for_the_rest = ranges_asked[1] is not None
    assert asks_for_the_rest == (tag_before in ('"a"', A_DATE))
    assert os.listdir(tmp_path) == ['x']


class BreaksAfter:
    """A file of a connection that breaks once more than so many bytes were written."""

    def __init__(self, file, room, connection):
        self.file = file
        self.room = room
        self.connection = connection

    def write(self, content):
        if len(content) > self.room + 1000:  # 1000: for the headers
            self.connection.shutdown(2)
            return
        self.room -= len(content)
        self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_export_removes_what_a_killed_one_left(lab):
    """A folder with something in it is not touched."""
    fault_injection.kill_export(lab, Random(1))
    unfinished = lab.root / '.there.export.tmp'
    unfinished.mkdir()
    (unfinished / 'model.safetensors.tmp').write_bytes(b'half')
    export = ['-m', 'pocket.export', '--out_dir=gpt2']
    lab.project.run(*export, '--to=there')
    assert not unfinished.exists()
    assert (lab.root / 'there' / 'model.safetensors').is_file()

    (lab.root / 'empty').mkdir()
    lab.project.run(*export, '--to=empty')
    assert (lab.root / 'empty' / 'model.safetensors').is_file()

    before = sorted((lab.root / 'there').iterdir())
    assert 'there already' in lab.project.fails(*export, '--to=there')
    assert sorted((lab.root / 'there').iterdir()) == before


# --------------------------------------------------------------------------------------------------
# Strange surroundings


def test_path_that_is_not_text_in_this_locale(tmp_path):
    """With LC_ALL=C and without Python's UTF-8 mode a path comes with surrogates; meta.json has it
    as it is on disk.
    """
    path = os.fsencode('täxt').decode('ascii', 'surrogateescape')
    datasets.write_stream(tmp_path / 'x', ByteTokenizer(), [1], [2], {'source': path}, 'none')
    assert '"source": "täxt"' in (tmp_path / 'x' / 'meta.json').read_text(encoding='utf-8')


C_LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
POSIX_LOCALE = {'LC_ALL': 'POSIX', 'LANG': 'C'}


@pytest.mark.slow
@pytest.mark.parametrize('redirection, env', [
    ('<&-', {}), ('>&- </dev/null', {}), ('2>&- </dev/null', {}), ('| head -n 1', {}),
    ('', C_LOCALE), ('', POSIX_LOCALE),
])
def test_closed_streams_and_locales(project, redirection, env):
    """With closed streams, or in a locale without umlauts, training and preparing succeed, in
    folders that have umlauts.
    """
    text = project.root / 'täxt.txt'
    run = project.root / 'läuft'
    data = project.root / 'dä'
    text.write_text('Müßig fährt der Bär.\n' * 50, encoding='utf-8')
    for command in (
        ['train.py', *TINY, '--sample_start=ba', f'--out_dir={run}'],
        ['prepare/text.py', f'--input={text}', '--tokenizer=char', f'--data_dir={data}'],
    ):
        done = subprocess.run(
            ['sh', '-c', f'{sys.executable} "$@" {redirection}', 'sh', *command],
            cwd=project.root, capture_output=True, text=True, encoding='utf-8',
            env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
        )
        assert done.returncode == 0 and done.stderr == '', (command, done.stderr)
    if 'head' not in redirection:  # else the scripts were ended by it
        assert (run / 'best.pt').is_file()
        assert (data / 'mine' / 'meta.json').is_file()


@pytest.mark.slow
def test_read_only_checkout(project, tmp_path):
    """Mounted read-only in a name space of its own, because root may write whatever the file modes
    say.
    """
    if subprocess.call(['unshare', '-m', 'true'], stderr=subprocess.DEVNULL):
        pytest.skip('may not mount')
    elsewhere = tmp_path / 'elsewhere'
    shutil.copytree(project.root / 'data', elsewhere / 'data')

    def train(out_dir):
        make_read_only = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
        check = '! touch "$1/x" 2>/dev/null'
        folders = f'--data_dir="$3/data" --out_dir={out_dir}'
        options = '--dataset=toy --block_size=16 --n_layer=1 --max_iters=2 --device=cpu'
        train = f'cd "$1" && exec "$2" train.py {folders} {options}'
        script = f'{make_read_only} && {check} && {train}'
        return subprocess.run(
            ['unshare', '-m', 'sh', '-c', script, 'sh', project.root, sys.executable, elsewhere],
            capture_output=True, text=True, encoding='utf-8',
        )

    done = train('"$3/run"')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (elsewhere / 'run' / 'best.pt').is_file()

    done = train('run')
    assert done.returncode == 2
    assert 'cannot write to' in done.stderr and len(done.stderr.splitlines()) == 1
