"""
Helpers that keep train.py readable: options, the dataset, the folder and log of a run, signals,
set-up of the model, and advice for runs that go wrong.
"""
import csv
import json
import math
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

from pocket import checkpoint, distributed, fused, memory, plot
from pocket.checkpoint import CHANGEABLE_IN_MODEL, MODELS, check_config, resume_config
from pocket.configurator import check_ranges, read_options
from pocket.data import Buckets, Chats, Pairs, Stream, ensure_prepared
from pocket.datasets import find_run
from pocket.errors import OUT_OF_MEMORY, Output, UserError
from pocket.evaluate import check_bleu_options
from pocket.files import ROOT, atomic_write, back_up, find_path, lock, short_path
from pocket.template import check_template, reply_start_ids, template_from_dict
from pocket.tokenizer import UnknownCharacters, tokenizer_from_dict

# --------------------------------------------------------------------------------------------------
# Options


def run_folder(out_dir, dataset, arguments, must_exist):
    """The folder of a run: out_dir, or out/ and the name of the last config file or the dataset.

    arguments: of the command line. must_exist: it holds a run that is to be resumed or evaluated.
    """
    if out_dir is None:
        config_files = [argument for argument in arguments if not argument.startswith('--')]
        name = Path(config_files[-1]).stem if config_files else dataset
        out_dir = ROOT / 'out' / name
    elif must_exist:
        out_dir = find_path(out_dir)
    return short_path(out_dir)


def run_checkpoint(out_dir, eval_only):
    """The path of the checkpoint to resume from or to evaluate. Raises UserError if there is
    none."""
    path = out_dir / 'last.pt'
    if eval_only or not path.is_file():  # best.pt is written first, so it may be there alone
        path = out_dir / 'best.pt'
    if path.is_file():
        return path
    if eval_only:
        raise UserError(f'there is no checkpoint in {out_dir} to evaluate: '
                        f'name the run with --out_dir=…')
    raise UserError(f'there is no checkpoint in {out_dir} to resume from: name the run with '
                    f'--out_dir=…, or omit --resume to start a new one')


def settle_options(config, explicit, script, state, state_path, resuming):
    """The options to use: those of the checkpoint that a run continues, and free of contradictions.

    script: the file whose first assignments are the options. state: a loaded checkpoint, or None
    for a new run. Raises UserError with all that is wrong.
    """
    options = read_options(Path(script).read_text(encoding='utf-8'))
    if state is not None:
        checkpoint.check_paths_of_run(state, state_path, config, explicit, options)
        config = resume_config(state, state_path, config, explicit, options, resuming)
        return check_options(config, explicit, options, state['model_args'])
    return check_options(config, explicit, options)


def check_options(config, explicit, options, model_args=None):
    """The options to train with, once those that depend on each other are settled.

    model_args: of a checkpoint, which can have more than there are options for.

    Only one option sets the length of the run; the command line beats a config file.
    Raises UserError with all that is wrong.
    """
    config = dict(config)
    problems = check_ranges(options, config)

    lengths = ('max_iters', 'max_epochs', 'max_minutes')
    typed = [name for name in lengths
             if explicit.get(name) == 'command line' and config[name] is not None]
    if len(typed) > 1:
        problems.append(f'{" and ".join(typed)} each set the length of the run: give one of them')
    if typed:
        for name in ('max_epochs', 'max_minutes'):
            if name != typed[0]:
                config[name] = None

    if config['label_smoothing'] and config['cutoffs']:
        problems.append('adaptive softmax (cutoffs) can\'t do label_smoothing: '
                        'switch one of them off')

    # The shape of the model
    _, Config = MODELS[config['arch']]
    arguments = dict(model_args or {})
    arguments.update(model_options(config))
    arguments['vocab_size'] = 2**62  # not known yet: so large that no cutoff exceeds it
    try:
        check_config(Config(**arguments))
    except ValueError as e:
        problems.append(str(e))
    problems += check_schedule(config, explicit)
    if problems:
        raise UserError('; '.join(problems))
    return config


