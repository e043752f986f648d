"""
A trained model that takes text and returns text: what sample.py, its web page and notebooks share.

    from pocket.chat import load
    bard = load('out/shakespeare_char')     # load() takes the newest run
    smollm2 = load(init_from='smollm2')     # somebody else's, downloaded once
    print(bard('ROMEO:', max_new_tokens=100, temperature=0.7))
    for piece in bard.stream('JULIET:'):    # the same, piece by piece as it is generated
        print(piece, end='')
    bard.model, bard.tok                    # a GPT or Seq2Seq in eval mode, and its tokenizer
"""
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from typing import get_type_hints

from pocket import checkpoint
from pocket.configurator import convert, describe
from pocket.device import pick_device, pick_dtype
from pocket.errors import UserError
from pocket.files import ROOT, find_path, short_path
from pocket.generate import (
    SamplingParams,
    beam_search,
    generate_stream,
    max_source_tokens,
    prepare_reply_prompts,
)
from pocket.quantize import prepare_for_decoding
from pocket.template import (
    ChatTemplate,
    JinjaTemplate,
    banned_ids,
    encode_conversation,
    encode_messages,
    reply_start_ids,
    template_from_dict,
)
from pocket.tokenizer import UnknownCharacters

RUNS = ROOT / 'out'
# Until there is a run: one that continues a text, and one to chat with
BUNDLED_MODEL = ROOT / 'pocket' / 'bundled' / 'shakespeare'
BUNDLED_CHARACTER = ROOT / 'pocket' / 'bundled' / 'plunkett'


# In front of a prompt for a model of plain text: what follows begins a document. Anywhere else it
# is text like any other
DOCUMENT_START = '<|endoftext|>'


# --------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings(SamplingParams):
    """All that can be set for a generation: how to sample, how much, how wide to search."""

    temperature: float = 0.8
    top_k: int | None = 200
    max_new_tokens: int = 500
    num_beams: int = 1              # above 1: beam search, which does not sample
    length_penalty: float = 0.6     # of a beam search

    def check(self):
        """Raise ValueError if a value is out of range."""
        super().check()
        ranges = {
            'max_new_tokens': (1, 2**20),
            'num_beams': (1, 2**10),
            'length_penalty': (-10, 10),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f'{name} must be from {low} to {high:,}, got {value}')


SAMPLING_OPTIONS = [field.name for field in fields(SamplingParams)]
SETTING_TYPES = get_type_hints(Settings)    # {name: type}, in the order of the fields


def preset(**options):
    """A preset sets every sampling option, and turns beam search off."""
    return {**asdict(SamplingParams(**options)), 'num_beams': 1}


PRESETS = {
    'focused': preset(temperature=0.5, top_k=20, top_p=0.9, repetition_penalty=1.1),
    'balanced': preset(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1),
    'creative': preset(temperature=1.1, top_k=200, top_p=0.98),
    'greedy': preset(temperature=0.0),
}


def update_settings(settings, changes, chosen=None):
    """A copy of settings with changes {name: value}; a value may be text as it was typed.

    chosen: the names that the user asked for (None: all in changes). Raises UserError if a value
    makes no sense, or if one of the chosen names has no effect because num_beams asks for a beam
    search.
    """
    values = {}
    for name, value in changes.items():
        if name not in SETTING_TYPES:
            raise UserError(f'unknown setting {name!r}: there are {", ".join(SETTING_TYPES)}, '
                            f'and the presets {", ".join(PRESETS)}')
        try:
            values[name] = convert(value, SETTING_TYPES[name])
        except ValueError:
            raise UserError(f'{name} must be {describe(SETTING_TYPES[name])}, got {value!r}; '
                            f'it stays {getattr(settings, name)}') from None

    settings = replace(settings, **values)
    try:
        settings.check()
    except ValueError as e:
        raise UserError(str(e)) from None

    if chosen is None:
        chosen = changes
    without_effect = [name for name in SAMPLING_OPTIONS if name in chosen]
    if settings.num_beams > 1 and without_effect:
        raise UserError(f'num_beams={settings.num_beams} searches for the most probable text and '
                        f'samples nothing, so {", ".join(without_effect)} would have no effect: '
                        f'omit it, or set num_beams to 1')
    return settings


def parse_seed(seed):
    """A seed, which may be text as it was typed, as an int or None. Raises UserError."""
    try:
        return convert(seed, int | None)
    except ValueError:
        raise UserError(f'seed must be a whole number below 2**63, or None, '
                        f'got {seed!r}') from None


# --------------------------------------------------------------------------------------------------
# Loading


