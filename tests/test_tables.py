"""
pocket/tables.py: how tables and JSON of other programs are read, and what is refused.

Run it alone: pytest -n 0 tests/test_tables.py
"""
import json

import pytest

from pocket.errors import UserError
from pocket.tables import find_pair_columns, kind_of_file, read_records, read_table


def table(tmp_path, content, name='x.csv', bad=None):
    """(first row, [(line number, row), …]) of a table with this content, str or bytes."""
    path = tmp_path / name
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    options = {} if bad is None else {'bad': bad}
    header, rows = read_table(path, **options)
    return header, list(rows)


def records(tmp_path, content, name):
    path = tmp_path / name
    path.write_text(content, encoding='utf-8')
    return list(read_records(path))


# --- CSV and TSV ----------------------------------------------------------------------------------

@pytest.mark.parametrize('content, rows', [
    ('q,a\n"Hi, you","say ""yes"""\n', ['Hi, you', 'say "yes"']),
    ('q,a\r\n"two\r\nlines",x\r\n', ['two\nlines', 'x']),
    ('\ufeffq,a\nx,y', ['x', 'y']),
    ('q;a\nHi, you;Yes, me\n', ['Hi, you', 'Yes, me']),
    ('q\ta\nHi, you;\tYes; me\n', ['Hi, you;', 'Yes; me']),
    ('q\ta\n"say ""yes"""\t"a\tb"\n', ['say "yes"', 'a\tb']),
    ('sep=;\nq;a\n1,5;2,5\n', ['1,5', '2,5']),
    ('q,a\n\n\nx,y\n', ['x', 'y']),
    ('q,a\nHe said "hi",y\n', ['He said "hi"', 'y']),
])
def test_fields_are_what_was_written(tmp_path, content, rows):
    header, found = table(tmp_path, content)
    assert header == content.removeprefix('\ufeff').removeprefix('sep=;\n')[:1].split() + ['a']
    assert [row for _, row in found] == [rows]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_byte_order_marks_tell_the_encoding(tmp_path, encoding):
    header, rows = table(tmp_path, 'q,a\nżółw 你好,y\n'.encode(encoding))
    assert header == ['q', 'a'] and rows == [(2, ['żółw 你好', 'y'])]


def test_prose_with_commas_between_semicolons(tmp_path):
    """Each delimiter cuts all rows into equally many fields; a comma in prose has a space after."""
    lines = [f'Hallo {name}, wie geht es?;Gut, danke, und dir?' for name in ('Ann', 'Ben', 'Cleo')]
    header, rows = table(tmp_path, '\n'.join(lines))
    assert header == lines[0].split(';') and [row for _, row in rows][1] == lines[2].split(';')


def test_tabs_without_quoting(tmp_path):
    """Many programs write tabs and know no quotes: one that opens a field is a character of it."""
    header, rows = table(tmp_path, 'q\ta\n"Hi," he said.\tx\n"open\ty\n"all"\tz\n', 'x.tsv')
    assert [row for _, row in rows] == [['"Hi," he said.', 'x'], ['"open', 'y'], ['all', 'z']]


def test_rows_of_another_length_are_named(tmp_path):
    content = 'source,target\n"two\nlines",ok\nHello Ann, how are you?,Fine\nshort\nx,y\n'
    with pytest.raises(UserError, match='x.csv, line 4 has 3 fields, but the first row has 2'):
        table(tmp_path, content)
    bad = []
    _, rows = table(tmp_path, content, bad=bad.append)
    assert rows == [(2, ['two\nlines', 'ok']), (6, ['x', 'y'])]
    assert 'line 4' in bad[0] and 'line 5 has 1 field,' in bad[1] and len(bad) == 2


def test_quotes_that_never_end(tmp_path):
    with pytest.raises(UserError, match='x.csv, line 3 is not .csv: its quotes do not match'):
        table(tmp_path, 'q,a\nx,y\n"open,z\nw,v\n')


# --- JSON -----------------------------------------------------------------------------------------

ROWS = [{'source': 'Hi, "you"', 'target': 'line\nbreak'}, {'source': 'é', 'target': '你'}]


