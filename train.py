"""
Train a GPT on a dataset of data/NAME, on whatever this machine has.

    python train.py                                                  a minute on two CPU cores, no download
    python train.py config/shakespeare_char.py --dropout=0.1         a config file, then overrides
    python train.py config/shakespeare_char.py --resume              goes on where it stopped, to the bit
"""
from typing import Literal

from configurator import UserError, configure, find

# Where things are
out_dir: str | None = None         # checkpoints, log.csv, loss.png (None: out/ and the name of the config file or dataset)
data_dir: str | None = None        # where datasets live (None: data/ beside this file)
dataset = 'stdlib'                 # data/NAME; where it is missing, prepare/NAME.py is run
init_from: Literal['scratch', 'resume'] = 'scratch'  # start anew, or go on from out_dir/last.pt
resume = False                     # the same as --init_from=resume
# Model: see GPTConfig in model.py
block_size = 256                   # tokens of context
n_layer = 4
n_head = 2
n_embd = 128
n_inner: int | None = None         # width of the MLP's hidden layer (None: 4 * n_embd)
dropout = 0.0                      # on what blocks add to the residual stream; for long runs on little text: 0.1 to 0.2
attn_dropout = 0.0                 # on attention weights
bias = False                       # biases in Linear and LayerNorm
pos: Literal['learned', 'sinusoidal', 'rotary'] = 'rotary'
norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'
norm_position: Literal['pre', 'post'] = 'pre'
act: Literal['gelu', 'relu', 'relu2', 'swiglu'] = 'relu2'
qk_norm = True                     # normalise queries and keys in each head
tie_weights = False                # the head shares the token embedding
zero_init = True                   # projections into the residual stream start at zero
softcap = 0.0                      # bound logits to ± this (0: off)
gradient_checkpointing = False     # recompute blocks in the backward pass: less memory, about a third more time
# Batches and length
batch_size = 8                     # sequences in a micro-batch
gradient_accumulation_steps = 1    # micro-batches a step
max_iters = 1000                   # steps in all
seed = 1337                        # of initial weights, order of data, dropout
# Optimizer
optimizer: Literal['muon', 'adamw'] = 'muon'  # muon: for the matrices in the blocks, AdamW for the rest
learning_rate = 3e-3               # of AdamW, at its peak
muon_lr = 0.02                     # of Muon, at its peak
muon_momentum = 0.95
weight_decay = 0.1                 # on matrices, not on norms and biases
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest norm of the gradient (0: no limit)
label_smoothing = 0.0              # in training only; validation never has it
schedule: Literal['linear', 'cosine', 'constant'] = 'linear'  # from the peak to min_lr, after the warm-up
warmup_iters = 20
lr_decay_iters: int | None = None  # the step at which min_lr is reached (None: max_iters)
min_lr = 0.0                       # of learning_rate; Muon's falls in proportion
# Evaluation
eval_interval = 250                # steps between evaluations: each is a whole pass over val.bin, and saves last.pt
eval_only = False                  # evaluate out_dir/best.pt and stop
patience = 0                       # stop after so many evaluations without a better one (0: never)
log_interval = 50                  # steps between lines
sample_tokens = 0                  # length of a sample after each evaluation (there is always one at the end)
sample_start = ''                  # what samples begin with
# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; weights are always float32
compile: bool | Literal['auto'] = 'auto'  # torch.compile; auto: on CUDA, where its start-up is soon repaid
config = configure(__file__, globals())

# ----------------------------------------------------------------------------------------------------------------------
# set-up: everything that can be wrong is found before the first step

import csv  # noqa: E402  (after configure(), so that --help and typing errors are answered at once)
import json  # noqa: E402
import math  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

import checkpoint  # noqa: E402
import tokenizer as tokenizers  # noqa: E402
from configurator import ROOT  # noqa: E402
from data import Stream, ensure_prepared, read_meta  # noqa: E402
from device import autocast, peak_memory, pick_device, pick_dtype  # noqa: E402
from files import write_whole  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from muon import Muon  # noqa: E402

