"""
The models, in one file to read from top to bottom: norms, attention, MLP, block, Transformer,
then the two models built from them. GPT continues a text; Seq2Seq reads one and writes another.

Formulas are written out plainly. Where that is slow, the line after them swaps in a faster one
from pocket/kernels.py, or `if fused.can_…` hands the work to C: pocket/fused.py. If you change such
a formula, delete that `if`, or compare with CC=none, which does without C. How text is generated:
pocket/generate.py.

  GPT-2        Radford et al. 2019, https://github.com/openai/gpt-2/blob/master/src/model.py
  Transformer  Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pocket import fused, kernels
from pocket.generate import generate
from pocket.kernels import Dropout  # nn.Dropout, but faster on a CPU

# The letters used in shape comments:
#   B  sequences in a batch    T  tokens in a sequence    C  channels of a token (n_embd)
#   H  attention heads         S  tokens attended to      D  channels of a head (C / H, by default)
#   V  tokens in the vocabulary                           N  tokens of a batch that have a target
#
# Names of parameters (wte, c_attn, ln_1, …) are GPT-2's, so that its weights load: w is for weight,
# te and pe for token and position embeddings, c for convolution (GPT-2's code writes a linear layer
# as a 1-D one), ln for layer norm, h for hidden layers.

# --------------------------------------------------------------------------------------------------
# Norms keep activations at a consistent scale


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / standard deviation(x) * weight + bias over the last dimension.

    Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """

    def forward(self, x):
        if fused.can_fuse(x):
            return fused.norm(x, self.weight, self.bias, self.eps, is_layer_norm=True)
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²)) * weight over the last dimension: LayerNorm without centering or bias.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps  # keeps the division finite

    def forward(self, x):
        if fused.can_fuse(x):
            return fused.norm(x, self.weight, None, self.eps, is_layer_norm=False)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=self.eps)


def make_norm(config):
    """The norm named by config.norm, n_embd wide."""
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


# --------------------------------------------------------------------------------------------------
# Attention lets each token gather information from others


def plain_attention(q, k, v, mask=None, is_causal=False, dropout=None):
    """softmax(q kᵀ / √D) v: for each query a mean of the values, weighted by how well keys match.

    q: (B, H, T, D); k, v: (B, H, S, D); returns (B, H, T, D). k and v may have fewer heads than q:
    then each of them serves a group of H / n_kv_head query heads.
    mask: bool, broadcastable to (B, H, T, S), True = may attend; every row needs a True, because
    softmax over an empty row gives nan.
    is_causal: no token sees a later one (needs T == S and no mask).
    dropout: a Dropout for the weights, or None.
    """
    group = q.size(1) // k.size(1)
    if group > 1:  # grouped-query attention: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()

    # A score sums D products, so its standard deviation grows with √D. Dividing by √D keeps it near
    # 1 at any head width; otherwise softmax saturates, and passes almost no gradient.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)

    weights = F.softmax(scores, dim=-1)  # (B, H, T, S), each row sums to 1
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v  # (B, H, T, D)


# The same formula, faster. To experiment with the formula above, comment out the first line and
# uncomment the second
attention = kernels.attention
# attention = plain_attention


def position_angles(length, size, theta=10000.0, scaling=None):
    """(length, size / 2) float32 angles t * theta^(-2i / size) of positions t.

    Each pair of channels is a clock hand that turns at its own speed: together they identify every
    position. Sinusoidal and rotary positions both use them. theta: larger for longer texts, as the
    slowest hand should not complete a turn. scaling: see scale_frequencies(), or None.
    """
    frequencies = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    return torch.outer(torch.arange(length).float(), frequencies)


def scale_frequencies(frequencies, scaling):
    """Slow the hands down, for texts longer than a model was first trained on.

    frequencies: (size / 2,). scaling: Hugging Face's dict. rope_type 'linear' slows all hands by
    `factor`. 'llama3' only those that turn less than high_freq_factor times within the original
    length: fast ones tell neighbors apart, and have to stay as they are. The operations come in
    Hugging Face's order, so that the results agree to the last bit: a position of a few thousand
    multiplies an error.
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
    """
    factor = scaling['factor']
    if scaling['rope_type'] == 'linear':
        return frequencies / factor
    wavelengths = 2 * math.pi / frequencies  # in positions
    turns = scaling['original_max_position_embeddings'] / wavelengths
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed, 1: as it is, smooth in between
    return (1 - keep) * frequencies / factor + keep * frequencies


