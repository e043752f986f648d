"""
Train a GPT or an encoder-decoder on the dataset in data/NAME, on whatever hardware there is.

    python train.py                                                1.5 minutes on two CPU cores
    python train.py config/shakespeare_char.py --dropout=0.1       a config file, then overrides
    python train.py config/shakespeare_char.py --resume            continue exactly where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/…     on eight GPUs, which share steps
"""
from typing import Literal

from pocket.configurator import configure

# The options. An interval that opens a comment, such as [0, 1), is checked: see configurator.py

# Where things are
out_dir: str | None = None         # checkpoints and log (None: out/NAME of the config or dataset)
data_dir: str | None = None        # where datasets live (None: data/ beside this file)
dataset = 'stdlib'                 # data/NAME; if it is missing, prepare/NAME.py is run
init_from = 'scratch'              # or resume, or other weights: out/RUN, smollm2, a folder, …
resume = False                     # continue out_dir/last.pt, the same as --init_from=resume

# Model: see GPTConfig and Seq2SeqConfig in model.py
arch: Literal['gpt', 'seq2seq'] = 'gpt'  # decoder-only, or encoder-decoder (for datasets of pairs)
block_size = 128                   # tokens of context; in a seq2seq: per target
src_block_size: int | None = None  # in a seq2seq: tokens per source (None: as block_size)
n_layer = 3                        # in a seq2seq: of the decoder
n_encoder_layer: int | None = None  # in a seq2seq: of the encoder (None: as n_layer)
n_head = 2
n_kv_head: int | None = None       # heads of keys and values (None: n_head); fewer: a smaller cache
head_dim: int | None = None        # channels of a head (None: n_embd / n_head)
n_embd = 160
n_inner: int | None = None         # width of the MLP's hidden layer (None: 4 * n_embd)
dropout = 0.0                      # [0, 1) on the residual stream; try 0.1 to 0.2 with little text
attn_dropout = 0.0                 # [0, 1) on attention weights
bias = False                       # biases in Linear and LayerNorm
attn_bias: bool | None = None      # biases in the projections of attention (None: as bias)
qkv_bias: bool | None = None       # biases of queries, keys and values (None: as attn_bias)
head_bias = False                  # a bias in the output head
pos: Literal['learned', 'sinusoidal', 'rotary'] = 'rotary'  # positions
rope_theta = 10000.0               # (0, inf) rotary: larger for longer texts
norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'
norm_eps = 1e-5                    # (0, inf) added to the variance before the root
norm_position: Literal['pre', 'post'] = 'pre'  # normalize a layer's input, or the sum after it
act: Literal['gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'] = 'relu2'  # the MLP's nonlinearity
qk_norm: bool | Literal['rmsnorm'] = True  # normalize queries and keys; rmsnorm: with weights
token_shift = True                 # half of a layer's input comes from the previous token
tie_weights = False                # the head shares the token embedding
tie_source = True                  # a seq2seq's source and target share one token embedding
init: Literal['gpt2', 'xavier'] = 'gpt2'  # initial weights
zero_init = True                   # projections into the residual stream start at zero
softcap = 0.0                      # [0, inf) bound logits to ± this (0: off)
cutoffs: tuple[int, ...] = ()      # adaptive softmax: --cutoffs=2000,10000 makes three clusters
div_value = 4.0                    # [1, inf) adaptive softmax: how much narrower each cluster is
gradient_checkpointing = False     # less memory, for about a third more time

# Batches, and the length of the run: set one of max_iters, max_epochs and max_minutes. If several
# are set, the one on the command line counts, else minutes, else epochs
batch_size = 16                    # [1, inf) sequences of plain text per micro-batch
batch_tokens = 4096                # [1, inf) tokens of pairs or conversations per micro-batch
gradient_accumulation_steps = 1    # [1, 65536] micro-batches per step
max_iters = 800                    # [1, inf) length of the run in steps
max_epochs: float | None = None    # (0, 1e9] length in passes over the dataset
max_minutes: float | None = None   # (0, 1e9] length in minutes: the schedule follows the clock
seed = 1337                        # [0, inf) for initial weights, data order, dropout

