"""
DailyDialog and ProsocialDialog as chat: '<s> User: Hi! <sep> Bot: Hello. <sep> User: Coffee?' and its reply 'Bot: Gladly. </s>'.

    python prepare/dialog.py                                           both, downloaded (3 MB and 117 MB)
    python prepare/dialog.py --daily=FOLDER --prosocial=FOLDER         from local zips and JSON files: *train*, *valid*, *test*
    python prepare/dialog.py --corpora=daily                           one of them

In DailyDialog every utterance but the first is a reply to learn, in ProsocialDialog every response is, not what provokes it. The
official splits are kept; a dialog that occurs again, letter for letter, stays only where it is first: in train, val, then test;
and so does a pair that two splits have. meta.json counts what was dropped.
"""
import json
import re
import sys
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, download, read_text, sha256_of, write_pairs
from pocket.errors import UserError

corpora: Literal['both', 'daily', 'prosocial'] = 'both'  # which are used
daily: str | None = None      # a folder with DailyDialog's three zips (None: download them)
prosocial: str | None = None  # a folder with ProsocialDialog's three JSON files (None: download them)
context = 6                   # utterances before a reply, at most
tokenizer = 'sentencepiece'   # or char, byte, bpe, trained on train; or one of tiktoken's, such as gpt2
vocab_size = 32000            # of what is trained; where the text is too small for it, the largest that fits
name = 'dialog'               # the dataset is data/NAME
data_dir: str | None = None   # where datasets live (None: data/ beside the scripts)
daily_urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/Ls-Dai/Deep-Reinforcement-Learning-for-Dialogue-Generation-in-PyTorch/'
    'bae51b16e3e8c0ce4ffd70b75ecfc40fbeb8e7ee/data', 'https://huggingface.co/datasets/roskoN/dailydialog/resolve/main')  # mirrors
prosocial_urls: tuple[str, ...] = ('https://huggingface.co/datasets/allenai/prosocial-dialog/resolve/main',)  # mirrors
configure(__file__, globals())

from pocket.template import encode_conversation
from pocket.tokenizer import make_tokenizer

LICENCES = {'daily': 'DailyDialog (Li et al. 2017) is CC BY-NC-SA 4.0: not for commercial use',
            'prosocial': 'ProsocialDialog (Kim et al. 2022) is CC BY 4.0; it answers offensive lines, and so holds them'}
SHA256 = {'train.zip': '6191257f8250da0e045bfd1d017645e15b2358df975ec4c5c431a5a1f99662a4',  # at the first of daily_urls
          'validation.zip': 'f068cf7526a56ab5f26e99b74ce9edbc2766f7b060a3c6cef035920b0dd28153',
          'test.zip': '5f9526a5ce4b8af4ca237aa3ff38cbf03becbc596c70b0974d7f5f9af2ea0615'}
STYLE = {'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '<bos>', 'turns': context,
         'you': 'User', 'me': 'Bot', 'reply': 'Bot: '}
CHARACTERS = str.maketrans({'’': "'", '‘': "'", '′': "'", '“': '"', '”': '"', '。': ' . ', '、': ' , ', '\x7f': ' '})
REPAIRS = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"(\w) ?' ?(s|t|m|d|re|ve|ll|Ve|Re|Ll)\b", lambda m: f"{m[1]}'{m[2].lower()}"),  # I ' m, we ' Ve
    (r"\b([Oo]|[Mm]a) ' (?=\w)", r"\1'"),               # o ' clock, ma ' am
    (r"(?:^|(?<=\s))' (\S.*?) '(?=\s|$)", r"'\1'"),     # she said ' maybe '
    (r"s ' ", "s' "),                                   # my parents ' home
    (r'" *(.*?) *"', r'"\1"'),
    (r'\b(\d{1,3}(?:,\d{3})*) , (\d{3})\b', r'\1,\2'),  # 12 , 000
    (r'(?<=\d) \. (?=\d)', '.'),                       # 4 . 50
    (r'(?<=\d) ?: ?(?=\d\d\b)', ':'),                  # 8: 30
    (r' +([.,!?;:%)\]])', r'\1'),
    (r'([(\[$£¥]) ', r'\1'),
    (r'\b([A-Za-z])\. (?=[A-Za-z]\.)', r'\1.'),         # p . m .
    (r'([!?]|(?<=[a-z\d]{2}|M[rs])\.)(?=[A-Z])', r'\1 '),  # right.But, Mr.Wang
    (r'\s+', ' '))]


def repair(text):
    """DailyDialog's text, which was cut into words, as people write it: 'It ’ s late , isn't it ?' is "It's late, isn't it?"."""
    text = text.translate(CHARACTERS)
    for pattern, new in REPAIRS:
        text = pattern.sub(new, text)
    return text.strip()


