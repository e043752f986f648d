"""
How fast this machine trains, encodes and generates, and how much of its peak speed that is.

    python bench.py                       every row once, in three to four minutes
    python bench.py --rows=decode         only the rows with this in their name
    python bench.py --peers               three repeats, with baselines: ours without a KV cache or,
                                          on CUDA, torch.compile; torch.nn.Transformer and, if
                                          installed, transformers, ctranslate2, tokenizers
    python bench.py --nanogpt=FOLDER      and with nanoGPT: a clone of github.com/karpathy/nanoGPT
    python bench.py --init_from=smollm2   generation with a pretrained model instead (a name or a
                                          folder); as baselines transformers and llama.cpp
    python bench.py --profile             also write a trace of each row to out/bench, for
                                          chrome://tracing or ui.perfetto.dev

Each measurement runs in its own process, and baselines take turns with us: A B A B. They get the
same shapes, data, and number of threads. Prints medians, with minimum and maximum if there are
several repeats, and with --to=FILE all figures as JSON.
"""
from typing import Literal

from pocket.configurator import configure

rows = ''                    # only the rows with this in their name
peers = False                # measure the baselines that are installed, too
nanogpt: str | None = None   # a folder with nanoGPT's model.py, one more baseline; implies --peers
init_from: str | None = None  # measure generation with this pretrained model instead
rounds: int | None = None    # [1, inf) repeats of each measurement (None: 3 with baselines, else 1)
seconds = 2.0                # (0, inf) how long each measurement is timed
profile = False              # write traces to out/bench
to: str | None = None        # a file for all figures, as JSON
device = 'auto'              # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # ours; baselines use their own
worker = ''                  # for internal use: what this process measures
configure(__file__, globals())

import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import checkpoint, pretrained
from pocket.data import Stream, bucket_by_length
from pocket.device import autocast, peak_memory, pick_device, pick_dtype
from pocket.errors import UserError
from pocket.files import ROOT, atomic_write
from pocket.generate import new_cache
from pocket.quantize import prepare_for_decoding
from pocket.tokenizer import BpeTokenizer, ByteTokenizer
from pocket.training import compile_or_stay_eager

device = pick_device(device)
compute_dtype, _ = pick_dtype(device, dtype)

# Shapes of the models: nanoGPT's example for a CPU and its Shakespeare model, GPT-2 124M, and the
# base model of "Attention Is All You Need"
TINY = dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False)
SMALL = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)
PAPER = dict(
    vocab_size=50260, block_size=128, src_block_size=256,
    attn_bias=False, head_bias=True, tie_source=False,
)


# --------------------------------------------------------------------------------------------------
# Timing

def time_steps(step, amounts):
    """Call step(i) for i = 0, 1, … during `seconds`, and return how much work it does per second.

    step(i) does amounts[i % len(amounts)] of the work: tokens, for example.
    """
    # Warm up with three steps, or fewer if time is up and each of the amounts has had its turn
    deadline = time.perf_counter() + seconds
    for i in range(3):
        if i >= len(amounts) and time.perf_counter() > deadline:
            break
        step(i)

    # Time whole passes over the amounts, because batches of different sizes differ in speed
    times = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        for _ in amounts:
            start = time.perf_counter()
            step(len(times))
            times.append(time.perf_counter() - start)

    if profile:
        write_trace(step)
    if len(amounts) == 1:
        return amounts[0] / median(times)
    passes = len(times) / len(amounts)
    return passes * sum(amounts) / sum(times)


def write_trace(step):
    """Write a trace of one more step to out/bench."""
    row_name = ''.join(c if c.isalnum() else '-' for c in rows)
    path = ROOT / 'out' / 'bench' / f'{row_name}-{worker}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        step(0)
    profiler.export_chrome_trace(str(path))


def measure_peaks():
    """What this machine can do per second: FLOP of a matrix product, bytes read from memory.

    The best of ten tries each. The roofline model: a program is limited by one of the two.
    """
    a, b = torch.randn(2, 2048, 2048, device=device).to(compute_dtype)
    x = torch.ones(2**27, device=device)  # 512 MB, which no cache holds
    return {
        'FLOP': 2 * 2048**3 / shortest_time(lambda: (a @ b)[0, 0].item()),
        'bytes': x.nbytes / shortest_time(lambda: x.sum().item()),
    }


