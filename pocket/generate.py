"""
How a language model generates text.

A language model does one thing: it predicts the token that follows the tokens it is given. To get
a text, we ask it again and again. Read this file from top to bottom:

    generate_plain      the whole idea in ten lines
    sample_next_token   logits -> one token: temperature, top-k, top-p, min-p, repetition penalty
    KVCache             keys and values of the tokens read so far, so that none is read twice
    generate_stream     prefill and decode: many prompts at once, one token per prompt and step
    generate            the same, collected
    beam_search         the most probable continuations instead of sampled ones

References:
  top-p (nucleus) sampling  Holtzman et al. 2019, https://arxiv.org/abs/1904.09751
  min-p sampling            Nguyen et al. 2024,   https://arxiv.org/abs/2407.01082
  repetition penalty        Keskar et al. 2019,   https://arxiv.org/abs/1909.05858
  length penalty            Wu et al. 2016,       https://arxiv.org/abs/1609.08144
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@torch.inference_mode()
def generate_plain(model, idx, max_new_tokens, temperature=1.0, generator=None):
    """Continue each row of idx, (B, T) int64, with a GPT. Returns (B, T + max_new_tokens).

    The reference: as long as the text fits into block_size, generate() returns the same tokens,
    only faster.
    """
    for _ in range(max_new_tokens):
        context = idx[:, -model.config.block_size:]  # the model sees no further back
        logits, _ = model(context)                   # (B, T, V): a prediction after every token
        logits = logits[:, -1].float()               # (B, V): after the last one
        if temperature == 0:
            next_token = logits.argmax(dim=-1, keepdim=True)
        else:
            probs = F.softmax(logits / temperature, dim=-1)
            next_token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
        idx = torch.cat((idx, next_token), dim=1)
    return idx


# --------------------------------------------------------------------------------------------------
# From logits to one token


@dataclass
class SamplingParams:
    """How the next token is chosen. The defaults sample from the model's own distribution."""
    temperature: float = 1.0         # below 1: more predictable, above 1: more diverse, 0: greedy
    top_k: int | None = None         # keep the k most probable tokens
    top_p: float | None = None       # keep the most probable tokens that together reach top_p
    min_p: float | None = None       # keep tokens at least min_p times as probable as the first
    repetition_penalty: float = 1.0  # above 1: tokens already in the row become less probable

    def check(self):
        """Raise ValueError if an option is out of its range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f'temperature must be 0 (greedy) or more, got {self.temperature}')
        if self.top_k is not None and not self.top_k >= 1:
            raise ValueError(f'top_k must be at least 1, or None, got {self.top_k}')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f'top_p must be above 0 and at most 1, or None, got {self.top_p}')
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f'min_p must be from 0 to 1, or None, got {self.min_p}')
        if not self.repetition_penalty > 0:
            raise ValueError(
                f'repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}')


def sample_next_token(logits, params, seen=None, banned=None, generator=None):
    """Choose one token per row. logits: (B, V) float; returns (B,) int64.

    params: SamplingParams. seen: (B, V) bool, the tokens that the repetition penalty applies to.
    banned: (N,) int64, tokens that are never chosen. The order is: banned, repetition penalty,
    temperature, top-k, top-p, min-p. Nothing in here makes a GPU wait for Python.
    """
    # Writing to a few columns is much faster than a mask over a large vocabulary (docs/LOG.md).
    # We write to a copy, because the logits belong to the caller.
    logits = logits.to(torch.float32, copy=banned is not None)
    if banned is not None:
        logits.index_fill_(-1, banned, -math.inf)

    if params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)

    # Greedy: the limit of ever lower temperatures, which dividing by 0 does not give
    if params.temperature < 1e-6:  # dividing by even less would overflow
        return logits.argmax(dim=-1)
    logits = logits / params.temperature

    # Top-k and top-p need tokens in order of probability. Once they are sorted, a column is a rank
    # and token_ids says which token has it.
    token_ids = None
    if params.top_k is not None or params.top_p is not None:
        logits, token_ids = sort_top_k(logits, params.top_k)
    probs = F.softmax(logits, dim=-1)
    if params.top_p is not None:
        probs = filter_top_p(probs, params.top_p)
    if params.min_p is not None:
        probs = filter_min_p(probs, params.min_p)

    choice = draw(probs, generator)  # (B,) columns
    if token_ids is None:
        return choice
    return token_ids.gather(-1, choice[:, None])[:, 0]


def penalize_repetition(logits, seen, penalty):
    """Lower the logits of the tokens in seen: divide positive ones, multiply negative ones.

    logits: (B, V); seen: (B, V) bool. Returns (B, V).
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def sort_top_k(logits, top_k):
    """The top_k largest logits of each row (None: all), in descending order, and their token ids.

    Returns two tensors (B, k). Exactly k tokens remain, even if the next one ties with the last.
    """
    vocab_size = logits.size(-1)
    if top_k is None:
        top_k = vocab_size
    return logits.topk(min(top_k, vocab_size), dim=-1)