def check_schedule(config, explicit):
    """What contradicts itself in the options for learning rates: sentences."""
    problems = []
    if config['min_lr'] > config['learning_rate'] and config['schedule'] != 'constant':
        problems.append(f'min_lr ({config["min_lr"]:g}) is above the peak that it is reached from, '
                        f'learning_rate ({config["learning_rate"]:g}): lower it')
    # Short trials with the warmup of a longer run are common: only a typed one is a mistake
    by_steps = config['max_epochs'] is None and config['max_minutes'] is None
    is_typed = explicit.get('warmup_iters') == 'command line'
    if by_steps and is_typed and config['warmup_iters'] > config['max_iters']:
        problems.append(f'warmup_iters ({config["warmup_iters"]}) is beyond the end of the run '
                        f'(max_iters={config["max_iters"]}): lower it')
    return problems


def model_options(config):
    """The options that are fields of the model's config."""
    _, Config = MODELS[config['arch']]
    return {name: config[name] for name in Config.__dataclass_fields__ if name in config}


def model_arguments(config, tok, state):
    """The arguments of a model's config: from options and, for a run that continues, from its
    checkpoint. That has what there are no options for, such as rope_scaling, and the size of a
    vocabulary that is padded beyond the tokenizer's.
    """
    arguments = {'vocab_size': tok.vocab_size}
    if state is not None:
        arguments.update(state['model_args'])
    arguments.update(model_options(config))
    return arguments


# --------------------------------------------------------------------------------------------------
# The dataset


def dataset_template(meta):
    """The chat template of a dataset of pairs or conversations; None for a stream of text."""
    if meta['kind'] == 'stream':
        return None
    return template_from_dict(meta.get('chat'))


def prepare_data(dataset, data_dir):
    """The folder of a dataset, made by prepare/DATASET.py if it is missing: by one of the
    processes."""
    data_dir = short_path(data_dir or ROOT / 'data')
    with distributed.master_first():
        return ensure_prepared(dataset, data_dir, make=distributed.master_process)


def load_dataset_tokenizer(meta, folder):
    """The tokenizer in a dataset's meta.json. Raises UserError."""
    try:
        tok = tokenizer_from_dict(meta['tokenizer'])
        if tok.vocab_size != meta['vocab_size']:
            raise ValueError(f'vocab_size is {meta["vocab_size"]}, but the tokenizer has '
                             f'{tok.vocab_size}')
        template = dataset_template(meta)
        if template is not None:
            check_template(template, tok)
        return tok
    except UserError:  # an encoding that has to be downloaded
        raise
    except ValueError as e:
        raise UserError(f'{folder / "meta.json"}: {e}; prepare the dataset again') from None


def check_dataset_fits(meta, tok, folder, config, explicit, state):
    """Raise UserError if a dataset doesn't match the model or the options.

    tok: its tokenizer. state: the checkpoint that is resumed or evaluated, or None.
    """
    if state is not None and state['tokenizer'] != tok.to_dict():
        raise UserError(f'the tokenizer of this run is not that of {folder}: start a new run with '
                        f'another --out_dir, or restore the dataset')
    if config['arch'] == 'seq2seq' and meta['kind'] == 'chats':
        raise UserError(f'{folder} holds whole conversations, which a GPT learns: omit '
                        f'--arch=seq2seq')
    if config['arch'] == 'seq2seq' and meta['kind'] == 'stream':
        raise UserError(f'{folder} is a single stream of text, but an encoder-decoder learns from '
                        f'pairs: train a GPT on it (--arch=gpt, or config/shakespeare_char.py), or '
                        f'use a dataset of pairs (config/office_encdec.py)')

    # Of the two batch sizes, only one has an effect
    used = 'batch_size'
    unused = 'batch_tokens'
    if meta['kind'] != 'stream':
        used = 'batch_tokens'
        unused = 'batch_size'
    if unused in explicit and state is None:
        content = {'stream': 'a stream', 'pairs': 'pairs', 'chats': 'conversations'}[meta['kind']]
        raise UserError(f'{unused} ({explicit[unused]}) has no effect on {folder}, which holds '
                        f'{content}: set --{used} instead')
    if config['eval_protocol'] != 'tokens' and meta['kind'] != 'pairs':
        raise UserError(f'--eval_protocol={config["eval_protocol"]} is for pairs, and {folder} '
                        f'holds none: omit it')
    if config['eval_split'] not in meta['counts']:
        raise UserError(f'{folder} has no {config["eval_split"]} split: '
                        f'it has {", ".join(meta["counts"])}')
    check_bleu_options(config, meta)