# Optimizer
optimizer: Literal['muon', 'adamw'] = 'muon'  # muon: for matrices in the blocks, AdamW for the rest
learning_rate = 1e-2               # [0, inf) AdamW's peak learning rate
muon_lr = 0.015                    # [0, inf) Muon's peak learning rate
muon_momentum = 0.9                # [0, 1)
weight_decay = 0.1                 # [0, inf) for matrices, not for norms and biases
beta1 = 0.9                        # [0, 1)
beta2 = 0.99                       # [0, 1)
grad_clip = 1.0                    # [0, inf) largest norm of the gradient (0: no limit)
label_smoothing = 0.0              # [0, 1) in training only; validation never has it
schedule: Literal['linear', 'cosine', 'constant'] = 'linear'  # from the peak down to min_lr
warmup_iters = 20                  # [0, inf) steps in which the learning rate rises to its peak
lr_decay_iters: int | None = None  # [1, inf) the step at which min_lr is reached (None: max_iters)
min_lr = 0.0                       # [0, inf) AdamW's final learning rate; Muon's is in proportion

# Evaluation
eval_interval = 200                # [0, inf) steps between evaluations on all of val (0: an epoch)
eval_only = False                  # evaluate out_dir/best.pt and stop
eval_split: Literal['val', 'test', 'train'] = 'val'  # what --eval_only evaluates
eval_replies = 200                 # [0, inf) --eval_only, pairs: score this many replies
eval_bleu = 0                      # [0, inf) pairs: replies whose BLEU each evaluation computes
best_by: Literal['loss', 'bleu'] = 'loss'  # what makes an evaluation the best one: best.pt
num_beams = 1                      # [1, 1024] for replies to score: 1 is greedy, more a beam search
length_penalty = 0.6               # [-10, 10] beam search, here and in sample.py; more: longer
bleu_tokenize: Literal['auto', '13a', 'zh', 'ja-mecab', 'char', 'none'] = 'auto'  # words for BLEU
eval_protocol: Literal['tokens', 'smoothed_batch_mean'] = 'tokens'  # --eval_only: see evaluate.py
patience = 0                       # [0, inf) stop after this many evaluations without progress
log_interval = 50                  # [1, inf) steps between lines
sample_tokens = 0                  # [0, 1048576] tokens to sample after each evaluation
final_sample_tokens = 300          # [0, 1048576] tokens to sample at the end
sample_start = ''                  # what samples begin with
sample_min_p = 0.0                 # [0, 1) min_p of samples, also sample.py's default for this run

# Machine
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matmuls, not of weights
compile: bool | Literal['auto'] = 'auto'  # torch.compile; auto: on CUDA; never on a CPU
config, explicit = configure(__file__, globals())  # {option: value}, {option: where it was set}

# --------------------------------------------------------------------------------------------------
# Set-up: mistakes are found here, before the first step

import math  # after configure(), so that --help and typos are answered at once
import sys
import time
from datetime import timedelta

import torch

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import checkpoint, distributed, optim, training
from pocket.data import count_targets, load_meta
from pocket.device import autocast, peak_memory, pick_device, pick_dtype
from pocket.distributed import master_process, rank, world_size
from pocket.errors import UserError
from pocket.evaluate import bleu_of, evaluate, format_loss, print_evaluation, sample_text, to_device
from pocket.progress import Progress

# Which run is this? A new one, one that is resumed, or one that is only evaluated
resuming = (resume or init_from == 'resume') and not eval_only
run_dir = training.run_folder(out_dir, dataset, sys.argv[1:], must_exist=resuming or eval_only)
saved = None
state_path = init_from
if resuming or (eval_only and init_from in ('scratch', 'resume')):
    state_path = training.run_checkpoint(run_dir, eval_only)
    saved = checkpoint.load(state_path)
config = training.settle_options(config, explicit, __file__, saved, state_path, resuming)
globals().update(config)  # rebind the options above to their final values

# Device and precision
device = distributed.init(pick_device(device))
amp_dtype, dtype_reason = pick_dtype(device, dtype)
torch.set_float32_matmul_precision('high')  # TF32 on CUDA, for products that stay in float32

