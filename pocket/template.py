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
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import wraps

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


# ---- Chat templates of other people's models, which are programs

RENDER_SECONDS = 5
MAX_RENDERED = 2**24    # characters that a template may write, or an operation in it may make
MAX_TEMPLATE = 2**20    # characters of its source


class JinjaTemplate:
    """The chat template of somebody else's model: a program in Jinja that writes a conversation.

    It runs in Jinja's immutable sandbox, where it can compute text and nothing else, for a few
    seconds at most. source: the template. special: {role: text} such as {'eos_token':
    '<|im_end|>'}, which templates refer to. Raises ValueError if the source is not a template,
    UserError if jinja2 is missing.
    """

    user = 'user'  # what the roles are called when a chat is shown
    assistant = 'assistant'
    max_turns = 1000  # in a conversation; what does not fit the context is left out before that

    def __init__(self, source, special=None):
        try:
            environment = make_jinja_environment()
        except ImportError:
            raise UserError('this model\'s chat template needs one more package: '
                            'pip install jinja2') from None
        self.source = source
        self.special = dict(special or {})
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f'it is longer than {MAX_TEMPLATE:,} characters')
        try:
            with time_limit(RENDER_SECONDS):
                self.template = environment.from_string(source)
        except Exception as e:  # compiling it is Jinja's matter, then Python's
            raise ValueError(f'it is not a Jinja template: {str(e)[:200]}') from None

    def render(self, messages, add_generation_prompt=True):
        """The text of a conversation. messages: [{'role': …, 'content': …}].

        add_generation_prompt: end with what every reply begins with. Raises ValueError if the
        template refuses the messages, fails, or takes more than RENDER_SECONDS.
        """
        pieces = []
        length = 0
        try:
            with time_limit(RENDER_SECONDS):
                for piece in self.template.generate(
                        messages=messages, add_generation_prompt=add_generation_prompt,
                        tools=None, documents=None, **self.special):
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_RENDERED:
                        raise ValueError(f'it writes more than {MAX_RENDERED:,} characters')
        except Exception as e:  # it is a program, in which anything can go wrong
            raise ValueError(f'the chat template failed: {str(e)[:200]}') from None
        return ''.join(pieces)

    def to_dict(self):
        """The template as meta.json and checkpoints hold it."""
        return {'jinja': self.source, 'special': self.special}

    @classmethod
    def from_dict(cls, d):
        """The template that to_dict() described. Raises ValueError."""
        special = d.get('special', {})
        if not isinstance(d.get('jinja'), str) or not isinstance(special, dict):
            raise ValueError('a Jinja chat template must have the keys jinja and special')
        if not all(isinstance(text, str) for text in [*special, *special.values()]):
            raise ValueError('the special tokens of a Jinja chat template must be text')
        return cls(d['jinja'], special)


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
        if not ids:
            raise UserError('the chat template writes nothing for this conversation, so there is '
                            'nothing to reply to: take another model')
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if len(turns) <= 1:
            raise UserError(f'this message is {len(ids):,} tokens long, but there is room for '
                            f'{max_tokens:,}: shorten it, or lower max_new_tokens')
        turns = turns[2:] if len(turns) > 2 else turns[1:]  # a question and its answer


def make_jinja_environment():
    """Jinja's sandbox, with what transformers gives to chat templates and limits of our own.

    Jinja limits range(), but neither the time of loops, nor the size of what an operation makes.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(['*', '**', '%'])

        def call_binop(self, context, operator, left, right):
            check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context, called, *args, **kwargs):
            check_sizes([*args, *kwargs.values()])
            return super().call(context, called, *args, **kwargs)

    class Generation(Extension):
        """{% generation %}…{% endgeneration %} marks an answer, for training: here it is text."""
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = Environment(trim_blocks=True, lstrip_blocks=True,
                              extensions=['jinja2.ext.loopcontrols', Generation])
    for name, function in environment.filters.items():
        environment.filters[name] = with_checked_sizes(function)
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = strftime_now
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter tojson as chat templates know it. Jinja's own writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def strftime_now(form):
    """Today's date, in a form such as '%d %B %Y'."""
    return datetime.now().strftime(form)


def raise_exception(message):
    """What templates call to refuse messages."""
    raise ValueError(message)


def check_operation(operator, left, right):
    """Raise ValueError if a product, a power or a formatted text would be huge."""
    if operator == '%':  # of numbers, or of a text with widths, '%999999999d' % 1
        if isinstance(left, str) and re.search(r'\d{5}|\*', left):
            raise ValueError('it formats a huge text')
        return
    if operator == '**':
        is_huge = abs(left) > 2**32 or abs(right) > 64
    else:
        length = 1
        for factor in (left, right):
            length *= len(factor) if hasattr(factor, '__len__') else abs(factor)
        has_text = hasattr(left, '__len__') or hasattr(right, '__len__')
        is_huge = length > (MAX_RENDERED if has_text else 2**256)
    if is_huge:
        raise ValueError(f'the result of {operator} is huge')


def check_sizes(values):
    """Raise ValueError if one of the arguments of a function asks for something huge."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_RENDERED:
            raise ValueError(f'{value} is too large for an argument')


def with_checked_sizes(function):
    """A filter of Jinja that checks its arguments first; the very first is its environment."""

    @wraps(function)  # with the marks that Jinja puts on functions
    def checked(*args, **kwargs):
        check_sizes([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


@contextmanager
def time_limit(seconds):
    """Raise ValueError in the body if it takes longer, or memory grows by more than a gigabyte.

    Python calls a trace function before each line that it runs, debuggers are made of it. That
    works in any thread, and for a program such as a template, which has few lines, it is quick
    enough. What a single line does can't be interrupted.
    """
    deadline = time.monotonic() + seconds
    memory = peak_memory()

    def check(frame, event, argument):
        if time.monotonic() > deadline:
            raise ValueError(f'it takes more than {seconds} seconds')
        if peak_memory() > memory + 2**30:
            raise ValueError('it takes more than 1 GB of memory')
        return check

    previous = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(previous)


def peak_memory():
    """The most bytes of memory that this process has held; 0 if the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def template_from_dict(d):
    """The ChatTemplate or JinjaTemplate that to_dict() described. Raises ValueError."""
    if isinstance(d, dict) and 'jinja' in d:
        return JinjaTemplate.from_dict(d)
    return ChatTemplate.from_dict(d)


def check_template(template, tok):
    """Raise ValueError if the tokenizer cannot encode what the template writes."""
    if isinstance(template, JinjaTemplate):
        if not hasattr(tok, 'encode_with_specials'):
            raise ValueError(f'a Jinja chat template needs the tokenizer of a tokenizer.json, not '
                             f'one of the kind {tok.kind}')
        return
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
