"""
Write text with a trained model, or complete what you type.

    python sample.py                                       the newest run in out/
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --start="ROMEO:" --start=FILE:prompt.txt     several prompts at once
    python sample.py --chat                                a completion prompt
"""
from typing import Literal

from configurator import ROOT, UserError, configure, find, nearby

out_dir: str | None = None         # the run to sample from (None: the newest in out/)
weights: Literal['best', 'last'] = 'best'  # which of its checkpoints
start: tuple[str, ...] = ('',)     # the prompt, or FILE:prompt.txt; give it several times for several prompts
num_samples = 1                    # samples of each prompt
max_new_tokens = 500               # tokens a sample
chat = False                       # a prompt that completes what you type, until exit, Ctrl-D or Ctrl-C
interactive = False                # the same as --chat
# Sampling
temperature = 0.8                  # 0: always the likeliest; below 1: safer, above: wilder
top_k: int | None = 200            # choose among that many of the likeliest (None: all)
top_p: float | None = None         # choose among the likeliest that together have this probability
min_p: float | None = None         # choose among those at least this share of the likeliest one's probability
repetition_penalty = 1.0           # above 1: tokens that were there are less likely
stop: tuple[str, ...] = ()         # end a sample before this text; may be given several times
ignore_eot = False                 # go on after end of text
drop_unknown = False               # leave out characters of a prompt that the tokenizer does not know
seed: int | None = 1337            # None: other samples every time
# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of the weights
config, _ = configure(__file__, globals())

import sys  # after configure(), so that --help and typing errors are answered at once

import checkpoint
from device import pick_device, pick_dtype
from generate import check_sampling
from tokenizer import UnknownCharacters

sampling = {key: config[key] for key in ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')}
try:
    check_sampling(**sampling)
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f'num_samples and max_new_tokens must be at least 1, got {num_samples} and {max_new_tokens}')
except ValueError as e:
    raise UserError(str(e)) from None
if out_dir is None:
    runs = sorted((ROOT / 'out').glob('*/last.pt'), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f'there is no run in {ROOT / "out"} yet: train one with python train.py, or name one with --out_dir=…')
    out_dir = runs[-1].parent
out_dir = nearby(find(out_dir))
path = out_dir / f'{weights}.pt'
if not path.is_file():  # stopped before its first evaluation
    path = out_dir / 'last.pt'
device = pick_device(device)
model, tok = checkpoint.build(checkpoint.load(path), path, gradient_checkpointing=False)
model = model.to(device, pick_dtype(device, dtype)[0])
banned = set(tok.specials.values()) - ({tok.specials['eot']} if 'eot' in tok.specials and not ignore_eot else set())
banned |= set(range(tok.vocab_size, model.config.vocab_size))  # rows of the head that mean nothing


def encode(text):
    """Prompt to ids. Raises UserError where it has characters that the tokenizer does not know."""
    if text.startswith('FILE:'):
        try:
            text = find(text[5:]).read_bytes().decode('utf-8')
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'cannot read the prompt {text}: {getattr(e, "strerror", None) or "it is not UTF-8 text"}') from None
    try:
        return tok.prompt(text)
    except UnknownCharacters as e:
        if not drop_unknown:
            raise UserError(f'{e}: this model was trained without them; leave them out, or let --drop_unknown do it') from None
        return tok.prompt(''.join(c for c in text if c not in e.characters))


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
    writers, rest, eot = [Writer() for _ in prompts], [''] * len(prompts), None if ignore_eot else tok.specials.get('eot')
    for tokens in model.stream(prompts, max_new_tokens, eot=eot, seed=seed, banned=banned, **sampling):
        for row, i in enumerate(tokens.tolist()):
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


def complete():
    """The completion prompt: reads a line, completes it, until exit, end of input or Ctrl-C."""
    print(f'{path}: {model.num_params() / 1e6:.1f} M parameters, {model.config.block_size} tokens of context. '
          f'Type the start of a text; exit, Ctrl-D or Ctrl-C ends.')
    turn = 0
    while True:
        try:
            line = input('\n> ')
            if line.strip() in ('exit', 'quit'):
                return
            if not line:
                continue
            show(line)
            for _, text in write([encode(line)], None if seed is None else seed + turn):
                show(text)
            print()
            turn += 1
        except UserError as e:  # a mistake in one line ends that line only
            print(e, file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            print()
            return


if chat or interactive:
    complete()
else:
    texts = [text for text in start for _ in range(num_samples)]
    prompts = [encode(text) for text in texts]
    last = -1
    for row, text in write(prompts, seed):
        if row != last:
            if len(prompts) > 1:
                print(('\n' if row else '') + f'--- {row + 1} of {len(prompts)} ' + '-' * 40)
            show(tok.decode(prompts[row]).lstrip('\n') if start[row // num_samples] == '' else tok.decode(prompts[row]))
        show(text)
        last = row
    print()
