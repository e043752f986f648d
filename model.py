"""
The models of pocketGPT, in one file: read it from top to bottom.

    GPTConfig, Seq2SeqConfig   every shape and switch; the defaults are GPT-2's architecture and the 2017 paper's
    Attention                  multi-head attention, of a text on itself or on another, with an optional key-value cache
    MLP, Block, Stack          the rest of a Transformer: layers, and a pile of them on top of embeddings
    GPT                        one stack that reads and goes on: decoder-only
    Seq2Seq                    one stack that reads a source, one that writes a target: encoder-decoder

From the last layer to logits and loss: head.py. How they write text: generate.py. References:
  GPT-2      Radford et al. 2019, and https://github.com/openai/gpt-2/blob/master/src/model.py
  Attention  Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
  rotary     Su et al. 2021,      https://arxiv.org/abs/2104.09864
  RMSNorm    Zhang, Sennrich 2019, https://arxiv.org/abs/1910.07467
  QK-norm    Dehghani et al. 2023, https://arxiv.org/abs/2302.05442
  ReLU^2     So et al. 2021,      https://arxiv.org/abs/2109.08668
  SwiGLU     Shazeer 2020,        https://arxiv.org/abs/2002.05202
  token shift  Peng et al. 2023,  https://arxiv.org/abs/2305.13048 (RWKV's)
"""
import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pocket.generate import Generation, pad_left
from pocket.kernels import AdaptiveHead, Head, score

CHOICES = {  # what the switches of GPTConfig that are names may be
    'pos': ('learned', 'sinusoidal', 'rotary'),
    'norm': ('layernorm', 'rmsnorm'),
    'norm_position': ('pre', 'post'),
    'act': ('gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'),
    'init': ('gpt2', 'xavier'),
}
LIMITS = {  # … and how large its sizes: a config can come from a stranger's file, and what it asks for is made
    'block_size': 2**20, 'src_block_size': 2**20, 'vocab_size': 2**62, 'n_layer': 2**10, 'n_encoder_layer': 2**10,
    'n_head': 2**24, 'n_embd': 2**24, 'n_inner': 2**24,
}


