"""prepare/text.py, tinystories.py and fineweb_edu.py: every form of input, stops and cut connections, and input that is wrong."""
import http.server
import json
import os
import random
import shutil
import sys
import threading
import zlib

import numpy as np
import pytest
from conftest import SHARED, Project, toy_text

from pocket import datasets as corpus
from pocket.errors import UserError
from pocket.files import lock
from pocket.tokenizer import ByteTokenizer, make_tokenizer, tokenizer_from_dict


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone')


def load(folder):
    """meta.json, the tokenizer in it, and {split: ids} of a dataset that must be whole and tidy."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    ids = {split: np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in meta['counts']}
    assert meta['counts'] == {split: len(a) for split, a in ids.items()}
    assert not list(folder.glob('*.tmp')) and not (folder / '.progress.json').exists()
    return meta, tokenizer_from_dict(meta['tokenizer']), ids


def documents(folder):
    """{split: list of texts} of a token stream; every one has its end."""
    _, tok, ids = load(folder)
    parts = {split: [tok.decode(d.tolist()) for d in np.split(a, np.flatnonzero(a == tok.eos_id) + 1)] for split, a in ids.items()}
    assert all(p.pop() == '' for p in parts.values())
    return parts


# --- reading ------------------------------------------------------------------------------------------------------------------

def test_blocks_know_line_ends_and_the_place_of_a_bad_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'PIECE', 3)  # so that blocks end inside of characters and of line ends
    path, rng = tmp_path / 'x.txt', random.Random(0)
    for _ in range(150):
        good = ''.join(rng.choices('ab é日🙂\r\n', k=rng.randint(0, 25))).encode()
        path.write_bytes(rng.choice([b'', b'\xef\xbb\xbf']) + good)
        text = good.decode().replace('\r\n', '\n').replace('\r', '\n')
        assert ''.join(corpus.read_blocks(path)) == text
        assert list(corpus.read_lines(path)) == (text.split('\n') if text[-1:] != '\n' else text.split('\n')[:-1]) if text else True
        bad = path.read_bytes() + rng.choice([b'\xff', b'\xe6\x97', b'\xc3('])
        path.write_bytes(bad + rng.choice([b'', b'more and more']))
        with pytest.raises(UnicodeDecodeError) as at:
            path.read_bytes().decode('utf-8')
        with pytest.raises(UserError, match=f'x.txt is not UTF-8 text: byte {bad[at.value.start]:#04x} at position {at.value.start:,};'):
            list(corpus.read_blocks(path))


def test_long_documents_are_cut_where_it_changes_nothing(tmp_path, monkeypatch):
    rng = random.Random(1)
    text = ''.join(rng.choice(['word', 'Wörter', "don't", '日本', '42', '.', ',']) + rng.choice([' ', ' ', '  ', '\n', '\n\n', ' \n', '']) for _ in range(6000))
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    monkeypatch.setattr(corpus, 'PIECE', 500)
    pieces = list(corpus.read_documents(tmp_path / 'x.txt'))
    assert ''.join(t for t, _ in pieces) == text and [e for _, e in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 20 and max(len(t) for t, _ in pieces) <= 1000
    for name in ('bpe', 'sentencepiece', 'gpt2', 'cl100k_base') if 'TIKTOKEN_CACHE_DIR' in os.environ else ('bpe', 'sentencepiece'):
        tok = make_tokenizer(name, [text], 500)
        assert [i for t, _ in pieces for i in tok.encode(t)] == tok.encode(text)
    (tmp_path / 'x.txt').write_text('x' * 5000, encoding='utf-8')  # no good place
    assert ''.join(t for t, _ in corpus.read_documents(tmp_path / 'x.txt')) == 'x' * 5000


@pytest.mark.parametrize('piece', [7, 2**20])
def test_separated_documents(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(corpus, 'PIECE', piece)  # 7: a separator is spread over blocks
    (tmp_path / 'x.txt').write_text('One two\nthree four.\n<|end|>\n\n<|end|>\nFive\n\nsix seven eight nine.\n<|end|>\nTen<|end|>\n', encoding='utf-8')
    docs, start = [], True
    for text, ends in corpus.read_documents(tmp_path / 'x.txt', '<|end|>'):
        docs = docs + [text] if start else docs[:-1] + [docs[-1] + text]
        start = ends
    assert start and docs == ['One two\nthree four.', 'Five\n\nsix seven eight nine.', 'Ten']


# --- text.py ------------------------------------------------------------------------------------------------------------------

def test_one_document_is_cut_by_characters(project, tmp_path):
    (tmp_path / 'novel.txt').write_bytes(b'\xef\xbb\xbf' + toy_text(5000).replace('\n', '\r\n').encode())
    out, err = project.run('prepare/text.py', f'--input={tmp_path / "novel.txt"}', '--tokenizer=char')
    meta, tok, ids = load(project.root / 'data' / 'mine')
    assert tok.decode(ids['train'].tolist()) == toy_text(5000)[:4500] and tok.decode(ids['val'].tolist()) == toy_text(5000)[4500:]
    assert '1 document of 5,000' in out and 'first 90% / last 10%' in out and out.endswith('next: python train.py --dataset=mine\n') and not err
    out, _ = project.run('prepare/text.py', f'--input={tmp_path / "novel.txt"}', '--vocab_size=280', '--val=0.2', '--data_dir=there', '--name=b')
    meta, tok, ids = load(project.root / 'there' / 'b')
    assert meta['vocab_size'] == tok.vocab_size == 280 and out.endswith('--dataset=b --data_dir=there\n') and 'bpe, uint16' in out
    assert tok.encode(toy_text(5000)[:4000]) == ids['train'].tolist() and tok.encode(toy_text(5000)[4000:]) + [tok.eos_id] == ids['val'].tolist()


def test_documents_of_every_kind_go_to_one_side(project, tmp_path):
    rng, root = random.Random(2), tmp_path / 'in'
    made = [f'{i} ' + toy_text(rng.randint(50, 300), seed=i) for i in range(120)]
    (root / 'deep' / '.git').mkdir(parents=True)
    for i, suffix in zip(range(30), ['.txt', '.md', '.py'] * 10):
        (root / ('deep' if i % 2 else '') / f'{i}{suffix}').write_text(made[i], encoding='utf-8', newline='')
    (root / 'a.jsonl').write_text(''.join(json.dumps({'n': i, 'text': made[i]}) + '\n\n' for i in range(30, 80)) + '{"text": " "}', encoding='utf-8')
    (root / 'b.CSV').write_text('n,text\n' + ''.join(f'{i},"{made[i]}"\n' for i in range(70, 120)), encoding='utf-8')  # ten are there twice
    (root / '.hidden.txt').write_text('no', encoding='utf-8')
    (root / 'deep' / '.git' / 'no.txt').write_text('no', encoding='utf-8')
    (root / 'image.png').write_bytes(b'\0\xff')
    out, _ = project.run('prepare/text.py', '--input=in', f'--input={root / "*.CSV"}', '--tokenizer=byte', cwd=tmp_path)
    parts = documents(project.root / 'data' / 'mine')
    assert sorted(parts['train'] + parts['val']) == sorted(made) and 'left out: 10 doubles' in out and '120 documents' in out
    assert 0.05 < sum(map(len, parts['val'])) / sum(map(len, made)) <= 0.1
    folder = tmp_path / 'in2'
    shutil.move(root, folder)
    (folder / 'a.jsonl').rename(folder / 'z.jsonl')  # which side a document goes to depends on no name and no order
    project.run('prepare/text.py', f'--input={folder}', '--tokenizer=byte', '--name=again')
    assert sorted(documents(project.root / 'data' / 'again')['val']) == sorted(parts['val'])


def test_a_char_tokenizer_knows_what_only_val_has(project, tmp_path):
    (tmp_path / 'x.txt').write_text('abc ' * 50 + 'xyz', encoding='utf-8')
    project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=char')
    assert load(project.root / 'data' / 'mine')[1].chars == ' abcxyz'


@pytest.mark.skipif(not SHARED.is_dir(), reason='the encodings are not beside this checkout')
def test_vocabularies_over_65536_take_four_bytes(project, tmp_path):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')
    text = toy_text(2000) + ' <|endoftext|> przykład 日本語 ' * 20
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    out, _ = project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=cl100k_base', env={'TIKTOKEN_CACHE_DIR': str(tmp_path / 'cache')})
    meta = json.loads((project.root / 'data' / 'mine' / 'meta.json').read_text(encoding='utf-8'))
    ids = [np.fromfile(project.root / 'data' / 'mine' / f'{s}.bin', dtype='<u4') for s in ('train', 'val')]
    import tiktoken
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    encoding = tiktoken.get_encoding('cl100k_base')
    assert encoding.decode(ids[0].tolist()) + encoding.decode(ids[1][:-1].tolist()) == text and ids[1][-1] == encoding.eot_token == 100257
    assert meta['dtype'] == 'uint32' and max(a.max() for a in ids) > 65535 and 'uint32: more than 65,536 take 4 bytes an id' in out


def test_pairs(project, tmp_path):
    rows = [(f'question {i // 2}', f'answer, {i} "well"') for i in range(60)] + [('question 3', 'answer, 6 "well"'), ('', 'nobody asked')]
    (tmp_path / 'a.csv').write_text('no,target,source\n' + ''.join('1,"{}",{}\n'.format(t.replace('"', '""'), s) for s, t in rows[:20]), encoding='utf-8')
    (tmp_path / 'b.tsv').write_text(''.join(f'{s}\t{t}\n' for s, t in rows[20:40]), encoding='utf-8')
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps({'source': s, 'target': t}) + '\n' for s, t in rows[40:]), encoding='utf-8')
    out, _ = project.run('prepare/text.py', *(f'--input={tmp_path / f}' for f in ('a.csv', 'b.tsv', 'c.jsonl')), '--pairs', '--tokenizer=byte', '--name=talk')
    meta, tok, ids = load(project.root / 'data' / 'talk')
    assert meta['kind'] == 'pairs' and list(tok.special_tokens) == ['pad', 'bos', 'eos'] and '60 pairs; 2 were' in out and 'b.tsv' in out
    found = {}
    for split, bin in ids.items():
        sides = [a.tolist() for a in np.split(bin, np.fromfile(project.root / 'data' / 'talk' / f'{split}.idx', dtype='<i8')[1:-1])]
        assert all(t[-1] == tok.eos_id and tok.eos_id not in s for s, t in zip(sides[::2], sides[1::2]))
        found[split] = [(tok.decode(s), tok.decode(t)) for s, t in zip(sides[::2], sides[1::2])]
        assert meta['pairs'][split] == len(found[split])
    assert sorted(found['train'] + found['val']) == sorted(rows[:60]) and 4 <= len(found['val']) <= 6
    assert not {s for s, _ in found['train']} & {s for s, _ in found['val']}
    assert 'line 2 has no text in q and target' in project.fails('prepare/text.py', f'--input={tmp_path / "a.csv"}', '--pairs', '--field=q,target')
    (tmp_path / 'b.tsv').write_text('hello\tyou\n\nhello\n', encoding='utf-8')
    assert 'line 3 has no text in source and target' in project.fails('prepare/text.py', f'--input={tmp_path / "b.tsv"}', '--pairs')
    (tmp_path / 'b.tsv').write_text('hello\tyou\n', encoding='utf-8')
    assert 'too few' in project.fails('prepare/text.py', f'--input={tmp_path / "b.tsv"}', '--pairs', '--tokenizer=byte')


BAD = {  # what to type: what is said. Files are made below
    '': 'say what to read: --input=FILE', '--input=nowhere.txt': 'there is no file nowhere.txt', '--input=*.foo': 'there is no file *.foo',
    '--input=empty': 'there is no .txt, .md, .py, .jsonl, .csv, .tsv file in empty', '--input=void.txt': 'only 0 characters',
    '--input=binary.txt': 'binary.txt looks binary: byte 0x00 at position 3', '--input=latin.txt': 'latin.txt is not UTF-8 text: byte 0xe9 at position 3',
    '--input=json.jsonl': 'json.jsonl, line 3 is not JSON', '--input=field.jsonl': 'field.jsonl, line 2 has no text in text: {\'words\': \'x\'}; name what to read with --field',
    '--input=field.jsonl --field=text,words': 'field must be one name', '--input=good.txt --pairs --field=q': 'field must be two names',
    '--input=table.csv': "table.csv, line 2 has no text in text: {'a': '1', 'b': '2'}; name what", '--input=quote.csv': 'quote.csv, line 3 is not .csv',
    '--input=good.txt --vocab_size=256': '256', '--input=good.txt --tokenizer=gpt5': 'sentencepiece', '--input=good.txt --val=1': 'between 0 and 1, got 1.0',
    '--input=good.txt --name=a/b': "got 'a/b'", '--input=good.txt --pairs': 'good.txt',
}


@pytest.mark.parametrize('typed', BAD)
def test_bad_input(project, tmp_path, typed):
    (tmp_path / 'empty').mkdir()
    for name, content in {'void.txt': b' \n', 'binary.txt': b'ab\n\0\0', 'latin.txt': 'caf\xe9'.encode('latin-1'), 'json.jsonl': b'{"text": "x"}\n\n{"text": \n',
                          'field.jsonl': b'{"text": "x"}\n{"words": "x"}\n', 'table.csv': b'a,b\n1,2\n', 'quote.csv': b'text\nx\n"abc', 'good.txt': b'good text ' * 30}.items():
        (tmp_path / name).write_bytes(content)
    err = project.fails('prepare/text.py', *typed.split(), cwd=tmp_path)
    assert BAD[typed] in err
    assert not list((project.root / 'data').glob('*/*'))


def test_two_at_once_are_kept_apart(project, tmp_path):
    (tmp_path / 'x.txt').write_text(toy_text(100), encoding='utf-8')
    (project.root / 'data' / 'mine').mkdir(parents=True)
    with lock(project.root / 'data' / 'mine'):
        assert 'another process is preparing' in project.fails('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=byte')
    project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=byte')


# --- corpora ------------------------------------------------------------------------------------------------------------------

def test_a_stop_changes_nothing(tmp_path, monkeypatch, capsys):
    """Stopped again and again at any place, with and without what was just written; the tokenizer sees little twice."""
    monkeypatch.setattr(corpus, 'PIECE', 300)
    monkeypatch.setattr(corpus, 'SAVE_EVERY', -1)
    monkeypatch.setattr(corpus.os, 'cpu_count', lambda: 2)
    rng, stop_at = random.Random(3), None
    docs = [(rng.choice(['train', 'train', 'val']), toy_text(rng.randint(1, 400), seed=i), i % 5 > 0) for i in range(200)]
    shards = [docs[:90], docs[90:90], docs[90:]]

    def reader(shard):
        def read():
            for doc in shard:
                if doc is docs[stop_at or 0] and stop_at:
                    raise KeyboardInterrupt
                yield doc
        return read

    def prepare(folder, source):
        corpus.write_corpus(folder, ByteTokenizer(), [reader(s) for s in shards], source, 'as given')
        return [(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')]
    whole = prepare(tmp_path / 'whole', {})
    joined = {s: [t.encode() + b'\0' * e for split, t, e in docs if split == s] for s in ('train', 'val')}
    assert [np.frombuffer(b, dtype='<u2').clip(max=256) % 256 for b in whole][0].tobytes() == np.frombuffer(b''.join(joined['train']), dtype=np.uint8).astype('<u2').tobytes()
    folder, begun = tmp_path / 'stopped', []
    for stop in (3, 60, 61, 90, 150, 199, 199):
        stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, {})
        begun.append('going on after' in capsys.readouterr().out)
        assert not (folder / 'meta.json').exists() and not (folder / 'train.bin').exists()
        with open(folder / 'train.bin.part', 'ab') as f:
            f.write(b'written, but never counted')
    stop_at = None
    assert prepare(folder, {}) == whole and begun == [False, False] + [True] * 5 and load(folder)
    stop_at = 150
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, {'source': 'another text'})
    os.truncate(folder / 'val.bin.part', 5)  # not what .progress.json speaks of
    stop_at = None
    capsys.readouterr()
    assert prepare(folder, {'source': 'another text'}) == whole and 'going on' not in capsys.readouterr().out
    for damaged in ('', '[]', '{"key": 1}', '{"counts": 5'):
        (folder / '.progress.json').write_text(damaged, encoding='utf-8')
        assert prepare(folder, {}) == whole and 'going on' not in capsys.readouterr().out


STORIES = {f'TinyStoriesV2-GPT4-{split}.txt': ''.join(toy_text(150, seed=i) + '\n<|endoftext|>\n' for i in range(*span)).encode()
           for split, span in {'train': (0, 2000), 'valid': (2000, 3000)}.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files in `content` by the last part of their addresses; each address in `cuts` loses its connection so many times."""
    content, cuts, seen = {}, {}, []

    def do_GET(self):
        name, have = self.path.split('/')[-1], int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.seen.append((self.path, have))
        if name not in self.content:
            return self.send_error(404)
        body = self.content[name][have:]
        self.send_response(206 if have else 200)
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
    Handler.content, Handler.cuts, Handler.seen = dict(STORIES), {}, []
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_tinystories_from_a_server_that_cuts(project, server):
    train, valid = STORIES
    Handler.cuts = {train: 1, valid: 2}
    err = project.fails('prepare/tinystories.py', '--tokenizer=byte', f'--endpoint={server}')
    folder = project.root / 'data' / 'tinystories'
    assert f'could not download {valid}' in err and '--input=FOLDER' in err and sorted(p.name for p in folder.iterdir()) == [train, valid + '.part', valid + '.part.tag']
    assert (folder / train).read_bytes() == STORIES[train]
    out, _ = project.run('prepare/tinystories.py', '--tokenizer=byte', env={'HF_ENDPOINT': server})
    assert documents(folder) == {split: [d.strip('\n') for d in content.decode().split('<|endoftext|>')[:-1]] for split, content in zip(('train', 'val'), STORIES.values())}
    starts = [have for _, have in Handler.seen]  # the train file in two goes, the other in three, the last of them in another process
    assert len(starts) == 5 and starts[0] == starts[2] == 0 < starts[1] and 0 < starts[3] <= starts[4]
    assert Handler.seen[0][0] == f'/datasets/roneneldan/TinyStories/resolve/main/{train}' and 'tok/s' in out
    assert 'cannot read' in project.fails('prepare/tinystories.py', '--input=nowhere')
    project.run('prepare/tinystories.py', '--tokenizer=byte', '--endpoint=http://127.0.0.1:9')  # what is there needs no network
    assert 'ConnectionError' in project.fails('prepare/tinystories.py', '--endpoint=http://127.0.0.1:9', '--data_dir=other')


