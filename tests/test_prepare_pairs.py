"""
prepare/office.py, office_gpt2.py and dialog.py: datasets of pairs, and what must never be on both
sides of a split.

Run it alone: pytest -n 0 tests/test_prepare_pairs.py
"""
import csv
import json
import random
import re
import shutil
import zipfile

import pytest
from conftest import SHARED, Project
from prepared import pair_texts, read_pairs, serve_folder

from pocket.template import ChatTemplate, encode_conversation


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone übung')


@pytest.fixture
def server(tmp_path):
    """A server of the files in tmp_path."""
    with serve_folder(tmp_path) as url:
        yield url


# --- office.py ------------------------------------------------------------------------------------

SPEAKERS = ['ANA', 'BO', 'MR. CY', 'ZOE']
WORDS = ['desk', 'paper', 'quiet', 'lamp', 'seven', 'early', 'rust', 'maybe']


def made_scenes(n, seed=0):
    """n scenes, each [(speaker, line), …]; some lines are short and occur again and again."""
    rng = random.Random(seed)
    scenes = []
    for _ in range(n):
        scene = []
        for _ in range(rng.randint(2, 9)):
            speaker = rng.choice(SPEAKERS)
            line = 'What?'
            if rng.random() >= 0.15:
                line = ' '.join(rng.choices(WORDS, k=rng.randint(2, 6))) + '.'
            scene.append((speaker, line))
        scenes.append(scene)
    return scenes


def written(turns):
    return ' '.join(f'[{speaker}] {line}' for speaker, line in turns)


def leaks(train, val):
    """The sources of val that extend, begin or equal one of train, word for word: the long way."""
    found = []
    train_sources = [source.split() for source, _ in train]
    for source, _ in val:
        words = source.split()
        for train_words in train_sources:
            n = min(len(words), len(train_words))
            if words[:n] == train_words[:n]:
                found.append(source)
    return found


def overlaps(source, previous):
    """Whether a source begins with the last turns of the previous one: then they are of one run."""
    turns = previous.split(' [')
    tails = [' ['.join(turns[k:]) for k in range(len(turns))]
    return any(source.startswith((f'{tail} ', f'[{tail} ')) for tail in tails)


@pytest.fixture
def two_files(tmp_path):
    """(options that name two files, the pairs in them).

    Sources come in runs that extend or overlap each other. The files also have blank lines, a byte
    order mark, characters that are line ends only to Unicode, and lines that repeat.
    """
    pairs = []
    for scene in made_scenes(120):
        turns = [turn for turn in scene if turn[0] != 'ZOE']
        pairs_before = len(pairs)
        for i in range(1, len(turns) + 1):
            pairs.append((written(turns[max(0, i - 3):i]), f'answer {pairs_before + i}.'))
    lines = list(pairs)
    lines[5:5] = [('', ''), ('[BO] Nobody answers.', ''), ('', 'To nobody.')]
    strange = ('[BO] One\u2028line\x0bonly.', 'It is\u2028one.')
    pairs[40:40] = [strange]
    lines[43:43] = [strange]

    sources = '\r\n'.join(source for source, _ in lines)   # no line end after the last
    targets = ''.join(f'{target}\n' for _, target in lines)
    (tmp_path / 'src.txt').write_bytes(b'\xef\xbb\xbf' + sources.encode())
    (tmp_path / 'tgt.txt').write_bytes(targets.encode())
    options = [f'--src={tmp_path / "src.txt"}', f'--tgt={tmp_path / "tgt.txt"}',
               '--character=zoe', '--tokenizer=byte']
    return options, [(' '.join(s.split()), ' '.join(t.split())) for s, t in pairs]