resume = resume or init_from == 'resume'
files = [Path(a).stem for a in sys.argv[1:] if not a.startswith('--')]
out_dir = find(out_dir) if out_dir else ROOT / 'out' / (files[-1] if files else dataset)
SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'bias', 'pos', 'norm', 'norm_position', 'act', 'qk_norm', 'tie_weights', 'softcap')

state = None
if resume or eval_only:
    path = out_dir / ('best.pt' if eval_only else 'last.pt')
    if not path.is_file():
        raise UserError(f'there is no {path} to {"evaluate" if eval_only else "go on from"}: name the run with --out_dir=…'
                        + ('' if eval_only else ', or leave --resume away to start anew'))
    state = checkpoint.load(path)
    saved, changed, refused = state['config'], [], []
    for key in config.keys() & saved.keys() - {'out_dir', 'init_from', 'resume', 'eval_only', 'data_dir'}:
        if key not in explicit:  # noqa: F821  (configure() made it) what nobody named now is as it was
            globals()[key] = saved[key]
        elif globals()[key] != saved[key]:
            (refused if key in SHAPE + ('dataset', 'optimizer') else changed).append(f'{key} {saved[key]} -> {globals()[key]}')
    if refused:
        raise UserError(f'a run can\'t go on with another {", ".join(sorted(refused))}: leave that away, or start a new run with another --out_dir')
    if changed:
        print(f'changed since {path} was written: {", ".join(sorted(changed))}; the run goes on from there, but not as it would have')
    if 'data_dir' not in explicit:  # noqa: F821
        data_dir = saved['data_dir']

problems = [f'{name} must be at least {least}, got {globals()[name]}' for name, least in
            (('batch_size', 1), ('gradient_accumulation_steps', 1), ('max_iters', 0), ('eval_interval', 1), ('log_interval', 1), ('patience', 0), ('warmup_iters', 0),
             ('seed', 0), ('learning_rate', 0), ('muon_lr', 0), ('min_lr', 0), ('weight_decay', 0), ('grad_clip', 0), ('label_smoothing', 0)) if not globals()[name] >= least]
problems += [f'{name} must be from 0 to below 1, got {globals()[name]}' for name in ('beta1', 'beta2', 'muon_momentum', 'label_smoothing') if not globals()[name] < 1]
model_args = {key: globals()[key] for key in GPTConfig.__dataclass_fields__ if key in config}
try:
    GPTConfig(vocab_size=1, **model_args)
except ValueError as e:
    problems.append(str(e))
if problems:
    raise UserError('; '.join(problems))

device = pick_device(device)
dtype, why = pick_dtype(device, dtype)
folder = ensure_prepared(dataset, Path(data_dir).resolve() if data_dir else ROOT / 'data')
meta = read_meta(folder)
try:
    tok = tokenizers.from_dict(meta['tokenizer'])
except ValueError as e:
    raise UserError(f'{folder / "meta.json"}: {e}; prepare the dataset again') from None
if tok.vocab_size > meta['vocab_size']:
    raise UserError(f'{folder / "meta.json"} says vocab_size {meta["vocab_size"]}, but its tokenizer has {tok.vocab_size}; prepare the dataset again')
if state is not None and state['tokenizer'] != tok.to_dict():
    raise UserError(f'the tokenizer of {path} is not that of {folder}: train anew with another --out_dir, or restore the dataset')
train_data, val_data = Stream(folder, meta, 'train', block_size), Stream(folder, meta, 'val', block_size)
val_bytes = val_data.count_bytes(tok.byte_lengths())

if not resume and not eval_only and (out_dir / 'last.pt').is_file():  # nobody's work is overwritten
    number = 1
    while (aside := out_dir.with_name(f'{out_dir.name}.{number}')).exists():
        number += 1
    out_dir.rename(aside)
    print(f'{out_dir} held a run: it is now {aside} (--resume would have gone on with it)')
try:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / '.write_test').write_bytes(b'')
    (out_dir / '.write_test').unlink()
except OSError as e:
    raise UserError(f'cannot write to {out_dir}: {e.strerror}; choose another place with --out_dir=…') from None

torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')  # TF32 on CUDA where float32 products are left
model = GPT(GPTConfig(vocab_size=meta['vocab_size'], **model_args)).to(device)
matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and '.h.' in name] if optimizer == 'muon' else []
others = [p for p in model.parameters() if all(p is not m for m in matrices)]
optimizers = [torch.optim.AdamW([{'params': [p for p in others if p.ndim >= 2], 'weight_decay': weight_decay},
                                 {'params': [p for p in others if p.ndim < 2], 'weight_decay': 0.0}],
                                lr=learning_rate, betas=(beta1, beta2), fused=True)]
if matrices:
    optimizers.append(Muon(matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay))
for group in (g for o in optimizers for g in o.param_groups):
    group['peak_lr'] = group['lr']  # lr is this times what the schedule says
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

step, best, bad_evals, seconds, loss_sum, loss_tokens = 0, math.inf, 0, 0.0, 0.0, 0
if state is not None:
    try:
        model.load_state_dict(state['model'])
        if resume:
            for o, s in zip(optimizers, state['optimizers'], strict=True):
                peaks = [g['peak_lr'] for g in o.param_groups]
                o.load_state_dict(s)
                for group, peak in zip(o.param_groups, peaks):
                    group.update(peak_lr=peak)  # a rate that was changed for this resume counts
            scaler.load_state_dict(state['scaler'])
        step, best, bad_evals, seconds = state['step'], state['best'], state['bad_evals'], state['seconds']
        loss_sum, loss_tokens = state['loss_sum'], state['loss_tokens']
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as e:
        raise UserError(f'{path} does not fit this model and optimizer: {str(e).splitlines()[0]}') from None
    del state

raw_model = model  # without the compiled wrapper
tokens_per_step = batch_size * gradient_accumulation_steps * block_size


