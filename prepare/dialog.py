"""
DailyDialog and ProsocialDialog as chat: multi-turn pairs, '<s> User: Hi! <sep> Bot: Hello. <sep> User: Coffee?' and 'Bot: Gladly. </s>'.

    python prepare/dialog.py                                           both, downloaded (4 MB and 117 MB)
    python prepare/dialog.py --daily=FOLDER --prosocial=FOLDER         from local zips and JSON files: *train*, *valid*, *test*
    python prepare/dialog.py --corpora=daily                           one of them

In DailyDialog every utterance but the first is a reply, whoever spoke; in ProsocialDialog every response is, and not what provokes it.
The official splits are kept, and a dialog that occurs again, letter for letter, stays in the first of train, val and test alone.
"""
import json
import re
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from common import UserError, dataset_folder, download, read_text, sha256_of, write_pairs
from configurator import configure

corpora: Literal['both', 'daily', 'prosocial'] = 'both'  # which are used
daily: str | None = None      # a folder with DailyDialog's three zips (None: download them)
prosocial: str | None = None  # a folder with ProsocialDialog's three JSON files (None: download them)
context = 6                   # utterances before a reply, at most
tokenizer = 'sentencepiece'   # or char, byte, bpe, trained on train; or one of tiktoken's, such as gpt2
vocab_size = 32000            # of what is trained; where the text is too small for it, the largest that fits
name = 'dialog'               # the dataset is data/NAME
data_dir: str | None = None   # where datasets live (None: data/ beside the scripts)
daily_urls: tuple[str, ...] = (  # folders of train.zip, validation.zip and test.zip, tried in this order
    'https://huggingface.co/datasets/roskoN/dailydialog/resolve/main',
    'https://cdn.jsdelivr.net/gh/Ls-Dai/Deep-Reinforcement-Learning-for-Dialogue-Generation-in-PyTorch@bae51b16e3e8/data')
prosocial_urls: tuple[str, ...] = ('https://huggingface.co/datasets/allenai/prosocial-dialog/resolve/main',)  # of train.json, ...
configure(__file__, globals())

from chat import source_ids
from tokenizer import make

LICENCES = {'daily': 'DailyDialog (Li et al. 2017) is CC BY-NC-SA 4.0: not for commercial use',
            'prosocial': 'ProsocialDialog (Kim et al. 2022) is CC BY 4.0; it holds offensive lines, for it teaches answers to them'}
STYLE = {'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '<bos>', 'you': 'User', 'me': 'Bot', 'reply': 'Bot: '}
CHARACTERS = str.maketrans({'’': "'", '‘': "'", '′': "'", '“': '"', '”': '"', '。': ' . ', '、': ' , ', '\x7f': ' '})
REPAIRS = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"(\w) ?' ?(s|t|m|d|re|ve|ll|Ve|Re|Ll)\b", lambda m: f"{m[1]}'{m[2].lower()}"),  # I ' m, we ' Ve
    (r"\b([Oo]) ' (?=\w)", r"\1'"),                             # o ' clock
    (r"(?:^|(?<=\s))' (\S.*?) '(?=\s|$)", r"'\1'"),             # she said ' maybe '
    (r"s ' ", "s' "),                                           # my parents ' home
    (r'" *(.*?) *"', r'"\1"'),
    (r'\b(\d{1,3}(?:,\d{3})*) , (\d{3})\b', r'\1,\2'),          # 12 , 000
    (r'(?<=\d) \. (?=\d)', '.'), (r'(?<=\d) ?: (?=\d\d\b)', ':'),
    (r' +([.,!?;:%)\]])', r'\1'), (r'([(\[$£¥]) ', r'\1'),
    (r'\b([A-Za-z])\. (?=[A-Za-z]\.)', r'\1.'),                 # p . m .
    (r'([!?]|(?<=[a-z]{2})\.)(?=[A-Z])', r'\1 '),               # right.But
    (r'\s+', ' '))]


def repair(text):
    """DailyDialog's text, which was cut into words, as people write it: 'It ’ s late , isn't it ?' is "It's late, isn't it?"."""
    text = text.translate(CHARACTERS)
    for pattern, new in REPAIRS:
        text = pattern.sub(new, text)
    return text.strip()


