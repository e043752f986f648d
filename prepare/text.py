"""
Your own text as a dataset: files, whole folders, globs.

    python prepare/text.py --input=novel.txt            then: python train.py --dataset=mine
    python prepare/text.py --input=notes --input='mails/*.jsonl' --field=body --name=letters
    python prepare/text.py --input=talk.csv --pairs --name=talk     what is said, and the reply

A .txt, .md or .py file is one document, and so is each row of a .jsonl, .csv or .tsv file.
Duplicates are dropped, and whole documents go to val, by a hash of their text: so val holds nothing
that is in train. If there are too few documents for that, val is the end of the text.
"""
import csv
import functools
import glob
import hashlib
import itertools
import json
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.datasets import (
    choose_val_by_hash,
    dataset_folder,
    first_of_each,
    hash_documents,
    print_next_step,
    read_documents,
    read_lines,
    training_sample,
    write_corpus,
    write_pairs,
)
from pocket.errors import UserError
from pocket.files import find_path
from pocket.tokenizer import make_tokenizer

input: tuple[str, ...] = ()    # a file, a folder or a glob; may be given several times
name = 'mine'                  # of the dataset: it is written to data/NAME
tokenizer = 'bpe'              # char, byte, bpe, sentencepiece, or one of tiktoken's, such as gpt2
vocab_size: int | None = None  # of bpe and sentencepiece (None: 512 to 8,192, to suit the text)
separator: str | None = None   # text between documents, such as '<|endoftext|>' (None: none)
pairs = False                  # rows are a source and its target, for models that reply
field = ''                     # what to read of a row ('': text, or source,target with --pairs)
val = 0.1                      # (0, 1) fraction of the text that is for validation
data_dir: str | None = None    # where datasets live (None: data/ beside train.py)
configure(__file__, globals())

TABLES = ('.jsonl', '.csv', '.tsv')
TEXTS = ('.txt', '.md', '.py')


# --- Reading --------------------------------------------------------------------------------------

def find_files():
    """The files that --input names, each once; of a folder those of a known kind, hidden ones left
    out, sorted by name."""
    kinds = TABLES if pairs else (*TEXTS, *TABLES)
    files = {}
    for given in input:
        path = find_path(given)
        if path.is_dir():
            found = find_in_folder(path, kinds)
            missing = f'there is no {", ".join(kinds)} file in {given}'
        else:
            found = [path] if path.exists() else map(find_path, glob.glob(given, recursive=True))
            missing = f'there is no file {given}'
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(missing)
        for path in sorted(found, key=lambda path: path.as_posix()):
            files[path.resolve()] = path
    return list(files.values())


def find_in_folder(folder, kinds):
    """The files of these kinds in a folder and its subfolders, without hidden ones."""
    found = []
    for path in folder.rglob('*'):
        hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        if path.suffix.lower() in kinds and not hidden:
            found.append(path)
    return found


