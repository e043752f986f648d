"""
A character of your own as a dataset: conversations made from one text file that describes it.

    python prepare/character.py                        Plunkett, a lost umbrella
    python prepare/character.py --character=mine       prepare/characters/mine.txt
    python prepare/character.py --save=chats.jsonl     also writes the conversations, to look at

The file says what people ask, in many ways, and what the character replies; its first lines explain
the format. Copy it, change the name and the topics, and train: config/character.py.
"""
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

character = 'plunkett'         # a file in prepare/characters/ without its .txt, or a path
conversations = 19_000         # [100, inf) how many to make
beginnings = 110_000           # [0, inf) … and how many of a question and the start of its reply
vocab_size = 2048              # of the BPE tokenizer: most words in one piece
seed = 1                       # which conversations
save: str | None = None        # a file for the conversations, as OpenAI's messages
data_dir: str | None = None    # where datasets live (None: data/ beside train.py)
configure(__file__, globals())

import numpy as np

from pocket.characters import make_conversations, read_character
from pocket.conversations import chat_template_for, encode_conversation_to_learn
from pocket.data import LEARN
from pocket.datasets import dataset_folder, print_next_step, write_bytes, write_chats
from pocket.errors import UserError
from pocket.files import ROOT, find_path, sha256_of, short_path
from pocket.tokenizer import make_tokenizer

LENGTH_OF_BEGINNING = 10   # tokens: the topic's name, if there is one, and a few words
CHARACTERS = ROOT / 'prepare' / 'characters'

# Read the character, and make conversations with it; the last ones are val
if character.endswith('.txt'):
    path = find_path(character)
else:
    path = CHARACTERS / f'{character}.txt'
if not path.is_file():
    known = sorted(file.stem for file in CHARACTERS.glob('*.txt'))
    raise UserError(f'there is no {short_path(path)}: copy prepare/characters/plunkett.txt and '
                    f'change it, or choose one of: {", ".join(known)}')
persona = read_character(path)
chats = make_conversations(persona, conversations, seed)
num_val = max(1, len(chats) // 50)
splits = {'train': chats[:-num_val], 'val': chats[-num_val:]}
replies = sum(len(messages) for messages in chats) // 2
print(f'{persona.name}: {len(persona.topics)} topics, {len(chats):,} conversations, '
      f'{replies:,} replies')
if save:
    lines = ''.join(json.dumps({'messages': messages}) + '\n' for messages in chats)
    write_bytes(find_path(save), lines.encode())

# Train the tokenizer; a fifth of the text is enough
texts = itertools.chain.from_iterable(
    (f'you: {asked["content"]}', f'{persona.name}: {reply["content"]}')
    for messages in splits['train'][:len(chats) // 5]
    for asked, reply in zip(messages[::2], messages[1::2]))
tok = make_tokenizer('bpe', texts, vocab_size, ('eos',))
template = replace(chat_template_for(tok), user='you', assistant=persona.name,
                   reply_prefix=f'{persona.name}:')

# Encode
encoded = {}
for split, members in splits.items():
    encoded[split] = [encode_conversation_to_learn(tok, template, messages) for messages in members]

# A model soon memorizes the replies. Choosing one that fits the question takes practice, and
# the choice shows in the first tokens: so many conversations end there, after a single question
for messages in make_conversations(persona, beginnings, seed + 1, max_exchanges=1):
    ids, mask = encode_conversation_to_learn(tok, template, messages)
    end = np.flatnonzero(mask == LEARN)[:LENGTH_OF_BEGINNING][-1] + 1
    encoded['train'].append((ids[:end], mask[:end]))

# Write
source = {'source': str(short_path(path)), 'sha256': sha256_of(path)}
how_split = 'the last 2 % of the conversations: other ones, made of the same sentences'
write_chats(dataset_folder(data_dir, 'character'), tok, template, encoded, source, how_split)
print_next_step('config/character.py', data_dir)