@pytest.mark.skipif(sys.platform == 'win32', reason='needs SIGKILL')
def test_tinystories_goes_on_after_a_kill(project, tmp_path):
    for name, content in STORIES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'sitecustomize.py').write_text(  # small pieces, saved each time; the first save is the last thing this process does
        "import os, signal, sys\nreal = os.replace\nsys.path.append('prepare')\n"
        "def replace(a, b):\n    real(a, b)\n    os.kill(os.getpid(), signal.SIGKILL) if '.progress' in str(b) else None\n"
        "if 'KILL' in os.environ:\n    os.replace = replace\n    import corpus\n    corpus.PIECE, corpus.SAVE_EVERY = 10000, -1\n", encoding='utf-8')
    args = ['prepare/tinystories.py', f'--input={tmp_path}', '--vocab_size=270']
    project.run(*args, status=-9, env={'PYTHONPATH': str(tmp_path), 'KILL': '1'})
    folder = project.root / 'data' / 'tinystories'
    assert sorted(p.name for p in folder.iterdir() if p.name != '.lock') == ['.progress.json', 'train.bin.part', 'val.bin.part']
    assert 'going on after' in project.run(*args)[0]
    assert 'going on' not in project.run(*args, '--data_dir=fresh')[0]
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (folder / name).read_bytes() == (project.root / 'fresh' / 'tinystories' / name).read_bytes()


