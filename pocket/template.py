"""
Chat templates: how a conversation becomes token ids.

The same template prepares a dataset and talks to the model trained on it, so it travels along: as
JSON in meta.json, as a dict in every checkpoint.

    >>> from pocket.tokenizer import make_tokenizer
    >>> tok = make_tokenizer('byte')
    >>> template = ChatTemplate(turn='{speaker}: {text}', separator='\\n', max_turns=3)
    >>> turns = [('you', 'Hello.'), ('model', 'Hi!'), ('you', 'Bye.')]
    >>> print(tok.decode(encode_conversation(tok, template, turns)))
    you: Hello.
    model: Hi!
    you: Bye.
"""
import re
from dataclasses import dataclass

from pocket.errors import UserError

# The fields of a ChatTemplate as they are called in meta.json and in checkpoints
JSON_KEYS = {
    'turn': 'turn',
    'separator': 'between',
    'bos': 'begin',
    'max_turns': 'turns',
    'user': 'you',
    'assistant': 'me',
    'reply_prefix': 'reply',
}
MAX_LENGTH = 1000   # characters in a field: templates come in files, which can hold anything


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written. The default fits any pairs: the last turn, then the reply."""

    turn: str = '{text}'        # one turn: '[{speaker}] {text}' or '{speaker}: {text}'
    separator: str = ''         # between turns: text, or a special token in brackets, '<sep>'
    bos: str = ''               # before the first turn: the same
    max_turns: int = 1          # a source holds at most this many turns, the last ones
    user: str = 'you'           # the name the person speaks under
    assistant: str = 'model'    # the name the model speaks under
    reply_prefix: str = ''      # what every reply begins with ('Bot: '): given, not sampled

    @classmethod
    def from_dict(cls, d):
        """The template that to_dict() described; None gives the default.

        Raises ValueError if d, which may come from an untrusted file, does not describe one.
        """
        if d is None:
            return cls()
        wrong = ValueError(f'chat, the chat template, must have {", ".join(JSON_KEYS.values())}, '
                           'as pocket/template.py describes them')
        if not isinstance(d, dict):
            raise wrong

        values = {}
        for field, key in JSON_KEYS.items():
            value = d.get(key)
            if type(value) is not type(getattr(cls, field)) or len(str(value)) > MAX_LENGTH:
                raise wrong
            values[field] = value

        template = cls(**values)
        if template.max_turns < 1 or '{text}' not in template.turn:
            raise wrong
        return template

    def to_dict(self):
        """The template as meta.json and checkpoints hold it."""
        return {key: getattr(self, field) for field, key in JSON_KEYS.items()}


def check_template(template, tok):
    """Raise ValueError if the template contains text that the tokenizer cannot encode."""
    encode_conversation(tok, template, [(template.user, ''), (template.assistant, '')])
    reply_start_ids(tok, template)


# ---- Conversations to ids


def encode_piece(tok, piece):
    """Ids of a text or, for '<name>', of the special token with that name."""
    if piece.startswith('<') and piece.endswith('>'):
        name = piece[1:-1]
        if name in tok.special_tokens:
            return [tok.special_tokens[name]]
    return tok.encode(piece)


def format_turn(template, speaker, text):
    """One turn as text.

    >>> format_turn(ChatTemplate(turn='[{speaker}] {text}'), 'Ann', 'What does {speaker} mean?')
    '[Ann] What does {speaker} mean?'
    """
    values = {'{speaker}': speaker, '{text}': text}
    # One pass over the template: braces in what people say are never filled in
    return re.sub('{speaker}|{text}', lambda match: values[match[0]], template.turn)


def encode_conversation(tok, template, turns, max_tokens=None):
    """Ids of a conversation. turns: a list of (speaker, text), the newest last.

    With max_tokens, only as many whole turns are kept as fit, the newest ones. If the newest turn
    alone is too long, its end is kept.
    """
    bos = encode_piece(tok, template.bos)
    recent = turns[-template.max_turns:]

    # From the newest turn back to the oldest: each goes in front of those that follow it
    ids = []
    for age, (speaker, text) in enumerate(reversed(recent)):
        turn = tok.encode(format_turn(template, speaker, text))
        if age > 0:
            turn = turn + encode_piece(tok, template.separator)
        if max_tokens is not None and len(bos) + len(turn) + len(ids) > max_tokens:
            if not ids:
                ids = turn[-max(1, max_tokens - len(bos)):]
            break
        ids = turn + ids
    return bos + ids


# ---- Replies


def reply_start_ids(tok, template):
    """What a reply begins with: the token between source and target, then the reply_prefix.

    Raises UserError if the tokenizer has no such token or cannot encode the prefix.
    """
    try:
        prefix = tok.encode(template.reply_prefix)
    except ValueError as e:
        raise UserError(f'replies begin with {template.reply_prefix!r}, but {e}: '
                        'prepare the dataset again') from None
    if tok.decoder_start_id is None:
        raise UserError('the tokenizer has no special token to begin a reply with: '
                        'prepare the dataset again')
    return [tok.decoder_start_id, *prefix]


def decode_reply(tok, template, ids):
    """The text of a reply, without its prefix.

    ids: a whole target, or what was generated after reply_start_ids().
    """
    return tok.decode(ids).removeprefix(template.reply_prefix).strip()


def banned_ids(tok, vocab_size, keep):
    """The set of ids that must never be generated.

    These are the special tokens, except for the one with the id `keep` (None: no exception), and
    the ids that only the model has, where its vocabulary was rounded up.
    """
    special = set(tok.special_tokens.values()) - {keep}
    unused = set(range(tok.vocab_size, vocab_size))
    return special | unused