@dataclass
class GPTConfig:
    """Shape and switches of a GPT. The defaults are GPT-2 124M; raises ValueError where they contradict each other."""
    block_size: int = 1024           # tokens of context
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None       # width of the MLP's hidden layer; None: 4 * n_embd
    dropout: float = 0.0             # on embeddings and on what each block adds to the residual stream
    attn_dropout: float = 0.0        # on attention weights
    bias: bool = True                # biases in Linear and LayerNorm, but for these two:
    attn_bias: bool | None = None    # in the projections of attention; None: as bias
    head_bias: bool = False          # in the head
    pos: str = 'learned'             # learned, sinusoidal (on embeddings times sqrt(n_embd)) or rotary
    norm: str = 'layernorm'          # layernorm or rmsnorm
    norm_position: str = 'pre'       # pre: x + f(norm(x)), GPT-2's; post: norm(x + f(x)), the 2017 paper's
    act: str = 'gelu'                # gelu (tanh form, GPT-2's), gelu_erf (nanoGPT's), relu, relu2 or swiglu
    qk_norm: bool = False            # normalise queries and keys in each head
    token_shift: bool = False        # attention and MLP read half of their channels from the token before
    tie_weights: bool = True         # the head shares the token embedding
    init: str = 'gpt2'               # gpt2: normal(0, 0.02); xavier: uniform by fan, embeddings normal(0, n_embd^-1/2)
    zero_init: bool = False          # projections into the residual stream start at zero
    softcap: float = 0.0             # logits = softcap * tanh(logits / softcap); 0: off
    cutoffs: tuple = ()              # adaptive softmax: how many of the most frequent ids go in the first, second … cluster
    div_value: float = 4.0           # … each next cluster is that much narrower
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about a third more time

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            if not isinstance(value, kind) or isinstance(value, bool) and 'bool' not in str(f.type):
                raise ValueError(f'{f.name} must be of type {getattr(f.type, "__name__", f.type)}, got {type(value).__name__}')
        problems = [f'{name} must be one of {", ".join(valid)}, got {getattr(self, name)!r}'
                    for name, valid in CHOICES.items() if getattr(self, name) not in valid]
        problems += [f'{name} must be from 1 to {most:,}, got {value}' for name, most in LIMITS.items()
                     if (value := getattr(self, name, None)) is not None and not 1 <= value <= most]
        problems += [f'{name} must be at least 0 and below 1, got {getattr(self, name)}'
                     for name in ('dropout', 'attn_dropout') if not 0 <= getattr(self, name) < 1]
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f'n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}')
        elif self.n_head >= 1 and self.pos == 'rotary' and self.n_embd // self.n_head % 2:
            problems.append(f'rotary positions need an even n_embd / n_head, got {self.n_embd // self.n_head}')
        if self.token_shift and self.n_embd % 2:
            problems.append(f'token_shift needs an even n_embd, got {self.n_embd}')
        if not 0 <= self.softcap < math.inf:
            problems.append(f'softcap must be at least 0, got {self.softcap}')
        width = {'sinusoidal': self.n_embd, 'rotary': self.n_embd // max(1, self.n_head)}.get(self.pos, 0)
        if (T := max(self.block_size, getattr(self, 'src_block_size', None) or 0)) * width > 2**26:
            problems.append(f'{self.pos} positions are a table of block_size x {width}, too large with {T}: lower block_size')
        if self.cutoffs:
            if not (all(isinstance(n, int) for n in self.cutoffs) and list(self.cutoffs) == sorted(set(self.cutoffs))
                    and 0 < self.cutoffs[0] and self.cutoffs[-1] < self.vocab_size and len(self.cutoffs) <= 16
                    and 1 <= self.div_value <= self.n_embd and self.div_value ** len(self.cutoffs) <= self.n_embd):
                problems.append(f'cutoffs must be rising numbers of ids between 0 and the vocabulary\'s {self.vocab_size}, 16 at '
                                f'most, div_value at least 1, the last cluster 1 wide, got {self.cutoffs} and {self.div_value}')
            if without := [name for name in ('tie_weights', 'softcap', 'head_bias') if getattr(self, name)]:
                problems.append(f'cutoffs (adaptive softmax) don\'t go with {", ".join(without)}: switch one of the two off')
        if problems:
            raise ValueError('; '.join(problems))


@dataclass
class Seq2SeqConfig(GPTConfig):
    """Shape and switches of an encoder-decoder. The defaults are the base model of the 2017 paper, with norms in front."""
    block_size: int = 256            # tokens of a target
    src_block_size: int | None = None  # tokens of a source; None: as block_size
    n_layer: int = 6                 # of the decoder
    n_encoder_layer: int | None = None  # None: as n_layer
    n_head: int = 8
    n_embd: int = 512
    pos: str = 'sinusoidal'
    act: str = 'relu'
    tie_weights: bool = False
    tie_source: bool = True          # source and target share their embedding
    init: str = 'xavier'


# ----------------------------------------------------------------------------------------------------------------------
# parts

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) * weight over the last dimension: LayerNorm without centring and bias."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


def make_norm(c):
    """The norm that config `c` asks for, n_embd wide."""
    return RMSNorm(c.n_embd) if c.norm == 'rmsnorm' else nn.LayerNorm(c.n_embd, bias=c.bias)