def filter_top_p(probs, top_p):
    """Keep the smallest set of tokens whose total probability reaches top_p (nucleus sampling).

    probs: (B, k), each row in descending order. The token that crosses the line is kept, so at
    least one always is. Returns (B, k), normalized again.

    >>> filter_top_p(torch.tensor([[0.5, 0.25, 0.125, 0.125]]), top_p=0.75)
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    """
    before = probs.cumsum(dim=-1) - probs  # total probability of the tokens ahead of each
    probs = probs.masked_fill(before >= top_p, 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def filter_min_p(probs, min_p):
    """Keep tokens at least min_p times as probable as the most probable one. probs: (B, k).

    >>> filter_min_p(torch.tensor([[0.5, 0.375, 0.125]]), min_p=0.5)
    tensor([[0.5000, 0.3750, 0.0000]])
    """
    threshold = min_p * probs.max(dim=-1, keepdim=True).values
    return probs.masked_fill(probs < threshold, 0)


def draw(probs, generator=None):
    """Draw one column per row in proportion to probs, (B, k). Returns (B,) int64.

    An exponential race: if column i arrives after a random time Exp(1) / probs[i], it arrives
    first with probability probs[i]. torch.multinomial does the same, but checks probs beforehand,
    and on a GPU that check is a wait.
    """
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(dim=-1)


# --------------------------------------------------------------------------------------------------
# The key-value cache


class KVCache:
    """Keys and values of all layers, for B rows and up to `size` columns, `length` of them filled.

    Attention is causal, so the keys and values of a token never change once it has been read. With
    them at hand, a step of generation reads one token instead of the whole text.

    config: the model's. device, dtype: of the tensors. pad: (B,) int64, how many columns at the
    left of each row are padding, or None. memory: what Seq2Seq.encode() returned, or None.
    """

    def __init__(self, config, B, size, device, dtype, pad=None, memory=None):
        shape = (config.n_layer, B, config.num_kv_heads, size, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.size = size
        self.length = 0  # the model increases it once all layers have appended their columns
        self.pad = pad
        self.memory = memory
        self.cross = {}  # {layer: (k, v)} of cross-attention, computed once from memory
        self.last = {}   # {module: (B, 1, C / 2)}: what token shift carries over to the next token

    def append(self, layer, k, v):
        """Store k and v, (B, n_kv_head, T, D), in the next T columns of a layer.

        Returns all keys and values of the layer so far: (B, n_kv_head, length + T, D) each.
        """
        start = self.length
        end = start + k.size(2)
        self.k[layer, :, :, start:end] = k
        self.v[layer, :, :, start:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows, same_prompts=False):
        """Continue with these rows, (N,) int64: a row may be left out, or appear several times.

        same_prompts=True keeps padding, encoded source and cross-attention as they are: enough, and
        faster, if each row is replaced by one with the same prompt.
        """
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.last = {module: half[rows] for module, half in self.last.items()}
        if same_prompts:
            return

        if self.pad is not None:
            self.pad = self.pad[rows]
        if self.memory is not None:
            encoded, mask = self.memory
            if mask is not None:
                mask = mask[rows]
            self.memory = (encoded[rows], mask)
        self.cross = {layer: (k[rows], v[rows]) for layer, (k, v) in self.cross.items()}


def new_cache(model, B, size, pad=None, memory=None):
    """An empty KVCache for a model, on its device and in its dtype.

    On a CPU it is never bfloat16: there, attention to one token reads float32 several times as
    fast (docs/LOG.md).
    """
    weight = next(model.parameters())
    dtype = weight.dtype
    if weight.is_cpu and dtype == torch.bfloat16:
        dtype = torch.float32
    return KVCache(model.config, B, size, weight.device, dtype, pad, memory)


# --------------------------------------------------------------------------------------------------
# Prompts


def pad_left(rows, device):
    """Sequences of token ids in one tensor, flush right, because the right is where they grow.

    Returns (B, T) int64 and (B,) int64, how many columns at the left of each row are padding, or
    None if none are.

    >>> pad_left([[5, 6, 7], [8]], 'cpu')
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([0, 2]))
    """
    lengths = [len(row) for row in rows]
    width = max(lengths)
    idx = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        idx[i, width - len(row):] = torch.as_tensor(row)
    return idx.to(device), padding_for(lengths, device)


def padding_for(lengths, device):
    """How many columns of padding bring each row to the longest length: (B,) int64, None if 0."""
    width = max(lengths)
    if min(lengths) == width:
        return None
    return torch.tensor([width - length for length in lengths], device=device)


def check_prompts(prompts, vocab_size):
    """The prompts as lists of ids. Raises ValueError if one is empty or has an unknown id."""
    checked = []
    for prompt in prompts:
        if torch.is_tensor(prompt):
            prompt = prompt.tolist()
        checked.append(list(prompt))

    if not checked or not all(checked):
        raise ValueError('a prompt needs at least one token')
    for prompt in checked:
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f'the prompt has token id {token}, but the model knows only '
                                 f'0 to {vocab_size - 1}')
    return checked


def prepare_inputs(model, prompts, decoder_start):
    """What generation starts from: a list of ids per prompt, and the memory (see KVCache).

    A GPT continues the prompt itself. A Seq2Seq reads the prompt with its encoder, once, and its
    decoder continues decoder_start, an id or a list of ids. Raises ValueError for a bad prompt, or
    if decoder_start is missing.
    """
    prompts = check_prompts(prompts, model.config.vocab_size)
    if not model.is_encoder_decoder:
        return prompts, None

    if decoder_start is None:
        raise ValueError('an encoder-decoder needs the id that its targets begin with: '
                         'decoder_start=tokenizer.decoder_start_id')
    if isinstance(decoder_start, int):
        decoder_start = [decoder_start]
    src, src_pad = pad_left(prompts, next(model.parameters()).device)
    memory = model.encode(src, src_pad)
    return [list(decoder_start) for _ in prompts], memory


def prepare_reply_prompts(model, sources, decoder_start, max_new_tokens):
    """The prompts that ask a model for replies to sources, lists of ids.

    A source that is too long keeps its newest tokens. For a GPT, decoder_start (a list of ids)
    follows the source; for a Seq2Seq the source alone is the prompt.
    """
    room = max_source_tokens(model, decoder_start, max_new_tokens)
    prompts = []
    for source in sources:
        prompt = source[-room:]
        if not model.is_encoder_decoder:
            prompt = prompt + decoder_start
        prompts.append(prompt)
    return prompts


def max_source_tokens(model, decoder_start, max_new_tokens):
    """How many tokens of a source fit, if a GPT's block also has to hold decoder_start and a reply.

    A reply is promised half of the block at most.
    """
    config = model.config
    if model.is_encoder_decoder:
        return config.src_block_size or config.block_size
    reply = min(max_new_tokens, config.block_size // 2)
    return max(1, config.block_size - len(decoder_start) - reply)


def to_ids_tensor(ids, device):
    """A collection of token ids as (N,) int64, or None if it is empty or None."""
    if not ids:
        return None
    return torch.tensor(sorted(ids), device=device)


# --------------------------------------------------------------------------------------------------
# Generation, one token at a time


@torch.inference_mode()
def generate_stream(model, prompts, max_new_tokens, params=None, eos_id=None, decoder_start=None,
                    banned=None, seed=None, use_cache=True):
    """Continue B prompts. Yields the next token of each, (B,) int64, up to max_new_tokens times.

    prompts: B sequences of token ids, of any length but 0. For a Seq2Seq they are the sources, and
    decoder_start is the id (or the list of ids) that its targets begin with.
    params: SamplingParams; None: the defaults.
    eos_id: the token that ends a row, or a list of them. It is yielded, then -1.
    banned: a collection of ids that are never chosen.
    seed: of the random numbers; None: PyTorch's global generator.
    use_cache=False: the same tokens, slowly.

    Raises ValueError if a prompt is empty or has an unknown id, or an option is out of its range.
    """
    if params is None:
        params = SamplingParams()
    params.check()
    prompts, memory = prepare_inputs(model, prompts, decoder_start)
    device = next(model.parameters()).device
    block_size = model.config.block_size

    # All rows end at the same column of one tensor. A step fills the next column of every row.
    B = len(prompts)
    prompt_lengths = [len(prompt) for prompt in prompts]
    idx, _ = pad_left(prompts, device)
    end = idx.size(1)
    idx = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)

    # What sampling needs beside the logits
    banned = to_ids_tensor(banned, device)
    seen = None
    if params.repetition_penalty != 1.0:
        seen = tokens_seen(prompts, model.config.vocab_size, device)  # (B, V) bool
    generator = None
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)

    endings = ending_ids(eos_id)
    cache = None
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if cache is None or cache.length == cache.size:
            # Prefill: read the newest tokens of every row at once, into an empty cache. The first
            # step does that, and every step that finds the cache full: the oldest tokens have to
            # leave (see window_length), which moves all others to new positions, so their keys
            # and values must be computed again.
            windows = [window_length(length + step, block_size) for length in prompt_lengths]
            width = max(windows)
            if use_cache:
                size = min(width + max_new_tokens - step, block_size)
            else:
                size = width  # full at once, so that every step is a prefill
            cache = new_cache(model, B, size, padding_for(windows, device), memory)
            unread = idx[:, end - width:end]
        else:
            # Decode: the cache holds all tokens but the newest.
            unread = idx[:, end - 1:end]

        # Predict, choose, and append a token to every row.
        logits = model.next_token_logits(unread, cache)                     # (B, V)
        token = sample_next_token(logits, params, seen, banned, generator)  # (B,)
        idx[:, end] = token
        end += 1
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        yield torch.where(done, -1, token)

        # Stop once all rows have ended. Looking makes Python wait for a GPU: there, do it rarely.
        if endings:
            for ending in endings:
                done |= token == ending
            time_to_look = device.type == 'cpu' or step % 16 == 15
            if time_to_look and done.all():
                return


