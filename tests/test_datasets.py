"""
pocket/datasets.py: reading text in pieces, and writing datasets, also when that is interrupted.

Run it alone: pytest -n 0 tests/test_datasets.py

How it chooses validation data: test_prepare_text.py, test_prepare_pairs.py, test_properties.py.
"""
import json
import os
import random

import numpy as np
import pytest
from conftest import toy_text
from prepared import pair_texts, read_dataset, read_pairs

from pocket import datasets
from pocket.errors import UserError
from pocket.template import ChatTemplate
from pocket.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer

# --- Reading --------------------------------------------------------------------------------------


def random_text_bytes(rng):
    """Some UTF-8 with every kind of line end and characters of one to four bytes."""
    return ''.join(rng.choices('ab é日🙂\r\n', k=rng.randint(0, 25))).encode()


def test_read_blocks_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'PIECE_SIZE', 3)   # blocks end within characters and line ends
    path = tmp_path / 'x.txt'
    rng = random.Random(0)
    for _ in range(150):
        content = random_text_bytes(rng)
        path.write_bytes(rng.choice([b'', b'\xef\xbb\xbf']) + content)   # a byte order mark or none
        text = content.decode().replace('\r\n', '\n').replace('\r', '\n')
        assert ''.join(datasets.read_blocks(path)) == text
        assert list(datasets.read_lines(path)) == text.removesuffix('\n').split('\n') or not text


def test_read_blocks_names_the_place_of_a_bad_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'PIECE_SIZE', 3)
    path = tmp_path / 'x.txt'
    rng = random.Random(0)
    for _ in range(150):
        start = rng.choice([b'', b'\xef\xbb\xbf']) + random_text_bytes(rng)
        bad = start + rng.choice([b'\xff', b'\xe6\x97', b'\xc3('])
        path.write_bytes(bad + rng.choice([b'', b'more and more']))
        with pytest.raises(UnicodeDecodeError) as error:
            path.read_bytes().decode('utf-8')
        position = error.value.start
        place = f'byte {bad[position]:#04x} at position {position:,};'
        with pytest.raises(UserError, match=f'x.txt is not UTF-8 text: {place}'):
            list(datasets.read_blocks(path))


def test_long_documents_are_cut_where_it_changes_no_ids(tmp_path, monkeypatch):
    rng = random.Random(1)
    words = ['word', 'Wörter', "don't", '日本', '42', '.', ',']
    spaces = [' ', ' ', '  ', '\n', '\n\n', ' \n', '']
    text = ''.join(rng.choice(words) + rng.choice(spaces) for _ in range(6000))
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    monkeypatch.setattr(datasets, 'PIECE_SIZE', 500)

    pieces = list(datasets.read_documents(tmp_path / 'x.txt'))
    assert ''.join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 20 and max(len(piece) for piece, _ in pieces) <= 1000

    names = ['bpe', 'sentencepiece']
    if 'TIKTOKEN_CACHE_DIR' in os.environ:
        names += ['gpt2', 'cl100k_base']
    for name in names:
        tok = make_tokenizer(name, [text], 500)
        ids = []
        for piece, _ in pieces:
            ids += tok.encode(piece)
        assert ids == tok.encode(text)


def test_long_document_without_a_good_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'PIECE_SIZE', 500)
    (tmp_path / 'x.txt').write_text('x' * 5000, encoding='utf-8')
    pieces = list(datasets.read_documents(tmp_path / 'x.txt'))
    assert ''.join(piece for piece, _ in pieces) == 'x' * 5000


@pytest.mark.parametrize('piece_size', [7, 2**20])   # 7: a separator is spread over blocks
def test_separated_documents(tmp_path, monkeypatch, piece_size):
    monkeypatch.setattr(datasets, 'PIECE_SIZE', piece_size)
    text = ('One two\nthree four.\n<|end|>\n\n<|end|>\nFive\n\nsix seven eight nine.\n<|end|>\n'
            'Ten<|end|>\n')
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    documents = ['']
    for piece, ends in datasets.read_documents(tmp_path / 'x.txt', '<|end|>'):
        documents[-1] += piece
        if ends:
            documents.append('')
    assert documents == ['One two\nthree four.', 'Five\n\nsix seven eight nine.', 'Ten', '']


