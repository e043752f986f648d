"""
Datasets: every window or pair once per epoch, batches that depend on (seed, step, rank) alone, and
files that are wrong.

Run it alone: pytest -n 0 tests/test_data.py
"""
import doctest
import json

import numpy as np
import pytest
import torch
from conftest import make_pairs, make_toy

from pocket import data
from pocket.data import Pairs, Stream, bucket_by_length, load_meta, permute
from pocket.errors import UserError


def test_examples_in_docstrings():
    assert doctest.testmod(data).attempted > 0
    assert doctest.testmod(data).failed == 0


# --------------------------------------------------------------------------------------------------
# The permutation

@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection_that_shuffles(n):
    orders = []
    for key in (0, 1, 12345):
        order = permute(np.arange(n), n, key).tolist()
        assert sorted(order) == list(range(n))
        orders.append(order)
    if n >= 16:
        assert orders[0] != orders[1] != orders[2] != list(range(n))
        correlation = np.corrcoef(np.arange(n), orders[0])[0, 1]
        assert abs(correlation) < 5 / n ** 0.5


def test_permute_of_one_number_is_its_place_in_the_whole():
    whole = permute(np.arange(1000), 1000, 7)
    for i in (0, 1, 500, 999):
        assert permute(np.array([i]), 1000, 7)[0] == whole[i]


# --------------------------------------------------------------------------------------------------
# Streams

NUMPY_DTYPES = {'uint16': '<u2', 'uint32': '<u4'}


def make_stream(folder, ids, block_size, vocab_size=None, split='train', dtype='uint16',
                batch_size=3):
    """Write a token file and open it as a Stream."""
    np.asarray(ids).astype(NUMPY_DTYPES[dtype]).tofile(folder / f'{split}.bin')
    if vocab_size is None:
        vocab_size = int(np.max(ids)) + 1
    meta = {'vocab_size': vocab_size, 'dtype': dtype, 'counts': {split: len(ids)}}
    return Stream(folder, meta, split, block_size, batch_size)