def rotate(x, cos, sin):
    """Rotary positions: turn each pair of channels (i, i + D/2) of a head by its position's angle.

    x: (B, T, H, D); cos, sin: (T, 1, D/2) or (B, T, 1, D/2). The product of a rotated query and a
    rotated key depends on their positions only through the distance between them.
    Su et al. 2021, https://arxiv.org/abs/2104.09864

    On a CPU with a C compiler fused.split_heads() does this instead, and what normalize() does: see
    Attention.project_self().
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def normalize(x, norm=None):
    """QK-norm: give the queries or keys of all heads the same length, √D.

    Then only their directions count, and no score exceeds √D no matter how large the weights grow.
    x: (B, T, n, D), n heads. norm: an RMSNorm, whose learned weights rescale them after that, or
    None. Dehghani et al. 2023, https://arxiv.org/abs/2302.05442
    """
    if norm is None:
        return F.layer_norm(x, x.shape[-1:])
    return norm(x)


class Attention(nn.Module):
    """Multi-head self-attention or, with cross=True, attention to an encoder's output.

    Each head compares tokens in a subspace of its own, so they can look for different things.
    """

    def __init__(self, config, layer=0, cross=False):
        super().__init__()
        self.layer = layer  # its index in a KVCache
        self.is_cross = cross

        # Sizes
        C = config.n_embd
        self.head_dim = config.head_size
        self.q_width = config.n_head * self.head_dim
        self.kv_width = config.num_kv_heads * self.head_dim

        # Projections
        bias = config.bias if config.attn_bias is None else config.attn_bias
        qkv_bias = bias if config.qkv_bias is None else config.qkv_bias
        if cross:  # queries from the decoder, keys and values from the encoder
            self.c_q = nn.Linear(C, self.q_width, bias=qkv_bias)
            self.c_kv = nn.Linear(C, 2 * self.kv_width, bias=qkv_bias)
        else:  # queries, keys and values from the same text
            self.c_attn = nn.Linear(C, self.q_width + 2 * self.kv_width, bias=qkv_bias)
        self.c_proj = nn.Linear(self.q_width, C, bias=bias)

        # Norms of queries and keys, if they have weights
        self.qk_norm = config.qk_norm
        self.q_norm = None
        self.k_norm = None
        if self.qk_norm == 'rmsnorm':
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

        self.attn_dropout = Dropout(config.attn_dropout)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, mask=None, is_causal=False, rope=None, cache=None, encoded=None):
        """x: (B, T, C); returns the same shape. mask, is_causal: as in plain_attention().

        rope: (cos, sin) for rotate(), or None. cache: a KVCache that holds the keys and values of
        earlier tokens, or None. encoded: (B, S, C), an encoder's output to attend to instead of x.
        """
        B, T, _ = x.shape
        if encoded is None:
            q, k, v = self.project_self(x, rope, cache)
        else:
            q, k, v = self.project_cross(x, encoded, cache)
        q = q.to(k.dtype)  # a cache may keep its keys in another precision
        y = attention(q, k, v, mask, is_causal, self.attn_dropout)  # (B, H, T, D)
        y = y.to(x.dtype).transpose(1, 2).reshape(B, T, self.q_width)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))

    def project_self(self, x, rope, cache):
        """Queries (B, H, T, D), and keys and values (B, n_kv_head, S, D) of all tokens so far."""
        qkv = self.c_attn(x)  # (B, T, (H + 2 n_kv_head) * D)
        if fused.can_split_heads(qkv, self, rope):
            q, k, v = fused.split_heads(qkv, self, rope)  # what follows, in C
        else:
            q, k, v = qkv.split((self.q_width, self.kv_width, self.kv_width), dim=2)
            q = self.split_heads(q)  # (B, T, H, D)
            k = self.split_heads(k)  # (B, T, n_kv_head, D)
            v = self.split_heads(v)
            if self.qk_norm:
                q = normalize(q, self.q_norm)
                k = normalize(k, self.k_norm)
            if rope is not None:
                q = rotate(q, *rope)
                k = rotate(k, *rope)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before tokens
        if cache is None:
            return q, k, v

        is_prefill = cache.length == 0
        all_k, all_v = cache.append(self.layer, k, v)  # (B, n_kv_head, S, D)
        if is_prefill:  # the cache holds nothing more, and may be in a slower precision
            return q, k, v
        return q, all_k, all_v

    def project_cross(self, x, encoded, cache):
        """Queries (B, H, T, D) of x, and keys and values (B, n_kv_head, S, D) of encoded."""
        q = self.split_heads(self.c_q(x))
        if self.qk_norm:
            q = normalize(q, self.q_norm)
        q = q.transpose(1, 2)  # (B, H, T, D)
        if cache is not None and self.layer in cache.cross:  # the source does not change
            k, v = cache.cross[self.layer]
            return q, k, v

        k, v = self.c_kv(encoded).chunk(2, dim=2)
        k = self.split_heads(k)
        if self.qk_norm:
            k = normalize(k, self.k_norm)
        k = k.transpose(1, 2)  # (B, n_kv_head, S, D)
        v = self.split_heads(v).transpose(1, 2)
        if cache is not None:
            k = k.to(cache.k.dtype)
            v = v.to(cache.v.dtype)
            cache.cross[self.layer] = k, v
        return q, k, v

    def split_heads(self, x):
        """(B, T, n * D) to (B, T, n, D)."""
        B, T, width = x.shape
        return x.view(B, T, width // self.head_dim, self.head_dim)


# --------------------------------------------------------------------------------------------------
# The MLP works on each token by itself: there a model transforms what attention has gathered


class MLP(nn.Module):
    """Up to a wider layer, through a nonlinearity, and back down."""

    def __init__(self, config):
        super().__init__()
        hidden = config.n_inner or 4 * config.n_embd
        width = 2 * hidden if config.act == 'swiglu' else hidden  # swiglu: half of it is a gate
        self.act = config.act
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.activate(self.c_fc(x))  # (B, T, n_inner)
        return self.dropout(self.c_proj(x))  # (B, T, C)

    def activate(self, x):
        """Apply the nonlinearity named by config.act."""
        if self.act == 'gelu':  # GPT-2's
            return kernels.gelu(x)
        if self.act == 'gelu_erf':
            return F.gelu(x)
        if self.act == 'relu':  # the 2017 paper's
            return F.relu(x)
        if self.act == 'relu2':  # So et al. 2021, https://arxiv.org/abs/2109.08668
            return kernels.squared_relu(x)  # F.relu(x).square()
        # swiglu: Shazeer 2020, https://arxiv.org/abs/2002.05202
        gate, x = x.chunk(2, dim=-1)  # (B, T, n_inner) each
        return F.silu(gate) * x


# --------------------------------------------------------------------------------------------------
# A block is one layer: attention, then MLP, each added to the residual stream


def shift_tokens(x, cache=None, module=None, is_first=None):
    """Token shift: the first half of each token's channels comes from the previous token.

    So a layer sees adjacent pairs before any attention, at the cost of one copy. RWKV's idea:
    Peng et al. 2023, https://arxiv.org/abs/2305.13048. x: (B, T, C); the first token of a row gets
    zeros. cache: keeps the last token's half for the `module` that asks. is_first: (B, T, 1)
    bool, True at the first real token of a padded row, or None.
    """
    if cache is None and is_first is None and fused.can_fuse(x):
        return fused.shift_tokens(x)
    half, rest = x.chunk(2, dim=-1)  # (B, T, C/2) each
    previous = half.new_zeros(half[:, :1].shape)  # (B, 1, C/2)
    if cache is not None:
        previous = cache.last.get(module, previous)
        cache.last[module] = half[:, -1:]
    shifted = torch.cat((previous, half[:, :-1]), dim=1)  # (B, T, C/2)
    if is_first is not None:
        shifted = shifted.masked_fill(is_first, 0)
    return torch.cat((shifted, rest), dim=2)


class Context(NamedTuple):
    """What all blocks of one forward pass share: who may attend to whom, and positions."""
    mask: torch.Tensor | None = None  # (B, 1, T, S) bool, True = may attend
    is_causal: bool = False  # plain causal attention, which needs no mask
    rope: tuple | None = None  # (cos, sin) of the tokens' positions
    is_first: torch.Tensor | None = None  # (B, T, 1) bool: first real token of padded rows


class Block(nn.Module):
    """Attention, cross-attention (in a decoder) and MLP around one residual stream."""

    def __init__(self, config, layer, cross=False):
        super().__init__()
        self.post_norm = config.norm_position == 'post'
        self.token_shift = config.token_shift
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        if cross:
            self.ln_x = make_norm(config)
            self.cross = Attention(config, layer, cross=True)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, context, cache=None, memory=None):
        """x: (B, T, C); returns the same shape. memory: what Seq2Seq.encode() returned, or None."""
        if self.post_norm:  # the 2017 paper: normalize after adding
            x = self.ln_1(x + self.self_attention(x, context, cache))
            if memory is not None:
                x = self.ln_x(x + self.cross_attention(x, cache, memory))
            x = self.ln_2(x + self.feed_forward(x, context, cache))
            return x

        # GPT-2 and most models since: normalize before, so the residual stream stays a plain sum
        x = x + self.self_attention(self.ln_1(x), context, cache)
        if memory is not None:
            x = x + self.cross_attention(self.ln_x(x), cache, memory)
        x = x + self.feed_forward(self.ln_2(x), context, cache)
        return x

    def self_attention(self, x, context, cache):
        """Tokens look at each other."""
        if self.token_shift:
            x = shift_tokens(x, cache, self.attn, context.is_first)
        return self.attn(x, context.mask, context.is_causal, context.rope, cache)

    def cross_attention(self, x, cache, memory):
        """Tokens of the target look at the source."""
        encoded, mask = memory
        return self.cross(x, mask, cache=cache, encoded=encoded)

    def feed_forward(self, x, context, cache):
        """Each token by itself; with token_shift, half of what it reads is from the one before."""
        if self.token_shift:
            x = shift_tokens(x, cache, self.mlp, context.is_first)
        return self.mlp(x)


# --------------------------------------------------------------------------------------------------
# A Transformer: embeddings, positions, and a stack of blocks


def real_token_mask(pad, length):
    """(B, 1, 1, length) bool, True = a real token, which others may attend to.

    pad: (B,) int64, how many columns at the left are padding. Returns None if pad is None.
    """
    if pad is None:
        return None
    column = torch.arange(length, device=pad.device)  # (length,)
    is_real = column >= pad[:, None]  # (B, length)
    return is_real[:, None, None]


def causal_mask(column, pad, past):
    """(B or 1, 1, T, past + T) bool, True = may attend: no token sees later ones, or padding.

    column: (T,) columns of the new tokens, which follow `past` cached ones. pad: see
    real_token_mask(). With T = 3, past = 1 and pad = 1, column 0 is padding, and cached already;
    each row below is a new token:

        0 1 0 0
        0 1 1 0
        0 1 1 1
    """
    key = torch.arange(past + len(column), device=column.device)  # (S,)
    mask = key <= column[:, None]  # (T, S)
    if pad is None:
        return mask[None, None]
    not_padding = key >= pad[:, None, None]  # (B, 1, S)
    itself = key == column[:, None]  # (T, S): padding sees itself, so that no row is empty
    mask = (mask & not_padding) | itself  # (B, T, S)
    return mask[:, None]


class Transformer(nn.Module):
    """From token ids to one vector per token. A GPT has one of these, a Seq2Seq two."""

    def __init__(self, config, n_layer, block_size, causal=True, cross=False):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.block_size = block_size
        self.causal = causal  # False in an encoder: each token sees the whole text
        self.wte = nn.Embedding(config.vocab_size, C)
        if config.pos == 'learned':
            self.wpe = nn.Embedding(block_size, C)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer, cross) for layer in range(n_layer))
        if config.norm_position == 'pre':  # post-norm blocks end with a norm already
            self.ln_f = make_norm(config)

        # Tables of sines and cosines: recomputed on load, so no checkpoint holds them
        if config.pos == 'sinusoidal':
            angles = position_angles(block_size, C)
            table = torch.cat((angles.sin(), angles.cos()), dim=1)
            table = table[:, :C]  # (block_size, C): an odd C has one sine more than cosines
            self.register_buffer('sinusoid', table, persistent=False)
        if config.pos == 'rotary':
            angles = position_angles(block_size, config.head_size, config.rope_theta,
                                     config.rope_scaling)  # (block_size, D/2)
            self.register_buffer('cos', angles.cos(), persistent=False)
            self.register_buffer('sin', angles.sin(), persistent=False)

    def forward(self, idx, pad=None, cache=None, memory=None):
        """idx: (B, T) int64 token ids; returns (B, T, C).

        pad: (B,) int64, how many columns at the left of each row are padding, or None. cache: a
        KVCache; idx follows the tokens it holds. memory: what Seq2Seq.encode() returned, in a
        decoder. Raises ValueError if cache and idx together are longer than block_size.
        """
        T = idx.size(1)
        past = 0 if cache is None else cache.length
        if past + T > self.block_size:
            limit = 'block_size' if self.causal else 'src_block_size'  # the encoder is not causal
            raise ValueError(f'{past + T} tokens exceed the model\'s {limit} {self.block_size}')

        column = torch.arange(past, past + T, device=idx.device)  # (T,)

        # Positions count from the first real token of each row
        position = column
        if pad is not None:
            position = (column - pad[:, None]).clamp(min=0)  # (B, T)

        x = self.drop(self.embed(idx, position))
        context = self.make_context(column, position, pad, past, x.dtype)
        for block in self.h:
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, context, None, memory, use_reentrant=False)
            else:
                x = block(x, context, cache, memory)
        if cache is not None:
            cache.length += T
        if self.config.norm_position == 'pre':
            x = self.ln_f(x)
        return x

    def embed(self, idx, position):
        """(B, T, C): token embeddings, plus those of positions unless they are rotary."""
        x = self.wte(idx)
        if self.config.pos == 'learned':
            x = x + self.wpe(position)
        if self.config.pos == 'sinusoidal':
            # Scaled as in the paper: otherwise the sines drown out the embeddings
            x = x * math.sqrt(self.config.n_embd)
            x = x + self.sinusoid[position].to(x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            # Keep the residual stream in 16 bits, too, which halves memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def make_context(self, column, position, pad, past, dtype):
        """The Context of one forward pass. Masks cost time, so one is built only when needed."""
        T = len(column)
        mask = None
        if not self.causal:
            mask = real_token_mask(pad, T)
        elif pad is not None or (past > 0 and T > 1):  # one new token may see all: no mask
            mask = causal_mask(column, pad, past)
        rope = None
        if self.config.pos == 'rotary':
            rope = self.rotary_positions(position, dtype)
        is_first = None
        if self.config.token_shift and pad is not None:
            is_first = (column == pad[:, None])[..., None]
        is_causal = self.causal and mask is None and T > 1
        return Context(mask, is_causal, rope, is_first)

    def rotary_positions(self, position, dtype):
        """(cos, sin) for rotate() at positions (T,) or (B, T)."""
        cos = self.cos[position].to(dtype)[..., None, :]  # (T, 1, D/2): the same for all heads
        sin = self.sin[position].to(dtype)[..., None, :]
        return cos, sin


# --------------------------------------------------------------------------------------------------
# Output heads: from the last layer to logits, a score for each token, and to the loss


def plain_cross_entropy(x, weight, bias, targets, label_smoothing=0.0, softcap=0.0):
    """Summed cross-entropy of x (N, C), through a linear layer (V, C), to targets (N,): float32.

    How surprised the model is: minus the logarithm of the probability that it gave each target.
    """
    logits = F.linear(x, weight, bias).float()  # (N, V)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction='sum', label_smoothing=label_smoothing)


# The same result in slices: if V is large, N × V logits at once would be the largest tensor of all
cross_entropy = kernels.cross_entropy
# cross_entropy = plain_cross_entropy


class Head(nn.Linear):
    """A linear layer to logits, optionally bounded to ± softcap (0: off)."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.softcap = config.softcap

    def forward(self, x):
        """x: (..., C); returns logits (..., V) in the dtype of the matmul."""
        logits = super().forward(x)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def loss(self, x, targets, label_smoothing=0.0):
        """Summed cross-entropy of x (N, C) and targets (N,), which must be >= 0. float32."""
        return cross_entropy(x, self.weight, self.bias, targets, label_smoothing, self.softcap)