def check_same_data(state, splits, config, resuming):
    """Raise UserError if a run is resumed on another text than it was trained on so far.

    If it is only evaluated, on a dataset of the same name, say so. splits: {name: Split}.
    Checkpoints of earlier versions don't say what text that was.
    """
    saved = state.get('data')
    if not isinstance(saved, dict):
        return
    for name, split in splits.items():
        # earlier versions took the digest of the .bin alone, which is what ours begins with
        before = saved.get(name, '')
        if isinstance(before, str) and split.fingerprint.startswith(before):
            continue
        problem = f'{split.path} is not what this run was trained on: it was prepared anew'
        if resuming:
            raise UserError(f'{problem}; restore it, or start a new run with another --out_dir')
        if state['config'].get('dataset') == config['dataset']:
            print(f'warning: {problem}, and what is val now may be text that the run has learned')
        return


def open_split(folder, meta, split, config, tok, template):
    """One split of a dataset, as the model reads it: a Stream, Pairs or Chats."""
    block_size = config['block_size']
    if meta['kind'] == 'stream':
        return Stream(folder, meta, split, block_size, config['batch_size'])
    if meta['kind'] == 'chats':
        return Chats(folder, meta, split, block_size, config['batch_tokens'])
    src_block_size = None
    if config['arch'] == 'seq2seq':
        src_block_size = config['src_block_size'] or block_size
    reply_start = reply_start_ids(tok, template)
    return Pairs(folder, meta, split, reply_start, block_size, src_block_size,
                 config['batch_tokens'])


# --------------------------------------------------------------------------------------------------
# The folder of a run, and its log


def record_folders(config, run_dir, data_folder):
    """The options, with the folders that a resumed run looks into.

    The default data_dir keeps following the scripts, so it is not recorded.
    """
    config = config | {'out_dir': str(run_dir)}
    if config['data_dir'] is not None:
        config['data_dir'] = str(data_folder.parent.resolve())
    return config


def claim_run_dir(out_dir, config, is_new):
    """Make the folder of a run and lock it; an earlier run in it is moved to NAME.1, never
    overwritten.

    Returns the lock, to hold on to. Raises UserError if another run is writing there, or nobody
    can.
    """
    try:
        holds_a_run = any((out_dir / name).is_file() for name in ('best.pt', 'last.pt'))
        if is_new and holds_a_run:
            moved_to = back_up(out_dir)
            print(f'{out_dir} held a run, which is now {short_path(moved_to)} '
                  f'(--resume would have continued it)')
        out_dir.mkdir(parents=True, exist_ok=True)
        claim = lock(out_dir)
        text = json.dumps(config, indent=1)
        atomic_write(out_dir / 'config.json', lambda f: f.write(text.encode('utf-8')))
        return claim
    except OSError as e:
        raise UserError(f'cannot write to {out_dir}: {e.strerror}; '
                        f'choose another place with --out_dir=…') from None