def saved_checkpoints():
    """Paths of the checkpoints of all runs, the newest last."""
    paths = [*RUNS.glob('*/best.pt'), *RUNS.glob('*/last.pt')]
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def find_checkpoint(out_dir=None, weights='best', to_chat=False):
    """Path of a checkpoint. out_dir: the folder of a run, or a checkpoint; None: the newest run.

    As long as there is no run, None gives a bundled model and says so on stderr: the character if
    it is to chat, else Shakespeare. A run stopped before its first evaluation has only last.pt,
    whatever weights asks for. Raises UserError.
    """
    bundled = False
    if out_dir is None:
        saved = saved_checkpoints()
        bundled = not saved
        if saved:
            out_dir = saved[-1].parent
        else:
            out_dir = BUNDLED_CHARACTER if to_chat else BUNDLED_MODEL
    folder = short_path(find_path(out_dir))
    if folder.is_file():
        return folder   # a checkpoint by its own name

    candidates = [folder / f'{weights}.pt', folder / 'last.pt']
    existing = [path for path in candidates if path.is_file()]
    if not existing:
        runs = sorted({str(short_path(path.parent)) for path in saved_checkpoints()})
        raise UserError(f'there is no checkpoint in {folder}: name a run with --out_dir=…; '
                        f'there are {", ".join(runs) or "none yet"}')
    if bundled:
        print(f'no run in {short_path(RUNS)} yet, so this is a bundled model; '
              f'python train.py trains one of your own', file=sys.stderr)
    return existing[0]


def load(out_dir=None, init_from=None, weights='best', device='auto', dtype=None, quantize='',
         to_chat=False, **more):
    """A ChatModel from a run, or from somebody else's model. Raises UserError.

    out_dir, weights, to_chat: see find_checkpoint(). init_from: the name of a public model or a
    folder with one, see pocket/pretrained.py, instead of a run. device, dtype, quantize: the
    options of sample.py. more: see ChatModel.
    """
    device = pick_device(device)
    # With int8 this is the dtype of the little that is not quantized: float32 on a CPU, which saves
    # conversions around each product
    if dtype is None:
        dtype = 'auto' if quantize and device.type != 'cpu' else 'float32'
    dtype, _ = pick_dtype(device, dtype)

    template = None     # a model of plain text
    recommended = {}
    if init_from:
        from pocket import pretrained
        name = init_from
        model, _ = pretrained.load(init_from, dtype)
        tok = pretrained.load_tokenizer(init_from)
        template = pretrained.load_template(init_from)
        recommended = pretrained.load_sampling(init_from)
    else:
        name = find_checkpoint(out_dir, weights, to_chat)
        state = checkpoint.load(name)
        model, tok = checkpoint.build(state, name, gradient_checkpointing=False)
        if state.get('chat') is not None:   # a model that was trained on conversations
            template = template_from_dict(state['chat'])
        recommended = checkpoint.decoding_of(state)

    model = model.to(device, dtype)
    model = prepare_for_decoding(model, bits=8 if quantize else None)
    return ChatModel(model, tok, template, name, **{**recommended, **more})


# --------------------------------------------------------------------------------------------------
# The model


