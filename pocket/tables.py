"""
Tables in the formats that other programs write: CSV, TSV, and JSON in several layouts.

What a file is follows from its content, and from its suffix if the content leaves a choice:

    read_table(path)     .csv and .tsv: (first row, iterator over (line number, row))
    read_records(path)   .json, .jsonl, .ndjson: iterator over (line number, value)

CSV is read as RFC 4180 describes it (https://www.rfc-editor.org/rfc/rfc4180), with a comma, a
semicolon or a tab between fields. All rows must have as many fields as the first: a row with more
has an unquoted comma in a field, and to cut it anywhere would be a guess.
"""
import csv
import json
import re
from collections import namedtuple
from itertools import chain

from pocket.datasets import read_blocks, read_lines
from pocket.errors import UserError
from pocket.tokenizer import replace_lone_surrogates

JSON_SUFFIXES = ('.jsonl', '.ndjson', '.json')
TABLE_SUFFIXES = ('.csv', '.tsv', '.tab')
DELIMITERS = {'\t': 'tab', ';': 'semicolon', ',': 'comma'}
SAMPLE = 2**20   # characters of a table that decide how it is written

# What columns of sources and of targets are usually called, in lower case
SOURCE_NAMES = ('source', 'src', 'question', 'prompt', 'instruction', 'input', 'context', 'query',
                'user', 'human', 'request', 'utterance')
TARGET_NAMES = ('target', 'tgt', 'answer', 'response', 'output', 'reply', 'completion', 'assistant',
                'bot')
SHORT_NAMES = ('q', 'a')   # of question and answer: beside each other only, as 'a' is a word, too
ID_NAMES = ('id', 'idx', 'index')
OTHER_NAMES = (*ID_NAMES, 'text', 'label', 'title', 'name', 'date')
# What the columns of translations are called: a header if all of them are
LANGUAGES = ('english', 'german', 'deutsch', 'french', 'spanish', 'italian', 'portuguese', 'dutch',
             'polish', 'czech', 'russian', 'ukrainian', 'turkish', 'arabic', 'hindi', 'chinese',
             'japanese', 'korean', 'en', 'de', 'fr', 'es', 'it', 'pt', 'nl', 'pl', 'cs', 'ru', 'uk',
             'tr', 'ar', 'zh', 'ja', 'ko', 'eng', 'deu', 'ger', 'fra', 'fre', 'spa', 'ita')

# How the fields of a table are separated, and whether a field in quotes may contain anything
Dialect = namedtuple('Dialect', 'delimiter quoted')


def raise_bad_row(message):
    """What happens to a row that makes no sense, unless the caller has something better to do."""
    raise UserError(message)


# --- What a file is -------------------------------------------------------------------------------

def kind_of_file(path, expect_table=False):
    """'json', 'table' or 'text': how to read a file.

    expect_table: the file should be one of the first two, whatever its suffix. Raises UserError if
    it is neither.
    """
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return 'json'
    head, is_whole = read_head(path)
    is_json = looks_like_json(head, is_whole)
    if suffix in TABLE_SUFFIXES:
        return 'json' if is_json else 'table'
    if not expect_table:
        has_own_suffix = suffix in ('.txt', '.md', '.py')
        return 'json' if is_json and not has_own_suffix else 'text'

    # A table with the suffix of a text: its content has to be beyond doubt
    if is_json:
        return 'json'
    dialect = find_dialect(head, is_whole, suffix)
    rows = Rows(head, is_whole, dialect)
    is_regular = len(rows.first) >= 2 and rows.share_of_regular() == 1
    if is_regular and (dialect.delimiter == '\t' or is_header(rows.first)):
        return 'table'
    raise UserError(f'{path} is neither JSON nor a table with the same number of columns in all '
                    f'rows: save it as .jsonl, .csv or .tsv')


def read_head(path):
    """The first lines of a file, about SAMPLE characters, and whether these are all."""
    head = []
    size = 0
    for line in read_lines(path):
        if size > SAMPLE:
            return head, False
        head.append(line)
        size += len(line) + 1
    return head, True


