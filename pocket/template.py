"""
Conversations as ids: one format for preparing a dataset and for talking to what was trained on it.

A format is a dict that travels in meta.json and in checkpoints:

    turn      how a turn is written: '[{speaker}] {text}' or '{speaker}: {text}'
    between   text between turns, or the name of a special token in brackets: '<sep>'
    begin     the same, before the first turn
    turns     at most so many are in a source, the last ones
    you, me   whom the person and the model speak as
    reply     what the model's own turn begins with ('Bot: '): it is written, not sampled
"""
import re

from pocket.errors import UserError

PLAIN_TEMPLATE = {'turn': '{text}', 'between': '', 'begin': '', 'turns': 1, 'you': 'you', 'me': 'model', 'reply': ''}  # of any pairs


def check(style, tok=None):
    """Raise ValueError where a format, which comes in files, is not one, or has text that tok, if given, does not know."""
    if not isinstance(style, dict) or any(type(style.get(key)) is not type(value) for key, value in PLAIN_TEMPLATE.items()) \
            or style['turns'] < 1 or '{text}' not in style['turn'] or any(len(str(style[key])) > 1000 for key in PLAIN_TEMPLATE):
        raise ValueError(f'chat, the format of conversations, must have {", ".join(PLAIN_TEMPLATE)}, as chat.py has them')
    if tok is not None:
        encode_conversation(tok, style, [(style['you'], ''), (style['me'], '')])
        reply_start_ids(tok, style)


def piece_ids(tok, piece):
    """Ids of a text or, for '<name>', of the special token of that name."""
    name = piece[1:-1] if piece.startswith('<') and piece.endswith('>') else ''
    return [tok.special_tokens[name]] if name in tok.special_tokens else tok.encode(piece)


def encode_conversation(tok, style, turns, max_tokens=None):
    """Ids of a conversation: turns is a list of (speaker, text), the newest last; style is a format as above.

    Whole turns leave, the oldest first, until at most max_tokens are left; of a newest turn that is longer alone, its end stays.
    """
    begin, ids = piece_ids(tok, style['begin']), []
    for number, (speaker, text) in enumerate(reversed(turns[-style['turns']:])):
        said, parts = {'{speaker}': speaker, '{text}': text}, re.split('({speaker}|{text})', style['turn'])
        turn = tok.encode(''.join(said.get(part, part) for part in parts))
        turn += piece_ids(tok, style['between']) if number else []
        if max_tokens is not None and len(begin) + len(turn) + len(ids) > max_tokens:
            return begin + (ids or turn[-max(1, max_tokens - len(begin)):])
        ids = turn + ids
    return begin + ids


def reply_start_ids(tok, style):
    """What a reply begins with: the id between source and target, then the format's `reply`. Raises UserError: there is none."""
    try:
        reply = tok.encode(style['reply'])
    except ValueError as e:
        raise UserError(f'replies begin with {style["reply"]!r}, but {e}: prepare the dataset again') from None
    if tok.decoder_start_id is None:
        raise UserError('the tokenizer has no special id to begin a reply with: prepare the dataset again')
    return [tok.decoder_start_id, *reply]


def decode_reply(tok, style, ids):
    """A whole target, or what was written after reply_start_ids(), as the bare text of the reply."""
    return tok.decode(ids).removeprefix(style['reply']).strip()


def banned_ids(tok, vocab_size, but):
    """The ids that are banned when text is written: special ones but for one, and rows of the head that mean nothing."""
    return set(tok.special_tokens.values()) - {but} | set(range(tok.vocab_size, vocab_size))