@pytest.mark.parametrize('n, block_size', [(1000, 10), (1003, 10), (25, 8), (17, 8), (9, 8)])
def test_an_epoch_visits_every_window_once(tmp_path, n, block_size):
    stream = make_stream(tmp_path, np.arange(n), block_size)
    per_epoch = max(1, n // block_size - 1)
    assert stream.epoch_size == per_epoch

    cuts = set()
    for epoch in range(4):
        starts = stream.window_starts(7, epoch * per_epoch, per_epoch).astype(int)
        assert len(set(starts)) == per_epoch
        assert starts.min() >= 0 and starts.max() + block_size < n
        assert len(set(starts % block_size)) == 1  # no overlap
        cuts.add(tuple(sorted(starts)))
    if n >= 2 * block_size + 2:  # else there is no room to shift them
        assert len(cuts) > 1

    # Starts that are asked for across an epoch's end are those of both epochs
    across = stream.window_starts(7, 0, 2 * per_epoch).tolist()
    first = stream.window_starts(7, 0, per_epoch).tolist()
    second = stream.window_starts(7, per_epoch, per_epoch).tolist()
    assert across == first + second


def test_batches_depend_on_seed_and_step_alone_and_ranks_share_them(tmp_path):
    stream = make_stream(tmp_path, np.arange(1000) % 50, 10)

    def rows(step, seed=1, **share):
        batches = stream.batches(seed, step, 4, **share)
        return torch.cat([torch.stack((b['idx'], b['targets'])) for b in batches], dim=1)

    first = rows(5)
    assert first.shape == (2, 12, 10) and first.dtype == torch.int64
    assert torch.equal(first[0, :, 1:], first[1, :, :-1])
    rows(9)  # a batch in between changes nothing
    assert torch.equal(rows(5), first)
    assert not torch.equal(rows(6), first)
    assert not torch.equal(rows(5, seed=2), first)

    for world_size in (2, 4):
        shares = [rows(5, rank=rank, world_size=world_size)[0] for rank in range(world_size)]
        assert sorted(torch.cat(shares).tolist()) == sorted(first[0].tolist())


@pytest.mark.parametrize('n, block_size', [(1000, 10), (1001, 10), (1009, 10), (7, 10), (2, 10),
                                           (11, 10)])
def test_evaluation_sees_every_target_once(tmp_path, n, block_size):
    stream = make_stream(tmp_path, np.arange(n), block_size, split='val')
    batches = list(stream.eval_batches())
    targets = torch.cat([batch['targets'].flatten() for batch in batches])
    assert targets.tolist() == list(range(1, n))
    assert len(targets) == stream.num_targets
    assert all(torch.equal(batch['idx'] + 1, batch['targets']) for batch in batches)


def test_large_files_are_mapped_and_give_the_same_batches(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 70_000, 5000)
    loaded = make_stream(tmp_path, ids, 16, dtype='uint32')
    monkeypatch.setattr(data, 'IN_MEMORY', 100)
    mapped = make_stream(tmp_path, ids, 16, dtype='uint32')
    assert mapped.loaded is None
    assert loaded.loaded.max() > 65_536

    def all_batches(stream):
        return list(stream.batches(0, 3, 2)) + list(stream.eval_batches())

    for a, b in zip(all_batches(loaded), all_batches(mapped)):
        assert torch.equal(a['idx'], b['idx'])
        assert torch.equal(a['targets'], b['targets'])
    assert mapped.count_bytes(np.arange(70_000)) == int(ids[1:].sum())


def test_counts_are_right_across_chunks(tmp_path, monkeypatch):
    ids = np.random.default_rng(1).integers(0, 40, 1000)
    stream = make_stream(tmp_path, ids, 16, vocab_size=50)
    monkeypatch.setattr(data, 'CHUNK', 77)
    assert stream.token_counts().tolist() == np.bincount(ids, minlength=50).tolist()
    assert stream.count_bytes(np.arange(50)) == int(ids[1:].sum())


def test_ids_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    message = 'train.bin has id 49, but the vocabulary of meta.json ends at 48'
    with pytest.raises(UserError, match=message):
        make_stream(tmp_path, np.arange(50), 4, vocab_size=49)

    monkeypatch.setattr(data, 'IN_MEMORY', 1)  # a mapped file is checked as it is read
    stream = make_stream(tmp_path, np.arange(50), 4, vocab_size=40)
    with pytest.raises(UserError, match='train.bin has id'):
        for step in range(20):
            list(stream.batches(0, step, 1))


# --------------------------------------------------------------------------------------------------
# Pairs

def write_pairs(folder, pairs, vocab_size=1000):
    """Write [(source ids, target ids)] as the split train and return its meta."""
    sides = [side for pair in pairs for side in pair]
    ids = [i for side in sides for i in side]
    np.array(ids, dtype='<u2').tofile(folder / 'train.bin')
    lengths = [len(side) for side in sides]
    np.cumsum([0, *lengths], dtype='<i8').tofile(folder / 'train.idx')
    return {'kind': 'pairs', 'vocab_size': vocab_size, 'dtype': 'uint16',
            'counts': {'train': len(ids)}, 'pairs': {'train': len(pairs)}}


def random_pairs(n, rng):
    """Lengths like those of chats: sources 52 ids on average (95% below 123), targets 20 (50)."""
    source_lengths = rng.gamma(1.9, 27, n)
    target_lengths = rng.gamma(1.5, 13, n)
    lengths = np.stack((source_lengths, target_lengths), axis=1).astype(int) + 1
    pairs = []
    for source_length, target_length in lengths:
        source = rng.integers(1, 1000, source_length).tolist()
        target = rng.integers(1, 1000, target_length).tolist()
        pairs.append((source, target))
    return pairs


def pairs_of(batch, start=0):
    """The (source, target) pairs of a GPT's batch, read back from its tensors.

    Of a Seq2Seq's batch the sources are empty, as idx does not have them.
    """
    pairs = []
    for row, targets in zip(batch['idx'].tolist(), batch['targets'].tolist()):
        target = [i for i in targets if i >= 0]
        first = next(place for place, i in enumerate(targets) if i >= 0)
        end = first + len(target)
        assert targets[first:end] == target  # in one piece
        assert row[first:end] == [start, *target[:-1]]
        pairs.append((row[:first], target))
    return pairs


def test_every_pair_is_in_one_batch_per_epoch_with_little_padding(tmp_path):
    pairs = random_pairs(8863, np.random.default_rng(0))
    meta = write_pairs(tmp_path, pairs)
    dataset = Pairs(tmp_path, meta, 'train', [0], 1000, 1000, batch_tokens=4096)
    assert dataset.padding < 0.1
    assert dataset.truncated == (0, 0)
    assert dataset.num_targets == sum(len(target) for _, target in pairs)

    seen = []
    computed = 0
    text = 0
    for step in range(dataset.steps_for(1, 1)):
        batch, = dataset.batches(7, step, 1)
        rows, src_width = batch['src'].shape
        columns = src_width + batch['idx'].size(1)
        assert rows * columns <= 4096 or rows == 1
        computed += rows * columns

        pads = batch.get('src_pad', torch.zeros(rows, dtype=torch.long)).tolist()
        for source, pad, (nothing, target) in zip(batch['src'].tolist(), pads, pairs_of(batch)):
            assert nothing == []
            assert source[:pad] == [0] * pad
            seen.append((source[pad:], target))
            text += len(source) - pad + len(target)
    assert sorted(seen) == sorted(pairs)
    assert abs(1 - text / computed - dataset.padding) < 1e-9


def test_batches_of_pairs_depend_on_seed_and_step_alone_and_ranks_share_them(tmp_path):
    pairs = random_pairs(8863, np.random.default_rng(0))
    meta = write_pairs(tmp_path, pairs)
    dataset = Pairs(tmp_path, meta, 'train', [0], 1000, 1000, batch_tokens=4096)
    again = Pairs(tmp_path, meta, 'train', [0], 1000, 1000, batch_tokens=4096)

    def targets(dataset, step, **share):
        batches = dataset.batches(7, step, 4, **share)
        return torch.cat([batch['targets'].flatten() for batch in batches])

    assert dataset.epoch_size < 400 * 4
    for step in (0, 5, 400):  # 400: a later epoch
        whole = targets(dataset, step)
        assert torch.equal(whole, targets(again, step))
        shares = [targets(again, step, rank=rank, world_size=2) for rank in range(2)]
        assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())

    evaluated = [target for batch in dataset.eval_batches() for _, target in pairs_of(batch)]
    assert sorted(evaluated) == sorted(target for _, target in pairs)
    assert dataset.count_bytes(np.full(1000, 3)) == 3 * dataset.num_targets


