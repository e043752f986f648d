"""
Your own text as a dataset: files, whole folders, globs.

    python prepare/text.py --input=novel.txt            then: python train.py --dataset=mine
    python prepare/text.py --input=notes --input='mails/*.jsonl' --field=body --name=letters
    python prepare/text.py --input=talk.csv --pairs --name=talk     what is said, and the reply

A .txt, .md or .py file is one document, and so is each row of a .jsonl, .json, .csv or .tsv file.
Duplicates are dropped, and whole documents go to val, by a hash of their text: so val holds nothing
that is in train. If there are too few documents for that, val is the end of the text.
"""
import collections
import functools
import glob
import hashlib
import itertools
import os
import shlex
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

input: tuple[str, ...] = ()    # a file, a folder or a glob; may be given several times
name = 'mine'                  # of the dataset: it is written to data/NAME
tokenizer = 'bpe'              # char, byte, bpe, sentencepiece, gpt2, smollm2, FOLDER or out/RUN
vocab_size: int | None = None  # of bpe and sentencepiece (None: 512 to 8,192, to suit the text)
separator: str | None = None   # text between documents, such as '<|endoftext|>' (None: none)
pairs = False                  # rows are a source and its target, for models that reply
skip_bad = False               # leave out rows that lack a text or make no sense, and count them
field = ''                     # what to read of a row ('': text, or source,target with --pairs)
val = 0.1                      # (0, 1) fraction of the text that is for validation
data_dir: str | None = None    # where datasets live (None: data/ beside train.py)
configure(__file__, globals())

from pocket.datasets import (
    choose_val_by_hash,
    dataset_folder,
    first_of_each,
    hash_documents,
    make_dataset_tokenizer,
    print_next_step,
    read_documents,
    training_sample,
    write_corpus,
    write_pairs,
)
from pocket.errors import UserError
from pocket.files import find_path
from pocket.tables import (
    SHORT_NAMES,
    SOURCE_NAMES,
    count,
    find_columns,
    find_pair_columns,
    kind_of_file,
    looks_like_json,
    normalized,
    read_head,
    read_records,
    read_table,
)
from pocket.tokenizer import UnknownCharacters, VocabularyTooSmall

TABLES = ('.jsonl', '.ndjson', '.csv', '.tsv')
TEXTS = ('.txt', '.md', '.py')


# --- Reading --------------------------------------------------------------------------------------

bad_rows = []   # what is wrong with the rows that --skip_bad has left out, in the current pass
notes = {}      # what was said about files: each once, although they are read twice


def say(note):
    """Print a note, once."""
    if note not in notes:
        notes[note] = True
        print(note)


def report_bad_row(message):
    """Called for each row that makes no sense: an error, unless --skip_bad leaves it out."""
    if not skip_bad:
        raise UserError(f'{message}; --skip_bad leaves out such rows')
    bad_rows.append(message)


def say_what_is_left_out():
    """Print how many rows --skip_bad has left out in this pass, and begin to count anew."""
    if bad_rows:
        number = count(len(bad_rows), 'bad row')
        say(f'{number} left out; the first: {bad_rows[0]}')
    bad_rows.clear()


def find_files():
    """The files that --input names, each once; of a folder those of a known kind, hidden ones left
    out, sorted by name."""
    kinds = TABLES if pairs else (*TEXTS, *TABLES)
    files = {}
    for given in input:
        path = find_path(given)
        if path.is_dir():
            found, others = find_in_folder(path, kinds)
            missing = f'there is no {", ".join(kinds)} file in {given}'
            if others:
                listed = ', '.join(f'{number:,} {kind}' for kind, number in others.items())
                if found:
                    print(f'{given}: not read: {listed}; a file that is named is read')
                else:
                    missing += f', but {listed}: name a file to have it read'
        else:
            found = [path] if path.exists() else map(find_path, glob.glob(given, recursive=True))
            missing = f'there is no file {given}'
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(missing)
        for path in sorted(found, key=lambda path: path.as_posix()):
            files[path.resolve()] = path
    return list(files.values())