def shortest_time(function):
    """Seconds that a call of function() takes, the best of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# --------------------------------------------------------------------------------------------------
# The measurements: functions that return (rate, cost).
#
# rate: units of work per second. cost: the FLOP or bytes that a unit needs at least, or None. So
# rate x cost / peak is the utilization of the processor (model FLOPs utilization, MFU, Chowdhery et
# al. 2022, https://arxiv.org/abs/2204.02311) or that of the memory's bandwidth (MBU).

# Training

def train_gpt(shape, batch_size, length, compile='auto'):
    """Tokens/s of training a GPT on random ids: forward, backward, clipping, AdamW.

    compile: 'auto' as train.py does it with such a model, on CUDA alone; False: eager.
    """
    attn_dropout = shape.get('dropout', 0.0)  # as nanoGPT does it
    model = GPT(GPTConfig(act='gelu_erf', attn_dropout=attn_dropout, **shape)).to(device)
    idx, targets = torch.randint(shape['vocab_size'], (2, batch_size, length), device=device)

    def try_step(model):
        with autocast(device, compute_dtype):
            _, loss = model(idx, targets)
        loss.backward()

    compiled, _ = compile_or_stay_eager(model, compile, device, try_step)
    step = make_training_step(compiled, compute_dtype)
    return time_gpt_training(model, step, shape, batch_size, length)


def train_nanogpt(shape, batch_size, length):
    """Tokens/s of the same training with nanoGPT's model, in the precision of its train.py."""
    theirs = import_file('nanogpt_model', Path(nanogpt) / 'model.py')
    model = theirs.GPT(theirs.GPTConfig(**shape))
    amp_dtype = torch.float32 if device.type == 'cpu' else torch.bfloat16
    step = make_training_step(model, amp_dtype, fused_optimizer=device.type == 'cuda')
    return time_gpt_training(model, step, shape, batch_size, length)


def train_nanogpt_bf16(shape, batch_size, length):
    """Tokens/s of nanoGPT's model as an expert runs it: compiled, in our precision, AdamW fused."""
    theirs = import_file('nanogpt_model', Path(nanogpt) / 'model.py')
    model = torch.compile(theirs.GPT(theirs.GPTConfig(**shape)))
    step = make_training_step(model, compute_dtype)
    return time_gpt_training(model, step, shape, batch_size, length)


def training_baselines(shape, batch_size, length):
    """nanoGPT twice, as its README runs it on this machine, and with bfloat16 and torch.compile; on
    CUDA, where ours is compiled, also ours without that."""
    baselines = {
        'nanogpt': lambda: train_nanogpt(shape, batch_size, length),
        'nanogpt-bf16': lambda: train_nanogpt_bf16(shape, batch_size, length),
    }
    if device.type == 'cuda':
        baselines['eager'] = lambda: train_gpt(shape, batch_size, length, compile=False)
    return baselines


def make_training_step(model, amp_dtype, fused_optimizer=True):
    """A function that trains the model for a step on a batch: keyword arguments of forward()."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=fused_optimizer,
    )

    def step(**batch):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(device, amp_dtype):
            _, loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU to finish

    return step


def time_gpt_training(model, step, shape, batch_size, length):
    """Time the training step of a GPT, ours or nanoGPT's. The cost is in FLOP per token."""
    idx, targets = torch.randint(shape['vocab_size'], (2, batch_size, length))
    rate = time_steps(lambda i: step(idx=idx, targets=targets), [batch_size * length])
    # Forward takes 2 FLOP per weight and token, backward twice that. Attention: the scores and the
    # weighted sum take 2 FLOP per channel and position each; a token sees length / 2 positions.
    attention = 6 * shape['n_layer'] * shape['n_embd'] * length
    return rate, 6 * count_weights(model) + attention


def count_weights(model):
    """How many parameters a generated token is multiplied with: all but the embeddings.

    A GPT, a nanoGPT, a GPT-2 of transformers, or the decoder of a Seq2Seq.
    """
    stack = model.decoder if isinstance(model, Seq2Seq) else model.transformer
    counted = [*stack.h.parameters(), *stack.ln_f.parameters(), *model.lm_head.parameters()]
    return sum(p.numel() for p in counted)


