"""
prepare/text.py: every form of input, what goes to val, and input that is wrong.

Run it alone: pytest -n 0 tests/test_prepare_text.py
"""
import json
import random
import shutil
import sys

import numpy as np
import pytest
import tiktoken
from conftest import SHARED, Project, toy_text
from prepared import pair_texts, read_dataset, read_documents, read_pairs

from pocket.files import lock


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone')


# --- Documents ------------------------------------------------------------------------------------

@pytest.fixture
def novel(tmp_path):
    """A file of 5,000 characters with a byte order mark and Windows line ends."""
    path = tmp_path / 'novel.txt'
    path.write_bytes(b'\xef\xbb\xbf' + toy_text(5000).replace('\n', '\r\n').encode())
    return path


def test_one_document_is_split_by_characters(project, novel):
    out, err = project.run('prepare/text.py', f'--input={novel}', '--tokenizer=char')
    assert '1 document of 5,000' in out and 'first 90% / last 10%' in out
    assert out.endswith('next: python train.py --dataset=mine\n') and not err

    _, tok, ids = read_dataset(project.root / 'data' / 'mine')
    assert tok.decode(ids['train'].tolist()) == toy_text(5000)[:4500]
    assert tok.decode(ids['val'].tolist()) == toy_text(5000)[4500:]


def test_options_choose_vocabulary_split_and_folder(project, novel):
    out, _ = project.run('prepare/text.py', f'--input={novel}', '--vocab_size=280', '--val=0.2',
                         '--data_dir=there', '--name=b')
    assert out.endswith('--dataset=b --data_dir=there\n') and 'bpe, uint16' in out

    meta, tok, ids = read_dataset(project.root / 'there' / 'b')
    assert meta['vocab_size'] == tok.vocab_size == 280
    assert ids['train'].tolist() == tok.encode(toy_text(5000)[:4000])
    assert ids['val'].tolist() == [*tok.encode(toy_text(5000)[4000:]), tok.eos_id]


def make_folder_of_documents(root):
    """120 documents in files of every kind, 10 of them twice, among files to ignore. Returns their texts."""
    rng = random.Random(2)
    texts = [f'{i} ' + toy_text(rng.randint(50, 300), seed=i) for i in range(120)]
    (root / 'deep' / '.git').mkdir(parents=True)
    for i in range(30):
        folder = root / 'deep' if i % 2 else root
        suffix = ('.txt', '.md', '.py')[i % 3]
        (folder / f'{i}{suffix}').write_text(texts[i], encoding='utf-8', newline='')
    lines = [json.dumps({'n': i, 'text': texts[i]}) for i in range(30, 80)] + ['{"text": " "}']
    (root / 'a.jsonl').write_text('\n\n'.join(lines), encoding='utf-8')
    rows = [f'{i},"{texts[i]}"\n' for i in range(70, 120)]
    (root / 'b.CSV').write_text('n,text\n' + ''.join(rows), encoding='utf-8')

    (root / '.hidden.txt').write_text('no', encoding='utf-8')
    (root / 'deep' / '.git' / 'no.txt').write_text('no', encoding='utf-8')
    (root / 'image.png').write_bytes(b'\0\xff')
    return texts


def test_whole_documents_go_to_one_split_and_duplicates_are_dropped(project, tmp_path):
    texts = make_folder_of_documents(tmp_path / 'in')
    out, _ = project.run('prepare/text.py', '--input=in', f'--input={tmp_path / "in" / "*.CSV"}',
                         '--tokenizer=byte', cwd=tmp_path)
    assert '120 documents' in out and '10 duplicates dropped' in out
    documents = read_documents(project.root / 'data' / 'mine')
    assert sorted(documents['train'] + documents['val']) == sorted(texts)
    assert 0.05 < sum(map(len, documents['val'])) / sum(map(len, texts)) <= 0.1

    # Which split a document goes to depends on no name and no order
    shutil.move(tmp_path / 'in', tmp_path / 'in2')
    (tmp_path / 'in2' / 'a.jsonl').rename(tmp_path / 'in2' / 'z.jsonl')
    project.run('prepare/text.py', f'--input={tmp_path / "in2"}', '--tokenizer=byte', '--name=again')
    again = read_documents(project.root / 'data' / 'again')
    assert sorted(again['val']) == sorted(documents['val'])