def refuse_folder(error):
    """Called for a folder that can't be read: to leave it out would be a guess."""
    raise UserError(f'cannot read {error.filename}: {error.strerror}')


def find_in_folder(folder, kinds):
    """The files of these kinds in a folder and its subfolders, without hidden ones.

    Links to folders are followed, each folder is read once. Returns a list of paths, and a Counter
    of the suffixes of other files.
    """
    found = []
    others = collections.Counter()
    visited = set()
    for name, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        if os.path.realpath(name) in visited:   # a link to a folder that contains it, or another
            folders.clear()
            continue
        visited.add(os.path.realpath(name))
        folders[:] = sorted(part for part in folders if not part.startswith('.'))
        for path in (Path(name, part) for part in names if not part.startswith('.')):
            if path.suffix.lower() in kinds and path.is_file():
                found.append(path)
            elif not path.is_file():
                others['broken link or special file'] += 1
            else:
                others[f'{path.suffix or "file without a suffix"}'] += 1
    return found, others


def read_rows(path):
    """Yield the texts in `fields` of each row of a table, as a list. Raises UserError."""
    if kind_of_file(path, expect_table=pairs) == 'json':
        yield from read_json_rows(path)
    else:
        yield from read_table_rows(path)


def read_table_rows(path):
    """read_rows() of a .csv or .tsv file."""
    header, rows = read_table(path, report_bad_row)
    if not header:
        return
    columns = choose_columns(path, header)
    if columns is None:   # there is no header
        columns = list(range(len(fields)))
        yield [header[i] for i in columns]
    for _, row in rows:
        yield [row[i] for i in columns]


def choose_columns(path, header):
    """The indices of the columns to read; None if the first row is no header. Raises UserError."""
    listed = ', '.join(header)
    if pairs and not field:
        try:
            columns = find_pair_columns(header)
        except ValueError:
            raise UserError(f'{path} does not say which columns are source and target: it has '
                            f'{listed[:200]}; name two with --field=SOURCE,TARGET, or add a first '
                            f'line with their names if it lacks one') from None
        if columns is None:
            say(f'{path} does not name source and target: the first two columns are taken, from '
                'the first line on')
            return None
    else:
        columns = find_columns(header, fields)
        if columns == [None] and len(header) == 1 and not field:
            say(f'{path} has one column, which is not called text: all of it is taken, from the '
                'first line on')
            return None
        for name, column in zip(fields, columns):
            if column is None:
                raise UserError(f'{path} has no column {name!r}: it has {listed[:200]}; name what '
                                'to read with --field=…' + pairs_hint(header))
    say_what_is_read(path, header, columns)
    return columns


def pairs_hint(names):
    """Advice for a table of pairs that is read as documents."""
    if pairs or field:
        return ''
    if {'messages', 'conversations'} & set(names):
        return '; python prepare/chat.py reads conversations'
    try:
        columns = find_pair_columns(names)
    except ValueError:
        return ''
    is_pair = columns and normalized(names[columns[0]]) in (*SOURCE_NAMES, *SHORT_NAMES)
    return ', or add --pairs' if is_pair else ''


def say_what_is_read(path, names, columns):
    """Say which columns of a file are read, if there are others or they have unusual names."""
    read = [str(names[i]).strip() for i in columns]
    unused = [str(name).strip() or f'column {i + 1}, which has no name'
              for i, name in enumerate(names) if i not in columns]
    if unused:
        say(f'{path}: {" and ".join(read)} {"are" if pairs else "is"} read, not '
            f'{", ".join(unused)[:200]}')
    elif pairs and [name.lower() for name in read] != ['source', 'target']:
        say(f'{path}: {read[0]} is the source, {read[1]} the target')


