"""
The models of pocketGPT, in one file: read it from top to bottom.

    GPTConfig   every shape and switch; its defaults are GPT-2's architecture
    Attention   multi-head self-attention, with an optional key-value cache
    MLP, Block  the rest of a Transformer layer
    GPT         embeddings, a stack of blocks, a head; loss, generation

References:
  GPT-2      Radford et al. 2019, and https://github.com/openai/gpt-2/blob/master/src/model.py
  Attention  Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
  rotary     Su et al. 2021,      https://arxiv.org/abs/2104.09864
  RMSNorm    Zhang, Sennrich 2019, https://arxiv.org/abs/1910.07467
  QK-norm    Dehghani et al. 2023, https://arxiv.org/abs/2302.05442
  ReLU^2     So et al. 2021,      https://arxiv.org/abs/2109.08668
  SwiGLU     Shazeer 2020,        https://arxiv.org/abs/2002.05202
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHOICES = {  # what the switches of GPTConfig that are names may be
    'pos': ('learned', 'sinusoidal', 'rotary'),
    'norm': ('layernorm', 'rmsnorm'),
    'norm_position': ('pre', 'post'),
    'act': ('gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'),
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
    bias: bool = True                # biases in Linear and LayerNorm
    pos: str = 'learned'             # learned, sinusoidal or rotary
    norm: str = 'layernorm'          # layernorm or rmsnorm
    norm_position: str = 'pre'       # pre: x + f(norm(x)), GPT-2's; post: norm(x + f(x)), the 2017 paper's
    act: str = 'gelu'                # gelu (tanh form, GPT-2's), gelu_erf (nanoGPT's), relu, relu2 or swiglu
    qk_norm: bool = False            # normalise queries and keys in each head
    tie_weights: bool = True         # the head shares the token embedding
    zero_init: bool = False          # projections into the residual stream start at zero
    softcap: float = 0.0             # logits = softcap * tanh(logits / softcap); 0: off
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about a third more time

    def __post_init__(self):
        problems = [f'{name} must be one of {", ".join(valid)}, got {getattr(self, name)!r}'
                    for name, valid in CHOICES.items() if getattr(self, name) not in valid]
        problems += [f'{name} must be at least 1, got {getattr(self, name)}'
                     for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if getattr(self, name) < 1]
        problems += [f'{name} must be at least 0 and below 1, got {getattr(self, name)}'
                     for name in ('dropout', 'attn_dropout') if not 0 <= getattr(self, name) < 1]
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f'n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}')
        elif self.n_head >= 1 and self.pos == 'rotary' and self.n_embd // self.n_head % 2:
            problems.append(f'rotary positions need an even n_embd / n_head, got {self.n_embd // self.n_head}')
        if self.n_inner is not None and self.n_inner < 1:
            problems.append(f'n_inner must be at least 1 or None, got {self.n_inner}')
        if problems:
            raise ValueError('; '.join(problems))


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


@lru_cache(maxsize=4)
def causal_bias(T, dtype, device):
    """(T, T) tensor to add to attention scores: 0 on and below the diagonal, -inf above."""
    with torch.inference_mode(False):  # it is cached, so it must be usable in training too
        return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def attend(q, k, v, mask=None, causal=False, dropout=None):
    """softmax(q k^T / sqrt(D)) v.  q: (B, H, T, D); k, v: (B, H, S, D); returns (B, H, T, D).

    mask: bool, broadcastable to (B, H, T, S), True = may attend; no row all False. causal: T == S and no mask.
    dropout: a Dropout module for the attention weights, or None.
    On a CPU and up to 1024 x 1024 two matrix products and a softmax take half to a quarter of the time of PyTorch's
    fused kernel (LOG.md); everywhere else that kernel is the fast one, and never holds the (T, S) scores.
    """
    T, S, p = q.size(2), k.size(2), dropout.p if dropout is not None and dropout.training else 0.0
    if q.device.type != 'cpu' or T == 1 or T * S > 1024 * 1024:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p)
    att = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    if causal:
        att = att + causal_bias(T, att.dtype, att.device)
    elif mask is not None:
        att = att.masked_fill(~mask, -math.inf)
    att = torch.softmax(att, dim=-1)
    return (dropout(att) if p else att) @ v


def position_angles(T, D):
    """(T, D / 2) float32 angles t * 10000^(-2i / D): the frequencies of sinusoidal and of rotary positions."""
    return torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2).float() / D))


def rotate(x, cos, sin):
    """Rotary positions. x: (B, T, H, D); cos, sin: (T, 1, D/2) or (B, T, 1, D/2). Turns pairs (i, i + D/2) of a head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class KVCache:
    """Preallocated keys and values of all layers, for B rows and up to T positions; `len` columns are filled."""

    def __init__(self, c, B, T, device, dtype):
        shape = (c.n_layer, B, c.n_head, T, c.n_embd // c.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.size, self.len = T, 0

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) behind what is there; returns all keys and values so far, (B, H, len + T, D)."""
        end = self.len + k.size(2)  # GPT.forward moves `len` once every layer has written its columns
        self.k[layer, :, :, self.len:end] = k
        self.v[layer, :, :, self.len:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    """Multi-head attention of x on itself and, with a cache, on what came before."""

    def __init__(self, c, layer=0):
        super().__init__()
        self.layer, self.n_head, self.qk_norm = layer, c.n_head, c.qk_norm
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)  # q, k and v in one product
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.attn_dropout = Dropout(c.attn_dropout)
        self.resid_dropout = Dropout(c.dropout)

    def forward(self, x, mask=None, rope=None, cache=None):
        """x: (B, T, C); mask: see attend(), None = causal; rope: (cos, sin) or None; returns (B, T, C)."""
        B, T, C = x.shape
        qk, v = self.c_attn(x).split((2 * C, C), dim=2)
        qk = qk.view(B, T, 2 * self.n_head, C // self.n_head)  # queries and keys share norm and rotation: one pass
        if self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)                            # (B, H, T, D) each
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)      # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        causal = mask is None and T > 1  # a single new token may see everything
        y = attend(q, k, v, mask, causal, self.attn_dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


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


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, c, layer):
        super().__init__()
        self.pre = c.norm_position == 'pre'
        self.ln_1, self.attn = make_norm(c), Attention(c, layer)
        self.ln_2, self.mlp = make_norm(c), MLP(c)

    def forward(self, x, mask=None, rope=None, cache=None):
        if self.pre:
            x = x + self.attn(self.ln_1(x), mask, rope, cache)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, mask, rope, cache))
        return self.ln_2(x + self.mlp(x))


# ----------------------------------------------------------------------------------------------------------------------
# loss

MAX_LOGITS = 2**24  # held at a time: 64 MB in float32


def slice_loss(x, weight, targets, label_smoothing, softcap):
    """Summed cross-entropy of x (N, C) through a head (V, C) against targets (N,); -1 is ignored."""
    logits = F.linear(x, weight).float()  # (N, V)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing, reduction='sum')


def head_loss(x, weight, targets, label_smoothing=0.0, softcap=0.0):
    """slice_loss() of x (B, T, C) and targets (B, T), in slices where all logits would be more than MAX_LOGITS.

    The backward pass computes each slice's logits anew (an eighth more time in the head), so no (B*T, V) tensor is ever held.
    """
    x, targets, rows = x.flatten(0, 1), targets.flatten(), max(1, MAX_LOGITS // weight.size(0))
    if x.size(0) <= rows:
        return slice_loss(x, weight, targets, label_smoothing, softcap)
    return sum(checkpoint(slice_loss, xi, weight, ti, label_smoothing, softcap, use_reentrant=False, preserve_rng_state=False)
               for xi, ti in zip(x.split(rows), targets.split(rows)))


# ----------------------------------------------------------------------------------------------------------------------
# sampling

def next_token(logits, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               banned=None, generator=None):
    """Choose one token a row. logits: (B, V) float; returns (B,) int64.

    temperature 0 is greedy. top_k keeps exactly that many; top_p the smallest set whose mass reaches it (the token that
    crosses the line stays); min_p those at least that share of the likeliest. repetition_penalty > 1 lowers every token
    in seen, (B, V) bool, whatever its sign (Keskar et al. 2019). banned: (V,) bool, never chosen. The filters act in this order:
    banned, penalty, temperature, top_k, top_p, min_p. No host sync, and no torch.multinomial: argmax(p / Exp(1)) draws from p.
    """
    logits = logits.float()
    if banned is not None:
        logits = logits.masked_fill(banned, -math.inf)
    if repetition_penalty != 1.0:
        lowered = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, lowered, logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    index = None  # of the sorted candidates, where anything had to be sorted
    if top_k is not None or top_p is not None:
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)  # descending
    p = F.softmax(logits, dim=-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # mass before this token; the first always stays
        p = p / p.sum(-1, keepdim=True)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.max(dim=-1, keepdim=True).values, 0)
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)
    return choice if index is None else index.gather(-1, choice[:, None])[:, 0]


def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, **_):
    """Raise ValueError where a sampling setting is out of its range."""
    for name, value, ok, want in (
            ('temperature', temperature, temperature >= 0, '0 (greedy) or more'),
            ('top_k', top_k, top_k is None or top_k >= 1, 'at least 1, or None'),
            ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1, or None'),
            ('min_p', min_p, min_p is None or 0 <= min_p <= 1, 'from 0 to 1, or None'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0 (1 is off)')):
        if not ok:
            raise ValueError(f'{name} must be {want}, got {value}')


# ----------------------------------------------------------------------------------------------------------------------
# the model

class GPT(nn.Module):
    """Decoder-only Transformer with GPT-2's layout and parameter names."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            drop=Dropout(c.dropout),
            h=nn.ModuleList(Block(c, i) for i in range(c.n_layer)),
        ))
        if c.pos == 'learned':
            self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd)
        if c.norm_position == 'pre':  # post-norm blocks end with a norm of their own
            self.transformer.ln_f = make_norm(c)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        angles = position_angles(c.block_size, c.n_embd if c.pos == 'sinusoidal' else c.n_embd // c.n_head)
        if c.pos == 'sinusoidal':  # (block_size, C): sines, then cosines
            self.register_buffer('sinusoid', torch.cat((angles.sin(), angles.cos()), dim=1)[:, :c.n_embd], persistent=False)
        elif c.pos == 'rotary':    # (block_size, 1, D / 2): the 1 is for the heads
            self.register_buffer('cos', angles.cos()[:, None], persistent=False)
            self.register_buffer('sin', angles.sin()[:, None], persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0, 0.02), biases 0, projections into the residual stream scaled down with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # apply() visits children first, so this comes last
            std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)
        if module is self and self.config.zero_init and not self.config.tie_weights:
            nn.init.zeros_(self.lm_head.weight)

    def num_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, pad=None, label_smoothing=0.0, reduction='mean', last_only=False):
        """idx: (B, T) int64; returns (logits, None), or (None, loss) where targets (B, T) are given, -1 = no target.

        logits: (B, T, V), with last_only (B, 1, V), in the precision that the model runs in. loss: float32 scalar, the mean or
        the sum (reduction) over targets; logits are not returned with it because at large V they are never all held.
        cache: KVCache; idx continues what it holds. pad: (B,) int64, how many columns at the left of each row are padding.
        Raises ValueError where cache and idx together are longer than block_size.
        """
        c, (B, T), past = self.config, idx.shape, cache.len if cache is not None else 0
        if past + T > c.block_size:
            raise ValueError(f'{past + T} tokens are more than the model\'s block_size of {c.block_size}')
        col = torch.arange(past, past + T, device=idx.device)                              # (T,)
        pos = col if pad is None else (col - pad[:, None]).clamp(min=0)                    # (T,) or (B, T)
        mask = None
        if pad is not None or (past and T > 1):  # otherwise plain causal attention, or one token that sees all
            key = torch.arange(past + T, device=idx.device)                                # (S,)
            mask = key <= col[:, None]                                                     # (T, S)
            if pad is not None:  # padding is seen by nobody but itself: no row may be empty
                mask = mask & (key >= pad[:, None, None]) | (key == col[:, None])          # (B, T, S)
            mask = mask.expand(B, T, past + T)[:, None]                                    # (B, 1, T, S)
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.pos == 'learned':
            x = x + self.transformer.wpe(pos)
        elif c.pos == 'sinusoidal':
            x = x * math.sqrt(c.n_embd) + self.sinusoid[pos].to(x.dtype)  # scaled as in the paper, or the sines drown the tokens
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in bf16 too: half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = (self.cos[pos].to(x.dtype), self.sin[pos].to(x.dtype)) if c.pos == 'rotary' else None
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if c.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, rope, use_reentrant=False)
            else:
                x = block(x, mask, rope, cache)
        if cache is not None:
            cache.len += T
        if last_only:
            x = x[:, -1:]
        if c.norm_position == 'pre':
            x = self.transformer.ln_f(x)
        if targets is not None:
            loss = head_loss(x, self.lm_head.weight, targets, label_smoothing, c.softcap)
            return None, loss if reduction == 'sum' else loss / (targets != -1).sum()
        logits = self.lm_head(x)
        return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits, None

    def window(self, n):
        """How many of n tokens the model looks at when it writes the next one.

        All of them up to block_size. Then the oldest leave a quarter of the context at a time: positions shift when a token
        leaves, so every cached key must be computed anew, and this way that is paid once in block_size / 4 tokens.
        """
        T = self.config.block_size
        step = max(1, T // 4)
        return n if n <= T else n - math.ceil((n - T) / step) * step

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, eot=None, seed=None, banned=None, use_cache=True, **sampling):
        """Generate, a token at a time: yields max_new_tokens times a (B,) int64 tensor, -1 in rows that have ended.

        prompts: B sequences of token ids, of any lengths, none empty. eot: the id that ends a row (it is still yielded).
        banned: ids that are never chosen. sampling: the knobs of next_token(). use_cache=False gives the same tokens, slowly.
        Raises ValueError on an empty prompt, an id outside the vocabulary, or a sampling knob out of its range.
        """
        check_sampling(**sampling)
        device, V = self.lm_head.weight.device, self.config.vocab_size
        lengths = [len(p) for p in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError('a prompt needs at least one token')
        B, end = len(lengths), max(lengths)
        idx = torch.zeros(B, end + max_new_tokens, dtype=torch.long)
        for row, p in zip(idx, prompts):  # every row ends at the same column, so they all grow at the same place
            row[end - len(p):end] = torch.as_tensor(p)
        if bad := idx[(idx < 0) | (idx >= V)].tolist():
            raise ValueError(f'the prompt has token id {bad[0]}, but the model knows only 0 to {V - 1}')
        seen = None
        if sampling.get('repetition_penalty', 1.0) != 1.0:
            seen = torch.zeros(B, V, dtype=torch.bool)
            for row, p in zip(seen, prompts):
                row[torch.as_tensor(p)] = True
            seen = seen.to(device)
        banned = torch.tensor([i in banned for i in range(V)], device=device) if banned else None
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        idx, done, cache = idx.to(device), torch.zeros(B, dtype=torch.bool, device=device), None
        for step in range(max_new_tokens):
            if cache is not None and cache.len < cache.size:
                new = idx[:, end - 1:end]
            else:  # the first step, or the window is full: read each row's window from its start
                windows = [self.window(n + step) for n in lengths]
                W = max(windows)
                new = idx[:, end - W:end]
                pad = torch.tensor([W - w for w in windows], device=device) if min(windows) < W else None
                if use_cache:
                    cache = KVCache(self.config, B, min(W + max_new_tokens - step, self.config.block_size), device,
                                    self.lm_head.weight.dtype)
            logits, _ = self(new, cache=cache, pad=pad, last_only=True)  # (B, 1, V)
            token = next_token(logits[:, -1], seen, banned=banned, generator=generator, **sampling)  # (B,)
            idx[:, end] = token
            end += 1
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            yield torch.where(done, -1, token)
            if eot is not None:
                done |= token == eot
                if (device.type == 'cpu' or step % 16 == 15) and done.all():  # asking a GPU makes it wait: rarely
                    return

    def generate(self, idx, max_new_tokens, eot=None, **kwargs):
        """stream(), collected. idx: a (B, T) tensor, gives (B, T + new) like nanoGPT's, rows that ended early filled with eot;
        or a list of lists of ids, gives a list of lists, each up to its eot. Keywords: see stream().

            model.generate(torch.tensor([[1, 2, 3]]), 20, temperature=0.8, top_k=50)
        """
        new = list(self.stream(idx, max_new_tokens, eot=eot, **kwargs))  # of (B,)
        new = torch.stack(new, dim=1) if new else torch.zeros(len(idx), 0, dtype=torch.long)
        if torch.is_tensor(idx):
            return torch.cat((idx, torch.where(new < 0, eot or 0, new).to(idx.device)), dim=1)
        return [list(p) + [t for t in row if t >= 0] for p, row in zip(idx, new.tolist())]
