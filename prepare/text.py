"""
Your own text as a dataset: files, whole folders, globs. A .txt, .md or .py file is a document, a line of .jsonl or .csv is one.

    python prepare/text.py --input=novel.txt                                     then: python train.py --dataset=mine
    python prepare/text.py --input=notes --input='mails/*.jsonl' --field=body --name=letters
    python prepare/text.py --input=talk.csv --pairs --name=talk                  two columns: what is said, and the reply

Whole documents go to val, by a hash of their text, and what is there twice is kept once: val holds nothing of train. Where
there are too few documents for that, the last characters of all are val.
"""
import array
import csv
import glob
import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, read_documents, read_lines, train_texts, write_corpus, write_pairs
from pocket.errors import UserError
from pocket.files import find_path
from pocket.tokenizer import make_tokenizer

input: tuple[str, ...] = ()   # a file, a folder or a glob; may be given several times
name = 'mine'                 # of the dataset: it is written to data/NAME
tokenizer = 'bpe'             # char, byte, bpe, sentencepiece, or one of tiktoken's, such as gpt2
vocab_size: int | None = None  # of a bpe or sentencepiece trained here (None: 1 token for 1,000 characters, but 512 to 8,192)
separator: str | None = None  # what stands between documents in a text file, such as '<|endoftext|>' (None: the file is one)
pairs = False                 # tables of two columns, a source and its target: for an encoder-decoder, or a GPT that replies
field = ''                    # the field or column to read (none given: text, or source,target with --pairs)
val = 0.1                     # the share of the text that is for validation
data_dir: str | None = None   # where datasets live (None: data/ beside the scripts)
configure(__file__, globals())

TABLES = ('.jsonl', '.csv', '.tsv')
KINDS = TABLES if pairs else ('.txt', '.md', '.py', *TABLES)
FIELDS = (field or ('source,target' if pairs else 'text')).split(',')


def find_files():
    """The files that --input names, each once, those of a folder in the order of their names and without the hidden ones."""
    files = {}
    for given in input:
        path = find_path(given)
        if path.is_dir():
            found = [p for p in path.rglob('*') if p.suffix.lower() in KINDS and '/.' not in f'/{p.relative_to(path).as_posix()}']
        else:
            found = [path] if path.exists() else [find_path(p) for p in glob.glob(given, recursive=True)]
        found = {p.resolve(): p for p in sorted(found, key=lambda p: p.as_posix()) if p.is_file()}
        if not found:
            raise UserError(f'there is no {", ".join(KINDS)} file in {given}' if path.is_dir() else f'there is no file {given}')
        files |= found
    return list(files.values())


def read_rows(path):
    """The texts in FIELDS of each row of a table, as lists. Raises UserError that names the line."""
    number, suffix = 0, path.suffix.lower()

    def lines():
        nonlocal number
        for line in read_lines(path):
            number += 1
            yield line + '\n'
    try:
        if suffix == '.jsonl':
            rows = (json.loads(line) for line in lines() if line.strip())
        else:
            csv.field_size_limit(2**31 - 1)
            style = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if suffix == '.tsv' else {'strict': True}
            table = csv.reader(lines(), **style)
            header = next(table, [])
            if pairs and not field and not set(FIELDS) <= set(header):
                print(f'{path} does not name {" and ".join(FIELDS)}: the first two columns are taken, from the first line on')
                table, header = itertools.chain([header], table), FIELDS
            rows = (dict(zip(header, row)) for row in table if row)
        for row in rows:
            if not isinstance(row, dict) or not all(isinstance(row.get(f), str) for f in FIELDS):
                raise UserError(f'{path}, line {number} has no text in {" and ".join(FIELDS)}: {str(row)[:100]}; '
                                f'name what to read with --field=…')
            yield [row[f] for f in FIELDS]
    except (csv.Error, json.JSONDecodeError, RecursionError) as e:
        raise UserError(f'{path}, line {number} is not {"JSON" if suffix == ".jsonl" else suffix}: {e}') from None


def read_all():
    """The documents of all files in pieces (see corpus.py)."""
    for path in files:
        if path.suffix.lower() in TABLES:
            yield from ((text, True) for text, in read_rows(path) if text.strip())
        else:
            yield from read_documents(path, separator)


def survey(pieces):
    """Arrays of a 64-bit hash of each document's text and of its length in characters."""
    keys, sizes, digest, size = array.array('Q'), array.array('Q'), hashlib.blake2b(digest_size=8), 0
    for text, ends in tqdm(pieces, desc='reading', unit=' pieces', disable=None):
        digest.update(text.encode('utf-8', 'surrogatepass'))
        size += len(text)
        if ends:
            keys.append(int.from_bytes(digest.digest(), 'little'))
            sizes.append(size)
            digest, size = hashlib.blake2b(digest_size=8), 0
    return np.array(keys, dtype=np.uint64), np.array(sizes, dtype=np.int64)


