"""
Generate text with a trained model, let it complete what you type, or chat with it.

    python sample.py                                            from the newest run in out/
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --start="ROMEO:" --start=FILE:prompt.txt   several prompts at once
    python sample.py --start=FILE:en.txt --lines --num_beams=5  translate a file line by line
    python sample.py --out_dir=out/office_encdec --chat         chat, or complete what you type
    python sample.py --web                                      the same in the browser
    python sample.py --init_from=gpt2 --start="The"             GPT-2, downloaded once
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError, show_control_characters
from pocket.files import find_path

out_dir: str | None = None         # the run to sample from (None: the newest in out/)
weights: Literal['best', 'last'] = 'best'  # which of its checkpoints
init_from: str | None = None       # instead: smollm2, gpt2, OWNER/NAME, or a folder with one
start: tuple[str, ...] = ('',)     # the prompt, or FILE:prompt.txt; may be given several times
num_samples = 1                    # [1, 65536] samples per prompt
lines = False                      # reply to each line of a prompt with a line: translates files
system: str | None = None          # what a chat model is told first, such as "You are a pirate."
chat = False                       # chat, or complete what you type, until /quit, Ctrl-D or Ctrl-C
interactive = False                # the same as --chat

# Sampling (some models come with values of their own, which count unless one is typed here)
max_new_tokens = 500               # tokens per sample
temperature = 0.8                  # 0: always the most probable token; 0.5: safe; above 1: wild
top_k: int | None = 200            # keep this many of the most probable tokens (None: all)
top_p: float | None = None         # keep the most probable tokens that add up to this probability
min_p: float | None = None         # keep tokens at least this fraction as probable as the top one
repetition_penalty = 1.0           # above 1: tokens that have already occurred become less likely
num_beams = 1                      # above 1: no sampling, a beam search for the most probable text
length_penalty = 0.6               # beam search: above 0 favors longer texts
n_best = 1                         # [1, 1024] texts per prompt from a beam search, with scores
stop: tuple[str, ...] = ()         # end a sample before this string; may be given several times
ignore_eot = False                 # continue past the end-of-text token
drop_unknown = False               # leave out characters that the tokenizer does not know
seed: int | None = 1337            # None: different samples every time

# Web page and OpenAI API
web = False                        # chat, or complete what you type, in the browser; also an API
port = 8000                        # of the page's address, http://127.0.0.1:8000
host = '127.0.0.1'                 # 0.0.0.0: other machines can reach it too, with a key
api_key: str | None = None         # what the page and programs must know; needed with such a host

# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] | None = None  # weights (None: float32)
quantize: Literal['', 'int8'] = ''  # int8: 8-bit weights, faster for up to 16 texts at once
config, explicit = configure(__file__, globals())

# Only now what takes a second to import: --help and typing errors have been answered at once
import sys
from dataclasses import asdict, replace

from pocket.chat import (
    PRESETS,
    SETTING_TYPES,
    Settings,
    load,
    saved_checkpoints,
    update_settings,
)
from pocket.datasets import read_text
from pocket.template import ChatTemplate
from pocket.terminal import edit_lines, read_input

# Mistakes in the options are reported before a model is loaded
options = {name: config[name] for name in SETTING_TYPES}
settings = update_settings(Settings(), options, chosen=explicit)
if web:
    from pocket.server import ChatServer, listen
    listening_socket = listen(host, port, api_key)
else:
    for name in ('host', 'port', 'api_key'):
        if name in explicit:
            raise UserError(f'--{name} is for the page and the API: add --web')

to_talk = chat or interactive or web
if lines and 'start' not in explicit:
    raise UserError('--lines needs lines: add --start=FILE:my_lines.txt')
if lines and num_samples > 1:
    raise UserError('--lines gives one line for a line: omit --num_samples; --n_best=5 '
                    '--num_beams=5 gives several, with their scores')
if n_best > 1 and num_samples > 1:
    raise UserError(f'--n_best={n_best} texts come from one search: omit --num_samples')
if to_talk and (lines or n_best > 1):
    raise UserError('--lines and --n_best are not for conversations: omit them, or omit --chat '
                    'and --web')
if n_best > settings.num_beams:
    raise UserError(f'--n_best={n_best} texts are the best of as many beams or more: add '
                    f'--num_beams={n_best}, or more')

model = load(out_dir, init_from, weights, device, dtype, quantize,
             to_chat=to_talk, stop=stop, ignore_eot=ignore_eot,
             drop_unknown=drop_unknown, system=system)

# What the model comes with, such as the temperature that its makers recommend, counts unless told
# otherwise
chosen = {name: value for name, value in options.items() if name in explicit}
settings = replace(model.settings, **chosen)
model.settings = settings


def read_start(text):
    """The text that --start gives: itself, or FILE: and the path of a text file."""
    if text.startswith('FILE:'):
        path = find_path(text.removeprefix('FILE:'))
        try:
            return read_text(path)  # as the scripts in prepare/ do
        except UserError as e:
            raise UserError(f'cannot read the prompt {text}: {e}') from None
    return text


def read_prompt(text):
    """The prompt that --start gives, in characters that the tokenizer knows."""
    return model.encodable(read_start(text))


def show(text):
    """Print without a line break, at once: text appears as it is generated."""
    print(text, end='', flush=True)


# --------------------------------------------------------------------------------------------------
# Samples


def check_something_is_said(text):
    """Raise UserError if a model of conversations has nothing to reply to."""
    if model.template and not text.strip():
        raise UserError(f'{model.name} replies to what is said: give it something, '
                        '--start="Hello.", or chat with it: --chat')


def print_samples():
    """Print num_samples samples for each prompt, all generated in one batch."""
    texts = []
    for text in start:
        texts += [read_prompt(text)] * num_samples
    for text in texts:
        check_something_is_said(text)

    # Hints go to stderr, and only if a person is watching: a file or a pipe gets the text alone
    if out_dir is None and sys.stdout.isatty():
        print(f'{model.name} writes:', file=sys.stderr)

    prompts = [model.encode_prompt(text, (), settings) for text in texts]
    current_row = None
    for row, text in model.generate(prompts, settings, seed):
        if row != current_row:      # the first piece of another sample
            current_row = row
            print_heading(row, texts)
            if model.template:
                text = text.lstrip()
        show(text)
    print()
    warn_about_stop_strings()

    if sys.stdout.isatty():
        print_next_steps()


def print_next_steps():
    """Say on stderr what to try next; more of it as long as there is no run."""
    if out_dir or init_from or saved_checkpoints():
        print('next: --chat continues what you type, --web does so in the browser; '
              '--help lists all options', file=sys.stderr)
        return
    print('next:\n'
          '  python sample.py --chat    talk to Plunkett, a lost umbrella\n'
          '  python sample.py --web     the same in the browser\n'
          '  python train.py            train a model of your own, in a minute and a half\n'
          '  python sample.py --help    all options', file=sys.stderr)


def print_heading(row, texts):
    """What stands above and before a sample: its number if there are several, and the prompt."""
    if len(texts) > 1:
        if row > 0:
            print()
        print(f'--- {row + 1} of {len(texts)} ' + '-' * 40)
    if model.template:
        show(f'{model.template.user}: {texts[row]}\n{model.template.assistant}: ')
    else:
        _, shown = model.split_document_start(texts[row])
        show(shown)


def warn_about_stop_strings():
    """Say which strings of --stop no sample has reached."""
    for text in model.stop:
        if text not in model.stops_found:
            advice = ''
            if '\\n' in text:
                advice = "; in most shells a line break is typed as $'\\n'"
            print(f'warning: no sample reached --stop={text!r}{advice}', file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# A line for a line


LINES_PER_BATCH = 32


def print_lines():
    """Print a line for each prompt or, with --lines, for each line of each prompt.

    With a model of plain text that is the prompt and its continuation; with one that replies, the
    reply; a blank line stays blank. With --n_best a prompt gets several: its number, a score, and
    a text, separated by tabs.
    """
    texts = []
    for prompt in map(read_start, start):
        if lines and not prompt:
            continue  # an empty file has no lines
        if lines:
            prompts = prompt.removesuffix('\n').split('\n')
        else:
            check_something_is_said(prompt)
            prompts = [prompt]
        texts += [model.encodable(text) for text in prompts]
    for first in range(0, len(texts), LINES_PER_BATCH):
        batch = texts[first:first + LINES_PER_BATCH]

        # Answer all of the batch at once, except blank lines
        asked = [text for text in batch if not is_blank_line(text)]
        answers = iter(answer_lines(asked, first))

        # Print in the order of the input: a blank line, or the next answer
        for number, text in enumerate(batch, start=first + 1):
            if is_blank_line(text):
                print()
                continue
            for answer, score in next(answers):
                if model.template is None:
                    answer = text + answer
                answer = ' '.join(answer.splitlines()).strip()
                if score is not None:
                    answer = f'{number}\t{score:.4f}\t{answer}'
                print(answer, flush=True)
    warn_about_stop_strings()


def is_blank_line(text):
    """Whether --lines passes a line on as it is. (An empty prompt alone is one to continue.)"""
    return lines and not text.strip()


def answer_lines(texts, first):
    """For each text a list of (what the model writes, score); score None without --n_best.

    first: how many lines came before, so that each batch gets its own seed.
    """
    prompts = [model.encode_prompt(text, (), settings) for text in texts]
    if not prompts:
        return []
    if n_best > 1:
        return model.n_best(prompts, settings, n_best)
    batch_seed = None if seed is None else (seed + first) % 2**63
    return [[(text, None)] for text in model.generate_texts(prompts, settings, batch_seed)]


# --------------------------------------------------------------------------------------------------
# Chat


HELP = """/settings      show the settings; /settings temperature=0.7 top_k=None changes some,
               /settings focused takes a preset: {presets}