# A pretrained model's shape overrides the options
pretrained_model = None
if saved is None and init_from != 'scratch':
    pretrained_model, pretrained_tok = training.load_pretrained(init_from, config, explicit)
    config = training.take_shape(config, pretrained_model)

# Data
data_folder = training.prepare_data(dataset, data_dir)
meta = load_meta(data_folder)
tok = training.load_dataset_tokenizer(meta, data_folder)
training.check_dataset_fits(meta, tok, data_folder, config, explicit, saved)
template = training.dataset_template(meta)  # of a conversation; None: plain text
train_data = training.open_split(data_folder, meta, 'train', config, tok, template)
val_split = eval_split if eval_only else 'val'
val_data = training.open_split(data_folder, meta, val_split, config, tok, template)
if saved is not None:
    training.check_same_data(saved, {'train': train_data, val_split: val_data}, config, resuming)
val_bytes = val_data.count_bytes(tok.byte_lengths())  # for bits per byte
sample_prompt = training.encode_sample_start(tok, sample_start)

# How long to train, in steps
is_new = saved is None and not eval_only
config = training.settle_length(config, explicit, meta, train_data, is_new)
steps_per_epoch = train_data.steps_for(1, gradient_accumulation_steps)
max_iters = config['max_iters']
decay_iters = lr_decay_iters or max_iters
eval_interval = config['eval_interval'] or steps_per_epoch

# The folder of the run: a new run moves an earlier one aside
config = training.record_folders(config, run_dir, data_folder)
if master_process and not eval_only:
    run_lock = training.claim_run_dir(run_dir, config, is_new)  # held until this process ends

# Model
torch.manual_seed(seed)
model_args = training.model_arguments(config, tok, saved)
if pretrained_model is not None:
    model = pretrained_model
    training.fit_vocabulary(model, pretrained_tok, init_from, tok, data_folder)
elif arch == 'gpt':
    model = GPT(training.checked(GPTConfig(**model_args)))
else:
    model = Seq2Seq(training.checked(Seq2SeqConfig(**model_args)))
if cutoffs and saved is None and pretrained_model is None:
    training.rank_ids_by_frequency(model, train_data)
model.to(device)

# Optimizers: Muon for the matrices inside the blocks, AdamW for the rest
matrices, others = optim.split_parameters(model, optimizer)
optimizers = optim.make_optimizers(
    matrices, others, learning_rate, (beta1, beta2), muon_lr, muon_momentum, weight_decay,
    muon_dtype=optim.pick_muon_dtype(device, amp_dtype))
base_lrs = optim.base_learning_rates(optimizers)
scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

# Weights and progress of a checkpoint; the optimizers' state, too, if the run is resumed
train_state = checkpoint.TrainState()
if saved is not None:
    to_restore = optimizers if resuming else []
    train_state = checkpoint.restore(saved, state_path, model, to_restore, scaler)
    del saved  # its tensors have been copied

# --eval_only: evaluate the best checkpoint, and stop
if eval_only:
    val_data.verify()
    title = f'{state_path}: {eval_split}'
    if pretrained_model is None:
        title = f'{state_path} (step {train_state.step}): {eval_split}'
    print_evaluation(model, tok, template, val_data, val_bytes, device, amp_dtype, config, title)
    if pretrained_model is None and eval_protocol == 'tokens':
        print(f'next: {training.sample_command(run_dir)}')
    sys.exit()


def forward(model, batch):
    """Summed loss of a batch, a dict: idx are tokens, targets those that follow each of them."""
    with autocast(device, amp_dtype):
        _, loss = model(**to_device(batch, device), label_smoothing=label_smoothing,
                        reduction='sum')
    return loss


# Print a summary (only the master process prints: errors.py silences the others)
print(training.describe_run(model, matrices, others, train_data, config, device, amp_dtype))
print(f'device: {device}, {amp_dtype} ({dtype_reason})', flush=True)


def try_step(model):
    """Forward and backward pass of the first micro-batch."""
    batches = train_data.batches(seed, 0, gradient_accumulation_steps, rank, world_size)
    forward(model, next(batches)).backward()


# Compile, if it pays off, and try a step, because errors only show up there
raw_model = model  # neither compiled nor wrapped: for saving and sampling
model, compile_note = training.compile_or_stay_eager(model, compile, device, try_step)
print(f'mode: {compile_note}', flush=True)