# --- Writing --------------------------------------------------------------------------------------

def test_stream_of_texts_equals_stream_of_ids(tmp_path):
    tok = make_tokenizer('byte')
    texts = ['hello world', 'wörld']
    datasets.write_stream(tmp_path / 'texts', tok, *texts, {}, 'none')
    datasets.write_stream(tmp_path / 'ids', tok, *map(tok.encode, texts), {}, 'none')
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'texts' / name).read_bytes() == (tmp_path / 'ids' / name).read_bytes()
    _, _, ids = read_dataset(tmp_path / 'texts')
    assert [tok.decode(ids[split]) for split in ('train', 'val')] == texts


def test_pairs_of_texts_get_an_end_and_ids_are_kept(tmp_path):
    tok = make_tokenizer('byte', special_tokens=('pad', 'bos', 'eos'))
    splits = {'train': [('one', 'two'), ([1, 2], [3, tok.eos_id])], 'val': [('', 'x')], 'test': []}
    template = ChatTemplate(turn='{speaker}: {text}', user='U', assistant='B')
    datasets.write_pairs(tmp_path, tok, splits, {'source': 'made up'}, 'as given', template)
    meta, _, pairs = read_pairs(tmp_path)
    assert pair_texts(tok, pairs['train'][:1]) == [('one', 'two')]
    assert pairs['train'][1] == ([1, 2], [3, tok.eos_id])
    assert pair_texts(tok, pairs['val']) == [('', 'x')]
    assert pairs['test'] == []
    assert meta['chat'] == template.to_dict() and meta['source'] == 'made up'


@pytest.mark.parametrize('size, dtype', [(2**16, 'uint16'), (2**16 + 1, 'uint32')])
def test_large_vocabularies_never_wrap(tmp_path, capsys, size, dtype):
    tok = Tokenizer([b'x'] * size)
    tok.to_dict = lambda: {'kind': 'made up'}
    ids = np.array([0, size - 1], dtype=np.uint32)
    datasets.write_stream(tmp_path, tok, ids, ids, {}, 'half and half')
    assert np.fromfile(tmp_path / 'train.bin', dtype=dtype).tolist() == [0, size - 1]
    assert json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))['dtype'] == dtype
    assert dtype in capsys.readouterr().out


def test_failed_stream_and_pairs_leave_no_files(tmp_path):
    tok = make_tokenizer('char', ['abc'])
    datasets.write_stream(tmp_path, tok, 'abc', 'abc', {}, 'none')
    with pytest.raises(UserError, match="does not know 'x'.*--tokenizer=byte"):
        datasets.write_stream(tmp_path, tok, 'abc', 'xyz', {}, 'none')
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'.lock', 'train.bin', 'val.bin'}   # those of the first, but no dataset any more


# --- Interrupted corpora --------------------------------------------------------------------------

