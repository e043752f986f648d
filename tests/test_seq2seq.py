"""
The encoder-decoder: against PyTorch's own Transformer, and with a cache against itself without one.
Beam search against exhaustive search. The adaptive softmax.

Run it alone: pytest -n 0 tests/test_seq2seq.py

Batches of pairs are in test_data.py, models with random switches in test_properties.py.
"""
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket.checkpoint import check_config
from pocket.generate import beam_search, new_cache, pad_left

SOURCES = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 3, 3]]


def small_seq2seq(**switches):
    """A small random Seq2Seq in eval mode, with weights so large that tokens differ."""
    torch.manual_seed(1)
    shape = {'vocab_size': 20, 'block_size': 16, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = Seq2Seq(Seq2SeqConfig(**{**shape, **switches}))
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# The model


def test_base_model_of_the_paper_has_its_shape():
    """121,353,300 parameters: biases in the MLPs, the norms and the head, none in attention."""
    shape = {'vocab_size': 50_260, 'attn_bias': False}
    with torch.device('meta'):
        model = Seq2Seq(Seq2SeqConfig(head_bias=True, tie_source=False, **shape))
        tied = Seq2Seq(Seq2SeqConfig(tie_weights=True, **shape))
    assert model.config.n_embd == 512
    assert model.config.n_head == 8
    assert model.encoder.h[0].mlp.c_fc.out_features == 2048
    assert len(model.encoder.h) == len(model.decoder.h) == model.config.n_layer == 6
    assert model.num_params() == 121_353_300
    assert tied.num_params() == 121_353_300 - 2 * 50_260 * 512 - 50_260


def copy_attention(ours, theirs):
    """Copy the weights of an Attention into an nn.MultiheadAttention."""
    if ours.is_cross:
        weight = torch.cat((ours.c_q.weight, ours.c_kv.weight))
        bias = torch.cat((ours.c_q.bias, ours.c_kv.bias))
    else:
        weight = ours.c_attn.weight
        bias = ours.c_attn.bias
    theirs.in_proj_weight.data.copy_(weight)
    theirs.in_proj_bias.data.copy_(bias)
    theirs.out_proj.load_state_dict(ours.c_proj.state_dict())


def copy_transformer(ours, theirs):
    """Copy the weights of a Transformer into an nn.TransformerEncoder or -Decoder."""
    for block, layer in zip(ours.h, theirs.layers):
        copy_attention(block.attn, layer.self_attn)
        norms = [block.ln_1, block.ln_2]
        if hasattr(block, 'cross'):
            copy_attention(block.cross, layer.multihead_attn)
            norms = [block.ln_1, block.ln_x, block.ln_2]
        for number, norm in enumerate(norms, start=1):
            getattr(layer, f'norm{number}').load_state_dict(norm.state_dict())
        layer.linear1.load_state_dict(block.mlp.c_fc.state_dict())
        layer.linear2.load_state_dict(block.mlp.c_proj.state_dict())
    if theirs.norm is not None:
        theirs.norm.load_state_dict(ours.ln_f.state_dict())


def embed_by_the_paper(ids, pad, embedding):
    """Scaled token embeddings plus sinusoidal positions, from the first real token of each row."""
    C = embedding.embedding_dim
    position = (torch.arange(ids.size(1)) - pad[:, None]).clamp(min=0)[..., None].double()
    i = torch.arange(0, C, 2).double()
    angle = position / 10000 ** (i / C)
    positions = torch.cat((angle.sin(), angle.cos()), -1).float()
    return embedding(ids) * math.sqrt(C) + positions


@pytest.mark.parametrize('norm_position, act', [
    ('pre', 'relu'), ('post', 'relu'), ('pre', 'gelu_erf')])
def test_seq2seq_equals_torch_transformer(norm_position, act):
    """With the same weights, on a padded batch: the same logits, to 1e-5."""
    model = small_seq2seq(norm_position=norm_position, act=act)
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.1)
    theirs = nn.Transformer(32, 4, 2, 2, 128, dropout=0.0, batch_first=True,
                            activation='relu' if act == 'relu' else 'gelu',
                            norm_first=norm_position == 'pre').eval()
    theirs.encoder.enable_nested_tensor = False
    if norm_position == 'post':  # PyTorch adds a norm after each stack even here, unlike the paper
        theirs.encoder.norm = None
        theirs.decoder.norm = None
    copy_transformer(model.encoder, theirs.encoder)
    copy_transformer(model.decoder, theirs.decoder)

    src, src_pad = pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 7))
    hidden = torch.arange(src.size(1)) < src_pad[:, None]  # True: not to be seen
    no_pad = torch.zeros(4, dtype=torch.long)
    want = theirs(
        embed_by_the_paper(src, src_pad, model.decoder.wte),
        embed_by_the_paper(idx, no_pad, model.decoder.wte),
        src_key_padding_mask=hidden, memory_key_padding_mask=hidden,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
    )
    got, _ = model(idx, src=src, src_pad=src_pad)
    torch.testing.assert_close(got, want @ model.lm_head.weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('pos', ['sinusoidal', 'learned', 'rotary'])
@torch.no_grad()
def test_padding_and_future_are_invisible(pos):
    model = small_seq2seq(pos=pos, token_shift=pos == 'rotary')
    src, src_pad = pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 7))
    logits, _ = model(idx, src=src, src_pad=src_pad)

    padding = torch.arange(src.size(1)) < src_pad[:, None]
    other_padding = torch.where(padding, 17, src)
    assert not torch.equal(other_padding, src)
    assert torch.equal(model(idx, src=other_padding, src_pad=src_pad)[0], logits)

    changed = idx.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 20
    after, _ = model(changed, src=src, src_pad=src_pad)
    assert torch.equal(after[:, :4], logits[:, :4])
    assert not torch.equal(after[:, 4:], logits[:, 4:])

    for i, source in enumerate(SOURCES):
        alone, _ = model(idx[i:i + 1], src=torch.tensor([source]))
        torch.testing.assert_close(logits[i:i + 1], alone, atol=1e-5, rtol=1e-5)

    src[0, -1] += 1  # but the source is seen
    assert not torch.equal(model(idx, src=src, src_pad=src_pad)[0][0], logits[0])


