"""Datasets of pairs: files line by line, transcripts and dialogs, all made here; what must never sit on both sides of a split."""
import csv
import functools
import http.server
import json
import random
import re
import shutil
import threading
import zipfile

import numpy as np
import pytest
from conftest import SHARED, Project

from pocket import template
from pocket.tokenizer import tokenizer_from_dict


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone übung')


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def read(folder):
    """meta.json, the tokenizer and {split: [(source ids, target ids)]} of a dataset, read as its format says, byte by byte."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    splits = {}
    for split, n in meta['counts'].items():
        ids = np.fromfile(folder / f'{split}.bin', dtype='<u2' if meta['dtype'] == 'uint16' else '<u4').tolist()
        at = np.fromfile(folder / f'{split}.idx', dtype='<i8').tolist()
        assert len(ids) == n == at[-1] and len(at) == 2 * meta['pairs'][split] + 1 and at == sorted(at)
        splits[split] = [(ids[a:b], ids[b:c]) for a, b, c in zip(at[:-2:2], at[1:-1:2], at[2::2])]
    assert meta['kind'] == 'pairs' and meta['format'] == 1 and not list(folder.glob('*.tmp'))
    return meta, tokenizer_from_dict(meta['tokenizer']), splits


def texts(tok, pairs):
    """[(source, target)] as text. Each target must end with the end id."""
    assert all(target[-1] == tok.eos_id and tok.eos_id not in source + target[:-1] for source, target in pairs)
    return [(tok.decode(source), tok.decode(target)) for source, target in pairs]


def leaks(train, val):
    """The sources of val that extend, begin or equal one of train, word for word: the long way."""
    trained = [source.split() for source, _ in train]
    return [source for source, _ in val for s in trained if s[:len(source.split())] == source.split()[:len(s)]]


def made_scenes(n, seed=0):
    """n scenes of (speaker, line); some short lines occur again and again."""
    rng, words = random.Random(seed), ['desk', 'paper', 'quiet', 'lamp', 'seven', 'early', 'rust', 'maybe']
    return [[(rng.choice(['ANA', 'BO', 'MR. CY', 'ZOE']), 'What?' if rng.random() < .15 else ' '.join(rng.choices(words, k=rng.randint(2, 6))) + '.')
             for _ in range(rng.randint(2, 9))] for _ in range(n)]


def written(turns):
    return ' '.join(f'[{speaker}] {line}' for speaker, line in turns)


def test_files_line_by_line(project, tmp_path):
    """Runs of sources that extend or overlap each other, blank lines, a byte order mark, line ends that are none."""
    lines = []
    for scene in made_scenes(120):
        said = [turn for turn in scene if turn[0] != 'ZOE']
        lines += [(written(said[max(0, i - 3):i]), f'answer {len(lines) + i}.') for i in range(1, len(said) + 1)]
    whole = list(lines)
    lines[5:5] = [('', ''), ('[BO] Nobody answers.', ''), ('', 'To nobody.')]
    lines[43:43] = whole[40:40] = [('[BO] One\u2028line\x0bonly.', 'It is\u2028one.')]
    (tmp_path / 'src.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(s for s, _ in lines).encode())  # and no line end after the last line
    (tmp_path / 'tgt.txt').write_bytes('\n'.join([t for _, t in lines] + ['']).encode())
    files = [f'--src={tmp_path / "src.txt"}', f'--tgt={tmp_path / "tgt.txt"}', '--character=zoe', '--tokenizer=byte']
    project.run('prepare/office.py', *files)
    meta, tok, splits = read(project.root / 'data' / 'office')
    train, val = texts(tok, splits['train']), texts(tok, splits['val'])
    expected = [(' '.join(s.split()), ' '.join(t.split())) for s, t in whole]
    assert sorted(train + val) == sorted(expected) and [p for p in expected if p in set(train)] == train  # none lost, in their order
    assert meta['dropped'] == 2 and meta['moved_to_train'] > 0 and 0.02 < len(val) / len(expected) < 0.15
    assert not leaks(train, val)
    starts = [i for i in range(1, len(expected)) if (expected[i - 1] in val) != (expected[i] in val)]
    windows = [(expected[i - 1][0].split(' ['), expected[i][0]) for i in starts]  # turns of the source before, the source
    assert len(starts) >= 8 and not any(source.startswith(' ['.join(turns[k:]) + ' ') or source.startswith('[' + ' ['.join(turns[k:]) + ' ')
                                        for turns, source in windows for k in range(len(turns)))
    assert meta['chat'] == {'turn': '[{speaker}] {text}', 'between': ' ', 'begin': '', 'reply': '', 'turns': 3, 'me': 'ZOE', 'you': meta['chat']['you']}
    last = [s[s.rindex('[') + 1:s.rindex(']')] for s, _ in expected]
    assert meta['chat']['you'] == max(set(last), key=last.count)

    project.run('prepare/office.py', *files, '--split=contiguous90', '--name=plain')
    meta, tok, splits = read(project.root / 'data' / 'plain')
    n = int(0.9 * len(expected))
    assert (texts(tok, splits['train']), texts(tok, splits['val'])) == (expected[:n], expected[n:]) and meta['split'].startswith('first 90 %')


def test_pairs_without_names_from_a_server_and_from_the_cache(project, server, tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'src.txt').write_text('\n'.join(f'question {i} {chr(0x4e00 + i)}' for i in range(50)), encoding='utf-8')
    (tmp_path / 'd' / 'tgt.txt').write_text('\n'.join(f'reply {i} [laughs]' for i in range(50)), encoding='utf-8')
    out, _ = project.run('prepare/office.py', f'--urls={server}/gone', f'--urls={server}/d', '--tokenizer=char')
    meta, tok, splits = read(project.root / 'data' / 'office')
    assert 'no [NAME] tags' in out and meta['chat']['turn'] == '{text}' and 3 <= meta['pairs']['val'] <= 7
    assert sorted(texts(tok, splits['train'] + splits['val'])) == sorted((f'question {i} {chr(0x4e00 + i)}', f'reply {i} [laughs]') for i in range(50))
    first = {p.name: p.read_bytes() for p in (project.root / 'data' / 'office').iterdir()}
    project.run('prepare/office.py', '--urls=http://127.0.0.1:9', '--tokenizer=char')  # what is there is used, without any network
    assert first == {p.name: p.read_bytes() for p in (project.root / 'data' / 'office').iterdir()}
    project.run('prepare/office.py', '--tokenizer=char', '--seed=1', '--name=other', f'--urls={server}/d')
    assert read(project.root / 'data' / 'other')[2]['val'] != splits['val']


def write_csv(path, rows, header=('season', 'episode', 'title', 'scene', 'speaker', 'line'), encoding='utf-8-sig'):
    with open(path, 'w', encoding=encoding, newline='') as f:
        csv.writer(f).writerows([header, *rows])


def test_transcript(project, tmp_path):
    scenes = made_scenes(60)
    scenes[7] = [('ANA', 'First, "second"\nthird.'), ('ZOE', 'Mine.'), ('ZOE', 'And on.'), ('BO', 'So.'), ('ANA', 'No.'), ('ANA', 'Never.'), ('ZOE', 'End.')]
    rows = [[1 + n // 20, n // 5, 'Title', n, speaker.title() + ' ', line] for n, scene in enumerate(scenes) for speaker, line in scene]
    ana = next(i for i, row in enumerate(rows) if row[3] == 7)
    rows[ana][5] += ' [sighs]'
    rows[ana + 1:ana + 1] = [[1, 1, 'Title', 7, 'Bo [on phone]', '[nods]'], [1, 1, 'Title', 7, '', 'Nobody says so.']]
    for row in rows:
        if row[3] == 7:
            row[1] = 1
    write_csv(tmp_path / 'lines.csv', rows)
    project.run('prepare/office.py', f'--csv={tmp_path / "lines.csv"}', '--character=Zoe', '--context=3')  # with a BPE of its own
    meta, tok, splits = read(project.root / 'data' / 'office')
    scenes[7][0] = ('ANA', 'First, "second" third.')
    expected = [(scene[max(0, i - 3):i], line, n) for n, scene in enumerate(scenes) for i, (speaker, line) in enumerate(scene) if speaker == 'ZOE' and i]
    assert (scenes[7][3:6], 'End.', 7) in expected and (scenes[7][:2], 'And on.', 7) in expected
    train, val = texts(tok, splits['train']), texts(tok, splits['val'])
    assert sorted(train + val) == sorted((written(turns), line) for turns, line, _ in expected)
    assert not leaks(train, val) and val and meta['moved_to_train'] >= 0
    sides = {n: {(written(turns), line) in val for turns, line, m in expected if m == n} for _, _, n in expected}
    assert all(len(side) == 1 for side in sides.values())  # a scene is on one side
    ids = [source for source, _ in splits['train'] + splits['val']]
    assert all(template.encode_conversation(tok, meta['chat'], turns) in ids for turns, _, _ in expected)
    assert meta['chat']['me'] == 'ZOE' and meta['chat']['you'] in ('ANA', 'BO', 'MR. CY')


@pytest.mark.parametrize('args, said', [
    (['--src=two.txt'], 'both --src=FILE and --tgt=FILE'),
    (['--src=two.txt', '--tgt=three.txt'], r'two.txt has 2 lines, .*three.txt has 3'),
    (['--src=two.txt', '--tgt=blank.txt'], 'not one pair with text on both sides'),
    (['--src=empty.txt', '--tgt=empty.txt'], 'not one pair with text on both sides'),
    (['--src=two.txt', '--tgt=latin.txt'], r'latin.txt is not UTF-8 text: byte 0x92 at position 4'),
    (['--src=same.txt', '--tgt=same.txt'], r'nothing is left for train: 2 pairs .*--split=contiguous90'),
    (['--csv=no.csv'], 'cannot read'),
    (['--csv=two.txt'], 'no column season, episode, scene, speaker, line; it has one'),
    (['--csv=good.csv', '--character=kim'], r'KIM never speaks in .*ANA \(2\), BO \(1\)'),
    (['--csv=good.csv', '--context=0'], '--context must be at least 1'),
    (['--csv=short.csv'], 'short.csv, line 2: 2 fields, but the header names 5'),
    (['--csv=long.csv', '--character=ana', '--tokenizer=wordy'], "no tokenizer 'wordy'"),
])
def test_bad_input(project, args, said):
    columns = ('season', 'episode', 'scene', 'speaker', 'line')
    for name, text in (('two.txt', 'one\ntwo\n'), ('three.txt', '1\n2\n3\n'), ('blank.txt', ' \n\n'), ('empty.txt', ''), ('same.txt', 'a\na b\n')):
        (project.root / name).write_text(text, encoding='utf-8')
    (project.root / 'latin.txt').write_bytes(b'one \x92\ntwo\n')
    write_csv(project.root / 'good.csv', [(1, 1, 1, 'Ana', 'hm'), (1, 1, 1, 'Bo', 'ho'), (1, 1, 1, 'Ana', 'ha')], columns)
    write_csv(project.root / 'long.csv', [(1, 1, n // 2, ('Bo', 'Ana')[n % 2], f'hm {n}') for n in range(60)], columns)
    write_csv(project.root / 'short.csv', [(1, 1)], columns)
    err = project.fails('prepare/office.py', *args)
    assert re.search(said, err), err
    assert not list(project.root.glob('data/*/*'))


@pytest.mark.skipif(not SHARED.is_dir(), reason="GPT-2's encoding is not beside this checkout")
def test_office_for_the_paper_shape(project, tmp_path, monkeypatch):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')  # a copy: tiktoken deletes what it finds wrong
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    (project.root / 'a.txt').write_text('\n'.join(f'[BO] line {i} <|endoftext|>' for i in range(40)), encoding='utf-8')
    project.run('prepare/office_gpt2.py', '--src=a.txt', '--tgt=a.txt')
    meta, tok, splits = read(project.root / 'data' / 'office_gpt2')
    assert meta['vocab_size'] == 50_260 and {'pad', 'bos', 'eos'} <= set(tok.special_tokens)
    assert ('[BO] line 3 <|endoftext|>',) * 2 in texts(tok, splits['train'] + splits['val'])


def write_zips(folder, **dialogs):
    folder.mkdir(exist_ok=True)
    for split, lines in dialogs.items():
        with zipfile.ZipFile(folder / f'{split}.zip', 'w') as z:
            z.writestr(f'{split}/dialogues_act_{split}.txt', '1 2\n')
            z.writestr(f'{split}/dialogues_{split}.txt', ''.join(' __eou__ '.join([*d, '']).strip() + '\n' for d in lines))


REPAIRED = [
    ('It ’ s late , isn ’ t it ? I ’ Ve no time , don ’ t you see ?', "It's late, isn't it? I've no time, don't you see?"),
    ("I ' m sure we ' ll be there , they're slow .", "I'm sure we'll be there, they're slow."),
    ("Read ' The Lamp ' , ma ' am , at 8 o ' clock .", "Read 'The Lamp', ma'am, at 8 o'clock."),
    ('He said “ no more ! ” and left ( slowly ) .', 'He said "no more!" and left (slowly).'),
    ("All is well.But my parents ' car costs $ 12 , 500 . 50 !", "All is well. But my parents' car costs $12,500.50!"),
    ('From 8: 30 to 9 : 15 p . m . , see me at lamp.com or in the U . S . . .', 'From 8:30 to 9:15 p.m., see me at lamp.com or in the U.S...'),
    ('Well . . . 50 % off ; not bad 。', 'Well... 50% off; not bad.'),
    ('Type <sep> or </s> , please .', 'Type <sep> or </s>, please.'),
]


def test_dialogs(project, tmp_path, server):
    talk = [[a for a, _ in REPAIRED], ['Hello there .', 'Oh , hello !'], ['HELLO there.', 'Oh, hello!'], ['Alone .']]
    write_zips(tmp_path / 'daily', train=talk, validation=[['Oh .', 'Yes .'], talk[1]], test=[['Oh.', 'Yes.'], ['Oh .', 'No .', 'Why ?'], [*talk[1], 'So early ?']])
    rows = [{'context': 'I took it.', 'response': 'Give it back.', 'dialogue_id': 3, 'episode_done': False},
            {'context': 'Why?', 'response': 'It is not yours.', 'dialogue_id': 3, 'episode_done': True},
            {'context': 'I pushed him.', 'response': 'That hurts.', 'dialogue_id': 4, 'episode_done': True}]
    (tmp_path / 'train.json').write_text(json.dumps(rows), encoding='utf-8')
    (tmp_path / 'valid.json').write_text('\n'.join(json.dumps(r) for r in ({'context': 'A', 'response': 'B'}, {'context': 'C', 'response': 'D'})), encoding='utf-8')
    (tmp_path / 'test.json').write_text(json.dumps([{'context': 'a', 'response': 'b!'}, {'context': 'E', 'response': 'F'}]), encoding='utf-8')
    out, _ = project.run('prepare/dialog.py', f'--daily={tmp_path / "daily"}', f'--prosocial_urls={server}', '--tokenizer=byte', '--context=3')
    meta, tok, splits = read(project.root / 'data' / 'dialog')
    assert 'CC BY-NC-SA' in out and set(tok.special_tokens) == {'pad', 'bos', 'eos', 'sep'} and meta['dropped_dialogs'] == {'train': 1, 'val': 1, 'test': 2}
    bos, sep, eos = (tok.special_tokens[n] for n in ('bos', 'sep', 'eos'))

    def pair(*said):
        turns = [tok.encode(f'{"User" if (len(said) - i) % 2 == 0 else "Bot"}: {text}') for i, text in enumerate(said)]
        return [bos, *turns[0], *(i for turn in turns[1:-1] for i in (sep, *turn))], [*turns[-1], eos]

    clean = [b for _, b in REPAIRED]
    assert splits['train'] == [pair(*clean[max(0, i - 3):i + 1]) for i in range(1, len(clean))] + [pair('Hello there.', 'Oh, hello!')] + [
        pair('I took it.', 'Give it back.'), pair('I took it.', 'Give it back.', 'Why?', 'It is not yours.'), pair('I pushed him.', 'That hurts.')]
    assert splits['val'] == [pair('Oh.', 'Yes.'), pair('A', 'B'), pair('C', 'D')]
    assert splits['test'] == [pair('Oh.', 'No.'), pair('Oh.', 'No.', 'Why?'), pair('Hello there.', 'Oh, hello!', 'So early?'), pair('E', 'F')]
    assert meta['dropped_pairs'] == {'train': 0, 'val': 0, 'test': 1}
    source, _ = splits['train'][1]
    assert source == template.encode_conversation(tok, meta['chat'], [('Bot', clean[0]), ('User', clean[1])]) and meta['chat']['reply'] == 'Bot: '

    out, _ = project.run('prepare/dialog.py', '--daily=daily', f'--prosocial={tmp_path}', '--name=sp', cwd=tmp_path)  # sentencepiece
    meta, tok, again = read(project.root / 'data' / 'sp')
    assert meta['tokenizer']['kind'] == 'sentencepiece' and texts(tok, again['train'])[-1] == ('User: I pushed him.', 'Bot: That hurts.')
    source, target = again['train'][len(REPAIRED) - 2]  # who types the name of a special token has typed text
    assert tok.decode(target) == 'Bot: Type <sep> or </s>, please.' and not set(target[:-1]) & set(tok.special_tokens.values())
    assert source.count(tok.special_tokens['sep']) == 5 and source[0] == tok.special_tokens['bos']

    (tmp_path / 'daily' / 'test.zip').write_bytes(b'no zip')
    for args, said in ((['--daily=daily', '--corpora=daily'], 'test.zip is not a zip'), (['--daily=.', '--corpora=daily'], 'there is no *train*.zip'),
                       (['--corpora=prosocial', '--prosocial_urls=http://127.0.0.1:9', '--data_dir=new'], '--prosocial=FOLDER'),
                       (['--corpora=prosocial', '--prosocial=bad'], 'not rows of JSON with context and response (KeyError')):
        (tmp_path / 'bad').mkdir(exist_ok=True)
        (tmp_path / 'bad' / 'train.json').write_text('[{"context": "a"}]', encoding='utf-8')
        assert said in project.fails('prepare/dialog.py', *args, cwd=tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real dialogs are not beside this checkout')
def test_real_dialogs(project, tmp_path):
    """ProsocialDialog's three files, and of DailyDialog the two small ones: validation to train on, test to validate with."""
    write_zips(tmp_path, test=[['Good lamp !', 'It is .']])
    for name, there in (('train', 'validation'), ('valid', 'test')):
        shutil.copy(SHARED / 'dailydialog' / f'{there}.zip', tmp_path / f'{name}.zip')
    project.run('prepare/dialog.py', f'--daily={tmp_path}', f'--prosocial={SHARED / "prosocial"}', '--tokenizer=byte', '--context=1')
    meta, tok, splits = read(project.root / 'data' / 'dialog')
    assert 10_000 < meta['pairs']['train'] <= 4000 + 8069 - 1000 and 10_000 < meta['pairs']['val'] <= 4000 + 7740 - 1000
    assert 480 < meta['pairs']['test'] <= 501 and 0 < meta['dropped_dialogs']['train'] < 200 and 0 < meta['dropped_dialogs']['val'] < 200
    said = [tok.decode(target) for _, target in splits['train'][:6000]]  # of DailyDialog, which comes first
    assert sum(' ,' in text or ' ?' in text or ' ’ ' in text for text in said) == 0 and sum("n't " in text for text in said) > 500
