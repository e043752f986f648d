"""The encoder-decoder against PyTorch's own Transformer and against brute force; datasets of pairs; the adaptive softmax."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import model as m
from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig

SOURCES = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 3, 3]]


def small(**kwargs):
    torch.manual_seed(1)
    net = Seq2Seq(Seq2SeqConfig(**{'vocab_size': 20, 'block_size': 16, 'n_layer': 2, 'n_head': 4, 'n_embd': 32, **kwargs}))
    for p in net.parameters():  # wider than at the start, so that tokens differ
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    return net.eval()


def test_base_shape_of_the_paper():
    """121,353,300: biases in the MLPs, the norms and the head, none in q, k, v and o."""
    with torch.device('meta'):
        net = Seq2Seq(Seq2SeqConfig(vocab_size=50_260, attn_bias=False, head_bias=True, tie_source=False))
    assert (net.config.n_embd, net.config.n_layer, net.config.n_head, net.encoder.h[0].mlp.c_fc.out_features) == (512, 6, 8, 2048)
    assert net.num_params() == 121_353_300 and len(net.encoder.h) == len(net.decoder.h) == 6
    with torch.device('meta'):
        tied = Seq2Seq(Seq2SeqConfig(vocab_size=50_260, attn_bias=False, tie_weights=True))
    assert tied.num_params() == 121_353_300 - 2 * 50_260 * 512 - 50_260


def copy_weights(ours, theirs):
    """Weights of one of our stacks into nn.TransformerEncoder or -Decoder."""
    for a, b in zip(ours.h, theirs.layers):
        def attention(x, y):
            y.in_proj_weight.data = x.c_attn.weight if hasattr(x, 'c_attn') else torch.cat((x.c_q.weight, x.c_kv.weight))
            y.in_proj_bias.data = x.c_attn.bias if hasattr(x, 'c_attn') else torch.cat((x.c_q.bias, x.c_kv.bias))
            y.out_proj.load_state_dict(x.c_proj.state_dict())
        attention(a.attn, b.self_attn)
        norms = [a.ln_1, a.ln_2]
        if hasattr(a, 'cross'):
            attention(a.cross, b.multihead_attn)
            norms.insert(1, a.ln_x)
        for i, norm in enumerate(norms, 1):
            getattr(b, f'norm{i}').load_state_dict(norm.state_dict())
        b.linear1.load_state_dict(a.mlp.c_fc.state_dict())
        b.linear2.load_state_dict(a.mlp.c_proj.state_dict())
    if theirs.norm is not None:
        theirs.norm.load_state_dict(ours.ln_f.state_dict())


@pytest.mark.parametrize('norm_position, act', [('pre', 'relu'), ('post', 'relu'), ('pre', 'gelu_erf')])
def test_equals_torch_transformer(norm_position, act):
    """The same weights, a padded batch: the same logits as PyTorch's own modules, to 1e-5."""
    net, pre = small(norm_position=norm_position, act=act), norm_position == 'pre'
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1)
    theirs = nn.Transformer(32, 4, 2, 2, 128, 0.0, 'relu' if act == 'relu' else 'gelu', batch_first=True, norm_first=pre)
    theirs.eval().encoder.enable_nested_tensor = False
    if not pre:  # PyTorch adds a norm behind each stack even here; the paper does not
        theirs.encoder.norm = theirs.decoder.norm = None
    copy_weights(net.encoder, theirs.encoder)
    copy_weights(net.decoder, theirs.decoder)
    src, src_pad = m.pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 7))

    def embed(ids, pad):  # the paper's formula, written out
        pos = (torch.arange(ids.size(1)) - pad[:, None]).clamp(min=0)[..., None].double()
        i = torch.arange(0, 32, 2).double()
        angle = pos / 10000 ** (i / 32)
        return net.decoder.wte(ids) * math.sqrt(32) + torch.cat((angle.sin(), angle.cos()), -1).float()
    hidden = torch.arange(src.size(1)) < src_pad[:, None]  # True: not to be seen
    want = theirs(embed(src, src_pad), embed(idx, torch.zeros(4, dtype=torch.long)), src_key_padding_mask=hidden, memory_key_padding_mask=hidden,
                  tgt_mask=nn.Transformer.generate_square_subsequent_mask(7))
    got, _ = net(idx, src=src, src_pad=src_pad)
    torch.testing.assert_close(got, want @ net.lm_head.weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('pos', ['sinusoidal', 'learned', 'rotary'])
def test_padding_and_future_are_invisible(pos):
    net = small(pos=pos, token_shift=pos == 'rotary')
    src, src_pad = m.pad_left(SOURCES, 'cpu')
    idx = torch.randint(20, (4, 7))
    with torch.no_grad():
        logits, _ = net(idx, src=src, src_pad=src_pad)
        other = torch.where(torch.arange(src.size(1)) < src_pad[:, None], 17, src)
        assert not torch.equal(other, src) and torch.equal(net(idx, src=other, src_pad=src_pad)[0], logits)
        later = idx.clone()
        later[:, 4:] = (later[:, 4:] + 1) % 20
        assert torch.equal(net(later, src=src, src_pad=src_pad)[0][:, :4], logits[:, :4])
        assert not torch.equal(net(later, src=src, src_pad=src_pad)[0][:, 4:], logits[:, 4:])
        alone = torch.cat([net(idx[i:i + 1], src=torch.tensor([s]))[0] for i, s in enumerate(SOURCES)])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
        src[0, -1] += 1
        assert not torch.equal(net(idx, src=src, src_pad=src_pad)[0][0], logits[0])


@pytest.mark.parametrize('pos, qk_norm', [('sinusoidal', False), ('rotary', True)])
def test_cached_equals_uncached(pos, qk_norm):
    net = small(pos=pos, qk_norm=qk_norm, token_shift=qk_norm)
    for kwargs in ({'temperature': 0}, {'temperature': 1.3, 'seed': 3, 'top_k': 9, 'repetition_penalty': 1.3}):
        got, want = (net.generate(SOURCES, 24, start=0, eot=1, use_cache=use, **kwargs) for use in (True, False))  # 24: beyond block_size
        assert got == want and max(map(len, got)) == 24
        alone = [net.generate([s], 24, start=0, eot=1, **kwargs)[0] for s in SOURCES]
        assert alone == got or kwargs['temperature']  # greedy: a row does not depend on its neighbours


def test_sources_are_read_once(monkeypatch):
    net, calls = small(), []
    monkeypatch.setattr(net.encoder, 'forward', lambda *a, f=net.encoder.forward, **k: (calls.append('encoder'), f(*a, **k))[1])
    layer = net.decoder.h[0].cross.c_kv
    monkeypatch.setattr(layer, 'forward', lambda x, f=layer.forward: (calls.append('cross'), f(x))[1])
    net.generate(SOURCES, 10, start=0)
    net.beam_search(SOURCES, 10, 3, start=0)
    assert calls == ['encoder', 'cross'] * 2


def exhaustive(net, source, length, alpha, eot):
    """Every text of up to `length` tokens with its score, best first."""
    found = []
    for n in range(1, length + 1):
        for ids in itertools.product(range(net.config.vocab_size), repeat=n):
            if eot in ids[:-1] or (n < length and ids[-1] != eot):
                continue
            prompt = source + list(ids[:-1]) if isinstance(net, GPT) else [0, *ids[:-1]]
            logits = net(torch.tensor([prompt]))[0] if isinstance(net, GPT) else net(torch.tensor([prompt]), src=torch.tensor([source]))[0]
            logp = logits[0, -n:].log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
            found.append((logp / ((5 + n) / 6) ** alpha, list(ids)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize('arch', ['seq2seq', 'gpt'])
@pytest.mark.parametrize('alpha', [0.0, 2.0])
def test_beam_equals_exhaustive_search(arch, alpha):
    net = small(vocab_size=4)
    if arch == 'gpt':
        torch.manual_seed(0)
        net = GPT(GPTConfig(vocab_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
        [nn.init.normal_(p, std=0.5) for p in net.parameters() if p.ndim > 1]
    sources = [[1, 2], [3], [2, 2, 1, 0, 3]]
    with torch.no_grad():
        best = [exhaustive(net, source, 4, alpha, 1)[:5] for source in sources]
        for use_cache in (True, False):
            got = net.beam_search(sources, 4, 64, eot=1, start=0, length_penalty=alpha, n_best=5, use_cache=use_cache)
            for want, found in zip(best, got):
                assert [ids for ids, _ in found] == [ids for _, ids in want]
                np.testing.assert_allclose([s for _, s in found], [s for s, _ in want], atol=1e-4)


def test_beam_over_ragged_batches():
    net = small()
    got = net.beam_search(SOURCES, 12, 4, eot=1, start=0, n_best=3)
    for source, found in zip(SOURCES, got):
        alone = net.beam_search([source], 12, 4, eot=1, start=0, n_best=3, use_cache=False)[0]
        assert [ids for ids, _ in alone] == [ids for ids, _ in found] and len(found) == 3
        assert all(ids[-1] == 1 or len(ids) == 12 for ids, _ in found) and all(1 not in ids[:-1] for ids, _ in found)
    greedy = net.generate(SOURCES, 12, eot=1, start=0, temperature=0)
    assert [found[0][0] for found in net.beam_search(SOURCES, 12, 1, eot=1, start=0)] == greedy
    for a, b in zip(got, net.beam_search(SOURCES, 12, 1, eot=1, start=0, length_penalty=0.6)):
        assert a[0][1] >= b[0][1] - 1e-6  # more beams never find less here
    assert all(5 not in ids for found in net.beam_search(SOURCES, 12, 4, eot=1, start=0, banned={5}) for ids, _ in found)
    for bad, says in (({'num_beams': 0}, 'num_beams must be at least 1, got 0'), ({'num_beams': 2, 'n_best': 3}, 'n_best must be at most num_beams'),
                      ({'num_beams': 2, 'start': [0] * 17}, '17 tokens are more than the model\'s block_size of 16')):
        with pytest.raises(ValueError, match=says):
            net.beam_search(SOURCES, **{'max_new_tokens': 4, 'start': 0, **bad})
    assert all(len(found[0][0]) in (16, found[0][0].index(1) + 1 if 1 in found[0][0] else 16) for found in net.beam_search(SOURCES, 99, 2, start=0, eot=1))
    with pytest.raises(ValueError, match='needs the id that its targets begin with'):
        net.generate(SOURCES, 3)


def test_xavier_and_smoothing():
    torch.manual_seed(0)
    net = Seq2Seq(Seq2SeqConfig(vocab_size=1000, n_embd=64, n_head=2, n_layer=1))
    bound = math.sqrt(6 / (64 + 64))
    for w in (*net.decoder.h[0].attn.c_attn.weight.split(64), net.decoder.h[0].cross.c_q.weight, *net.encoder.h[0].attn.c_attn.weight.split(64)):
        assert 0.9 * bound < w.abs().max() <= bound
    assert abs(net.decoder.wte.weight.std() - 1 / 8) < 0.005 and net.encoder.wte.weight is net.decoder.wte.weight
    idx, targets, src = torch.randint(1000, (2, 5)), torch.randint(1000, (2, 5)), torch.randint(1000, (2, 6))
    plain, smooth = (net(idx, targets, src=src, label_smoothing=s)[1].item() for s in (0.0, 0.1))
    logp = net(idx, src=src)[0].log_softmax(-1)
    want = -0.9 * logp.gather(-1, targets[..., None]).mean() - 0.1 * logp.mean()
    assert abs(smooth - want.item()) < 1e-4 and plain != smooth
    loss, right = net(idx, targets, src=src, label_smoothing=0.1, reduction='score')[1].tolist()  # never smoothed
    assert abs(loss / 10 - plain) < 1e-4 and right == (logp.argmax(-1) == targets).sum()


@pytest.mark.parametrize('bad, says', [
    ({'cutoffs': (5, 3)}, 'cutoffs must be rising'), ({'cutoffs': (5, 200)}, 'cutoffs must be rising'),
    ({'cutoffs': (5,), 'tie_weights': True}, "don't go with tie_weights"), ({'src_block_size': 0}, 'src_block_size must be from 1 to 1,048,576, got 0'),
    ({'init': 'lecun'}, 'init must be one of gpt2, xavier')])
def test_contradictions(bad, says):
    with pytest.raises(ValueError, match=says):
        Seq2SeqConfig(**{'vocab_size': 100, **bad})


@pytest.mark.parametrize('autocast', [False, True])
def test_adaptive_softmax(autocast):
    """Its probabilities sum to one, its loss is theirs, for ids in any order of frequency."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=60, block_size=8, n_layer=1, n_head=2, n_embd=16, tie_weights=False, cutoffs=(10, 30), div_value=2.0)).eval()
    gpt.lm_head.rank.copy_(torch.randperm(60))
    idx, targets = torch.randint(60, (3, 8)), torch.randint(60, (3, 8))
    targets[0, :3] = -1
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        logits, loss = gpt(idx)[0], gpt(idx, targets)[1]
        score = gpt(idx, targets, reduction='score')[1]
        loss.backward()
    tolerance = 0.02 if autocast else 1e-5
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 8), atol=tolerance, rtol=0)
    want = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(loss.item() - want.item()) < tolerance and abs(score[0].item() / 21 - want.item()) < tolerance
    assert all(p.grad is not None for p in gpt.parameters())
    # the rarest ids have the narrowest projections
    assert [tail[0].out_features for tail in gpt.lm_head.softmax.tail] == [8, 4]
    got, again = (gpt.generate([[1, 2], [3]], 6, temperature=0, use_cache=use) for use in (True, False))
    assert got == again
    other = GPT(gpt.config)
    other.load_state_dict(gpt.state_dict())  # the order travels along
    assert torch.equal(other.lm_head.rank, gpt.lm_head.rank)
    with pytest.raises(ValueError, match='label_smoothing'):
        gpt(idx, targets, label_smoothing=0.1)