def read_json_rows(path):
    """read_rows() of a .json, .jsonl or .ndjson file."""
    keys = None       # of the texts to read, as the first row that has them spells them
    is_said = False   # whether we have said which these are
    for number, record in read_records(path, report_bad_row):
        if is_list_of_texts(record, len(fields)):   # without names
            yield record if pairs else [record]
            continue
        if isinstance(record, dict) and keys is None:
            keys = choose_keys(path, number, record)
        if keys and isinstance(record, dict) and all(isinstance(record.get(k), str) for k in keys):
            if not is_said:
                names = list(record)
                say_what_is_read(path, names, [names.index(key) for key in keys])
                is_said = True
            yield [record[key] for key in keys]
            continue
        missing = ' and '.join(keys or fields)
        hint = pairs_hint(list(record)) if isinstance(record, dict) else ''
        report_bad_row(f'{path}, line {number} has no text in {missing}: {str(record)[:100]}; '
                       f'name what to read with --field=…{hint}')


def is_list_of_texts(record, size):
    """Whether a JSON value is a row without names: a text or, of pairs, a list of two."""
    if field:
        return False
    if not pairs:
        return isinstance(record, str)
    return (isinstance(record, list) and len(record) == size
            and all(isinstance(item, str) for item in record))


def choose_keys(path, number, record):
    """The keys of the texts in the objects of a file, from one of them; None if it lacks them."""
    names = list(record)
    if pairs and not field:
        if 'messages' in names or 'conversations' in names:
            raise UserError(f'{path} holds conversations: python prepare/chat.py --input={path} '
                            'reads them')
        try:
            columns = find_pair_columns(names) or [0, 1]
        except ValueError:
            report_bad_row(f'{path}, line {number} does not say what is source and target: it has '
                           f'{", ".join(names)[:200]}; name two with --field=SOURCE,TARGET')
            return None
    else:
        columns = find_columns(names, fields)
        if None in columns:
            return None
    return [names[i] for i in columns]


def version_of(path):
    """What is another once somebody has written into a file. Raises UserError."""
    try:
        status = path.stat()
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    return status.st_size, status.st_mtime_ns


def read_all():
    """Yield the documents of all files in pieces (text, ends).

    Raises UserError if a file is not what it was when it was found: each pass reads the same text.
    """
    separated = False
    for path in files:
        if kind_of_file(path) == 'text':
            if looks_like_json(*read_head(path)):
                say(f'{path} looks like JSON, but it is read as text because of its suffix: rename '
                    'it to .jsonl or .json to have its fields read')
            for text, ends, is_end_of_file in mark_last(read_documents(path, separator)):
                separated = separated or (ends and not is_end_of_file)
                yield text, ends
        else:
            for row in read_rows(path):
                if row[0].strip():
                    yield row[0], True
        if version_of(path) != versions[path]:
            raise changed_while_read(path)
    if separator and not separated:
        say(f'warning: the separator {separator!r} does not occur between documents' +
            advice_on_escapes(separator))


def mark_last(pieces):
    """Yield (text, ends, whether it is the last) for pieces (text, ends)."""
    waiting = None
    for piece in pieces:
        if waiting is not None:
            yield *waiting, False
        waiting = piece
    if waiting is not None:
        yield *waiting, True


def advice_on_escapes(text):
    """Advice for somebody who typed a backslash and an n instead of a line break."""
    if '\\n' in text or '\\t' in text:
        return "; in most shells a line break is typed as $'\\n'"
    return ''


# --- Documents ------------------------------------------------------------------------------------

def changed_while_read(name):
    """A UserError that says that somebody has written into a file."""
    return UserError(f'{name} changed while it was read: run the same command again when nobody '
                     'writes to it')


def check_unchanged(number, keep):
    """Raise UserError if there are more documents now than when they were counted."""
    if number >= len(keep):
        raise changed_while_read(', '.join(input))


def split_by_document(keep, is_val):
    """Yield the pieces of all documents that are kept, whole documents to either split."""
    number = 0   # of the document
    for text, ends in read_all():
        check_unchanged(number, keep)
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
        check_unchanged(number, keep)
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


