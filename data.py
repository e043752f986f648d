"""
Reading data/NAME: token files, their meta.json, and batches that are a pure function of (seed, step).

    data/NAME/meta.json             what is there: kind, dtype, vocab_size, the tokenizer, counts, where it came from
    data/NAME/{train,val}.bin       raw little-endian ids: uint16 where vocab_size <= 65,536, else uint32 (nanoGPT's format)
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, UserError
from files import FORMAT

IN_MEMORY = 2**28     # bytes: smaller files are loaded whole, larger ones memory-mapped


def ensure_prepared(dataset, data_dir):
    """Folder of a dataset; where it is missing and prepare/DATASET.py exists, that is run first. Raises UserError."""
    folder = Path(data_dir) / dataset
    if (folder / 'meta.json').is_file():
        return folder
    script = ROOT / 'prepare' / f'{dataset}.py'
    if not script.is_file() or dataset == 'common':
        ready = sorted(p.parent.name for p in Path(data_dir).glob('*/meta.json'))
        known = sorted(p.stem for p in (ROOT / 'prepare').glob('*.py') if p.stem != 'common')
        raise UserError(f'there is no dataset {dataset!r} in {data_dir} and no prepare/{dataset}.py to make it; '
                        f'ready: {", ".join(ready) or "none yet"}; can be made: {", ".join(known)}')
    print(f'{folder} is not there yet: running prepare/{dataset}.py', flush=True)
    if status := subprocess.call([sys.executable, str(script), f'--data_dir={data_dir}']):
        raise SystemExit(status)  # it has said why
    return folder


def read_meta(folder):
    """meta.json of a dataset as a dict. Raises UserError where it is not one of ours."""
    path = Path(folder) / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        fields = {'format': int, 'kind': str, 'dtype': str, 'vocab_size': int, 'tokenizer': dict, 'counts': dict}
        bad = [f for f, kind in fields.items() if not isinstance(meta[f], kind)]
        bad += ['kind'] if meta['kind'] != 'stream' else []
        bad += [f'counts.{s}' for s in ('train', 'val') if not isinstance(meta['counts'][s], int)]
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{path} is not a dataset\'s meta.json ({type(e).__name__}: {e}); prepare the dataset again') from None
    if meta['format'] > FORMAT:
        raise UserError(f'{path} has format {meta["format"]}, this version reads up to {FORMAT}: '
                        f'use a newer pocketGPT, or prepare the dataset again')
    if bad or meta['dtype'] not in ('uint16', 'uint32'):
        raise UserError(f'{path} is wrong at {", ".join(bad) or "dtype"}; prepare the dataset again')
    return meta


def permute(i, n, key):
    """Where a fixed pseudo-random permutation of range(n) sends i (uint64 array): shuffling that needs no memory for n.

    A Feistel network permutes the next power of four; numbers that land outside range(n) walk on until they are inside.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    i, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = i[outside] >> half, i[outside] & low
        for turn in range(4):
            left, right = right, left ^ (mix(right, key * 4 + turn) & low)
        i[outside] = left << half | right
        outside = i >= n
    return i


def mix(x, key):
    """splitmix64's finalizer: uint64 numbers and an int to an array of well-mixed uint64."""
    x = np.atleast_1d(np.asarray(x, dtype=np.uint64)) + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Stream:
    """One split of a token stream. Raises UserError where the file does not match meta.json or is shorter than block_size."""

    def __init__(self, folder, meta, split, block_size):
        self.path, self.T, self.vocab_size = Path(folder) / f'{split}.bin', block_size, meta['vocab_size']
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')
        try:
            size = self.path.stat().st_size
        except OSError as e:
            raise UserError(f'cannot read {self.path}: {e.strerror}; prepare the dataset again') from None
        self.n = meta['counts'][split]
        if size != self.n * self.dtype.itemsize:
            raise UserError(f'{self.path} has {size:,} bytes, but meta.json speaks of {self.n:,} ids of {self.dtype.itemsize} '
                            f'bytes: the file is cut short or not from this dataset; prepare it again')
        least = block_size + 1 if split == 'train' else 2
        if self.n < least:
            raise UserError(f'{self.path} has only {self.n:,} ids, but --block_size={block_size} needs {least:,}: '
                            f'use more text or a smaller --block_size')
        self.loaded = self.check(np.fromfile(self.path, dtype=self.dtype)) if size <= IN_MEMORY else None

    def tokens(self):
        """All ids. Large files are mapped anew each time, so that the pages read don't pile up in this process's memory."""
        return self.loaded if self.loaded is not None else np.memmap(self.path, dtype=self.dtype, mode='r')

    def check(self, ids):
        """ids, once none of them is outside the vocabulary."""
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(f'{self.path} has id {ids.max()}, but the vocabulary of meta.json ends at {self.vocab_size - 1}; '
                            f'prepare the dataset again')
        return ids

    def windows(self, tokens, starts):
        """(B, T + 1) int64: the ids from each start on."""
        rows = tokens[np.asarray(starts, dtype=np.int64)[:, None] + np.arange(self.T + 1)]
        return torch.from_numpy(self.check(rows).astype(np.int64))

    def starts(self, seed, first, count):
        """Where the samples first … first + count - 1 of the run begin. An epoch visits every window once, in an order of
        its own; where the windows are cut moves from epoch to epoch."""
        n = max(1, self.n // self.T - 1)  # windows an epoch, whatever the offset
        sample = np.arange(first, first + count, dtype=np.uint64)
        starts = np.empty(count, dtype=np.uint64)
        for epoch in range(first // n, (first + count - 1) // n + 1):
            key = int(mix(epoch, seed)[0])
            here = sample // np.uint64(n) == epoch
            offset = key % (min(self.T - 1, self.n - 1 - n * self.T) + 1)
            starts[here] = permute(sample[here] % np.uint64(n), n, key % 2**32) * np.uint64(self.T) + np.uint64(offset)
        return starts

    def batches(self, seed, step, batch_size, micro_batches, rank=0, world=1):
        """The micro-batches of a step that fall to this rank: dicts of (batch_size, T) int64 tensors idx and targets.

        A pure function of its arguments. Together the ranks see samples step * G to (step + 1) * G - 1 of the run, with
        G = batch_size * micro_batches.
        """
        tokens = self.tokens()
        for m in range(rank, micro_batches, world):
            rows = self.windows(tokens, self.starts(seed, (step * micro_batches + m) * batch_size, batch_size))
            yield {'idx': rows[:, :-1], 'targets': rows[:, 1:]}

    def eval_batches(self, max_tokens):
        """The whole split once, in order, without overlap: dicts as from batches(); the last window is shorter."""
        tokens, whole = self.tokens(), (self.n - 1) // self.T
        B = max(1, max_tokens // self.T)
        for first in range(0, whole, B):
            rows = self.windows(tokens, np.arange(first, min(first + B, whole)) * self.T)
            yield {'idx': rows[:, :-1], 'targets': rows[:, 1:]}
        rest = torch.from_numpy(self.check(tokens[whole * self.T:]).astype(np.int64))[None]
        if rest.size(1) > 1:
            yield {'idx': rest[:, :-1], 'targets': rest[:, 1:]}

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 text behind all ids but the first, which nobody predicts. byte_lengths: see Tokenizer."""
        tokens, total = self.tokens(), 0
        for i in range(1, self.n, 2**24):
            total += int(byte_lengths[self.check(tokens[i:i + 2**24])].sum())
        return total