def test_fineweb_edu(project, server, tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = [toy_text(100, seed=i % 280) for i in range(300)]
    for shard in range(2):
        path = tmp_path / f'00{shard}_00000.parquet'
        part = texts[shard * 150:][:150]
        pq.write_table(pa.table({'id': list(range(150)), 'text': part}), path, row_group_size=40)
        Handler.content[path.name] = path.read_bytes()
    Handler.cuts = {'001_00000.parquet': 2}
    args = ['prepare/fineweb_edu.py', '--tokenizer=byte', '--val_every=20']
    assert 'could not download 001_00000.parquet' in project.fails(*args, '--shards=2', f'--endpoint={server}')
    out, _ = project.run(*args, '--shards=2', f'--endpoint={server}')
    parts = documents(project.root / 'data' / 'fineweb_edu')
    assert 'going on after' in out and sorted(parts['train'] + parts['val']) == sorted(texts)
    assert parts['val'] == [t for t in texts if zlib.crc32(t.encode()) % 20 == 0] and not set(parts['val']) & set(parts['train'])
    assert Handler.seen[0][0] == '/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet'
    both = [f'--input={tmp_path / f"00{i}_00000.parquet"}' for i in range(2)]
    project.run(*args, *both, '--data_dir=local')
    assert (project.root / 'local' / 'fineweb_edu' / 'train.bin').read_bytes() == (project.root / 'data' / 'fineweb_edu' / 'train.bin').read_bytes()
    path.write_bytes(path.read_bytes()[:-9])
    assert '001_00000.parquet' in project.fails(*args, *both)
    pq.write_table(pa.table({'words': ['x']}), path)
    assert 'a column named text' in project.fails(*args, *both)
    assert 'cannot read nowhere' in project.fails(*args, '--input=nowhere')


def test_without_pyarrow(project, tmp_path):
    (tmp_path / 'pyarrow.py').write_text('raise ImportError', encoding='utf-8')
    assert 'pip install pyarrow' in project.fails('prepare/fineweb_edu.py', env={'PYTHONPATH': str(tmp_path)})
