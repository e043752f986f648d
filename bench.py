"""
How fast this machine trains, reads and writes, and which share that is of what its processor and its memory can do.

    python bench.py                       every row once, in two to three minutes
    python bench.py --rows=decode         only rows whose name holds this
    python bench.py --peers --rounds=3    beside peers: nn.Transformer and, where installed, transformers, ctranslate2, tokenizers
    python bench.py --nanogpt=FOLDER      … and nanoGPT, FOLDER holding a clone of github.com/karpathy/nanoGPT
    python bench.py --profile             also a trace of each row in out/bench, for chrome://tracing or ui.perfetto.dev

Each measurement is a process of its own, and peers take turns with us: A B A B. Same shapes, same data, same number of threads;
the first steps, which warm up, don't count. Prints medians, with minimum and maximum over the rounds, and one line of JSON last.
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError

rows = ''                          # only rows whose name holds this
peers = False                      # the same work by whatever peer is installed
nanogpt: str | None = None         # a clone of nanoGPT to run beside us; switches peers on
rounds = 1                         # processes of each, in turns
seconds = 2.0                      # of timed steps in each process
profile = False                    # write traces to out/bench
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of our products; peers run in theirs
worker = ''                        # for this script's own use: whose turn it is
config, _ = configure(__file__, globals())

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import checkpoint
from pocket.data import Stream, bucket_by_length
from pocket.device import autocast, peak_memory, pick_device, pick_dtype
from pocket.files import ROOT
from pocket.quantize import prepare_for_decoding
from pocket.tokenizer import BpeTokenizer, ByteTokenizer

SMALL = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
TINY = SMALL | dict(n_layer=4, n_head=4, n_embd=128)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)
PAPER = dict(vocab_size=50260, block_size=128, src_block_size=256, attn_bias=False, head_bias=True, tie_source=False)
where = pick_device(device)
precision = pick_dtype(where, dtype)[0]


def timed(step, amounts):
    """Work a second: step(i) does amounts[i % len] of it. Runs for `seconds`; the first steps, which warm up, don't count."""
    times, n, start = [], len(amounts), time.perf_counter()
    while len(times) < min(3, n) or len(times) < 3 and time.perf_counter() - start < seconds:
        step(len(times))
        times.append(0)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < n or len(times) % n:  # whole rounds over batches of different sizes
        start = time.perf_counter()
        step(len(times))
        times.append(time.perf_counter() - start)
    if profile:
        trace = ROOT / 'out' / 'bench' / f'{"".join(c if c.isalnum() else "-" for c in rows)}-{worker}.json'
        trace.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as p:
            step(0)
        p.export_chrome_trace(str(trace))
    return amounts[0] / median(times) if n == 1 else sum(amounts) * len(times) / n / sum(times)


def weights(net):
    """Parameters that a written token is multiplied with: those of the layers that write and of the head, not of embeddings."""
    stack = net.transformer if isinstance(net, GPT) else net.decoder
    return sum(p.numel() for p in [*stack.h.parameters(), *stack.ln_f.parameters(), *net.lm_head.parameters()])