class Dropout(nn.Module):
    """Dropout; on a CPU seven times faster than F.dropout, which there draws one Bernoulli number an element.

    We draw random bytes instead, eight elements to a 64-bit number, so on a CPU the probability is p rounded to 1/256
    (0.2 is 51/256); what is kept is scaled by exactly 1 / (1 - that), so the expectation is right.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        drop = round(self.p * 256)  # of 256 byte values, how many mean "drop"
        if not self.training or self.p == 0:
            return x
        if x.device.type != 'cpu' or not 0 < drop < 256:
            return F.dropout(x, self.p)
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-2**63, None)
        keep = bits.view(torch.int8)[:x.numel()].view(x.shape).to(x.dtype)   # -128 .. 127, exact in any float type
        keep = keep.sub_(drop - 129).clamp_(0, 1).mul_(256 / (256 - drop))   # 0 or 1 / (1 - p); in place is what is fast
        return x * keep


@lru_cache(maxsize=8)
def causal_bias(T, dtype, device):
    """(T, T) tensor to add to attention scores: 0 on and below the diagonal, -inf above."""
    with torch.inference_mode(False):  # it is cached, so it must be usable in training too
        return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def attend(q, k, v, mask=None, causal=False, dropout=None):
    """softmax(q k^T / sqrt(D)) v.  q: (B, H, T, D); k, v: (B, H, S, D); returns (B, H, T, D).

    mask: bool, broadcastable to (B, H, T, S), True = may attend; no row all False. causal: T == S and no mask.
    dropout: a Dropout module for the attention weights, or None.
    On a CPU and up to 1024 x 1024 two matrix products and a softmax take half to a tenth of the time of PyTorch's
    fused kernel (LOG.md); for one query in float32, and everywhere else, that kernel is the fast one, and never holds the scores.
    """
    T, S, p = q.size(2), k.size(2), dropout.p if dropout is not None and dropout.training else 0.0
    if q.device.type != 'cpu' or T * S > 1024 * 1024 or T == 1 and q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p)
    out, n = [], 256 if causal else T  # causal: in blocks of queries, and nearly half of the scores are never computed
    if T > n:
        k, v = k.contiguous(), v.contiguous()  # once, not in every product
    for i in range(0, T, n):
        end = min(i + n, T) if causal else S
        att = (q[:, :, i:min(i + n, T)] * q.size(-1) ** -0.5) @ k[:, :, :end].transpose(-2, -1)  # (B, H, n, end)
        if causal:
            att += causal_bias(end, att.dtype, att.device)[i:]
        elif mask is not None:
            att = att.masked_fill(~mask, -math.inf)
        att = torch.softmax(att, dim=-1)
        out.append((dropout(att) if p else att) @ v[:, :, :end])
    return torch.cat(out, dim=2) if len(out) > 1 else out[0]


def position_angles(T, D):
    """(T, D / 2) float32 angles t * 10000^(-2i / D): the frequencies of sinusoidal and of rotary positions."""
    return torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2).float() / D))


def rotate(x, cos, sin):
    """Rotary positions. x: (B, T, H, D); cos, sin: (T, 1, D/2) or (B, T, 1, D/2). Turns pairs (i, i + D/2) of a head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class KVCache:
    """Preallocated keys and values of all layers, for B rows and up to T positions; `len` columns are filled.

    memory: {layer: (k, v)} of cross-attention, computed once a source. last: {module: (B, 1, C / 2)}, for shift().
    """

    def __init__(self, c, B, T, device, dtype):
        shape = (c.n_layer, B, c.n_head, T, c.n_embd // c.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.size, self.len, self.memory, self.last = T, 0, {}, {}

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) behind what is there; returns all keys and values so far, (B, H, len + T, D)."""
        end = self.len + k.size(2)  # Stack.forward moves `len` once every layer has written its columns
        self.k[layer, :, :, self.len:end] = k
        self.v[layer, :, :, self.len:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows, memory=True):
        """Go on with these rows, (N,) int64: some may be gone, some there several times. memory=False leaves that as it is."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.last = {key: a[rows] for key, a in self.last.items()}
        if memory:
            self.memory = {layer: (k[rows], v[rows]) for layer, (k, v) in self.memory.items()}