def test_char_tokenizer_knows_what_only_val_has(project, tmp_path):
    (tmp_path / 'x.txt').write_text('abc ' * 50 + 'xyz', encoding='utf-8')
    project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=char')
    _, tok, _ = read_dataset(project.root / 'data' / 'mine')
    assert tok.chars == ' abcxyz'


@pytest.mark.skipif(not SHARED.is_dir(), reason='the encodings are not beside this checkout')
def test_vocabularies_over_65536_take_four_bytes(project, tmp_path, monkeypatch):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')   # tiktoken may delete from it
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    text = toy_text(2000) + ' <|endoftext|> przykład 日本語 ' * 20
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    out, _ = project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}',
                         '--tokenizer=cl100k_base')
    assert 'uint32: more than 65,536 take 4 bytes per id' in out

    folder = project.root / 'data' / 'mine'
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    train = np.fromfile(folder / 'train.bin', dtype='<u4').tolist()
    *val, last = np.fromfile(folder / 'val.bin', dtype='<u4').tolist()
    encoding = tiktoken.get_encoding('cl100k_base')
    assert meta['dtype'] == 'uint32' and max(train + val) > 65535
    assert encoding.decode(train) + encoding.decode(val) == text
    assert last == encoding.eot_token == 100257


# --- Pairs ----------------------------------------------------------------------------------------