/as NAME       speak as NAME (in a conversation)
/reset         forget the conversation
/help          show this
/quit          exit; so do quit, exit and Ctrl-D. Ctrl-C stops a generation"""


def chat_loop():
    """Read lines and reply to each or, with a model of plain text, complete it.

    Ends at /quit, at the end of the input, or with Ctrl-C while waiting for a line.
    """
    pastes_are_marked = edit_lines()
    invitation = 'Say something' if model.template else 'Type the start of a text'
    print(f'{model.name}: {model.model.num_params() / 1e6:.1f} M parameters. '
          f'{invitation}; /help lists commands, /quit exits.')

    turns = []          # of the conversation: [(speaker, text), …]
    num_replies = 0
    while True:
        try:
            line = read_line(turns, pastes_are_marked)
        except UserError as e:      # a mistake in one line ends that line only
            print(e, file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line is None:
            continue

        # Every reply has a seed of its own: the same words would otherwise get the same reply
        reply_seed = None if seed is None else (seed + num_replies) % 2**63
        try:
            reply = print_reply(line, turns, reply_seed)
        except UserError as e:      # the line is too long, for example
            print(f'\n{e}', file=sys.stderr)
            continue
        num_replies += 1
        if model.template:
            turns = [*turns, (model.template.user, line), (model.template.assistant, reply.strip())]
            turns = turns[-model.template.max_turns:]


def read_line(turns, pastes_are_marked):
    """The next line to reply to. None: it was empty, or a command, which is done by now.

    Raises UserError if the line makes no sense, EOFError if it ends the conversation.
    """
    print()
    prompt = '> '
    if model.template:  # input() may write straight to the terminal, not through sys.stdout
        prompt = f'{show_control_characters(model.template.user)}: '
    line = read_input(prompt, pastes_are_marked)
    if line.startswith('/'):
        handle_command(line.strip(), turns)
        return None
    if not line.strip():
        return None
    if line.strip().lower() in ('exit', 'quit'):
        raise EOFError
    if model.template:
        return model.encodable(line.strip())
    return model.encodable(line)


def print_reply(line, turns, reply_seed):
    """Print the reply to a line as it is generated, until it ends or Ctrl-C does; returns it."""
    reply = ''
    try:
        if model.template:
            show(f'{model.template.assistant}: ')
        for piece in model.stream(line, turns, reply_seed):
            reply += piece
            show(piece)
    except KeyboardInterrupt:
        show(' …')
    print()
    return reply


def handle_command(line, turns):
    """Do what a line that begins with a slash says.

    Raises UserError if it makes no sense, EOFError for /quit.
    """
    command, _, rest = line.partition(' ')
    rest = rest.strip()
    if command == '/quit':
        raise EOFError
    elif command == '/help':
        print(HELP.format(presets=', '.join(PRESETS)))
    elif command == '/reset':
        turns.clear()
        print('the conversation is forgotten')
    elif command == '/as':
        speak_as(rest)
    elif command == '/settings':
        change_settings(rest)
    else:
        raise UserError(f'{line!r} is no command: /help lists them')


def speak_as(name):
    """/as NAME: what follows is said by somebody else."""
    template = model.template
    if not isinstance(template, ChatTemplate) or '{speaker}' not in template.turn:
        raise UserError('/as NAME is for conversations with names: this model has none')
    if not name:
        raise UserError('/as NAME is for conversations, and needs a name')
    model.template = replace(template, user=model.encodable(name))


def change_settings(words):
    """/settings: show them, after changing those in words, name=value or the name of a preset."""
    changes = {}
    chosen = []     # names that were typed: what a preset sets may have no effect
    for word in words.replace(',', ' ').split():
        if word in PRESETS:
            changes.update(PRESETS[word])
        else:
            name, _, value = word.partition('=')
            changes[name] = value
            chosen.append(name)
    model.settings = update_settings(model.settings, changes, chosen)
    print(', '.join(f'{name}={value}' for name, value in asdict(model.settings).items()))


# --------------------------------------------------------------------------------------------------
# Run what was asked for

if web:
    ChatServer(model, listening_socket, host, seed, read_prompt(start[0]), api_key).run()
elif chat or interactive:
    chat_loop()
elif lines or n_best > 1:
    print_lines()
else:
    print_samples()