class ChatModel:
    """A model that continues a text or, if it was trained on pairs, replies in a conversation.

    template: its ChatTemplate or JinjaTemplate, None for a model of plain text. system: what a
    conversation begins with, for templates that have such messages. stop: strings that end a
    generation and are not part of it. ignore_eot: generate past the end-of-text token.
    drop_unknown: leave out characters that the tokenizer does not know. settings: what differs from
    the default Settings.
    """

    def __init__(self, model, tok, template=None, name='', stop=(), ignore_eot=False,
                 drop_unknown=False, system=None, **settings):
        self.model = model
        self.tok = tok
        self.template = template
        self.name = name
        self.stop = [text for text in stop if text]
        self.stops_found = set()    # those of them that have ended a generation
        self.drop_unknown = drop_unknown
        self.settings = update_settings(Settings(), settings, chosen=())

        self.system = system
        if system is not None and not isinstance(template, JinjaTemplate):
            raise UserError(f'{name} has no system messages: omit --system')

        self.eos_ids = [] if ignore_eot else tok.eos_ids
        self.banned = banned_ids(tok, model.config.vocab_size, keep=self.eos_ids)
        self.reply_start = None
        if isinstance(template, ChatTemplate):
            self.reply_start = reply_start_ids(tok, template)

    def __call__(self, text='', turns=(), seed=None, **settings):
        """The continuation of text or, after the turns [(speaker, text), …], the reply to it."""
        return ''.join(self.stream(text, turns, seed, **settings))

    def stream(self, text='', turns=(), seed=None, user=None, **settings):
        """The same, piece by piece as it is generated. user: who says text, if not template.user.

        Raises UserError if the text or a setting makes no sense.
        """
        settings = update_settings(self.settings, settings)
        prompt = self.encode_prompt(text, turns, settings, user)
        at_start = self.template is not None    # a reply does not start with spaces
        for _, piece in self.generate([prompt], settings, seed):
            if at_start:
                piece = piece.lstrip()
                at_start = piece == ''
            yield piece

    def encodable(self, text):
        """The text, if the tokenizer knows all of its characters.

        Otherwise those that it does not know are left out (drop_unknown), or UserError is raised.
        """
        start, rest = self.split_document_start(text)
        try:
            self.tok.encode(rest)
        except UnknownCharacters as e:
            if not self.drop_unknown:
                raise UserError(f'{e}: leave it out, or start with --drop_unknown') from None
            rest = ''.join(c for c in rest if c not in e.characters)
        return start + rest

    def split_document_start(self, text):
        """('<|endoftext|>', rest) if a prompt says that it begins a document, else ('', text)."""
        can_say_so = self.template is None and self.tok.eos_id is not None
        if can_say_so and text.startswith(DOCUMENT_START):
            return DOCUMENT_START, text.removeprefix(DOCUMENT_START)
        return '', text

    def encode_prompt(self, text, turns, settings, user=None):
        """Ids of what the model reads: the text or, in a conversation, the turns and the text."""
        max_new_tokens = settings.max_new_tokens
        if self.template is None:
            start, rest = self.split_document_start(self.encodable(text))
            if start:
                ids = [self.tok.eos_id, *self.tok.encode(rest)]
            else:
                ids = self.tok.encode_prompt(rest)
            if settings.num_beams > 1:  # its context does not slide: leave room in it
                block_size = self.model.config.block_size
                room = block_size - min(max_new_tokens, block_size // 2)
                ids = ids[-max(1, room):]
            return ids

        if isinstance(self.template, JinjaTemplate):
            return self.encode_messages(self.messages(turns, text), settings)

        turns = [*turns, (user or self.template.user, text)]
        turns = turns[-self.template.max_turns:]
        known = []  # in characters that the tokenizer knows; names, too, if they are written
        for speaker, said in turns:
            if '{speaker}' in self.template.turn:
                speaker = self.encodable(speaker)
            known.append((speaker, self.encodable(said)))
        max_tokens = max_source_tokens(self.model, self.reply_start, max_new_tokens)
        source = encode_conversation(self.tok, self.template, known, max_tokens)
        return prepare_reply_prompts(self.model, [source], self.reply_start, max_new_tokens)[0]

    def messages(self, turns, text):
        """A conversation as messages with roles: the turns [(speaker, text), …], then text."""
        messages = []
        if self.system is not None:
            messages.append({'role': 'system', 'content': self.system})
        for speaker, said in turns:
            role = 'assistant' if speaker == self.template.assistant else 'user'
            messages.append({'role': role, 'content': said})
        return [*messages, {'role': 'user', 'content': text}]

    def encode_messages(self, messages, settings):
        """Ids of messages with roles, the newest of them, with room for a reply in the context."""
        block_size = self.model.config.block_size
        room = block_size - min(settings.max_new_tokens, block_size // 2)
        return encode_messages(self.tok, self.template, messages, room)

    def reply(self, messages, seed=None, **settings):
        """Stream the assistant's reply to messages with roles, piece by piece.

        messages: [{'role': 'system' | 'user' | 'assistant', 'content': str}]. A ChatTemplate knows
        no system messages: they are left out. Raises UserError.
        """
        settings = update_settings(self.settings, settings)
        if self.template is None:
            raise UserError(f'{self.name} continues texts, it does not reply to messages')
        if not any(message['role'] != 'system' for message in messages):
            raise UserError('there is no message to reply to')
        if isinstance(self.template, JinjaTemplate):
            if self.system is not None and messages[0]['role'] != 'system':
                messages = [{'role': 'system', 'content': self.system}, *messages]
            prompt = self.encode_messages(messages, settings)
            for _, piece in self.generate([prompt], settings, seed):
                yield piece
            return
        names = {'user': self.template.user, 'assistant': self.template.assistant}
        turns = [(names[message['role']], message['content']) for message in messages
                 if message['role'] in names]
        *earlier, (speaker, text) = turns
        yield from self.stream(text, earlier, seed, user=speaker, **asdict(settings))

    def generate(self, prompts, settings, seed=None):
        """Generate after each of the prompts, lists of ids, in one batch.

        Yields (row, text): row 0 piece by piece as it is generated, then the others, each whole.
        """
        detokenizers = [Detokenizer(self.tok, self.stop) for _ in prompts]
        texts = [''] * len(prompts)
        for column in self.next_tokens(prompts, settings, parse_seed(seed)):
            for row, token_id in enumerate(column):
                if token_id < 0:    # this row has ended
                    continue
                piece = detokenizers[row].add(token_id)
                texts[row] += piece
                if row == 0 and piece:
                    yield 0, piece
            if all(detokenizer.stopped for detokenizer in detokenizers):
                break

        yield 0, detokenizers[0].finish()
        for row in range(1, len(prompts)):
            yield row, texts[row] + detokenizers[row].finish()
        for detokenizer in detokenizers:
            self.stops_found.update(detokenizer.found)

    def generate_texts(self, prompts, settings, seed=None):
        """The whole texts that follow prompts, lists of ids, in one batch: list of str."""
        texts = [''] * len(prompts)
        for row, piece in self.generate(prompts, settings, seed):
            texts[row] += piece
        return texts

    def n_best(self, prompts, settings, n):
        """The n most probable texts that follow each prompt, as far as a beam search finds them.

        Returns a list per prompt: up to n pairs (text, score), best first. The score is the
        text's log-probability, divided by ((5 + tokens) / 6)^length_penalty.
        Raises UserError if n exceeds settings.num_beams.
        """
        if n > settings.num_beams:
            raise UserError(f'n_best={n} texts are the best of as many beams or more: add '
                            f'num_beams={n}, or more')
        found = beam_search(self.model, prompts, settings.max_new_tokens, settings.num_beams,
                            self.eos_ids, self.reply_start, settings.length_penalty, n, self.banned)
        results = []
        for beams in found:
            candidates = []
            for ids, score in beams:
                detokenizer = Detokenizer(self.tok, self.stop)
                text = ''.join(detokenizer.add(token_id) for token_id in ids)
                text += detokenizer.finish()
                candidates.append((text, score))
                self.stops_found.update(detokenizer.found)
            results.append(candidates)
        return results

    def next_tokens(self, prompts, settings, seed):
        """Yields the next id of every row, -1 for a row that has ended."""
        special = {'eos_id': self.eos_ids, 'decoder_start': self.reply_start, 'banned': self.banned}
        if settings.num_beams > 1:
            found = beam_search(self.model, prompts, settings.max_new_tokens, settings.num_beams,
                                length_penalty=settings.length_penalty, **special)
            best = []
            for beams in found:     # of each prompt, the most probable first
                ids, _ = beams[0]
                best.append(ids)
            yield from zip_longest(*best, fillvalue=-1)
        else:
            for column in generate_stream(self.model, prompts, settings.max_new_tokens, settings,
                                          seed=seed, **special):
                yield column.tolist()


class Detokenizer:
    """Turns the ids of one generation into text, one id at a time, up to the first stop string.

    Text is held back while it might be the beginning of a stop string, or of a character.
    """

    def __init__(self, tok, stop=()):
        self.decode = tok.stream_decoder()
        self.stop = stop
        self.held = ''          # decoded, but not returned yet
        self.stopped = False    # a stop string came: whatever follows is ignored
        self.found = []         # that string

    def add(self, token_id):
        """Take the next id; returns the text that can be shown now."""
        if self.stopped:
            return ''
        self.held += self.decode(token_id)
        if self.cut_at_stop_string():
            return self.release(len(self.held))
        return self.release(len(self.held) - self.length_of_partial_stop())

    def finish(self):
        """No id follows; returns the rest of the text."""
        if self.stopped:
            return ''
        self.held += self.decode(None)
        self.cut_at_stop_string()
        return self.release(len(self.held))

    def release(self, length):
        """Returns that many characters of the text held back."""
        text = self.held[:length]
        self.held = self.held[length:]
        return text

    def cut_at_stop_string(self):
        """End the text before the first stop string in it; returns whether there is one."""
        positions = {stop: self.held.find(stop) for stop in self.stop}
        found = {stop: position for stop, position in positions.items() if position >= 0}
        if found:
            first = min(found, key=found.get)
            self.held = self.held[:found[first]]
            self.found.append(first)
            self.stopped = True
        return self.stopped

    def length_of_partial_stop(self):
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(1, len(stop)):
                if self.held.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest
