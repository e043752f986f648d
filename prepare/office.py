"""
The Office as pairs: what was said before, and what Michael Scott answered. Or pairs of your own, or anyone in a transcript.

    python prepare/office.py                                                  the public pairs, 8,863 of them, downloaded
    python prepare/office.py --src=questions.txt --tgt=answers.txt            pairs of any kind: line n answers line n
    python prepare/office.py --csv=The-Office-Lines-V4.csv --character=DWIGHT a table: season, episode, scene, speaker, line

A source is a conversation: '[PAM] Morning. [MICHAEL] Is it? [PAM] It is.', in the ids that sample.py --chat gives it too. From a
table every line of the character behind another line of its scene is a target, and the turns before it, the character's own among
them, are the source; [stage directions] are left out, for nobody says them. Files may do without [NAME] tags.

A tenth of the scenes (of files: the runs of sources that extend or overlap each other), blocks from all over, is for val; those
with a source that extends, begins or equals one of train move to train. meta.json counts them, and pairs with a blank side.
"""
import csv as csv_files
import io
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, download, read_text, sha256_of, write_pairs
from pocket.errors import UserError

src: str | None = None       # a text file of sources, one a line (with --tgt)
tgt: str | None = None       # its targets
csv: str | None = None       # or a transcript: a table with the columns season, episode, scene, speaker, line
character = 'MICHAEL'        # who answers: whose lines of the transcript are learnt
context = 4                  # turns of the scene before it, at most
split: Literal['blocks', 'contiguous90'] = 'blocks'  # contiguous90: first 90 % / last 10 %, as the public repository has it
seed = 0                     # where the blocks lie
tokenizer = 'bpe'            # char, byte, bpe, sentencepiece, or one of tiktoken's, such as gpt2
vocab_size = 8192            # of those that are trained (on train): few pairs want a small head
name = 'office'              # the dataset is data/NAME
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = ('https://raw.githubusercontent.com/idrisalami/MichaelScott-GPT/main/data',
                         'https://cdn.jsdelivr.net/gh/idrisalami/MichaelScott-GPT@main/data')  # folders of src.txt and tgt.txt
configure(__file__, globals())

from pocket.template import encode_conversation
from pocket.tokenizer import make_tokenizer

COLUMNS = ('season', 'episode', 'scene', 'speaker', 'line')
TAG = re.compile(r'(?:^|(?<= ))\[([^\[\]a-z]+)\] ')  # [PAM] and [MR. BROWN], not [laughs]


def read_lines(path):
    """The lines of a file, spaces tidied. Only \\n and \\r\\n end one: what Unicode counts as a line end must not shift pairs."""
    lines = read_text(path).removeprefix('\ufeff').split('\n')
    return [' '.join(line.split()) for line in (lines if lines[-1] else lines[:-1])]


def pairs_of_files(src, tgt):
    """[(source, turns or None, target, number of the run)], and how many pairs were dropped because one side was blank."""
    sources, targets = read_lines(src), read_lines(tgt)
    if len(sources) != len(targets):
        raise UserError(f'{src} has {len(sources):,} lines, {tgt} has {len(targets):,}: line n of one must answer the other\'s')
    pairs, run, before = [], 0, ''
    for source, target in zip(sources, targets):
        if source and target:
            begins = [0, *(m.start() for m in TAG.finditer(before))]  # a context that moves on loses its oldest turns
            run += not any(f'{source} '.startswith(before[b:] + ' ') for b in begins)
            lead, *turns = TAG.split(source)
            turns = None if lead or not turns else list(zip(turns[::2], map(str.strip, turns[1::2])))
            pairs.append((source, turns, target, run))
            before = source
    return pairs, sum(bool(s) != bool(t) for s, t in zip(sources, targets))


def read_scenes(path):
    """[[(SPEAKER, line), ...] of a scene] of a transcript. Lines that say nothing are left out."""
    rows, turns = csv_files.reader(io.StringIO(read_text(path).removeprefix('\ufeff'), newline='')), []
    try:
        header = [column.strip().lower() for column in next(rows, [])]
        if missing := [column for column in COLUMNS if column not in header]:
            raise UserError(f'{path} has no column {", ".join(missing)}; it has {", ".join(header) or "none at all"}')
        for row in filter(None, rows):
            if len(row) != len(header):
                raise UserError(f'{path}, line {rows.line_num}: {len(row)} fields, but the header names {len(header)}')
            *scene, speaker, line = (row[header.index(column)] for column in COLUMNS)
            speaker, line = (' '.join(re.sub(r'\[[^\]]*\]', ' ', text).split()) for text in (speaker, line))
            turns += [(scene, (speaker.upper(), line))] if speaker and line else []
    except csv_files.Error as e:
        raise UserError(f'{path}, line {rows.line_num}: {e}; is it a CSV file?') from None
    return [[turn for _, turn in scene] for _, scene in groupby(turns, key=lambda t: t[0])]


