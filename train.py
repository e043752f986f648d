"""
Train a GPT or an encoder-decoder on a dataset of data/NAME, on whatever this machine has.

    python train.py                                                  little over a minute on two CPU cores, no download
    python train.py config/shakespeare_char.py --dropout=0.1         a config file, then overrides
    python train.py config/shakespeare_char.py --resume              goes on where it stopped, to the bit
    torchrun --standalone --nproc_per_node=8 train.py config/…       on eight GPUs, or processes: the same steps, shared out
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import find_path

# Where things are
out_dir: str | None = None         # checkpoints, log.csv, loss.png (None: out/ and the name of the config file or dataset)
data_dir: str | None = None        # where datasets live (None: data/ beside this file)
dataset = 'stdlib'                 # data/NAME; where it is missing, prepare/NAME.py is run
init_from = 'scratch'              # or resume (out_dir/last.pt), a public GPT-2 (gpt2, gpt2-medium, …), or a folder with one
resume = False                     # the same as --init_from=resume
# Model: see GPTConfig and Seq2SeqConfig in model.py
arch: Literal['gpt', 'seq2seq'] = 'gpt'  # gpt: decoder-only; seq2seq: encoder-decoder, for datasets of pairs
block_size = 128                   # tokens of context; of a seq2seq's targets
src_block_size: int | None = None  # of a seq2seq's sources (None: as block_size)
n_layer = 3                        # of a seq2seq: in the decoder
n_encoder_layer: int | None = None  # in its encoder (None: as n_layer)
n_head = 2
n_embd = 160
n_inner: int | None = None         # width of the MLP's hidden layer (None: 4 * n_embd)
dropout = 0.0                      # on what blocks add to the residual stream; for long runs on little text: 0.1 to 0.2
attn_dropout = 0.0                 # on attention weights
bias = False                       # biases in Linear and LayerNorm
attn_bias: bool | None = None      # in the projections of attention (None: as bias)
head_bias = False                  # in the head
pos: Literal['learned', 'sinusoidal', 'rotary'] = 'rotary'
norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'
norm_position: Literal['pre', 'post'] = 'pre'
act: Literal['gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'] = 'relu2'
qk_norm = True                     # normalise queries and keys in each head
token_shift = True                 # attention and MLP read half of their channels from the token before
tie_weights = False                # the head shares the token embedding
tie_source = True                  # a seq2seq's source and target share theirs
init: Literal['gpt2', 'xavier'] = 'gpt2'  # initial weights
zero_init = True                   # projections into the residual stream start at zero
softcap = 0.0                      # bound logits to ± this (0: off)
cutoffs: tuple[int, ...] = ()      # adaptive softmax, for large vocabularies: --cutoffs=2000,10000 makes three clusters
div_value = 4.0                    # … each cluster is that much narrower than the one before
gradient_checkpointing = False     # recompute blocks in the backward pass: less memory, about a third more time
# Batches and length
batch_size = 16                    # windows of a stream in a micro-batch
batch_tokens = 4096                # of a dataset of pairs: sources and targets in a micro-batch, padding included
gradient_accumulation_steps = 1    # micro-batches a step
max_iters = 800                    # steps in all …
max_epochs: float | None = None    # … or so many times the whole dataset …
max_minutes: float | None = None   # … or as fit into so much time: the rates fall with the clock, so no two runs are alike
seed = 1337                        # of initial weights, order of data, dropout
# Optimizer
optimizer: Literal['muon', 'adamw'] = 'muon'  # muon: for the matrices in the blocks, AdamW for the rest
learning_rate = 1e-2               # of AdamW, at its peak
muon_lr = 0.015                    # of Muon, at its peak
muon_momentum = 0.9
weight_decay = 0.1                 # on matrices, not on norms and biases
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0                    # largest norm of the gradient (0: no limit)
label_smoothing = 0.0              # in training only; validation never has it
schedule: Literal['linear', 'cosine', 'constant'] = 'linear'  # from the peak to min_lr, after the warm-up
warmup_iters = 20
lr_decay_iters: int | None = None  # the step at which min_lr is reached (None: max_iters)
min_lr = 0.0                       # of learning_rate; Muon's falls in proportion
# Evaluation
eval_interval = 200                # steps between evaluations (0: once an epoch); each passes over all of val, and saves last.pt
eval_only = False                  # evaluate out_dir/best.pt and stop
eval_split: Literal['val', 'test', 'train'] = 'val'  # … on this
eval_replies = 200                 # … and, for pairs, compare so many replies with those of people: BLEU, chrF (0: none)
num_beams = 1                      # … written greedily, or by beam search
eval_protocol: Literal['tokens', 'smoothed_batch_mean'] = 'tokens'  # … the latter as some published runs count: see scores.py
patience = 0                       # stop after so many evaluations without a better one (0: never)
log_interval = 50                  # steps between lines
sample_tokens = 0                  # length of a sample after each evaluation (there is always one at the end)
sample_start = ''                  # what samples begin with
# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; weights are always float32
compile: bool | Literal['auto'] = 'auto'  # torch.compile; auto: on CUDA, where its start-up is soon repaid
config, explicit = configure(__file__, globals())

# ----------------------------------------------------------------------------------------------------------------------
# set-up: everything that can be wrong is found before the first step

import csv  # after configure(), so that --help and typing errors are answered at once
import json
import math
import shlex
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch

from pocket import checkpoint, distributed, memory, plot
from pocket import tokenizer as tokenizers
from pocket.configurator import convert, describe, read_options
from pocket.data import Pairs, Stream, ensure_prepared, load_meta
from pocket.device import autocast, peak_memory, pick_device, pick_dtype
from pocket.distributed import master_process, rank, world_size
from pocket.evaluate import evaluate, generate_replies, score_replies, smoothed_batch_mean, to_device
from pocket.files import ROOT, atomic_write, back_up, lock, short_path
from pocket.optim import Muon
from pocket.template import PLAIN_TEMPLATE, reply_start_ids

resume = resume or init_from == 'resume'
configs = [Path(a).stem for a in sys.argv[1:] if not a.startswith('--')]
run_name = configs[-1] if configs else dataset
out_dir = short_path(ROOT / 'out' / run_name if out_dir is None else find_path(out_dir) if resume or eval_only else out_dir)

state, pretrained, path = None, None, init_from
if resume or eval_only and init_from == 'scratch':
    path = out_dir / ('best.pt' if eval_only or not (out_dir / 'last.pt').is_file() else 'last.pt')  # best.pt is written first
    if not path.is_file():
        raise UserError(f'there is no checkpoint in {out_dir} to {"evaluate" if eval_only else "go on from"}: name the run with '
                        '--out_dir=…' + ('' if eval_only else ', or leave --resume away to start anew'))
    state = checkpoint.load(path)
    if resume and 'optimizers' not in state:
        raise UserError(f'{path} was exported, without the optimizer\'s state that --resume needs: evaluate it with --eval_only')
    fields = checkpoint.KINDS['seq2seq'][1].__dataclass_fields__.items()  # switches that are younger than the run were off in it
    saved = {name: field.default for name, field in fields if name in config} | state['config'] | state['model_args']
    kinds, changed, refused = {name: kind for name, kind, _ in read_options(Path(__file__).read_text(encoding='utf-8'))}, [], []
    for key in config.keys() & saved.keys():
        try:
            saved[key] = convert(saved[key], kinds[key])
        except (ValueError, OverflowError):
            raise UserError(f'{path} is damaged: its {key} should be {describe(kinds[key])}') from None
    here = {'out_dir', 'init_from', 'resume', 'eval_only', 'eval_split', 'eval_replies', 'num_beams', 'eval_protocol'}
    for key in sorted(config.keys() & saved.keys() - here):  # what is asked for here and now is not the run's
        now = globals()[key]
        if explicit.get(key) != 'command line':  # a run goes on as it was, unless it is told otherwise here and now
            globals()[key] = saved[key]
            if resume and key in explicit and now != saved[key]:
                print(f'{explicit[key]} says {key}={now}, the run was started with {saved[key]}: kept; --{key}={now} changes it')
        elif now != saved[key] and key != 'data_dir':
            free = {'dropout', 'attn_dropout', 'gradient_checkpointing'}
            fixed = key in {'arch', 'dataset', 'optimizer', *state['model_args']} - free
            (refused if fixed else changed).append(f'{key} {saved[key]} -> {now}')
    if refused:
        raise UserError(f'a run can\'t go on with another {", ".join(refused)}: '
                        f'leave that away, or start a new run with another --out_dir')
    if changed:
        print(f'changed since {path} was written: {", ".join(changed)}; the run goes on, but not as it would have')

problems = []
for name in ('max_iters', 'batch_size', 'batch_tokens', 'gradient_accumulation_steps', 'log_interval', 'num_beams'):
    if globals()[name] < 1:
        problems.append(f'{name} must be at least 1, got {globals()[name]}')
for name in ('seed', 'patience', 'eval_interval', 'eval_replies', 'warmup_iters', 'learning_rate', 'muon_lr', 'min_lr',
             'weight_decay', 'grad_clip'):
    if not globals()[name] >= 0:
        problems.append(f'{name} must be at least 0, got {globals()[name]}')
for name in ('beta1', 'beta2', 'muon_momentum', 'label_smoothing'):
    if not 0 <= globals()[name] < 1:
        problems.append(f'{name} must be from 0 to below 1, got {globals()[name]}')
lengths = ('max_iters', 'max_epochs', 'max_minutes')  # how long to train: one of them counts
for name in lengths[1:]:
    if globals()[name] is not None and not globals()[name] > 0:
        problems.append(f'{name} must be above 0 or None, got {globals()[name]}')
typed = [name for name in lengths if explicit.get(name) == 'command line' and globals()[name] is not None]
if len(typed) > 1:
    problems.append(f'{" and ".join(typed)} both say how long to train: give one of them')
if typed:  # what is typed here and now counts, whatever a config file says
    globals().update({name: None for name in lengths[1:] if name != typed[0]})
if label_smoothing and cutoffs:
    problems.append('adaptive softmax (cutoffs) can\'t do label_smoothing: switch one of the two off')
Model, Config = checkpoint.KINDS[arch]
model_args = {name: globals()[name] for name in Config.__dataclass_fields__ if name in config}
try:
    Config(vocab_size=2**62, **model_args)
except ValueError as e:
    problems.append(str(e))
if problems:
    raise UserError('; '.join(problems))
where = distributed.init(pick_device(device))
precision, why = pick_dtype(where, dtype)
if state is None and init_from != 'scratch':
    from pocket import pretrained
    if arch != 'gpt':
        raise UserError(f'--init_from={init_from} is a GPT: leave --arch={arch} away')
    asked = {name: globals()[name] for name in ('dropout', 'attn_dropout', 'gradient_checkpointing')}
    asked |= {'block_size': block_size} if 'block_size' in explicit else {}
    with distributed.master_first():  # one of us downloads
        pretrained, theirs = pretrained.load(init_from, **asked)
    if wrong := [name for name in model_args if name in explicit and globals()[name] != theirs[name]]:
        raise UserError(f'{init_from} has a shape of its own: leave {", ".join(wrong)} away')
    model_args = {name: theirs[name] for name in model_args}
    globals().update(model_args)

with distributed.master_first():
    folder = ensure_prepared(dataset, short_path(data_dir or ROOT / 'data'), make=master_process)
meta = load_meta(folder)
try:
    tok = tokenizers.tokenizer_from_dict(meta['tokenizer'])
    if tok.vocab_size != meta['vocab_size']:
        raise ValueError(f'vocab_size is {meta["vocab_size"]}, but the tokenizer has {tok.vocab_size}')
except UserError:  # an encoding that has to be downloaded
    raise
except ValueError as e:
    raise UserError(f'{folder / "meta.json"}: {e}; prepare the dataset again') from None
if state is not None and state['tokenizer'] != tok.to_dict():
    raise UserError(f'the tokenizer of {path} is not that of {folder}: '
                    f'start a new run with another --out_dir, or restore the dataset')


def open_split(split):
    """One split of the dataset, as this model reads it."""
    if meta['kind'] == 'pairs':
        source = (src_block_size or block_size) if arch == 'seq2seq' else None
        return Pairs(folder, meta, split, reply_start_ids(tok, style), block_size, source, batch_tokens)
    return Stream(folder, meta, split, block_size, batch_size)


pairs = meta['kind'] == 'pairs'
style = meta.get('chat', PLAIN_TEMPLATE) if pairs else None  # how conversations are written
if arch == 'seq2seq' and not pairs:
    raise UserError(f'{folder} is one stream of text, but an encoder-decoder learns from pairs: train a GPT on it (--arch=gpt, '
                    f'or config/shakespeare_char.py), or take a dataset of pairs (config/office_encdec.py)')
unused = 'batch_size' if pairs else 'batch_tokens'
if unused in explicit and state is None:
    raise UserError(f'{unused} ({explicit[unused]}) means nothing for {folder}, which holds {"pairs" if pairs else "a stream"}: '
                    f'set --{"batch_tokens" if pairs else "batch_size"} instead')
if eval_split not in meta['counts']:
    raise UserError(f'{folder} has no {eval_split} split: it has {", ".join(meta["counts"])}')
if pretrained:
    pretrained.resize_token_embeddings(pretrained, tok, pretrained.load_tokenizer(init_from), folder)
train_data, val_data = open_split('train'), open_split(eval_split if eval_only else 'val')
if max_epochs is not None:
    max_iters = train_data.steps_for(max_epochs, gradient_accumulation_steps)
eval_interval = eval_interval or train_data.steps_for(1, gradient_accumulation_steps)
val_bytes = val_data.count_bytes(tok.byte_lengths())
try:
    first_ids = tok.encode_prompt(sample_start)
except tokenizers.UnknownCharacters as e:
    raise UserError(f'--sample_start: {e}') from None

saved_config = {key: globals()[key] for key in config} | {'out_dir': str(out_dir)}
saved_config['data_dir'] = data_dir and str(folder.parent.resolve())  # the default stays so: a checkout may move
if master_process and not eval_only:
    try:
        if state is None and any((out_dir / name).is_file() for name in ('best.pt', 'last.pt')):  # nobody's work is overwritten
            aside = back_up(out_dir)
            print(f'{out_dir} held a run: it is now {short_path(aside)} (--resume would have gone on with it)')
        out_dir.mkdir(parents=True, exist_ok=True)
        claim = lock(out_dir)
        atomic_write(out_dir / 'config.json', lambda f: f.write(json.dumps(saved_config, indent=1).encode('utf-8')))
    except OSError as e:
        raise UserError(f'cannot write to {out_dir}: {e.strerror}; choose another place with --out_dir=…') from None

torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')  # TF32 on CUDA, where float32 products are left
try:
    raw_model = model = pretrained or Model(Config(vocab_size=meta['vocab_size'], **model_args))
except ValueError as e:  # cutoffs beyond the vocabulary
    raise UserError(str(e)) from None
if cutoffs and state is None:  # its clusters are of frequent and of rare ids: count them
    order = torch.from_numpy(train_data.token_counts()).argsort(descending=True, stable=True)
    raw_model.lm_head.rank[order] = torch.arange(len(order))
model.to(where)
matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and '.h.' in name] if optimizer == 'muon' else []
others = [p for p in model.parameters() if all(p is not m for m in matrices)]
optimizers = [torch.optim.AdamW([{'params': [p for p in others if p.ndim >= 2], 'weight_decay': weight_decay},
                                 {'params': [p for p in others if p.ndim < 2], 'weight_decay': 0.0}],
                                lr=learning_rate, betas=(beta1, beta2), fused=True)]
if matrices:
    optimizers.append(Muon(matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay,
                           dtype=torch.float32 if where.type == 'cpu' and precision == torch.float32 else torch.bfloat16))
peaks = [[group['lr'] for group in o.param_groups] for o in optimizers]  # each rate is its peak times lr_factor(step)
scaler = torch.amp.GradScaler(where.type, enabled=precision == torch.float16)

# How far the run is; all of it is in each checkpoint
progress = {'step': 0, 'tokens': 0, 'seconds': 0.0, 'best': math.inf, 'val_loss': math.inf, 'bad_evals': 0, 'evaluated': 0,
            'loss_sum': 0.0, 'loss_tokens': 0, 'grad_norm': 0.0}
if state is not None:
    try:
        model.load_state_dict(state['model'])
        progress = {key: state.get(key, 0) if key == 'tokens' else state[key] for key in progress}  # (older files have none)
        if resume:
            for o, saved in zip(optimizers, state['optimizers'], strict=True):
                checkpoint.check_optimizer(saved, o)
                settings = [{k: v for k, v in group.items() if k not in ('params', 'lr')} for group in o.param_groups]
                o.load_state_dict(saved)
                for group, now in zip(o.param_groups, settings):
                    group.update(now)  # betas, weight decay … are those of today's knobs, not of the file
            scaler.load_state_dict(state['scaler'])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f'{path} does not fit this model and optimizer: {str(e).splitlines()[-1].strip()}') from None
    del state


def forward(batch):
    """Summed loss of a batch that lies on the CPU, computed on the device."""
    with autocast(where, precision):
        return model(**to_device(batch, where), label_smoothing=label_smoothing, reduction='sum')[1]


engine = 'eager'
if compile is True or compile == 'auto' and where.type == 'cuda':
    model, engine = torch.compile(model), 'compiled'
    try:  # it compiles at the first call: do that here, where going without is still easy
        forward(next(train_data.batches(seed, 0, gradient_accumulation_steps, rank, world_size))).backward()
    except Exception as e:
        if compile is True:
            said = f'{type(e).__name__}: {e}'.splitlines()[0][:200]
            raise UserError(f'--compile does not work here ({said}); leave it away') from None
        model, engine = raw_model, f'eager (compiling failed: {type(e).__name__})'
    raw_model.zero_grad(set_to_none=True)
elif compile == 'auto':
    engine = f'eager (compiling pays late on {where.type}; --compile tries it)'


model = distributed.wrap_model(model, some_unused=bool(cutoffs))

most = batch_tokens if pairs else min(batch_size, -(-batch_size * gradient_accumulation_steps // world_size)) * block_size
needs = memory.estimate(raw_model.config, sum(p.numel() for p in others), sum(p.numel() for p in matrices), most, precision,
                        where.type, world_size)
size = (f'{len(train_data.source_lengths):,} pairs to learn from, {train_data.padding:.1%} padding, {train_data.truncated[0]:,} sources and '
        f'{train_data.truncated[1]:,} targets cut to fit' if pairs else
        f'{batch_size * gradient_accumulation_steps * block_size:,} tokens a step, {train_data.num_tokens:,} to learn from')
size += f', shared out to {world_size} processes' * (world_size > 1)
print(f'{raw_model.num_params() / 1e6:.2f} M parameters, {size}; {where} in {str(precision).removeprefix("torch.")} ({why}), '
      f'{engine}; {memory.in_words(needs)}', flush=True)
passes = max_iters / train_data.steps_for(1, gradient_accumulation_steps)
if passes > 20 and max_minutes is None and dropout < 0.1 and not eval_only:
    print(f'advice: this is little text, each token will be seen {passes:.0f} times: more of it, fewer steps or --dropout=0.2 '
          f'keep the model from learning it by heart')

# ----------------------------------------------------------------------------------------------------------------------
# evaluation, samples, files

SIGNALS = ['SIGINT', 'SIGTERM']
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
    SIGNALS.append('SIGHUP')  # the terminal has gone; under nohup that is ignored
stop = stop_time = None  # the name of the signal that asked us, or another process, to stop; when we got the first


def in_words(loss):
    """A loss in nats a token, with what else people call it."""
    bits = loss / math.log(2) * val_data.num_targets / val_bytes if val_bytes else math.nan
    return f'{loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f}, {bits:.3f} bits a byte)'


def write_sample(n):
    """Print n tokens that the model writes now; of pairs, three replies."""
    raw_model.eval()
    how = {'seed': seed, 'temperature': 0.8, 'top_k': 200}
    if pairs:
        replies = generate_replies(raw_model, tok, style, val_data, 3, min(n, 60), **how)
        text = '\n'.join(f'{source}\n  -> {reply}' for source, _, reply in replies)
    else:
        text = tok.decode(raw_model.generate([first_ids], n, eot=tok.eos_id, **how)[0])
    raw_model.train()
    print('-' * 80 + f'\n{text}\n' + '-' * 80, flush=True)


def save(*names):
    """Write the whole state of the run to these files of out_dir."""
    run = {**checkpoint.model_state(raw_model, tok, saved_config, style), **progress, 'seconds': elapsed(),
           'optimizers': [o.state_dict() for o in optimizers], 'scaler': scaler.state_dict()}
    for name in names:
        checkpoint.save(out_dir / name, run)


COLUMNS = ('step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_s')


def read_log():
    """Rows of log.csv up to the step that we are at, as lists of text."""
    rows = []
    with suppress(OSError, ValueError, csv.Error):  # up to where it is damaged
        reader = csv.reader((out_dir / 'log.csv').read_text(encoding='utf-8', errors='replace').splitlines())
        next(reader, None)
        for row in reader:
            if len([float(n) for n in row]) == len(COLUMNS) and int(row[0]) <= progress['evaluated']:
                rows.append(row)
    return rows


def write_log(rows):
    """log.csv: a row an evaluation."""
    text = '\n'.join(','.join(map(str, row)) for row in [COLUMNS, *rows]) + '\n'
    atomic_write(out_dir / 'log.csv', lambda f: f.write(text.encode('utf-8')))


def draw():
    """loss.png from log.csv, where there is more than a point to see. A picture is worth no run: what goes wrong is said."""
    if len(log_rows) > 1:
        try:
            plot.draw([plot.read(out_dir)], out_dir / 'loss.png')
        except Exception as e:  # of a library, too
            print(f'no loss.png: {e}')


def ask_to_stop(number, frame):
    """The first Ctrl-C or SIGTERM: finish this step, save, leave. The second: leave at once.

    Within a second of the first it is no second: torchrun passes on what the terminal has sent to us, too.
    """
    global stop, stop_time
    now = time.monotonic()
    if now > (stop_time or now) + 1:
        raise KeyboardInterrupt
    stop, stop_time = stop or signal.Signals(number).name, stop_time or now


after = f'next: python {shlex.quote(str(short_path(ROOT / "sample.py")))} --out_dir={shlex.quote(str(out_dir))} --chat'
if eval_only:
    told = f'{path} (step {progress["step"]}): {eval_split} '
    if eval_protocol == 'smoothed_batch_mean' and pairs:
        mean = smoothed_batch_mean(raw_model, val_data, where, precision, label_smoothing)
        print(f'{told}loss with smoothing {label_smoothing}, mean over batches of 32 in file order: {mean:.4f}')
        raise SystemExit(0)
    score = evaluate(raw_model, val_data, where, precision)
    distributed.shutdown()
    print(f'{told}loss {in_words(score["loss"])}, accuracy {score["accuracy"]:.2%} of {val_data.num_targets:,} target tokens')
    if pairs and eval_replies and master_process:
        replies = generate_replies(raw_model, tok, style, val_data, eval_replies, min(block_size // 2, 128), num_beams)
        for source, reference, reply in replies[::math.ceil(len(replies) / 10)]:  # ten of them to read, from all over
            print(f'{source}\n  -> {reply}\n  (they said: {reference})')
        print(*score_replies(replies), sep='\n')
    if path != init_from:
        print(after)
    raise SystemExit(0)
for name in SIGNALS:
    signal.signal(getattr(signal, name), ask_to_stop)

# ----------------------------------------------------------------------------------------------------------------------
# the loop


def lr_factor(step):
    """The schedule: what every peak learning rate is multiplied with at this step (0 is the first)."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return 1.0
    end = max_iters if lr_decay_iters is None else lr_decay_iters
    if max_minutes is not None:
        left = max(0.0, 1 - spent / budget())
    else:
        left = (end - step) / (end - warmup_iters) if step < end else 0.0  # from 1, after the warm-up, to 0
    if schedule == 'cosine':
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    floor = min_lr / learning_rate if learning_rate else 0.0
    return floor + left * (1 - floor)


