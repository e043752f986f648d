"""
How the models of model.py write: sampling a token, streams of them over ragged batches, beam search.

References:
  nucleus sampling    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751
  repetition penalty  Keskar et al. 2019,   https://arxiv.org/abs/1909.05858
  length penalty      Wu et al. 2016,       https://arxiv.org/abs/1609.08144
"""
import math

import torch
from torch.nn import functional as F


def next_token(logits, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               banned=None, generator=None):
    """Choose one token a row. logits: (B, V) float; returns (B,) int64.

    temperature 0 is greedy. top_k keeps exactly that many; top_p the smallest set whose mass reaches it (the token that
    crosses the line stays); min_p those at least that share of the likeliest. repetition_penalty > 1 lowers every token
    in seen, (B, V) bool, whatever its sign (Keskar et al. 2019). banned: (N,) int64, never chosen. The filters act in this order:
    banned, penalty, temperature, top_k, top_p, min_p. No host sync, and no torch.multinomial: argmax(p / Exp(1)) draws from p.
    """
    logits = logits.to(torch.float32, copy=banned is not None)
    if banned is not None:
        logits.index_fill_(-1, banned, -math.inf)  # a mask over all of a large vocabulary would take longer than argmax (LOG.md)
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
            ('temperature', temperature, 0 <= temperature < math.inf, '0 (greedy) or more'),
            ('top_k', top_k, top_k is None or top_k >= 1, 'at least 1, or None'),
            ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1, or None'),
            ('min_p', min_p, min_p is None or 0 <= min_p <= 1, 'from 0 to 1, or None'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0 (1 is off)')):
        if not ok:
            raise ValueError(f'{name} must be {want}, got {value}')


def pad_left(rows, device):
    """Sequences of ids to ((B, T) int64, how many columns at the left of each row are padding: (B,) int64, or None for none)."""
    T = max(len(row) for row in rows)
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    for out, row in zip(idx, rows):
        out[T - len(row):] = torch.as_tensor(row)
    pad = torch.tensor([T - len(row) for row in rows])
    return idx.to(device), pad.to(device) if pad.any() else None


class Generation:
    """How a language model writes.

    It has forward(), new_cache() and begin(prompts, start), which gives (the ids that writing goes on from, a row each; what
    else forward() needs): for a GPT the prompts themselves, for a Seq2Seq `start` and the encoded prompts.
    """

    def window(self, n):
        """How many of n tokens the model looks at when it writes the next one.

        All of them up to block_size. Then the oldest leave a quarter of the context at a time: positions shift when a token
        leaves, so every cached key must be computed anew, and this way that is paid once in block_size / 4 tokens.
        """
        T = self.config.block_size
        step = max(1, T // 4)
        return n if n <= T else n - math.ceil((n - T) / step) * step

    def check_prompts(self, prompts):
        """prompts as lists of ids. Raises ValueError where one is empty or has an id outside the vocabulary."""
        prompts, V = [p.tolist() if torch.is_tensor(p) else list(p) for p in prompts], self.config.vocab_size
        if not prompts or not all(prompts):
            raise ValueError('a prompt needs at least one token')
        if bad := [i for p in prompts for i in p if not 0 <= i < V]:
            raise ValueError(f'the prompt has token id {bad[0]}, but the model knows only 0 to {V - 1}')
        return prompts

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, eot=None, start=None, seed=None, banned=None, use_cache=True, **sampling):
        """Generate, a token at a time: yields max_new_tokens times a (B,) int64 tensor, -1 in rows that have ended.

        prompts: B sequences of token ids, of any lengths, none empty; for a Seq2Seq they are sources, and start is the id (or
        the ids) that its targets begin with. eot: the id that ends a row (it is still yielded). banned: ids never chosen.
        sampling: the knobs of next_token(). use_cache=False gives the same tokens, slowly.
        Raises ValueError on an empty prompt, an id outside the vocabulary, or a sampling knob out of its range.
        """
        check_sampling(**sampling)
        prompts, given = self.begin(self.check_prompts(prompts), start)
        device, V = next(self.parameters()).device, self.config.vocab_size
        lengths, B = [len(p) for p in prompts], len(prompts)
        idx, end = pad_left(prompts, device)[0], max(lengths)  # every row ends at the same column, and grows there
        idx = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
        seen = None
        if sampling.get('repetition_penalty', 1.0) != 1.0:
            seen = torch.zeros(B, V, dtype=torch.bool, device=device)
            for row, p in zip(seen, prompts):
                row[torch.as_tensor(p, device=device)] = True
        banned, cache = torch.tensor(sorted(banned), device=device) if banned else None, None
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            if cache is not None and cache.len < cache.size:
                new = idx[:, end - 1:end]
            else:  # the first step, or the window is full: read each row's window from its start
                windows = [self.window(n + step) for n in lengths]
                W = max(windows)
                new = idx[:, end - W:end]
                pad = torch.tensor([W - w for w in windows], device=device) if min(windows) < W else None
                if use_cache:
                    cache = self.new_cache(B, min(W + max_new_tokens - step, self.config.block_size))
            logits, _ = self(new, cache=cache, pad=pad, last_only=True, **given)  # (B, 1, V)
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
        or a list of lists of ids, gives a list of lists, each up to its eot. A Seq2Seq gives, as lists, what is new alone.
        Keywords: see stream().

            model.generate(torch.tensor([[1, 2, 3]]), 20, temperature=0.8, top_k=50)
        """
        new = list(self.stream(idx, max_new_tokens, eot=eot, **kwargs))  # of (B,)
        new = torch.stack(new, dim=1) if new else torch.zeros(len(idx), 0, dtype=torch.long)
        before = [[]] * len(idx) if hasattr(self, 'encoder') else idx
        if torch.is_tensor(before):
            return torch.cat((before, torch.where(new < 0, eot or 0, new).to(before.device)), dim=1)
        return [list(p) + [t for t in row if t >= 0] for p, row in zip(before, new.tolist())]

    @torch.inference_mode()
    def beam_search(self, prompts, max_new_tokens, num_beams, eot=None, start=None, length_penalty=0.6, n_best=1, banned=None,
                    use_cache=True):
        """The likeliest continuations that a beam finds. prompts, eot, start, banned, use_cache: see stream().

        Returns for each prompt a list of up to n_best (ids, score), best first: the new ids, up to and with eot, and their summed
        log-probability divided by ((5 + len) / 6)^length_penalty. Every step keeps the num_beams likeliest unfinished texts;
        those that ended wait aside. A prompt is finished when no unfinished text can still be among its n_best.
        The context does not move on here: it ends when block_size is full. Raises ValueError where a prompt alone is longer
        than that, or a number is out of its range.
        """
        for name, value, least in (('num_beams', num_beams, 1), ('n_best', n_best, 1), ('max_new_tokens', max_new_tokens, 1)):
            if value < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')
        if n_best > num_beams:
            raise ValueError(f'n_best must be at most num_beams, got {n_best} and {num_beams}')
        prompts, given = self.begin(self.check_prompts(prompts), start)
        B, K, V, device = len(prompts), num_beams, self.config.vocab_size, next(self.parameters()).device
        idx, pad = pad_left(prompts, device)
        T = idx.size(1)
        max_new_tokens = min(max_new_tokens, max(1, self.config.block_size + 1 - T))
        banned = torch.tensor(sorted(banned), device=device) if banned else None
        cache = self.new_cache(B, T - 1 + max_new_tokens) if use_cache else None
        live, finished = [[(0.0, [])] for _ in range(B)], [[] for _ in range(B)]  # (log-probability, ids); (score, ids)

        def penalty(n):
            return ((5 + n) / 6) ** length_penalty

        for n in range(1, max_new_tokens + 1):
            new = idx[:, -1:] if cache is not None and cache.len else idx
            logits, _ = self(new, cache=cache, pad=pad, last_only=True, **given)       # (B * beams, 1, V); one beam at first
            logp = torch.log_softmax(logits[:, -1].float(), dim=-1)
            if banned is not None:
                logp.index_fill_(-1, banned, -math.inf)
            before = torch.tensor([[p for p, _ in beams] for beams in live], device=device)     # (B, beams)
            total = (before[:, :, None] + logp.view(B, -1, V)).flatten(1)                        # (B, beams * V)
            best, at = total.topk(min(2 * K, total.size(1)), dim=1)  # at most K of 2 K are ends, so K unfinished ones are left
            rows, tokens = [], []
            for b, (scores, places) in enumerate(zip(best.tolist(), at.tolist())):
                beams, width = [], len(live[b])
                for rank, (score, place) in enumerate(zip(scores, places)):
                    parent, token = divmod(place, V)
                    if score == -math.inf:
                        break
                    ids = live[b][parent][1] + [token]
                    if token == eot or n == max_new_tokens:
                        if rank < K:  # a text ends only where that is among its likeliest ways to go on: one beam is greedy
                            finished[b].append((score / penalty(n), ids))
                    elif len(beams) < K:
                        beams.append((score, ids))
                        rows.append(b * width + parent)
                        tokens.append(token)
                finished[b] = sorted(finished[b], key=lambda f: -f[0])[:n_best]
                hope = max((s / penalty(m) for s, _ in beams for m in (n + 1, max_new_tokens)), default=-math.inf)
                if len(finished[b]) == n_best and finished[b][-1][0] >= hope:
                    beams = [(-math.inf, ids) for _, ids in beams]  # it is done: these can't become anything
                missing = K - len(beams)                             # every prompt has K rows, so that they stay one tensor
                rows, tokens = rows + [b * width] * missing, tokens + [0] * missing
                live[b] = beams + [(-math.inf, [])] * missing
            if all(p == -math.inf for beams in live for p, _ in beams):
                break
            rows = torch.tensor(rows, device=device)
            idx = torch.cat((idx[rows], torch.tensor(tokens, device=device)[:, None]), dim=1)    # (B * K, T + n)
            if cache is not None:
                cache.select(rows, memory=n == 1)  # later, beams of one prompt only change places, and share its memory
            if n == 1:
                pad = None if pad is None else pad[rows]
                given = {key: tuple(t if t is None else t[rows] for t in value) for key, value in given.items()}
        return [[(ids, score) for score, ids in found] for found in finished]