class Corpus:
    """200 made-up pieces in three shards; reading raises KeyboardInterrupt at piece stop_at."""

    def __init__(self):
        rng = random.Random(3)
        self.pieces = []
        for i in range(200):
            split = rng.choice(['train', 'train', 'val'])
            self.pieces.append((split, toy_text(rng.randint(1, 400), seed=i), i % 5 > 0))
        self.stop_at = None

    def shard(self, start, end):
        def read():
            for number in range(start, end):
                if number == self.stop_at:
                    raise KeyboardInterrupt
                yield self.pieces[number]
        return read

    def write(self, folder, source):
        shards = [self.shard(0, 90), self.shard(90, 90), self.shard(90, 200)]
        datasets.write_corpus(folder, ByteTokenizer(), shards, source, 'as given')
        return [(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')]

    def interrupt(self, folder, source, stop_at):
        self.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            self.write(folder, source)
        self.stop_at = None


@pytest.fixture
def corpus(monkeypatch):
    """A Corpus, written in small chunks on two threads, with its progress saved after each."""
    monkeypatch.setattr(datasets, 'PIECE_SIZE', 300)
    monkeypatch.setattr(datasets, 'SAVE_EVERY', -1)
    monkeypatch.setattr(datasets.os, 'cpu_count', lambda: 2)
    return Corpus()


def test_corpus_is_written_in_order(corpus, tmp_path):
    corpus.write(tmp_path, {})
    _, tok, ids = read_dataset(tmp_path)
    for split in ('train', 'val'):
        expected = []
        for piece_split, text, ends in corpus.pieces:
            if piece_split == split:
                expected += tok.encode(text)
                if ends:
                    expected.append(tok.eos_id)
        assert ids[split].tolist() == expected


def test_interrupted_corpus_resumes(corpus, tmp_path, capsys):
    """Interrupted again and again at any place, then to its end: the same files, and little is done twice."""
    whole = corpus.write(tmp_path / 'whole', {})
    folder = tmp_path / 'interrupted'
    resumed = []
    capsys.readouterr()
    for stop_at in (3, 60, 61, 90, 150, 199, 199):
        corpus.interrupt(folder, {}, stop_at)
        resumed.append('resuming after' in capsys.readouterr().out)
        assert not (folder / 'meta.json').exists() and not (folder / 'train.bin').exists()
        with open(folder / 'train.bin.part', 'ab') as f:
            f.write(b'written, but never counted')
    assert resumed == [False, False, True, True, True, True, True]
    assert corpus.write(folder, {}) == whole
    assert 'resuming after' in capsys.readouterr().out
    assert read_dataset(folder)


def test_interrupted_corpus_starts_over_if_its_files_do_not_fit(corpus, tmp_path, capsys):
    whole = corpus.write(tmp_path / 'whole', {})
    folder = tmp_path / 'interrupted'
    corpus.interrupt(folder, {'source': 'a text'}, 150)
    os.truncate(folder / 'val.bin.part', 5)   # shorter than .progress.json says
    capsys.readouterr()
    assert corpus.write(folder, {'source': 'a text'}) == whole
    assert 'resuming' not in capsys.readouterr().out


def test_interrupted_corpus_starts_over_for_another_source(corpus, tmp_path, capsys):
    whole = corpus.write(tmp_path / 'whole', {})
    folder = tmp_path / 'interrupted'
    corpus.interrupt(folder, {'source': 'a text'}, 150)
    capsys.readouterr()
    assert corpus.write(folder, {'source': 'another text'}) == whole
    assert 'resuming' not in capsys.readouterr().out


def test_interrupted_corpus_starts_over_after_another_in_its_folder(corpus, tmp_path, monkeypatch):
    """The other one was interrupted, too: before it saved its progress, but after it wrote enough."""
    whole = corpus.write(tmp_path / 'whole', {})
    folder = tmp_path / 'interrupted'
    corpus.interrupt(folder, {'source': 'a text'}, 60)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, 'SAVE_EVERY', 1000)
        other = Corpus()
        other.pieces = [(split, text.upper(), ends) for split, text, ends in other.pieces]
        other.interrupt(folder, {'source': 'another text'}, 89)
    assert corpus.write(folder, {'source': 'a text'}) == whole


@pytest.mark.parametrize('damaged', ['', '[]', '{"key": 1}', '{"counts": 5'])
def test_damaged_progress_is_ignored(corpus, tmp_path, capsys, damaged):
    whole = corpus.write(tmp_path / 'whole', {})
    folder = tmp_path / 'damaged'
    corpus.interrupt(folder, {}, 150)
    (folder / '.progress.json').write_text(damaged, encoding='utf-8')
    capsys.readouterr()
    assert corpus.write(folder, {}) == whole
    assert 'resuming' not in capsys.readouterr().out