def read_jsonl(path):
    """Yield (line number, value) for the lines of a .jsonl file. Raises UserError."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            raise UserError(f'{path}, line {number} is not JSON: {e}') from None


def read_table(path):
    """Yield (line number, {column: text}) for the rows of a .csv or .tsv file. Raises UserError."""
    csv.field_size_limit(2**31 - 1)
    lines = (f'{line}\n' for line in read_lines(path))
    if path.suffix.lower() == '.tsv':
        rows = csv.reader(lines, delimiter='\t', quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        records = rows
        if pairs and not field and not set(fields).issubset(header):
            print(f'{path} does not name {" and ".join(fields)}: the first two columns are taken, '
                  'from the first line on')
            records = itertools.chain([header], rows)
            header = fields
        for row in records:
            if row:
                yield rows.line_num, dict(zip(header, row))
    except csv.Error as e:
        kind = path.suffix.lower()
        raise UserError(f'{path}, line {rows.line_num} is not {kind}: {e}') from None


def read_rows(path):
    """Yield the texts in `fields` of each row of a table, as a list. Raises UserError."""
    read = read_jsonl if path.suffix.lower() == '.jsonl' else read_table
    for number, row in read(path):
        is_complete = isinstance(row, dict) and all(isinstance(row.get(f), str) for f in fields)
        if not is_complete:
            raise UserError(f'{path}, line {number} has no text in {" and ".join(fields)}: '
                            f'{str(row)[:100]}; name what to read with --field=…')
        yield [row[f] for f in fields]


def read_all():
    """Yield the documents of all files in pieces (text, ends)."""
    for path in files:
        if path.suffix.lower() in TABLES:
            for row in read_rows(path):
                text = row[0]
                if text.strip():
                    yield text, True
        else:
            yield from read_documents(path, separator)


# --- Documents ------------------------------------------------------------------------------------

def split_by_document(keep, is_val):
    """Yield the pieces of all documents that are kept, whole documents to either split."""
    number = 0   # of the document
    for text, ends in read_all():
        if keep[number]:
            split = 'val' if is_val[number] else 'train'
            yield split, text, ends
        if ends:
            number += 1


def split_by_position(keep, first_val):
    """Yield the pieces of all documents that are kept; val begins at this character of them all."""
    number = 0   # of the document
    done = 0     # characters before this piece
    for text, ends in read_all():
        if keep[number]:
            cut = min(max(first_val - done, 0), len(text))
            done += len(text)
            if cut > 0:
                yield 'train', text[:cut], ends and cut == len(text)
            if cut < len(text):
                yield 'val', text[cut:], ends
        if ends:
            number += 1


def default_vocab_size(characters):
    """A size for this much text and a small model: in a larger one each token is too rare to be
    learned."""
    return min(max(characters // 1000, 512), 8192)


def prepare_documents(folder):
    """Write a token stream: documents one after the other."""
    # A first pass over the text finds duplicates and chooses what is val
    hashes, sizes = hash_documents(read_all())
    keep = first_of_each(hashes)
    sizes[~keep] = 0
    documents = int(keep.sum())
    duplicates = len(keep) - documents
    characters = int(sizes.sum())
    if characters < 20:
        raise UserError(f'{", ".join(input)}: only {characters} characters of text, '
                        'too few to train on')

    is_val = choose_val_by_hash(hashes, sizes, val)
    if is_val.any():
        how_split = f'{val:.0%} val, whole documents by a hash of their text'
        pieces = functools.partial(split_by_document, keep, is_val)
    else:
        how_split = (f'first {1 - val:.0%} / last {val:.0%} of the characters, '
                     'as there are too few documents to choose from')
        pieces = functools.partial(split_by_position, keep, int(characters * (1 - val)))
    noun = 'document' if documents == 1 else 'documents'
    print(f'{documents:,} {noun} of {characters:,} characters; {duplicates:,} duplicates dropped')
    print(f'split: {how_split}')

    # A tokenizer learns from train alone, but a char tokenizer could not write val without all of
    # its characters
    if tokenizer == 'char':
        tok = make_tokenizer('char', (text for text, _ in read_all()))
    else:
        size = default_vocab_size(characters) if vocab_size is None else vocab_size
        tok = make_tokenizer(tokenizer, training_sample([pieces]), size, ('eot',))

    # A second pass encodes it. The hashes tell this text from any other: see write_corpus()
    source = {
        'source': ', '.join(input),
        'documents': documents,
        'doubles': duplicates,
        'sha256_of_hashes': hashlib.sha256(hashes.tobytes()).hexdigest(),
    }
    write_corpus(folder, tok, [pieces], source, how_split, characters)


# --- Pairs ----------------------------------------------------------------------------------------

def prepare_pairs(folder):
    """Write pairs of a source and its target, the rows of tables."""
    # Read the pairs, each once
    read = 0
    rows = {}
    for path in files:
        for source, target in read_rows(path):
            read += 1
            if source.strip() and target.strip():
                rows[source, target] = True
    rows = list(rows)
    print(f'{len(rows):,} pairs; {read - len(rows):,} were duplicates or had an empty side')

    # Split them: a hash of its source decides, so pairs with the same source stay together
    hashes, sizes = hash_documents((source, True) for source, _ in rows)
    is_val = choose_val_by_hash(hashes, sizes, val)
    if rows and not is_val.any():
        is_val = hashes == hashes.max()
    splits = {'train': [], 'val': []}
    for row, row_is_val in zip(rows, is_val):
        splits['val' if row_is_val else 'train'].append(row)
    if not splits['train']:
        raise UserError(f'{", ".join(input)}: too few pairs to train on: '
                        'it takes at least two with different sources')

    # A tokenizer learns from train alone, but a char tokenizer could not write val without all of
    # its characters
    learned = rows if tokenizer == 'char' else splits['train']
    characters = sum(len(source) + len(target) for source, target in rows)
    size = default_vocab_size(characters) if vocab_size is None else vocab_size
    tok = make_tokenizer(tokenizer, itertools.chain.from_iterable(learned), size,
                         ('pad', 'bos', 'eos'))

    how_split = f'{val:.0%} val, by a hash of the source: pairs with the same one stay together'
    write_pairs(folder, tok, splits, {'source': ', '.join(input)}, how_split)


# --- Main -----------------------------------------------------------------------------------------

# Check the options
if not input:
    raise UserError('say what to read: --input=FILE, a folder or a glob')
if Path(name).name != name or name in ('', '..'):
    raise UserError(f'name must be possible as the name of a folder, got {name!r}')

fields = field.split(',')
if not field:
    fields = ['source', 'target'] if pairs else ['text']
if len(fields) != (2 if pairs else 1):
    expected = 'two names, such as q,a' if pairs else 'one name'
    raise UserError(f'field must be {expected}, got {field!r}')

# Read, split, encode and write
folder = dataset_folder(data_dir, name)
files = find_files()
if pairs:
    prepare_pairs(folder)
else:
    prepare_documents(folder)
print_next_step(f'--dataset={name}', data_dir)