def test_long_pairs_lose_the_beginning_of_the_source_and_the_end_of_the_target(tmp_path):
    pairs = [
        (list(range(1, 41)), [50, 51, 999]),
        ([1, 2], [*range(100, 140), 999]),
        ([3], [999]),
    ]
    meta = write_pairs(tmp_path, pairs)

    # A GPT with 16 positions for both
    gpt = Pairs(tmp_path, meta, 'train', [0], 16)
    got = [pair for batch in gpt.eval_batches() for pair in pairs_of(batch)]
    want = [
        (list(range(28, 41)), [50, 51, 999]),
        ([1, 2], list(range(100, 114))),
        ([3], [999]),
    ]
    assert sorted(got) == sorted(want)
    assert gpt.truncated == (1, 1)

    # A Seq2Seq with 20 for the source and 8 for the target
    seq2seq = Pairs(tmp_path, meta, 'train', [0], 8, 20)
    assert seq2seq.source_lengths.tolist() == [20, 2, 1]
    assert seq2seq.target_lengths.tolist() == [3, 8, 1]
    source, _ = seq2seq.pair(seq2seq.tokens(), 0)
    assert source.tolist() == list(range(21, 41))


@pytest.mark.parametrize('src_block_size', [8, None])
def test_a_reply_prefix_is_given_and_not_learned(tmp_path, src_block_size):
    meta = write_pairs(tmp_path, [([1, 2], [50, 51, 7, 999]), ([3], [50, 51, 999])])
    dataset = Pairs(tmp_path, meta, 'train', [0, 50, 51], 16, src_block_size)
    learned = []
    for batch in dataset.eval_batches():
        learned += [i for i in batch['targets'].flatten().tolist() if i != data.NO_TARGET]
    assert sorted(learned) == [7, 999, 999]
    assert dataset.num_targets == 3
    assert dataset.count_bytes(np.full(1000, 2)) == 6

    with pytest.raises(UserError, match='do not begin as meta.json says'):
        Pairs(tmp_path, meta, 'train', [0, 50, 52], 16)


