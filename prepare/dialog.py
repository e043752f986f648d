"""
DailyDialog and ProsocialDialog as chat: a source '<bos>User: Hi!<sep>Bot: Hello.<sep>User: Tea?'
and its target 'Bot: Gladly.<eos>'.

    python prepare/dialog.py                                     both, downloaded (3 MB and 117 MB)
    python prepare/dialog.py --corpora=daily                     one of them
    python prepare/dialog.py --daily=FOLDER --prosocial=FOLDER   local zips and JSON files:
                                                                 *train*, *valid*, *test*

In DailyDialog every utterance but the first is a target. In ProsocialDialog only the responses are,
not what provokes them. The official splits are kept, but a dialog whose letters occur again stays
only where it comes first, in train, val or test; so does a pair. meta.json counts what was dropped.
"""
import json
import re
import shlex
import sys
import zipfile
import zlib
from itertools import groupby
from pathlib import Path
from typing import Literal

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

corpora: Literal['both', 'daily', 'prosocial'] = 'both'  # which to use
daily: str | None = None      # a folder with DailyDialog's three zips (None: download them)
prosocial: str | None = None  # a folder with ProsocialDialog's JSON files (None: download them)
context = 6                   # [1, inf) a source has at most this many utterances
tokenizer = 'sentencepiece'   # or char, byte, bpe, trained on train; or gpt2, smollm2, out/RUN
vocab_size = 32000            # of those that are trained; less if the text is too small for it
name = 'dialog'               # the dataset is data/NAME
data_dir: str | None = None   # where datasets live (None: data/ beside train.py)
daily_urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/Ls-Dai/Deep-Reinforcement-Learning-for-Dialogue-Generation-in-PyTorch/'
    'bae51b16e3e8c0ce4ffd70b75ecfc40fbeb8e7ee/data',
    'https://huggingface.co/datasets/roskoN/dailydialog/resolve/main',
)  # folders to download from, tried in this order
prosocial_urls: tuple[str, ...] = (
    'https://huggingface.co/datasets/allenai/prosocial-dialog/resolve/main',
)  # the same
configure(__file__, globals())

import numpy as np
from tqdm import tqdm

from pocket.datasets import (
    dataset_folder,
    make_dataset_tokenizer,
    print_next_step,
    read_text,
    write_pairs,
)
from pocket.errors import UserError
from pocket.files import download, sha256_of
from pocket.template import ChatTemplate, encode_conversation

LICENSES = {
    'daily': 'DailyDialog (Li et al. 2017) is CC BY-NC-SA 4.0: not for commercial use',
    'prosocial': 'ProsocialDialog (Kim et al. 2022) is CC BY 4.0; it answers offensive lines, '
                 'so it contains them',
}
SHA256 = {   # of DailyDialog's files at the first of daily_urls
    'train.zip': '6191257f8250da0e045bfd1d017645e15b2358df975ec4c5c431a5a1f99662a4',
    'validation.zip': 'f068cf7526a56ab5f26e99b74ce9edbc2766f7b060a3c6cef035920b0dd28153',
    'test.zip': '5f9526a5ce4b8af4ca237aa3ff38cbf03becbc596c70b0974d7f5f9af2ea0615',
}
LARGEST_TEXT = 2**27         # bytes: DailyDialog's are a tenth of that
LONGEST_UTTERANCE = 20_000   # characters: theirs are far shorter, and repairs take long beyond it
TEMPLATE = ChatTemplate(turn='{speaker}: {text}', separator='<sep>', bos='<bos>', max_turns=context,
                        user='User', assistant='Bot', reply_prefix='Bot: ')


# --- Text as people write it ----------------------------------------------------------------------