class Attention(nn.Module):
    """Multi-head attention: of x on itself and, with a cache, on what came before; or (cross) of x on a memory."""

    def __init__(self, c, layer=0, cross=False):
        super().__init__()
        self.layer, self.head_size, self.qk_norm = layer, c.n_embd // c.n_head, c.qk_norm
        bias = c.bias if c.attn_bias is None else c.attn_bias
        if cross:
            self.c_q = nn.Linear(c.n_embd, c.n_embd, bias=bias)
            self.c_kv = nn.Linear(c.n_embd, 2 * c.n_embd, bias=bias)
        else:
            self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=bias)  # q, k and v in one product
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=bias)
        self.attn_dropout = Dropout(c.attn_dropout)
        self.resid_dropout = Dropout(c.dropout)

    def heads(self, x, norm=False):
        """(B, T, n * D) to (B, T, n, D), the D of each head normalised where that is asked for."""
        x = x.view(*x.shape[:2], -1, self.head_size)
        return F.layer_norm(x, x.shape[-1:]) if norm and self.qk_norm else x

    def forward(self, x, mask=None, causal=False, rope=None, cache=None, memory=None):
        """x: (B, T, C); mask, causal: see attend(); rope: (cos, sin) or None; memory: (B, S, C) to attend to instead of x.

        Returns (B, T, C).
        """
        B, T, C = x.shape
        if memory is None:
            qk, v = self.c_attn(x).split((2 * C, C), dim=2)
            qk = self.heads(qk, norm=True)                     # queries and keys share norm and rotation: one pass
            if rope is not None:
                qk = rotate(qk, *rope)
            q, k = qk.transpose(1, 2).chunk(2, dim=1)          # (B, H, T, D) each
            v = self.heads(v).transpose(1, 2)                  # (B, H, T, D)
            if cache is not None:
                all_k, all_v = cache.append(self.layer, k, v)
                if cache.len:  # else what was just computed is all there is, and in the precision that products are fast in
                    k, v = all_k, all_v
        else:
            q = self.heads(self.c_q(x), norm=True).transpose(1, 2)
            if cache is not None and self.layer in cache.memory:
                k, v = cache.memory[self.layer]
            else:
                k, v = self.c_kv(memory).chunk(2, dim=2)
                k, v = self.heads(k, norm=True).transpose(1, 2), self.heads(v).transpose(1, 2)  # (B, H, S, D)
                if cache is not None:
                    cache.memory[self.layer] = k, v = k.to(cache.k.dtype), v.to(cache.k.dtype)
        y = attend(q.to(k.dtype), k, v, mask, causal, self.attn_dropout).to(x.dtype)  # a cache has a precision of its own
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between; SwiGLU gates one half of the hidden layer with the other."""

    def __init__(self, c):
        super().__init__()
        inner = c.n_inner or 4 * c.n_embd
        self.act = c.act
        self.c_fc = nn.Linear(c.n_embd, inner * (2 if c.act == 'swiglu' else 1), bias=c.bias)
        self.c_proj = nn.Linear(inner, c.n_embd, bias=c.bias)
        self.dropout = Dropout(c.dropout)

    def forward(self, x):
        h = self.c_fc(x)
        if self.act.startswith('gelu'):
            h = F.gelu(h, approximate='tanh' if self.act == 'gelu' else 'none')
        elif self.act == 'swiglu':
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.relu(h)
            h = h.square() if self.act == 'relu2' else h
        return self.dropout(self.c_proj(h))


def shift(x, cache, key, first):
    """x (B, T, C) with the first half of the channels of each token replaced by those of the token before it, or by zeros.

    A layer so knows pairs of tokens without any attention. cache: what the token before x had is kept there under key.
    first: (B, T, 1) bool, where rows begin that are padded at the left, or None.
    """
    a, b = x.chunk(2, dim=-1)
    before = a.new_zeros(a[:, :1].shape) if cache is None or key not in cache.last else cache.last[key]
    if cache is not None:
        cache.last[key] = a[:, -1:]
    before = torch.cat((before, a[:, :-1]), dim=1)
    return torch.cat((before if first is None else before.masked_fill(first, 0), b), dim=2)


class Block(nn.Module):
    """Attention, cross-attention where there is a source, MLP: each added to the residual stream."""

    def __init__(self, c, layer, cross=False):
        super().__init__()
        self.pre, self.token_shift = c.norm_position == 'pre', c.token_shift
        self.ln_1, self.attn = make_norm(c), Attention(c, layer)
        if cross:
            self.ln_x, self.cross = make_norm(c), Attention(c, layer, cross=True)
        self.ln_2, self.mlp = make_norm(c), MLP(c)

    def add(self, x, norm, f):
        """The residual stream with f added, the norm in front of f or behind the sum."""
        return x + f(norm(x)) if self.pre else norm(x + f(x))

    def forward(self, x, mask=None, causal=False, rope=None, cache=None, memory=None, memory_mask=None, first=None):
        """x: (B, T, C), and returned so; mask … memory: see Attention; memory_mask: of cross-attention; first: see shift()."""
        def read(h, module):
            return shift(h, cache, module, first) if self.token_shift else h

        x = self.add(x, self.ln_1, lambda h: self.attn(read(h, self.attn), mask, causal, rope, cache))
        if memory is not None:
            x = self.add(x, self.ln_x, lambda h: self.cross(h, memory_mask, cache=cache, memory=memory))
        return self.add(x, self.ln_2, lambda h: self.mlp(read(h, self.mlp)))


class Stack(nn.Module):
    """Embeddings, positions and a pile of blocks: GPT has one, Seq2Seq two."""

    def __init__(self, c, n_layer, block_size, causal=True, cross=False):
        super().__init__()
        self.config, self.block_size, self.causal = c, block_size, causal
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == 'learned':
            self.wpe = nn.Embedding(block_size, c.n_embd)
        self.drop = Dropout(c.dropout)
        self.h = nn.ModuleList(Block(c, i, cross) for i in range(n_layer))
        if c.norm_position == 'pre':  # post-norm blocks end with a norm of their own
            self.ln_f = make_norm(c)
        if c.pos == 'sinusoidal':  # (block_size, C): sines, then cosines
            angles = position_angles(block_size, c.n_embd)
            self.register_buffer('sinusoid', torch.cat((angles.sin(), angles.cos()), dim=1)[:, :c.n_embd], persistent=False)
        elif c.pos == 'rotary':    # (block_size, 1, D / 2): the 1 is for the heads
            angles = position_angles(block_size, c.n_embd // c.n_head)
            self.register_buffer('cos', angles.cos()[:, None], persistent=False)
            self.register_buffer('sin', angles.sin()[:, None], persistent=False)

    def forward(self, idx, cache=None, pad=None, memory=None, memory_mask=None, last_only=False):
        """idx: (B, T) int64; returns (B, T, C), with last_only (B, 1, C).

        cache: KVCache; idx continues what it holds. pad: (B,) int64, how many columns at the left of each row are padding.
        memory, memory_mask: an encoder's output (B, S, C) and which of it may be seen, (B, 1, 1, S) bool or None.
        Raises ValueError where cache and idx together are longer than block_size.
        """
        c, (B, T), past = self.config, idx.shape, cache.len if cache is not None else 0
        if past + T > self.block_size:
            raise ValueError(f'{past + T} tokens are more than the model\'s block_size of {self.block_size}')
        col = torch.arange(past, past + T, device=idx.device)                              # (T,)
        pos = col if pad is None else (col - pad[:, None]).clamp(min=0)                    # (T,) or (B, T)
        mask = None
        if not self.causal:
            mask = source_mask(pad, T)
        elif pad is not None or (past and T > 1):  # otherwise plain causal attention, or one token that sees all
            key = torch.arange(past + T, device=idx.device)                                # (S,)
            mask = key <= col[:, None]                                                     # (T, S)
            if pad is not None:  # padding is seen by nobody but itself: no row may be empty
                mask = mask & (key >= pad[:, None, None]) | (key == col[:, None])          # (B, T, S)
            mask = mask.expand(B, T, past + T)[:, None]                                    # (B, 1, T, S)
        x = self.wte(idx)  # (B, T, C)
        if c.pos == 'learned':
            x = x + self.wpe(pos)
        elif c.pos == 'sinusoidal':
            x = x * math.sqrt(c.n_embd) + self.sinusoid[pos].to(x.dtype)  # scaled as in the paper, or the sines drown the tokens
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in bf16 too: half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = (self.cos[pos].to(x.dtype), self.sin[pos].to(x.dtype)) if c.pos == 'rotary' else None
        first = (col == pad[:, None])[..., None] if c.token_shift and pad is not None else None  # (B, T, 1)
        x = self.drop(x)
        causal = self.causal and mask is None and T > 1
        for block in self.h:
            if c.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, causal, rope, None, memory, memory_mask, first, use_reentrant=False)
            else:
                x = block(x, mask, causal, rope, cache, memory, memory_mask, first)
        if cache is not None:
            cache.len += T
        x = x[:, -1:] if last_only else x
        return self.ln_f(x) if c.norm_position == 'pre' else x


def source_mask(pad, S):
    """(B, 1, 1, S) bool, True = not padding, for rows whose first pad (B,) columns are; None for None."""
    return None if pad is None else (torch.arange(S, device=pad.device) >= pad[:, None])[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# the models

class LanguageModel(Generation, nn.Module):
    """What GPT and Seq2Seq share: a head, initial weights, and how loss and logits are given back."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def _init_weights(self, module):
        """GPT-2's: normal(0, 0.02), biases 0, projections into the residual stream scaled down with depth. Or Xavier's."""
        c = self.config
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if c.init == 'gpt2':
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Embedding, Head)):  # fairseq's: of unit size once the embedding is scaled
                nn.init.normal_(module.weight, std=c.n_embd ** -0.5)
            else:
                nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention) and c.init == 'xavier':  # q, k and v are matrices of their own
            for weight in (module.c_q.weight, module.c_kv.weight) if hasattr(module, 'c_q') else (module.c_attn.weight,):
                for part in weight.split(c.n_embd):
                    nn.init.xavier_uniform_(part)
        if isinstance(module, (Attention, MLP)) and (c.init == 'gpt2' or c.zero_init):  # apply() visits children first
            std = 0.0 if c.zero_init else 0.02 / math.sqrt(2 * c.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)
        if isinstance(module, Head) and c.zero_init and not c.tie_weights:
            nn.init.zeros_(module.weight)

    def num_params(self):
        """Number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def finish(self, x, targets, label_smoothing, reduction):
        """(logits, None) of the last layer x (B, T, C), or (None, loss) where there are targets (B, T)."""
        if targets is None:
            return self.lm_head(x), None
        real = targets != -1
        x, targets = x[real], targets[real]  # (N, C), (N,): of prompts and padding, logits are not even computed
        if reduction == 'score':
            return None, score(self.lm_head, x, targets)
        loss = self.lm_head.loss(x, targets, label_smoothing)
        return None, loss if reduction == 'sum' else loss / len(targets)

    def new_cache(self, B, T):
        """An empty KVCache for B rows of up to T tokens; on a CPU in float32, which is read several times as fast (LOG.md)."""
        p = next(self.parameters())
        return KVCache(self.config, B, T, p.device, torch.float32 if p.dtype == torch.bfloat16 and p.is_cpu else p.dtype)


class GPT(LanguageModel):
    """Decoder-only Transformer with GPT-2's layout and parameter names."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Stack(config, config.n_layer, config.block_size)
        self.lm_head = AdaptiveHead(config) if config.cutoffs else Head(config)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def forward(self, idx, targets=None, cache=None, pad=None, label_smoothing=0.0, reduction='mean', last_only=False):
        """idx: (B, T) int64; returns (logits, None), or (None, loss) where targets (B, T) are given, -1 = no target.

        logits: (B, T, V), with last_only (B, 1, V), in the precision that the model runs in. loss: float32 scalar, the mean or
        the sum (reduction) over targets; logits are not returned with it because at large V they are never all held.
        reduction='score': (2,) instead, the sum and the number of targets that were the likeliest.
        cache, pad: see Stack.
        """
        return self.finish(self.transformer(idx, cache, pad, last_only=last_only), targets, label_smoothing, reduction)

    def begin(self, prompts, start=None):
        """See Generation: writing goes on from the prompts."""
        return prompts, {}

    def reply_prompts(self, sources, start, max_new_tokens):
        """Prompts for replies to sources, lists of ids: each source, the newest part of a long one, then the ids `start`."""
        room = self.reply_room(start, max_new_tokens)
        return [source[-room:] + start for source in sources]

    def reply_room(self, start, max_new_tokens):
        """How many ids of a source there is room for, beside `start` and a reply."""
        return max(1, self.config.block_size - len(start) - min(max_new_tokens, self.config.block_size // 2))


class Seq2Seq(LanguageModel):
    """Encoder-decoder Transformer: the encoder reads a whole source, the decoder writes a target and looks at what was read."""

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.encoder = Stack(c, c.n_encoder_layer or c.n_layer, c.src_block_size or c.block_size, causal=False)
        self.decoder = Stack(c, c.n_layer, c.block_size, cross=True)
        self.lm_head = AdaptiveHead(c) if c.cutoffs else Head(c)
        if c.tie_source:
            self.encoder.wte.weight = self.decoder.wte.weight
        if c.tie_weights:
            self.lm_head.weight = self.decoder.wte.weight
        self.apply(self._init_weights)

    def encode(self, src, src_pad=None):
        """src: (B, S) int64; src_pad: (B,) int64, how many columns at the left of each row are padding, None: none.

        Returns what decoding needs of it: ((B, S, C), mask). Raises ValueError where S is more than src_block_size.
        """
        return self.encoder(src, pad=src_pad), source_mask(src_pad, src.size(1))

    def forward(self, idx, targets=None, src=None, src_pad=None, memory=None, cache=None, pad=None, label_smoothing=0.0,
                reduction='mean', last_only=False):
        """idx: (B, T) int64, what the decoder has written so far, a start id first; src (B, S): the source, or memory: encode()'s
        result. Everything else is as in GPT.forward; a row's padding at its right needs no mask, only targets of -1."""
        memory, memory_mask = self.encode(src, src_pad) if memory is None else memory
        x = self.decoder(idx, cache, pad, memory, memory_mask, last_only)
        return self.finish(x, targets, label_smoothing, reduction)

    def begin(self, prompts, start):
        """See Generation: writing begins with `start`, and looks at the prompts."""
        if start is None:
            raise ValueError('an encoder-decoder needs the id that its targets begin with: start=tokenizer.decoder_start_id')
        start = [start] if isinstance(start, int) else list(start)
        return [start] * len(prompts), {'memory': self.encode(*pad_left(prompts, self.decoder.wte.weight.device))}

    def reply_prompts(self, sources, start, max_new_tokens):
        """Prompts for replies to sources, lists of ids: each source, its newest part where it is too long."""
        return [source[-self.encoder.block_size:] for source in sources]

    def reply_room(self, start, max_new_tokens):
        """How many ids of a source there is room for."""
        return self.encoder.block_size