def pairs_of_scenes(scenes):
    """[(source, turns, target, number of the scene)] for the lines of --character."""
    said = Counter(speaker for scene in scenes for speaker, _ in scene)
    if character not in said:
        often = ', '.join(f'{speaker} ({n:,})' for speaker, n in said.most_common(8)) or 'nobody'
        raise UserError(f'{character} never speaks in {csv}; --character= may be, most lines first: {often}')
    windows = [(scene[max(0, i - context):i], scene[i][1], number) for number, scene in enumerate(scenes)
               for i in range(1, len(scene)) if scene[i][0] == character]
    return [(' '.join(f'[{speaker}] {line}' for speaker, line in turns), turns, *rest) for turns, *rest in windows]


def split_blocks(pairs):
    """The set of units (runs, scenes) that are val, and how many pairs moved to train.

    Sources are of one family where the shortest begins all others, word for word; no family is on both sides.
    """
    family, root = {}, None
    for source in sorted({f'{p[0]} ' for p in pairs}):  # behind a source come all that begin with it, then others
        root = source if root is None or not source.startswith(root) else root
        family[source[:-1]] = root
    units, rng, chosen = sorted({p[3] for p in pairs}), Random(seed), set()
    blocks = min(10, len(units) // 20 + 1)
    for k in range(blocks):
        stretch = units[len(units) * k // blocks:len(units) * (k + 1) // blocks]
        size = round(len(stretch) / 10) or 1
        first = rng.randrange(len(stretch) - size + 1)
        chosen.update(stretch[first:first + size])
    val, leaks = chosen, {None}
    while leaks:
        train = {family[p[0]] for p in pairs if p[3] not in val}
        leaks = {p[3] for p in pairs if p[3] in val and family[p[0]] in train}
        val = val - leaks
    return val, sum(p[3] in chosen - val for p in pairs)


folder, character = dataset_folder(data_dir, name), character.strip().upper()
if bool(src) != bool(tgt) or csv and src or context < 1:
    raise UserError('--context must be at least 1' if context < 1 else 'give both --src=FILE and --tgt=FILE, or --csv=FILE alone')
if csv:
    files, pairs, blank = [csv], pairs_of_scenes(read_scenes(csv)), 0
else:
    files = [src, tgt] if src else [
        download([f'{url}/{file}' for url in urls], folder / file, None, 'Without a network, give files that you have to '
                 'prepare/office.py: --src=FILE --tgt=FILE, or a transcript, --csv=FILE') for file in ('src.txt', 'tgt.txt')]
    pairs, blank = pairs_of_files(*files)
if not pairs:
    raise UserError(f'{" and ".join(map(str, files))}: not one pair with text on both sides')

partners = Counter(turns[-1][0] for _, turns, _, _ in pairs if turns and turns[-1][0] != character)
style = {'turn': '[{speaker}] {text}' if partners else '{text}', 'between': ' ', 'begin': '',
         'turns': max(len(turns or [0]) for _, turns, _, _ in pairs), 'you': partners.most_common(1)[0][0] if partners else 'You',
         'me': character if partners else 'Reply', 'reply': ''}
if not partners:
    print('no [NAME] tags in the sources: each is taken as it stands')
if split == 'blocks':
    val, moved = split_blocks(pairs)
    sides = {'train': [p for p in pairs if p[3] not in val], 'val': [p for p in pairs if p[3] in val]}
    how = f'blocks of {"scenes" if csv else "runs"}, seed {seed}: {moved:,} pairs moved from val to train'
else:
    n, moved = int(len(pairs) * 0.9), 0
    sides, how = {'train': pairs[:n], 'val': pairs[n:]}, 'first 90 % / last 10 % of the pairs'
if empty := [side for side, some in sides.items() if not some]:
    raise UserError(f'nothing is left for {empty[0]}: {len(pairs):,} pairs are too few, or begin too much alike; '
                    f'give more, or try --split=contiguous90')

learnt = sides['train'] + (sides['val'] if tokenizer == 'char' else [])  # characters that val alone has must have ids
tok = make_tokenizer(tokenizer, [text for p in learnt for text in (p[0], p[2])], vocab_size, special_tokens=('pad', 'bos', 'eos'))
splits = {side: [(encode_conversation(tok, style, turns) if turns else source, target) for source, turns, target, _ in some]
          for side, some in sides.items()}
source = {'source': [str(f) for f in files], 'sha256': [sha256_of(f) for f in files], 'moved_to_train': moved, 'dropped': blank}
write_pairs(folder, tok, splits, source, how, style)
print(f'next: python train.py --dataset={name}' + (f' --data_dir={data_dir}' if data_dir else ''))
