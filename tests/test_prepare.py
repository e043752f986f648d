"""Preparing datasets: downloads from a server of our own that misbehaves in every way, local files, and Python's library."""
import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import SHARED, Project, toy_text

from pocket import datasets
from pocket.errors import UserError

CONTENT = toy_text(300_000).encode()
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'
    requests = []

    def do_GET(self):
        have = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.requests.append((self.path, have))
        if self.path == '/gone':
            return self.send_error(404)
        body = CONTENT if self.path != '/wrong' else CONTENT.replace(b'lamp', b'LAMP')
        if have > len(body):
            return self.send_error(416)
        if 'gzip' in self.headers.get('Accept-Encoding', ''):  # a mirror that compresses what it may
            body = gzip.compress(body)
            self.send_response(200)
            self.send_header('Content-Encoding', 'gzip')
            self.end_headers()
            return self.wfile.write(body[:len(body) // 2])
        self.send_response(206 if have else 200)
        self.send_header('Content-Length', str(len(body) - have))
        self.end_headers()
        cut = self.path == '/cut' or self.path == '/cut_once' and not have
        self.wfile.write(body[have:have + 100_000] if cut else body[have:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.requests = []
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_download_whole_and_cached(server, tmp_path):
    path = datasets.download([server + '/good'], tmp_path / 'deep' / 'x.txt', SHA, '')
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ['x.txt']
    datasets.download(['http://127.0.0.1:9/unreachable'], path, SHA, '')  # what is there is used, without any network
    path.write_bytes(CONTENT[:-1])
    datasets.download([server + '/good'], path, SHA, '')
    assert path.read_bytes() == CONTENT


def test_download_goes_on_after_a_cut(server, tmp_path):
    path = datasets.download([server + '/cut_once'], tmp_path / 'x.txt', SHA, '')
    assert path.read_bytes() == CONTENT
    assert [p for p, _ in Handler.requests] == ['/cut_once'] * 2 and Handler.requests[0][1] == 0 < Handler.requests[1][1] <= 100_000


def test_download_takes_the_next_mirror(server, tmp_path):
    urls = [server + '/gone', 'http://127.0.0.1:9/unreachable', server + '/wrong', server + '/good']
    assert datasets.download(urls, tmp_path / 'x.txt', SHA, '').read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / 'x.txt.part').write_bytes(CONTENT + b'more')
    assert datasets.download([server + '/good'], tmp_path / 'x.txt', SHA, '').read_bytes() == CONTENT


@pytest.mark.parametrize('path, said', [('/gone', 'status 404'), ('/wrong', 'wrong sha256'), ('/cut', 'wrong sha256|ConnectionError|ChunkedEncodingError')])
def test_what_is_not_whole_never_passes_for_it(server, tmp_path, path, said):
    with pytest.raises(UserError, match=f'could not download x.txt .*({said}).*Do this.'):
        datasets.download([server + path], tmp_path / 'x.txt', '0' * 64 if path == '/cut' else SHA, 'Do this.')
    assert not (tmp_path / 'x.txt').exists()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone')


def test_shakespeare_from_a_server_and_from_a_file(project, server, tmp_path):
    (tmp_path / 'text.txt').write_bytes(CONTENT)
    out, _ = project.run('prepare/shakespeare_char.py', f'--input={tmp_path / "text.txt"}')
    folder = project.root / 'data' / 'shakespeare_char'
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    assert meta['counts'] == {'train': 270_000, 'val': 30_000} and meta['sha256'] == SHA and '270,000 train and 30,000 val' in out
    ids = np.fromfile(folder / 'train.bin', dtype='<u2')
    assert ''.join(meta['tokenizer']['chars'][i] for i in ids) == CONTENT[:270_000].decode()
    assert meta['vocab_size'] == len(set(CONTENT)) and not list(folder.glob('*.tmp'))
    err = project.fails('prepare/shakespeare_char.py', f'--urls={server}/good', '--data_dir=there')  # a good server, but another text
    assert 'wrong sha256' in err and '--input=FILE' in err and 'python train.py' in err
    assert not (project.root / 'there' / 'shakespeare_char' / 'input.txt').exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real text is not beside this checkout')
def test_shakespeare_is_nanogpts(project):
    project.run('prepare/shakespeare_char.py', f'--input={SHARED / "tinyshakespeare.txt"}')
    folder = project.root / 'data' / 'shakespeare_char'
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    assert meta['counts'] == {'train': 1_003_854, 'val': 111_540} and meta['vocab_size'] == 65
    assert meta['sha256'] == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    assert np.fromfile(folder / 'train.bin', dtype='<u2')[:5].tolist() == [18, 47, 56, 57, 58]  # 'First', as nanoGPT has it


def test_no_network_and_no_file(project):
    err = project.fails('prepare/shakespeare_char.py', '--urls=http://127.0.0.1:9/x')
    assert 'ConnectionError' in err and '--input=FILE' in err and 'python train.py' in err
    assert not (project.root / 'data' / 'shakespeare_char' / 'meta.json').exists()


@pytest.mark.parametrize('content, said', [(b'', 'only 0 characters'), (b'abc', 'only 3 characters'), (b'x' * 50 + b'\xff', 'byte 0xff at position 50'),
                                           (None, 'cannot read')])
def test_bad_input_files(project, tmp_path, content, said):
    if content is not None:
        (tmp_path / 'in.txt').write_bytes(content)
    assert said in project.fails('prepare/shakespeare_char.py', f'--input={tmp_path / "in.txt"}')
    assert not (project.root / 'data' / 'shakespeare_char' / 'train.bin').exists()


def test_stdlib_is_the_same_every_time(project):
    out, _ = project.run('prepare/stdlib.py')
    folder = project.root / 'data' / 'stdlib'
    first = {name: (folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')}
    project.run('prepare/stdlib.py')
    assert first == {name: (folder / name).read_bytes() for name in first}
    ids = np.frombuffer(first['train.bin'], dtype='<u2')
    files = bytes(np.where(ids == 256, 0, ids).astype(np.uint8)).split(b'\0')
    argparse = open(__import__('argparse').__file__, 'rb').read()
    assert len(ids) > 2_000_000 and argparse in files and ids[-1] == 256 and 'files' in out
    val = np.frombuffer(first['val.bin'], dtype='<u2')
    assert 0.01 < len(val) / len(ids) < 0.1


def test_a_library_without_source(project, tmp_path):
    """As on systems that ship only compiled modules."""
    (tmp_path / 'sitecustomize.py').write_text(
        f"import sysconfig\nreal = sysconfig.get_paths\nsysconfig.get_paths = lambda *a, **k: {{**real(*a, **k), 'stdlib': {str(tmp_path)!r}}}\n", encoding='utf-8')
    assert 'comes without its library\'s source' in project.fails('prepare/stdlib.py', env={'PYTHONPATH': str(tmp_path)})


def test_a_folder_that_cannot_be_written(project):
    (project.root / 'file').write_text('', encoding='utf-8')
    assert 'cannot make' in project.fails('prepare/stdlib.py', '--data_dir=file')


@pytest.mark.skipif(sys.platform != 'linux', reason='needs RLIMIT_FSIZE')
def test_disk_full_leaves_no_dataset(project, tmp_path):
    (tmp_path / 'text.txt').write_bytes(CONTENT)
    limited = f'import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); ' \
              f'sys.argv = ["x", "--input={tmp_path / "text.txt"}"]; sys.path.insert(0, "prepare"); runpy.run_path("prepare/shakespeare_char.py")'
    done = subprocess.run([sys.executable, '-c', limited], cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 2 and 'cannot write' in done.stderr and 'Traceback' not in done.stderr
    folder = project.root / 'data' / 'shakespeare_char'
    assert not (folder / 'meta.json').exists() and not list(folder.glob('*.bin')) and not list(folder.glob('*.tmp'))
