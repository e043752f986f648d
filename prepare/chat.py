"""
Your own conversations as a dataset, for models that reply.

    python prepare/chat.py --input=FILE                     then: python train.py --dataset=chat
    python prepare/chat.py --input=chat.txt --me=Ann        the model learns to answer as Ann does
    python prepare/chat.py --input='*.jsonl' --tokenizer=smollm2 --name=persona
                                                            then: python train.py
                                                            config/finetune_chat.py

A file may hold OpenAI's messages (JSONL), ShareGPT's conversations (JSON), a table with two columns
(what is said, and the reply), a transcript ("Ann: Hello."), or an export of WhatsApp or Telegram.
The model learns what the assistant says, in every turn of a conversation, and where it ends.
"""
import glob
import json
import shlex
import sys
from collections import Counter
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

input: tuple[str, ...] = ()    # a file or a glob; may be given several times
me: str | None = None          # who of the people in a chat the model is to be, such as Ann
name = 'chat'                  # of the dataset: it is written to data/NAME
tokenizer = 'bpe'              # char, byte, bpe, sentencepiece, gpt2; or a model's, with its chat
#                                template: smollm2, a folder in Hugging Face's format, or out/RUN
vocab_size: int | None = None  # of bpe and sentencepiece (None: 512 to 8,192, to suit the text)
skip_bad = False               # leave out lines and conversations that can't be read
keep_duplicates = False        # learn a conversation as often as it occurs
val = 0.1                      # (0, 1) fraction of the text that is for validation
val_input: tuple[str, ...] = ()  # instead of val: files with the conversations for validation
data_dir: str | None = None    # where datasets live (None: data/ beside train.py)
configure(__file__, globals())

import numpy as np
from tqdm import tqdm

from pocket.conversations import (
    chat_template_for,
    encode_conversation_to_learn,
    read_conversations,
    tidy,
)
from pocket.datasets import (
    choose_val_by_hash,
    dataset_folder,
    hash_documents,
    make_dataset_tokenizer,
    print_next_step,
    write_chats,
)
from pocket.errors import UserError
from pocket.files import find_path
from pocket.template import ChatTemplate
from pocket.tokenizer import UnknownCharacters


def find_files(names):
    """The files that --input or --val_input names, each once."""
    files = {}
    for given in names:
        path = find_path(given)
        found = [path] if path.is_file() else sorted(map(find_path, glob.glob(given)))
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f'there is no file {given}')
        for path in found:
            files[path.resolve()] = path
    return list(files.values())


def read_all(files):
    """The conversations of all files; prints what was found, and what was left out."""
    conversations = []
    seen = set()
    duplicates = 0
    for path in files:
        found, report = read_conversations(path, me, skip_bad)
        reasons = ''.join(f'; left out: {count:,} {why}' for why, count in report.left_out.items())
        print(f'{path}: {report.format or "nothing"}, {len(found):,} conversations{reasons}')
        if report.unread:
            print(f'{path}: not read: {", ".join(report.unread)[:200]}')
        for messages in found:
            key = json.dumps(messages)
            if key in seen and not keep_duplicates:
                duplicates += 1
                continue
            seen.add(key)
            conversations.append(messages)
    if duplicates:
        print(f'{duplicates:,} duplicates dropped')
    return conversations