def test_office_files_line_by_line(project, two_files):
    options, expected = two_files
    project.run('prepare/office.py', *options)
    meta, tok, splits = read_pairs(project.root / 'data' / 'office')
    train = pair_texts(tok, splits['train'])
    val = pair_texts(tok, splits['val'])

    # None is lost, and they keep their order
    assert sorted(train + val) == sorted(expected)
    assert train == [pair for pair in expected if pair in set(train)]
    assert meta['dropped'] == 2 and meta['moved_to_train'] > 0
    assert 0.02 < len(val) / len(expected) < 0.15

    # Nothing of val is known from train, and no run is divided
    assert not leaks(train, val)
    borders = [i for i in range(1, len(expected)) if (expected[i - 1] in val) != (expected[i] in val)]
    assert len(borders) >= 8
    for i in borders:
        assert not overlaps(expected[i][0], expected[i - 1][0])

    # The template writes what the sources look like
    last_speakers = [source[source.rindex('[') + 1:source.rindex(']')] for source, _ in expected]
    assert meta['chat'] == {
        'turn': '[{speaker}] {text}', 'between': ' ', 'begin': '', 'turns': 3, 'me': 'ZOE',
        'you': max(set(last_speakers), key=last_speakers.count), 'reply': '',
    }


def test_office_contiguous_split(project, two_files):
    options, expected = two_files
    project.run('prepare/office.py', *options, '--split=contiguous90', '--name=plain')
    meta, tok, splits = read_pairs(project.root / 'data' / 'plain')
    n = int(0.9 * len(expected))
    assert pair_texts(tok, splits['train']) == expected[:n]
    assert pair_texts(tok, splits['val']) == expected[n:]
    assert meta['split'].startswith('first 90 %')


def test_office_without_names_from_a_server_and_from_the_cache(project, server, tmp_path):
    expected = [(f'question {i} {chr(0x4e00 + i)}', f'reply {i} [laughs]') for i in range(50)]
    (tmp_path / 'd').mkdir()
    for name, side in (('src.txt', 0), ('tgt.txt', 1)):
        text = '\n'.join(pair[side] for pair in expected)
        (tmp_path / 'd' / name).write_text(text, encoding='utf-8')
    out, _ = project.run('prepare/office.py', f'--urls={server}/gone', f'--urls={server}/d',
                         '--tokenizer=char')
    assert 'no [NAME] tags' in out
    folder = project.root / 'data' / 'office'
    meta, tok, splits = read_pairs(folder)
    assert meta['chat']['turn'] == '{text}' and 3 <= meta['pairs']['val'] <= 7
    assert sorted(pair_texts(tok, splits['train'] + splits['val'])) == sorted(expected)

    # What is downloaded already is used, without any network
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    project.run('prepare/office.py', '--urls=http://127.0.0.1:9', '--tokenizer=char')
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    # Another seed chooses other blocks
    project.run('prepare/office.py', '--tokenizer=char', '--seed=1', '--name=other',
                f'--urls={server}/d')
    _, _, other = read_pairs(project.root / 'data' / 'other')
    assert other['val'] != splits['val']


COLUMNS = ('season', 'episode', 'title', 'scene', 'speaker', 'line')


def write_csv(path, rows, header=COLUMNS):
    with open(path, 'w', encoding='utf-8-sig', newline='') as f:
        csv.writer(f).writerows([header, *rows])


