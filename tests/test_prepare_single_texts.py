"""
prepare/shakespeare_*.py, verdict.py and stdlib.py: datasets of one text that fits into memory.

Run it alone: pytest -n 0 tests/test_prepare_single_texts.py
"""
import argparse
import hashlib
import http.server
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from conftest import CHECKOUT, SHARED, Project, toy_text
from prepared import read_dataset, serve

from pocket.tokenizer import make_tokenizer

CONTENT = toy_text(300_000).encode()
NO_NETWORK = {'HTTPS_PROXY': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'pocket übung')


WITHOUT_NUMPY = '''
import runpy
import sys

sys.modules['numpy'] = None  # importing it fails, as if it were not installed
sys.argv = ['prepare/SCRIPT', *sys.argv[1:]]
runpy.run_path('prepare/SCRIPT', run_name='__main__')
'''


@pytest.mark.parametrize('script', ['shakespeare_char.py', 'stdlib.py', 'text.py', 'office_gpt2.py'])
def test_a_package_that_is_not_installed(project, script):
    """What a newcomer sees who skips `pip install`, or forgets to activate the environment."""
    wrapper = WITHOUT_NUMPY.replace('SCRIPT', script)
    (project.root / 'without_numpy.py').write_text(wrapper, encoding='utf-8')
    out, _ = project.run('without_numpy.py', '--help')
    assert '--data_dir' in out
    error = project.fails('without_numpy.py')
    assert 'numpy is not installed for' in error and 'pip install -r requirements.txt' in error