def import_file(name, path):
    """Import a Python file as the module `name`: nanoGPT's model.py has the same name as ours."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def train_seq2seq():
    """Pairs/s of training the paper's base model on pairs that are as long as those of chats."""
    rng = np.random.default_rng(0)
    lengths = chat_lengths(rng)
    buckets = bucket_by_length(lengths, 4096)
    num_batches = max(3, int(seconds))
    chosen = rng.permutation(len(buckets))[:num_batches]
    buckets = [buckets[i] for i in chosen]

    step = make_training_step(Seq2Seq(Seq2SeqConfig(dropout=0.1, **PAPER)), compute_dtype)
    batches = [random_pairs(lengths[members]) for members in buckets]
    batch_sizes = [len(members) for members in buckets]
    return time_steps(lambda i: step(**batches[i % len(batches)]), batch_sizes), None


def train_seq2seq_padded():
    """Pairs/s of training as small projects do it: nn.Transformer, float32, all pairs padded."""
    batch_size = 32
    lengths = chat_lengths(np.random.default_rng(0))[:batch_size]
    step = make_training_step(PaddedTransformer(PAPER['vocab_size']), torch.float32)
    pairs = random_pairs(lengths, 256, 127)
    source_lengths = torch.from_numpy(lengths[:, 0])
    is_padding = torch.arange(256) >= source_lengths[:, None]
    src = pairs['src'].masked_fill(is_padding, PaddedTransformer.PADDING)
    batch = {'src': src, 'idx': pairs['idx'], 'targets': pairs['targets']}
    return time_steps(lambda i: step(**batch), [batch_size]), None


def chat_lengths(rng):
    """(8863, 2) int64: tokens in sources (52 on average) and targets (20) of made-up pairs."""
    sources = rng.gamma(1.9, 27, 8863)
    targets = rng.gamma(1.5, 13, 8863)
    lengths = np.stack((sources, targets), axis=1).astype(int) + 1
    return lengths.clip(max=(256, 127))


def random_pairs(lengths, S=None, T=None):
    """A batch of random pairs for a Seq2Seq, a dict. lengths: (B, 2) int64, of sources and targets.

    S, T: columns of src and idx; None: as many as the longest needs. Sources are padded at the
    left, as src_pad (B,) says; padding of idx has -1 as its target.
    """
    lengths = torch.from_numpy(lengths)
    S = S or int(lengths[:, 0].max())
    T = T or int(lengths[:, 1].max())
    src = torch.randint(1, PAPER['vocab_size'], (len(lengths), S))
    idx = torch.randint(1, PAPER['vocab_size'], (len(lengths), T))
    is_padding = torch.arange(T) >= lengths[:, 1:]
    return {
        'src': src,
        'src_pad': S - lengths[:, 0],
        'idx': idx,
        'targets': idx.masked_fill(is_padding, -1),
    }


class PaddedTransformer(nn.Module):
    """The paper's base model, made of PyTorch's own modules."""

    PADDING = 0  # the id of padding

    def __init__(self, vocab_size):
        super().__init__()
        self.body = nn.Transformer(512, 8, 6, 6, 2048, 0.1, batch_first=True, norm_first=True)
        self.source_embedding = nn.Embedding(vocab_size, 512)
        self.target_embedding = nn.Embedding(vocab_size, 512)
        self.head = nn.Linear(512, vocab_size)

    def forward(self, idx, targets, src):
        """idx, targets: (B, T) int64; src: (B, S) int64. Returns (None, loss), as our models do."""
        causal = nn.Transformer.generate_square_subsequent_mask(idx.size(1), device=idx.device)
        is_padding = src == self.PADDING
        x = self.body(
            self.source_embedding(src), self.target_embedding(idx), tgt_mask=causal,
            src_key_padding_mask=is_padding, memory_key_padding_mask=is_padding,
        )
        logits = self.head(x)
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


# Generation: GPT-2 124M with random weights

PREFILL_TOKENS = 1000
PROMPT_TOKENS = 16
NEW_TOKENS = 128


@torch.inference_mode()
def prefill_gpt():
    """Tokens/s of prefill: run a prompt through the model, up to the logits of the next token."""
    idx = random_prompts(1, PREFILL_TOKENS)
    model = GPT(GPTConfig(**GPT2)).eval().to(device, compute_dtype)
    cost = prefill_cost(model)
    model = prepare_for_decoding(model)

    def step(i):
        cache = new_cache(model, 1, PREFILL_TOKENS)
        model.next_token_logits(idx, cache).sum().item()

    return time_steps(step, [PREFILL_TOKENS]), cost


@torch.inference_mode()
def prefill_transformers():
    """Tokens/s of the same prefill in Hugging Face's transformers."""
    idx = random_prompts(1, PREFILL_TOKENS)
    model = transformers_gpt2()

    def step(i):
        model(idx, logits_to_keep=1).logits.sum().item()

    return time_steps(step, [PREFILL_TOKENS]), prefill_cost(model)