def forward(batch):
    """Summed loss of a batch that lies on the CPU, computed on the device."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    with autocast(device, dtype):
        return model(**batch, label_smoothing=label_smoothing if model.training else 0.0, reduction='sum')[1]


engine = 'compiled'
if compile == 'auto' and device.type != 'cuda' or compile is False:
    engine = 'eager' if compile is False else f'eager (compiling pays late on {device.type}; --compile tries it)'
else:
    model = torch.compile(model)
    try:  # compiling happens at the first call: do it here, where going without it is still easy
        forward(next(train_data.batches(seed, 0, batch_size, 1))).backward()
        model.zero_grad(set_to_none=True)
    except Exception as e:
        if compile is True:
            raise UserError(f'--compile does not work here ({type(e).__name__}: {str(e).splitlines()[0][:200]}); leave it away') from None
        model, engine = raw_model, f'eager (compiling failed: {type(e).__name__})'


def expected_memory():
    """Bytes for weights, gradients and optimizer, and for the activations of one micro-batch: an estimate, good to a third."""
    n, c, e = model_params, raw_model.config, 4 if dtype == torch.float32 else 2
    states = n * (4 + 4) + sum(p.numel() for p in others) * 8 + sum(p.numel() for p in matrices) * 4 + n * (e if e == 2 else 0)
    inner = c.n_inner or 4 * c.n_embd
    scores = 3 * c.n_head * block_size if device.type == 'cpu' and block_size <= 1024 else 0  # attend() keeps them on a CPU
    layer = e * (12 * c.n_embd + 3 * inner + scores)
    token = layer * (1 if gradient_checkpointing else n_layer) + e * n_layer * c.n_embd
    head = min(batch_size * block_size * meta['vocab_size'], 2**24) * (8 + e)
    return states + batch_size * block_size * token + head + (3e8 if device.type == 'cpu' else 0)


model_params = raw_model.num_params()
print(f'{model_params / 1e6:.2f} M parameters, {tokens_per_step:,} tokens a step, {train_data.n:,} to learn from; '
      f'{device} in {str(dtype).removeprefix("torch.")} ({why}), {engine}; about {expected_memory() / 1e9:.1f} GB of memory', flush=True)

# ----------------------------------------------------------------------------------------------------------------------
# evaluation, samples, saving


@torch.no_grad()
def evaluate():
    """Mean loss in nats a token over the whole of val.bin: windows of block_size, in order, none twice. None where it was interrupted."""
    from tqdm import tqdm
    model.eval()
    total = count = 0
    for batch in tqdm(list(val_data.eval_batches()), desc='evaluating', leave=False, disable=None, delay=2):
        total += forward(batch).item()
        count += (batch['targets'] != -1).sum().item()
        if stop:
            return None
    model.train()
    return total / count


def scores(loss):
    """A loss in nats a token, with what else people call it."""
    return f'{loss:.4f} (perplexity {math.exp(loss):.2f}, {loss / math.log(2) * (val_data.n - 1) / val_bytes:.3f} bits a byte)'


def write_sample(n):
    """Print n tokens that the model writes now."""
    raw_model.eval()
    ids = tok.prompt(sample_start)
    with torch.random.fork_rng(devices=[]):
        ids = raw_model.generate([ids], n, eot=tok.specials.get('eot'), seed=seed, temperature=0.8, top_k=min(200, meta['vocab_size']))[0]
    raw_model.train()
    print('-' * 60 + f'\n{tok.decode(ids)}\n' + '-' * 60, flush=True)


def save(*names):
    """Write the whole state of the run to these files of out_dir."""
    run = {**checkpoint.model_state(raw_model, tok, saved_config), 'optimizers': [o.state_dict() for o in optimizers],
           'scaler': scaler.state_dict(), 'step': step, 'best': best, 'bad_evals': bad_evals, 'seconds': seconds + time.time() - t_start,
           'loss_sum': loss_sum, 'loss_tokens': loss_tokens, 'val_loss': val_loss}
    for name in names:
        checkpoint.save(out_dir / name, run)


COLUMNS = ('step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_s')


def read_log():
    """Rows of log.csv up to the step that we are at, as lists of text."""
    try:
        rows = list(csv.reader((out_dir / 'log.csv').read_text(encoding='utf-8').splitlines()))[1:]
        return [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= step]
    except (OSError, ValueError):
        return []


def write_log(rows):
    """log.csv: a row an evaluation."""
    text = '\n'.join(','.join(map(str, row)) for row in [COLUMNS, *rows]) + '\n'
    write_whole(out_dir / 'log.csv', lambda f: f.write(text.encode('utf-8')))


def draw(rows):
    """loss.png from the rows of log.csv."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        print('no loss.png: pip install matplotlib')
        return
    steps, train, val = zip(*[(int(r[0]), float(r[3]), float(r[4])) for r in rows])
    figure, axis = plt.subplots(figsize=(7, 4.5))
    axis.plot(steps, train, label='train', marker='.')
    axis.plot(steps, val, label='val', marker='.')
    at = min(range(len(val)), key=val.__getitem__)
    axis.plot(steps[at], val[at], 'o', color='black', fillstyle='none', label=f'best val {val[at]:.4f}')
    axis.set(xlabel='step', ylabel='loss (nats a token)', title=out_dir.name)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out_dir / 'loss.png', dpi=120)
    plt.close(figure)


saved_config = {key: (str(out_dir) if key == 'out_dir' else str(folder.parent) if key == 'data_dir' else config[key]
                      if key in ('device', 'dtype', 'compile') else globals()[key]) for key in config}
stop = None  # the name of the signal that asked us to stop


def ask_to_stop(number, frame):
    """First Ctrl-C or SIGTERM: finish this step, save, leave. A second one: leave at once."""
    global stop
    if stop:
        raise KeyboardInterrupt
    stop = signal.Signals(number).name


if eval_only:
    print(f'{path} (step {step}): val loss {scores(evaluate())}')
    raise SystemExit(0)
write_whole(out_dir / 'config.json', lambda f: f.write(json.dumps(saved_config, indent=1).encode('utf-8')))
for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, ask_to_stop)

# ----------------------------------------------------------------------------------------------------------------------
# the loop


def lr_factor(step):
    """The schedule: what every peak learning rate is multiplied with at this step (0 is the first)."""
    floor, end = min_lr / learning_rate if learning_rate else 0.0, max_iters if lr_decay_iters is None else lr_decay_iters
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return 1.0
    if step >= end:
        return floor
    left = (end - step) / (end - warmup_iters)  # 1 after the warm-up, 0 at the end
    if schedule == 'cosine':
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return floor + left * (1 - floor)


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    h, m, s = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f'{h}:{m:02}:{s:02}' if h else f'{m}:{s:02}'