PUNCTUATION = str.maketrans({
    '’': "'", '‘': "'", '′': "'", '“': '"', '”': '"', '。': ' . ', '、': ' , ', '\x7f': ' ',
})
REPAIRS = [   # (pattern, replacement), applied in this order
    (r"(\w) ?' ?(s|t|m|d|re|ve|ll|Ve|Re|Ll)\b",
     lambda match: f"{match[1]}'{match[2].lower()}"),      # I ' m, we ' Ve
    (r"\b([Oo]|[Mm]a) ' (?=\w)", r"\1'"),                  # o ' clock, ma ' am
    (r"(?:^|(?<=\s))' (\S.*?) '(?=\s|$)", r"'\1'"),        # she said ' maybe '
    (r"s ' ", "s' "),                                      # my parents ' home
    (r'"([^"\n]*)"', lambda match: '"' + match[1].strip(' ') + '"'),   # " no "
    (r'\b(\d{1,3}(?:,\d{3})*) , (\d{3})\b', r'\1,\2'),     # 12 , 000
    (r'(?<=\d) \. (?=\d)', '.'),                           # 4 . 50
    (r'(?<=\d) ?: ?(?=\d\d\b)', ':'),                      # 8: 30
    (r' +([.,!?;:%)\]])', r'\1'),                          # late , isn't it ?
    (r'([(\[$£¥]) ', r'\1'),                               # ( slowly, $ 12
    (r'\b([A-Za-z])\. (?=[A-Za-z]\.)', r'\1.'),            # p . m .
    (r'([!?]|(?<=[a-z\d]{2}|M[rs])\.)(?=[A-Z])', r'\1 '),  # right.But, Mr.Wang
    (r'\s+', ' '),
]
REPAIRS = [(re.compile(pattern), replacement) for pattern, replacement in REPAIRS]


def repair(text):
    """DailyDialog was cut into words: make "It's late, isn't it?" of 'It ’ s late , isn't it ?'."""
    text = text.translate(PUNCTUATION)
    for pattern, replacement in REPAIRS:
        text = pattern.sub(replacement, text)
    return text.strip()


# --- Reading --------------------------------------------------------------------------------------

def find_file(corpus, split):
    """The file of an official split: in the folder that --daily or --prosocial names, or else
    downloaded."""
    if corpus == 'daily':
        given = daily
        urls = daily_urls
        suffix = '.zip'
    else:
        given = prosocial
        urls = prosocial_urls
        suffix = '.json'
    if given:
        found = sorted(Path(given).glob(f'*{split}*{suffix}'))
        if not found:
            raise UserError(f'--{corpus}={given}: there is no *{split}*{suffix}; '
                            f'without --{corpus} the files are downloaded')
        return found[0]

    file = split + suffix
    if file == 'valid.zip':
        file = 'validation.zip'
    advice = (f'Without a network, give a folder with --{corpus}=FOLDER, '
              f'or leave {corpus} out with --corpora')
    path = download([f'{url}/{file}' for url in urls], folder / corpus / file, None, advice)
    if file in SHA256 and sha256_of(path) != SHA256[file]:
        # No error: the second of daily_urls has other zips of the same dialogs
        print(f'{path} is not the copy that we tested: its sha256 differs')
    return path