def looks_like_json(head, is_whole):
    """Whether the first line, or else all of a file, is a JSON object or array."""
    text = '\n'.join(head).strip()
    if not text.startswith(('{', '[')):
        return False
    candidates = [text.split('\n', 1)[0]]
    if is_whole:
        candidates.append(text)
    for candidate in candidates:
        try:
            json.loads(candidate)
            return True
        except (ValueError, RecursionError):
            continue
    return False


# --- JSON -----------------------------------------------------------------------------------------

def read_records(path, bad=raise_bad_row):
    """Yield (line number, value) for the values in a JSON file. Raises UserError.

    A file may have a value per line (JSON Lines), be an array of values, or one object that
    contains nothing but such an array. bad(message) is called for each line that is not JSON.
    Halves of surrogate pairs, which no text in UTF-8 can contain, become U+FFFD.
    """
    lines = enumerate(read_lines(path), start=1)
    first_number, first = next(((n, line) for n, line in lines if line.strip()), (1, ''))
    if not first:
        return
    rest = ((number, line) for number, line in lines if line.strip())
    second = next(rest, (0, None))
    has_lines = path.suffix.lower() in ('.jsonl', '.ndjson')
    is_whole_value = is_json(first)
    is_only_line = second[1] is None and (is_whole_value or not has_lines)
    if is_only_line or first.strip() in ('[', '{') or not (has_lines or is_whole_value):
        yield from read_array(path)
        return

    for number, line in chain([(first_number, first), second], rest):
        if line is None:
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            bad(f'{path}, line {number} is not JSON: {e}')
            continue
        yield number, without_lone_surrogates(value)


def is_json(text):
    """Whether a text is a JSON value."""
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def read_array(path):
    """Yield (line number, value) for the values of a file that is an array, or a single value."""
    text = ''.join(read_blocks(path))
    try:
        whole = json.loads(text)
        if isinstance(whole, dict) and len(whole) == 1:
            [(name, values)] = whole.items()
            if isinstance(values, list) and all(isinstance(value, dict) for value in values):
                print(f'{path} is an object with one array, {name!r}: its values are read')
                start = re.match(r'\s*\{\s*"(\\.|[^"\\])*"\s*:\s*', text).end()
                yield from number_values(text, start)
                return
        if isinstance(whole, list):
            yield from number_values(text, text.index('['))
        else:
            yield 1, without_lone_surrogates(whole)
    except json.JSONDecodeError as e:
        raise UserError(f'{path}, line {e.lineno} is not JSON: {e.msg}; a file may hold one array, '
                        f'or a value on each line') from None
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not JSON: {e}') from None


