"""
Write text with a trained model, complete what you type, or talk with it.

    python sample.py                                       the newest run in out/
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --start="ROMEO:" --start=FILE:prompt.txt     several prompts at once
    python sample.py --out_dir=out/office_encdec --chat    a conversation; with a model of plain text, a completion prompt
    python sample.py --init_from=gpt2 --start="The"        GPT-2's weights, downloaded once
"""
from typing import Literal

from configurator import ROOT, UserError, configure, convert, describe, find, nearby, read_knobs

out_dir: str | None = None         # the run to sample from (None: the newest in out/)
weights: Literal['best', 'last'] = 'best'  # which of its checkpoints
init_from: str | None = None       # a public GPT-2 instead (gpt2, gpt2-medium, …, distilgpt2), or a folder with one
start: tuple[str, ...] = ('',)     # the prompt, or FILE:prompt.txt; give it several times for several prompts
num_samples = 1                    # samples of each prompt
max_new_tokens = 500               # tokens a sample
chat = False                       # talk with it, or let it complete what you type, until /quit, Ctrl-D or Ctrl-C
interactive = False                # the same as --chat
# Sampling
temperature = 0.8                  # 0: always the likeliest; below 1: safer, above: wilder
top_k: int | None = 200            # choose among that many of the likeliest (None: all)
top_p: float | None = None         # choose among the likeliest that together have this probability
min_p: float | None = None         # choose among those at least this share of the likeliest one's probability
repetition_penalty = 1.0           # above 1: tokens that were there are less likely
num_beams = 1                      # above 1: no drawing, but a search for the likeliest text, so many at a time
length_penalty = 0.6               # … above 0 it prefers longer ones
stop: tuple[str, ...] = ()         # end a sample before this text; may be given several times
ignore_eot = False                 # go on after end of text
drop_unknown = False               # leave out characters of a prompt that the tokenizer does not know
seed: int | None = 1337            # None: other samples every time
# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of the weights
quantize: Literal['', 'int8'] = ''  # int8: weights in 8 bits, faster where one text at a time is written
config, explicit = configure(__file__, globals())

import sys  # after configure(), so that --help and typing errors are answered at once
from itertools import zip_longest
from pathlib import Path

import checkpoint
from chat import source_ids, start_ids
from device import pick_device, pick_dtype
from generate import check_sampling
from packed import pack
from tokenizer import UnknownCharacters

SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
PRESETS = {'focused': {'temperature': 0.5, 'top_k': 20, 'top_p': 0.9, 'min_p': None, 'repetition_penalty': 1.1, 'num_beams': 1},
           'balanced': {'temperature': 0.8, 'top_k': 50, 'top_p': 0.95, 'min_p': None, 'repetition_penalty': 1.1, 'num_beams': 1},
           'creative': {'temperature': 1.1, 'top_k': 200, 'top_p': 0.98, 'min_p': None, 'repetition_penalty': 1, 'num_beams': 1},
           'greedy': {'temperature': 0.0, 'top_k': None, 'top_p': None, 'min_p': None, 'repetition_penalty': 1, 'num_beams': 1}}


def check(settings, named):
    """Raise UserError where a setting is out of its range, or one of those that the person named contradicts a beam search."""
    try:
        check_sampling(**{key: settings[key] for key in SAMPLING})
    except ValueError as e:
        raise UserError(str(e)) from None
    for key in ('max_new_tokens', 'num_beams'):
        if settings[key] < 1:
            raise UserError(f'{key} must be at least 1, got {settings[key]}')
    if settings['num_beams'] > 1 and (drawing := [key for key in SAMPLING if key in named]):
        raise UserError(f'num_beams={settings["num_beams"]} searches for the likeliest text and draws nothing, so '
                        f'{", ".join(drawing)} can\'t be honoured: leave that away, or set num_beams to 1')


settings = {key: config[key] for key in (*SAMPLING, 'max_new_tokens', 'num_beams')}
kinds = {name: kind for name, kind, _ in read_knobs(Path(__file__).read_text(encoding='utf-8')) if name in settings}
check(settings, explicit)
if num_samples < 1:
    raise UserError(f'num_samples must be at least 1, got {num_samples}')
device = pick_device(device)
if init_from:
    import gpt2
    model, tok, style, path = gpt2.load(init_from)[0], gpt2.load_tokenizer(init_from), None, init_from