def trainer(net, precision, fused=True):
    """A function that takes one step of training on a batch: forward, backward, clipping, AdamW."""
    net.to(where).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)

    def step(**batch):
        with autocast(where, precision):
            loss = net(**{key: t.to(where) for key, t in batch.items()})[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
    return step


def train_gpt(who, B, T, args):
    """Tokens a second of training on random ids; FLOP a token."""
    args = {**args, 'block_size': max(T, args['block_size']) if args is GPT2 else T}
    net = GPT(GPTConfig(act='gelu_erf', attn_dropout=args.get('dropout', 0.0), **args))
    cost = 6 * weights(net) + 6 * args['n_layer'] * args['n_embd'] * T  # attention: what lies below the diagonal
    if who == 'nanogpt':
        sys.path.insert(0, nanogpt)
        for module in ('model', 'configurator'):
            sys.modules.pop(module)
        import model as peer
        theirs = torch.float32 if where.type == 'cpu' else torch.bfloat16  # what its train.py does
        step = trainer(peer.GPT(peer.GPTConfig(**args)), theirs, where.type == 'cuda')
    else:
        step = trainer(net, precision)
    idx, targets = torch.randint(args['vocab_size'], (2, B, T))
    return timed(lambda i: step(idx=idx, targets=targets), [B * T]), cost


class Padded(torch.nn.Module):
    """The base model of 2017 on PyTorch's own modules."""

    def __init__(self, V):
        super().__init__()
        self.body = torch.nn.Transformer(512, 8, 6, 6, 2048, 0.1, batch_first=True, norm_first=True)
        self.src, self.tgt, self.head = torch.nn.Embedding(V, 512), torch.nn.Embedding(V, 512), torch.nn.Linear(512, V)

    def forward(self, idx, targets, src):
        causal = torch.nn.Transformer.generate_square_subsequent_mask(idx.size(1), device=idx.device)
        hidden = src == 0
        x = self.body(self.src(src), self.tgt(idx), tgt_mask=causal, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return None, torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)


def train_pairs(who):
    """Pairs a second of training, their lengths as in chats: sources of 52 tokens in the mean, targets of 20."""
    rng = np.random.default_rng(0)
    lengths = np.stack((rng.gamma(1.9, 27, 8863), rng.gamma(1.5, 13, 8863)), axis=1).astype(int) + 1
    lengths = lengths.clip(max=(256, 127))
    if who == 'padded':  # the way small encoder-decoder projects train: float32, every pair padded to the longest
        step, groups = trainer(Padded(PAPER['vocab_size']), torch.float32), [np.arange(32)]
    else:
        step = trainer(Seq2Seq(Seq2SeqConfig(dropout=0.1, **PAPER)), precision)
        groups = bucket_by_length(lengths, 4096)
        groups = [groups[i] for i in rng.permutation(len(groups))[:max(3, int(seconds))]]

    def batch(members):
        S, T = (256, 127) if who == 'padded' else lengths[members].max(axis=0)
        src, idx = (torch.randint(1, PAPER['vocab_size'], (len(members), int(n))) for n in (S, T))
        s, t = torch.from_numpy(lengths[members]).T[:, :, None]
        if who == 'padded':
            return {'src': src.where(torch.arange(256) < s, 0), 'idx': idx, 'targets': idx.where(torch.arange(127) < t, -1)}
        return {'src': src, 'src_pad': S - s[:, 0], 'idx': idx, 'targets': idx.where(torch.arange(T) < t, -1)}
    batches = [batch(members) for members in groups]
    return timed(lambda i: step(**batches[i % len(batches)]), [len(members) for members in groups]), None


@torch.inference_mode()
def prefill(who, T=1000):
    """Tokens a second of reading a prompt of T tokens, GPT-2 124M's shape; FLOP a token."""
    idx = torch.randint(GPT2['vocab_size'], (1, T), device=where)
    net = GPT(GPTConfig(**GPT2))
    cost = 2 * (weights(net) - net.config.vocab_size * 768) + 2 * 12 * 768 * T  # the head sees the last token alone
    if who == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        net = GPT2LMHeadModel(GPT2Config()).eval().to(where, precision)
        return timed(lambda i: net(idx, logits_to_keep=1).logits.sum().item(), [T]), cost
    net = prepare_for_decoding(net.eval().to(where, precision))
    return timed(lambda i: net(idx, cache=net.new_cache(1, T), last_only=True)[0].sum().item(), [T]), cost


def decode_gpt(who, B, n=128, bits=None):
    """Tokens a second of greedy decoding behind 16 tokens, GPT-2 124M's shape, random weights; bytes read for a token."""
    idx = torch.randint(GPT2['vocab_size'], (B, 16), device=where)
    rest = torch.float32 if bits and where.type == 'cpu' and dtype == 'auto' else precision  # as sample.py has it
    net = GPT(GPTConfig(**GPT2)).eval().to(where, rest)
    cost = weights(net) * (1 if bits else precision.itemsize) / B
    if who == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        net = GPT2LMHeadModel(GPT2Config()).eval().to(where, precision)
        how = {'max_new_tokens': n, 'min_new_tokens': n, 'do_sample': False, 'pad_token_id': 0}
        return timed(lambda i: net.generate(idx, **how).sum().item(), [B * n]), cost
    if who == 'ctranslate2':
        net = ctranslate2_gpt(net)
        prompts = [[str(t) for t in row] for row in idx.tolist()]
        how = {'max_length': 16 + n, 'min_length': 16 + n, 'sampling_topk': 1}
        return timed(lambda i: net.generate_batch(prompts, **how), [B * n]), None
    net, n = prepare_for_decoding(net, bits), n if who == 'ours' else 32
    return timed(lambda i: net.generate(idx, n, temperature=0, use_cache=who == 'ours').sum().item(), [B * n]), cost


def ctranslate2_gpt(net):
    """ctranslate2.Generator with the weights of our GPT in int8, its way of being fast on a CPU."""
    import ctranslate2
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
    spec = TransformerDecoderModelSpec.from_config(12, 12, activation=common_spec.Activation.GELUTanh)
    tensors = {name: p.detach().float().numpy() for name, p in net.transformer.named_parameters()}
    layers, names = [(spec.decoder.layer_norm, 'ln_f')], ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
    for i, layer in enumerate(spec.decoder.layer):
        att, mlp = layer.self_attention, layer.ffn
        parts = (att.layer_norm, *att.linear, mlp.layer_norm, mlp.linear_0, mlp.linear_1)
        layers += zip(parts, (f'h.{i}.{name}' for name in names))
    for part, name in layers:
        ours, theirs = tensors[f'{name}.weight'], tensors[f'{name}.bias']
        part.__dict__.update({'gamma': ours, 'beta': theirs} if 'ln_' in name else {'weight': ours, 'bias': theirs})
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = tensors['wte.weight']
    spec.decoder.position_encodings.encodings, spec.decoder.scale_embeddings = tensors['wpe.weight'], False
    spec.register_vocabulary([str(i) for i in range(GPT2['vocab_size'])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = '50256'
    folder = tempfile.mkdtemp()
    spec.validate()
    spec.optimize(quantization='int8')
    spec.save(folder)
    return ctranslate2.Generator(folder, intra_threads=torch.get_num_threads())


def decode_seq2seq(who, B, n=64):
    """Tokens a second of greedy decoding of B sources of 45 tokens, the base shape, random weights; bytes read for a token."""
    src = torch.randint(2, PAPER['vocab_size'], (B, 45))
    if who == 'transformers':
        from transformers import MarianConfig, MarianMTModel
        sizes = {f'{side}_{k}': v for side in ('encoder', 'decoder')
                 for k, v in (('layers', 6), ('ffn_dim', 2048), ('attention_heads', 8))}
        theirs = MarianConfig(PAPER['vocab_size'], d_model=512, max_position_embeddings=256, activation_function='relu',
                              pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, **sizes)
        net = MarianMTModel(theirs).eval().to(where, precision)
        how = {'max_new_tokens': n, 'min_new_tokens': n, 'do_sample': False, 'num_beams': 1}
        return timed(lambda i: net.generate(src.to(where), **how).sum().item(), [B * n]), None
    net = Seq2Seq(Seq2SeqConfig(**PAPER)).eval().to(where, precision)
    cost = weights(net) * precision.itemsize / B
    net = prepare_for_decoding(net)
    return timed(lambda i: net.generate(src.tolist(), n, start=0, temperature=0, use_cache=who == 'ours'), [B * n]), cost


def sources():
    """About a megabyte of text that every machine has: Python's own standard library."""
    text = ''
    for path in sorted(Path(json.__file__).parent.parent.glob('*.py')):
        text += path.read_text(encoding='utf-8', errors='replace')
        if len(text) > 1_000_000:
            break
    return text


def train_bpe(who):
    """Bytes a second of learning 4,096 byte-pair tokens."""
    text = sources()
    if who == 'tokenizers':
        return timed(lambda i: peer_tokenizer(text), [len(text.encode())]), None
    return timed(lambda i: BpeTokenizer.train([text], 4096), [len(text.encode())]), None


def peer_tokenizer(text):
    """4,096 byte-pair tokens by Hugging Face."""
    from tokenizers import ByteLevelBPETokenizer
    peer = ByteLevelBPETokenizer()
    peer.train_from_iterator([text], 4096, show_progress=False)
    return peer


def encode(who):
    """Bytes a second of text to ids, with 4,096 byte-pair tokens, in blocks of 4,096 characters."""
    text = sources()
    texts, size = [text[i:i + 4096] for i in range(0, len(text), 4096)], len(text.encode())
    if who == 'tokenizers':
        peer = peer_tokenizer(text)
        return timed(lambda i: peer.encode_batch(texts), [size]), None
    tok = BpeTokenizer.train([text], 4096)
    return timed(lambda i: tok.encode_batch(texts), [size]), None


def load(who):
    """Tokens a second of reading batches of 64 x 256 in the order of an epoch, from 200 MB."""
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, 10**8, dtype=np.uint16).tofile(Path(folder) / 'train.bin')
        data = Stream(folder, {'vocab_size': 50257, 'dtype': 'uint16', 'counts': {'train': 10**8}}, 'train', 256, 64)
        return timed(lambda i: list(data.batches(1337, i, 1)), [64 * 256]), None


def start(who):
    """How often a second sample.py could start, load a small model and write its first token; or Python import torch."""
    if who == 'import torch':
        return timed(lambda i: subprocess.run([sys.executable, '-c', 'import torch'], check=True), [1]), None
    with tempfile.TemporaryDirectory() as folder:
        net, tok = GPT(GPTConfig(**TINY | dict(vocab_size=257))), ByteTokenizer()
        checkpoint.save(Path(folder) / 'best.pt', checkpoint.model_state(net, tok, {}))
        command = [sys.executable, ROOT / 'sample.py', f'--out_dir={folder}', '--start=a', '--max_new_tokens=1']
        return timed(lambda i: subprocess.run([*command, f'--device={where}'], check=True, stdout=subprocess.DEVNULL), [1]), None


WORK = {  # name: (unit, ceiling that the cost of a unit counts against, peers, what to time)
    "train nanoGPT's CPU example (0.8 M), 12 x 64": ('tok/s', 'FLOP', ['nanogpt'], lambda who: train_gpt(who, 12, 64, TINY)),
    'train shakespeare_char (10.7 M), 64 x 256': ('tok/s', 'FLOP', ['nanogpt'], lambda who: train_gpt(who, 64, 256, SMALL)),
    '… with dropout 0.2, train': ('tok/s', 'FLOP', ['nanogpt'], lambda who: train_gpt(who, 64, 256, SMALL | dict(dropout=0.2))),
    'train GPT-2 124M, 4 x 512': ('tok/s', 'FLOP', ['nanogpt'], lambda who: train_gpt(who, 4, 512, GPT2)),
    'train Seq2Seq base, chats': ('pairs/s', '', ['padded'], train_pairs),
    'prefill GPT-2 124M, 1 x 1000': ('tok/s', 'FLOP', ['transformers'], prefill),
    'decode GPT-2 124M, batch 1': ('tok/s', 'bytes', ['transformers', 'ctranslate2', 'uncached'], lambda who: decode_gpt(who, 1)),
    'decode GPT-2 124M, batch 8': ('tok/s', 'bytes', ['transformers', 'ctranslate2', 'uncached'], lambda who: decode_gpt(who, 8)),
    'decode GPT-2 124M, batch 1, int8': ('tok/s', 'bytes', ['ctranslate2'], lambda who: decode_gpt(who, 1, bits=8)),
    'decode GPT-2 124M, batch 8, int8': ('tok/s', 'bytes', ['ctranslate2'], lambda who: decode_gpt(who, 8, bits=8)),
    'decode Seq2Seq base, batch 1': ('tok/s', 'bytes', ['transformers', 'uncached'], lambda who: decode_seq2seq(who, 1)),
    'decode Seq2Seq base, batch 32': ('tok/s', 'bytes', ['transformers', 'uncached'], lambda who: decode_seq2seq(who, 32)),
    'batches of 64 x 256 from a file': ('tok/s', '', [], load),
    'text to ids, our BPE': ('bytes/s', '', ['tokenizers'], encode),
    'learn a BPE of 4,096': ('bytes/s', '', ['tokenizers'], train_bpe),
    'start: sample.py to its first token': ('1/s', '', ['import torch'], start),
}


def ceilings():
    """{what: the most of it that could be had a second}: FLOP of a matrix product, bytes read from memory; best of ten."""
    def best(f):
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
        return min(times)
    (a, b), x = torch.randn(2, 2048, 2048, device=where).to(precision), torch.ones(2**27, device=where)
    return {'FLOP': 2 * 2048 ** 3 / best(lambda: (a @ b)[0, 0].item()), 'bytes': x.nbytes / best(lambda: x.sum().item())}


if nanogpt and not (Path(nanogpt) / 'model.py').is_file():
    raise UserError(f'--nanogpt={nanogpt} holds no model.py: name the folder of a clone of nanoGPT')
if rounds < 1 or seconds <= 0:
    raise UserError(f'rounds must be at least 1 and seconds above 0, got {rounds} and {seconds}')
if worker == 'ceilings':
    print(json.dumps(ceilings()))
    raise SystemExit(0)
if worker:
    torch.manual_seed(0)
    print(json.dumps([*WORK[rows][3](worker), peak_memory(where)]))
    raise SystemExit(0)
chosen = [name for name in WORK if rows in name]
if not chosen:
    raise UserError(f'no row holds {rows!r}: there are {"; ".join(WORK)}')
found = {who for who in ('transformers', 'ctranslate2', 'tokenizers') if importlib.util.find_spec(who)}
found = found | {'padded', 'uncached', 'import torch', *(['nanogpt'] if nanogpt else [])} if peers or nanogpt else set()


def ask(who, *more):
    """What a process of its own prints as its last line, JSON: its peak of memory is its own, ours stays small."""
    told = [a for a in sys.argv[1:] if not a.startswith('--rows=')] + [f'--worker={who}', *more]
    done = subprocess.run([sys.executable, __file__, *told], stdout=subprocess.PIPE, text=True, encoding='utf-8')
    if done.returncode:
        raise UserError(f'the {who} process {" ".join(more)} failed: see above')
    return json.loads(done.stdout.splitlines()[-1])


limits = ask('ceilings')
print(f'{where}, {torch.get_num_threads()} threads, torch {torch.__version__}; at the most {limits["FLOP"] / 1e9:,.0f} GFLOP/s '
      f'({str(precision).removeprefix("torch.")}) and {limits["bytes"] / 1e9:,.1f} GB/s read')
result = {'torch': torch.__version__, 'device': str(where), 'threads': torch.get_num_threads(), 'limits': limits, 'work': {}}
for name in chosen:
    unit, limit, rivals, _ = WORK[name]
    got = {who: [] for who in ['ours', *(who for who in rivals if who in found)]}
    for _ in range(rounds):
        for who in got:
            got[who].append(ask(who, f'--rows={name}'))
    print(name)
    for who, values in got.items():
        rates, cost, peak = [rate for rate, *_ in values], values[0][1], median(memory or 0 for *_, memory in values)
        ours = median(rate for rate, *_ in got['ours'])
        told = f'{median(rates):>14,.1f} {unit:8} ({min(rates):,.1f} - {max(rates):,.1f}), {peak / 1e9:.2f} GB'
        told += f', {median(rates) * cost / limits[limit]:.0%} of the {limit}/s' if cost and limit else ''
        print(f'    {who:14}{told}' + (f'; ours is {ours / median(rates):.2f} times that' if who != 'ours' else ''), flush=True)
    result['work'][name] = {who: {'rates': [v[0] for v in values], 'peak': [v[2] for v in values]} for who, values in got.items()}
print(json.dumps(result))