@pytest.mark.parametrize('name', ['x.json', 'x.jsonl', 'x.ndjson', 'x.JSON'])
@pytest.mark.parametrize('layout', ['lines', 'array', 'array in a line', 'object'])
def test_json_in_any_layout(tmp_path, name, layout):
    content = {
        'lines': '\n\n'.join(map(json.dumps, ROWS)),
        'array': json.dumps(ROWS, indent=1),
        'array in a line': json.dumps(ROWS),
        'object': json.dumps({'the [rows]': ROWS}, indent=1),
    }[layout]
    found = records(tmp_path, content, name)
    assert [value for _, value in found] == ROWS
    lines = [number for number, _ in found]
    first_characters = [content.split('\n')[number - 1].strip()[:1] for number in lines]
    assert set(first_characters) <= {'{', '['}


def test_one_record_is_a_record(tmp_path):
    assert records(tmp_path, '{"text": "x"}', 'x.json') == [(1, {'text': 'x'})]
    assert records(tmp_path, '\n{"text": "x"}\n', 'x.jsonl') == [(1, {'text': 'x'})]
    assert records(tmp_path, ' \n', 'x.jsonl') == []


@pytest.mark.parametrize('name, content, message', [
    ('x.jsonl', '{"text": "x"}\n{"text":\n', 'x.jsonl, line 2 is not JSON'),
    ('x.jsonl', '{"text":', 'x.jsonl, line 1 is not JSON'),
    ('x.json', '[{"a": 1},\n{"a" 2}]', 'x.json, line 2 is not JSON'),
    ('x.json', 'source,target\nx,y\n', 'x.json, line 1 is not JSON'),
    ('x.jsonl', '[' * 100_000 + '\n{}', 'is not JSON'),
])
def test_what_is_no_json(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        records(tmp_path, content, name)


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    content = '{"text": "cut \\ud83d", "\\udc80": ["whole \\ud83d\\ude42"]}'
    [(_, value)] = records(tmp_path, content, 'x.jsonl')
    assert value == {'text': 'cut \ufffd', '\ufffd': ['whole 🙂']}


# --- What a file is, and its columns --------------------------------------------------------------

@pytest.mark.parametrize('name, content, kind', [
    ('x.txt', '{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\n', 'json'),
    ('x.txt', 'Hi\tHello, you\nBye, then\tSee you\n', 'table'),
    ('x.dat', 'question,answer\nx,y\n', 'table'),
    ('x.dat', 'English;French\nx, y;z\n', 'table'),
    ('x.csv', '{"source": "a", "target": "b"}\n', 'json'),
    ('x.tsv', 'a\tb\n', 'table'),
])
def test_content_says_what_a_file_of_pairs_is(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_text(content, encoding='utf-8')
    assert kind_of_file(path, expect_table=True) == kind


def test_prose_is_no_table_of_pairs(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_text('It was, and it is.\nYes, it was.\n', encoding='utf-8')
    with pytest.raises(UserError, match='x.txt is neither JSON nor a table'):
        kind_of_file(path, expect_table=True)
    assert kind_of_file(path) == 'text'


@pytest.mark.parametrize('names, columns', [
    ('question,answer', [0, 1]),
    ('id,Question,ANSWER', [1, 2]),
    ('response,prompt', [1, 0]),
    ('instruction,output', [0, 1]),
    ('input,output', [0, 1]),
    (' Source , Target ', [0, 1]),
    ('tgt,src,score', [1, 0]),
    ('context,response', [0, 1]),
    ('input,source,target', [1, 2]),
    ('question,Reply text', [0, 1]),
    ('Hi there,Hello', None),
    ('question,best_answer,category', [0, 1]),
    ('question_id,questionText,answer_text', [1, 2]),
    ('question,best_answer,answer', [0, 2]),
    ('en,de', [0, 1]),
    ('text1,text2', [0, 1]),
    ('id,Q,A', [1, 2]),
    ('a,b', None),
    ('A,Hi', None),
])
def test_columns_of_pairs(names, columns):
    assert find_pair_columns(names.split(',')) == columns


@pytest.mark.parametrize('names', [
    'a1,b,c', 'instruction,input,output', 'source', 'question,id,x', 'id,text', 'question,question_id',
    'id,en,de', 'question,question,answer',
])
def test_columns_that_are_not_clear(names):
    with pytest.raises(ValueError):
        find_pair_columns(names.split(','))
