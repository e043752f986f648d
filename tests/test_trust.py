"""Nothing lost, nothing mixed up: a few trials of each experiment in fault_injection.py at fixed seeds, and what they have brought to light."""
import os
import shutil
import sys
import time
from random import Random

import pytest

from pocket import datasets, files

if sys.platform != 'linux':
    pytest.skip('needs SIGKILL, /proc and limits on files', allow_module_level=True)
import fault_injection
from conftest import TINY, Lab, SlowServer, read_log, same_run, server

from pocket.errors import UserError
from pocket.tokenizer import ByteTokenizer


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp('torture'))


@pytest.mark.parametrize('name, trials', [('kill_train', 1), ('kill_download', 2), ('kill_export', 1), ('disk', 1), ('resume', 1), ('two_runs', 1),
                                          ('two_downloads', 1)])
def test_fast(lab, name, trials):
    for number in range(trials):
        fault_injection.EXPERIMENTS[name](lab, Random(f'suite {name} {number}'))


@pytest.mark.parametrize('kind', ['shakespeare_char', 'office'])
def test_a_killed_preparation(lab, kind):
    fault_injection.kill_prepare(lab, Random(f'suite {kind}'), kind)


@pytest.mark.slow
@pytest.mark.parametrize('name', fault_injection.EXPERIMENTS)
def test_slow(lab, name):
    for number in range(1 if name in fault_injection.ONCE else 10):
        fault_injection.EXPERIMENTS[name](lab, Random(f'slow {name} {number}'))


def test_best_without_last(project, trained):
    """A crash between the two at the first evaluation: that is a run; it goes on, and a new one does not take its folder."""
    project.train('--max_iters=8', '--eval_interval=8', '--out_dir=whole')
    project.train('--max_iters=8', '--eval_interval=8', '--out_dir=out/toy')
    run = project.root / 'out' / 'toy'
    (run / 'last.pt').unlink()
    shutil.copytree(run, project.root / 'parts')
    project.run('train.py', '--resume', '--out_dir=parts')
    same_run(project.root / 'whole', project.root / 'parts')
    out, _ = project.train('--max_iters=1')
    assert 'held a run' in out and (project.root / 'out' / 'toy.1' / 'best.pt').is_file()


def test_a_claim(tmp_path, monkeypatch):
    """… is refused while another holds it, and when the folder was moved aside by who held it a moment ago; it names the folder."""
    folder = tmp_path / 'run'
    folder.mkdir()
    with files.lock(folder):
        for claim in (files.lock, files.back_up, datasets.clear):
            with pytest.raises(UserError, match=f'another .* {folder}: wait for it'):
                claim(folder)
    real = __import__('fcntl').flock
    monkeypatch.setattr('fcntl.flock', lambda *a: (folder.rename(tmp_path / 'aside'), real(*a)))
    with pytest.raises(UserError, match='another run is writing'):
        files.lock(folder)
    monkeypatch.undo()
    assert files.back_up(tmp_path / 'aside') == tmp_path / 'aside.1'


def test_a_dataset_is_written_by_one(tmp_path):
    with datasets.clear(tmp_path / 'x'), pytest.raises(UserError, match='another process is preparing'):
        datasets.write_stream(tmp_path / 'x', ByteTokenizer(), [1], [2], {}, 'none')
    datasets.write_stream(tmp_path / 'x', ByteTokenizer(), [1], [2], {}, 'none')


def test_a_file_that_is_being_read_on_windows(tmp_path, monkeypatch):
    """os.replace() fails there for as long as somebody has the old file open."""
    real, tries = os.replace, []

    def busy(a, b):
        tries.append(a)
        if len(tries) < 3:
            raise PermissionError(13, 'Permission denied')
        real(a, b)
    monkeypatch.setattr(os, 'replace', busy)
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    files.atomic_write(tmp_path / 'a', lambda f: f.write(b'new'))
    assert (tmp_path / 'a').read_bytes() == b'new' and len(tries) == 3
    monkeypatch.setattr(os, 'replace', lambda a, b: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))
    with pytest.raises(UserError, match='Permission denied'):
        files.atomic_write(tmp_path / 'a', lambda f: f.write(b'newer'))
    assert os.listdir(tmp_path) == ['a'] and (tmp_path / 'a').read_bytes() == b'new'


@pytest.mark.parametrize('before, now, goes_on', [('"a"', '"a"', True), ('"a"', '"b"', False), ('', '', False), ('W/"a"', 'W/"a"', False),
                                                  ('Mon, 01 Jan 2024 00:00:00 GMT',) * 2 + (True,)])
def test_a_part_is_of_one_file(tmp_path, monkeypatch, before, now, goes_on):
    """The server has another file of the same length, or can't say that it is the same: the part is not used. A cut comes after 100,000."""
    old, new = b'a' * 150_000, b'b' * 150_000
    asked = []

    class Cut(SlowServer):
        content, tag, blocks = old, before, 2

        def do_GET(self):
            asked.append(self.headers.get('Range'))
            if len(asked) == 2:
                type(self).content, type(self).tag = (old if goes_on else new), now
            write, left = self.wfile.write, [100_000 if len(asked) == 1 else 10**9]
            monkeypatch.setattr(self.wfile, 'write', lambda b: write(b) if left.append(left.pop() - len(b)) or left[0] > -1000 else self.connection.shutdown(2))
            super().do_GET()
    with server(Cut) as url:
        got = files.download([url], tmp_path / 'x', None, '').read_bytes()
    assert got == (old if goes_on else new) and len(asked) == 2 and (asked[1] is not None) == ('W' not in before and before != '')
    assert os.listdir(tmp_path) == ['x']


