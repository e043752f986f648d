"""Batches: each window once an epoch, a pure function of (seed, step), the same for any number of ranks. And files that are wrong."""
import json

import numpy as np
import pytest
import torch
from conftest import make_toy

from pocket import data
from pocket.data import Stream, load_meta, permute
from pocket.errors import UserError


def stream(tmp_path, ids, block_size, vocab_size=None, split='train', dtype='uint16', batch_size=3):
    np.asarray(ids).astype('<' + {'uint16': 'u2', 'uint32': 'u4'}[dtype]).tofile(tmp_path / f'{split}.bin')
    meta = {'vocab_size': vocab_size or int(np.max(ids)) + 1, 'dtype': dtype, 'counts': {split: len(ids)}}
    return Stream(tmp_path, meta, split, block_size, batch_size)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection_that_shuffles(n):
    seen = []
    for key in (0, 1, 12345):
        order = permute(np.arange(n), n, key)
        assert sorted(order.tolist()) == list(range(n))
        seen.append(order.tolist())
    if n >= 16:
        assert seen[0] != seen[1] != seen[2] != list(range(n))
        assert abs(np.corrcoef(np.arange(n), seen[0])[0, 1]) < 5 / n ** 0.5


@pytest.mark.parametrize('n, T', [(1000, 10), (1003, 10), (25, 8), (17, 8), (9, 8)])
def test_an_epoch_visits_every_window_once(tmp_path, n, T):
    s = stream(tmp_path, np.arange(n), T)
    windows, cuts = max(1, n // T - 1), set()
    for epoch in range(4):
        starts = s.starts(7, epoch * windows, windows).astype(int)
        assert len(set(starts)) == windows and starts.min() >= 0 and starts.max() + T < n
        assert len(set(starts % T)) == 1  # without overlap
        cuts.add(tuple(sorted(starts)))
    assert len(cuts) > 1 or n < 2 * T + 2  # cut elsewhere in each epoch
    both = s.starts(7, 0, 2 * windows)
    assert both.tolist() == s.starts(7, 0, windows).tolist() + s.starts(7, windows, windows).tolist()


def test_batches_are_pure_and_ranks_share_them(tmp_path):
    s = stream(tmp_path, np.arange(1000) % 50, 10)

    def step(i, seed=1, **kwargs):
        return torch.cat([torch.stack((b['idx'], b['targets'])) for b in s.batches(seed, i, 4, **kwargs)], dim=1)
    first = step(5)
    assert first.shape == (2, 12, 10) and first.dtype == torch.int64
    assert torch.equal(first[0, :, 1:], first[1, :, :-1])
    step(9)
    assert torch.equal(step(5), first) and not torch.equal(step(6), first) and not torch.equal(step(5, seed=2), first)
    for world in (2, 4):
        rows = torch.cat([step(5, rank=r, world=world)[0] for r in range(world)])
        assert sorted(rows.tolist()) == sorted(first[0].tolist())


@pytest.mark.parametrize('n, T', [(1000, 10), (1001, 10), (1009, 10), (7, 10), (2, 10), (11, 10)])
def test_evaluation_sees_every_target_once(tmp_path, n, T):
    s = stream(tmp_path, np.arange(n), T, split='val')
    batches = list(s.eval_batches())
    targets = torch.cat([b['targets'].flatten() for b in batches])
    assert targets.tolist() == list(range(1, n))
    assert all(torch.equal(b['idx'] + 1, b['targets']) for b in batches)


def test_large_files_are_mapped_and_give_the_same(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 70_000, 5000)
    whole = stream(tmp_path, ids, 16, dtype='uint32')
    monkeypatch.setattr(data, 'IN_MEMORY', 100)
    mapped = stream(tmp_path, ids, 16, dtype='uint32')
    assert mapped.loaded is None and whole.loaded is not None and whole.loaded.max() > 65_536
    for a, b in zip(list(whole.batches(0, 3, 2)) + list(whole.eval_batches()), list(mapped.batches(0, 3, 2)) + list(mapped.eval_batches())):
        assert torch.equal(a['idx'], b['idx']) and torch.equal(a['targets'], b['targets'])
    lengths = np.arange(70_000)
    assert mapped.count_bytes(lengths) == int(ids[1:].sum())


def test_ids_outside_the_vocabulary(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='train.bin has id 49, but the vocabulary of meta.json ends at 48'):
        stream(tmp_path, np.arange(50), 4, vocab_size=49)
    monkeypatch.setattr(data, 'IN_MEMORY', 1)  # a mapped file is checked as it is read
    with pytest.raises(UserError, match='train.bin has id'):
        for i in range(20):
            list(stream(tmp_path, np.arange(50), 4, vocab_size=40).batches(0, i, 1))


def test_files_that_do_not_match(tmp_path):
    folder = make_toy(tmp_path)
    meta = load_meta(folder)
    with pytest.raises(UserError, match='only 5,000 ids, but --block_size=5000 needs 5,001'):
        Stream(folder, meta, 'train', 5000)
    (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-1])
    with pytest.raises(UserError, match='9,999 bytes, but meta.json speaks of 5,000 ids of 2 bytes'):
        Stream(folder, meta, 'train', 8)
    (folder / 'train.bin').unlink()
    with pytest.raises(UserError, match='cannot read .*train.bin'):
        Stream(folder, meta, 'train', 8)


@pytest.mark.parametrize('text, said', [
    ('', 'JSONDecodeError'), ('triples', 'wrong at kind'), ('[]', 'TypeError'), ('{"format": 1}', "KeyError: 'kind'"), ('[' * 100_000, 'RecursionError'), (None, 'wrong at vocab_size'),
    ('\xff', 'not a dataset')])
def test_bad_meta(tmp_path, text, said):
    folder = make_toy(tmp_path, vocab_size='many') if text != 'triples' else make_toy(tmp_path, kind='triples')
    if text not in (None, 'triples'):
        (folder / 'meta.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=said):
        load_meta(folder)


def test_newer_format_is_refused(tmp_path):
    with pytest.raises(UserError, match='format 99, this version reads up to 1'):
        load_meta(make_toy(tmp_path, format=99))
    assert json.loads((tmp_path / 'data' / 'toy' / 'meta.json').read_text(encoding='utf-8'))['format'] == 99