model.train()
log_rows, first_step, t_start, t_log, grad_norm, speed, val_loss = read_log(), step, time.time(), time.time(), 0.0, 0.0, None
log_step, finished = step, False
print(f'step {step} of {max_iters}; checkpoints go to {out_dir}', flush=True)
while True:
    finished = step >= max_iters or bool(patience and bad_evals >= patience)
    if not stop and (finished or step % eval_interval == 0) and step > first_step:
        val_loss = evaluate()
    if val_loss is not None:
        better = val_loss < best
        best, bad_evals = min(best, val_loss), 0 if better else bad_evals + 1
        finished = finished or bool(patience and bad_evals >= patience)
        train_loss = loss_sum / max(1, loss_tokens)
        print(f'step {step}: train {train_loss:.4f}, val {scores(val_loss)}' + (', the best so far' if better else ''), flush=True)
        log_rows.append([step, step * tokens_per_step, round(seconds + time.time() - t_start, 2), f'{train_loss:.5f}', f'{val_loss:.5f}',
                         f'{optimizers[0].param_groups[0]["lr"]:.3e}', f'{grad_norm:.4f}', round(speed)])
        loss_sum, loss_tokens = 0.0, 0
        save(*(('last.pt', 'best.pt') if better else ('last.pt',)))
        write_log(log_rows)
        if sample_tokens and not finished:
            write_sample(sample_tokens)
        val_loss, t_log, log_step = None, time.time(), step
    if finished or stop:
        break

    torch.manual_seed((seed * 1_000_003 + step) % 2**63)  # dropout, too, depends on (seed, step) alone: nothing to restore on resume
    for group in (g for o in optimizers for g in o.param_groups):
        group['lr'] = group['peak_lr'] * lr_factor(step)
    batches = list(train_data.batches(seed, step, batch_size, gradient_accumulation_steps))
    n = sum((b['targets'] != -1).sum().item() for b in batches)
    step_loss = torch.zeros((), device=device)
    for batch in batches:
        loss = forward(batch) / n  # a sum over tokens, divided by their number in the whole step: micro-batches count by their size
        scaler.scale(loss).backward()
        step_loss += loss.detach()
    for o in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    step_loss = step_loss.item()
    if not math.isfinite(step_loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
        raise UserError(f'step {step}: loss {step_loss}, gradient norm {grad_norm}, learning rate {optimizers[0].param_groups[0]["lr"]:.3e}: '
                        f'training diverged. Lower --learning_rate and --muon_lr or raise --warmup_iters; the checkpoints in {out_dir} are from before this')
    for o in optimizers:
        scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    loss_sum, loss_tokens, step = loss_sum + step_loss * n, loss_tokens + n, step + 1
    if step % log_interval == 0 or step == first_step + 1:
        now = time.time()
        speed = tokens_per_step * (step - log_step) / (now - t_log)
        left = (now - t_start) / (step - first_step) * (max_iters - step)
        print(f'step {step}: loss {step_loss:.4f}, lr {optimizers[0].param_groups[0]["lr"]:.2e}, {speed:,.0f} tokens/s, {clock(left)} left', flush=True)
        t_log, log_step = now, step

# ----------------------------------------------------------------------------------------------------------------------
# the end

if stop and not finished:
    save('last.pt')
    print(f'stopped by {stop} at step {step}; go on with: python train.py {" ".join(sys.argv[1:])}'.replace(' --resume', '') + ' --resume', flush=True)
    raise SystemExit(128 + getattr(signal, stop))
if log_rows:
    draw(log_rows)
if peak := peak_memory(device):
    print(f'peak memory {peak / 1e9:.2f} GB, {clock(seconds + time.time() - t_start)} in all')
if (out_dir / 'best.pt').is_file():
    raw_model.load_state_dict(checkpoint.load(out_dir / 'best.pt')['model'])
write_sample(300)
print(f'best val loss {scores(best) if best < math.inf else "none"}; {out_dir / "best.pt"}, {out_dir / "loss.png"}\n'
      f'next: python sample.py --out_dir={out_dir} --chat')
