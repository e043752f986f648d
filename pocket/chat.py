"""
A trained model as something that writes, text in and text out: what sample.py, its page in the browser and notebooks share.

    >>> from talk import load
    >>> bard = load('out/shakespeare_char')      # a run, by its folder; load() takes the newest, load(init_from='gpt2') GPT-2
    >>> print(bard('ROMEO:', max_new_tokens=100, temperature=0.7))
    >>> for piece in bard.pieces('JULIET:'):     # the same as it is written
    ...     print(piece, end='')
    >>> bard.model, bard.tok                     # a GPT or Seq2Seq, in eval mode, and its tokenizer
"""
import sys
from itertools import zip_longest

from pocket import checkpoint
from pocket.configurator import convert, describe
from pocket.device import pick_device, pick_dtype
from pocket.errors import UserError
from pocket.files import ROOT, find_path, short_path
from pocket.generate import check_sampling
from pocket.quantize import prepare_for_decoding
from pocket.template import banned_ids, encode_conversation, reply_start_ids
from pocket.tokenizer import UnknownCharacters

SETTINGS = {'temperature': (float, 0.8), 'top_k': (int | None, 200), 'top_p': (float | None, None), 'min_p': (float | None, None),
            'repetition_penalty': (float, 1.0), 'max_new_tokens': (int, 500), 'num_beams': (int, 1),
            'length_penalty': (float, 0.6)}  # name: (type, default)
SAMPLING = [*SETTINGS][:5]  # what draws: a beam search knows none of it
PRESETS = {name: dict(zip([*SAMPLING, 'num_beams'], values)) for name, values in {
    'focused': (0.5, 20, 0.9, None, 1.1, 1), 'balanced': (0.8, 50, 0.95, None, 1.1, 1),
    'creative': (1.1, 200, 0.98, None, 1.0, 1), 'greedy': (0.0, None, None, None, 1.0, 1)}.items()}
COMES_ALONG = ROOT / 'pocket' / 'bundled' / 'shakespeare'  # for those who have trained nothing yet


def change(settings, new, named=None):
    """settings with those of `new` in their place: values, or text as it is typed. Raises UserError where one makes no sense,
    or one of `named` (None: all of `new`), which the person asked for, contradicts a beam search."""
    settings = dict(settings)
    for key, value in new.items():
        if key not in SETTINGS:
            raise UserError(f'unknown setting {key!r}: there are {", ".join(SETTINGS)}, and the presets {", ".join(PRESETS)}')
        try:
            settings[key] = convert(value, SETTINGS[key][0])
        except (ValueError, OverflowError):
            raise UserError(f'{key} must be {describe(SETTINGS[key][0])}, got {value!r}; it stays {settings[key]}') from None
    try:
        check_sampling(**{key: settings[key] for key in SAMPLING})
    except ValueError as e:
        raise UserError(str(e)) from None
    for key, least, most in (('max_new_tokens', 1, 2**20), ('num_beams', 1, 2**10), ('length_penalty', -10, 10)):
        if not least <= settings[key] <= most:
            raise UserError(f'{key} must be from {least} to {most:,}, got {settings[key]}')
    if settings['num_beams'] > 1 and (drawing := [key for key in SAMPLING if key in (new if named is None else named)]):
        raise UserError(f'num_beams={settings["num_beams"]} searches for the likeliest text and draws nothing, so '
                        f'{", ".join(drawing)} can\'t be honoured: leave that away, or set num_beams to 1')
    return settings


def check_seed(seed):
    """seed, a number or text as it is typed, as a number, or None. Raises UserError where PyTorch knows no such seed."""
    try:
        return convert(seed, int | None)
    except (ValueError, OverflowError):
        raise UserError(f'seed must be a whole number below 2**63, or None, got {seed!r}') from None


def load(out_dir=None, init_from=None, weights='best', device='auto', dtype=None, quantize='', **more):
    """A Talk. out_dir: a run's folder, or a checkpoint; None for the newest in out/ or, before there is one, the model that comes
    along. init_from: a public GPT-2 instead, or a folder with one. The rest are sample.py's knobs. Raises UserError."""
    device = pick_device(device)
    if init_from:
        from pocket import pretrained
        model, tok, style, name = pretrained.load(init_from)[0], pretrained.load_tokenizer(init_from), None, init_from
    else:
        if out_dir is None:
            runs = sorted((ROOT / 'out').glob('*/[bl]*st.pt'), key=lambda p: p.stat().st_mtime)
            out_dir = runs[-1].parent if runs else COMES_ALONG  # (best.pt and last.pt)
        name = short_path(find_path(out_dir))
        if not name.is_file():  # a run's folder, not a checkpoint by its own name; last.pt: stopped before its first evaluation
            there = [name / f'{w}.pt' for w in (weights, 'last') if (name / f'{w}.pt').is_file()]
            if not there:
                runs = ', '.join(sorted({str(short_path(p.parent)) for p in (ROOT / 'out').glob('*/[bl]*st.pt')})) or 'none yet'
                raise UserError(f'there is no checkpoint in {name}: name a run with --out_dir=…; there are {runs}')
            name = there[0]
        state = checkpoint.load(name)
        model, tok = checkpoint.build(state, name, gradient_checkpointing=False)
        if out_dir is COMES_ALONG:
            print(f'no run in {short_path(ROOT / "out")} yet, so this is {short_path(COMES_ALONG)}, which comes along; '
                  f'python train.py trains one of your own', file=sys.stderr)
        style = state.get('chat')  # how conversations are written, for a model that was trained on pairs
    # what int8 leaves as it is, is small: float32 saves a CPU the conversions around each product
    model = model.to(device, pick_dtype(device, dtype or ('auto' if quantize and device.type != 'cpu' else 'float32'))[0])
    return Talk(prepare_for_decoding(model, 8 if quantize else None), tok, style, name, **more)