def number_values(text, start):
    """Yield (line number, value) for the values of the array that begins at `start` in a text.

    >>> list(number_values('[1,\\n {"a": 2}]', 0))
    [(1, 1), (2, {'a': 2})]
    """
    decoder = json.JSONDecoder()
    separator = re.compile(r'[\s,]*')
    line = 1 + text.count('\n', 0, start)
    position = start + 1
    counted = start   # line breaks before this place are in `line`
    while True:
        position = separator.match(text, position).end()
        if text[position] == ']':
            return
        line += text.count('\n', counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield line, without_lone_surrogates(value)


def without_lone_surrogates(value):
    """A JSON value in which every text can be written as UTF-8."""
    if isinstance(value, str):
        return replace_lone_surrogates(value) if has_surrogates(value) else value
    if isinstance(value, list):
        return [without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_lone_surrogates(key): without_lone_surrogates(item)
                for key, item in value.items()}
    return value


has_surrogates = re.compile('[\ud800-\udfff]').search


# --- CSV and TSV ----------------------------------------------------------------------------------

def read_table(path, bad=raise_bad_row):
    """(first row, iterator over (line number, row) of the others) of a .csv or .tsv file.

    Rows are lists of str, as many as the first row has; empty lines are left out. The first row is
    [] if the file is empty. bad(message) is called for each row with another number of fields.
    Raises UserError.
    """
    csv.field_size_limit(2**31 - 1)
    head, is_whole = read_head(path)
    dialect = find_dialect(head, is_whole, path.suffix.lower())
    rows = read_rows(path, dialect)
    _, first_row = next(rows, (0, []))
    return first_row, check_rows(path, rows, len(first_row), dialect, bad)


def check_rows(path, rows, columns, dialect, bad):
    """Yield the rows that have as many fields as there are columns; report the others."""
    for number, row in rows:
        if len(row) == columns:
            yield number, row
        else:
            delimiter = DELIMITERS[dialect.delimiter]
            bad(f'{path}, line {number} has {count(len(row), "field")}, but the first row has '
                f'{columns}: put quotes around a field that contains a {delimiter}')


def count(number, noun):
    """A number with its noun.

    >>> count(1, 'field'), count(2, 'field')
    ('1 field', '2 fields')
    """
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'


def read_rows(path, dialect):
    """Yield (line number, row) of a file. Raises UserError if its quotes make no sense."""
    lines = read_lines(path)
    try:
        yield from parse(lines, dialect)
    except csv.Error as e:
        raise UserError(f'{path}, line {e.line_number} is not {path.suffix.lower() or "CSV"}: its '
                        f'quotes do not match ({e}); close each, and double those inside a field'
                        ) from None


def parse(lines, dialect):
    """Yield (line number, row) for lines of text. Raises csv.Error, with a line_number."""
    if not dialect.quoted:
        for number, line in enumerate(lines, start=1):
            if line:
                yield number, [unquote(field) for field in line.split(dialect.delimiter)]
        return

    rows = csv.reader((f'{line}\n' for line in lines), delimiter=dialect.delimiter, strict=True)
    begin = 1   # the line where the next row begins: quoted fields contain line breaks
    try:
        for row in rows:
            is_excel_note = begin == 1 and len(row) <= 2 and row and row[0].startswith('sep=')
            if row and not is_excel_note:
                yield begin, row
            begin = rows.line_num + 1
    except csv.Error as e:
        e.line_number = begin
        raise


def unquote(field):
    """A field without its quotes, if it has a pair around it and only doubled ones inside.

    >>> unquote('"say ""hi"" twice"'), unquote('"Hi", he said, "you"')
    ('say "hi" twice', '"Hi", he said, "you"')
    """
    if len(field) < 2 or field[0] != '"' or field[-1] != '"':
        return field
    inside = field[1:-1]
    if '"' in inside.replace('""', ''):
        return field
    return inside.replace('""', '"')


class Rows:
    """How the first rows of a table look in a dialect.

    first: the first of them. counted: the number of fields of each. broken: the quotes make no
    sense in it.
    """

    def __init__(self, head, is_whole, dialect):
        self.first = []
        self.counted = []
        self.broken = False
        last_line = 0
        try:
            for number, row in parse(iter(head), dialect):
                if not self.counted:
                    self.first = row
                self.counted.append(len(row))
                last_line = number
        except csv.Error:
            # A sample may end in a quoted field; but one that goes on for a hundred lines does not
            ends_in_field = not is_whole and len(head) - last_line < 100
            self.broken = not ends_in_field

    def share_of_regular(self):
        """The fraction of rows that have as many fields as the first."""
        if self.broken or not self.counted:
            return 0.0
        return self.counted.count(self.counted[0]) / len(self.counted)


def find_dialect(head, is_whole, suffix):
    """The Dialect of a table, found by trying each on its first lines.

    What counts, in this order: a header with a known name, rows of equal length, and a delimiter
    that is no punctuation, which a space would follow.
    """
    if head and re.fullmatch('sep=[,;\t]', head[0]):   # Excel says so itself
        return Dialect(head[0][-1], quoted=True)

    text = '\n'.join(head)
    best = None
    best_score = None
    for rank, delimiter in enumerate(DELIMITERS):
        dialect = Dialect(delimiter, quoted=True)
        rows = Rows(head, is_whole, dialect)
        if delimiter == '\t' and rows.share_of_regular() < 1:
            # Many programs write tabs between fields and know no quotes
            plain = Rows(head, is_whole, Dialect(delimiter, quoted=False))
            if plain.share_of_regular() > rows.share_of_regular():
                dialect = Dialect(delimiter, quoted=False)
                rows = plain
        if max(rows.counted, default=0) < 2 and not rows.broken:
            continue   # it does not occur

        spaced = text.count(delimiter + ' ') > text.count(delimiter) / 2
        regular = rows.share_of_regular()
        score = (is_header(rows.first), regular == 1, not spaced,
                 suffix == '.tsv' and delimiter == '\t', regular, -rank)
        if best is None or score > best_score:
            best = dialect
            best_score = score
    return best or Dialect('\t' if suffix in ('.tsv', '.tab') else ',', quoted=True)


# --- Columns --------------------------------------------------------------------------------------

def is_header(row):
    """Whether a row has several fields, and they are usual names of columns: one of them, or of
    languages all.

    >>> is_header(['id', 'x']), is_header(['en', 'de']), is_header(['en', 'hello'])
    (True, True, False)
    >>> is_header(['Q', 'A']), is_header(['a', 'b'])
    (True, False)
    """
    known = {*SOURCE_NAMES, *TARGET_NAMES, *OTHER_NAMES}
    one_is_known = any(known & set(words_of(cell)) for cell in row)
    both_are_short = None not in find_columns(row, SHORT_NAMES)
    all_are_languages = all(normalized(cell) in LANGUAGES for cell in row)
    return len(row) >= 2 and (one_is_known or both_are_short or all_are_languages)


def normalized(name):
    """The name of a column for comparisons.

    >>> normalized(' Question ')
    'question'
    """
    return str(name).strip().lower()


def words_of(name):
    """What a column's name says: the name itself and, if it has several words but no space, these.

    >>> words_of('Question'), words_of('best_answer'), words_of('question text')
    (['question'], ['best', 'answer'], ['question text'])
    >>> words_of('inputText'), words_of('text1')
    (['input', 'text'], ['text'])
    """
    name = str(name).strip()
    if not re.fullmatch('[A-Za-z]{2}[A-Za-z0-9_-]*', name):
        return [name.lower()]
    spaced = re.sub('([a-z])([A-Z])', r'\1 \2', name)
    words = re.findall('[a-z]+', spaced.lower())
    return [word for word in words if len(word) > 1]


def find_columns(names, wanted):
    """Indices of the wanted columns, whose names may differ in case; None for each that is missing.

    >>> find_columns(['ID', 'Body'], ['body', 'title'])
    [1, None]
    """
    lowered = [normalized(name) for name in names]
    found = []
    for name in wanted:
        if name in names:
            found.append(names.index(name))
        elif normalized(name) in lowered:
            found.append(lowered.index(normalized(name)))
        else:
            found.append(None)
    return found


def find_pair_columns(names):
    """The indices of a source's column and its target's, from the names of all columns.

    None if there are two columns, both with names that we don't know: it may be that the table
    has no header. Raises ValueError if it is not clear which columns they are.
    """
    for wanted in (('source', 'target'), SHORT_NAMES):
        by_name = find_columns(names, wanted)
        if None not in by_name:
            return by_name

    exact = [{normalized(name)} for name in names]
    in_words = [set(words_of(name)) for name in names]
    for meanings in (exact, in_words):   # best_answer is as good as answer, but not beside it
        ids = [i for i, meaning in enumerate(meanings) if meaning & set(ID_NAMES)]
        sources = indices_of(meanings, SOURCE_NAMES, ids)
        targets = indices_of(meanings, TARGET_NAMES, ids)
        if len(sources) == 1 and len(targets) == 1:
            return [sources[0], targets[0]]
    if len(names) == 2 and not ids and not sources and not targets:
        return [0, 1] if is_header(names) else None
    if len(names) == 2 and not ids and len(sources) + len(targets) == 1:
        source = sources[0] if sources else 1 - targets[0]
        return [source, 1 - source]   # the other one is the other side
    raise ValueError(', '.join(map(str, names)))


def indices_of(meanings, known, excluded):
    """The numbers of the columns that mean something known, but for those excluded."""
    found = [i for i, meaning in enumerate(meanings) if meaning & set(known)]
    return [i for i in found if i not in excluded]