def learn_tokenizer(texts, characters, special_tokens):
    """The tokenizer that --tokenizer names. texts: a function that returns what it learns from."""
    size = default_vocab_size(characters) if vocab_size is None else vocab_size
    try:
        tok, _ = make_dataset_tokenizer(tokenizer, texts(), size, special_tokens)
    except VocabularyTooSmall as e:
        if vocab_size is not None:
            raise
        # Of Chinese and the like, the characters alone are more
        larger = e.needed + size
        print(f'{size:,} tokens are too few for the {e.needed:,} that this text needs at least: '
              f'made {larger:,}')
        tok, _ = make_dataset_tokenizer(tokenizer, texts(), larger, special_tokens)
    return tok


def end_with_line_breaks(tok, pieces):
    """Yield the same pieces, but documents end with a line break: tok has no end-of-text token."""
    try:
        tok.encode('\n')
    except UnknownCharacters:
        raise UserError(f'--tokenizer={tokenizer} has nothing to put between documents, neither '
                        'an end-of-text token nor a line break: choose another') from None
    for split, text, ends in pieces():
        needs_one = ends and not text.endswith('\n')
        yield split, f'{text}\n' if needs_one else text, ends


def prepare_documents(folder):
    """Write a token stream: documents one after the other."""
    # A first pass over the text finds duplicates and chooses what is val
    hashes, sizes = hash_documents(read_all())
    say_what_is_left_out()
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
        how_split = f'{100 * val:g}% val, whole documents by a hash of their text'
        pieces = functools.partial(split_by_document, keep, is_val)
    else:
        how_split = (f'first {100 * (1 - val):g}% / last {100 * val:g}% of the characters, '
                     'as there are too few documents to choose from')
        first_val = int(characters * (1 - val))
        if first_val == 0:
            raise UserError(f'--val={val:g} leaves no text to train on: lower it')
        pieces = functools.partial(split_by_position, keep, first_val)
    noun = 'document' if documents == 1 else 'documents'
    print(f'{documents:,} {noun} of {characters:,} characters; {duplicates:,} duplicates dropped')
    print(f'split: {how_split}')

    # A tokenizer learns from train alone, but a char tokenizer could not write val without all of
    # its characters. A single text needs no id between characters that says where it ends
    if tokenizer == 'char':
        special_tokens = ('eot',) if documents > 1 else ()
        tok = learn_tokenizer(lambda: (text for text, _ in read_all()), characters, special_tokens)
    else:
        tok = learn_tokenizer(lambda: training_sample([pieces]), characters, ('eot',))
    if documents > 1 and tok.eos_id is not None:
        tok.has_documents = True
    elif documents > 1:   # a tokenizer of somebody else
        pieces = functools.partial(end_with_line_breaks, tok, pieces)

    # A second pass encodes it. The hashes tell this text from any other: see write_corpus()
    source = {
        'source': ', '.join(input),
        'documents': documents,
        'doubles': duplicates,
        'prepared_by': 'prepare/text.py',
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
    say_what_is_left_out()
    print(f'{count(len(rows), "pair")}; {read - len(rows):,} were duplicates or had an empty side')

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
    tok = learn_tokenizer(lambda: itertools.chain.from_iterable(learned), characters,
                          ('pad', 'bos', 'eos'))
    if tok.eos_id is None or tok.decoder_start_id is None:
        raise UserError(f'--tokenizer={tokenizer} has no special tokens to begin and end replies '
                        'with: choose another')

    how_split = (f'{100 * val:g}% val, by a hash of the source: '
                 'pairs with the same one stay together')
    source = {'source': ', '.join(input), 'prepared_by': 'prepare/text.py'}
    write_pairs(folder, tok, splits, source, how_split)


# --- Main -----------------------------------------------------------------------------------------

# Check the options
if not input or '' in input:
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
versions = {path: version_of(path) for path in files}
if pairs:
    prepare_pairs(folder)
else:
    prepare_documents(folder)
print_next_step(f'--dataset={shlex.quote(name)}', data_dir)