def find_file(folder, corpus, split, suffix):
    """The file of a split: in the folder given with --daily or --prosocial, else downloaded."""
    if given := globals()[corpus]:
        found = sorted(Path(given).glob(f'*{split[:5]}*{suffix}'), key=lambda p: (len(p.name), p.name))  # valid is short for validation
        if not found:
            raise UserError(f'{given} holds no *{split[:5]}*{suffix}, as --{corpus} must; leave it away to download the files')
        return found[0]
    advice = f'Without a network, give a folder that holds the files with --{corpus}=FOLDER, or leave that corpus out with --corpora=…'
    return download([f'{url}/{split}{suffix}' for url in globals()[f'{corpus}_urls']], folder / corpus / f'{split}{suffix}', None, advice)


def read_daily(path):
    """[[utterance, ...] of a dialog] of a zip: a dialog a line, __eou__ behind each utterance."""
    try:
        with zipfile.ZipFile(path) as z:
            member = [m for m in z.namelist() if re.search(r'dialogues_(train|validation|test)\.txt$', m)]
            text = z.read(member[0]).decode('utf-8') if member else ''
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as e:
        raise UserError(f'cannot read {path}: {e}; it must be a zip of UTF-8 text, delete it to download it anew') from None
    return [[u for u in map(repair, line.split('__eou__')) if u] for line in text.split('\n')]


def read_prosocial(path):
    """[[context, response, context, ...] of a dialog] of a JSON list of rows, or a row a line. Without dialogue_id, a row is a dialog."""
    text = read_text(path).removeprefix('\ufeff').strip()
    try:
        rows = json.loads(text) if text.startswith('[') else [json.loads(line) for line in text.split('\n') if line.strip()]
        turns = [(row.get('dialogue_id', f'row {i}'), [row[k].strip() for k in ('context', 'response')]) for i, row in enumerate(rows)]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'{path} is not rows of JSON with context and response ({type(e).__name__}: {e})') from None
    return [[text for _, row in rows for text in row] for _, rows in groupby(turns, key=lambda t: t[0])]


folder, seen = dataset_folder(data_dir, name), set()
splits, used, dropped = {'train': [], 'val': [], 'test': []}, {}, {'train': 0, 'val': 0, 'test': 0}
if context < 1:
    raise UserError('--context must be at least 1')
for split in splits:
    for corpus in ('daily', 'prosocial') if corpora == 'both' else (corpora,):
        official = {'val': 'validation' if corpus == 'daily' else 'valid'}.get(split, split)
        path = find_file(folder, corpus, official, '.zip' if corpus == 'daily' else '.json')
        used[str(path)] = sha256_of(path)
        for dialog in read_daily(path) if corpus == 'daily' else read_prosocial(path):
            key = re.sub(r'\W+', '', ''.join(dialog)).lower()
            if len(dialog) > 1 and all(dialog):
                dropped[split] += key in seen
                splits[split] += [] if key in seen else [(dialog, 1 if corpus == 'daily' else 2)]
                seen.add(key)
if empty := [split for split, dialogs in splits.items() if not dialogs]:
    raise UserError(f'no dialogs of two turns for {empty[0]} in {", ".join(used)}')

texts = (text for dialogs in (splits.values() if tokenizer == 'char' else [splits['train']])  # char: val's characters need ids too
         for dialog, _ in dialogs for u in dialog for text in (f'User: {u}', f'Bot: {u}', u))
try:
    tok = make(tokenizer, texts, vocab_size=vocab_size, specials=('pad', 'bos', 'eos', 'sep'))
except ValueError as e:
    raise UserError(str(e)) from None


def pairs_of(dialog, step):
    """(source, target) for each reply of a dialog, as arrays of ids; the one who replies is the bot."""
    for i in range(1, len(dialog), step):
        turns = [(STYLE['me' if (i - j) % 2 == 0 else 'you'], dialog[j]) for j in range(max(0, i - context), i)]
        target = tok.encode(STYLE['reply']) + tok.encode(dialog[i]) + [tok.end]  # in two, as they meet in a chat
        yield np.array(source_ids(tok, STYLE, turns), np.uint32), np.array(target, np.uint32)


splits = {split: [pair for dialog in dialogs for pair in pairs_of(*dialog)] for split, dialogs in splits.items()}
source = {'source': list(used), 'sha256': list(used.values()), 'dropped': dropped}
write_pairs(folder, tok, splits, source, 'official, without what occurs again', STYLE)
for corpus, licence in LICENCES.items():
    if corpora in ('both', corpus):
        print(licence)
print(f'next: python train.py --dataset={name}' + (f' --data_dir={data_dir}' if data_dir else ''))