@torch.no_grad()
def test_every_source_token_is_seen_by_every_target_token():
    """The encoder is not causal: the last token of a source reaches the first of the target."""
    model = small_seq2seq()
    src = torch.randint(20, (1, 9))
    idx = torch.randint(20, (1, 5))
    memory, _ = model.encode(src)
    logits, _ = model(idx, src=src)
    for t in range(9):
        changed = src.clone()
        changed[0, t] = (changed[0, t] + 1) % 20
        other_memory, _ = model.encode(changed)
        assert (memory - other_memory).abs().amax(-1).min() > 1e-4
        assert (logits - model(idx, src=changed)[0]).abs().amax(-1).min() > 1e-4


def test_a_source_longer_than_its_block_size_is_refused():
    model = small_seq2seq(src_block_size=24)
    idx = torch.zeros(1, 3, dtype=torch.long)
    model(idx, src=torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(ValueError, match="25 tokens exceed the model's src_block_size 24"):
        model(idx, src=torch.zeros(1, 25, dtype=torch.long))


def assert_xavier(weight):
    """That a matrix is uniform, between bounds that depend on its fan-in and fan-out."""
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.9 * bound < weight.abs().max() <= bound
    std = bound / math.sqrt(3)
    assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel())


def test_xavier_treats_queries_keys_and_values_as_matrices_of_their_own():
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(vocab_size=1000, n_embd=64, n_head=2, n_layer=1))
    encoder_block = model.encoder.h[0]
    decoder_block = model.decoder.h[0]
    for matrix in encoder_block.attn.c_attn.weight.split(64):
        assert_xavier(matrix)
    for matrix in decoder_block.attn.c_attn.weight.split(64):
        assert_xavier(matrix)
    assert_xavier(decoder_block.cross.c_q.weight)
    for matrix in decoder_block.cross.c_kv.weight.split(64):
        assert_xavier(matrix)
    for block in (encoder_block, decoder_block):
        assert_xavier(block.attn.c_proj.weight)
        assert_xavier(block.mlp.c_fc.weight)
        assert_xavier(block.mlp.c_proj.weight)
    assert_xavier(decoder_block.cross.c_proj.weight)

    assert abs(model.decoder.wte.weight.std() - 1 / 8) < 0.005
    assert abs(model.lm_head.weight.std() - 1 / 8) < 0.005
    assert model.encoder.wte.weight is model.decoder.wte.weight