def test_pairs_from_every_kind_of_table(project, tmp_path):
    rows = [(f'question {i // 2}', f'answer, {i} "well"') for i in range(60)]
    duplicate = ('question 3', 'answer, 6 "well"')
    no_source = ('', 'nobody asked')
    csv_lines = ['no,target,source']
    for source, target in rows[:20]:
        quoted = target.replace('"', '""')
        csv_lines.append(f'1,"{quoted}",{source}')
    tsv_lines = ['\t'.join(row) for row in rows[20:40]]   # without a header
    jsonl_lines = []
    for source, target in [*rows[40:], duplicate, no_source]:
        jsonl_lines.append(json.dumps({'source': source, 'target': target}))
    inputs = []
    for name, lines in (('a.csv', csv_lines), ('b.tsv', tsv_lines), ('c.jsonl', jsonl_lines)):
        (tmp_path / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
        inputs.append(f'--input={tmp_path / name}')

    out, _ = project.run('prepare/text.py', *inputs, '--pairs', '--tokenizer=byte', '--name=talk')
    assert '60 pairs; 2 were duplicates or had an empty side' in out
    assert 'b.tsv does not name source and target' in out
    _, tok, pairs = read_pairs(project.root / 'data' / 'talk')
    assert list(tok.special_tokens) == ['pad', 'bos', 'eos']
    train = pair_texts(tok, pairs['train'])
    val = pair_texts(tok, pairs['val'])
    assert sorted(train + val) == sorted(rows) and 4 <= len(val) <= 6
    assert not {source for source, _ in train} & {source for source, _ in val}


def test_json_in_a_text_file_is_text_but_not_in_silence(project, tmp_path):
    (tmp_path / 'x.txt').write_text(FORMATS['x.json'], encoding='utf-8')
    out, _ = project.run('prepare/text.py', '--input=x.txt', '--tokenizer=byte', cwd=tmp_path)
    assert 'x.txt looks like JSON, but it is read as text' in out


@pytest.mark.parametrize('name, content, options, message', [
    ('a.csv', 'target,source\nx,y\n', ['--field=q,target'], "has no column 'q': it has target"),
    ('b.tsv', 'hello\tyou\n\nhello\n', [], 'line 3 has 1 field, but the first row has 2'),
    ('c.tsv', 'hello\tyou\n', ['--tokenizer=byte'], 'too few'),
])
def test_bad_tables_of_pairs(project, tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content, encoding='utf-8')
    err = project.fails('prepare/text.py', f'--input={tmp_path / name}', '--pairs', *options)
    assert message in err and name in err


# --- What is wrong --------------------------------------------------------------------------------

BAD_FILES = {
    'void.txt': b' \n',
    'binary.txt': b'ab\n\0\0',
    'latin.txt': b'caf\xe9',
    'json.jsonl': b'{"text": "x"}\n\n{"text": \n',
    'field.jsonl': b'{"text": "x"}\n{"words": "x"}\n',
    'table.csv': b'a,b\n1,2\n',
    'quote.csv': b'text\nx\n"abc',
    'good.txt': b'good text ' * 30,
}


@pytest.mark.parametrize('options, message', [
    ('', 'say what to read: --input=FILE'),
    ('--input=nowhere.txt', 'there is no file nowhere.txt'),
    ('--input=*.foo', 'there is no file *.foo'),
    ('--input=empty', 'there is no .txt, .md, .py, .jsonl, .ndjson, .csv, .tsv file in empty'),
    ('--input=void.txt', 'only 0 characters'),
    ('--input=binary.txt', 'binary.txt looks binary: byte 0x00 at position 3'),
    ('--input=latin.txt', 'latin.txt is not UTF-8 text: byte 0xe9 at position 3'),
    ('--input=json.jsonl', 'json.jsonl, line 3 is not JSON'),
    ('--input=field.jsonl',
     "field.jsonl, line 2 has no text in text: {'words': 'x'}; name what to read with --field"),
    ('--input=field.jsonl --field=text,words', 'field must be one name'),
    ('--input=good.txt --pairs --field=q', 'field must be two names'),
    ('--input=table.csv', "table.csv has no column 'text': it has a, b; name what to read"),
    ('--input=quote.csv', 'quote.csv, line 3 is not .csv'),
    ('--input=good.txt --vocab_size=256', '256'),
    ('--input=good.txt --tokenizer=gpt5', 'sentencepiece'),
    ('--input=good.txt --val=1', 'val must be in (0, 1), got 1.0'),
    ('--input=good.txt --val=0.9999999', 'leaves no text to train on'),
    ('--input=', 'say what to read'),
    ('--input=good.txt --name=a/b', "got 'a/b'"),
    ('--input=good.txt --pairs', 'good.txt'),
])
def test_bad_input_ends_in_one_sentence(project, tmp_path, options, message):
    (tmp_path / 'empty').mkdir()
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    err = project.fails('prepare/text.py', *options.split(), cwd=tmp_path)
    assert message in err
    assert not list((project.root / 'data').glob('*/*'))


def test_dataset_is_locked_while_it_is_prepared(project, tmp_path):
    (tmp_path / 'x.txt').write_text(toy_text(100), encoding='utf-8')
    args = ['prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=byte']
    folder = project.root / 'data' / 'mine'
    folder.mkdir(parents=True)
    with lock(folder):
        assert 'another process is preparing' in project.fails(*args)
    project.run(*args)


# --- Files that change, and numbers that are too long ---------------------------------------------

def test_number_that_is_too_long_is_a_sentence(project, tmp_path):
    path = tmp_path / 'x.jsonl'
    path.write_text('{"text": ' + '1' * 5000 + '}\n', encoding='utf-8')
    error = project.fails('prepare/text.py', f'--input={path}')
    assert 'x.jsonl, line 1 is not JSON' in error


def test_another_val_is_another_split(project, tmp_path):
    """So work that was stopped is not continued with it; see write_corpus()."""
    path = tmp_path / 'x.txt'
    path.write_text(toy_text(5000), encoding='utf-8')
    splits = []
    for val in ('0.101', '0.104'):
        project.run('prepare/text.py', f'--input={path}', f'--val={val}', '--tokenizer=byte')
        meta, _, _ = read_dataset(project.root / 'data' / 'mine')
        splits.append(meta['split'])
    assert splits[0] != splits[1]


@pytest.mark.parametrize('kind', ['many documents', 'one document', 'shrinks'])
def test_file_that_changes_while_it_is_read_is_a_sentence(project, tmp_path, kind):
    """Changed by a script, between the first and the second pass over its own input."""
    path = tmp_path / 'x.csv'
    lines = 1 if kind == 'one document' else 300
    rows = ''.join(f'"{i} {toy_text(100, seed=i).strip()}"\n' for i in range(lines))
    path.write_text(f'text\n{rows}', encoding='utf-8')
    script = project.root / 'prepare' / 'text.py'
    changes = tmp_path / 'changes.py'
    size = len('text\n') + rows.index('"200 ') if kind == 'shrinks' else 0
    changes.write_text(CHANGES.replace('SIZE', str(size)), encoding='utf-8')
    error = project.fails(changes, str(script), str(path), f'--input={path}', '--tokenizer=byte')
    assert 'changed while it was read' in error


CHANGES = """
import os
import runpy
import sys
from pathlib import Path

_, script, path, *sys.argv[1:] = sys.argv
sys.path.insert(0, str(Path(script).parent.parent))
from pocket import datasets

count = datasets.first_of_each

def change(hashes):
    if SIZE:
        os.truncate(path, SIZE)
    else:
        with open(path, 'a', encoding='utf-8') as file:
            file.write('"something else"\\n')
    return count(hashes)

datasets.first_of_each = change
sys.argv[0] = script
runpy.run_path(script, run_name='__main__')
"""


# --- Files of other programs ----------------------------------------------------------------------

FORMATS = {
    'x.json': '\n'.join(json.dumps({'source': f'Hi {i}, you', 'target': f'Yo {i}'}) for i in range(9)),
    'x.ndjson': '\n'.join(json.dumps({'Question': f'Hi {i}, you', 'answer': f'Yo {i}'})
                          for i in range(9)),
    'array.json': json.dumps([[f'Hi {i}, you', f'Yo {i}'] for i in range(9)]),
    'tabs.txt': ''.join(f'Hi {i}, you\tYo {i}\n' for i in range(9)),
    'semicolons.csv': ''.join(f'Hi {i}, you;Yo {i}\n' for i in range(9)),
    'quoted.tsv': 'prompt\tresponse\n' + ''.join(f'"Hi {i}, you"\t"Yo {i}"\n' for i in range(9)),
    'unnamed.csv': 'q,a,\n' + ''.join(f'"Hi {i}, you",Yo {i},more\n' for i in range(9)),
    'extra.csv': 'id,output,input\n' + ''.join(f'{i},Yo {i},"Hi {i}, you"\n' for i in range(9)),
}


@pytest.mark.parametrize('name', FORMATS)
def test_pairs_in_the_formats_of_other_programs(project, tmp_path, name):
    (tmp_path / name).write_text(FORMATS[name], encoding='utf-8')
    out, _ = project.run('prepare/text.py', f'--input={tmp_path / name}', '--pairs',
                         '--tokenizer=byte', '--name=talk')
    _, tok, pairs = read_pairs(project.root / 'data' / 'talk')
    found = pair_texts(tok, pairs['train'] + pairs['val'])
    assert sorted(found) == [(f'Hi {i}, you', f'Yo {i}') for i in range(9)]
    assert ('input and output are read, not id' in out) == (name == 'extra.csv')
    assert ('not column 3, which has no name' in out) == (name == 'unnamed.csv')
    assert ('from the first line on' in out) == (name == 'semicolons.csv' or name == 'tabs.txt')


@pytest.mark.parametrize('name, content, options, message', [
    ('a.json', '{"source": "x", "target": "y"}\n' * 2, [], 'no text in text'),
    ('a.json', '{"source": "x", "target": "y"}\n' * 2, [], 'or add --pairs'),
    ('a.csv', 'question,answer\nx,y\n', [], "no column 'text': it has question, answer"),
    ('a.csv', 'source,target\nHi, you,Yo\n', ['--pairs'], 'line 2 has 3 fields'),
    ('a.csv', '1,x,y\n2,z,w\n', ['--pairs'], 'does not say which columns are source and target'),
    ('a.jsonl', '{"messages": []}\n{"messages": []}\n', ['--pairs'], 'prepare/chat.py'),
    ('a.txt', 'Hi, you\nYes\n', ['--pairs'], 'neither JSON nor a table'),
])
def test_what_is_not_read_by_guess(project, tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content, encoding='utf-8')
    assert message in project.fails('prepare/text.py', f'--input={tmp_path / name}', *options)


def test_bad_rows_are_left_out_and_counted(project, tmp_path):
    lines = [json.dumps({'author': 'x', 'body': f'message {i} ' * 3}) for i in range(20)]
    lines[3:3] = ['{"author": "x", "body": null}', '{"author": "x"}', '{"body":']
    (tmp_path / 'x.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    args = ['prepare/text.py', f'--input={tmp_path / "x.jsonl"}', '--field=body',
            '--tokenizer=byte']
    error = project.fails(*args)
    assert 'line 4 has no text in body' in error and '--skip_bad leaves out such rows' in error
    out, _ = project.run(*args, '--skip_bad')
    assert '3 bad rows left out; the first:' in out and '20 documents' in out
    documents = read_documents(project.root / 'data' / 'mine')
    assert len(documents['train'] + documents['val']) == 20


def test_half_an_emoji_is_replaced(project, tmp_path):
    lines = [f'{{"text": "message {i}, so funny"}}' for i in range(20)]
    lines[4] = '{"text": "cut in the middle \\ud83d"}'
    lines[5] = '{"text": "odd byte \\udc80"}'
    (tmp_path / 'x.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    project.run('prepare/text.py', f'--input={tmp_path / "x.jsonl"}', '--tokenizer=char')
    documents = read_documents(project.root / 'data' / 'mine')
    texts = documents['train'] + documents['val']
    assert 'cut in the middle \ufffd' in texts and 'odd byte \ufffd' in texts


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', 'sentencepiece'])
def test_documents_are_kept_apart_and_an_empty_prompt_begins_one(project, tmp_path, kind):
    texts = [f'Note {i}: buy milk, please' for i in range(30)]
    (tmp_path / 'x.txt').write_text('\n---\n'.join(texts), encoding='utf-8')
    out, _ = project.run('prepare/text.py', f'--input={tmp_path / "x.txt"}', '--separator=---',
                         f'--tokenizer={kind}')
    assert 'warning' not in out
    documents = read_documents(project.root / 'data' / 'mine')
    assert sorted(documents['train'] + documents['val']) == sorted(texts)
    _, tok, _ = read_dataset(project.root / 'data' / 'mine')
    assert tok.encode_prompt('') == [tok.eos_id]


def test_a_single_text_has_no_documents(project, novel):
    """Its only end is that of val: nobody could learn how it begins."""
    project.run('prepare/text.py', f'--input={novel}', '--tokenizer=byte')
    meta, tok, _ = read_dataset(project.root / 'data' / 'mine')
    assert tok.encode_prompt('') == [10] and 'documents' not in meta['tokenizer']


def test_separator_that_never_occurs(project, novel):
    out, _ = project.run('prepare/text.py', f'--input={novel}', '--tokenizer=byte',
                         '--separator=\\n\\n')
    assert "warning: the separator '\\\\n\\\\n' does not occur" in out and "$'\\n'" in out
    assert out.count('warning') == 1


@pytest.mark.skipif(sys.platform == 'win32', reason='links need a permission there')
def test_links_to_folders_are_followed_once(project, tmp_path):
    folder = tmp_path / 'in'
    elsewhere = tmp_path / 'elsewhere'
    folder.mkdir()
    elsewhere.mkdir()
    for i in range(10):
        (folder / f'{i}.txt').write_text(f'inside {i} ' * 5, encoding='utf-8')
        (elsewhere / f'{i}.txt').write_text(f'outside {i} ' * 5, encoding='utf-8')
    (folder / 'photo.png').write_bytes(b'')
    (folder / 'link').symlink_to(elsewhere)
    (folder / 'again').symlink_to(elsewhere)
    (elsewhere / 'back').symlink_to(folder)
    (folder / 'dead.txt').symlink_to(tmp_path / 'nothing')
    out, _ = project.run('prepare/text.py', f'--input={folder}', '--tokenizer=byte')
    assert '20 documents' in out and '0 duplicates' in out and 'not read: ' in out
    assert '1 .png' in out and '1 broken link or special file' in out


def test_default_size_of_sentencepiece_suits_chinese(project, tmp_path):
    """A short text has more different characters than tokens by default."""
    rng = random.Random(0)
    characters = [chr(0x4e00 + i) for i in range(700)]
    text = ''.join(rng.choice(characters) for _ in range(20_000))
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    args = ['prepare/text.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=sentencepiece']
    out, _ = project.run(*args)
    assert '512 tokens are too few' in out
    meta, _, _ = read_dataset(project.root / 'data' / 'mine')
    assert meta['vocab_size'] > 700
    assert 'it needs at least' in project.fails(*args, '--vocab_size=512')