def prefill_cost(model):
    """FLOP per token of a prompt. The head is left out: it only sees the last token."""
    weights = count_weights(model) - GPT2['vocab_size'] * GPT2['n_embd']
    attention = 2 * GPT2['n_layer'] * GPT2['n_embd'] * PREFILL_TOKENS
    return 2 * weights + attention


def decode_gpt(batch_size, bits=None):
    """Tokens/s of greedy decoding after a short prompt, prefill included. bits=8: int8 weights."""
    return time_our_decoding(batch_size, bits, NEW_TOKENS, use_cache=True)


def decode_gpt_uncached(batch_size):
    """Tokens/s of greedy decoding without a KV cache, and of fewer tokens."""
    return time_our_decoding(batch_size, None, 32, use_cache=False)


def time_our_decoding(batch_size, bits, new_tokens, use_cache):
    """Time generate() of a GPT-2 124M."""
    idx = random_prompts(batch_size, PROMPT_TOKENS)
    model = GPT(GPTConfig(**GPT2)).eval().to(device, decoding_dtype(bits))
    return time_generate(model, idx, bits, new_tokens, use_cache)


def decoding_dtype(bits):
    """The dtype of what is not quantized, as in sample.py."""
    if bits == 8 and device.type == 'cpu' and dtype == 'auto':
        return torch.float32
    return compute_dtype


def time_generate(model, idx, bits, new_tokens, use_cache=True):
    """Time generate() from idx (B, T). The cost: bytes per token, as each step reads all weights
    once."""
    batch_size = len(idx)
    bytes_per_weight = 1 if bits == 8 else compute_dtype.itemsize
    cost = count_weights(model) * bytes_per_weight / batch_size
    model = prepare_for_decoding(model, bits)

    def step(i):
        ids = model.generate(idx, new_tokens, temperature=0, use_cache=use_cache)
        ids.sum().item()

    return time_steps(step, [batch_size * new_tokens]), cost


def decode_gpt_transformers(batch_size):
    """Tokens/s of the same decoding in Hugging Face's transformers."""
    idx = random_prompts(batch_size, PROMPT_TOKENS)
    model = transformers_gpt2()
    cost = count_weights(model) * compute_dtype.itemsize / batch_size
    options = {
        'max_new_tokens': NEW_TOKENS, 'min_new_tokens': NEW_TOKENS,
        'do_sample': False, 'pad_token_id': 0,
    }

    def step(i):
        model.generate(idx, **options).sum().item()

    return time_steps(step, [batch_size * NEW_TOKENS]), cost


def decode_gpt_ctranslate2(batch_size):
    """Tokens/s of the same decoding in CTranslate2, with int8 weights: its fast way on a CPU."""
    idx = random_prompts(batch_size, PROMPT_TOKENS)
    prompts = [[str(token) for token in row] for row in idx.tolist()]
    generator = ctranslate2_gpt2(GPT(GPTConfig(**GPT2)))
    length = PROMPT_TOKENS + NEW_TOKENS
    options = {'max_length': length, 'min_length': length, 'sampling_topk': 1}

    def step(i):
        generator.generate_batch(prompts, **options)

    return time_steps(step, [batch_size * NEW_TOKENS]), None


def random_prompts(batch_size, length):
    """(batch_size, length) int64 random ids of GPT-2's vocabulary."""
    return torch.randint(GPT2['vocab_size'], (batch_size, length), device=device)


