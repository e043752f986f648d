"""
The Office as pairs: what was said, and what Michael Scott answered. Or pairs of your own, or what
anyone says in a transcript.

    python prepare/office.py                                        the public pairs, downloaded
    python prepare/office.py --src=questions.txt --tgt=answers.txt  any pairs: line n answers line n
    python prepare/office.py --csv=The-Office-Lines-V4.csv --character=DWIGHT    from a transcript

A source is a conversation, '[PAM] Morning. [MICHAEL] Is it? [PAM] It is.', in the ids that
sample.py --chat makes of it too. The [NAME] tags may be missing from files.

A transcript is a table with the columns season, episode, scene, speaker, line. Each line of the
character is a target, unless it opens its scene, and the turns before it are the source.
[Stage directions] are left out, since nobody says them.

About a tenth of the scenes goes to val, in blocks from all over. Files have no scenes; there a run
of sources that continue or overlap each other stays together. What begins like a source of
train moves to train. meta.json says how many did, and how many pairs were dropped for a blank side.
"""
import csv as csv_module
import io
import re
import shlex
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

src: str | None = None       # a text file of sources, one per line (with --tgt)
tgt: str | None = None       # its targets
csv: str | None = None       # or a transcript, with columns season, episode, scene, speaker, line
character = 'MICHAEL'        # whose lines of the transcript are the targets
context = 4                  # [1, inf) a source has at most this many turns of the scene
split: Literal['blocks', 'contiguous90'] = 'blocks'  # contiguous90: first 90 % / last 10 %
seed = 0                     # chooses the blocks
tokenizer = 'bpe'            # char, byte, bpe, sentencepiece, gpt2, smollm2, FOLDER or out/RUN
vocab_size = 8192            # of those that are trained, on train; few pairs want a small head
name = 'office'              # the dataset is data/NAME
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/idrisalami/MichaelScott-GPT/main/data',
    'https://cdn.jsdelivr.net/gh/idrisalami/MichaelScott-GPT@main/data',
)  # folders with src.txt and tgt.txt, tried in this order
configure(__file__, globals())

from pocket.datasets import (
    choose_val_by_blocks,
    dataset_folder,
    make_dataset_tokenizer,
    print_next_step,
    read_text,
    write_pairs,
)
from pocket.errors import UserError
from pocket.files import download, sha256_of
from pocket.template import ChatTemplate, encode_conversation

COLUMNS = ('season', 'episode', 'scene', 'speaker', 'line')
NAME_TAG = re.compile(r'(?:^|(?<= ))\[([^\[\]a-z]+)\] ')  # [PAM] and [MR. BROWN], not [laughs]


class Pair(NamedTuple):
    source: str
    turns: list | None   # the source as [(speaker, text), …], if it has [NAME] tags
    target: str
    unit: int            # number of the scene or the run it belongs to


# --- Pairs from two files -------------------------------------------------------------------------

def read_tidy_lines(path):
    r"""The lines of a file, with single spaces only.

    Only \n and \r\n end a line: other line ends that Unicode has must not shift the pairs.
    """
    lines = read_text(path, translate=False).removeprefix('\ufeff').split('\n')
    if not lines[-1]:
        lines.pop()
    return [' '.join(line.split()) for line in lines]


def parse_turns(source):
    """'[PAM] Morning. [MICHAEL] Is it?' as [('PAM', 'Morning.'), ('MICHAEL', 'Is it?')].

    None if a source does not begin with a [NAME] tag.
    """
    before_first_tag, *rest = NAME_TAG.split(source)
    if before_first_tag or not rest:
        return None
    speakers = rest[::2]
    texts = [text.strip() for text in rest[1::2]]
    return list(zip(speakers, texts))


def continues(source, previous):
    """Whether a source begins with the previous one, or with all but the oldest turns of it."""
    starts = [0] + [match.start() for match in NAME_TAG.finditer(previous)]
    return any(f'{source} '.startswith(f'{previous[start:]} ') for start in starts)


def pairs_of_files(sources_path, targets_path):
    """(list of Pair, number of pairs that were dropped because one side was blank)."""
    sources = read_tidy_lines(sources_path)
    targets = read_tidy_lines(targets_path)
    if len(sources) != len(targets):
        raise UserError(f'{sources_path} has {len(sources):,} lines, {targets_path} has '
                        f"{len(targets):,}: line n of one must answer the other's")
    pairs = []
    dropped = 0
    run = 0
    previous = ''
    for source, target in zip(sources, targets):
        if source and target:
            if not continues(source, previous):
                run += 1
            pairs.append(Pair(source, parse_turns(source), target, run))
            previous = source
        elif source or target:
            dropped += 1
    return pairs, dropped


# --- Pairs from a transcript ----------------------------------------------------------------------

def read_scenes(path):
    """The scenes of a transcript, each [(SPEAKER, line), …]; rows in which nobody speaks are left
    out."""
    text = read_text(path).removeprefix('\ufeff')
    rows = csv_module.reader(io.StringIO(text, newline=''))
    turns = []   # [((season, episode, scene), (speaker, line)), …]
    try:
        header = [column.strip().lower() for column in next(rows, [])]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            columns = ', '.join(header) or 'none at all'
            raise UserError(f'{path} has no column {", ".join(missing)}; it has {columns}')
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(f'{path}, line {rows.line_num}: {len(row)} fields, but the header '
                                f'names {len(header)}')
            season, episode, scene, speaker, line = (row[header.index(name)] for name in COLUMNS)
            speaker = without_directions(speaker).upper()
            line = without_directions(line)
            if speaker and line:
                turns.append(((season, episode, scene), (speaker, line)))
    except csv_module.Error as e:
        raise UserError(f'{path}, line {rows.line_num}: {e}; is it a CSV file?') from None

    scenes = []
    for _, scene_turns in groupby(turns, key=lambda turn: turn[0]):
        scenes.append([turn for _, turn in scene_turns])
    return scenes