def test_office_transcript(project, tmp_path):
    scenes = made_scenes(60)
    scenes[7] = [('ANA', 'First, "second"\nthird.'), ('ZOE', 'Mine.'), ('ZOE', 'And on.'),
                 ('BO', 'So.'), ('ANA', 'No.'), ('ANA', 'Never.'), ('ZOE', 'End.')]
    rows = []
    for n, scene in enumerate(scenes):
        season = 1 + n // 20
        episode = 1 if n == 7 else n // 5
        for i, (speaker, line) in enumerate(scene):
            if (n, i) == (7, 0):   # stage directions, and rows in which nobody says anything
                rows += [[season, episode, 'Title', n, 'Ana ', line + ' [sighs]'],
                         [season, episode, 'Title', n, 'Bo [on phone]', '[nods]'],
                         [season, episode, 'Title', n, '', 'Nobody says so.']]
            else:
                rows.append([season, episode, 'Title', n, speaker.title() + ' ', line])
    write_csv(tmp_path / 'lines.csv', rows)
    project.run('prepare/office.py', f'--csv={tmp_path / "lines.csv"}', '--character=Zoe',
                '--context=3')

    scenes[7][0] = ('ANA', 'First, "second" third.')
    expected = []   # (turns before, line, number of the scene)
    for n, scene in enumerate(scenes):
        for i in range(1, len(scene)):
            speaker, line = scene[i]
            if speaker == 'ZOE':
                expected.append((scene[max(0, i - 3):i], line, n))
    assert (scenes[7][3:6], 'End.', 7) in expected and (scenes[7][:2], 'And on.', 7) in expected

    meta, tok, splits = read_pairs(project.root / 'data' / 'office')
    train = pair_texts(tok, splits['train'])
    val = pair_texts(tok, splits['val'])
    assert sorted(train + val) == sorted((written(turns), line) for turns, line, _ in expected)
    assert val and not leaks(train, val) and meta['moved_to_train'] >= 0
    for scene in range(len(scenes)):   # is on one side
        sides = {(written(turns), line) in val for turns, line, n in expected if n == scene}
        assert len(sides) <= 1

    # The ids are those that a chat would have
    template = ChatTemplate.from_dict(meta['chat'])
    ids = [source for source, _ in splits['train'] + splits['val']]
    for turns, _, _ in expected:
        assert encode_conversation(tok, template, turns) in ids
    assert template.assistant == 'ZOE' and template.user in ('ANA', 'BO', 'MR. CY')


BAD_PAIR_FILES = {
    'two.txt': b'one\ntwo\n',
    'three.txt': b'1\n2\n3\n',
    'blank.txt': b' \n\n',
    'empty.txt': b'',
    'same.txt': b'a\na b\n',
    'latin.txt': b'one \x92\ntwo\n',
}