def transformers_gpt2():
    """A GPT-2 124M of Hugging Face's transformers with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()).eval().to(device, compute_dtype)


def ctranslate2_gpt2(model):
    """A ctranslate2.Generator with the weights of our GPT, rounded to int8."""
    import ctranslate2
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    gelu = common_spec.Activation.GELUTanh
    spec = TransformerDecoderModelSpec.from_config(12, 12, activation=gelu)
    weights = {}
    for name, parameter in model.transformer.named_parameters():
        weights[name] = parameter.detach().numpy()

    def copy_norm(theirs, name):
        theirs.gamma = weights[f'{name}.weight']
        theirs.beta = weights[f'{name}.bias']

    def copy_linear(theirs, name):
        theirs.weight = weights[f'{name}.weight']
        theirs.bias = weights[f'{name}.bias']

    # Copy embeddings and layers
    decoder = spec.decoder
    decoder.embeddings.weight = weights['wte.weight']
    decoder.projection.weight = weights['wte.weight']
    decoder.position_encodings.encodings = weights['wpe.weight']
    decoder.scale_embeddings = False
    for i, layer in enumerate(decoder.layer):
        copy_norm(layer.self_attention.layer_norm, f'h.{i}.ln_1')
        copy_linear(layer.self_attention.linear[0], f'h.{i}.attn.c_attn')
        copy_linear(layer.self_attention.linear[1], f'h.{i}.attn.c_proj')
        copy_norm(layer.ffn.layer_norm, f'h.{i}.ln_2')
        copy_linear(layer.ffn.linear_0, f'h.{i}.mlp.c_fc')
        copy_linear(layer.ffn.linear_1, f'h.{i}.mlp.c_proj')
    copy_norm(decoder.layer_norm, 'ln_f')

    # A vocabulary of numbers: '0', '1', …
    spec.register_vocabulary([str(i) for i in range(GPT2['vocab_size'])])
    spec.config.bos_token = '50256'
    spec.config.eos_token = '50256'
    spec.config.unk_token = '50256'

    # Quantize, save, load
    spec.validate()
    spec.optimize(quantization='int8')
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Generator(folder, intra_threads=torch.get_num_threads())


# Generation: a pretrained model

def decode_pretrained(bits=None):
    """Tokens/s of greedy decoding with the model of --init_from. bits=8: int8 weights."""
    model, _ = pretrained.load(init_from, decoding_dtype(bits))
    idx = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), device=device)
    return time_generate(model.to(device), idx, bits, NEW_TOKENS)


def decode_pretrained_transformers():
    """Tokens/s of the same decoding in Hugging Face's transformers."""
    from transformers import AutoModelForCausalLM

    folder = pretrained.fetch(init_from)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype).eval().to(device)
    idx = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), device=device)
    options = {
        'max_new_tokens': NEW_TOKENS, 'min_new_tokens': NEW_TOKENS,
        'do_sample': False, 'pad_token_id': 0,
    }

    def step(i):
        model.generate(idx, **options).sum().item()

    return time_steps(step, [NEW_TOKENS]), None


def decode_pretrained_llama_cpp():
    """Tokens/s of the same decoding in llama.cpp, with 8-bit weights (q8_0)."""
    from llama_cpp import Llama

    from pocket.gguf_export import export_gguf

    model, _ = pretrained.load(init_from)
    tok = pretrained.load_tokenizer(init_from)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.gguf'
        export_gguf(model, tok, path, gguf_type='q8_0')
        del model
        llama = Llama(str(path), n_ctx=PROMPT_TOKENS + NEW_TOKENS, n_threads=threads,
                      n_threads_batch=threads, verbose=False)

        def step(i):
            llama.reset()
            tokens = llama.generate(prompt, top_k=1, temp=0)
            for _ in range(NEW_TOKENS):
                next(tokens)

        return time_steps(step, [NEW_TOKENS]), None


# Generation: the paper's base model with random weights

SOURCE_TOKENS = 45
REPLY_TOKENS = 64


def decode_seq2seq(batch_size, use_cache=True):
    """Tokens/s of encoding sources and decoding replies greedily. The cost: bytes per token."""
    src = random_sources(batch_size).tolist()
    model = Seq2Seq(Seq2SeqConfig(**PAPER)).eval().to(device, compute_dtype)
    cost = count_weights(model) * compute_dtype.itemsize / batch_size
    model = prepare_for_decoding(model)

    def step(i):
        model.generate(src, REPLY_TOKENS, decoder_start=0, temperature=0, use_cache=use_cache)

    return time_steps(step, [batch_size * REPLY_TOKENS]), cost