@pytest.fixture
def server():
    """A server that has CONTENT under every path."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *args):
            pass

    with serve(Handler) as url:
        yield url


@pytest.mark.parametrize('script', ['shakespeare_char', 'shakespeare_bpe', 'shakespeare_gpt2', 'verdict'])
def test_the_tokenizer_of_a_run_can_be_taken(trained, tmp_path, script):
    tokenizer = trained.checkpoint('toy')['tokenizer']
    text = ''.join(char for char in toy_text(30_000) if char in tokenizer['chars'])
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    out, _ = trained.run(f'prepare/{script}.py', f'--input={tmp_path / "text.txt"}', '--name=other',
                         '--tokenizer=out/toy')
    assert 'next: python train.py --dataset=other' in out
    meta, _, _ = read_dataset(trained.root / 'data' / 'other')
    assert meta['tokenizer'] == tokenizer


# --- shakespeare_char.py --------------------------------------------------------------------------

def test_shakespeare_char_from_a_file(project, tmp_path):
    (tmp_path / 'text.txt').write_bytes(CONTENT)
    out, _ = project.run('prepare/shakespeare_char.py', f'--input={tmp_path / "text.txt"}')
    assert '270,000 train and 30,000 val' in out

    meta, tok, ids = read_dataset(project.root / 'data' / 'shakespeare_char')
    assert meta['counts'] == {'train': 270_000, 'val': 30_000}
    assert meta['sha256'] == hashlib.sha256(CONTENT).hexdigest()
    assert meta['vocab_size'] == len(set(CONTENT))
    assert ''.join(meta['tokenizer']['chars'][i] for i in ids['train']) == CONTENT[:270_000].decode()
    assert tok.decode(ids['val']) == CONTENT[270_000:].decode()


def test_shakespeare_char_refuses_another_text_from_a_server(project, server):
    err = project.fails('prepare/shakespeare_char.py', f'--urls={server}/good', '--data_dir=there')
    assert 'wrong sha256' in err and '--input=FILE' in err and 'python train.py' in err
    assert not (project.root / 'there' / 'shakespeare_char' / 'input.txt').exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real text is not beside this checkout')
def test_shakespeare_char_is_nanogpts(project):
    project.run('prepare/shakespeare_char.py', f'--input={SHARED / "tinyshakespeare.txt"}')
    meta, _, ids = read_dataset(project.root / 'data' / 'shakespeare_char')
    assert meta['counts'] == {'train': 1_003_854, 'val': 111_540}
    assert meta['vocab_size'] == 65
    assert meta['sha256'] == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    assert ids['train'][:5].tolist() == [18, 47, 56, 57, 58]   # 'First', as nanoGPT has it


def test_no_network_and_no_file(project):
    err = project.fails('prepare/shakespeare_char.py', '--urls=http://127.0.0.1:9/x')
    assert 'ConnectionError' in err and '--input=FILE' in err and 'python train.py' in err
    assert not (project.root / 'data' / 'shakespeare_char' / 'meta.json').exists()


@pytest.mark.parametrize('content, message', [
    (b'', 'only 0 characters'),
    (b'abc', 'only 3 characters'),
    (b'x' * 50 + b'\xff', 'byte 0xff at position 50'),
    (None, 'cannot read'),
])
def test_bad_input_file_is_named_and_nothing_is_written(project, tmp_path, content, message):
    if content is not None:
        (tmp_path / 'in.txt').write_bytes(content)
    err = project.fails('prepare/shakespeare_char.py', f'--input={tmp_path / "in.txt"}')
    assert message in err and 'in.txt' in err
    assert not (project.root / 'data' / 'shakespeare_char' / 'train.bin').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='needs RLIMIT_FSIZE')
def test_full_disk_leaves_no_dataset(project, tmp_path):
    (tmp_path / 'text.txt').write_bytes(CONTENT)
    with_small_files = (
        'import resource, runpy, signal, sys\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
        'sys.argv = sys.argv[1:]\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n')
    argv = [sys.executable, '-c', with_small_files, 'prepare/shakespeare_char.py',
            f'--input={tmp_path / "text.txt"}']
    done = subprocess.run(argv, cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'cannot write' in done.stderr and 'Traceback' not in done.stderr
    folder = project.root / 'data' / 'shakespeare_char'
    assert [path.name for path in folder.iterdir()] == ['.lock']


# --- shakespeare_bpe.py ---------------------------------------------------------------------------

def test_shakespeare_bpe(project, tmp_path):
    text = (CHECKOUT / 'README.md').read_text(encoding='utf-8')[:10_000] + 'ß' * 99   # only val has ß
    (tmp_path / 'in.txt').write_bytes(text.encode('utf-8'))
    args = ['prepare/shakespeare_bpe.py', f'--input={tmp_path / "in.txt"}', '--data_dir=d']
    out, _ = project.run(*args, '--vocab_size=600')
    assert '600 in the' in out

    folder = project.root / 'd' / 'shakespeare_bpe'
    meta, tok, ids = read_dataset(folder)
    n = int(len(text) * 0.9)
    assert meta['vocab_size'] == tok.vocab_size == 600
    assert meta['dtype'] == 'uint16'
    assert tok.special_tokens == {'eot': 599}
    assert tok.decode(ids['train']) == text[:n] and tok.decode(ids['val']) == text[n:]
    assert meta['tokenizer'] == make_tokenizer('bpe', [text[:n]], 600).to_dict()   # trained on train

    theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert theirs.encode(text[:n]).ids == ids['train'].tolist()
    assert theirs.encode('<|endoftext|>').ids == [599]
    lines = (folder / 'vocab.txt').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 600
    assert lines[10] == "    10  '\\n'" and lines[65] == "    65  'A'" and lines[599] == '   599  <eot>'


@pytest.mark.parametrize('size', [256, 0, -5])
def test_shakespeare_bpe_refuses_a_vocabulary_without_room_for_bytes(project, tmp_path, size):
    (tmp_path / 'in.txt').write_bytes(CONTENT[:1000])
    err = project.fails('prepare/shakespeare_bpe.py', f'--input={tmp_path / "in.txt"}',
                        f'--vocab_size={size}')
    assert f'vocabulary of {size} is too small' in err
    assert not (project.root / 'data' / 'shakespeare_bpe').exists()


# --- verdict.py -----------------------------------------------------------------------------------

@pytest.mark.skipif(not SHARED.is_dir(), reason='text and encoding are not beside this checkout')
def test_verdict(project, tmp_path):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')   # tiktoken may delete from it
    env = {**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'cache')}
    project.run('prepare/verdict.py', f'--input={SHARED / "the-verdict.txt"}', env=env)
    meta, tok, ids = read_dataset(project.root / 'data' / 'verdict')
    text = (SHARED / 'the-verdict.txt').read_bytes().decode('utf-8')
    assert meta['counts'] == {'train': 4612, 'val': 534}
    assert tok.decode(ids['train']) + tok.decode(ids['val']) == text
    assert meta['tokenizer'] == {'kind': 'tiktoken', 'name': 'gpt2', 'specials': []}
    assert meta['vocab_size'] == 50257
    assert meta['sha256'] == 'b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f'


def test_verdict_without_network(project, tmp_path):
    (tmp_path / 'in.txt').write_text('It is a short story. ' * 9, encoding='utf-8')
    env = {**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty')}
    err = project.fails('prepare/verdict.py', f'--input={tmp_path / "in.txt"}', env=env)
    assert 'gpt2' in err and 'TIKTOKEN_CACHE_DIR' in err
    err = project.fails('prepare/verdict.py', '--urls=http://127.0.0.1:9/x', env=env)
    assert '--input=FILE' in err
    data = project.root / 'data'
    assert not list(data.rglob('*.bin')) and not list(data.rglob('meta.json'))


# --- stdlib.py ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_stdlib_is_the_same_every_time(project):
    folder = project.root / 'data' / 'stdlib'

    def prepare():
        out, _ = project.run('prepare/stdlib.py')
        assert 'files' in out
        return {name: (folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')}

    assert prepare() == prepare()
    _, _, ids = read_dataset(folder)
    assert len(ids['train']) > 2_000_000 and ids['train'][-1] == 256
    assert 0.01 < len(ids['val']) / len(ids['train']) < 0.1
    as_bytes = np.where(ids['train'] == 256, 0, ids['train']).astype(np.uint8)
    assert Path(argparse.__file__).read_bytes() in bytes(as_bytes).split(b'\0')


def test_stdlib_without_source(project, tmp_path):
    """As on systems that ship only compiled modules."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import sysconfig\n'
        'real = sysconfig.get_paths\n'
        'def get_paths(*args, **kwargs):\n'
        f"    return {{**real(*args, **kwargs), 'stdlib': {str(tmp_path)!r}}}\n"
        'sysconfig.get_paths = get_paths\n', encoding='utf-8')
    err = project.fails('prepare/stdlib.py', env={'PYTHONPATH': str(tmp_path)})
    assert "comes without its library's source" in err


def test_folder_that_cannot_be_made(project):
    (project.root / 'file').write_text('', encoding='utf-8')
    assert 'cannot make' in project.fails('prepare/stdlib.py', '--data_dir=file')