# Share the work among processes
model = distributed.wrap_model(model, some_unused=bool(config['cutoffs']))


def print_sample(max_new_tokens):
    """Print a text that the model generates now or, for pairs, three replies."""
    text = sample_text(raw_model, tok, template, val_data, sample_prompt, max_new_tokens, seed,
                       sample_min_p)
    print('-' * 80, text, '-' * 80, sep='\n', flush=True)


def save(name):
    """Write the state of the run, all that --resume and sample.py need, to a file of run_dir."""
    checkpoint.save(run_dir / name, {
        **checkpoint.model_state(raw_model, tok, config, template),  # weights, config, tokenizer
        **vars(train_state),                                         # step, best loss, …
        'data': {'train': train_data.fingerprint, 'val': val_data.fingerprint},
        # replaces train_state.seconds, which ends where this process began
        'seconds': elapsed(),
        'optimizers': [opt.state_dict() for opt in optimizers],
        'scaler': scaler.state_dict(),
    })


def elapsed():
    """Seconds of training so far, those before a resume included."""
    return train_state.seconds + time.perf_counter() - t_start


def after_evaluation(val_loss, bleu):
    """Print and log an evaluation, save checkpoints, and show a sample if asked."""
    train_loss = train_state.loss_sum / train_state.loss_tokens  # mean since the last evaluation
    is_best = train_state.record_evaluation(val_loss, bleu if best_by == 'bleu' else None)
    val = format_loss(val_loss, val_data.num_targets, val_bytes)
    note = ', the best so far' if is_best else ''
    print(f'step {step}: train {train_loss:.4f}, val {val}{note}', flush=True)
    latest_lr = optimizers[0].param_groups[0]['lr']
    log.add(train_state, elapsed(), train_loss, latest_lr, progress.tokens_per_second)
    advice = training.advise(log.losses(), train_state, config, tok.vocab_size)
    if advice:
        print(f'advice: {advice}', flush=True)
    if not master_process:
        return

    # last.pt comes last: a crash in between loses nothing, as the run then resumes from the
    # previous one
    log.write()
    if is_best:
        save('best.pt')
    save('last.pt')
    if sample_tokens:
        print_sample(sample_tokens)


def measure():
    """Returns (validation loss, BLEU or None); (None, None) if a stop is requested meanwhile."""
    def stopped():
        return signals.received

    scores = evaluate(model, val_data, device, amp_dtype, stopped)
    if scores is None:
        return None, None
    bleu = None
    if eval_bleu and math.isfinite(scores['loss']):  # else training has diverged, and ends
        bleu = bleu_of(raw_model, tok, template, val_data, config, stopped)
        if bleu is None:
            return None, None
    return scores['loss'], bleu


def is_finished():
    """Whether the run has reached its last step or minute, or has stopped improving."""
    if training.patience_is_over(config, train_state):
        return True
    if max_minutes is not None:
        return training.share_of_time_left(max_minutes, seconds, progress.eval_seconds) == 0
    return step >= max_iters


# --------------------------------------------------------------------------------------------------
# The loop

signals = training.StopSignals().install()
training.verify_in_background([train_data, val_data], signals)
log = training.RunLog(run_dir, last_step=train_state.evaluated)
print(training.describe_goal(train_state, config, run_dir, max_iters / steps_per_epoch), flush=True)

