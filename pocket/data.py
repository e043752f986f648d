"""
Reading data/NAME: token files, their meta.json, and batches that are a pure function of (seed, step).

    data/NAME/meta.json             what is there: kind, dtype, vocab_size, the tokenizer, counts, where it came from
    data/NAME/{train,val}.bin       raw little-endian ids: uint16 where vocab_size <= 65,536, else uint32 (nanoGPT's format)
    data/NAME/{train,val}.idx       kind pairs: int64 offsets into the .bin, where each source and each target begins, and the end
"""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from pocket import template
from pocket.errors import UserError
from pocket.files import FORMAT, ROOT, check_path

SHARED = {'text'}  # what makes no dataset of its own name in prepare/
IN_MEMORY = 2**28     # bytes: smaller files are loaded whole, larger ones memory-mapped


def ensure_prepared(dataset, data_dir, make=True):
    """Folder of a dataset; where it is missing and prepare/DATASET.py exists, that is run first if make. Raises UserError."""
    folder = check_path(Path(data_dir) / dataset)
    if (folder / 'meta.json').is_file():
        return folder
    script = ROOT / 'prepare' / f'{dataset}.py'
    if not make or not script.is_file() or dataset in SHARED or Path(dataset).name != dataset:  # a checkpoint can name any
        ready = sorted(p.parent.name for p in Path(data_dir).glob('*/meta.json'))
        known = sorted(p.stem for p in (ROOT / 'prepare').glob('*.py') if p.stem not in SHARED)
        raise UserError(f'there is no dataset {dataset!r} in {data_dir} and no prepare/{dataset}.py to make it; '
                        f'ready: {", ".join(ready) or "none yet"}; can be made: {", ".join(known)}; '
                        f'or your own text: python prepare/text.py --input=FILE --name={dataset}')
    print(f'{folder} is not there yet: running prepare/{dataset}.py', flush=True)
    if status := subprocess.call([sys.executable, str(script), f'--data_dir={data_dir}']):
        raise SystemExit(status)  # it has said why
    return folder


def load_meta(folder):
    """meta.json of a dataset as a dict. Raises UserError where it is not one of ours."""
    path = Path(folder) / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        if type(meta['format']) is int and meta['format'] > FORMAT:  # before all else: what follows may have changed
            raise UserError(f'{path} has format {meta["format"]}, this version reads up to {FORMAT}: '
                            f'use a newer pocketGPT, or prepare the dataset again')
        fields = {'format': int, 'kind': str, 'dtype': str, 'vocab_size': int, 'tokenizer': dict, 'counts': dict}
        bad = [f for f, kind in fields.items() if not isinstance(meta[f], kind)]
        bad += ['kind'] if meta['kind'] not in ('stream', 'pairs') else []
        pairs = meta['kind'] == 'pairs'
        for part in ('counts', 'pairs') if pairs else ('counts',):
            bad += [f'{part}.{s}' for s in {'train', 'val', *meta[part]} if type(meta[part][s]) is not int or meta[part][s] < 0]
        if pairs and 'chat' in meta:
            template.check(meta['chat'])
    except UserError:
        raise
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f'{path} is not a dataset\'s meta.json ({type(e).__name__}: {e}); prepare the dataset again') from None
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


class Tokens:
    """One split of a dataset: a file of ids. Raises UserError where it does not match meta.json."""

    def __init__(self, folder, meta, split):
        self.path, self.vocab_size = Path(folder) / f'{split}.bin', meta['vocab_size']
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')
        try:
            size = self.path.stat().st_size
        except OSError as e:
            raise UserError(f'cannot read {self.path}: {e.strerror}; prepare the dataset again') from None
        self.num_tokens = meta['counts'][split]
        if not size or size != self.num_tokens * self.dtype.itemsize:
            raise UserError(f'{self.path} has {size:,} bytes, but meta.json speaks of {self.num_tokens:,} ids of {self.dtype.itemsize} '
                            f'bytes: the file is cut short or not from this dataset; prepare it again')
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

    def steps_for(self, epochs, micro_batches):
        """How many steps so many epochs are."""
        return math.ceil(epochs * self.epoch / (self.batch_size * micro_batches))

    def token_counts(self):
        """(vocab_size,) int64: how often each id occurs."""
        tokens, counts = self.tokens(), np.zeros(self.vocab_size, dtype=np.int64)
        for i in range(0, self.num_tokens, 2**24):
            counts += np.bincount(self.check(tokens[i:i + 2**24]), minlength=self.vocab_size)
        return counts


class Stream(Tokens):
    """One split of a token stream, in windows of block_size. Raises UserError where the file is shorter than that."""

    def __init__(self, folder, meta, split, block_size, batch_size=1):
        super().__init__(folder, meta, split)
        self.T, self.batch_size = block_size, batch_size
        self.num_targets = self.num_tokens - 1  # in a whole pass: nobody predicts the first id
        self.epoch = max(1, self.num_tokens // self.T - 1)  # windows of one
        least = block_size + 1 if split == 'train' else 2
        if self.num_tokens < least:
            raise UserError(f'{self.path} has only {self.num_tokens:,} ids, but --block_size={block_size} needs {least:,}: '
                            f'use more text or a smaller --block_size')

    def windows(self, tokens, starts):
        """(B, T + 1) int64: the ids from each start on."""
        rows = tokens[np.asarray(starts, dtype=np.int64)[:, None] + np.arange(self.T + 1)]
        return torch.from_numpy(self.check(rows).astype(np.int64))

    def starts(self, seed, first, count):
        """Where the samples first … first + count - 1 of the run begin. An epoch visits every window once, in an order of
        its own; where the windows are cut moves from epoch to epoch."""
        n = self.epoch  # windows, whatever the offset
        sample = np.arange(first, first + count, dtype=np.uint64)
        starts = np.empty(count, dtype=np.uint64)
        for epoch in range(first // n, (first + count - 1) // n + 1):
            key = int(mix(epoch, seed)[0])
            here = sample // np.uint64(n) == epoch
            offset = key % (min(self.T - 1, self.num_tokens - 1 - n * self.T) + 1)
            starts[here] = permute(sample[here] % np.uint64(n), n, key % 2**32) * np.uint64(self.T) + np.uint64(offset)
        return starts

    def batches(self, seed, step, micro_batches, rank=0, world_size=1):
        """The part of a step that falls to this rank: dicts of int64 tensors idx and targets, of at most batch_size rows.

        A pure function of its arguments. Together the ranks see samples step * G to (step + 1) * G - 1 of the run, with
        G = batch_size * micro_batches: each an even share, one behind the other. Where there are more ranks than samples, some
        get a row without targets, because all have to take part in the step.
        """
        tokens, G = self.tokens(), self.batch_size * micro_batches
        first, last = (step * G + r * G // world_size for r in (rank, rank + 1))
        for i in range(first, max(last, first + 1), self.batch_size):
            rows = self.windows(tokens, self.starts(seed, i, max(1, min(self.batch_size, last - i))))
            yield {'idx': rows[:, :-1], 'targets': rows[:, 1:] if i < last else torch.full_like(rows[:, 1:], -1)}

    def eval_batches(self):
        """The whole split once, in order, without overlap: dicts as from batches(); the last window is shorter."""
        tokens, whole, B = self.tokens(), (self.num_tokens - 1) // self.T, self.batch_size
        for first in range(0, whole, B):
            rows = self.windows(tokens, np.arange(first, min(first + B, whole)) * self.T)
            yield {'idx': rows[:, :-1], 'targets': rows[:, 1:]}
        rest = torch.from_numpy(self.check(tokens[whole * self.T:]).astype(np.int64))[None]
        if rest.size(1) > 1:
            yield {'idx': rest[:, :-1], 'targets': rest[:, 1:]}

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 text behind all targets. byte_lengths: see Tokenizer."""
        tokens, total = self.tokens(), 0
        for i in range(1, self.num_tokens, 2**24):
            total += int(byte_lengths[self.check(tokens[i:i + 2**24])].sum())
        return total


def bucket_by_length(lengths, budget):
    """Batches of pairs of like lengths: a list of index arrays. lengths: (N, d) int, the columns that a pair takes in d tensors.

    No batch computes more than budget columns, padding included, but for a pair that is longer alone. What is too much is cut
    where it is widest, the dimension that wastes most, so padding stays rare in all of them: a k-d tree's way.
    """
    done, todo = [], [np.arange(len(lengths))]
    while todo:
        members = todo.pop()
        here = lengths[members]
        if len(members) == 1 or len(members) * here.max(axis=0).sum() <= budget:
            done.append(members)
            continue
        order = np.argsort(here[:, (here.max(axis=0) - here).sum(axis=0).argmax()], kind='stable')
        cost = here.sum(axis=1)[order].cumsum()
        parts = max(2, math.ceil(cost[-1] / (0.94 * budget)))  # so many batches, nearly full ones, will come out of it
        half = int(np.searchsorted(cost, cost[-1] * (parts // 2) / parts).clip(1, len(members) - 1))
        todo += [members[order[half:]], members[order[:half]]]
    return done


class Pairs(Tokens):
    """One split of sources and targets, in batches of like lengths that compute at most batch_tokens columns.

    For a Seq2Seq (src_block_size given) a batch is src, src_pad, idx and targets, with `start` in front of each target; for a
    GPT it is idx and targets: source, start, target in one row, the loss on the target alone. Too long a source loses its oldest
    ids, too long a target its end. Raises UserError where the files do not match.

    start: the ids between source and target. What follows its first, if anything, each target begins with ('Bot: '): it is
    given, not learnt, and counts in no figure.
    """

    def __init__(self, folder, meta, split, start, block_size, src_block_size=None, batch_tokens=4096):
        super().__init__(folder, meta, split)
        path, N = self.path.with_suffix('.idx'), meta['pairs'].get(split, 0)
        try:
            self.offsets = np.fromfile(path, dtype='<i8') if path.stat().st_size == 8 * (2 * N + 1) else np.zeros(1)
        except OSError as e:
            raise UserError(f'cannot read {path}: {e.strerror}; prepare the dataset again') from None
        if N < 1 or len(self.offsets) != 2 * N + 1 or self.offsets[0] != 0 or self.offsets[-1] != self.num_tokens \
                or self.offsets.min() < 0 or self.offsets.max() > self.num_tokens or (np.diff(self.offsets) < 1).any():
            raise UserError(f'{path} does not fit {self.path} and meta.json: prepare the dataset again')
        self.decoder_start_id, *self.reply_prefix = start
        self.concatenated = src_block_size is None
        if self.tokens()[self.offsets[1]:self.offsets[2]].tolist()[:len(self.reply_prefix)] != self.reply_prefix:
            raise UserError(f'targets in {self.path} do not begin as meta.json says; prepare the dataset again')
        S, T = np.diff(self.offsets).reshape(-1, 2).T  # (N,) each
        if self.concatenated:  # one row holds both, of the source at least what half of it holds
            self.target_lengths = np.minimum(T, block_size - np.minimum(S, block_size // 2))
            self.source_lengths = np.minimum(S, block_size - self.target_lengths)
            lengths = (self.source_lengths + self.target_lengths)[:, None]
        else:
            self.source_lengths, self.target_lengths = np.minimum(S, src_block_size), np.minimum(T, block_size)
            lengths = np.stack((self.source_lengths, self.target_lengths), axis=1)
        self.truncated = int((S > self.source_lengths).sum()), int((T > self.target_lengths).sum())  # how many sources and targets were shortened
        self.num_targets, self.groups = int((self.target_lengths - len(self.reply_prefix)).sum()), bucket_by_length(lengths, batch_tokens)
        self.epoch, self.batch_size = len(self.groups), 1  # in groups
        computed = sum(len(g) * int(lengths[g].max(axis=0).sum()) for g in self.groups)
        self.padding = 1 - int(lengths.sum()) / computed  # the share of computed columns that is not text

    def pair(self, tokens, i):
        """(source, target) of pair i as int64 arrays, cut to what the model takes."""
        a, b = self.offsets[2 * i + 1] - self.source_lengths[i], self.offsets[2 * i + 1] + self.target_lengths[i]
        ids = self.check(tokens[a:b]).astype(np.int64)
        return ids[:self.source_lengths[i]], ids[self.source_lengths[i]:]

    def batch(self, tokens, members):
        """The batch of these pairs, padded with id 0 and target -1: sources at the left, the rest at the right."""
        S, T = int(self.source_lengths[members].max()), int(self.target_lengths[members].max())
        if self.concatenated:
            S, T = 0, int((self.source_lengths + self.target_lengths)[members].max())
        src = torch.zeros(len(members), S, dtype=torch.int64)
        idx = torch.zeros(len(members), T, dtype=torch.int64)
        targets = torch.full((len(members), T), -1)
        for row, i in enumerate(members):
            source, target = map(torch.from_numpy, self.pair(tokens, i))
            s = len(source) if self.concatenated else 0  # where the target begins in its row
            if self.concatenated:
                idx[row, :s] = source
            else:
                src[row, S - len(source):] = source
            idx[row, s], idx[row, s + 1:s + len(target)] = self.decoder_start_id, target[:-1]
            g = len(self.reply_prefix)
            targets[row, s + g:s + len(target)] = target[g:]
        batch = {'idx': idx, 'targets': targets}
        if not self.concatenated:
            batch['src'], pad = src, torch.from_numpy(S - self.source_lengths[members])
            if pad.any():
                batch['src_pad'] = pad
        return batch

    def batches(self, seed, step, micro_batches, rank=0, world_size=1):
        """The part of a step that falls to this rank; see the class. A pure function of its arguments.

        The groups of like lengths are the same in every epoch, their order is not. Ranks take whole groups where these come
        out even, otherwise rows of each: a rank that gets none takes one without targets, as in Stream.batches.
        """
        tokens = self.tokens()
        whole = micro_batches % world_size == 0
        first, stride, row, rows = (rank, world_size, 0, 1) if whole else (0, 1, rank, world_size)
        for m in range(step * micro_batches + first, (step + 1) * micro_batches, stride):
            key = int(mix(m // self.epoch, seed)[0]) % 2**32
            members = self.groups[int(permute(np.array([m % self.epoch]), self.epoch, key)[0])]
            batch = self.batch(tokens, members[row::rows] if row < len(members) else members[:1])
            if row >= len(members):
                batch['targets'].fill_(-1)
            yield batch

    def eval_batches(self):
        """The whole split once, in groups of like lengths."""
        tokens = self.tokens()
        for members in self.groups:
            yield self.batch(tokens, members)

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 text behind all targets. byte_lengths: see Tokenizer."""
        tokens = self.tokens()
        return sum(int(byte_lengths[self.pair(tokens, i)[1][len(self.reply_prefix):]].sum()) for i in range(len(self.source_lengths)))
