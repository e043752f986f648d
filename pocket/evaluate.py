"""
Evaluation: loss and accuracy over a whole split, and how replies compare with those of people.
"""
import math
from itertools import islice

import torch

from pocket.device import autocast
from pocket.distributed import all_reduce_sum, master_process, rank, shutdown, world_size
from pocket.errors import UserError
from pocket.generate import (
    SamplingParams,
    beam_search,
    generate_stream,
    prepare_reply_prompts,
)
from pocket.template import banned_ids, decode_reply, reply_start_ids


def to_device(batch, device):
    """A batch (dict of tensors) on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --------------------------------------------------------------------------------------------------
# Loss


@torch.no_grad()
def evaluate(model, data, device, dtype, stopped=lambda: False):
    """{'loss': mean nats per target, 'accuracy': share of targets predicted first} over all of
    data.

    In eval mode: no dropout, no label smoothing, and padding does not count. Processes share the
    batches. Returns None if stopped() came true meanwhile, in any of them.
    """
    from tqdm import tqdm
    loss = 0.0
    correct = 0.0
    count = 0
    model.eval()
    batches = islice(data.eval_batches(), rank, None, world_size)
    bar = tqdm(desc='evaluating', total=data.num_targets, unit='tok', unit_scale=True, leave=False,
               disable=None if master_process else True, delay=2)
    with bar:
        while True:
            # All ranks must make the same all-reduce calls, though some have one batch fewer
            batch = next(batches, None)
            batch_loss = batch_correct = batch_count = 0
            if batch is not None:
                with autocast(device, dtype):
                    _, sums = model(**to_device(batch, device), reduction='sum_and_correct')
                batch_loss, batch_correct = sums.tolist()
                batch_count = (batch['targets'] != -1).sum().item()
            batch_loss, batch_correct, batch_count, more, stop = all_reduce_sum(
                batch_loss, batch_correct, batch_count, batch is not None, bool(stopped()))
            loss += batch_loss
            correct += batch_correct
            count += int(batch_count)
            bar.update(int(batch_count))
            if stop or not more:
                break
    model.train()
    if stop:
        return None
    return {'loss': loss / count, 'accuracy': correct / count}


@torch.no_grad()
def smoothed_batch_mean(model, data, device, dtype, label_smoothing, batch_size=32):
    """The smoothed loss, averaged over batches of so many pairs in file order.

    Some published runs report it. Long pairs count less in it than short ones, and smoothing adds
    to it: compare it with nothing else.
    """
    model.eval()
    tokens = data.tokens()
    num_pairs = len(data.source_lengths)
    losses = []
    for first in range(0, num_pairs, batch_size):
        members = range(first, min(first + batch_size, num_pairs))
        batch = to_device(data.batch(tokens, members), device)
        with autocast(device, dtype):
            _, loss = model(**batch, label_smoothing=label_smoothing)
        losses.append(loss.item())
    return sum(losses) / len(losses)


def format_loss(loss, num_targets, num_bytes):
    """A loss in nats per token, and what else it is known as.

    num_bytes: of UTF-8 text behind num_targets targets, for bits per byte.

        >>> format_loss(1.5, 100, 200)
        '1.5000 (perplexity 4.48, 1.082 bits per byte)'
    """
    bits_per_byte = math.nan
    if num_bytes:
        bits_per_byte = loss / math.log(2) * num_targets / num_bytes
    perplexity = math.exp(min(loss, 700))  # exp(710) is more than a float can hold
    return f'{loss:.4f} (perplexity {perplexity:.2f}, {bits_per_byte:.3f} bits per byte)'


def print_evaluation(model, tok, template, data, num_bytes, device, dtype, config, title):
    """What train.py --eval_only prints: loss and accuracy on a split and, for pairs, replies.

    num_bytes: of text in the split. config: train.py's options. title: what is evaluated, on what.
    """
    if template is not None and config['eval_protocol'] == 'smoothed_batch_mean':
        smoothing = config['label_smoothing']
        loss = smoothed_batch_mean(model, data, device, dtype, smoothing)
        print(f'{title} loss with smoothing {smoothing}, mean over batches of 32 in file order: '
              f'{loss:.4f}')
        return

    scores = evaluate(model, data, device, dtype)
    shutdown()
    loss = format_loss(scores['loss'], data.num_targets, num_bytes)
    print(f'{title} loss {loss}, accuracy {scores["accuracy"]:.2%} of {data.num_targets:,} '
          f'target tokens')
    if template is None or config['eval_replies'] == 0 or not master_process:
        return
    max_new_tokens = min(config['block_size'] // 2, 128)
    triples = generate_replies(model, tok, template, data, config['eval_replies'], max_new_tokens,
                               config['num_beams'])
    every = math.ceil(len(triples) / 10)
    for source, reference, reply in triples[::every]:  # ten to read, from all over the split
        print(f'{source}\n  -> {reply}\n  (reference: {reference})')
    for line in score_replies(triples):
        print(line)


# --------------------------------------------------------------------------------------------------
# Samples and replies


def sample_text(model, tok, template, data, prompt, max_new_tokens, seed):
    """A text that the model generates after a prompt (ids) or, for pairs, three replies."""
    model.eval()
    sampling = SamplingParams(temperature=0.8, top_k=200)
    if template is not None:
        triples = generate_replies(model, tok, template, data, 3, min(max_new_tokens, 60),
                                   sampling=sampling, seed=seed)
        text = '\n'.join(f'{source}\n  -> {reply}' for source, _, reply in triples)
    else:
        new = rows_of(generate_stream(model, [prompt], max_new_tokens, sampling,
                                      eos_id=tok.eos_id, seed=seed))
        text = tok.decode(prompt + new[0])
    model.train()
    return text


def generate_replies(model, tok, template, data, count, max_new_tokens, num_beams=1, batch_size=32,
                     sampling=None, seed=None):
    """Replies to `count` pairs spread over data: a list of (source, reference, reply), all text.

    Greedy unless sampling, a SamplingParams, says otherwise; num_beams above 1: beam search.
    """
    from tqdm import tqdm
    model.eval()
    tokens = data.tokens()
    decoder_start = reply_start_ids(tok, template)
    banned = banned_ids(tok, model.config.vocab_size, keep=tok.eos_id)
    options = {'eos_id': tok.eos_id, 'decoder_start': decoder_start, 'banned': banned}

    # Pairs of similar length are answered together
    num_pairs = len(data.source_lengths)
    count = min(count, num_pairs)
    chosen = {i * num_pairs // count for i in range(count)}
    order = sorted(chosen, key=lambda pair: (data.source_lengths[pair], pair))

    triples = {}
    bar = tqdm(desc='generating replies', total=len(order), unit='reply', leave=False, disable=None,
               delay=2)
    with bar:
        for first in range(0, len(order), batch_size):
            members = order[first:first + batch_size]
            pairs = [data.pair(tokens, member) for member in members]
            sources = [source.tolist() for source, _ in pairs]
            prompts = prepare_reply_prompts(model, sources, decoder_start, max_new_tokens)
            if num_beams > 1:
                found = beam_search(model, prompts, max_new_tokens, num_beams, **options)
                replies = [candidates[0][0] for candidates in found]
            else:
                params = sampling or SamplingParams(temperature=0)
                columns = generate_stream(model, prompts, max_new_tokens, params, seed=seed,
                                          **options)
                replies = rows_of(columns)
            for member, (source, target), reply in zip(members, pairs, replies):
                triples[member] = (readable(tok, source.tolist()),
                                   decode_reply(tok, template, target.tolist()),
                                   decode_reply(tok, template, reply))
            bar.update(len(members))
    return [triples[member] for member in sorted(triples)]


def rows_of(columns):
    """Lists of ids from a stream of (B,) tensors, without the -1 of rows that have ended."""
    rows = torch.stack(list(columns), dim=1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def readable(tok, ids):
    """A source as text, with a bar for each special token.

    ids: list of int, such as those of 'Hi.<sep>Hello.', which reads 'Hi. | Hello.'
    """
    special_ids = set(tok.special_tokens.values())
    parts = [[]]
    for token in ids:
        if token in special_ids:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [tok.decode(part) for part in parts]
    return ' | '.join(text for text in texts if text)


def score_replies(triples):
    """Lines of text: BLEU and chrF of (source, reference, reply) triples, with sacrebleu's
    signatures, and distinct-1 and distinct-2.

    Raises UserError if sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError('BLEU and chrF need sacrebleu: pip install sacrebleu') from None
    replies = [reply for _, _, reply in triples]
    references = [reference for _, reference, _ in triples]
    lines = []
    for metric in (BLEU(), CHRF()):
        score = metric.corpus_score(replies, [references])
        lines.append(f'{score.name} {score.score:.2f} ({metric.get_signature()})')
    for n in (1, 2):
        ngrams = []
        for reply in replies:
            ngrams += ngrams_of(reply.split(), n)
        share = distinct_share(ngrams)
        lines.append(f'distinct-{n} {share:.4f} ({len(ngrams):,} in {len(replies):,} replies)')
    return lines


def ngrams_of(words, n):
    """All runs of n words.

        >>> ngrams_of(['to', 'be', 'or'], 2)
        [('to', 'be'), ('be', 'or')]
    """
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def distinct_share(ngrams):
    """distinct-n: different n-grams divided by all. Li et al. 2016,
    https://arxiv.org/abs/1510.03055

    Models that always say the same are near 0.
    """
    return len(set(ngrams)) / max(1, len(ngrams))