def test_gpt2_init_and_zero_init_reach_cross_attention():
    torch.manual_seed(0)
    shape = {'vocab_size': 100, 'n_embd': 64, 'n_head': 2, 'n_layer': 2, 'init': 'gpt2'}
    model = Seq2Seq(Seq2SeqConfig(**shape))
    block = model.decoder.h[1]
    for linear in (block.attn.c_attn, block.cross.c_q, block.cross.c_kv, block.mlp.c_fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.06)
    for module in (block.attn, block.cross, block.mlp):
        assert module.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.06)

    model = Seq2Seq(Seq2SeqConfig(zero_init=True, **shape))
    for block in (*model.encoder.h, *model.decoder.h):
        assert not block.attn.c_proj.weight.any()
        assert not block.mlp.c_proj.weight.any()
    for block in model.decoder.h:
        assert not block.cross.c_proj.weight.any()


def test_label_smoothing_equals_its_formula_and_is_for_training_only():
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(vocab_size=1000, n_embd=64, n_head=2, n_layer=1))
    idx = torch.randint(1000, (2, 5))
    src = torch.randint(1000, (2, 6))
    targets = torch.randint(1000, (2, 5))
    logits, _ = model(idx, src=src)
    logp = logits.log_softmax(-1)
    targets[0] = logp[0].argmax(-1)  # otherwise none would be correct

    _, plain = model(idx, targets, src=src)
    _, smooth = model(idx, targets, src=src, label_smoothing=0.1)
    want = -0.9 * logp.gather(-1, targets[..., None]).mean() - 0.1 * logp.mean()
    assert smooth.item() == pytest.approx(want.item(), abs=1e-4)
    assert plain.item() != smooth.item()

    _, sums = model(idx, targets, src=src, label_smoothing=0.1, reduction='sum_and_correct')
    loss, correct = sums.tolist()  # never smoothed
    assert loss / 10 == pytest.approx(plain.item(), abs=1e-4)
    assert correct == (logp.argmax(-1) == targets).sum()
    assert correct >= 5


@pytest.mark.parametrize('wrong, message', [
    ({'cutoffs': (5, 3)}, 'cutoffs must be rising'),
    ({'cutoffs': (5, 200)}, 'cutoffs must be rising'),
    ({'cutoffs': (5,), 'tie_weights': True}, 'do not work with tie_weights: switch one of them'),
    ({'cutoffs': (5,), 'softcap': 3.0}, 'do not work with softcap: switch one of them'),
    ({'src_block_size': 0}, 'src_block_size must be from 1 to 1,048,576, got 0'),
    ({'n_encoder_layer': 0}, 'n_encoder_layer must be from 1 to 1,024, got 0'),
    ({'init': 'lecun'}, "init must be one of gpt2, xavier, got 'lecun'"),
])
def test_a_config_that_contradicts_itself_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_config(Seq2SeqConfig(**{'vocab_size': 100, **wrong}))


# --------------------------------------------------------------------------------------------------
# The cache

CACHE_SWITCHES = {
    'paper': {},
    'modern': {'pos': 'rotary', 'qk_norm': True, 'token_shift': True},
    'post': {'pos': 'learned', 'norm_position': 'post'},
}


def prefill(model, idx, cache, chunk_size):
    """Logits (B, T, V) of idx, read in chunks."""
    logits = []
    for chunk in idx.split(chunk_size, dim=1):
        logits_of_chunk, _ = model(chunk, cache=cache)
        logits.append(logits_of_chunk)
    assert cache.length == idx.size(1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize('name', CACHE_SWITCHES)
@pytest.mark.parametrize('chunk_size', [1, 3, 16])
@torch.no_grad()
def test_prefill_in_chunks_equals_one_pass(name, chunk_size):
    model = small_seq2seq(**CACHE_SWITCHES[name])
    src, src_pad = pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 16))
    cache = new_cache(model, 4, 16, memory=model.encode(src, src_pad))
    got = prefill(model, idx, cache, chunk_size)
    want, _ = model(idx, src=src, src_pad=src_pad)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', CACHE_SWITCHES)