class AdaptiveHead(nn.Module):
    """Adaptive softmax: frequent ids at full width, rare ones in narrow, rarely computed clusters.

    rank: (V,) int64 buffer, the frequency rank of each id (0: most frequent); train.py sets it.
    Grave et al. 2017, https://arxiv.org/abs/1609.04309
    """

    def __init__(self, config):
        super().__init__()
        V = config.vocab_size
        cutoffs = list(config.cutoffs)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(config.n_embd, V, cutoffs, config.div_value)
        self.register_buffer('rank', torch.arange(V))

    def forward(self, x):
        """x: (..., C); returns log-probabilities (..., V), which serve as logits."""
        with torch.autocast(x.device.type, enabled=False):  # PyTorch's module can't mix precisions
            logp = self.softmax.log_prob(x.flatten(0, -2).float())
        logp = logp[:, self.rank]  # columns: from the order of frequency to that of ids
        return logp.view(*x.shape[:-1], -1)

    def loss(self, x, targets, label_smoothing=0.0):
        """As Head.loss(). Raises ValueError for label smoothing, which this head can't do."""
        if label_smoothing:
            raise ValueError('adaptive softmax (cutoffs) does not support label_smoothing: '
                             'turn one of them off')
        with torch.autocast(x.device.type, enabled=False):
            return -self.softmax(x.float(), self.rank[targets]).output.sum()