@pytest.mark.parametrize('n, d', [(1, 2), (2, 1), (1000, 2), (5000, 1)])
def test_no_bucket_exceeds_its_budget(n, d):
    lengths = np.random.default_rng(1).integers(1, 60, (n, d))
    buckets = bucket_by_length(lengths, 300)
    assert sorted(np.concatenate(buckets).tolist()) == list(range(n))
    for members in buckets:
        assert len(members) == 1 or len(members) * lengths[members].max(0).sum() <= 300


def test_buckets_are_nearly_full():
    assert len(bucket_by_length(np.full((100, 2), 10), 200)) <= 14  # 10 full ones would do


def test_offsets_that_do_not_fit_are_refused(tmp_path):
    meta = write_pairs(tmp_path, [([1], [2]), ([3, 4], [5])])
    offsets = np.fromfile(tmp_path / 'train.idx', dtype='<i8')
    with_an_empty_target = np.array([0, 1, 1, 4, 5])
    for wrong in (offsets[:-1], offsets + 1, offsets[::-1], with_an_empty_target):
        np.asarray(wrong, dtype='<i8').tofile(tmp_path / 'train.idx')
        with pytest.raises(UserError, match='train.idx does not fit'):
            Pairs(tmp_path, meta, 'train', [0], 8, 8)
    (tmp_path / 'train.idx').unlink()
    with pytest.raises(UserError, match='cannot read .*train.idx'):
        Pairs(tmp_path, meta, 'train', [0], 8, 8)


# --------------------------------------------------------------------------------------------------
# meta.json, and files that do not match it

def test_token_files_that_do_not_match_are_refused(tmp_path):
    folder = make_toy(tmp_path)
    meta = load_meta(folder)
    train = folder / 'train.bin'
    with pytest.raises(UserError, match='only 5,000 ids, but --block_size=5000 needs 5,001'):
        Stream(folder, meta, 'train', 5000)

    train.write_bytes(train.read_bytes()[:-1])
    message = '9,999 bytes, but meta.json speaks of 5,000 ids of 2 bytes'
    with pytest.raises(UserError, match=message):
        Stream(folder, meta, 'train', 8)

    train.unlink()
    with pytest.raises(UserError, match='cannot read .*train.bin'):
        Stream(folder, meta, 'train', 8)


def change_meta(folder, **changes):
    """Overwrite fields of a dataset's meta.json."""
    path = folder / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    path.write_text(json.dumps({**meta, **changes}), encoding='utf-8')


@pytest.mark.parametrize('text, message', [
    ('', 'JSONDecodeError'),
    ('[]', 'TypeError'),
    ('{"format": 1}', "KeyError: 'kind'"),
    ('[' * 100_000, 'RecursionError'),
    ('\xff', 'not a dataset'),
])
def test_a_meta_json_that_is_something_else_is_refused(tmp_path, text, message):
    folder = make_toy(tmp_path)
    (folder / 'meta.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=message):
        load_meta(folder)


@pytest.mark.parametrize('field, value', [
    ('kind', 'triples'), ('dtype', 'int64'), ('vocab_size', 'many'), ('tokenizer', []),
])
def test_a_wrong_field_in_meta_json_is_named(tmp_path, field, value):
    folder = make_toy(tmp_path)
    change_meta(folder, **{field: value})
    with pytest.raises(UserError, match=f'wrong at {field};'):
        load_meta(folder)


def test_a_wrong_count_in_meta_json_is_named(tmp_path):
    folder = make_toy(tmp_path)
    change_meta(folder, counts={'train': 5000, 'val': -1})
    with pytest.raises(UserError, match='wrong at counts.val;'):
        load_meta(folder)

    folder = make_pairs(tmp_path)
    change_meta(folder, pairs={'train': '200', 'val': 30})
    with pytest.raises(UserError, match='wrong at pairs.train;'):
        load_meta(folder)


def test_a_wrong_chat_template_in_meta_json_is_refused(tmp_path):
    folder = make_pairs(tmp_path)
    change_meta(folder, chat={'turn': 5})
    with pytest.raises(UserError, match='not a dataset\'s meta.json .*chat template'):
        load_meta(folder)


def test_a_newer_format_is_refused_before_all_else(tmp_path):
    folder = make_toy(tmp_path)
    change_meta(folder, format=99, kind='triples')
    with pytest.raises(UserError, match='format 99, this version reads up to 1'):
        load_meta(folder)
