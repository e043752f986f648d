"""Tiny Shakespeare with a tokenizer of its own, and The Verdict with GPT-2's."""
import json
import shutil

import numpy as np
import pytest
import tokenizers as hf
from conftest import CHECKOUT, SHARED, Project

from pocket import datasets
from pocket.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_dict

NO_NETWORK = {'HTTPS_PROXY': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'pocket übung')


def read(folder):
    """(meta, tokenizer, train ids, val ids) of a dataset."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    ids = [np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in ('train', 'val')]
    assert meta['counts'] == {'train': len(ids[0]), 'val': len(ids[1])}
    return meta, tokenizer_from_dict(meta['tokenizer']), *ids


def test_shakespeare_bpe(project, tmp_path):
    text = (CHECKOUT / 'configurator.py').read_text(encoding='utf-8') + 'ß' * 99  # ß is in the val part alone
    (tmp_path / 'in.txt').write_bytes(text.encode('utf-8'))
    args = ['prepare/shakespeare_bpe.py', f'--input={tmp_path / "in.txt"}', '--data_dir=d']
    folder = project.root / 'd' / 'shakespeare_bpe'
    for bad in (256, 0, -5):
        assert f'vocabulary of {bad} is too small' in project.fails(*args, f'--vocab_size={bad}')
    assert not folder.exists()
    out, _ = project.run(*args, '--vocab_size=600')
    meta, tok, train, val = read(folder)
    n = int(len(text) * 0.9)
    assert meta['vocab_size'] == tok.vocab_size == 600 and meta['dtype'] == 'uint16' and tok.special_tokens == {'eot': 599} and '600 in the' in out
    assert tok.decode(train) == text[:n] and tok.decode(val) == text[n:]
    assert meta['tokenizer'] == make_tokenizer('bpe', [text[:n]], 600).to_dict()  # val had no say in it
    theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert theirs.encode(text[:n]).ids == train.tolist() and theirs.encode('<|endoftext|>').ids == [599]
    lines = (folder / 'vocab.txt').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 600 and lines[65] == "    65  'A'" and lines[599] == '   599  <eot>' and lines[10] == "    10  '\\n'"


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real text and the files of tiktoken are not beside this checkout')
def test_verdict(project, tmp_path):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')
    project.run('prepare/verdict.py', f'--input={SHARED / "the-verdict.txt"}', env={**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'cache')})
    meta, tok, train, val = read(project.root / 'data' / 'verdict')
    text = (SHARED / 'the-verdict.txt').read_bytes().decode('utf-8')
    assert (len(train), len(val)) == (4612, 534) and tok.decode(train) + tok.decode(val) == text
    assert meta['tokenizer'] == {'kind': 'tiktoken', 'name': 'gpt2', 'specials': []} and meta['vocab_size'] == 50257
    assert meta['sha256'] == 'b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f'


def test_verdict_without_network(project, tmp_path):
    (tmp_path / 'in.txt').write_text('It is a short story. ' * 9, encoding='utf-8')
    env = {**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty')}
    assert 'gpt2' in (err := project.fails('prepare/verdict.py', f'--input={tmp_path / "in.txt"}', env=env)) and 'TIKTOKEN_CACHE_DIR' in err
    assert '--input=FILE' in project.fails('prepare/verdict.py', '--urls=http://127.0.0.1:9/x', env=env)
    assert not list((project.root / 'data').rglob('*.bin')) and not list((project.root / 'data').rglob('meta.json'))


def test_large_vocabularies_never_wrap(tmp_path, capsys):
    """65,536 ids fit into uint16, one more does not."""
    for size, dtype in ((2**16, 'uint16'), (2**16 + 1, 'uint32')):
        tok = Tokenizer([b'x'] * size)
        tok.to_dict = lambda: {'kind': 'made up'}
        ids = np.array([0, size - 1], dtype=np.uint32)
        datasets.write_stream(tmp_path / dtype, tok, ids, ids, {}, 'half and half')
        assert np.fromfile(tmp_path / dtype / 'train.bin', dtype=dtype).tolist() == [0, size - 1] and dtype in capsys.readouterr().out
        assert json.loads((tmp_path / dtype / 'meta.json').read_text(encoding='utf-8'))['dtype'] == dtype