def read_daily(path):
    """The dialogs in one of DailyDialog's zips, each a list of utterances.

    A line is a dialog, and each utterance ends with __eou__.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pattern = r'dialogues_(train|validation|test)\.txt$'
            member = next(info for info in archive.infolist() if re.search(pattern, info.filename))
            if member.file_size > LARGEST_TEXT:
                raise UserError(f'{path} unpacks to {member.file_size:,} bytes, which DailyDialog '
                                f'does not: delete it, or give another')
            lines = archive.read(member).decode('utf-8').split('\n')
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, StopIteration, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f'{path} is not a zip with a UTF-8 dialogues_….txt in it ({e!r}): '
                        'delete it, or give another') from None
    dialogs = []
    for line in lines:
        parts = line.split('__eou__')
        if max(map(len, parts)) > LONGEST_UTTERANCE:
            raise UserError(f'{path} has an utterance of more than {LONGEST_UTTERANCE:,} '
                            f'characters: it is not DailyDialog; give another')
        utterances = [repair(utterance) for utterance in parts]
        dialogs.append([utterance for utterance in utterances if utterance])
    return dialogs


def read_prosocial(path):
    """The dialogs in one of ProsocialDialog's files, each [context, response, context, …].

    The file is a JSON list of rows, or has a row per line. Consecutive rows with the same
    dialogue_id are one dialog; a row without one is a dialog of its own.
    """
    text = read_text(path).removeprefix('\ufeff').strip()
    try:
        if text.startswith('['):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split('\n') if line.strip()]
        rows = []
        for i, record in enumerate(records):
            dialog_id = record.get('dialogue_id', f'row {i}')
            rows.append((dialog_id, record['context'].strip(), record['response'].strip()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} is not rows of JSON with context and response '
                        f'({type(e).__name__}: {e})') from None

    dialogs = []
    for _, dialog_rows in groupby(rows, key=lambda row: row[0]):
        dialog = []
        for _, context_text, response in dialog_rows:
            dialog += [context_text, response]
        dialogs.append(dialog)
    return dialogs


def read_split(official_name):
    """(dialogs, files) of an official split: a dialog is (utterances, 1 if every utterance but the
    first is a target, 2 if every other one is)."""
    dialogs = []
    files = []
    for corpus in corpora_used:
        files.append(find_file(corpus, official_name))
        if corpus == 'daily':
            dialogs += [(utterances, 1) for utterances in read_daily(files[-1])]
        else:
            dialogs += [(utterances, 2) for utterances in read_prosocial(files[-1])]
    complete = [dialog for dialog in dialogs if len(dialog[0]) > 1 and all(dialog[0])]
    return complete, files


# --- Main -----------------------------------------------------------------------------------------

folder = dataset_folder(data_dir, name)
corpora_used = ['daily', 'prosocial'] if corpora == 'both' else [corpora]

# Read the dialogs, each once: letter for letter, whatever the case and the punctuation
splits = {}
dropped_dialogs = {}
files = []
known = set()
for split, official_name in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
    splits[split] = []
    dropped_dialogs[split] = 0
    dialogs, split_files = read_split(official_name)
    files += split_files
    for utterances, step in dialogs:
        letters = re.sub(r'\W+', '', ''.join(utterances)).lower()
        if letters in known:
            dropped_dialogs[split] += 1
        else:
            known.add(letters)
            splits[split].append((utterances, step))
    if not splits[split]:
        raise UserError(f'{files[-1]} gives {split} no dialog of two utterances '
                        'that is not in train')


# Train the tokenizer
def tokenizer_texts():
    """Yield every utterance, alone and as each speaker's. Only those of train; but a char tokenizer
    could not write the other splits without all of their characters."""
    for split in splits if tokenizer == 'char' else ['train']:
        for utterances, _ in splits[split]:
            for utterance in utterances:
                yield utterance
                yield f'User: {utterance}'
                yield f'Bot: {utterance}'


tok, _ = make_dataset_tokenizer(tokenizer, tokenizer_texts(), vocab_size,
                                special_tokens=('pad', 'bos', 'eos', 'sep'))


# Encode every pair, and drop those that occur again: dialogs can begin alike
def encode_pairs(utterances, step):
    """Yield (source ids, target ids), uint32 arrays, for every step-th utterance from the second
    on."""
    for i in range(1, len(utterances), step):
        turns = []
        for j in range(max(0, i - context), i):
            is_bot = (i - j) % 2 == 0   # the bot says utterance i, the target
            speaker = TEMPLATE.assistant if is_bot else TEMPLATE.user
            turns.append((speaker, utterances[j]))
        source = encode_conversation(tok, TEMPLATE, turns)
        # The prefix is encoded by itself, as it will be when the model replies to somebody
        target = tok.encode(TEMPLATE.reply_prefix) + tok.encode(utterances[i]) + [tok.eos_id]
        yield np.array(source, np.uint32), np.array(target, np.uint32)


pairs = {}
dropped_pairs = {}
known = set()
for split, dialogs in splits.items():
    pairs[split] = []
    dropped_pairs[split] = 0
    new = set()   # pairs may occur again within a split
    for utterances, step in tqdm(dialogs, desc=f'{split}: dialogs', disable=None):
        for source, target in encode_pairs(utterances, step):
            key = hash((source.tobytes(), target.tobytes()))
            new.add(key)
            if key in known:
                dropped_pairs[split] += 1
            else:
                pairs[split].append((source, target))
    known |= new

# Write
source = {
    'source': [str(file) for file in files],
    'sha256': [sha256_of(file) for file in files],
    'dropped_dialogs': dropped_dialogs,
    'dropped_pairs': dropped_pairs,
}
how_split = 'official, without the dialogs and pairs that an earlier split has'
write_pairs(folder, tok, pairs, source, how_split, TEMPLATE)
for corpus in corpora_used:
    print(LICENSES[corpus])
print_next_step(f'--dataset={shlex.quote(name)}', data_dir)