@pytest.mark.parametrize('chunk_size', [1, 3, 16])
@torch.no_grad()
def test_prefill_of_padded_targets_equals_each_pair_alone(name, chunk_size):
    """Also when the padding of a row is longer than the first chunk."""
    model = small_seq2seq(**CACHE_SWITCHES[name])
    src, src_pad = pad_left(SOURCES, 'cpu')
    rows = [torch.randint(20, (length,)).tolist() for length in (16, 11, 5, 1)]
    idx, pad = pad_left(rows, 'cpu')
    cache = new_cache(model, 4, 16, pad, memory=model.encode(src, src_pad))
    got = prefill(model, idx, cache, chunk_size)
    for i, row in enumerate(rows):
        want, _ = model(torch.tensor([row]), src=torch.tensor([SOURCES[i]]))
        torch.testing.assert_close(got[i, -len(row):], want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', CACHE_SWITCHES)
@torch.no_grad()
def test_next_token_logits_are_the_last_logits(name):
    model = small_seq2seq(**CACHE_SWITCHES[name])
    src, src_pad = pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 16))
    want, _ = model(idx, src=src, src_pad=src_pad)
    cache = new_cache(model, 4, 16, memory=model.encode(src, src_pad))
    after_prompt = model.next_token_logits(idx[:, :9], cache)
    torch.testing.assert_close(after_prompt, want[:, 8], atol=1e-5, rtol=1e-5)
    after_another = model.next_token_logits(idx[:, 9:10], cache)
    torch.testing.assert_close(after_another, want[:, 9], atol=1e-5, rtol=1e-5)
    assert cache.length == 10


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize('name', ['paper', 'modern'])
@pytest.mark.parametrize('sampling', [
    {'temperature': 0},
    {'temperature': 1.3, 'seed': 3, 'top_k': 9, 'repetition_penalty': 1.3},
])
def test_generation_is_the_same_with_and_without_cache(name, sampling):
    """Also beyond block_size."""
    model = small_seq2seq(**CACHE_SWITCHES[name])
    options = {'max_new_tokens': 24, 'decoder_start': 0, 'eos_id': 1, **sampling}
    got = model.generate(SOURCES, **options)
    assert got == model.generate(SOURCES, use_cache=False, **options)
    assert max(len(row) for row in got) == 24
    if sampling['temperature'] == 0:  # then a row does not depend on its neighbors
        alone = [model.generate([source], **options)[0] for source in SOURCES]
        assert got == alone


def test_sources_are_read_once():
    model = small_seq2seq()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append('encoder'))
    keys_and_values = model.decoder.h[0].cross.c_kv
    keys_and_values.register_forward_hook(lambda *_: calls.append('cross'))
    model.generate(SOURCES, 10, decoder_start=0)
    assert calls == ['encoder', 'cross']
    beam_search(model, SOURCES, 10, 3, decoder_start=0)
    assert calls == ['encoder', 'cross'] * 2


def test_generation_without_decoder_start_is_refused():
    with pytest.raises(ValueError, match='needs the id that its targets begin with'):
        small_seq2seq().generate(SOURCES, 3)


# --------------------------------------------------------------------------------------------------
# Beam search


def log_prob(model, source, reply):
    """The log-probability of a reply to a source, without a cache."""
    if model.is_encoder_decoder:
        logits, _ = model(torch.tensor([[0, *reply[:-1]]]), src=torch.tensor([source]))
    else:
        logits, _ = model(torch.tensor([[*source, *reply[:-1]]]))
    log_probs = logits[0, -len(reply):].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(reply)[:, None]).sum().item()