def cut_in_pieces(messages):
    """A single long conversation as about ten, each of whole exchanges."""
    length = max(2, len(messages) // 20 * 2)
    pieces = []
    for message in messages:
        if not pieces or (len(pieces[-1]) >= length and message['role'] == 'user'):
            pieces.append([])
        pieces[-1].append(message)
    return [piece for piece in map(tidy, pieces) if piece]


def split_conversations(conversations):
    """{split: conversations}: whole ones; those that begin with the same words stay together."""
    if len(conversations) == 1:
        conversations = cut_in_pieces(conversations[0])
    if len(conversations) < 2:
        raise UserError(f'{", ".join(input)}: {len(conversations)} conversations in which both '
                        f'sides speak, but it takes at least two, one of them to validate')

    beginnings = [next(message['content'] for message in messages if message['role'] == 'user')
                  for messages in conversations]
    hashes, _ = hash_documents((text, True) for text in beginnings)
    sizes = np.array([sum(len(m['content']) for m in messages) for messages in conversations])
    is_val = choose_val_by_hash(hashes, sizes, val)
    if not is_val.any():
        is_val = hashes == hashes.max()
    splits = {'train': [], 'val': []}
    for messages, conversation_is_val in zip(conversations, is_val):
        splits['val' if conversation_is_val else 'train'].append(messages)
    if not splits['train']:
        raise UserError(f'{", ".join(input)}: all conversations begin with the same words, so none '
                        f'can be kept for validation')
    return splits


def texts_to_learn_from(splits):
    """Yield the text of the train split as a ChatTemplate writes it, for a tokenizer to learn from.

    A char tokenizer could not write val without all of its characters.
    """
    for split in splits if tokenizer == 'char' else ['train']:
        for messages in splits[split]:
            for message in messages:
                speaker = 'Bot' if message['role'] == 'assistant' else 'User'
                yield f'{speaker}: {message["content"]}'


def encode(tok, template, splits):
    """{split: list of (ids, mask)}. Prints how much is left out that the template can't write."""
    system_messages = 0
    encoded = {split: [] for split in splits}
    for split, conversations in splits.items():
        for messages in tqdm(conversations, desc=f'{split}: encoding', disable=None):
            if isinstance(template, ChatTemplate):
                system_messages += messages[0]['role'] == 'system'
            encoded[split].append(encode_conversation_to_learn(tok, template, messages))
    if system_messages:
        print(f'{system_messages:,} system messages left out: only the chat template of a model '
              f'such as smollm2 has a place for them')
    return encoded


# --- Main -----------------------------------------------------------------------------------------

if not input:
    raise UserError('say what to read: --input=FILE')
if Path(name).name != name or name in ('', '..'):
    raise UserError(f'name must be possible as the name of a folder, got {name!r}')
folder = dataset_folder(data_dir, name)

# Read and split
splits = {'train': read_all(find_files(input))}
if val_input:
    splits['val'] = read_all(find_files(val_input))
    for split, given in (('train', input), ('val', val_input)):
        if not splits[split]:
            raise UserError(f'{", ".join(given)}: no conversation in which both sides speak')
else:
    splits = split_conversations(splits['train'])
conversations = splits['train'] + splits['val']
characters = sum(len(text) for text in texts_to_learn_from(splits))
turns = Counter(message['role'] for messages in conversations for message in messages)
print(f'{len(conversations):,} conversations with {turns["assistant"]:,} replies')

# The tokenizer, and the template that belongs to it
size = min(max(characters // 1000, 512), 8192) if vocab_size is None else vocab_size
tok, template = make_dataset_tokenizer(tokenizer, texts_to_learn_from(splits), size, ('eos',))
if template is None:
    template = chat_template_for(tok)

# Encode and write
try:
    encoded = encode(tok, template, splits)
except UnknownCharacters as e:
    raise UserError(f'{e}; --tokenizer=byte knows every character') from None
how_split = f'{val:.0%} val, whole conversations, by a hash of how they begin'
if val_input:
    how_split = f'val: {", ".join(val_input)}'
source = {'source': ', '.join(input), 'prepared_by': 'prepare/chat.py'}
write_chats(folder, tok, template, encoded, source, how_split)
learned = sum(int((mask & 1).sum()) for _, mask in encoded['train'])
print(f'{learned:,} of the {sum(len(ids) for ids, _ in encoded["train"]):,} ids in train are '
      f'learned: what the assistant says')
print_next_step(f'--dataset={shlex.quote(name)}', data_dir)
