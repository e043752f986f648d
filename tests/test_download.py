"""
pocket.files.download(): a server that cuts connections, is gone or sends something else.

Run it alone: pytest -n 0 tests/test_download.py

Downloads that are killed while the file on the server changes: test_fault_injection.py.
"""
import gzip
import hashlib
import http.server

import pytest
from conftest import toy_text
from prepared import serve

from pocket.errors import UserError
from pocket.files import download

CONTENT = toy_text(300_000).encode()
SHA = hashlib.sha256(CONTENT).hexdigest()
UNREACHABLE = 'http://127.0.0.1:9/unreachable'


class Handler(http.server.BaseHTTPRequestHandler):
    """What is wrong with a download depends on its path: /good, /gone, /wrong, /cut or /cut_once."""
    protocol_version = 'HTTP/1.0'
    requests = []   # (path, first byte asked for)

    def do_GET(self):
        first = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.requests.append((self.path, first))
        if self.path == '/gone':
            return self.send_error(404)
        body = CONTENT
        if self.path == '/wrong':
            body = CONTENT.replace(b'lamp', b'LAMP')
        if first > len(body):
            return self.send_error(416)
        if 'gzip' in self.headers.get('Accept-Encoding', ''):   # a mirror that compresses if it may
            body = gzip.compress(body)
            self.send_response(200)
            self.send_header('Content-Encoding', 'gzip')
            self.end_headers()
            return self.wfile.write(body[:len(body) // 2])
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(body) - first))
        self.end_headers()
        if self.path == '/cut' or (self.path == '/cut_once' and first == 0):
            body = body[:first + 100_000]
        self.wfile.write(body[first:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.requests = []
    with serve(Handler) as url:
        yield url


def test_whole_file_is_downloaded_once(server, tmp_path):
    path = download([f'{server}/good'], tmp_path / 'deep' / 'x.txt', SHA, '')
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ['x.txt']
    download([UNREACHABLE], path, SHA, '')   # it is there: no network is needed


def test_file_with_another_sha256_is_downloaded_again(server, tmp_path):
    path = tmp_path / 'x.txt'
    path.write_bytes(CONTENT[:-1])
    download([f'{server}/good'], path, SHA, '')
    assert path.read_bytes() == CONTENT


def test_cut_download_resumes(server, tmp_path):
    path = download([f'{server}/cut_once'], tmp_path / 'x.txt', SHA, '')
    assert path.read_bytes() == CONTENT
    paths = [path for path, _ in Handler.requests]
    starts = [first for _, first in Handler.requests]
    assert paths == ['/cut_once', '/cut_once']
    assert starts[0] == 0 and 0 < starts[1] <= 100_000


def test_next_mirror_is_tried(server, tmp_path):
    urls = [f'{server}/gone', UNREACHABLE, f'{server}/wrong', f'{server}/good']
    assert download(urls, tmp_path / 'x.txt', SHA, '').read_bytes() == CONTENT


def test_partial_file_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / 'x.txt.part').write_bytes(CONTENT + b'more')
    assert download([f'{server}/good'], tmp_path / 'x.txt', SHA, '').read_bytes() == CONTENT


@pytest.mark.parametrize('path, sha256, message', [
    ('/gone', SHA, 'status 404'),
    ('/wrong', SHA, 'wrong sha256'),
    ('/cut', '0' * 64, 'wrong sha256|ConnectionError|ChunkedEncodingError'),
])
def test_failed_download_leaves_no_file_and_gives_advice(server, tmp_path, path, sha256, message):
    with pytest.raises(UserError, match=f'could not download x.txt .*({message}).*Do this.'):
        download([server + path], tmp_path / 'x.txt', sha256, 'Do this.')
    assert not (tmp_path / 'x.txt').exists()