def without_directions(text):
    """'[sighs] No.  Never.' as 'No. Never.'"""
    return ' '.join(re.sub(r'\[[^\]]*\]', ' ', text).split())


def pairs_of_scenes(scenes):
    """List of Pair for the lines of the character."""
    lines_of = Counter(speaker for scene in scenes for speaker, _ in scene)
    if character not in lines_of:
        most = ', '.join(f'{speaker} ({n:,})' for speaker, n in lines_of.most_common(8)) or 'nobody'
        raise UserError(f'{character} never speaks in {csv}; '
                        f'--character= may be, most lines first: {most}')
    pairs = []
    for number, scene in enumerate(scenes):
        for i, (speaker, line) in enumerate(scene):
            if i > 0 and speaker == character:
                turns = scene[max(0, i - context):i]
                pairs.append(Pair(format_turns(turns), turns, line, number))
    return pairs


def format_turns(turns):
    """[('PAM', 'Morning.'), ('MICHAEL', 'Is it?')] as '[PAM] Morning. [MICHAEL] Is it?'"""
    return ' '.join(f'[{speaker}] {text}' for speaker, text in turns)


# --- Chat template --------------------------------------------------------------------------------

def make_template(pairs):
    """How sample.py --chat should write a conversation: as the sources are written."""
    with_turns = [pair.turns for pair in pairs if pair.turns]
    last_speakers = Counter(turns[-1][0] for turns in with_turns if turns[-1][0] != character)
    max_turns = max([len(turns) for turns in with_turns], default=1)
    if not last_speakers:
        print('no [NAME] tags in the sources: each is taken as it stands')
        return ChatTemplate(separator=' ', max_turns=max_turns, user='You', assistant='Reply')
    most_common_speaker = last_speakers.most_common(1)[0][0]
    return ChatTemplate(turn='[{speaker}] {text}', separator=' ', max_turns=max_turns,
                        user=most_common_speaker, assistant=character)


# --- Main -----------------------------------------------------------------------------------------

# Check the options
folder = dataset_folder(data_dir, name)
character = character.strip().upper()
if bool(src) != bool(tgt) or (csv and src):
    raise UserError('give both --src=FILE and --tgt=FILE, or --csv=FILE alone')

# Read the pairs
dropped = 0
if csv:
    files = [csv]
    pairs = pairs_of_scenes(read_scenes(csv))
else:
    files = [src, tgt]
    if not src:
        advice = ('Without a network, give files that you have to prepare/office.py: --src=FILE '
                  '--tgt=FILE, or a transcript, --csv=FILE')
        files = []
        for file in ('src.txt', 'tgt.txt'):
            candidates = [f'{url}/{file}' for url in urls]
            files.append(download(candidates, folder / file, None, advice))
    pairs, dropped = pairs_of_files(*files)
if not pairs:
    raise UserError(f'{" and ".join(map(str, files))}: not one pair with text on both sides')
template = make_template(pairs)

# Split them
if split == 'blocks':
    sources = [pair.source for pair in pairs]
    val_units, moved = choose_val_by_blocks(sources, [pair.unit for pair in pairs], seed)
    train = [pair for pair in pairs if pair.unit not in val_units]
    val = [pair for pair in pairs if pair.unit in val_units]
    units = 'scenes' if csv else 'runs'
    how_split = f'blocks of {units}, seed {seed}: {moved:,} pairs moved from val to train'
else:
    n = int(len(pairs) * 0.9)
    moved = 0
    train = pairs[:n]
    val = pairs[n:]
    how_split = 'first 90 % / last 10 % of the pairs'
if not train or not val:
    empty = 'val' if train else 'train'
    raise UserError(f'nothing is left for {empty}: {len(pairs):,} pairs are too few, or begin too '
                    'much alike; give more, or try --split=contiguous90')

# A tokenizer learns from train alone, but a char tokenizer could not write val without all of its
# characters
learned = train + val if tokenizer == 'char' else train
texts = []
for pair in learned:
    texts += [pair.source, pair.target]
tok, _ = make_dataset_tokenizer(tokenizer, texts, vocab_size,
                                special_tokens=('pad', 'bos', 'eos'))


# Encode and write
def encode_source(pair):
    """Ids of a conversation, as sample.py --chat has them; any other source stays text."""
    if pair.turns:
        return encode_conversation(tok, template, pair.turns)
    return pair.source


splits = {
    'train': [(encode_source(pair), pair.target) for pair in train],
    'val': [(encode_source(pair), pair.target) for pair in val],
}
source = {
    'source': [str(file) for file in files],
    'sha256': [sha256_of(file) for file in files],
    'moved_to_train': moved,
    'dropped': dropped,
}
write_pairs(folder, tok, splits, source, how_split, template)
print_next_step(f'--dataset={shlex.quote(name)}', data_dir)
