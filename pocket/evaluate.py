"""
Evaluation: loss and accuracy over a whole split, and how replies compare with those of people.
"""
import importlib.util
import math
import re
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from pocket.data import Pairs, count_targets
from pocket.device import autocast
from pocket.distributed import all_reduce_sum, master_process, rank, shutdown, world_size
from pocket.errors import UserError
from pocket.generate import (
    SamplingParams,
    beam_search,
    generate_stream,
    max_source_tokens,
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
                batch_count = count_targets(batch)
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
    if isinstance(data, Pairs) and config['eval_protocol'] == 'smoothed_batch_mean':
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
    replies = generate_replies(model, tok, template, data, config['eval_replies'],
                               num_beams=config['num_beams'],
                               length_penalty=config['length_penalty'])
    every = math.ceil(len(replies) / 10)
    for reply in replies[::every]:  # ten to read, from all over the split
        print(f'{reply.source}\n  -> {reply.text}\n  (reference: {reply.reference})')
    for line in score_replies(replies, config['bleu_tokenize']):
        print(line)


# --------------------------------------------------------------------------------------------------
# Samples and replies


def sample_text(model, tok, template, data, prompt, max_new_tokens, seed, min_p=0.0):
    """A text that the model generates after a prompt (ids) or, for pairs, three replies."""
    model.eval()
    sampling = SamplingParams(temperature=0.8, top_k=200, min_p=min_p or None)
    if template is not None:
        replies = generate_replies(model, tok, template, data, 3, min(max_new_tokens, 60),
                                   sampling=sampling, seed=seed)
        text = '\n'.join(f'{reply.source}\n  -> {reply.text}' for reply in replies)
    else:
        new = rows_of(generate_stream(model, [prompt], max_new_tokens, sampling,
                                      eos_id=tok.eos_id, seed=seed))
        text = tok.decode(prompt + new[0])
    model.train()
    return text


@dataclass
class Reply:
    """A reply to be compared with what a person replied."""
    source: str      # what was said
    reference: str   # what the person replied, all of it
    text: str        # what the model replied
    is_cut: bool     # the model did not end it, we did


def generate_replies(model, tok, template, data, count, max_new_tokens=None, num_beams=1,
                     length_penalty=0.6, batch_size=32, sampling=None, seed=None,
                     stopped=lambda: False):
    """Replies to `count` pairs or conversations spread over data: a list of Reply.

    Greedy unless sampling, a SamplingParams, says otherwise; num_beams above 1: beam search with
    that length_penalty, see beam_search().
    max_new_tokens None: replies may fill the context, which holds at least half a block of them.
    stopped: asked before each batch; if it says so, the result is None.
    """
    from tqdm import tqdm
    model.eval()
    tokens = data.tokens()
    decoder_start = []
    if isinstance(data, Pairs):
        decoder_start = reply_start_ids(tok, template)
    banned = banned_ids(tok, model.config.vocab_size, keep=tok.eos_ids)
    options = {'eos_id': tok.eos_ids, 'decoder_start': decoder_start, 'banned': banned}

    # Exchanges from all over the split
    num_rows = len(data.source_lengths) if isinstance(data, Pairs) else len(data.lengths)
    count = min(count, num_rows)
    members = sorted({i * num_rows // count for i in range(count)})
    reserved = model.config.block_size // 2 if max_new_tokens is None else max_new_tokens
    exchanges = {}
    for member in members:
        exchanges[member] = read_exchange(model, data, tokens, member, decoder_start, reserved)

    # Stop at twice the longest reference: a model that repeats itself would fill the context
    longest = max((len(exchange.reference) for exchange in exchanges.values()), default=0)
    limits = {}
    for member, exchange in exchanges.items():
        limits[member] = max_new_tokens
        if max_new_tokens is None:
            room = reply_room(model, exchange.prompt, decoder_start)
            limits[member] = min(room, max(128, 2 * longest))

    # Prompts of similar length are answered together
    replies = {}
    order = sorted(members, key=lambda member: (len(exchanges[member].source), member))
    bar = tqdm(desc='generating replies', total=len(order), unit='reply', leave=False, disable=None,
               delay=2)
    with bar:
        for first in range(0, len(order), batch_size):
            if stopped():
                return None
            batch = order[first:first + batch_size]
            limit = max(limits[member] for member in batch)
            rows = [exchanges[member].prompt for member in batch]
            if num_beams > 1:
                found = beam_search(model, rows, limit, num_beams,
                                    length_penalty=length_penalty, **options)
                generated = [candidates[0][0] for candidates in found]
            else:
                params = sampling or SamplingParams(temperature=0)
                generated = rows_of(generate_stream(model, rows, limit, params, seed=seed,
                                                    **options))
            for member, ids in zip(batch, generated):
                ids = ids[:limits[member]]
                replies[member] = Reply(
                    source=source_text(tok, data, exchanges[member].source),
                    reference=reply_text(tok, template, data, exchanges[member].reference),
                    text=reply_text(tok, template, data, ids),
                    is_cut=not ids or ids[-1] not in tok.eos_ids)
            bar.update(len(batch))
    return [replies[member] for member in members]


def reply_room(model, prompt, decoder_start):
    """How many tokens a model can write after a prompt before its context has to slide.

    The last of them is never read, so it needs no room.
    """
    read = decoder_start if model.is_encoder_decoder else prompt
    return max(1, model.config.block_size + 1 - len(read))


class Exchange(NamedTuple):
    """What a pair or conversation says, and the reply to it: lists of ids."""
    prompt: list     # what the model reads
    source: list     # what is replied to
    reference: list  # the reply, whole, although training cuts it to fit a block


def read_exchange(model, data, tokens, member, decoder_start, reserved):
    """The Exchange of a pair or conversation.

    reserved: how many tokens of the context are kept for the reply, half of it at most.
    """
    if isinstance(data, Pairs):
        source = data.pair(tokens, member)[0].tolist()
        prompt = prepare_reply_prompts(model, [source], decoder_start, reserved)[0]
        reference = data.whole_target(tokens, member).tolist()
        return Exchange(prompt, source, reference)

    room = max_source_tokens(model, decoder_start, reserved)
    prompt, _ = data.first_exchange(tokens, member)
    source = data.question(tokens, member).tolist()
    reference = data.whole_reply(tokens, member).tolist()
    return Exchange(prompt[-room:].tolist(), source, reference)


def source_text(tok, data, ids):
    """What was said, as text. For a conversation, up to the first special token, on one line."""
    if isinstance(data, Pairs):
        return readable(tok, ids)
    texts = texts_between_specials(tok, ids)
    return ' '.join(texts[0].split()) if texts else ''


def reply_text(tok, template, data, ids):
    """The text of a reply's ids, without what every reply begins with."""
    if isinstance(data, Pairs):
        return decode_reply(tok, template, ids)
    return tok.decode(ids).strip()


def rows_of(columns):
    """Lists of ids from a stream of (B,) tensors, without the -1 of rows that have ended."""
    rows = []
    for row in torch.stack(list(columns), dim=1).tolist():
        rows.append([token for token in row if token >= 0])
    return rows


def readable(tok, ids):
    """A source as text, with a bar for each special token.

    ids: list of int, such as those of 'Hi.<sep>Hello.', which reads 'Hi. | Hello.'
    """
    return ' | '.join(texts_between_specials(tok, ids))


def texts_between_specials(tok, ids):
    """The texts that the special tokens in a list of ids separate, without empty ones."""
    special_ids = set(tok.special_tokens.values())
    parts = [[]]
    for token in ids:
        if token in special_ids:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [tok.decode(part) for part in parts]
    return [text for text in texts if text]


def score_replies(replies, bleu_tokenize='auto'):
    """Lines of text about a list of Reply: BLEU and chrF with sacrebleu's signatures, lengths, and
    distinct-1 and distinct-2.

    bleu_tokenize: how BLEU finds words, see pick_bleu_tokenize(). Raises UserError if sacrebleu, or
    what it needs for that, is not installed.
    """
    texts = [reply.text for reply in replies]
    references = [reply.reference for reply in replies]
    tokenize, note = pick_bleu_tokenize(references, bleu_tokenize)
    bleu = make_bleu(tokenize)
    from sacrebleu.metrics import CHRF
    lines = [note] if note else []
    for metric in (bleu, CHRF()):
        score = metric.corpus_score(texts, [references])
        lines.append(f'{score.name} {score.score:.2f} ({metric.get_signature()})')

    # Lengths: a model that says too little, or that we stopped, is no match for its references
    ratios = [len(text) / len(reference) for text, reference in zip(texts, references) if reference]
    if ratios:
        lines.append(f'length {sum(ratios) / len(ratios):.2f} of the reference (mean ratio of '
                     'characters)')
    cut = sum(reply.is_cut for reply in replies)
    if cut:
        lines.append(f'{cut:,} of {len(replies):,} replies were cut off at the length limit: the '
                     'context (block_size), or twice the longest reference')

    words = [text.split() for text in texts]
    of_what = ''
    if is_unspaced(references):
        words = [list(text) for text in texts]
        of_what = ' of characters'
        if tokenize in UNSPACED_TOKENIZERS:
            words = [bleu.tokenizer(text).split() for text in texts]
            of_what = ' of tokens'
    for n in (1, 2):
        ngrams = []
        for words_of_reply in words:
            ngrams += ngrams_of(words_of_reply, n)
        share = distinct_share(ngrams)
        lines.append(f'distinct-{n} {share:.4f} ({len(ngrams):,}{of_what} in {len(texts):,} '
                     'replies)')
    return lines


def make_bleu(tokenize):
    """sacrebleu's BLEU with one of its tokenizers, by name.

    Raises UserError if sacrebleu, or what it needs for that, is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError('BLEU and chrF need sacrebleu: pip install sacrebleu') from None
    try:
        # force: no warning that the text looks tokenized, for 'none' says that it is
        return BLEU(tokenize=tokenize, force=tokenize == 'none')
    except (ImportError, RuntimeError) as e:
        package = 'sacrebleu[ja]' if tokenize == 'ja-mecab' else 'sacrebleu[ko]'
        raise UserError(f'--bleu_tokenize={tokenize} needs more packages ({first_line(e)}): '
                        f'pip install "{package}"') from None


def check_bleu_options(config, meta):
    """Raise UserError before training if --eval_bleu or --best_by=bleu could not work.

    config: train.py's options. meta: of the dataset.
    """
    if config['best_by'] == 'bleu' and not config['eval_bleu']:
        raise UserError('--best_by=bleu needs to know BLEU at each evaluation: add --eval_bleu=200')
    if not config['eval_bleu']:
        return
    if meta['kind'] == 'stream':
        raise UserError(f'--eval_bleu compares replies, and {config["dataset"]} is plain text: '
                        'omit it')
    name = config['bleu_tokenize']
    make_bleu('13a' if name == 'auto' else name)


def bleu_of(model, tok, template, data, config, stopped=lambda: False):
    """BLEU of --eval_bleu replies on val, printed with three of them; None if stopped() said so.

    They are decoded greedily, or by beam search with the run's --num_beams and --length_penalty, by
    the master process for all. config: train.py's options. Puts the model back in train mode.
    """
    score = 0.0  # what the other processes add to the sum
    if master_process:
        replies = generate_replies(model, tok, template, data, config['eval_bleu'],
                                   num_beams=config['num_beams'],
                                   length_penalty=config['length_penalty'], stopped=stopped)
        model.train()
        if replies is None:
            score = math.nan  # tells the other processes that it was stopped
        else:
            score = bleu_of_replies(replies, config['bleu_tokenize'])
    score = all_reduce_sum(score)[0]
    if math.isnan(score):
        return None
    return score


def bleu_of_replies(replies, tokenize):
    """Their BLEU, printed with three of them. tokenize: the option --bleu_tokenize."""
    references = [reply.reference for reply in replies]
    tokenize, _ = pick_bleu_tokenize(references, tokenize)
    texts = [reply.text for reply in replies]
    score = make_bleu(tokenize).corpus_score(texts, [references]).score
    every = math.ceil(len(replies) / 3)
    for reply in replies[::every]:
        print(f'{reply.source}\n  -> {reply.text}')
    cut = sum(reply.is_cut for reply in replies)
    note = f', {cut:,} of them cut off' if cut else ''
    print(f'BLEU {score:.2f} of {len(replies):,} replies{note}', flush=True)
    return score


def first_line(error):
    """The first line of an error's message, or the error's name if it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:100]


# Scripts without spaces between words
HAN = '\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af'
KANA = '\u3040-\u30ff'
SOUTHEAST_ASIAN = '\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff'  # Thai, Lao, Tibetan, Burmese, Khmer
UNSPACED_TOKENIZERS = ('zh', 'ja-mecab', 'char')


def share_of(script, texts):
    """The fraction of characters, spaces not counted, that are in ranges such as HAN."""
    characters = ''.join(''.join(texts).split())
    return len(re.findall(f'[{script}]', characters)) / max(1, len(characters))


def is_unspaced(texts):
    """Whether texts have much that is written without spaces between words.

    >>> is_unspaced(['我今天去公园散步。']), is_unspaced(['I met 李.'])
    (True, False)
    """
    return share_of(HAN + KANA + SOUTHEAST_ASIAN, texts) > 0.25


def pick_bleu_tokenize(references, wanted='auto'):
    """(name, note): the sacrebleu tokenizer to count words with, and a sentence or None.

    BLEU compares words. Its default, 13a, finds them at spaces and punctuation, so a Chinese
    sentence is one word, and anything but the same sentence is worth nothing.

    >>> pick_bleu_tokenize(['Fine, thank you.'])
    ('13a', None)
    >>> pick_bleu_tokenize(['我今天去公园散步。'])[0]
    'zh'
    """
    if wanted != 'auto':
        note = None
        if is_unspaced(references) and wanted not in UNSPACED_TOKENIZERS:
            note = (f'warning: this text has no spaces between words, which '
                    f'--bleu_tokenize={wanted} relies on: zh, ja-mecab or char suit it')
        return wanted, note
    if not is_unspaced(references):
        return '13a', None
    reason = 'as this text has no spaces between words'
    if share_of(KANA, references) > 0.05:
        if importlib.util.find_spec('MeCab') and importlib.util.find_spec('ipadic'):
            return 'ja-mecab', f'BLEU compares words as MeCab finds them, {reason}'
        return 'char', (f'BLEU compares characters, {reason}; with pip install "sacrebleu[ja]" it '
                        'compares Japanese words')
    if share_of(SOUTHEAST_ASIAN, references) > share_of(HAN, references):
        return 'char', f'BLEU compares characters, {reason}'
    return 'zh', f'BLEU compares Chinese characters, {reason}'


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