class RunLog:
    """log.csv of a run, with a row per evaluation, and loss.png, which is drawn from it."""
    COLUMNS = ('step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'lr', 'grad_norm',
               'tokens_per_s')

    def __init__(self, folder, last_step):
        """Rows that are there already are kept up to last_step: a resumed run writes the rest
        anew."""
        self.folder = folder
        self.rows = []
        with suppress(OSError, ValueError, csv.Error):  # up to where the file is damaged
            text = (folder / 'log.csv').read_text(encoding='utf-8', errors='replace')
            reader = csv.reader(text.splitlines())
            next(reader, None)  # the header
            for row in reader:
                numbers = [float(cell) for cell in row]
                if len(numbers) == len(self.COLUMNS) and int(row[0]) <= last_step:
                    self.rows.append(row)

    def add(self, state, seconds, train_loss, lr, tokens_per_second):
        """Remember an evaluation. state: the TrainState after it."""
        self.rows.append([
            state.step, state.tokens, f'{seconds:.2f}', f'{train_loss:.5f}',
            f'{state.val_loss:.5f}', f'{lr:.3e}', f'{state.grad_norm:.4f}',
            f'{tokens_per_second:.0f}',
        ])

    def losses(self):
        """[(train loss, val loss)] of all evaluations, as log.csv has them."""
        train = self.COLUMNS.index('train_loss')
        val = self.COLUMNS.index('val_loss')
        return [(float(row[train]), float(row[val])) for row in self.rows]

    def write(self):
        """Write log.csv."""
        lines = [','.join(map(str, row)) for row in [self.COLUMNS, *self.rows]]
        text = '\n'.join(lines) + '\n'
        atomic_write(self.folder / 'log.csv', lambda f: f.write(text.encode('utf-8')))

    def draw(self):
        """Draw loss.png if there is a curve to see. No picture is worth a run: errors are
        printed."""
        if len(self.rows) < 2:
            return
        try:
            plot.draw([plot.read(self.folder)], self.folder / 'loss.png')
        except Exception as e:  # of a library, too
            print(f'no loss.png: {e}')


# --------------------------------------------------------------------------------------------------
# Signals, and what processes have to agree on


LOST_OUTPUT = 'lost output'  # nobody reads what we print, or the disk that it goes to is full
LOST_DATA = 'lost data'  # somebody has written into the dataset


class StopSignals:
    """On Ctrl-C, SIGTERM or a closed terminal: finish the step, save, and exit.

    Two more events are treated as signals: LOST_OUTPUT and LOST_DATA. received: the name of the
    signal that this process got. agreed: one that all processes know of; the loop acts on that
    alone, so that all of them stop at the same step. problem: a sentence for stderr, or None.
    """

    def __init__(self):
        self.names = ['SIGINT', 'SIGTERM']
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            self.names.append('SIGHUP')  # the terminal was closed; left ignored under nohup
        self.received = None
        self.received_at = None
        self.agreed = None
        self.problem = None

    def install(self):
        """Take over the signals. Returns self."""
        for name in self.names:
            signal.signal(getattr(signal, name), self.handle)
        self.names += [LOST_OUTPUT, LOST_DATA]
        if isinstance(sys.stdout, Output):
            sys.stdout.on_failure = self.handle_lost_output
        return self

    def handle_lost_output(self, error):
        """Save, whatever happens to what we print: as if the terminal had been closed."""
        self.received = self.received or LOST_OUTPUT
        if not error.is_pipe:  # whoever has closed a pipe wants no more of us
            self.problem = str(error)

    def handle_lost_data(self, error):
        """The data of a step can't be read: this step is not done, and no other."""
        self.received = self.agreed = LOST_DATA
        self.problem = str(error)

    def handle_damaged_data(self, error):
        """The data turns out to be damaged, which may be known to this process alone."""
        self.received = self.received or LOST_DATA
        self.problem = str(error)

    def handle(self, number, frame):
        """The first signal asks for a stop, the second stops at once.

        A repeat within a second doesn't count: torchrun forwards a signal that we also got
        directly.
        """
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
        elif now > self.received_at + 1:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def exit_status(self):
        """128 plus the number of the signal, the convention of shells; else 1."""
        if self.agreed in (LOST_OUTPUT, LOST_DATA):
            return 1
        return 128 + getattr(signal, self.agreed)

    def report(self, step, arguments):
        """Say why the run stops here, and how it would continue. arguments: it was started with."""
        what_next = f'resume with: {resume_command(arguments)}'
        if self.problem:
            print(f'train.py: {self.problem}; saved at step {step}; {what_next}', file=sys.stderr)
        else:
            print(f'stopped by {self.agreed} at step {step}; {what_next}', flush=True)