def choose_val(keys, sizes):
    """Which documents are val, a bool each: those with the lowest keys, the same keys together; none if they are too few."""
    _, group = np.unique(keys, return_inverse=True)
    totals, used = np.bincount(group, sizes), 0
    chosen, wanted = np.zeros(len(totals), dtype=bool), val * totals.sum()
    for i, size in enumerate(totals):
        if used + size <= wanted:
            chosen[i], used = True, used + size
        if used > 0.9 * wanted:
            break
    return chosen[group] & (used > wanted / 2)


def vocabulary(characters):
    """Its size. The default is for a small model and so much text: with more tokens each is too rare to be learnt."""
    return min(max(characters // 1000, 512), 8192) if vocab_size is None else vocab_size


def divided():
    """(split, text, ends) for the pieces of all documents but the doubles."""
    number, done = 0, 0
    for text, ends in read_all():
        if kept[number] and by_documents:
            yield 'val' if is_val[number] else 'train', text, ends
        elif kept[number]:
            cut = min(max(first_val - done, 0), len(text))
            done += len(text)
            if cut:
                yield 'train', text[:cut], ends and cut == len(text)
            if cut < len(text):
                yield 'val', text[cut:], ends
        number += ends


for wrong, sentence in ((not input, 'say what to read: --input=FILE, a folder or a glob'),
                        (not 0 < val < 1, f'val must be a share between 0 and 1, got {val}'),
                        (Path(name).name != name or name in ('', '..'), f'name must do as the name of a folder, got {name!r}'),
                        (len(FIELDS) != 1 + pairs, f'field must be {"two names, such as q,a" if pairs else "one name"}, '
                                                   f'got {field!r}')):
    if wrong:
        raise UserError(sentence)
folder, files = dataset_folder(data_dir, name), find_files()
source = {'source': ', '.join(input)}
if pairs:
    read = [tuple(row) for path in files for row in read_rows(path)]
    rows = list(dict.fromkeys(row for row in read if all(map(str.strip, row))))
    print(f'{len(rows):,} pairs; {len(read) - len(rows):,} were there twice or had an empty side')
    keys, sizes = survey((row[0], True) for row in rows)
    is_val = choose_val(keys, sizes)
    is_val = is_val if is_val.any() or not rows else keys == keys.max()
    splits = {split: [row for row, v in zip(rows, is_val) if v == (split == 'val')] for split in ('train', 'val')}
    if not splits['train']:
        raise UserError(f'{", ".join(input)}: too few pairs to train on: it takes two with different sources, at least')
    texts = (text for row in (rows if tokenizer == 'char' else splits['train']) for text in row)
    tok = make_tokenizer(tokenizer, texts, vocabulary(sum(len(text) for row in rows for text in row)), ('pad', 'bos', 'eos'))
    write_pairs(folder, tok, splits, source, f'{val:.0%} val, by a hash of the source: pairs with the same one stay together')
else:
    keys, sizes = survey(read_all())
    kept = np.zeros(len(keys), dtype=bool)
    kept[np.unique(keys, return_index=True)[1]] = True
    sizes *= kept  # what is there twice counts once
    documents, doubles, characters = int(kept.sum()), int((~kept).sum()), int(sizes.sum())
    if characters < 20:
        raise UserError(f'{", ".join(input)}: only {characters} characters of text, that is too little to train on')
    is_val, first_val = choose_val(keys, sizes), int(characters * (1 - val))
    by_documents = bool(is_val.any())
    split = (f'{val:.0%} val, whole documents by a hash of their text' if by_documents else
             f'first {1 - val:.0%} / last {val:.0%} of the characters, as there are too few documents to choose from')
    print(f'{documents:,} document{"s" * (documents > 1)} of {characters:,} characters; left out: {doubles:,} doubles')
    print(f'split: {split}')
    if tokenizer == 'char':  # it must know the characters of val too, which could not be written otherwise
        tok = make_tokenizer(tokenizer, (text for text, _ in read_all()))
    else:
        tok = make_tokenizer(tokenizer, train_texts([divided]), vocabulary(characters), ('eot',))
    source |= {'documents': documents, 'doubles': doubles, 'sha256_of_hashes': hashlib.sha256(keys.tobytes()).hexdigest()}
    write_corpus(folder, tok, [divided], source, split, characters)
print(f'next: python train.py --dataset={name}' + (f' --data_dir={data_dir}' if data_dir else ''))