def find_file(corpus, split):
    """The file of a split, in the folder that --daily or --prosocial names or, without that, downloaded."""
    suffix, given = '.zip' if corpus == 'daily' else '.json', daily if corpus == 'daily' else prosocial
    if given:
        if found := sorted(Path(given).glob(f'*{split}*{suffix}')):
            return found[0]
        raise UserError(f'--{corpus}={given}: there is no *{split}*{suffix}; without --{corpus} the files are downloaded')
    file = ('validation' if split == 'valid' and corpus == 'daily' else split) + suffix
    urls = [f'{url}/{file}' for url in (daily_urls if corpus == 'daily' else prosocial_urls)]
    advice = f'Without a network, give a folder with --{corpus}=FOLDER, or leave {corpus} out with --corpora'
    path = download(urls, folder / corpus / file, None, advice)
    if sha256_of(path) != SHA256.get(file, sha256_of(path)):  # roskoN has other zips of these dialogs: no error
        print(f'{path} is another copy than the one that was tested: its sha256 differs')
    return path


def read_daily(path):
    """[[utterance, ...] of a dialog] of a zip: a dialog a line, __eou__ behind each utterance."""
    try:
        with zipfile.ZipFile(path) as z:
            member = next(m for m in z.namelist() if re.search(r'dialogues_(train|validation|test)\.txt$', m))
            lines = z.read(member).decode('utf-8').split('\n')
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, StopIteration) as e:
        raise UserError(f'{path} is not a zip with a UTF-8 dialogues_….txt in it ({e!r}): delete it, or give another') from None
    return [[u for u in map(repair, line.split('__eou__')) if u] for line in lines]


def read_prosocial(path):
    """[[context, response, ...] of a dialog] of a JSON list of rows, or a row a line. A row without dialogue_id is a dialog."""
    text = read_text(path).removeprefix('\ufeff').strip()
    try:
        rows = json.loads(text) if text.startswith('[') else [json.loads(line) for line in text.split('\n') if line.strip()]
        rows = [(r.get('dialogue_id', f'row {i}'), r['context'].strip(), r['response'].strip()) for i, r in enumerate(rows)]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'{path} is not rows of JSON with context and response ({type(e).__name__}: {e})') from None
    return [[text for row in dialog for text in row[1:]] for _, dialog in groupby(rows, key=lambda r: r[0])]


def pairs_of(dialog, step):
    """(source, target) as arrays of ids for every step-th utterance from the second on. Who replies is the bot."""
    for i in range(1, len(dialog), step):
        turns = [(STYLE['you' if (i - j) % 2 else 'me'], dialog[j]) for j in range(max(0, i - context), i)]
        target = tok.encode(STYLE['reply']) + tok.encode(dialog[i]) + [tok.eos_id]  # in two, as they meet in a chat
        yield np.array(encode_conversation(tok, STYLE, turns), np.uint32), np.array(target, np.uint32)


if context < 1:
    raise UserError('--context must be at least 1')
folder, splits, files, dropped, seen = dataset_folder(data_dir, name), {}, [], {}, set()
for split, official in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
    splits[split], dropped[split] = [], 0
    for corpus in LICENCES if corpora == 'both' else (corpora,):
        files.append(find_file(corpus, official))
        for dialog in read_daily(files[-1]) if corpus == 'daily' else read_prosocial(files[-1]):
            if len(dialog) > 1 and all(dialog):
                letters = re.sub(r'\W+', '', ''.join(dialog)).lower()
                dropped[split] += letters in seen
                splits[split] += [] if letters in seen else [(dialog, 1 if corpus == 'daily' else 2)]
                seen.add(letters)
    if not splits[split]:
        raise UserError(f'{files[-1]} gives {split} no dialog of two utterances that is not in train')

learnt = [d for split in (splits if tokenizer == 'char' else ['train']) for d in splits[split]]  # char: val's need ids too
tok = make_tokenizer(tokenizer, (text for dialog, _ in learnt for u in dialog for text in (u, f'User: {u}', f'Bot: {u}')), vocab_size,
           special_tokens=('pad', 'bos', 'eos', 'sep'))
known, pairs, dropped_pairs = set(), {}, {}
for split, some in splits.items():
    made = [pair for dialog in tqdm(some, desc=f'{split}: dialogs', disable=None) for pair in pairs_of(*dialog)]
    keys = [hash((source.tobytes(), target.tobytes())) for source, target in made]
    pairs[split] = [pair for pair, key in zip(made, keys) if key not in known]  # dialogs may begin as one of train does
    dropped_pairs[split] = len(made) - len(pairs[split])
    known.update(keys)
source = {'source': [str(f) for f in files], 'sha256': [sha256_of(f) for f in files],
          'dropped_dialogs': dropped, 'dropped_pairs': dropped_pairs}
write_pairs(folder, tok, pairs, source, 'official, without the dialogs and pairs that an earlier split has', STYLE)
print('\n'.join(LICENCES[corpus] for corpus in LICENCES if corpora in ('both', corpus)))
print(f'next: python train.py --dataset={name}' + (f' --data_dir={data_dir}' if data_dir else ''))