class Talk:
    """A model that writes text. See load().

    style: the format of conversations (chat.py), None for a model of plain text. stop: texts that end what is written, before
    them. settings: those of SETTINGS that are to hold where a call says nothing else.
    """

    def __init__(self, model, tok, style=None, name='', stop=(), ignore_eot=False, drop_unknown=False, **settings):
        self.model, self.tok, self.style, self.name = model, tok, style, name
        self.stop, self.drop_unknown = [s for s in stop if s], drop_unknown
        self.eot = None if ignore_eot else tok.eos_id
        self.start = reply_start_ids(tok, style) if style else None
        self.banned = banned_ids(tok, model.config.vocab_size, but=self.eot)
        self.settings = change({key: default for key, (_, default) in SETTINGS.items()}, settings, named=())

    def __call__(self, text='', turns=(), seed=None, **settings):
        """What the model writes behind text or, after the turns [(speaker, text), …] of a conversation, replies to it."""
        return ''.join(self.pieces(text, turns, seed, **settings))

    def pieces(self, text='', turns=(), seed=None, you=None, **settings):
        """The same as it is written: yields pieces of text; you: who says it, where that is not style['you'].
        Raises UserError where text or a setting makes no sense."""
        settings = change(self.settings, settings)
        prompt, begun = self.prompt(text, turns, settings, you), not self.style
        for _, piece in self.write([prompt], settings, seed):
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            yield piece

    def encodable(self, text):
        """text, once every character of it is known. Raises UserError where it has others, or leaves them out."""
        try:
            self.tok.encode(text)
        except UnknownCharacters as e:
            if not self.drop_unknown:
                raise UserError(f'{e}: leave that out, or start with --drop_unknown') from None
            return ''.join(c for c in text if c not in e.characters)
        return text

    def prompt(self, text, turns, settings, you=None):
        """What the model is given for a text: its ids or, in a conversation, a source with the turns before it."""
        length, text = settings['max_new_tokens'], self.encodable(text)
        if not self.style:
            ids, T = self.tok.encode_prompt(text), self.model.config.block_size
            return ids if settings['num_beams'] == 1 else ids[-max(1, T - min(length, T // 2)):]  # a beam's context stays
        turns = [*turns, (you or self.style['you'], text)][-self.style['turns']:]  # of a long conversation it reads the end
        turns = [tuple(map(self.encodable, turn)) for turn in turns]
        source = encode_conversation(self.tok, self.style, turns, self.model.reply_room(self.start, length))
        return self.model.reply_prompts([source], self.start, length)[0]

    def write(self, prompts, settings, seed):
        """Generate behind each prompt (ids). Yields (row, text): the first row as it comes, the others whole, in order."""
        writers, rest = [Writer(self.tok, self.stop) for _ in prompts], [''] * len(prompts)
        length, beams = settings['max_new_tokens'], settings['num_beams']
        seed = check_seed(seed)
        if beams > 1:
            best = self.model.beam_search(prompts, length, beams, self.eot, self.start, settings['length_penalty'],
                                          banned=self.banned)
            columns = zip_longest(*[ids for (ids, _), *_ in best], fillvalue=-1)
        else:
            how = {key: settings[key] for key in SAMPLING}
            columns = (c.tolist() for c in self.model.stream(prompts, length, self.eot, self.start, seed, self.banned, **how))
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


class Writer:
    """Turns the ids of one row into text as they come, and ends it before the first stop string."""

    def __init__(self, tok, stop):
        self.decode, self.stop, self.held, self.done = tok.stream_decoder(), stop, '', False

    def add(self, i):
        """The next id, None at the end. Returns the text that can be shown now: nothing that may begin a stop string."""
        if self.done:
            return ''
        self.held += self.decode(i)
        ends = [at for at in map(self.held.find, self.stop) if at >= 0]
        keep = 0
        if ends:
            self.held, self.done = self.held[:min(ends)], True
        elif i is None:
            self.done = True
        else:  # the longest end of the text that begins a stop string
            keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text