def test_what_a_killed_export_leaves(lab):
    """… is in nobody's way, and a folder with something in it is not touched."""
    unfinished = lab.root / '.there.export.tmp'
    fault_injection.kill_export(lab, Random(1))
    unfinished.mkdir()
    (unfinished / 'model.safetensors.tmp').write_bytes(b'half')
    lab.project.run('export.py', '--out_dir=gpt2', '--to=there')
    (lab.root / 'empty').mkdir()
    lab.project.run('export.py', '--out_dir=gpt2', '--to=empty')
    assert (lab.root / 'empty' / 'model.safetensors').is_file() and not unfinished.exists() and (lab.root / 'there' / 'model.safetensors').is_file()
    before = sorted((lab.root / 'there').iterdir())
    assert 'is there already' in lab.project.fails('export.py', '--out_dir=gpt2', '--to=there') and sorted((lab.root / 'there').iterdir()) == before


def test_a_stop_saves_before_it_draws(project):
    """Whatever is wrong with loss.png, the weights are safe."""
    project.train('--max_iters=4', '--eval_interval=2', '--out_dir=out/toy')
    process = project.start('train.py', '--resume', '--out_dir=out/toy', '--max_iters=100000', '--eval_interval=100000', '--log_interval=1')
    assert any(line.startswith('step 6:') for line in iter(process.stdout.readline, ''))
    (project.root / 'out' / 'toy' / 'loss.png').unlink()
    (project.root / 'out' / 'toy' / 'loss.png').mkdir()
    process.send_signal(15)
    out, err = process.communicate(timeout=60)
    assert 'no loss.png: cannot write' in out and not err and process.returncode == 143 and project.checkpoint('toy')['step'] >= 6


def test_paths_that_are_not_text_here(tmp_path):
    """With LC_ALL=C and without Python's UTF-8 mode a path comes with surrogates: meta.json has it as it is on disk."""
    path = os.fsencode('täxt').decode('ascii', 'surrogateescape')
    datasets.write_stream(tmp_path / 'x', ByteTokenizer(), [1], [2], {'source': path}, 'none')
    assert '"source": "täxt"' in (tmp_path / 'x' / 'meta.json').read_text(encoding='utf-8')


def test_changed_settings_on_resume(project):
    """Honoured with a line that says what that means, or refused; never silently."""
    project.train('--max_iters=4')
    for arg in ('--dataset=other', '--block_size=8', '--n_layer=1', '--optimizer=adamw', '--arch=seq2seq'):
        assert f'{arg[2:].split("=")[0]} ' in project.fails('train.py', '--resume', '--out_dir=out/toy', arg) and project.checkpoint('toy')['step'] == 4
    said, _ = project.run('train.py', '--resume', '--out_dir=out/toy', '--batch_size=8', '--learning_rate=0.001', '--seed=5', '--eval_interval=3', '--max_iters=6')
    assert 'batch_size 4 -> 8, eval_interval 4 -> 3, learning_rate 0.01 -> 0.001, max_iters 4 -> 6, seed 1337 -> 5; the run goes on, but not as it would have' in said
    assert [row[:2] for row in read_log(project.root / 'out' / 'toy')] == [['4', '512'], ['6', '1024']]


def closed(project, what, *args, **kwargs):
    """A script in a shell, with something done to its streams: (status, stdout, stderr)."""
    import subprocess
    done = subprocess.run(['sh', '-c', f'{sys.executable} "$@" {what}', 'sh', *map(str, args)], cwd=project.root, capture_output=True, text=True, encoding='utf-8',
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **kwargs})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('what, env', [('<&-', {}), ('>&- </dev/null', {}), ('2>&- </dev/null', {}), ('| head -n 1', {}),
                                       ('', {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}), ('', {'LC_ALL': 'POSIX', 'LANG': 'C'})])
def test_streams_and_locales(project, what, env):
    """Closed, or a locale without a single umlaut: training and preparing end as ever, in a folder that has one, or quietly."""
    (project.root / 'täxt.txt').write_text('Müßig fährt der Bär.\n' * 50, encoding='utf-8')
    for args in (['train.py', *TINY, '--sample_start=ba', f'--out_dir={project.root / "läuft"}'],
                 ['prepare/text.py', f'--input={project.root / "täxt.txt"}', '--tokenizer=char', f'--data_dir={project.root / "dä"}']):
        status, _, err = closed(project, what, *args, **env)
        assert status == 0 and err == '', (args, err)
    if 'head' not in what:
        assert (project.root / 'läuft' / 'best.pt').is_file() and (project.root / 'dä' / 'mine' / 'meta.json').is_file()


@pytest.mark.slow
def test_a_checkout_that_cannot_be_written(project, tmp_path):
    """… as root too, to whom modes mean nothing: mounted read-only in a name space of its own."""
    import subprocess
    into = tmp_path / 'elsewhere'
    script = ('mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/x" 2>/dev/null && cd "$1" && '
              'exec "$2" train.py --dataset=toy --data_dir="$3/data" --out_dir="$3/run" --block_size=16 --n_layer=1 --max_iters=2 --device=cpu')
    shutil.copytree(project.root / 'data', into / 'data')
    if subprocess.call(['unshare', '-m', 'true'], stderr=subprocess.DEVNULL):
        pytest.skip('may not mount')
    done = subprocess.run(['unshare', '-m', 'sh', '-c', script, 'sh', project.root, sys.executable, into], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0 and done.stderr == '' and (into / 'run' / 'best.pt').is_file(), done.stderr
    done = subprocess.run(['unshare', '-m', 'sh', '-c', script.replace('--out_dir="$3/run"', '--out_dir=run'), 'sh', project.root, sys.executable, into],
                          capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 2 and 'cannot write to' in done.stderr and len(done.stderr.splitlines()) == 1