def verify_in_background(splits, signals):
    """Check large files while training has begun: if one is damaged, the run saves and stops.

    One process does it for all.
    """
    def verify():
        for split in splits:
            try:
                split.verify()
            except UserError as e:
                signals.handle_damaged_data(e)

    if distributed.master_process:
        threading.Thread(target=verify, daemon=True).start()  # daemon: our end does not wait for it


def synchronize(signals, seconds, loss=0.0):
    """Sum a loss over processes and spread stop signals, in one all-reduce.

    Returns (summed loss, the master process's seconds), and sets signals.agreed once any process
    has received a signal.
    """
    # Sum over processes. Only the master process contributes its seconds
    if not distributed.master_process:
        seconds = 0.0
    flags = [signals.received == name for name in signals.names]
    total_loss, master_seconds, *counts = distributed.all_reduce_sum(loss, seconds, *flags)

    # A signal that any process has received stops all of them
    for name, count in zip(signals.names, counts):
        if count > 0 and signals.agreed is None:
            signals.agreed = name
    return total_loss, master_seconds


def seed_step(seed, step):
    """Seed the dropout of a step from (seed, step, rank) alone."""
    # The factors keep the numbers of different seeds, steps and ranks apart
    number = seed * 1_000_003 + step + distributed.rank * 7_919_000_021
    torch.manual_seed(number % 2**63)


def share_of_time_left(max_minutes, seconds, eval_seconds):
    """The fraction of --max_minutes that is left, from 1 to 0; None without that option.

    eval_seconds: time to reserve for the final evaluation.
    """
    if max_minutes is None:
        return None
    budget = max(1.0, 60 * max_minutes - eval_seconds)
    return max(0.0, 1 - seconds / budget)


# --------------------------------------------------------------------------------------------------
# Set-up


def load_pretrained(name, config, explicit):
    """(model, its tokenizer) with weights that are there already: of a run of ours, by its folder
    or checkpoint, or other people's, by a public name or a folder (see pocket/pretrained.py).

    Its shape is its own. What options may change are dropout, gradient checkpointing and, if it is
    typed, a smaller block_size. One process downloads, the others wait. Raises UserError.
    """
    overrides = {option: config[option] for option in CHANGEABLE_IN_MODEL}
    if 'block_size' in explicit:
        overrides['block_size'] = config['block_size']
    arch = 'gpt'
    with distributed.master_first():
        run = find_run(name)
        if run is not None:
            model, tok, arch = load_run(run, overrides)
        else:
            from pocket import pretrained
            model, _ = pretrained.load(name, **overrides)
            tok = pretrained.load_tokenizer(name)
    if arch != config['arch'] and ('arch' in explicit or run is None):
        raise UserError(f'--init_from={name} is a {arch}: omit --arch={config["arch"]}')
    wrong = [option for option in model_options(config | {'arch': arch})
             if option in explicit and config[option] != getattr(model.config, option)]
    if wrong:
        raise UserError(f'{name} has a shape of its own: omit {", ".join(wrong)}')
    return model, tok


def load_run(path, overrides):
    """(model, its tokenizer, its arch) of a checkpoint of ours, to be trained on other data."""
    state = checkpoint.load(path)
    saved = state['model_args']
    block_size = overrides.get('block_size', saved['block_size'])
    if block_size > saved['block_size']:
        raise UserError(f'{path} has a block_size of {saved["block_size"]}, too small for '
                        f'--block_size={block_size}')
    if block_size < saved['block_size'] and saved['pos'] == 'learned':
        raise UserError(f'{path} has learned {saved["block_size"]} positions: omit --block_size')
    model, tok = checkpoint.build(state, path, **overrides)
    return model, tok, state['kind']


