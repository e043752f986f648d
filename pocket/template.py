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
import json
import re
import time
from dataclasses import dataclass
from datetime import datetime

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


class JinjaTemplate:
    """The chat template of somebody else's model: a program in Jinja that writes a conversation.

    It runs in Jinja's immutable sandbox, where it can compute text and nothing else. source: the
    template. special: {role: text} such as {'eos_token': '<|im_end|>'}, which templates refer to.
    Raises ValueError if the source is not a template, UserError if jinja2 is missing.
    """
    user = 'user'  # what the roles are called when a chat is shown
    assistant = 'assistant'
    max_turns = 1000  # in a conversation; what does not fit the context is left out before that

    def __init__(self, source, special=None):
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError('this model\'s chat template needs one more package: '
                            'pip install jinja2') from None
        self.source = source
        self.special = dict(special or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
        environment.filters['tojson'] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options)
        environment.globals['raise_exception'] = raise_exception
        environment.globals['strftime_now'] = lambda form: datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
        except (TemplateError, RecursionError, ValueError) as e:
            raise ValueError(f'it is not a Jinja template: {str(e)[:200]}') from None

    def render(self, messages, add_generation_prompt=True):
        """The text of a conversation. messages: [{'role': …, 'content': …}].

        add_generation_prompt: end with what every reply begins with. Raises ValueError if the
        template refuses the messages, fails, or takes more than RENDER_SECONDS.
        """
        pieces = []
        length = 0
        deadline = time.monotonic() + RENDER_SECONDS
        try:
            for piece in self.template.generate(
                    messages=messages, add_generation_prompt=add_generation_prompt,
                    tools=None, documents=None, **self.special):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED or time.monotonic() > deadline:
                    raise ValueError('it does not come to an end')
            return ''.join(pieces)
        except Exception as e:  # it is a program, in which anything can go wrong
            raise ValueError(f'the chat template failed: {str(e)[:200]}') from None

    def to_dict(self):
        """The template as meta.json and checkpoints hold it."""
        return {'jinja': self.source, 'special': self.special}

    @classmethod
    def from_dict(cls, d):
        """The template that to_dict() described. Raises ValueError."""
        special = d.get('special', {})
        if not isinstance(d.get('jinja'), str) or not isinstance(special, dict):
            raise ValueError('a Jinja chat template must have the keys jinja and special')
        return cls(d['jinja'], {str(role): str(text) for role, text in special.items()})


def encode_messages(tok, template, messages, max_tokens=None):
    """Ids of a conversation as a JinjaTemplate writes it, ready for the assistant's reply.

    messages: [{'role': 'system' | 'user' | 'assistant', 'content': str}], the newest last. The
    oldest turns are left out until at most max_tokens remain; a system message stays. Raises
    UserError if the template refuses the messages, or the newest alone is too long.
    """
    system = [message for message in messages[:1] if message['role'] == 'system']
    turns = messages[len(system):]
    while True:
        try:
            text = template.render([*system, *turns])
        except ValueError as e:
            raise UserError(str(e)) from None
        ids = tok.encode_with_specials(text)
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if len(turns) <= 1:
            raise UserError(f'this message is {len(ids):,} tokens long, but there is room for '
                            f'{max_tokens:,}: shorten it, or lower max_new_tokens')
        turns = turns[2:] if len(turns) > 2 else turns[1:]  # a question and its answer


RENDER_SECONDS = 5
MAX_RENDERED = 2**24  # characters


def raise_exception(message):
    """What templates call to refuse messages."""
    raise ValueError(message)


def template_from_dict(d):
    """The ChatTemplate or JinjaTemplate that to_dict() described. Raises ValueError."""
    if isinstance(d, dict) and 'jinja' in d:
        return JinjaTemplate.from_dict(d)
    return ChatTemplate.from_dict(d)


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
    """The ids that a generation never contains: a set.

    These are the special tokens but for those in `keep` (an id, a list of ids, or None), and the
    ids that the model has and the tokenizer has not.
    """
    special = set(tok.special_tokens.values())
    if keep is not None:
        special -= {keep} if isinstance(keep, int) else set(keep)
    return special | set(range(tok.vocab_size, vocab_size))