@pytest.mark.parametrize('args, message', [
    (['--src=two.txt'], 'both --src=FILE and --tgt=FILE'),
    (['--src=two.txt', '--tgt=three.txt'], r'two.txt has 2 lines, .*three.txt has 3'),
    (['--src=two.txt', '--tgt=blank.txt'], 'not one pair with text on both sides'),
    (['--src=empty.txt', '--tgt=empty.txt'], 'not one pair with text on both sides'),
    (['--src=two.txt', '--tgt=latin.txt'],
     r'latin.txt is not UTF-8 text: byte 0x92 at position 4'),
    (['--src=same.txt', '--tgt=same.txt'],
     r'nothing is left for train: 2 pairs .*--split=contiguous90'),
    (['--csv=no.csv'], 'cannot read'),
    (['--csv=two.txt'], 'no column season, episode, scene, speaker, line; it has one'),
    (['--csv=good.csv', '--character=kim'], r'KIM never speaks in .*ANA \(2\), BO \(1\)'),
    (['--csv=good.csv', '--context=0'], r'context must be in \[1, inf\), got 0'),
    (['--csv=short.csv'], 'short.csv, line 2: 2 fields, but the header names 5'),
    (['--csv=long.csv', '--character=ana', '--tokenizer=wordy'], "no tokenizer 'wordy'"),
])
def test_office_bad_input_ends_in_one_sentence(project, args, message):
    root = project.root
    for name, content in BAD_PAIR_FILES.items():
        (root / name).write_bytes(content)
    columns = ('season', 'episode', 'scene', 'speaker', 'line')
    good = [(1, 1, 1, 'Ana', 'hm'), (1, 1, 1, 'Bo', 'ho'), (1, 1, 1, 'Ana', 'ha')]
    long = [(1, 1, n // 2, ('Bo', 'Ana')[n % 2], f'hm {n}') for n in range(60)]
    write_csv(root / 'good.csv', good, columns)
    write_csv(root / 'long.csv', long, columns)
    write_csv(root / 'short.csv', [(1, 1)], columns)
    err = project.fails('prepare/office.py', *args)
    assert re.search(message, err), err
    assert not list(root.glob('data/*/*'))


@pytest.mark.skipif(not SHARED.is_dir(), reason="GPT-2's encoding is not beside this checkout")
def test_office_gpt2(project, tmp_path, monkeypatch):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')   # tiktoken may delete from it
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    lines = [f'[BO] line {i} <|endoftext|>' for i in range(40)]
    (project.root / 'a.txt').write_text('\n'.join(lines), encoding='utf-8')
    project.run('prepare/office_gpt2.py', '--src=a.txt', '--tgt=a.txt')
    meta, tok, splits = read_pairs(project.root / 'data' / 'office_gpt2')
    assert meta['vocab_size'] == 50_260 and {'pad', 'bos', 'eos'} <= set(tok.special_tokens)
    line = '[BO] line 3 <|endoftext|>'
    assert (line, line) in pair_texts(tok, splits['train'] + splits['val'])


# --- dialog.py ------------------------------------------------------------------------------------

def write_zips(folder, **dialogs):
    """DailyDialog's zips: SPLIT.zip for each split=[[utterance, …], …]."""
    folder.mkdir(exist_ok=True)
    for split, lines in dialogs.items():
        text = ''
        for utterances in lines:
            text += ' __eou__ '.join([*utterances, '']).strip() + '\n'
        with zipfile.ZipFile(folder / f'{split}.zip', 'w') as archive:
            archive.writestr(f'{split}/dialogues_act_{split}.txt', '1 2\n')
            archive.writestr(f'{split}/dialogues_{split}.txt', text)


REPAIRED = [   # as DailyDialog has it, as people write it
    ('It ’ s late , isn ’ t it ? I ’ Ve no time , don ’ t you see ?',
     "It's late, isn't it? I've no time, don't you see?"),
    ("I ' m sure we ' ll be there , they're slow .", "I'm sure we'll be there, they're slow."),
    ("Read ' The Lamp ' , ma ' am , at 8 o ' clock .", "Read 'The Lamp', ma'am, at 8 o'clock."),
    ('He said “ no more ! ” and left ( slowly ) .', 'He said "no more!" and left (slowly).'),
    ("All is well.But my parents ' car costs $ 12 , 500 . 50 !",
     "All is well. But my parents' car costs $12,500.50!"),
    ('From 8: 30 to 9 : 15 p . m . , see me at lamp.com or in the U . S . . .',
     'From 8:30 to 9:15 p.m., see me at lamp.com or in the U.S...'),
    ('Well . . . 50 % off ; not bad 。', 'Well... 50% off; not bad.'),
    ('Type <sep> or </s> , please .', 'Type <sep> or </s>, please.'),
]


@pytest.fixture
def corpora(tmp_path):
    """Files of both corpora in tmp_path: daily/*.zip, *.json. Some dialogs occur again."""
    hello = ['Hello there .', 'Oh , hello !']
    write_zips(tmp_path / 'daily',
               train=[[raw for raw, _ in REPAIRED], hello, ['HELLO there.', 'Oh, hello!'],
                      ['Alone .']],
               validation=[['Oh .', 'Yes .'], hello],
               test=[['Oh.', 'Yes.'], ['Oh .', 'No .', 'Why ?'], [*hello, 'So early ?']])
    train = [
        {'context': 'I took it.', 'response': 'Give it back.', 'dialogue_id': 3},
        {'context': 'Why?', 'response': 'It is not yours.', 'dialogue_id': 3},
        {'context': 'I pushed him.', 'response': 'That hurts.', 'dialogue_id': 4},
    ]
    valid = [{'context': 'A', 'response': 'B'}, {'context': 'C', 'response': 'D'}]
    test = [{'context': 'a', 'response': 'b!'}, {'context': 'E', 'response': 'F'}]
    (tmp_path / 'train.json').write_text(json.dumps(train), encoding='utf-8')
    rows = '\n'.join(map(json.dumps, valid))   # a row per line
    (tmp_path / 'valid.json').write_text(rows, encoding='utf-8')
    (tmp_path / 'test.json').write_text(json.dumps(test), encoding='utf-8')
    return tmp_path


def test_dialog_pairs(project, corpora, server):
    """Repaired, with the template's special tokens, each target once in all splits."""
    out, _ = project.run('prepare/dialog.py', f'--daily={corpora / "daily"}',
                         f'--prosocial_urls={server}', '--tokenizer=byte', '--context=3')
    assert 'CC BY-NC-SA' in out
    meta, tok, splits = read_pairs(project.root / 'data' / 'dialog')
    assert set(tok.special_tokens) == {'pad', 'bos', 'eos', 'sep'}
    assert meta['dropped_dialogs'] == {'train': 1, 'val': 1, 'test': 2}
    assert meta['dropped_pairs'] == {'train': 0, 'val': 0, 'test': 1}

    def pair(*utterances):
        """The ids of a pair: the last of the utterances is the target, which the bot says."""
        turns = []
        for distance, text in zip(reversed(range(len(utterances))), utterances):
            speaker = 'Bot' if distance % 2 == 0 else 'User'
            turns.append(tok.encode(f'{speaker}: {text}'))
        *before, target = turns
        source = [tok.special_tokens['bos'], *before[0]]
        for turn in before[1:]:
            source += [tok.special_tokens['sep'], *turn]
        return source, [*target, tok.special_tokens['eos']]

    repaired = [clean for _, clean in REPAIRED]
    assert splits['train'] == [
        *(pair(*repaired[max(0, i - 3):i + 1]) for i in range(1, len(repaired))),
        pair('Hello there.', 'Oh, hello!'),
        pair('I took it.', 'Give it back.'),
        pair('I took it.', 'Give it back.', 'Why?', 'It is not yours.'),
        pair('I pushed him.', 'That hurts.'),
    ]
    assert splits['val'] == [pair('Oh.', 'Yes.'), pair('A', 'B'), pair('C', 'D')]
    assert splits['test'] == [
        pair('Oh.', 'No.'),
        pair('Oh.', 'No.', 'Why?'),
        pair('Hello there.', 'Oh, hello!', 'So early?'),
        pair('E', 'F'),
    ]

    # A chat has the same ids
    template = ChatTemplate.from_dict(meta['chat'])
    assert template.reply_prefix == 'Bot: '
    source, _ = splits['train'][1]
    turns = [('Bot', repaired[0]), ('User', repaired[1])]
    assert source == encode_conversation(tok, template, turns)


def test_dialog_with_sentencepiece(project, corpora):
    """The name of a special token that somebody has typed is text."""
    project.run('prepare/dialog.py', '--daily=daily', f'--prosocial={corpora}', '--name=sp',
                cwd=corpora)
    meta, tok, splits = read_pairs(project.root / 'data' / 'sp')
    assert meta['tokenizer']['kind'] == 'sentencepiece'
    last = pair_texts(tok, splits['train'])[-1]
    assert last == ('User: I pushed him.', 'Bot: That hurts.')

    source, target = splits['train'][len(REPAIRED) - 2]
    assert tok.decode(target) == 'Bot: Type <sep> or </s>, please.'
    assert not set(target[:-1]) & set(tok.special_tokens.values())
    assert source.count(tok.special_tokens['sep']) == 5
    assert source[0] == tok.special_tokens['bos']


def bomb(path):
    """A zip of 150 KB that unpacks to 150 MB."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open('dialogues_train.txt', 'w') as file:
            for _ in range(150):
                file.write(bytes(2**20))


def encrypt(path):
    """Set the flag that says so, in both headers."""
    content = bytearray(path.read_bytes())
    for mark, place in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + place] |= 1
            start = content.find(mark, start + 1)
    path.write_bytes(content)


def damage(path):
    """Deflated text of which a byte has changed."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('dialogues_train.txt', ''.join(map(str, range(9000))))
    content = bytearray(path.read_bytes())
    content[1000:1010] = bytes(10)
    path.write_bytes(content)


def make_endless_utterance(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('dialogues_train.txt', "' a" * 10_000)


@pytest.mark.parametrize('spoil, message', [
    (bomb, 'train.zip unpacks to 157,286,400 bytes'),
    (encrypt, 'train.zip is not a zip with a UTF-8'),
    (damage, 'train.zip is not a zip with a UTF-8'),
    (make_endless_utterance, 'an utterance of more than 20,000 characters'),
])
def test_dialog_zips_that_are_dangerous_or_damaged(project, corpora, spoil, message):
    spoil(corpora / 'daily' / 'train.zip')
    error = project.fails('prepare/dialog.py', '--corpora=daily', '--daily=daily', cwd=corpora)
    assert message in error


@pytest.mark.slow
def test_dialog_repairs_take_no_minute(project, corpora):
    """A quotation mark before many spaces, none after them."""
    write_zips(corpora / 'daily', train=[['"' + ' ' * 5000 + 'a' for _ in range(9)]])
    project.run('prepare/dialog.py', '--corpora=daily', '--daily=daily', '--tokenizer=char',
                cwd=corpora, timeout=20)


@pytest.mark.parametrize('text', ['[' * 200_000, '[{"context": ' + '1' * 5000 + '}]'])
def test_dialog_json_that_python_cannot_read(project, corpora, text):
    (corpora / 'train.json').write_text(text, encoding='utf-8')
    error = project.fails('prepare/dialog.py', '--corpora=prosocial', '--prosocial=.', cwd=corpora)
    assert 'is not rows of JSON' in error


@pytest.mark.parametrize('args, message', [
    (['--daily=daily', '--corpora=daily'], 'test.zip is not a zip'),
    (['--daily=.', '--corpora=daily'], 'there is no *train*.zip'),
    (['--corpora=prosocial', '--prosocial_urls=http://127.0.0.1:9'], '--prosocial=FOLDER'),
    (['--corpora=prosocial', '--prosocial=bad'],
     'not rows of JSON with context and response (KeyError'),
    (['--corpora=daily', '--context=0'], 'context must be in [1, inf), got 0'),
])
def test_dialog_bad_input_ends_in_one_sentence(project, corpora, args, message):
    (corpora / 'daily' / 'test.zip').write_bytes(b'no zip')
    (corpora / 'bad').mkdir()
    (corpora / 'bad' / 'train.json').write_text('[{"context": "a"}]', encoding='utf-8')
    assert message in project.fails('prepare/dialog.py', *args, cwd=corpora)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason='the real dialogs are not beside this checkout')
def test_dialog_real_files(project, tmp_path):
    """ProsocialDialog's files, and DailyDialog's small ones: validation as train, test as val."""
    write_zips(tmp_path, test=[['Good lamp !', 'It is .']])
    shutil.copy(SHARED / 'dailydialog' / 'validation.zip', tmp_path / 'train.zip')
    shutil.copy(SHARED / 'dailydialog' / 'test.zip', tmp_path / 'valid.zip')
    project.run('prepare/dialog.py', f'--daily={tmp_path}', f'--prosocial={SHARED / "prosocial"}',
                '--tokenizer=byte', '--context=1')
    meta, tok, splits = read_pairs(project.root / 'data' / 'dialog')
    assert 10_000 < meta['pairs']['train'] <= 4000 + 8069 - 1000
    assert 10_000 < meta['pairs']['val'] <= 4000 + 7740 - 1000
    assert 480 < meta['pairs']['test'] <= 501
    assert 0 < meta['dropped_dialogs']['train'] < 200 and 0 < meta['dropped_dialogs']['val'] < 200

    targets = [tok.decode(target) for _, target in splits['train'][:6000]]   # DailyDialog's
    unrepaired = [text for text in targets if ' ,' in text or ' ?' in text or ' ’ ' in text]
    assert not unrepaired
    assert sum("n't " in text for text in targets) > 500