def budget():
    """Seconds that --max_minutes leaves for training: less the last evaluation, which is to take as long as the one before."""
    return max(1.0, 60 * max_minutes - eval_seconds)


def advise(train_loss):
    """What to do about a run that goes wrong, as this evaluation shows it; None where it does not."""
    if train_loss > 0.95 * math.log(meta['vocab_size']) and step >= 2 * warmup_iters and not finished:
        return ('the loss hardly moves from that of guessing: the rates are far too low or too high; those that come with '
                'train.py are --learning_rate=1e-2 --muon_lr=0.015')
    if progress['bad_evals'] == 3 and train_loss < progress['best'] and not finished:
        return ('val has not fallen for 3 evaluations while train has: the model learns its text by heart. best.pt keeps the '
                f'best; --patience=3 would stop here; more text, a smaller model or --dropout={max(0.2, dropout + 0.1):.1g} help')


def agree(n):
    """n, summed over all processes. And whichever was told to stop, from here on all know, at the same step; and the time."""
    global stop, spent
    n, spent, *told = distributed.all_reduce_sum(n, elapsed() if master_process else 0, *(stop == name for name in SIGNALS))
    stop = stop or next((name for name, t in zip(SIGNALS, told) if t), None)
    return int(n)


def elapsed():
    """Seconds of training so far, those before a resume included."""
    return progress['seconds'] + time.perf_counter() - t_start


