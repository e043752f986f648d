"""What a model is worth: loss and accuracy over a whole split, and how its replies compare with those of people."""
from itertools import islice

import torch

from pocket.device import autocast
from pocket.distributed import all_reduce_sum, master_process, rank, world_size
from pocket.errors import UserError
from pocket.template import banned_ids, decode_reply, reply_start_ids


def to_device(batch, where):
    """A batch (dict of tensors) on a device."""
    return {key: t.to(where) for key, t in batch.items()}


@torch.no_grad()
def evaluate(model, data, where, precision, stopped=lambda: False):
    """{loss: mean nats a target token, accuracy: share of targets that were the likeliest} over all of data, in eval mode.

    No smoothing, no padding, no dropout enter it. None where stopped() came true in between, in whichever process.
    """
    from tqdm import tqdm
    model.eval()
    loss = right = count = stop = 0
    batches, more = islice(data.eval_batches(), rank, None, world_size), 1
    quiet = None if master_process else True
    with tqdm(desc='evaluating', total=data.num_targets, unit='tok', unit_scale=True, leave=False, disable=quiet, delay=2) as bar:
        while more and not stop:  # a batch for each process, and all go on, or none
            l = r = n = 0
            if batch := next(batches, None):
                with autocast(where, precision):
                    l, r = model(**to_device(batch, where), reduction='score')[1].tolist()
                n = (batch['targets'] != -1).sum().item()
            l, r, n, more, stop = all_reduce_sum(l, r, n, batch is not None, bool(stopped()))
            loss, right, count = loss + l, right + r, count + int(n)
            bar.update(count - bar.n)
    model.train()
    return None if stop else {'loss': loss / count, 'accuracy': right / count}


@torch.no_grad()
def smoothed_batch_mean(model, data, where, precision, label_smoothing, size=32):
    """The smoothed loss averaged over batches of so many pairs in file order, as some published runs report it.

    Long pairs count less in it than short ones, and smoothing adds to it: compare it with nothing else.
    """
    model.eval()
    tokens, losses = data.tokens(), []
    for i in range(0, len(data.source_lengths), size):
        batch = data.batch(tokens, range(i, min(i + size, len(data.source_lengths))))
        with autocast(where, precision):
            losses.append(model(**to_device(batch, where), label_smoothing=label_smoothing)[1].item())
    return sum(losses) / len(losses)


def readable(tok, ids):
    """A source as text; where a special token stands there is a bar."""
    parts = [[]]
    for i in ids:
        parts[-1].append(i)
        if i in tok.special_tokens.values():
            parts.append([])
    return ' | '.join(text for text in map(tok.decode, parts) if text)


def generate_replies(model, tok, style, data, count, max_new_tokens, num_beams=1, batch_size=32, **sampling):
    """Replies to `count` pairs of data, spread over it: a list of (source, reference, reply), all text, greedy unless told.

    style: the format of conversations (chat.py). num_beams above 1: beam search. Pairs of like lengths are answered together.
    """
    from tqdm import tqdm
    model.eval()
    tokens, out = data.tokens(), {}
    start, N = reply_start_ids(tok, style), len(data.source_lengths)
    told = {'start': start, 'eot': tok.eos_id, 'banned': banned_ids(tok, model.config.vocab_size, but=tok.eos_id)}
    order = sorted({i * N // min(count, N) for i in range(min(count, N))}, key=lambda i: data.source_lengths[i])
    with tqdm(desc='writing replies', total=len(order), unit='reply', leave=False, disable=None, delay=2) as bar:
        for first in range(0, len(order), batch_size):
            members = order[first:first + batch_size]
            pairs = [[ids.tolist() for ids in data.pair(tokens, i)] for i in members]
            prompts = model.reply_prompts([source for source, _ in pairs], start, max_new_tokens)
            if num_beams > 1:
                new = [found[0][0] for found in model.beam_search(prompts, max_new_tokens, num_beams, **told)]
            else:
                written = list(model.stream(prompts, max_new_tokens, **told, **{'temperature': 0, **sampling}))
                new = [[i for i in row if i >= 0] for row in torch.stack(written, dim=1).tolist()]
            for i, (source, target), ids in zip(members, pairs, new):
                out[i] = readable(tok, source), decode_reply(tok, style, target), decode_reply(tok, style, ids)
            bar.update(len(members))
    return [out[i] for i in sorted(out)]


def score_replies(triples):
    """Lines of text: BLEU and chrF of (source, reference, reply) triples with sacrebleu's signatures, distinct-1 and -2.

    distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams of the replies' words by all of them.
    Raises UserError where sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError('BLEU and chrF need sacrebleu: pip install sacrebleu') from None
    replies, lines = [reply for _, _, reply in triples], []
    for metric in (BLEU(), CHRF()):
        score = metric.corpus_score(replies, [[reference for _, reference, _ in triples]])
        lines.append(f'{score.name} {score.score:.2f} ({metric.get_signature()})')
    for n in (1, 2):
        grams = [gram for reply in replies for words in [reply.split()] for gram in zip(*(words[k:] for k in range(n)))]
        lines.append(f'distinct-{n} {len(set(grams)) / max(1, len(grams)):.4f} ({len(grams):,} in {len(replies):,} replies)')
    return lines