def decode_seq2seq_transformers(batch_size):
    """Tokens/s of the same in a Marian model of Hugging Face's transformers."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        PAPER['vocab_size'], d_model=512, max_position_embeddings=256, activation_function='relu',
        encoder_layers=6, encoder_ffn_dim=2048, encoder_attention_heads=8,
        decoder_layers=6, decoder_ffn_dim=2048, decoder_attention_heads=8,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
    )
    model = MarianMTModel(config).eval().to(device, compute_dtype)
    src = random_sources(batch_size)
    options = {
        'max_new_tokens': REPLY_TOKENS, 'min_new_tokens': REPLY_TOKENS,
        'do_sample': False, 'num_beams': 1,
    }

    def step(i):
        model.generate(src.to(device), **options).sum().item()

    return time_steps(step, [batch_size * REPLY_TOKENS]), None


def random_sources(batch_size):
    """(batch_size, SOURCE_TOKENS) int64 random ids; 0 and 1 are left to padding and end."""
    return torch.randint(2, PAPER['vocab_size'], (batch_size, SOURCE_TOKENS))


# Data and tokenizers

VOCAB_SIZE = 4096  # of the tokenizers


def load_batches():
    """Tokens/s of loading batches of 64 x 256 in the order of an epoch, from a file of 200 MB."""
    num_tokens = 10**8
    meta = {'vocab_size': 50257, 'dtype': 'uint16', 'counts': {'train': num_tokens}}
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(0, 50257, num_tokens, dtype=np.uint16)
        ids.tofile(Path(folder) / 'train.bin')
        data = Stream(folder, meta, 'train', 256, 64)
        return time_steps(lambda i: list(data.batches(1337, i, 1)), [64 * 256]), None


def encode():
    """Bytes/s of encoding text with our BPE, in pieces of 4,096 characters."""
    text = sample_text()
    tok = BpeTokenizer.train([text], VOCAB_SIZE)
    pieces = split_text(text)
    return time_steps(lambda i: tok.encode_batch(pieces), [len(text.encode())]), None


def encode_tokenizers():
    """Bytes/s of encoding the same text with Hugging Face's tokenizers."""
    text = sample_text()
    tok = train_hugging_face_bpe(text)
    pieces = split_text(text)
    return time_steps(lambda i: tok.encode_batch(pieces), [len(text.encode())]), None


def learn_bpe():
    """Bytes/s of learning a BPE vocabulary from a text."""
    text = sample_text()
    return time_steps(lambda i: BpeTokenizer.train([text], VOCAB_SIZE), [len(text.encode())]), None


def learn_bpe_tokenizers():
    """Bytes/s of learning a BPE vocabulary of the same size with Hugging Face's tokenizers."""
    text = sample_text()
    return time_steps(lambda i: train_hugging_face_bpe(text), [len(text.encode())]), None


def train_hugging_face_bpe(text):
    """A byte-level BPE tokenizer of Hugging Face's."""
    from tokenizers import ByteLevelBPETokenizer

    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator([text], VOCAB_SIZE, show_progress=False)
    return tok


def sample_text():
    """About a megabyte of text that every machine has: Python's own standard library."""
    folder = Path(json.__file__).parent.parent
    text = ''
    for path in sorted(folder.glob('*.py')):
        text += path.read_text(encoding='utf-8', errors='replace')
        if len(text) > 1_000_000:
            break
    return text


def split_text(text):
    """Pieces of 4,096 characters."""
    return [text[i:i + 4096] for i in range(0, len(text), 4096)]


# Start-up

def start_sample():
    """How often per second sample.py could start, load a small model and print its first token."""
    with tempfile.TemporaryDirectory() as folder:
        tok = ByteTokenizer()
        model = GPT(GPTConfig(**{**TINY, 'vocab_size': tok.vocab_size}))
        state = checkpoint.model_state(model, tok, {}, None)
        checkpoint.save(Path(folder) / 'best.pt', state)
        command = [
            sys.executable, ROOT / 'sample.py', f'--out_dir={folder}', f'--device={device}',
            '--start=a', '--max_new_tokens=1',
        ]
        return time_steps(lambda i: run_quietly(command), [1]), None


def start_import_torch():
    """How often per second Python could start and import torch: what sample.py can't go below."""
    return time_steps(lambda i: run_quietly([sys.executable, '-c', 'import torch']), [1]), None