def take_shape(config, model):
    """config, with the shape of a pretrained model in the place of the options for one."""
    config = config | {'arch': 'seq2seq' if model.is_encoder_decoder else 'gpt'}
    return config | {option: getattr(model.config, option) for option in model_options(config)}


def fit_vocabulary(model, model_tok, name, tok, data_folder):
    """Make room in a pretrained model for the special tokens that only a dataset has.

    Raises UserError if the dataset was prepared with another tokenizer than the model's.
    """
    if tok.tokens[:len(model_tok.tokens)] != model_tok.tokens:
        theirs = 'gpt2' if model_tok.kind == 'tiktoken' else name
        raise UserError(f'{data_folder} has another tokenizer than {name}: prepare it with '
                        f'--tokenizer={theirs}')
    config = model.config
    if tok.vocab_size > config.vocab_size:
        if model.is_encoder_decoder or config.cutoffs or config.head_bias:
            raise UserError(f'{data_folder} has special tokens that {name} lacks, and it has no '
                            f'room for more: prepare it with --tokenizer={name}')
        from pocket import pretrained
        pretrained.resize_token_embeddings(model, tok, model_tok, data_folder)


def checked(config):
    """A model's config, once it is sure that it makes sense. Raises UserError.

    Options alone can't tell whether the cutoffs of adaptive softmax exceed the vocabulary.
    """
    try:
        check_config(config)
        return config
    except ValueError as e:
        raise UserError(str(e)) from None


def encode_sample_start(tok, text):
    """The ids that samples begin with. Raises UserError if the tokenizer does not know them."""
    try:
        return tok.encode_prompt(text)
    except UnknownCharacters as e:
        raise UserError(f'--sample_start: {e}') from None


def rank_ids_by_frequency(model, train_data):
    """Tell an adaptive softmax which ids are frequent, and which rare."""
    counts = torch.from_numpy(train_data.token_counts())
    order = counts.argsort(descending=True, stable=True)
    model.lm_head.rank[order] = torch.arange(len(order))


def compile_or_stay_eager(model, mode, device, try_step):
    """(model, description): compiled by torch.compile if mode asks for it and it works here.

    mode: True, False, or 'auto' for CUDA only. A CPU always stays eager, even with True:
    pocket/fused.py has already fused there what a compiler would. try_step(model): a forward
    and backward pass, at which compilation happens; if it fails there, training can still run
    eager.
    """
    if mode is False:
        return model, 'eager'
    if device.type == 'cpu' and fused.is_available():
        return model, 'eager (operations between the matrix products run in C)'
    if device.type == 'cpu':
        return model, 'eager (a C compiler with OpenMP, such as gcc, would make it faster)'
    if mode == 'auto' and device.type != 'cuda':
        return model, 'eager (--compile tries torch.compile)'
    print('compiling the model …', flush=True)
    try:
        compiled = torch.compile(model)
        try_step(compiled)
        return compiled, 'compiled'
    except UserError:  # of the data: it is no fault of the compiler
        raise
    except Exception as e:
        if any(phrase in str(e).lower() for phrase in OUT_OF_MEMORY):
            raise  # without compiling it would take more
        if mode is True:
            reason = f'{type(e).__name__}: {e}'.splitlines()[0][:200]
            raise UserError(f'--compile does not work here ({reason}); omit it') from None
        return model, f'eager (compiling failed: {type(e).__name__})'
    finally:
        model.zero_grad(set_to_none=True)


def largest_micro_batch(config, train_data):
    """Tokens of the largest micro-batch of one process."""
    if isinstance(train_data, Buckets):
        return config['batch_tokens']
    rows = config['batch_size'] * config['gradient_accumulation_steps']
    rows_per_rank = math.ceil(rows / distributed.world_size)
    return min(config['batch_size'], rows_per_rank) * config['block_size']


