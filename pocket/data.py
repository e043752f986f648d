"""
From token files to batches.

    data/NAME/meta.json         what is there: kind, dtype, vocab_size, tokenizer, counts, source
    data/NAME/{train,val}.bin   token ids, raw and little-endian as in nanoGPT: uint16 if vocab_size
                                is at most 65,536, else uint32
    data/NAME/{train,val}.idx   kind pairs: int64 offsets into the .bin, where each source and each
                                target begins, and where the last one ends; kind chats: where each
                                conversation begins, and where the last one ends
    data/NAME/{train,val}.mask  kind chats only: a byte per id, see LEARN and TURN

Some datasets have a third split, test.

A batch is a pure function of (seed, step, rank). No random generator advances from batch to batch,
so there is no state to save: a run that resumes at step 5,000 computes the batch of step 5,000 and
gets the one it would have had, bit for bit.
"""
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from pocket.errors import UserError
from pocket.files import FORMAT, ROOT, check_path, sha256_of
from pocket.template import ChatTemplate, template_from_dict

NO_TARGET = -1        # in targets: nothing to predict here, the loss leaves it out
IN_MEMORY = 2**28     # bytes: smaller files are read whole, larger ones are memory-mapped
CHUNK = 2**24         # ids to read at a time when a whole file is counted
NOT_A_DATASET = {'text', 'chat'}  # scripts in prepare/ that can't make a dataset by its name alone

# Bits of the bytes in a .mask file
LEARN = 1  # the model learns to predict this id: it is said by the assistant, or ends its turn
TURN = 2   # here a person speaks: what is before may be left out if a conversation is too long


# --------------------------------------------------------------------------------------------------
# Finding a dataset


def ensure_prepared(dataset, data_dir, make=True):
    """Return the folder of a dataset; if it is missing, prepare/DATASET.py is run to make it.

    make: False never runs a script. Raises UserError if the dataset is not there and can't be made,
    and SystemExit with the script's status if the script fails.
    """
    folder = check_path(Path(data_dir) / dataset)
    if (folder / 'meta.json').is_file():
        return folder

    # The name may come from an untrusted checkpoint: run only files of prepare/, follow no path.
    script = ROOT / 'prepare' / f'{dataset}.py'
    is_plain_name = Path(dataset).name == dataset
    can_be_made = is_plain_name and dataset not in NOT_A_DATASET and script.is_file()
    if not make or not can_be_made:
        raise no_such_dataset(dataset, data_dir)

    print(f'{folder} does not exist yet: running prepare/{dataset}.py', flush=True)
    status = subprocess.call([sys.executable, str(script), f'--data_dir={data_dir}'])
    if status:
        raise SystemExit(status)  # the script has said why
    return folder


def no_such_dataset(dataset, data_dir):
    """A UserError that lists the datasets there are, and those that prepare/ can make."""
    ready = sorted(path.parent.name for path in Path(data_dir).glob('*/meta.json'))
    scripts = sorted(path.stem for path in (ROOT / 'prepare').glob('*.py'))
    can_be_made = [name for name in scripts if name not in NOT_A_DATASET]
    return UserError(
        f'there is no dataset {dataset!r} in {data_dir} and no prepare/{dataset}.py to make it; '
        f'ready: {", ".join(ready) or "none yet"}; can be made: {", ".join(can_be_made)}; '
        f'or your own text: python prepare/text.py --input=FILE --name={dataset}')


def load_meta(folder):
    """Return meta.json of a dataset as a dict. Raises UserError if it is not one of ours."""
    path = Path(folder) / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        # The format comes first: in a newer one, every other field may have changed.
        if type(meta['format']) is int and meta['format'] > FORMAT:
            raise UserError(
                f'{path} has format {meta["format"]}, this version reads up to {FORMAT}: '
                f'use a newer pocketGPT, or prepare the dataset again')
        wrong = wrong_fields(meta)
        if meta['kind'] in ('pairs', 'chats'):
            template = template_from_dict(meta.get('chat'))  # ValueError if it is not a template
            if meta['kind'] == 'pairs' and not isinstance(template, ChatTemplate):
                raise ValueError('pairs have no Jinja template')
    except UserError:  # which is a ValueError, too
        raise
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f'{path} is not a dataset\'s meta.json ({type(e).__name__}: {e}); '
                        f'prepare the dataset again') from None
    if wrong:
        raise UserError(f'{path} is wrong at {", ".join(wrong)}; prepare the dataset again')
    return meta


def wrong_fields(meta):
    """Names of the fields of a meta.json with a wrong type or value. Raises KeyError if missing."""
    wrong = []
    if meta['kind'] not in ('stream', 'pairs', 'chats'):
        wrong.append('kind')
    if meta['dtype'] not in ('uint16', 'uint32'):
        wrong.append('dtype')
    for name, kind in (('format', int), ('vocab_size', int), ('tokenizer', dict), ('counts', dict)):
        if not isinstance(meta[name], kind):
            wrong.append(name)

    # How many ids each split has, and how many pairs or conversations
    tables = ['counts']
    if meta['kind'] in ('pairs', 'chats'):
        tables.append(meta['kind'])
    for table in tables:
        for split in {'train', 'val', *meta[table]}:
            count = meta[table][split]
            if type(count) is not int or count < 0:
                wrong.append(f'{table}.{split}')
    return wrong


# --------------------------------------------------------------------------------------------------
# Shuffling without memory


def permute(i, n, key):
    """Return where a pseudo-random permutation of range(n) sends each number in i.

    i: (N,) integers in range(n); key: an int that selects the permutation. Returns (N,) uint64.

    The usual way to shuffle is to write down all n numbers in a random order. That takes memory and
    time for all of them, and a resumed run has to make the same list again. A Feistel network, the
    core of many ciphers, computes where one number goes without looking at the others. It writes
    the number as two halves of its bits and repeats

        left, right = right, left ^ f(right)

    Why no two numbers end at the same place: a round can be undone, whatever f is. The old right
    half is there as the new left half; f of it, XORed once more, gives back the old left half. What
    can be undone is one-to-one. f need only be erratic for the order to look random, and
    four rounds are enough for that (Luby, Rackoff 1988, https://doi.org/10.1137/0217022).

    This permutes range(4**k) for k bits per half, with k as small as n permits. A number that lands
    at n or beyond is sent on until it lands below n ("cycle walking"). It always does in the end:
    following a permutation leads around a cycle, and this one began below n.

    >>> permute(np.arange(10), 10, key=1).tolist()
    [6, 2, 0, 5, 4, 1, 9, 7, 8, 3]
    """
    bits_per_half = max(1, ((n - 1).bit_length() + 1) // 2)
    half = np.uint64(bits_per_half)
    low_bits = np.uint64(2**bits_per_half - 1)

    result = i.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)  # at first all have to move
    while outside.any():
        left = result[outside] >> half
        right = result[outside] & low_bits
        for turn in range(4):
            scrambled = mix(right, key * 4 + turn) & low_bits
            left, right = right, left ^ scrambled
        result[outside] = left << half | right
        outside = result >= n
    return result


def mix(x, key):
    """Hash x (an int or a uint64 array) with an int key: a uint64 array, every bit well mixed.

    The finalizer of splitmix64: Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195
    """
    x = np.atleast_1d(np.asarray(x, dtype=np.uint64))  # an array wraps around without a warning
    x = x + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


# --------------------------------------------------------------------------------------------------
# Token files


class Split:
    """One split of a dataset: a file of token ids. Stream, Pairs and Chats cut it into batches.

    path, vocab_size   the file, and what its ids stay below
    num_tokens         ids in the file
    num_targets        ids that one pass over the split predicts
    epoch_size         windows (Stream) or buckets (Pairs, Chats) in one pass
    batch_size         how many of these a micro-batch takes
    fingerprint        text that another content of the files would change

    Raises UserError if the file does not match meta.json.
    """

    def __init__(self, folder, meta, split):
        self.path = Path(folder) / f'{split}.bin'
        self.meta = meta
        self.vocab_size = meta['vocab_size']
        self.num_tokens = meta['counts'][split]
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')

        try:
            size = self.path.stat().st_size
        except OSError as e:
            raise UserError(f'cannot read {self.path}: {e.strerror}; '
                            f'prepare the dataset again') from None
        if size == 0 or size != self.num_tokens * self.dtype.itemsize:
            raise UserError(
                f'{self.path} has {size:,} bytes, but meta.json speaks of {self.num_tokens:,} ids '
                f'of {self.dtype.itemsize} bytes: the file is cut short or not from this dataset; '
                f'prepare it again')

        self.loaded = None
        if size <= IN_MEMORY:
            self.loaded = self.check(np.fromfile(self.path, dtype=self.dtype))
            self.fingerprint = hashlib.sha256(self.loaded).hexdigest()
            check_digest(meta, self.path, self.fingerprint)
        else:
            # Kept open, so that replacing the file with another changes nothing for us
            self.file = open(self.path, 'rb')
            self.version = self.version_now()
            self.fingerprint = sample_digest(self.file, size)

    def tokens(self):
        """All ids: (num_tokens,) of the file's dtype.

        A large file is mapped anew in each call, and that is one per batch. Otherwise every page
        that was ever read would count as memory of this process. Raises UserError if somebody has
        written into it meanwhile: reading where a shortened file was would end the process.
        """
        if self.loaded is not None:
            return self.loaded
        if self.version_now() != self.version:
            raise UserError(f'{self.path} was written to while it was in use')
        return np.memmap(self.file, dtype=self.dtype, mode='r')

    def verify(self):
        """Raise UserError if a large file is not what was prepared.

        Small ones are checked when they are opened.

        All of the file is read, 0.35 s for 500 MB in memory (2 cores, Intel with AMX), but as long
        as the disk takes for 100 GB. So training does not wait for it: another thread looks while
        the first steps are done, see verify_in_background() in training.py.
        """
        if self.loaded is not None or expected_digest(self.meta, self.path) is None:
            return
        try:
            digest = sha256_of(self.path)
            is_ours = os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError:
            return  # whatever has become of the name: we have the file open
        if is_ours:
            check_digest(self.meta, self.path, digest)

    def version_now(self):
        """(size, time of the last change) of a large file."""
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def check(self, ids):
        """Return ids unchanged. Raises UserError if one of them is outside the vocabulary."""
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(
                f'{self.path} has id {ids.max()}, but the vocabulary of meta.json ends at '
                f'{self.vocab_size - 1}; prepare the dataset again')
        return ids

    def chunks(self, first=0):
        """Yield all ids from position first on, checked, at most CHUNK at a time."""
        for i in range(first, self.num_tokens, CHUNK):
            yield self.check(self.tokens()[i:i + CHUNK])

    def token_counts(self):
        """How often each id occurs: (vocab_size,) int64."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for ids in self.chunks():
            counts += np.bincount(ids, minlength=self.vocab_size)
        return counts

    def steps_for(self, epochs, micro_batches):
        """The number of steps in so many epochs, with so many micro-batches per step."""
        return math.ceil(epochs * self.epoch_size / (self.batch_size * micro_batches))


def check_digest(meta, path, digest):
    """Raise UserError if a file of a dataset is not what was prepared.

    digest: SHA-256 of the file.
    """
    expected = expected_digest(meta, path)
    if expected is not None and expected != digest:
        raise UserError(f'{path} is not what was prepared (its sha256 differs from that in '
                        f'meta.json): it is damaged; prepare the dataset again')


def expected_digest(meta, path):
    """The SHA-256 that meta.json has for a file. Datasets of earlier versions have none: None."""
    digests = meta.get('files')
    return digests.get(path.name) if isinstance(digests, dict) else None


def sample_digest(file, size):
    """The SHA-256 of a large file's size and of 16 blocks of it: read in an instant."""
    digest = hashlib.sha256(str(size).encode())
    for i in range(16):
        file.seek(max(0, size - 2**16) * i // 15)
        digest.update(file.read(2**16))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Streams: one long text, in windows


class Stream(Split):
    """One split of a token stream, in windows of block_size ids and their successors.

    Raises UserError if the file does not match meta.json or is shorter than one window.
    """

    def __init__(self, folder, meta, split, block_size, batch_size=1):
        super().__init__(folder, meta, split)
        self.block_size = block_size
        self.batch_size = batch_size
        self.num_targets = self.num_tokens - 1  # nothing predicts the first id
        # One window fewer than fit, which leaves room to shift them; see window_starts()
        self.epoch_size = max(1, self.num_tokens // block_size - 1)

        needed = block_size + 1 if split == 'train' else 2  # val may be one short window
        if self.num_tokens < needed:
            raise UserError(
                f'{self.path} has only {self.num_tokens:,} ids, but --block_size={block_size} '
                f'needs {needed:,}: use more text or a smaller --block_size')

    def window_starts(self, seed, first, count):
        """Where the windows number first … first + count - 1 of the run begin: (count,) uint64.

        An epoch visits every window once, in an order of its own. It also has an offset of its own
        that shifts where the text is cut into windows. With the same cuts in every epoch, the first
        ids of each window would always be predicted from almost no context, and nothing would ever
        be learned across a cut.
        """
        windows_per_epoch = self.epoch_size
        # The last window and its successor still have to end inside the file
        room = self.num_tokens - 1 - windows_per_epoch * self.block_size
        max_offset = min(self.block_size - 1, room)

        numbers = np.arange(first, first + count, dtype=np.uint64)
        epochs = numbers // np.uint64(windows_per_epoch)
        places = numbers % np.uint64(windows_per_epoch)
        starts = np.empty(count, dtype=np.uint64)
        last_epoch = (first + count - 1) // windows_per_epoch
        for epoch in range(first // windows_per_epoch, last_epoch + 1):
            key = int(mix(epoch, seed)[0])
            offset = key % (max_offset + 1)
            here = epochs == epoch
            windows = permute(places[here], windows_per_epoch, key % 2**32)
            starts[here] = windows * np.uint64(self.block_size) + np.uint64(offset)
        return starts

    def windows(self, tokens, starts):
        """The windows that begin at starts, each with its successor: (B, block_size + 1) int64."""
        starts = np.asarray(starts, dtype=np.int64)
        positions = starts[:, None] + np.arange(self.block_size + 1)
        return torch.from_numpy(self.check(tokens[positions]).astype(np.int64))

    def batches(self, seed, step, micro_batches, rank=0, world_size=1):
        """Yield this rank's part of a step: dicts of idx and targets, (B, block_size) int64 each.

        A pure function of its arguments. A step takes batch_size * micro_batches windows in a row
        from the run's sequence. Each rank gets an equal share of them, cut into micro-batches of
        at most batch_size rows.
        """
        tokens = self.tokens()
        windows_per_step = self.batch_size * micro_batches
        start = step * windows_per_step
        first = start + rank * windows_per_step // world_size
        end = start + (rank + 1) * windows_per_step // world_size

        # More ranks than windows: some have none. They compute a row without targets, which adds
        # nothing to the loss, because every rank has to take part in the all-reduce.
        if first == end:
            batch = next_token_batch(self.windows(tokens, self.window_starts(seed, first, 1)))
            batch['targets'] = torch.full_like(batch['targets'], NO_TARGET)
            yield batch
            return

        for i in range(first, end, self.batch_size):
            count = min(self.batch_size, end - i)
            starts = self.window_starts(seed, i, count)
            yield next_token_batch(self.windows(tokens, starts))

    def eval_batches(self):
        """Yield the whole split once, in order and without overlap; the last window is shorter."""
        full_windows = (self.num_tokens - 1) // self.block_size
        for first in range(0, full_windows, self.batch_size):
            end = min(first + self.batch_size, full_windows)
            starts = np.arange(first, end) * self.block_size
            yield next_token_batch(self.windows(self.tokens(), starts))

        rest = self.check(self.tokens()[full_windows * self.block_size:]).astype(np.int64)
        if len(rest) > 1:
            yield next_token_batch(torch.from_numpy(rest)[None])

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 behind all targets. byte_lengths: (vocab_size,), see Tokenizer."""
        return sum(int(byte_lengths[ids].sum()) for ids in self.chunks(first=1))


def next_token_batch(windows):
    """Split (B, T + 1) ids into what the model reads and, one place on, what it predicts."""
    return {'idx': windows[:, :-1], 'targets': windows[:, 1:]}


def count_targets(batch):
    """How many targets a batch has."""
    return int((batch['targets'] != NO_TARGET).sum())


# --------------------------------------------------------------------------------------------------
# Rows in buckets of similar length


def bucket_by_length(lengths, budget):
    """Group rows of similar length into batches that compute at most budget columns each.

    lengths: (N, d) ints, the columns that each row (a pair, a conversation) takes in each of d
    tensors. Returns a list of index arrays. Only a row that is longer than the budget by itself
    exceeds it.

    A batch is as wide as its longest row, and the rest is padding, which costs as much to compute
    as text. Chat lines differ so much in length that random batches would be mostly padding; in
    buckets of similar length little is left. So we start from all rows and, like a k-d tree, split
    what is too large along the dimension that wastes most, until each part fits the budget.

    >>> buckets = bucket_by_length(np.array([[9], [2], [8], [3]]), budget=18)
    >>> [bucket.tolist() for bucket in buckets]
    [[1, 3], [2, 0]]
    """
    buckets = []
    unfinished = [np.arange(len(lengths))]
    while unfinished:
        members = unfinished.pop()
        columns = lengths[members]
        widest = columns.max(axis=0)
        if len(members) == 1 or len(members) * widest.sum() <= budget:
            buckets.append(members)
            continue

        # Sort along the dimension with the most padding
        padding = (widest - columns).sum(axis=0)
        order = np.argsort(columns[:, padding.argmax()], kind='stable')

        # Split near the middle, but in the ratio of two whole numbers of batches, so that no
        # half-empty batch remains. 0.94: how full they turn out to be.
        text_so_far = columns.sum(axis=1)[order].cumsum()
        expected_batches = max(2, math.ceil(text_so_far[-1] / (0.94 * budget)))
        first_part = text_so_far[-1] * (expected_batches // 2) / expected_batches
        cut = int(np.searchsorted(text_so_far, first_part).clip(1, len(members) - 1))
        unfinished.append(members[order[cut:]])
        unfinished.append(members[order[:cut]])
    return buckets


class Buckets(Split):
    """What Pairs and Chats share: a micro-batch is a bucket of rows of similar length.

    A subclass calls make_buckets(), and has batch(tokens, members).
    """

    def make_buckets(self, columns, batch_tokens):
        """Group the rows. columns: (N, d), what each row takes; batch_tokens: of a micro-batch."""
        self.buckets = bucket_by_length(columns, batch_tokens)
        self.epoch_size = len(self.buckets)
        self.batch_size = 1  # a micro-batch is one bucket
        self.padding = padding_fraction(columns, self.buckets)

    def add_file(self, path, content):
        """Check another file of the split, and have the fingerprint tell it, too."""
        digest = hashlib.sha256(content).hexdigest()
        check_digest(self.meta, path, digest)
        self.fingerprint += f' {digest}'

    def read_offsets(self, count):
        """The .idx file: (count,) int64. Raises UserError if it does not fit."""
        path = self.path.with_suffix('.idx')
        offsets = np.zeros(0, dtype=np.int64)
        try:
            if path.stat().st_size == 8 * count:
                offsets = np.fromfile(path, dtype='<i8')
        except OSError as e:
            raise UserError(f'cannot read {path}: {e.strerror}; '
                            f'prepare the dataset again') from None
        if count < 2 or len(offsets) != count or not self.offsets_are_valid(offsets):
            raise UserError(f'{path} does not fit {self.path} and meta.json: '
                            f'prepare the dataset again')
        self.add_file(path, offsets)
        return offsets

    def offsets_are_valid(self, offsets):
        """Whether offsets rise from 0 to the end of the file, with nothing empty in between."""
        spans_the_file = offsets[0] == 0 and offsets[-1] == self.num_tokens
        inside = offsets.min() >= 0 and offsets.max() <= self.num_tokens  # so diff can't overflow
        return spans_the_file and inside and (np.diff(offsets) >= 1).all()

    def shuffled_bucket(self, seed, number):
        """The bucket that is the run's micro-batch of this number: an array of row numbers.

        The buckets are the same in every epoch, their order is not.
        """
        epoch = number // self.epoch_size
        place = number % self.epoch_size
        key = int(mix(epoch, seed)[0]) % 2**32
        bucket = permute(np.array([place]), self.epoch_size, key)[0]
        return self.buckets[int(bucket)]

    def batches(self, seed, step, micro_batches, rank=0, world_size=1):
        """Yield this rank's part of a step, as dicts from batch().

        A pure function of its arguments, like Stream.batches().
        """
        tokens = self.tokens()
        first = step * micro_batches
        end = first + micro_batches

        # The micro-batches come out even: deal them out whole, as this wastes no padding.
        if micro_batches % world_size == 0:
            for number in range(first + rank, end, world_size):
                yield self.batch(tokens, self.shuffled_bucket(seed, number))
            return

        # Otherwise every rank takes every world_size-th row of every micro-batch. A rank left with
        # none takes a row without targets, because every rank has to take part in the all-reduce.
        for number in range(first, end):
            bucket = self.shuffled_bucket(seed, number)
            members = bucket[rank::world_size]
            if len(members) > 0:
                yield self.batch(tokens, members)
            else:
                batch = self.batch(tokens, bucket[:1])
                batch['targets'].fill_(NO_TARGET)
                yield batch

    def eval_batches(self):
        """Yield the whole split once, bucket by bucket."""
        for members in self.buckets:
            yield self.batch(self.tokens(), members)


def padding_fraction(columns, buckets):
    """The fraction of all computed columns that is padding. columns: lengths, (N, d)."""
    computed = 0
    for members in buckets:
        computed += len(members) * int(columns[members].max(axis=0).sum())
    return 1 - int(columns.sum()) / computed


# --------------------------------------------------------------------------------------------------
# Pairs: a source and a target


class Pairs(Buckets):
    """One split of sources and targets, in buckets of similar length.

    For a Seq2Seq (src_block_size given) a batch is src, src_pad, idx and targets, with the start id
    before each target. For a GPT it is idx and targets: source, start id and target concatenated in
    one row, with the loss on the target alone. A source that is too long loses its oldest ids, a
    target its end.

    reply_start: the ids between source and target. The first is the start id. The rest, if any, is
    a prefix that every target begins with ('Bot: '): it is given to the model at generation time,
    so it is not learned and no loss or count includes it.

    Raises UserError if the files do not match meta.json or each other.
    """

    def __init__(self, folder, meta, split, reply_start, block_size, src_block_size=None,
                 batch_tokens=4096):
        super().__init__(folder, meta, split)
        self.offsets = self.read_offsets(2 * meta['pairs'].get(split, 0) + 1)
        self.decoder_start_id = reply_start[0]
        self.reply_prefix = list(reply_start[1:])
        self.check_reply_prefix()

        # Cut what is too long for the model
        self.concatenated = src_block_size is None
        full_sources, full_targets = np.diff(self.offsets).reshape(-1, 2).T  # (N,) each
        if self.concatenated:
            self.share_row(full_sources, full_targets, block_size)
        else:
            self.source_lengths = np.minimum(full_sources, src_block_size)
            self.target_lengths = np.minimum(full_targets, block_size)
        truncated_sources = int((full_sources > self.source_lengths).sum())
        truncated_targets = int((full_targets > self.target_lengths).sum())
        self.truncated = (truncated_sources, truncated_targets)
        self.num_targets = int((self.target_lengths - len(self.reply_prefix)).sum())

        self.make_buckets(self.columns(), batch_tokens)

    def check_reply_prefix(self):
        """Raise UserError if the first target does not begin with reply_prefix."""
        first_target = self.tokens()[self.offsets[1]:self.offsets[2]].tolist()
        if first_target[:len(self.reply_prefix)] != self.reply_prefix:
            raise UserError(f'targets in {self.path} do not begin as meta.json says; '
                            f'prepare the dataset again')

    def share_row(self, full_sources, full_targets, block_size):
        """Set source_lengths and target_lengths so that both fit one row of block_size.

        The target has priority, but the source keeps half of the row if it needs it.
        """
        reserved_for_source = np.minimum(full_sources, block_size // 2)
        self.target_lengths = np.minimum(full_targets, block_size - reserved_for_source)
        self.source_lengths = np.minimum(full_sources, block_size - self.target_lengths)

    def columns(self):
        """Columns that each pair takes in a batch: (N, 1) if concatenated, else (N, 2)."""
        if self.concatenated:
            return (self.source_lengths + self.target_lengths)[:, None]
        return np.stack((self.source_lengths, self.target_lengths), axis=1)

    def pair(self, tokens, i):
        """(source, target) of pair i as int64 arrays, truncated to what the model takes."""
        boundary = self.offsets[2 * i + 1]  # the source ends here, the target begins
        start = boundary - self.source_lengths[i]
        end = boundary + self.target_lengths[i]
        ids = self.check(tokens[start:end]).astype(np.int64)
        return ids[:self.source_lengths[i]], ids[self.source_lengths[i]:]

    def whole_target(self, tokens, i):
        """The target of pair i, however long, as an int64 array."""
        ids = tokens[self.offsets[2 * i + 1]:self.offsets[2 * i + 2]]
        return self.check(ids).astype(np.int64)

    def batch(self, tokens, members):
        """The batch of the pairs with these indices, padded with id 0 and target NO_TARGET."""
        if self.concatenated:
            return self.gpt_batch(tokens, members)
        return self.seq2seq_batch(tokens, members)

    def gpt_batch(self, tokens, members):
        """{idx, targets}, (B, T) each: source and target in one row, padding on the right."""
        width = int((self.source_lengths[members] + self.target_lengths[members]).max())
        idx = torch.zeros(len(members), width, dtype=torch.int64)
        targets = torch.full((len(members), width), NO_TARGET)
        for row, i in enumerate(members):
            source, target = self.pair(tokens, i)
            idx[row, :len(source)] = torch.from_numpy(source)
            self.fill_target(idx[row, len(source):], targets[row, len(source):], target)
        return {'idx': idx, 'targets': targets}

    def seq2seq_batch(self, tokens, members):
        """{idx, targets, src} and, if anything is padded, src_pad (B,): ids to skip in each row.

        Sources are padded on the left, so that they end together; targets on the right.
        """
        src_width = int(self.source_lengths[members].max())
        width = int(self.target_lengths[members].max())
        src = torch.zeros(len(members), src_width, dtype=torch.int64)
        idx = torch.zeros(len(members), width, dtype=torch.int64)
        targets = torch.full((len(members), width), NO_TARGET)
        for row, i in enumerate(members):
            source, target = self.pair(tokens, i)
            src[row, src_width - len(source):] = torch.from_numpy(source)
            self.fill_target(idx[row], targets[row], target)

        batch = {'idx': idx, 'targets': targets, 'src': src}
        src_pad = torch.from_numpy(src_width - self.source_lengths[members])
        if src_pad.any():
            batch['src_pad'] = src_pad
        return batch

    def fill_target(self, idx, targets, target):
        """Write one target into a row: the model reads start, t0, t1, … and predicts t0, t1, t2, …

        idx, targets: the row's tensors from where the target begins, changed in place.
        """
        length = len(target)
        target = torch.from_numpy(target)
        idx[0] = self.decoder_start_id
        idx[1:length] = target[:-1]
        prefix_length = len(self.reply_prefix)
        targets[prefix_length:length] = target[prefix_length:]

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 behind all targets. byte_lengths: (vocab_size,), see Tokenizer."""
        tokens = self.tokens()
        prefix_length = len(self.reply_prefix)
        total = 0
        for i in range(len(self.target_lengths)):
            _, target = self.pair(tokens, i)
            total += int(byte_lengths[target[prefix_length:]].sum())
        return total


# --------------------------------------------------------------------------------------------------
# Chats: whole conversations


class Chats(Buckets):
    """One split of conversations, for a GPT: a row each, with the loss on the replies alone.

    One pass over a conversation teaches all of its replies, since each of them only sees what was
    said before it. As examples of their own, n replies would be n passes over ever longer rows.

    What is too long for block_size keeps its newest turns, and what it begins with before the first
    of them, such as a system message; see shorten().

    truncated    conversations that are too long to be kept whole

    Raises UserError if the files do not match meta.json or each other.
    """

    def __init__(self, folder, meta, split, block_size, batch_tokens=4096):
        super().__init__(folder, meta, split)
        self.offsets = self.read_offsets(meta['chats'].get(split, 0) + 1)
        self.mask = self.read_mask()

        # A row is the first intro_lengths[i] ids of its conversation, then those from starts[i] to
        # ends[i]
        self.intro_lengths = np.zeros(len(self.offsets) - 1, dtype=np.int64)
        self.starts = self.offsets[:-1].copy()
        self.ends = self.offsets[1:].copy()
        too_long = np.flatnonzero(np.diff(self.offsets) > block_size + 1)
        for i in too_long:
            intro_length, start, end = self.shorten(i, block_size + 1)
            self.intro_lengths[i] = intro_length
            self.starts[i] = start
            self.ends[i] = end
        self.truncated = len(too_long)

        # A row reads all of its ids but the last
        self.lengths = self.intro_lengths + self.ends - self.starts - 1
        self.num_targets = sum(int(self.learned(i).sum()) for i in range(len(self.lengths)))
        if self.lengths.min() < 1 or self.num_targets == 0:
            raise UserError(f'{self.path} has conversations without a reply to learn: '
                            f'prepare the dataset again')
        self.make_buckets(self.lengths[:, None], batch_tokens)

    def read_mask(self):
        """The .mask file: (num_tokens,) uint8. Raises UserError if it does not fit."""
        path = self.path.with_suffix('.mask')
        try:
            mask = np.fromfile(path, dtype=np.uint8)
        except OSError as e:
            raise UserError(f'cannot read {path}: {e.strerror}; '
                            f'prepare the dataset again') from None
        if len(mask) != self.num_tokens or mask.max() > LEARN + TURN:
            raise UserError(f'{path} does not fit {self.path} and meta.json: '
                            f'prepare the dataset again')
        self.add_file(path, mask)
        return mask

    def shorten(self, i, limit):
        """(intro_length, start, end) of conversation i, which is longer than limit ids.

        It keeps its intro, the ids that come before anybody speaks (unless they take more than half
        of the room), and as many whole turns as fit, the newest ones. If not even the last turn
        fits, its question loses its oldest ids, and its reply its end.
        """
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        turns = begin + np.flatnonzero(self.mask[begin:end] & TURN)
        if len(turns) == 0:  # nobody speaks: it is not as prepare/chat.py writes it
            return 0, begin, begin + limit
        intro_length = int(turns[0]) - begin
        if intro_length > limit // 2:
            intro_length = 0
        room = limit - intro_length
        fitting = turns[end - turns <= room]
        if len(fitting):
            return intro_length, int(fitting[0]), end

        last = int(turns[-1])
        learned = np.flatnonzero(self.mask[last:end] & LEARN)
        reply = last + int(learned[0]) if len(learned) else end
        reserved_for_question = min(reply - last, room // 2)
        kept_reply = min(end - reply, room - reserved_for_question)
        kept_question = min(reply - last, room - kept_reply)
        return intro_length, reply - kept_question, reply + kept_reply

    def row(self, values, i):
        """What a conversation keeps of an array with an entry per id of the file."""
        begin = self.offsets[i]
        intro = values[begin:begin + self.intro_lengths[i]]
        return np.concatenate((intro, values[self.starts[i]:self.ends[i]]))

    def learned(self, i):
        """Which ids of a row are learned: bool. Nothing predicts the first id."""
        learned = (self.row(self.mask, i) & LEARN) > 0
        learned[0] = False
        return learned

    def batch(self, tokens, members):
        """{idx, targets}, (B, T) each, of the conversations with these numbers.

        Padding is id 0 on the right; what is not learned has the target NO_TARGET.
        """
        width = int(self.lengths[members].max())
        idx = torch.zeros(len(members), width, dtype=torch.int64)
        targets = torch.full((len(members), width), NO_TARGET)
        for row, i in enumerate(members):
            ids = self.check(self.row(tokens, i)).astype(np.int64)
            length = len(ids) - 1
            idx[row, :length] = torch.from_numpy(ids[:-1])
            target = np.where(self.learned(i), ids, NO_TARGET)[1:]
            targets[row, :length] = torch.from_numpy(target)
        return {'idx': idx, 'targets': targets}

    def first_exchange(self, tokens, i):
        """(prompt, reply) of a row: the ids up to its first reply, and that reply. int64 arrays."""
        ids = self.check(self.row(tokens, i)).astype(np.int64)
        learned = self.learned(i)
        start = int(learned.argmax())
        end = start + run_length(learned[start:])
        return ids[:start], ids[start:end]

    def whole_reply(self, tokens, i):
        """The first reply of a row, with the end that the row may lack: an int64 array."""
        _, reply = self.first_exchange(tokens, i)
        start = int(self.learned(i).argmax())
        if start + len(reply) < len(self.row(tokens, i)):
            return reply
        rest = slice(self.ends[i], self.offsets[i + 1])
        length = run_length((self.mask[rest] & LEARN) > 0)
        return np.concatenate((reply, self.check(tokens[rest][:length]).astype(np.int64)))

    def question(self, tokens, i):
        """The ids of what the first reply of a row replies to: without what comes before it."""
        prompt, _ = self.first_exchange(tokens, i)
        turns = np.flatnonzero(self.row(self.mask, i)[:len(prompt)] & TURN)
        return prompt[turns[-1]:] if len(turns) else prompt

    def count_bytes(self, byte_lengths):
        """Bytes of UTF-8 behind all targets. byte_lengths: (vocab_size,), see Tokenizer."""
        tokens = self.tokens()
        total = 0
        for i in range(len(self.lengths)):
            total += int(byte_lengths[self.row(tokens, i)[self.learned(i)]].sum())
        return total


def run_length(flags):
    """How many True values a bool array begins with.

    >>> run_length(np.array([True, True, False, True]))
    2
    """
    return int(np.append(flags, False).argmin())