# --------------------------------------------------------------------------------------------------
# The two models


@dataclass
class GPTConfig:
    """Size and options of a GPT. The defaults are GPT-2 124M.

    Values from untrusted files are checked by check_config() in pocket/checkpoint.py first.
    """
    block_size: int = 1024  # tokens of context
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # heads of keys and values; None: n_head
    head_dim: int | None = None  # channels of a head; None: n_embd / n_head
    n_inner: int | None = None  # width of the MLP's hidden layer; None: 4 * n_embd
    dropout: float = 0.0  # on embeddings and on what each block adds to the residual stream
    attn_dropout: float = 0.0  # on attention weights
    bias: bool = True  # biases in Linear and LayerNorm, except as set by the next three
    attn_bias: bool | None = None  # in the projections of attention; None: same as bias
    qkv_bias: bool | None = None  # … to queries, keys and values alone (Qwen2); None: as attn_bias
    head_bias: bool = False  # in the head
    pos: str = 'learned'  # learned, sinusoidal or rotary positions
    rope_theta: float = 10000.0  # rotary: the larger, the slower the slowest pair of channels turns
    rope_scaling: dict | None = None  # rotary, for longer texts: see scale_frequencies()
    norm: str = 'layernorm'  # layernorm or rmsnorm
    norm_eps: float = 1e-5  # what norms add to the variance
    norm_position: str = 'pre'  # pre (GPT-2) or post (the 2017 paper): see Block.forward()
    act: str = 'gelu'  # gelu (tanh form, GPT-2's), gelu_erf (nanoGPT's), relu, relu2 or swiglu
    qk_norm: bool | str = False  # normalize queries and keys; 'rmsnorm': with weights, Qwen3's
    token_shift: bool = False  # half of a layer's input comes from the previous token
    tie_weights: bool = True  # the head shares the token embedding
    init: str = 'gpt2'  # initial weights, gpt2 or xavier: see the table in LanguageModel
    zero_init: bool = False  # projections into the residual stream start at zero
    softcap: float = 0.0  # logits = softcap * tanh(logits / softcap); 0: off
    cutoffs: tuple = ()  # adaptive softmax: frequency ranks where clusters end; (): off
    div_value: float = 4.0  # … each cluster is this many times narrower than the one before
    gradient_checkpointing: bool = False  # recompute blocks in backward: less memory

    @property
    def head_size(self):
        """Channels of a head, D."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def num_kv_heads(self):
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head


@dataclass
class Seq2SeqConfig(GPTConfig):
    """Size and options of an encoder-decoder. The defaults: the 2017 base model, but pre-norm."""
    block_size: int = 256  # tokens of a target
    src_block_size: int | None = None  # tokens of a source; None: same as block_size
    n_layer: int = 6  # in the decoder
    n_encoder_layer: int | None = None  # in the encoder; None: same as n_layer
    n_head: int = 8
    n_embd: int = 512
    pos: str = 'sinusoidal'
    act: str = 'relu'
    tie_weights: bool = False
    tie_source: bool = True  # source and target share their embedding
    init: str = 'xavier'


class LanguageModel(nn.Module):
    """What GPT and Seq2Seq share: initial weights, the loss, and generation."""
    is_encoder_decoder = False

    def __init__(self, config):
        super().__init__()
        assert not (config.cutoffs and config.tie_weights), 'adaptive softmax can\'t share weights'
        if config.head_dim is None:
            assert config.n_embd % config.n_head == 0, 'n_embd must be divisible by n_head'
        assert config.n_head % config.num_kv_heads == 0, 'n_head must be divisible by n_kv_head'
        self.config = config

    def _init_weights(self, module):
        """Initial weights, a row of this table at a time. (apply() visits a module after its
        parts, so what is said of attention and MLP overrides what is said of linear layers.)

                                        init='gpt2'                  init='xavier' (fairseq's)
            linear layers               normal(0.02)                 uniform by fan-in and fan-out
            embeddings, head            normal(0.02)                 normal(1 / √n_embd)
            biases                      zero                         zero
            c_proj of attention, MLP    normal(0.02 / √(2 n_layer))  as other linear layers
            … with zero_init            zero                         zero
            untied head with zero_init  zero                         zero

        c_proj starts small because 2 n_layer of them add up in a GPT's residual stream. With
        zero_init and pre-norm all blocks start as the identity; with an untied Head, too, all
        tokens start equally probable, and the first loss is ln(vocab_size).
        """
        config = self.config
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if config.init == 'gpt2':
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Embedding, Head)):
                nn.init.normal_(module.weight, std=config.n_embd ** -0.5)
            else:
                nn.init.xavier_uniform_(module.weight)

        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

        if isinstance(module, Attention) and config.init == 'xavier':
            # Queries, keys and values are separate matrices, stacked in one weight
            q_width, kv_width = module.q_width, module.kv_width
            if module.is_cross:
                matrices = [module.c_q.weight, *module.c_kv.weight.split(kv_width)]
            else:
                matrices = module.c_attn.weight.split((q_width, kv_width, kv_width))
            for matrix in matrices:
                nn.init.xavier_uniform_(matrix)

        if isinstance(module, (Attention, MLP)) and (config.init == 'gpt2' or config.zero_init):
            std = 0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

        if isinstance(module, Head) and config.zero_init and not config.tie_weights:
            nn.init.zeros_(module.weight)

    def num_params(self):
        """Number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def compute_loss(self, x, targets, label_smoothing, reduction):
        """The loss of the final hidden states x (B, T, C) against targets (B, T), -1 = no target.

        reduction: 'mean' or 'sum' over targets. Or, for validation, 'sum_and_correct': a tensor
        (2,) with the sum and the number of targets that the model ranked first. float32.
        """
        # Skip what has no target, prompts and padding: its logits are never computed
        has_target = targets != -1
        x = x[has_target]  # (N, C)
        targets = targets[has_target]  # (N,)
        if reduction == 'sum_and_correct':
            return kernels.loss_and_correct(self.lm_head, x, targets, self.config.vocab_size)
        loss = self.lm_head.loss(x, targets, label_smoothing)
        if reduction == 'mean':
            loss = loss / len(targets)
        return loss

    def generate(self, idx, max_new_tokens, **options):
        """Continue idx: a (B, T) tensor gives (B, T + max_new_tokens), or fewer columns if all rows
        end early; lists of ids give lists. A Seq2Seq returns the reply alone.

        Call model.eval() first, to switch dropout off.

            model.generate(torch.tensor([[1, 2, 3]]), 20, temperature=0.8, top_k=50)

        The loop and its options are in pocket/generate.py: read it next.
        """
        return generate(self, idx, max_new_tokens, **options)


class GPT(LanguageModel):
    """Decoder-only Transformer, with GPT-2's layout and parameter names."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config, config.n_layer, config.block_size)
        self.lm_head = AdaptiveHead(config) if config.cutoffs else Head(config)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def forward(self, idx, targets=None, cache=None, label_smoothing=0.0, reduction='mean'):
        """idx: (B, T) int64; returns (logits, None), or (None, loss) if targets (B, T) are given.

        logits: (B, T, V), in the precision that the model runs in. targets: the id that follows
        each token, -1 = no target. cache: a KVCache, which idx continues.
        label_smoothing, reduction: see compute_loss().
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x), None
        return None, self.compute_loss(x, targets, label_smoothing, reduction)

    def hidden(self, idx, cache=None):
        """(B, T, C): the last layer, before the head."""
        pad = None if cache is None else cache.pad
        return self.transformer(idx, pad, cache)

    def next_token_logits(self, idx, cache):
        """(B, V) logits of the token that follows idx (B, T), which continues a KVCache."""
        x = self.hidden(idx, cache)
        return self.lm_head(x[:, -1])