def run_quietly(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------------------
# The table. To add a row, write a function that measures something and name it here.

@dataclass
class Row:
    """A kind of work and the functions that measure it, each of which returns (rate, cost)."""

    name: str
    unit: str               # of the rate
    ours: Callable
    baselines: dict         # {name: function}
    limit: str = ''         # what cost counts: 'FLOP' or 'bytes', see measure_peaks()


SMALL_DROPOUT = {**SMALL, 'dropout': 0.2}
ROWS = [
    Row(
        "train nanoGPT's CPU example (0.8 M), 12 x 64", 'tok/s',
        lambda: train_gpt(TINY, 12, 64),
        training_baselines(TINY, 12, 64),
        limit='FLOP',
    ),
    Row(
        'train shakespeare_char (10.7 M), 64 x 256', 'tok/s',
        lambda: train_gpt(SMALL, 64, 256),
        training_baselines(SMALL, 64, 256),
        limit='FLOP',
    ),
    Row(
        'train shakespeare_char with dropout 0.2', 'tok/s',
        lambda: train_gpt(SMALL_DROPOUT, 64, 256),
        training_baselines(SMALL_DROPOUT, 64, 256),
        limit='FLOP',
    ),
    Row(
        'train GPT-2 124M, 4 x 512', 'tok/s',
        lambda: train_gpt(GPT2, 4, 512),
        training_baselines(GPT2, 4, 512),
        limit='FLOP',
    ),
    Row(
        'train Seq2Seq base, chats', 'pairs/s',
        train_seq2seq,
        {'padded': train_seq2seq_padded},
    ),
    Row(
        'prefill GPT-2 124M, 1 x 1000', 'tok/s',
        prefill_gpt,
        {'transformers': prefill_transformers},
        limit='FLOP',
    ),
    Row(
        'decode GPT-2 124M, batch 1', 'tok/s',
        lambda: decode_gpt(1),
        {
            'transformers': lambda: decode_gpt_transformers(1),
            'ctranslate2': lambda: decode_gpt_ctranslate2(1),
            'uncached': lambda: decode_gpt_uncached(1),
        },
        limit='bytes',
    ),
    Row(
        'decode GPT-2 124M, batch 8', 'tok/s',
        lambda: decode_gpt(8),
        {
            'transformers': lambda: decode_gpt_transformers(8),
            'ctranslate2': lambda: decode_gpt_ctranslate2(8),
            'uncached': lambda: decode_gpt_uncached(8),
        },
        limit='bytes',
    ),
    Row(
        'decode GPT-2 124M, batch 1, int8', 'tok/s',
        lambda: decode_gpt(1, bits=8),
        {'ctranslate2': lambda: decode_gpt_ctranslate2(1)},
        limit='bytes',
    ),
    Row(
        'decode GPT-2 124M, batch 8, int8', 'tok/s',
        lambda: decode_gpt(8, bits=8),
        {'ctranslate2': lambda: decode_gpt_ctranslate2(8)},
        limit='bytes',
    ),
    Row(
        'decode Seq2Seq base, batch 1', 'tok/s',
        lambda: decode_seq2seq(1),
        {
            'transformers': lambda: decode_seq2seq_transformers(1),
            'uncached': lambda: decode_seq2seq(1, use_cache=False),
        },
        limit='bytes',
    ),
    Row(
        'decode Seq2Seq base, batch 32', 'tok/s',
        lambda: decode_seq2seq(32),
        {
            'transformers': lambda: decode_seq2seq_transformers(32),
            'uncached': lambda: decode_seq2seq(32, use_cache=False),
        },
        limit='bytes',
    ),
    Row('load batches of 64 x 256', 'tok/s', load_batches, {}),
    Row('encode text with our BPE', 'bytes/s', encode, {'tokenizers': encode_tokenizers}),
    Row('learn a BPE of 4,096 tokens', 'bytes/s', learn_bpe, {'tokenizers': learn_bpe_tokenizers}),
    Row('start sample.py', '1/s', start_sample, {'import torch': start_import_torch}),
]
PRETRAINED_ROWS = [  # with --init_from
    Row(
        f'decode {init_from}, batch 1', 'tok/s',
        decode_pretrained,
        {'transformers': decode_pretrained_transformers},
        limit='bytes',
    ),
    Row(
        f'decode {init_from}, batch 1, int8', 'tok/s',
        lambda: decode_pretrained(bits=8),
        {'llama.cpp': decode_pretrained_llama_cpp},
        limit='bytes',
    ),
]
if init_from:
    ROWS = PRETRAINED_ROWS
PACKAGES = {  # that baselines need, by the baseline's name
    'transformers': 'transformers',
    'ctranslate2': 'ctranslate2',
    'tokenizers': 'tokenizers',
    'llama.cpp': 'llama_cpp',
}


# --------------------------------------------------------------------------------------------------
# Running them

def main():
    if nanogpt and not (Path(nanogpt) / 'model.py').is_file():
        raise UserError(f'--nanogpt={nanogpt} has no model.py: name the folder of a nanoGPT clone')

    if worker == 'peaks':
        print(json.dumps(measure_peaks()))
    elif worker:
        print(json.dumps(measure(worker)))
    else:
        compare()


def measure(name):
    """In a worker: measure the row named `rows`. Returns [rate, cost, peak memory in bytes]."""
    torch.manual_seed(0)
    row = next((row for row in ROWS if row.name == rows), None)
    if row is None or name not in ('ours', *row.baselines):
        raise UserError(f'--worker={name} is for internal use: omit it')
    function = row.ours if name == 'ours' else row.baselines[name]
    rate, cost = function()
    return [rate, cost, peak_memory(device)]


def compare():
    """Measure all chosen rows in processes of their own, and print the results."""
    chosen = [row for row in ROWS if rows in row.name]
    if not chosen:
        names = '; '.join(row.name for row in ROWS)
        raise UserError(f'no row has {rows!r} in its name: there are {names}')
    available = available_baselines()
    num_rounds = rounds or (3 if available else 1)

    peaks = run_worker('peaks')
    threads = torch.get_num_threads()
    dtype_name = str(compute_dtype).removeprefix('torch.')
    print(f'{describe_processor()}; {device}, {threads} threads, torch {torch.__version__}; '
          f'peak {peaks["FLOP"] / 1e9:,.0f} GFLOP/s ({dtype_name}), '
          f'{peaks["bytes"] / 1e9:,.1f} GB/s read from memory')

    results = {}
    for row in chosen:
        names = ['ours'] + [name for name in row.baselines if name in available]
        measured = {name: [] for name in names}  # [rate, cost, peak memory] of each repeat
        for _ in range(num_rounds):
            for name in names:
                measured[name].append(run_worker(name, f'--rows={row.name}'))
        print_row(row, measured, peaks)
        results[row.name] = {}
        for name, repeats in measured.items():
            rates = [rate for rate, _, _ in repeats]
            results[row.name][name] = {'rates': rates, 'peak': [memory for _, _, memory in repeats]}

    if to is not None:
        figures = {
            'processor': describe_processor(),
            'torch': torch.__version__,
            'device': str(device),
            'threads': threads,
            'limits': peaks,
            'work': results,
        }
        text = json.dumps(figures, indent=1)
        atomic_write(to, lambda f: f.write(text.encode('utf-8')))


def describe_processor():
    """The processor's name and those of its features that decide how fast bfloat16 is."""
    name = platform.processor() or platform.machine()
    flags = ''
    info = Path('/proc/cpuinfo')
    if info.is_file():  # Linux
        text = info.read_text(encoding='utf-8', errors='replace')
        fields = dict(line.split(':', 1) for line in text.splitlines() if ':' in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get('model name', name)
        flags = fields.get('flags', '')
    features = [feature for feature in ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2')
                if feature in flags.split()]
    return f'{name} ({", ".join(features) or "no AVX2"})'


def available_baselines():
    """The names of the baselines that are asked for and can run here."""
    if not peers and not nanogpt:
        return set()
    names = {'eager', 'padded', 'uncached', 'import torch'}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package):
            names.add(name)
    if nanogpt:
        names |= {'nanogpt', 'nanogpt-bf16'}
    return names


def run_worker(name, *args):
    """Run this script as a worker and return what it prints last, JSON.

    A process of its own has a peak memory of its own, and starts with empty caches.
    """
    options = [arg for arg in sys.argv[1:] if not arg.startswith('--rows=')]
    command = [sys.executable, __file__, *options, f'--worker={name}', *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding='utf-8')
    if done.returncode != 0:
        raise UserError(f'the process for {" ".join((name, *args))} failed: see above')
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row, measured, peaks):
    """Print a row's results. measured: {name: [[rate, cost, peak memory] of each repeat]}."""
    print(row.name)
    our_rate = median(rate for rate, _, _ in measured['ours'])
    for name, repeats in measured.items():
        rates = [rate for rate, _, _ in repeats]
        rate = median(rates)
        memory = median(memory or 0 for _, _, memory in repeats)
        cost = repeats[0][1]

        line = f'    {name:14}{rate:>14,.1f} {row.unit:8}'
        if len(rates) > 1:
            line += f' ({min(rates):,.1f} - {max(rates):,.1f})'
        line += f' {memory / 1e9:.2f} GB'
        if cost and row.limit:
            line += f', {rate * cost / peaks[row.limit]:.0%} of peak {row.limit}/s'
        if name != 'ours':
            line += f'; ours is {our_rate / rate:.2f} times as fast'
        print(line, flush=True)


if __name__ == '__main__':
    main()