else:
    if out_dir is None:
        runs = sorted((ROOT / 'out').glob('*/last.pt'), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UserError(f'there is no run in {ROOT / "out"} yet: train one with python train.py, or name one: --out_dir=…')
        out_dir = runs[-1].parent
    path = nearby(find(out_dir)) / f'{weights}.pt'
    if not path.is_file():  # stopped before its first evaluation
        path = path.with_name('last.pt')
    state = checkpoint.load(path)
    model, tok = checkpoint.build(state, path, gradient_checkpointing=False)
    style = state.get('chat')  # how conversations are written, for a model that was trained on pairs
model = model.to(device, pick_dtype(device, 'auto' if quantize and 'dtype' not in explicit else dtype)[0])
model = pack(model, 8 if quantize else None)
begin = start_ids(tok, style) if style else None
banned = set(tok.specials.values()) - (set() if ignore_eot else {tok.end})
banned |= set(range(tok.vocab_size, model.config.vocab_size))  # rows of the head that mean nothing


def encodable(text):
    """text, once every character of it is known. Raises UserError where it has others, or leaves them out."""
    try:
        tok.encode(text)
    except UnknownCharacters as e:
        if not drop_unknown:
            raise UserError(f'{e}: this model was trained without them; leave them out, or let --drop_unknown do it') from None
        return ''.join(c for c in text if c not in e.characters)
    return text


def read_prompt(text):
    """What --start says: a text, or FILE: and the path of one."""
    if not text.startswith('FILE:'):
        return encodable(text)
    try:
        return encodable(find(text[5:]).read_bytes().decode('utf-8'))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read the prompt {text}: {getattr(e, "strerror", None) or "it is not UTF-8 text"}') from None


def prompt_ids(text, before=()):
    """What the model is given for a text: its ids or, in a conversation, a source with the turns before it."""
    length = settings['max_new_tokens']
    if not style:
        ids, T = tok.prompt(text), model.config.block_size
        return ids[-max(1, T - min(length, T // 2)):] if settings['num_beams'] > 1 else ids  # a beam's context doesn't move on
    source = source_ids(tok, style, [*before, (style['you'], text)], model.reply_room(begin, length))
    return model.reply_prompts([source], begin, length)[0]


class Writer:
    """Turns the ids of one row into text as they come, and ends it before the first stop string."""

    def __init__(self):
        self.decode, self.held, self.done = tok.stream_decoder(), '', False

    def add(self, i):
        """The next id, None at the end. Returns the text that can be shown now: nothing that may begin a stop string."""
        if self.done:
            return ''
        self.held += self.decode(i)
        ends = [at for at in (self.held.find(s) for s in stop if s) if at >= 0]
        keep = 0
        if ends:
            self.held, self.done = self.held[:min(ends)], True
        elif i is None:
            self.done = True
        else:  # the longest end of the text that begins a stop string
            keep = max((n for s in stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text


def write(prompts, seed):
    """Generate behind each prompt (ids). Yields (row, text): the first row as it comes, the others whole, in order."""
    writers, rest = [Writer() for _ in prompts], [''] * len(prompts)
    eot, length = None if ignore_eot else tok.end, settings['max_new_tokens']
    if settings['num_beams'] > 1:
        best = model.beam_search(prompts, length, settings['num_beams'], eot, begin, length_penalty, banned=banned)
        columns = zip_longest(*[ids for (ids, _), *_ in best], fillvalue=-1)
    else:
        how = {key: settings[key] for key in SAMPLING}
        columns = (column.tolist() for column in model.stream(prompts, length, eot, begin, seed, banned, **how))
    for column in columns:
        for row, i in enumerate(column):
            text = writers[row].add(i) if i >= 0 else ''
            if row == 0 and text:
                yield 0, text
            rest[row] += text
        if all(w.done for w in writers):
            break
    for row, w in enumerate(writers):
        tail = w.add(None)
        yield row, tail if row == 0 else rest[row] + tail


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
    elif command == '/as' and style and rest.strip():
        style['you'] = encodable(rest.strip())
    elif command == '/settings':
        new, named = dict(settings), set()
        for word in rest.replace(',', ' ').split():
            key, _, value = word.partition('=')
            if word in PRESETS:
                new.update(PRESETS[word])
            elif key not in settings:
                raise UserError(f'unknown setting {key!r}: there are {", ".join(settings)}, and the presets {", ".join(PRESETS)}')
            else:
                try:
                    new[key] = convert(value, kinds[key])
                except (ValueError, OverflowError):
                    raise UserError(f'{key} must be {describe(kinds[key])}, got {value!r}; it stays {settings[key]}') from None
                named.add(key)
        check(new, named)
        settings.update(new)
        print(', '.join(f'{key}={value}' for key, value in settings.items()))
    else:
        raise UserError(f'{line!r} is no command: /help lists them')


def converse():
    """The prompt: each line is answered or, by a model of plain text, completed. /quit, end of input, or Ctrl-C there end it."""
    print(f'{path}: {model.num_params() / 1e6:.1f} M parameters. '
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
            line, text = encodable(line.strip() if style else line), ''
            prompt = prompt_ids(line, turns)
        except UserError as e:  # a mistake in one line ends that line only
            print(e, file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            show(f'{style["me"]}: ' if style else '')  # what is typed stands above, what is written below: never mixed
            for _, piece in write([prompt], None if seed is None else seed + number):
                piece = piece if text or not style else piece.lstrip()
                text += piece
                show(piece)
        except KeyboardInterrupt:
            show(' …')
        print()
        number += 1
        turns += [(style['you'], line), (style['me'], text.strip())] if style else []


if chat or interactive:
    converse()
else:
    texts = [read_prompt(text) for text in start for _ in range(num_samples)]
    if style and not all(map(str.strip, texts)):
        raise UserError('this model replies to what is said: give it something, --start="Hello.", or talk with it: --chat')
    prompts, last = [prompt_ids(text) for text in texts], -1
    for row, text in write(prompts, seed):
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