def describe_run(model, matrices, others, train_data, config, device, amp_dtype):
    """Two lines: how large the model is and how much memory it needs, and what it is trained on."""
    parts = memory.estimate(
        model.config, sum(p.numel() for p in others), sum(p.numel() for p in matrices),
        largest_micro_batch(config, train_data), amp_dtype, device.type, distributed.world_size)
    return (f'model: {model.num_params() / 1e6:.2f} M parameters, {memory.format_estimate(parts)}\n'
            f'data: {describe_data(train_data, config)}')


def describe_data(train_data, config):
    """How much there is to train on, and how much of it a step takes."""
    if isinstance(train_data, Pairs):
        cut_sources, cut_targets = train_data.truncated
        text = (f'{len(train_data.source_lengths):,} training pairs, {train_data.padding:.1%} '
                f'padding; {cut_sources:,} sources and {cut_targets:,} targets truncated')
    elif isinstance(train_data, Chats):
        text = (f'{len(train_data.lengths):,} training conversations, {train_data.num_targets:,} '
                f'tokens of replies in them, {train_data.padding:.1%} padding; '
                f'{train_data.truncated:,} shortened to their newest turns')
    else:
        windows = config['batch_size'] * config['gradient_accumulation_steps']
        text = (f'{train_data.num_tokens:,} training tokens, '
                f'{windows * config["block_size"]:,} tokens per step')
    if distributed.world_size > 1:
        text += f', shared by {distributed.world_size} processes'
    return text


def describe_goal(state, config, out_dir, epochs):
    """Where a run stands and how far it goes; with advice if its text is too little for that."""
    goal = f'{config["max_iters"]}'
    if config['max_minutes'] is not None:
        goal = f'what fits into {config["max_minutes"]:g} minutes'
    text = f'step {state.step} of {goal}; checkpoints go to {out_dir}'
    if patience_is_over(config, state):
        text += f'; {describe_patience(state, config)}'
    elif config['max_minutes'] is None and state.step >= config['max_iters']:
        text += f'; that is all of it: --max_iters={2 * state.step} would continue'
    advice = advise_before(epochs, config)
    if advice:
        text = f'advice: {advice}\n{text}'
    return text


def patience_is_over(config, state):
    """Whether --patience ends the run: so many evaluations in a row were not better."""
    return 0 < config['patience'] <= state.bad_evals


def describe_patience(state, config):
    """Why a run has ended before its length, and what would continue it."""
    score = 'BLEU' if config['best_by'] == 'bleu' else 'val'
    return (f'{score} has not improved for {state.bad_evals} evaluations, so --patience ends the '
            f'run; --resume --patience={2 * state.bad_evals} would continue it')


def sample_command(out_dir):
    """The command that chats with the trained model."""
    script = shlex.quote(str(short_path(ROOT / 'sample.py')))
    return f'python {script} --out_dir={shlex.quote(str(out_dir))} --chat'


def resume_command(arguments):
    """The command that continues a run that was started with these arguments."""
    typed = shlex.join(argument for argument in arguments if argument != '--resume')
    return f'{distributed.launcher} train.py {typed} --resume'


# --------------------------------------------------------------------------------------------------
# Advice

# Passes over a text of one's own. Measured with the default model and the first 100,000 characters
# of Shakespeare: val 3.05 at the end of 4 passes; of 8, val is lowest after 3 with 3.13 and ends at
# 3.69. (Large models: Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264)
EPOCHS_OF_OWN_TEXT = 5
FEWEST_STEPS = 60  # for very little text: room for a warmup; patience may end the run before


def settle_length(config, explicit, meta, train_data, is_new):
    """The options, with max_iters as the number of steps that this run has.

    is_new: whether the run begins now, and so may still be made to suit a small text.
    """
    if is_new:
        config = suit_length_to_text(config, explicit, meta, train_data)
    if config['max_epochs'] is None:
        return config
    accumulation = config['gradient_accumulation_steps']
    return config | {'max_iters': train_data.steps_for(config['max_epochs'], accumulation)}