def ending_ids(eos_id):
    """A list of the ids that end a row. eos_id: an int, a list, or None for none."""
    if eos_id is None:
        return []
    if isinstance(eos_id, int):
        return [eos_id]
    return list(eos_id)


def window_length(length, block_size):
    """How many of a text's newest tokens the model reads to predict the next one.

    All of them while they fit into block_size. After that the oldest ones leave, a quarter of
    block_size at a time: then a full cache is computed again once in so many tokens, not for each.

    >>> [window_length(length, block_size=8) for length in (7, 8, 9, 10, 11)]
    [7, 8, 7, 8, 7]
    """
    if length <= block_size:
        return length
    stride = max(1, block_size // 4)
    strides = math.ceil((length - block_size) / stride)
    return length - strides * stride


def tokens_seen(prompts, vocab_size, device):
    """(B, V) bool: the tokens that each prompt, a list of ids, contains."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for i, prompt in enumerate(prompts):
        seen[i, torch.as_tensor(prompt, device=device)] = True
    return seen


def generate(model, idx, max_new_tokens, eos_id=None, decoder_start=None, banned=None, seed=None,
             use_cache=True, **sampling):
    """Continue prompts and return the whole texts.

    A (B, T) tensor gives a (B, T + new) tensor, in which rows that ended early are filled up with
    eos_id. Lists of ids give lists of ids, each up to and including its eos_id. A Seq2Seq always
    gives lists, of the new tokens alone.
    sampling: fields of SamplingParams. All else, and what is raised: see generate_stream().
    """
    params = SamplingParams(**sampling)
    columns = list(generate_stream(model, idx, max_new_tokens, params, eos_id, decoder_start,
                                   banned, seed, use_cache))
    if columns:
        new = torch.stack(columns, dim=1)  # (B, new)
    else:
        new = torch.zeros(len(idx), 0, dtype=torch.long)

    if torch.is_tensor(idx) and not model.is_encoder_decoder:
        endings = ending_ids(eos_id)
        if endings:
            new = torch.where(new < 0, endings[0], new)
        return torch.cat((idx, new.to(idx.device)), dim=1)

    texts = []
    for prompt, row in zip(idx, new.tolist()):
        text = []
        if not model.is_encoder_decoder:
            text += torch.as_tensor(prompt).tolist()  # a tensor, too, as a list of ints
        text += [token for token in row if token >= 0]
        texts.append(text)
    return texts


# --------------------------------------------------------------------------------------------------
# Beam search


@dataclass
class Beam:
    """A continuation of a prompt that beam search keeps."""
    ids: list           # the new tokens
    log_prob: float     # the sum of their log-probabilities
    row: int            # its row in the batch; until place_beams(), that of the beam it grew from
    done: bool = False  # it ends here, with eos_id or because max_new_tokens is reached

    def score(self, length_penalty):
        """What finished beams are ranked by."""
        return normalized_score(self.log_prob, len(self.ids), length_penalty)


def normalized_score(log_prob, length, length_penalty):
    """log_prob / ((5 + length) / 6)^length_penalty, after Wu et al. 2016.

    Every token makes a text less probable. Without a penalty beam search prefers short texts.
    """
    return log_prob / ((5 + length) / 6) ** length_penalty


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, num_beams, eos_id=None, decoder_start=None,
                length_penalty=0.6, n_best=1, banned=None, use_cache=True):
    """The most probable continuations of prompts, as far as num_beams beams find them.

    Each step extends every beam by one token and keeps the num_beams most probable results. Beams
    that end are set aside. A prompt is done once no live beam can still get among its n_best.

    Returns a list per prompt: up to n_best pairs (ids, score), best first; ids are new, up to and
    including eos_id; for the score see normalized_score(). Other arguments: see generate_stream().
    The window does not slide here: a text ends when block_size is full.
    Raises ValueError if a prompt exceeds block_size, or an argument is out of its range.
    """
    check_beam_options(max_new_tokens, num_beams, n_best)
    prompts = check_prompts(prompts, model.config.vocab_size)
    if model.is_encoder_decoder:
        groups = [range(len(prompts))]  # all targets begin alike
    else:
        # A long prompt would leave a short one beside it less room: both fill the same columns
        groups = group_by_room(prompts, max_new_tokens, model.config.block_size)

    results = [None] * len(prompts)
    for members in groups:
        found = search_together(model, [prompts[i] for i in members], max_new_tokens, num_beams,
                                eos_id, decoder_start, length_penalty, n_best, banned, use_cache)
        for i, result in zip(members, found):
            results[i] = result
    return results


def search_together(model, prompts, max_new_tokens, num_beams, eos_id, decoder_start,
                    length_penalty, n_best, banned, use_cache):
    """beam_search() for prompts that can be continued by the same number of tokens."""
    prompts, memory = prepare_inputs(model, prompts, decoder_start)
    device = next(model.parameters()).device
    banned = to_ids_tensor(banned, device)
    idx, pad = pad_left(prompts, device)
    B, T = idx.shape

    # The last token of a text is never read, so a text may be one longer than block_size.
    max_new_tokens = min(max_new_tokens, max(1, model.config.block_size + 1 - T))
    cache_size = T + max_new_tokens - 1
    cache = new_cache(model, B, cache_size, pad, memory)

    # A beam can end in one way per ending id. So of this many candidates at least num_beams live on
    endings = ending_ids(eos_id)
    num_candidates = (1 + len(endings)) * num_beams

    # The batch has one row per prompt at first, and num_beams rows per prompt after that.
    live = [[Beam(ids=[], log_prob=0.0, row=i)] for i in range(B)]
    finished = [[] for _ in range(B)]
    row_log_prob = torch.zeros(B, device=device)  # log_prob of the beam in each row

    for length in range(1, max_new_tokens + 1):
        # Log-probability of every row's text with every possible next token.
        logits = model.next_token_logits(idx[:, cache.length:], cache)  # (rows, V)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        if banned is not None:
            log_probs.index_fill_(-1, banned, -math.inf)
        log_probs = row_log_prob[:, None] + log_probs

        count = min(num_candidates, log_probs.size(1))
        top_log_probs, top_tokens = log_probs.topk(count, dim=1)  # (rows, count)
        top_log_probs = top_log_probs.tolist()
        top_tokens = top_tokens.tolist()

        for i in range(B):
            extended = extend_beams(live[i], top_log_probs, top_tokens, limit=num_candidates)
            for beam in extended:
                ended = beam.ids[-1] in endings
                beam.done = ended or length == max_new_tokens

            # A text may end only if that is among its num_beams best extensions. So a single beam
            # is greedy decoding.
            finished[i] += [beam for beam in extended[:num_beams] if beam.done]
            finished[i].sort(key=lambda beam: beam.score(length_penalty), reverse=True)
            del finished[i][n_best:]

            live[i] = [beam for beam in extended if not beam.done][:num_beams]
            if is_search_over(live[i], finished[i], n_best, max_new_tokens, length_penalty):
                live[i] = []
        if not any(live):
            break

        # Rearrange the batch: one row per live beam. After the first step, beams only change
        # places with beams of the same prompt.
        rows_per_prompt = idx.size(0) // B
        parent_rows, tokens, log_probs = place_beams(live, num_beams, rows_per_prompt)
        parent_rows = torch.tensor(parent_rows, device=device)
        tokens = torch.tensor(tokens, device=device)
        row_log_prob = torch.tensor(log_probs, device=device)
        idx = torch.cat((idx[parent_rows], tokens[:, None]), dim=1)  # (B * num_beams, T + length)
        cache.select(parent_rows, same_prompts=length > 1)
        if not use_cache:  # read everything again, into an empty one
            cache = new_cache(model, B * num_beams, cache_size, cache.pad, cache.memory)

    results = []
    for beams in finished:
        results.append([(beam.ids, beam.score(length_penalty)) for beam in beams])
    return results


def group_by_room(prompts, max_new_tokens, block_size):
    """Lists of the numbers of prompts that can be continued by the same number of tokens.

    >>> group_by_room([[1], [1, 2], [1, 2, 3, 4], [1, 2, 3]], max_new_tokens=3, block_size=4)
    [[0, 1], [3], [2]]
    """
    groups = {}
    for i, prompt in enumerate(prompts):
        room = min(max_new_tokens, max(1, block_size + 1 - len(prompt)))
        groups.setdefault(room, []).append(i)
    return [groups[room] for room in sorted(groups, reverse=True)]


def check_beam_options(max_new_tokens, num_beams, n_best):
    """Raise ValueError if an argument of beam_search() is out of its range."""
    arguments = {'num_beams': num_beams, 'n_best': n_best, 'max_new_tokens': max_new_tokens}
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if n_best > num_beams:
        raise ValueError(f'n_best must be at most num_beams, got {n_best} and {num_beams}')


def extend_beams(beams, top_log_probs, top_tokens, limit):
    """The most probable ways to extend these beams of one prompt by a token, best first.

    top_log_probs, top_tokens: lists with, for each row of the batch, the log-probabilities of its
    best extensions and their last tokens. Returns up to `limit` new beams.
    """
    candidates = []
    for beam in beams:
        for log_prob, token in zip(top_log_probs[beam.row], top_tokens[beam.row]):
            if log_prob > -math.inf:  # not banned
                candidates.append((log_prob, beam, token))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)

    extended = []
    for log_prob, beam, token in candidates[:limit]:
        extended.append(Beam(beam.ids + [token], log_prob, beam.row))
    return extended


def is_search_over(live, finished, n_best, max_new_tokens, length_penalty):
    """True if no live beam can still get among the n_best finished ones.

    live, finished: the beams of one prompt, best first.
    """
    if not live:
        return True
    if len(finished) < n_best:
        return False

    # Log-probabilities only fall, so at best the first live beam keeps the one it has. Its score
    # is then highest at one end of the lengths still possible: the longest, or for a negative
    # length penalty the shortest.
    best = live[0]
    score_if_short = normalized_score(best.log_prob, len(best.ids) + 1, length_penalty)
    score_if_long = normalized_score(best.log_prob, max_new_tokens, length_penalty)
    return finished[-1].score(length_penalty) >= max(score_if_short, score_if_long)


def place_beams(live, num_beams, rows_per_prompt):
    """Assign the live beams of all prompts to the rows of the next batch, num_beams per prompt.

    Returns three lists, with an entry for each of these rows: the present row that it continues,
    its newest token, and its log-probability. Each beam's row is overwritten with its new one.
    A prompt with fewer live beams has spare rows, which keep the batch rectangular; nobody reads
    what the model predicts for them.
    """
    parent_rows = []
    tokens = []
    log_probs = []
    for i, beams in enumerate(live):
        for beam in beams:
            parent_rows.append(beam.row)
            tokens.append(beam.ids[-1])
            log_probs.append(beam.log_prob)
            beam.row = len(parent_rows) - 1
        spare = num_beams - len(beams)
        parent_rows += [i * rows_per_prompt] * spare
        tokens += [0] * spare
        log_probs += [0.0] * spare
    return parent_rows, tokens, log_probs