def exhaustive_search(model, source, max_length, length_penalty, eos_id):
    """All replies of up to max_length tokens as (score, ids), best first."""
    found = []
    for length in range(1, max_length + 1):
        for reply in itertools.product(range(model.config.vocab_size), repeat=length):
            ends_too_early = eos_id in reply[:-1]
            does_not_end = length < max_length and reply[-1] != eos_id
            if ends_too_early or does_not_end:
                continue
            score = log_prob(model, source, reply) / ((5 + length) / 6) ** length_penalty
            found.append((score, list(reply)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize('kind', ['seq2seq', 'gpt'])
@pytest.mark.parametrize('length_penalty', [0.0, 2.0])
@torch.no_grad()
def test_wide_beam_search_equals_exhaustive_search(kind, length_penalty):
    if kind == 'seq2seq':
        model = small_seq2seq(vocab_size=4)
    else:
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.5)
    sources = [[1, 2], [3], [2, 2, 1, 0, 3]]
    best = [exhaustive_search(model, source, 4, length_penalty, eos_id=1)[:5] for source in sources]
    for use_cache in (True, False):
        got = beam_search(model, sources, 4, num_beams=64, eos_id=1, decoder_start=0,
                          length_penalty=length_penalty, n_best=5, use_cache=use_cache)
        for want, found in zip(best, got, strict=True):
            assert [ids for ids, _ in found] == [ids for _, ids in want]
            want_scores = [score for score, _ in want]
            assert [score for _, score in found] == pytest.approx(want_scores, abs=1e-4)


OPTIONS = {'eos_id': 1, 'decoder_start': 0}


def ids_of(candidates):
    return [ids for ids, _ in candidates]


def test_beam_search_of_a_batch_equals_each_prompt_alone():
    model = small_seq2seq()
    together = beam_search(model, SOURCES, 12, 4, n_best=3, **OPTIONS)
    assert len(together) == len(SOURCES)
    for source, found in zip(SOURCES, together):
        alone, = beam_search(model, [source], 12, 4, n_best=3, use_cache=False, **OPTIONS)
        assert ids_of(found) == ids_of(alone)
        assert len(found) == 3
        for ids in ids_of(found):
            assert ids[-1] == 1 or len(ids) == 12
            assert 1 not in ids[:-1]


def test_one_beam_is_greedy_and_more_find_no_less():
    model = small_seq2seq()
    greedy = model.generate(SOURCES, 12, temperature=0, **OPTIONS)
    one_beam = beam_search(model, SOURCES, 12, 1, length_penalty=0.6, **OPTIONS)
    assert [found[0][0] for found in one_beam] == greedy
    four_beams = beam_search(model, SOURCES, 12, 4, **OPTIONS)
    for one, four in zip(one_beam, four_beams):
        assert four[0][1] >= one[0][1] - 1e-5  # no law, but so with this model


def test_beam_search_never_takes_banned_tokens():
    model = small_seq2seq()
    free = beam_search(model, SOURCES, 12, 4, **OPTIONS)
    banned = free[0][0][0][0]  # the first token of the first reply
    for found in beam_search(model, SOURCES, 12, 4, banned={banned}, **OPTIONS):
        for ids in ids_of(found):
            assert banned not in ids


def test_beam_search_ends_where_the_block_is_full():
    model = small_seq2seq()
    for found in beam_search(model, SOURCES, 99, 2, **OPTIONS):
        ids = found[0][0]
        if 1 in ids:
            assert ids.index(1) == len(ids) - 1
        else:
            assert len(ids) == 16


@pytest.mark.parametrize('wrong, message', [
    ({'num_beams': 0}, 'num_beams must be at least 1, got 0'),
    ({'num_beams': 2, 'n_best': 3}, 'n_best must be at most num_beams'),
    ({'num_beams': 2, 'decoder_start': [0] * 17}, "17 tokens .* the model's block_size .*16"),
])
def test_bad_options_of_beam_search_are_refused(wrong, message):
    options = {'max_new_tokens': 4, 'decoder_start': 0, **wrong}
    with pytest.raises(ValueError, match=message):
        beam_search(small_seq2seq(), SOURCES, **options)


# --------------------------------------------------------------------------------------------------
# Adaptive softmax


def adaptive_gpt():
    """A GPT with three clusters, for ids in a random order of frequency."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=60, block_size=8, n_layer=1, n_head=2, n_embd=16,
                       tie_weights=False, cutoffs=(10, 30), div_value=2.0)
    check_config(config)
    model = GPT(config).eval()
    model.lm_head.rank.copy_(torch.randperm(60))
    return model


@pytest.mark.parametrize('autocast, tolerance', [(False, 1e-5), (True, 0.02)])
def test_adaptive_softmax_has_probabilities_and_their_loss(autocast, tolerance):
    model = adaptive_gpt()
    idx = torch.randint(60, (3, 8))
    targets = torch.randint(60, (3, 8))
    targets[0, :3] = -1
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        logits, _ = model(idx)
        _, loss = model(idx, targets)
        _, sum_and_correct = model(idx, targets, reduction='sum_and_correct')
        loss.backward()
    sums = logits.exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones(3, 8), atol=tolerance, rtol=0)
    want = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1).item()
    assert abs(loss.item() - want) < tolerance
    assert abs(sum_and_correct[0].item() / 21 - want) < tolerance
    assert all(p.grad is not None for p in model.parameters())


def test_adaptive_softmax_gives_rare_ids_narrow_projections():
    clusters = adaptive_gpt().lm_head.softmax.tail
    assert [narrow.out_features for narrow, _ in clusters] == [8, 4]


def test_adaptive_softmax_generates_the_same_with_and_without_cache():
    model = adaptive_gpt()
    cached = model.generate([[1, 2], [3]], 6, temperature=0)
    assert cached == model.generate([[1, 2], [3]], 6, temperature=0, use_cache=False)


def test_order_of_frequency_travels_with_the_weights():
    model = adaptive_gpt()
    other = GPT(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.lm_head.rank, model.lm_head.rank)


def test_adaptive_softmax_refuses_label_smoothing():
    idx = torch.randint(60, (3, 8))
    with pytest.raises(ValueError, match='label_smoothing'):
        adaptive_gpt()(idx, idx, label_smoothing=0.1)