def suit_length_to_text(config, explicit, meta, train_data):
    """The options, with a length that suits the user's own text if it is small; says so.

    The default length is for much text: with a few pages, it is a hundred passes over them, and the
    model is best long before the end. A length that the user chose stays.
    """
    lengths = ('max_iters', 'max_epochs', 'max_minutes')
    if 'prepared_by' not in meta or any(name in explicit for name in lengths):
        return config
    steps = train_data.steps_for(EPOCHS_OF_OWN_TEXT, config['gradient_accumulation_steps'])
    steps = max(steps, FEWEST_STEPS)
    if steps >= config['max_iters']:
        return config

    config = config | {'max_iters': steps}
    if 'eval_interval' not in explicit:
        config['eval_interval'] = max(1, steps // 10)
    if 'patience' not in explicit:
        config['patience'] = 3
    print(f'this is little text, so the run is {steps} steps long and ends early once val has not '
          f'fallen for {config["patience"]} evaluations (--max_iters=… sets another length)')
    return config


def advise_before(epochs, config):
    """Advice before a run starts, or None. epochs: passes over the training data."""
    nothing_ends_it_early = config['max_minutes'] is None and config['patience'] == 0
    if epochs > 20 and nothing_ends_it_early and config['dropout'] < 0.1:
        return (f'the dataset is small, and each token will be seen {epochs:.0f} times: more text, '
                f'fewer steps or --dropout=0.2 limit memorization')
    return None


def advise(losses, state, config, vocab_size):
    """Advice for a run that goes wrong, as an evaluation shows it; None if it does not.

    losses: [(train loss, val loss)] of all evaluations so far, this one included.
    """
    train_loss, _ = losses[-1]
    chance_level = math.log(vocab_size)
    if train_loss > 0.95 * chance_level and state.step >= 2 * config['warmup_iters']:
        return ('the loss is still at chance level: the learning rates are far too low or too '
                'high; the defaults of train.py are --learning_rate=1e-2 --muon_lr=0.015')
    return advise_on_memorizing(losses, config)


def advise_on_memorizing(losses, config):
    """Advice at the first evaluation where val has risen while train has fallen; None before it and
    after it.

    losses: [(train loss, val loss)] of all evaluations so far, this one included.
    """
    # Give this advice only once, at the first evaluation that shows it
    counts = range(2, len(losses) + 1)
    showing = [count for count in counts if has_begun_to_memorize(losses[:count])]
    if showing != [len(losses)]:
        return None

    dropout = max(0.2, config['dropout'] + 0.1)
    patience = ''
    if not config['patience']:
        patience = '--patience=2 ends a run soon after it; '
    return ('val has risen while train has fallen: the model is memorizing its text. best.pt keeps '
            f'the best; {patience}more text, a smaller model or --dropout={dropout:.1g} help')


def has_begun_to_memorize(losses):
    """Whether val rose at the last evaluation while train fell, below the best val so far."""
    train_before, val_before = losses[-2]
    train, val = losses[-1]
    best_val = min(earlier_val for _, earlier_val in losses[:-1])
    return val > val_before and train < train_before and train < best_val


def check_finite(name, value, lr, state, log):
    """Raise UserError if a loss or gradient is no longer a number: the run has diverged.

    Nothing after that is worth saving; the curve up to there is drawn.
    """
    if math.isfinite(value):
        return
    if distributed.master_process:
        log.draw()
    kept = 'there is no checkpoint yet'
    if state.evaluated:
        kept = f'the checkpoints in {log.folder} are from before this'
    raise UserError(f'training diverged at step {state.step} ({name} {value}, learning rate '
                    f'{lr:.3e}): lower --learning_rate and --muon_lr or raise --warmup_iters; '
                    f'{kept}')