class Seq2Seq(LanguageModel):
    """Encoder-decoder Transformer: the encoder reads a source, the decoder writes a target."""
    is_encoder_decoder = True

    def __init__(self, config):
        super().__init__(config)
        n_encoder_layer = config.n_encoder_layer or config.n_layer
        src_block_size = config.src_block_size or config.block_size
        self.encoder = Transformer(config, n_encoder_layer, src_block_size, causal=False)
        self.decoder = Transformer(config, config.n_layer, config.block_size, cross=True)
        self.lm_head = AdaptiveHead(config) if config.cutoffs else Head(config)
        if config.tie_source:
            self.encoder.wte.weight = self.decoder.wte.weight
        if config.tie_weights:
            self.lm_head.weight = self.decoder.wte.weight
        self.apply(self._init_weights)

    def encode(self, src, src_pad=None):
        """The memory that decoding attends to: ((B, S, C), mask of its padding or None).

        src: (B, S) int64; src_pad: (B,) int64, how many columns at the left of each row are
        padding. Raises ValueError if S exceeds src_block_size.
        """
        return self.encoder(src, src_pad), real_token_mask(src_pad, src.size(1))

    def forward(self, idx, targets=None, src=None, src_pad=None, cache=None, label_smoothing=0.0,
                reduction='mean'):
        """idx: (B, T) int64, the target so far, preceded by the start id.

        src, src_pad: the source, see encode(); if omitted, cache.memory must hold an encoded
        source. The rest is as in GPT.forward(). In training, padding is at the right of idx, and
        needs no mask: its targets are -1.
        """
        memory = cache.memory if src is None else self.encode(src, src_pad)
        x = self.hidden(idx, cache, memory)
        if targets is None:
            return self.lm_head(x), None
        return None, self.compute_loss(x, targets, label_smoothing, reduction)

    def hidden(self, idx, cache, memory):
        """(B, T, C): the decoder's last layer, before the head."""
        pad = None if cache is None else cache.pad
        return self.decoder(idx, pad, cache, memory)

    def next_token_logits(self, idx, cache):
        """(B, V) logits of the token that follows idx (B, T), which continues a KVCache."""
        x = self.hidden(idx, cache, cache.memory)
        return self.lm_head(x[:, -1])
