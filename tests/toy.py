"""
Small made-up datasets: data/toy, a stream of characters, and data/talk, pairs with a chat template.
"""
import json
import random

import numpy as np

WORDS = ['ba', 'dodo', 'fu', 'gimme', 'kilo', 'lamp', 'ni', 'opal', 'qua', 'rust']
CHAT = {  # the chat template of data/talk, as meta.json has it
    'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '<bos>', 'turns': 3,
    'you': 'U', 'me': 'B', 'reply': 'B: ',
}


def toy_text(n, seed=0):
    """The first n characters of made-up sentences, the same for the same seed."""
    rng = random.Random(seed)
    text = ''
    while len(text) < n:
        text += ' '.join(rng.choices(WORDS, k=rng.randint(2, 7))) + '.\n'
    return text[:n]


def write_meta(folder, kind, tok, **more):
    """Write the meta.json of a dataset whose ids are uint16."""
    meta = {
        'format': 1, 'kind': kind, 'dtype': 'uint16', 'vocab_size': tok.vocab_size,
        'tokenizer': tok.to_dict(), **more,
    }
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def make_toy(root, **meta):
    """Make data/toy in a project and return its folder. meta overrides entries of its meta.json."""
    from pocket.tokenizer import make_tokenizer

    text = toy_text(6000)
    tok = make_tokenizer('char', [text])
    ids = tok.encode_to_numpy(text).astype('<u2')

    folder = root / 'data' / 'toy'
    folder.mkdir(parents=True, exist_ok=True)
    ids[:5000].tofile(folder / 'train.bin')
    ids[5000:].tofile(folder / 'val.bin')
    meta = {'counts': {'train': 5000, 'val': 1000}, **meta}
    write_meta(folder, 'stream', tok, **meta)
    return folder


def make_pairs(root, **meta):
    """Make data/talk in a project and return its folder: conversations of one or three turns; each
    reply repeats the last word.

    meta overrides entries of its meta.json.
    """
    from pocket.template import ChatTemplate, encode_conversation
    from pocket.tokenizer import make_tokenizer

    rng = random.Random(0)
    letters = ' '.join(WORDS) + 'UB:.'
    tok = make_tokenizer('char', [letters], special_tokens=('pad', 'bos', 'eos', 'sep'))
    template = ChatTemplate.from_dict(CHAT)
    folder = root / 'data' / 'talk'
    folder.mkdir(parents=True, exist_ok=True)

    num_pairs = {'train': 200, 'val': 30}
    num_ids = {}
    for split, n in num_pairs.items():
        ids = []
        offsets = [0]  # where each source and each target begins, and the end
        for _ in range(n):
            turns = []
            for i in range(rng.choice((1, 3))):
                text = ' '.join(rng.choices(WORDS, k=rng.randint(1, 3)))
                turns.append(('U' if i % 2 == 0 else 'B', text))
            last_word = turns[-1][1].split()[-1]

            ids += encode_conversation(tok, template, turns)
            offsets.append(len(ids))
            ids += tok.encode(f'B: {last_word}.') + [tok.eos_id]
            offsets.append(len(ids))
        np.array(ids, dtype='<u2').tofile(folder / f'{split}.bin')
        np.array(offsets, dtype='<i8').tofile(folder / f'{split}.idx')
        num_ids[split] = len(ids)
    meta = {'counts': num_ids, 'pairs': num_pairs, 'chat': CHAT, **meta}
    write_meta(folder, 'pairs', tok, **meta)
    return folder
