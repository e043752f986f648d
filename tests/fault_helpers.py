"""
What fault_injection.py and its tests share: a project to be mistreated, a slow server, a small
disk.
"""
import http.server
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from project import TINY, Project
from toy import make_pairs, make_toy, toy_text

# The sample at a run's end is kept short: no experiment looks at it
FEW_TOKENS = '--final_sample_tokens=3'
SHORT = [*TINY, '--n_layer=1', '--max_iters=9', '--eval_interval=3', '--log_interval=1', FEW_TOKENS]

# limited.py ARGS: train.py, whose first rank can write no file longer than LIMIT bytes
LIMITED = '''
import os
import resource
import runpy
import sys
from pathlib import Path

if os.environ.get('RANK', '0') == '0':
    limit = int(os.environ['LIMIT'])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = str(Path(__file__).with_name('train.py'))
runpy.run_path(sys.argv[0], run_name='__main__')
'''

# fetch.py URL PATH SHA256: download a file as the scripts do
FETCH = '''
import sys

from pocket.errors import show_user_errors
from pocket.files import download

show_user_errors('fetch.py')
url, path, sha256 = sys.argv[1:]
download([url], path, sha256 or None, 'Do something.')
'''


class Lab:
    """A project to be mistreated, results that its runs should have, and counts of what was seen.
    """

    def __init__(self, folder):
        self.project = Project(Path(folder) / 'pocket übung')
        self.root = self.project.root
        self.known = {}
        self.seen = Counter()

        make_toy(self.root)
        make_pairs(self.root)
        self.write('limited.py', LIMITED)
        self.write('fetch.py', FETCH)
        self.write('text.txt', toy_text(700_000))
        self.write('src.txt', numbered_lines(seed=1))
        self.write('tgt.txt', numbered_lines(seed=2))

    def write(self, name, text):
        (self.root / name).write_text(text, encoding='utf-8')

    def once(self, key, make):
        """The result of make(), which is called only the first time that this key is asked for."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def timed(self, key, script, *args):
        """How many seconds a script takes when nothing disturbs it. It is run once."""

        def run():
            begin = time.monotonic()
            self.project.run(script, *args)
            return time.monotonic() - begin

        return self.once((key, 'seconds'), run)

    def fresh(self, name):
        """A path in the project where nothing is."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return self.root / name


def numbered_lines(seed):
    """A text of 4,000 lines, no two alike."""
    lines = toy_text(200_000, seed).splitlines()[:4000]
    return ''.join(f'{i} {line}\n' for i, line in enumerate(lines))


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Serves one file slowly. Subclasses or tests set what it has and how well it behaves."""

    content = b''
    tag = ''  # of this version of the file: an ETag in quotes, a date for Last-Modified, or nothing
    blocks = 40  # it is sent in so many parts, with a pause after each

    def do_GET(self):
        content = self.content  # as it is now: the next request may find another version
        tag = self.tag
        first = 0
        if self.headers.get('If-Range', tag) == tag:  # else the file has changed: send all of it
            first = int(self.headers.get('Range', 'bytes=0-')[len('bytes='):-1])
        if first >= len(content):
            return self.send_error(416)

        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(content) - first))
        if tag:
            self.send_header('ETag' if '"' in tag else 'Last-Modified', tag)
        self.end_headers()
        size = len(content) // self.blocks + 1
        with suppress(OSError):  # the client has left
            for i in range(first, len(content), size):
                self.wfile.write(content[i:i + size])
                time.sleep(0.004)

    def log_message(self, *args):
        pass


@contextmanager
def server(handler):
    """Serve on 127.0.0.1; the value is the address of a file there."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/x'
    httpd.shutdown()
    httpd.server_close()


@contextmanager
def small_disk(folder, size):
    """Mount a file system of so many bytes at folder, if we are allowed to; the value says whether.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
    mounted = os.geteuid() == 0 and subprocess.call(mount, stderr=subprocess.DEVNULL) == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.check_call(['umount', str(folder)])
