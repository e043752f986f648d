"""
Write text with a trained model, complete what you type, or talk with it.

    python sample.py                                       the newest run in out/
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --start="ROMEO:" --start=FILE:prompt.txt     several prompts at once
    python sample.py --out_dir=out/office_encdec --chat    a conversation; with a model of plain text, a completion prompt
    python sample.py --web                                 the same in the browser, on a page of your own machine
    python sample.py --init_from=gpt2 --start="The"        GPT-2's weights, downloaded once
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import find_path

out_dir: str | None = None         # the run to sample from (None: the newest in out/)
weights: Literal['best', 'last'] = 'best'  # which of its checkpoints
init_from: str | None = None       # a public GPT-2 instead (gpt2, gpt2-medium, …, distilgpt2), or a folder with one
start: tuple[str, ...] = ('',)     # the prompt, or FILE:prompt.txt; give it several times for several prompts
num_samples = 1                    # samples of each prompt
chat = False                       # talk with it, or let it complete what you type, until /quit, Ctrl-D or Ctrl-C
interactive = False                # the same as --chat
# Sampling
max_new_tokens = 500               # tokens a sample
temperature = 0.8                  # 0: always the likeliest; below 1: safer, above: wilder
top_k: int | None = 200            # choose among that many of the likeliest (None: all)
top_p: float | None = None         # choose among the likeliest that together have this probability
min_p: float | None = None         # choose among those at least this share of the likeliest one's probability
repetition_penalty = 1.0           # above 1: tokens that were there are less likely
num_beams = 1                      # above 1: no drawing, but a search for the likeliest text, so many at a time
length_penalty = 0.6               # of such a search: above 0 it prefers longer texts
stop: tuple[str, ...] = ()         # end a sample before this text; may be given several times
ignore_eot = False                 # go on after end of text
drop_unknown = False               # leave out characters of a prompt that the tokenizer does not know
seed: int | None = 1337            # None: other samples every time
# Page
web = False                        # talk with it, or let it complete what you type, in the browser
port = 8000                        # of the page's address, http://127.0.0.1:8000
host = '127.0.0.1'                 # 0.0.0.0: other machines can reach it too
# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] | None = None  # of the weights (None: float32; int8 on a GPU: auto)
quantize: Literal['', 'int8'] = ''  # int8: weights in 8 bits, faster where one text at a time is written
config, explicit = configure(__file__, globals())

import sys  # after configure(), so that --help and typing errors are answered at once

from pocket.chat import PRESETS, SETTINGS, change, load

if num_samples < 1:
    raise UserError(f'num_samples must be at least 1, got {num_samples}')
settings = change({}, {key: config[key] for key in SETTINGS}, explicit)  # mistakes are told before a model is loaded
if web:
    from pocket.server import Page, listen
    sock = listen(host, port)
talk = load(out_dir, init_from, weights, device, dtype, quantize, stop=stop, ignore_eot=ignore_eot, drop_unknown=drop_unknown)
talk.settings, style = settings, talk.style


def read_prompt(text):
    """What --start says: a text, or FILE: and the path of one."""
    if not text.startswith('FILE:'):
        return talk.encodable(text)
    try:
        return talk.encodable(find_path(text[5:]).read_bytes().decode('utf-8'))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read the prompt {text}: {getattr(e, "strerror", None) or "it is not UTF-8 text"}') from None


def show(*text):
    print(*text, end='', flush=True)


HELP = """/settings      show them; /settings temperature=0.7 top_k=None changes some, /settings focused takes a preset:
               {presets}
/as NAME       speak as NAME (in a conversation)
/reset         forget what was said
/help          this
/quit          end; so does Ctrl-D. Ctrl-C ends what is being written"""


def obey(line, turns):
    """A line that begins with a slash. Raises UserError where it makes no sense, EOFError where it is the end."""
    command, _, rest = line.partition(' ')
    if command == '/quit':
        raise EOFError
    if command == '/help':
        print(HELP.format(presets=', '.join(PRESETS)))
    elif command == '/reset':
        turns.clear()
    elif command == '/as':
        if not style or not rest.strip():
            raise UserError('/as NAME is for conversations' + (', and needs a name' if style else ': this is plain text'))
        style['you'] = talk.encodable(rest.strip())
    elif command == '/settings':
        new, typed = {}, {}
        for word in rest.replace(',', ' ').split():
            key, _, value = word.partition('=')
            new.update(PRESETS[word] if word in PRESETS else {key: value})
            typed |= {} if word in PRESETS else {key: value}
        talk.settings = change(talk.settings, new, typed)
        print(', '.join(f'{key}={value}' for key, value in talk.settings.items()))
    else:
        raise UserError(f'{line!r} is no command: /help lists them')


def converse():
    """The prompt: each line is answered or, by a model of plain text, completed. /quit, end of input, or Ctrl-C there end it."""
    print(f'{talk.name}: {talk.model.num_params() / 1e6:.1f} M parameters. '
          + ('Say something' if style else 'Type the start of a text') + '; /help lists commands, /quit ends.')
    turns, number = [], 0
    while True:
        try:
            line = input(f'\n{style["you"]}: ' if style else '\n> ')
            if line.startswith('/'):
                obey(line.strip(), turns)
                continue
            if line.strip() in ('exit', 'quit') and not style:
                raise EOFError
            if not line.strip():
                continue
            line, text = talk.encodable(line.strip() if style else line), ''
        except UserError as e:  # a mistake in one line ends that line only
            print(e, file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            show(f'{style["me"]}: ' if style else '')  # what is typed stands above, what is written below: never mixed
            for piece in talk.pieces(line, turns, None if seed is None else seed + number):
                text += piece
                show(piece)
        except KeyboardInterrupt:
            show(' …')
        print()
        number += 1
        if style:
            turns = [*turns, (style['you'], line), (style['me'], text.strip())][-style['turns']:]


if web:
    Page(talk, sock, host, seed, read_prompt(start[0])).run()
elif chat or interactive:
    converse()
else:
    texts = [read_prompt(text) for text in start for _ in range(num_samples)]
    if style and not all(map(str.strip, texts)):
        raise UserError(f'{talk.name} replies to what is said: give it something, --start="Hello.", or talk with it: --chat')
    if out_dir is None and sys.stdout.isatty():
        print(f'{talk.name} writes:', file=sys.stderr)
    prompts, last = [talk.prompt(text, (), settings) for text in texts], -1
    for row, text in talk.write(prompts, settings, seed):
        if row != last:
            if len(prompts) > 1:
                print(('\n' if row else '') + f'--- {row + 1} of {len(prompts)} ' + '-' * 40)
            if style:
                show(f'{style["you"]}: {texts[row]}\n{style["me"]}: ')
                text = text.lstrip()
            else:
                show(texts[row])
        show(text)
        last = row
    print()
    if sys.stdout.isatty():  # in a file or a pipe there is the text alone
        print('next: --chat goes on from what you type, --web in the browser; --help lists what else there is', file=sys.stderr)