step = first_step = train_state.step
t_start = time.perf_counter()
progress = Progress(train_state, max_iters, max_minutes, eval_interval, val_data.num_targets)
_, seconds = training.synchronize(signals, elapsed())  # the master's clock, for all processes
lr_floor = min_lr / learning_rate if learning_rate else 0.0
model.train()
while True:

    # The learning rate of this step; with --max_minutes it follows the clock
    share_left = training.share_of_time_left(max_minutes, seconds, progress.eval_seconds)
    lr_factor = optim.lr_factor(step, schedule, warmup_iters, decay_iters, lr_floor, share_left)
    lr = learning_rate * lr_factor  # AdamW's, which is printed; Muon's is in proportion

    # Evaluate and save, but never twice at one step. (A signal that one process received counts
    # once all of them have agreed)
    eval_due = is_finished() or step % eval_interval == 0
    if eval_due and step > train_state.evaluated and not signals.agreed:
        eval_start = seconds
        try:
            val_loss, bleu = measure()
        except UserError as e:  # the data file has changed on disk
            signals.handle_lost_data(e)
            break
        if val_loss is not None:
            training.check_finite('validation loss', val_loss, lr, train_state, log)
            after_evaluation(val_loss, bleu)
        _, seconds = training.synchronize(signals, elapsed())
        progress.eval_seconds = seconds - eval_start
        progress.resume()
    if is_finished() or signals.agreed:
        break

    # The micro-batches of this step, and how many targets they have in all processes
    try:
        batches = list(
            train_data.batches(seed, step, gradient_accumulation_steps, rank, world_size))
    except UserError as e:  # the data file has changed on disk
        signals.handle_lost_data(e)
        break
    num_targets = sum(count_targets(batch) for batch in batches)
    num_targets = distributed.all_reduce_sum(num_targets)[0]

    # Forward and backward pass of each micro-batch. Its loss is a sum over targets, divided by
    # their number in all micro-batches and processes, so that each target counts equally.
    # (Processes average their gradients; multiplying by world_size turns that into a sum.)
    optim.set_learning_rates(optimizers, base_lrs, lr_factor)
    training.seed_step(seed, step)  # dropout depends on the step alone, so resuming is exact
    step_loss = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        with distributed.no_sync(model, last=is_last):  # exchange gradients once, after the last
            loss = forward(model, batch) / (num_targets / world_size)
            scaler.scale(loss).backward()
        step_loss += loss.detach()

    # Clip the gradient, and step
    for opt in optimizers:
        scaler.unscale_(opt)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if grad_clip and grad_norm > grad_clip:  # else there is no need to touch them
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    grad_norm = grad_norm.item()
    step_loss, seconds = training.synchronize(signals, elapsed(), step_loss.item())
    step_loss /= world_size
    training.check_finite('loss', step_loss, lr, train_state, log)
    if not scaler.is_enabled():
        training.check_finite('gradient norm', grad_norm, lr, train_state, log)
    if math.isfinite(grad_norm):  # else float16 has overflowed: skip this step
        for opt in optimizers:
            scaler.step(opt)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    scaler.update()
    step += 1
    train_state.record_step(step, step_loss, int(num_targets), grad_norm)

    # Log, and move the bar
    progress.record_step(train_state, step_loss)
    log_due = step % log_interval == 0 or step == first_step + 1
    if log_due and not signals.agreed:  # if the terminal was closed, there is nowhere to print to
        progress.print_line(lr)
progress.hide()

# --------------------------------------------------------------------------------------------------
# The end

distributed.shutdown()
if not master_process:  # the rest is saving and printing
    sys.exit(signals.exit_status() if signals.agreed else 0)
if step > train_state.evaluated or not (run_dir / 'last.pt').is_file():
    save('last.pt')  # stopped between evaluations
log.draw()
if signals.agreed:
    signals.report(step, sys.argv[1:])
    sys.exit(signals.exit_status())

if training.patience_is_over(config, train_state):
    print(training.describe_patience(train_state, config))
peak = peak_memory(device)
memory_note = f', peak memory {peak / 1e9:.2f} GB' if peak else ''
print(f'total time {timedelta(seconds=int(elapsed()))}{memory_note}')
if (run_dir / 'best.pt').is_file():
    for opt in optimizers:
        opt.state.clear()  # no longer needed: frees memory for the one in best.pt
    best = checkpoint.load(run_dir / 'best.pt')
    raw_model.load_state_dict(best['model'])
    if final_sample_tokens:
        print_sample(final_sample_tokens)
    title = 'best val loss'
    if best_by == 'bleu':
        title = f'best BLEU {train_state.best_bleu:.2f}, val loss'
    best_loss = format_loss(train_state.best, val_data.num_targets, val_bytes)
    print(f'{title} {best_loss}, saved as {run_dir / "best.pt"}')
    if len(log.rows) > 1:
        print(f'the loss curve is {run_dir / "loss.png"}')
    print(f'next: {training.sample_command(run_dir)}')
