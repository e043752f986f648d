"""
prepare/tinystories.py and fineweb_edu.py: cut connections, kills, local copies.

Run it alone: pytest -n 0 tests/test_prepare_corpora.py
"""
import http.server
import sys
import zlib

import pytest
from conftest import Project, toy_text
from prepared import read_documents, serve


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone')


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content` by the last part of the address, and cuts a connection cuts[name] times."""
    content = {}
    cuts = {}
    requests = []   # (path, first byte asked for)

    def do_GET(self):
        name = self.path.split('/')[-1]
        first = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.requests.append((self.path, first))
        if name not in self.content:
            return self.send_error(404)
        body = self.content[name][first:]
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Last-Modified', 'Mon, 01 Jan 2024 00:00:00 GMT')
        self.end_headers()
        if self.cuts.get(name, 0) > 0:
            self.cuts[name] -= 1
            body = body[:len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.content = {}
    Handler.cuts = {}
    Handler.requests = []
    with serve(Handler) as url:
        yield url


# --- tinystories.py -------------------------------------------------------------------------------

TRAIN = 'TinyStoriesV2-GPT4-train.txt'
VALID = 'TinyStoriesV2-GPT4-valid.txt'


def made_stories(first, last):
    stories = [toy_text(150, seed=i) for i in range(first, last)]
    return ''.join(f'{story}\n<|endoftext|>\n' for story in stories).encode()


STORIES = {TRAIN: made_stories(0, 2000), VALID: made_stories(2000, 3000)}


def test_tinystories_from_a_server_that_cuts(project, server):
    Handler.content = STORIES
    Handler.cuts = {TRAIN: 1, VALID: 2}
    folder = project.root / 'data' / 'tinystories'

    # Two tries are enough for the train file, but not for the other
    err = project.fails('prepare/tinystories.py', '--tokenizer=byte', f'--endpoint={server}')
    assert f'could not download {VALID}' in err and '--input=FOLDER' in err
    names = sorted(path.name for path in folder.iterdir())
    assert names == [TRAIN, f'{VALID}.part', f'{VALID}.part.tag']
    assert (folder / TRAIN).read_bytes() == STORIES[TRAIN]

    # The same command resumes its download
    out, _ = project.run('prepare/tinystories.py', '--tokenizer=byte', env={'HF_ENDPOINT': server})
    assert 'tok/s' in out
    documents = read_documents(folder)
    for split, content in (('train', STORIES[TRAIN]), ('val', STORIES[VALID])):
        *stories, _ = content.decode().split('<|endoftext|>')
        assert documents[split] == [story.strip('\n') for story in stories]
    starts = [first for _, first in Handler.requests]
    assert len(starts) == 5
    assert starts[0] == 0 < starts[1]                # the train file
    assert starts[2] == 0 < starts[3] <= starts[4]   # the other, its end by another process
    path, _ = Handler.requests[0]
    assert path == f'/datasets/roneneldan/TinyStories/resolve/main/{TRAIN}'


def test_tinystories_once_downloaded_needs_no_network(project):
    folder = project.root / 'data' / 'tinystories'
    folder.mkdir(parents=True)
    for name, content in STORIES.items():
        (folder / name).write_bytes(content)
    args = ['prepare/tinystories.py', '--tokenizer=byte', '--endpoint=http://127.0.0.1:9']
    project.run(*args)
    assert 'ConnectionError' in project.fails(*args, '--data_dir=other')
    assert 'cannot read' in project.fails('prepare/tinystories.py', '--input=nowhere')


@pytest.mark.skipif(sys.platform == 'win32', reason='needs SIGKILL')
def test_killed_tinystories_resumes(project, tmp_path):
    for name, content in STORIES.items():
        (tmp_path / name).write_bytes(content)
    # Python runs this first. If KILL is set, pieces are small, progress is saved after each, and the
    # first save is the last thing that the process does
    (tmp_path / 'sitecustomize.py').write_text(
        'import os, signal, sys\n'
        'real_replace = os.replace\n'
        'def replace(source, target):\n'
        '    real_replace(source, target)\n'
        "    if '.progress' in str(target):\n"
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        "if 'KILL' in os.environ:\n"
        '    os.replace = replace\n'
        '    sys.path.append(os.getcwd())\n'
        '    from pocket import datasets\n'
        '    datasets.PIECE_SIZE = 10000\n'
        '    datasets.SAVE_EVERY = -1\n', encoding='utf-8')
    args = ['prepare/tinystories.py', f'--input={tmp_path}', '--vocab_size=270']
    project.run(*args, status=-9, env={'PYTHONPATH': str(tmp_path), 'KILL': '1'})
    folder = project.root / 'data' / 'tinystories'
    names = sorted(path.name for path in folder.iterdir())
    assert names == ['.lock', '.progress.json', 'train.bin.part', 'val.bin.part']

    assert 'resuming after' in project.run(*args)[0]
    assert 'resuming' not in project.run(*args, '--data_dir=fresh')[0]
    fresh = project.root / 'fresh' / 'tinystories'
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (folder / name).read_bytes() == (fresh / name).read_bytes()


# --- fineweb_edu.py -------------------------------------------------------------------------------

@pytest.fixture
def parquet_files(tmp_path):
    """(paths of two .parquet files, the 300 texts in them)."""
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    texts = [toy_text(100, seed=i % 280) for i in range(300)]
    paths = []
    for shard in range(2):
        path = tmp_path / f'00{shard}_00000.parquet'
        table = pa.table({'id': list(range(150)), 'text': texts[shard * 150:][:150]})
        pq.write_table(table, path, row_group_size=40)
        paths.append(path)
    return paths, texts


FINEWEB = ['prepare/fineweb_edu.py', '--tokenizer=byte', '--val_every=20']


def test_fineweb_edu_from_a_server_that_cuts(project, server, parquet_files):
    paths, texts = parquet_files
    Handler.content = {path.name: path.read_bytes() for path in paths}
    Handler.cuts = {'001_00000.parquet': 2}
    args = [*FINEWEB, '--shards=2', f'--endpoint={server}']
    assert 'could not download 001_00000.parquet' in project.fails(*args)
    out, _ = project.run(*args)
    assert 'resuming after' in out
    documents = read_documents(project.root / 'data' / 'fineweb_edu')
    assert sorted(documents['train'] + documents['val']) == sorted(texts)
    assert documents['val'] == [text for text in texts if zlib.crc32(text.encode()) % 20 == 0]
    assert not set(documents['val']) & set(documents['train'])
    folder = '/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT'
    path, _ = Handler.requests[0]
    assert path == f'{folder}/000_00000.parquet'

    # Local copies make the same dataset
    local = [f'--input={path}' for path in paths]
    project.run(*FINEWEB, *local, '--data_dir=local')
    from_copies = project.root / 'local' / 'fineweb_edu' / 'train.bin'
    downloaded = project.root / 'data' / 'fineweb_edu' / 'train.bin'
    assert from_copies.read_bytes() == downloaded.read_bytes()


def test_fineweb_edu_bad_files(project, parquet_files):
    import pyarrow as pa
    from pyarrow import parquet as pq
    paths, _ = parquet_files
    local = [f'--input={path}' for path in paths]
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    assert '001_00000.parquet' in project.fails(*FINEWEB, *local)
    pq.write_table(pa.table({'words': ['x']}), paths[1])
    assert 'a column named text' in project.fails(*FINEWEB, *local)
    assert 'cannot read nowhere' in project.fails(*FINEWEB, '--input=nowhere')


def test_fineweb_edu_without_pyarrow(project, tmp_path):
    (tmp_path / 'pyarrow.py').write_text('raise ImportError', encoding='utf-8')
    err = project.fails('prepare/fineweb_edu.py', env={'PYTHONPATH': str(tmp_path)})
    assert 'pip install pyarrow' in err