def diverged(**what):
    """The error for a loss or gradient that is no longer a number: nothing after this is worth saving."""
    if master_process:
        draw()
    kept = f'the checkpoints in {out_dir} are from before this' if progress['evaluated'] else 'there is no checkpoint yet'
    what['learning rate'] = f'{learning_rate * lr_factor(step):.3e}'
    return UserError(f'training diverged at step {step} ({", ".join(f"{k} {v}" for k, v in what.items())}): '
                     f'lower --learning_rate and --muon_lr or raise --warmup_iters; {kept}')


step = first_step = progress['step']
log_tokens = progress['tokens']
t_start = t_log = time.perf_counter()
log_rows, speed, eval_seconds, spent = read_log(), 0.0, 0.0, 0.0
model.train()
goal = max_iters if max_minutes is None else f'what fits into {max_minutes:g} minutes'
print(f'step {step} of {goal}; checkpoints go to {out_dir}' + f'; that is all of it: --max_iters={2 * step} would go on' * (
    0 < step >= max_iters and max_minutes is None), flush=True)
while True:
    batches = list(train_data.batches(seed, step, gradient_accumulation_steps, rank, world_size))
    n = agree(sum((batch['targets'] != -1).sum().item() for batch in batches))  # real targets in the whole step
    finished = bool(patience and progress['bad_evals'] >= patience)
    finished |= step >= max_iters if max_minutes is None else spent >= budget()
    if (finished or step % eval_interval == 0) and step > progress['evaluated'] and not stop:
        begin = elapsed()
        score = evaluate(model, val_data, where, precision, lambda: stop)
        eval_seconds, = distributed.all_reduce_sum(elapsed() - begin if master_process else 0)
        if score is None:
            continue
        val_loss = score['loss']
        if not math.isfinite(val_loss):
            raise diverged(**{'validation loss': val_loss})
        better = val_loss < progress['best']
        train_loss, lr = progress['loss_sum'] / progress['loss_tokens'], optimizers[0].param_groups[0]['lr']
        progress.update(evaluated=step, val_loss=val_loss, best=min(progress['best'], val_loss), loss_sum=0.0, loss_tokens=0,
                        bad_evals=0 if better else progress['bad_evals'] + 1)
        print(f'step {step}: train {train_loss:.4f}, val {in_words(val_loss)}' + ', the best so far' * better, flush=True)
        if advice := advise(train_loss):
            print(f'advice: {advice}', flush=True)
        log_rows.append([step, progress['tokens'], f'{elapsed():.2f}', f'{train_loss:.5f}', f'{val_loss:.5f}', f'{lr:.3e}',
                         f'{progress["grad_norm"]:.4f}', f'{speed:.0f}'])
        if master_process:
            write_log(log_rows)  # in this order: wherever a crash comes, resuming from last.pt makes good what is missing
            save(*(['best.pt', 'last.pt'] if better else ['last.pt']))
            if sample_tokens:
                write_sample(sample_tokens)
        t_log, log_tokens = time.perf_counter(), progress['tokens']
        continue  # it may have been one evaluation too many without progress
    if finished or stop:
        break

    torch.manual_seed((seed * 1_000_003 + step + rank * 7_919_000_021) % 2**63)  # of dropout: resume is exact
    for o, rates in zip(optimizers, peaks):
        for group, peak in zip(o.param_groups, rates):
            group['lr'] = peak * lr_factor(step)
    step_loss = torch.zeros((), device=where)
    for i, batch in enumerate(batches):
        with distributed.no_sync(model, last=i == len(batches) - 1):
            loss = forward(batch) / (n / world_size)  # a sum over tokens, by their number in the whole step, of all micro-batches and
            scaler.scale(loss).backward()        # processes, whose gradients are averaged: each target counts alike
        step_loss += loss.detach()
    for o in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()  # infinite: only measured
    step_loss = distributed.all_reduce_sum(step_loss.item())[0] / world_size
    if not math.isfinite(step_loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):  # float16 may skip a step
        raise diverged(loss=step_loss, **{'gradient norm': grad_norm})
    for o in optimizers:
        scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    step += 1
    progress.update(step=step, tokens=progress['tokens'] + n, grad_norm=grad_norm, loss_sum=progress['loss_sum'] + step_loss * n,
                    loss_tokens=progress['loss_tokens'] + n)
    if (step % log_interval == 0 or step == first_step + 1) and not stop:  # a lost terminal would take no more lines
        now = time.perf_counter()
        speed = (progress['tokens'] - log_tokens) / (now - t_log)  # of target tokens
        left = (now - t_start) / (step - first_step) * (max_iters - step)
        left = left if max_minutes is None else max(0, 60 * max_minutes - elapsed())
        print(f'step {step}: loss {step_loss:.4f}, lr {learning_rate * lr_factor(step - 1):.2e}, {speed:,.0f} tokens/s, '
              f'{timedelta(seconds=int(left))} left', flush=True)
        t_log, log_tokens = now, progress['tokens']

# ----------------------------------------------------------------------------------------------------------------------
# the end

distributed.shutdown()
if not master_process:  # the rest is writing
    raise SystemExit(128 + getattr(signal, stop) if stop else 0)
if step > progress['evaluated'] or not (out_dir / 'last.pt').is_file():  # stopped, and not behind an evaluation, which saves
    save('last.pt')
draw()
if stop:
    again = shlex.join(a for a in sys.argv[1:] if a != '--resume')
    print(f'stopped by {stop} at step {step}; go on with: {distributed.launcher} train.py {again} --resume', flush=True)
    raise SystemExit(128 + getattr(signal, stop))
peak = peak_memory(where)
print(f'{timedelta(seconds=int(elapsed()))} in all' + (f', {peak / 1e9:.2f} GB at the most' if peak else ''))
if (out_dir / 'best.pt').is_file():
    raw_model.load_state_dict(checkpoint.load(out_dir / 'best.pt')['model'])
    write_sample(300)
    print(f'best val loss {in_words(progress["best"])}, saved as {out_dir / "best.pt"}'
          + '; loss.png beside it shows the way there' * (len(log_rows) > 1))
    print(after)
