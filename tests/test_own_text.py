"""The road of one's own text: prepare, train, export, and the exported folder as a GPT-2 to sample from and to go on training."""
import math

import pytest
import torch
from conftest import Project, toy_text
from torch import nn

from model import GPT, GPTConfig
from pocket import checkpoint, pretrained
from pocket.errors import UserError
from pocket.kernels import Head
from pocket.quantize import Int8Linear, PackedLinear, prepare_for_decoding
from pocket.tokenizer import BpeTokenizer

SHAPE = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=8', '--device=cpu', '--log_interval=50', '--pos=learned', '--act=gelu',
         '--norm=layernorm', '--qk_norm=False', '--token_shift=False', '--zero_init=False', '--bias=True']


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    """A project where a GPT-2-shaped model was trained on a text of one's own, and exported to the folder `hf`."""
    p = Project(tmp_path_factory.mktemp('mine'))
    (p.root / 'my text.txt').write_text(toy_text(20_000), encoding='utf-8')
    p.run('prepare/text.py', '--input=my text.txt', '--tokenizer=bpe', '--vocab_size=300')
    p.run('train.py', '--dataset=mine', *SHAPE, '--max_iters=60', '--eval_interval=60', '--optimizer=adamw', '--out_dir=out/mine', '--dtype=float32')
    p.out, _ = p.run('export.py', '--out_dir=out/mine', '--to=hf')
    return p


def test_exported_folder_writes_the_same(mine):
    assert 'tokenizer.json' in mine.out and 'model.safetensors' in mine.out
    a, _ = mine.run('sample.py', '--out_dir=out/mine', '--start=ba do', '--max_new_tokens=20', '--temperature=0')
    b, _ = mine.run('sample.py', '--init_from=hf', '--start=ba do', '--max_new_tokens=20', '--temperature=0')
    assert a == b and a.startswith('ba do')


def test_training_goes_on_from_an_exported_folder(mine):
    args = ['--init_from=hf', '--dataset=mine', '--batch_size=8', '--device=cpu', '--dtype=float32', '--optimizer=adamw', '--dropout=0']
    out, _ = mine.run('train.py', *args, '--max_iters=1', '--learning_rate=0', '--out_dir=out/on')
    before, after = mine.checkpoint('mine', 'best.pt'), mine.checkpoint('on', 'best.pt')
    assert abs(before['best'] - after['best']) < 1e-5 and after['model_args']['n_embd'] == 32 and after['model_args']['pos'] == 'learned'
    said = mine.run('train.py', '--eval_only', *args[:4])[0].splitlines()[-1]  # as it was loaded
    assert said.startswith('hf (step 0): val loss ') and abs(float(said.split()[5]) - before['best']) < 1e-3
    mine.run('train.py', '--resume', '--out_dir=out/on', '--max_iters=2')  # from last.pt, not from the folder again
    assert mine.checkpoint('on')['step'] == 2
    assert 'leave n_layer away' in mine.fails('train.py', *args, '--n_layer=3', '--out_dir=out/no')
    assert 'is a GPT: leave --arch=seq2seq away' in mine.fails('train.py', *args, '--arch=seq2seq', '--out_dir=out/no')
    mine.run('prepare/text.py', '--input=my text.txt', '--tokenizer=byte', '--name=bytes')
    assert 'has another tokenizer than this model' in mine.fails('train.py', '--init_from=hf', '--dataset=bytes', '--out_dir=out/no')


@pytest.mark.parametrize('tied', [True, False])
def test_a_loaded_model_grows_for_special_tokens(tied):
    """Pairs need some that GPT-2 has not: what the model says of its own ids stays as it was."""
    torch.manual_seed(0)
    theirs, more = BpeTokenizer(['b a', 'd o']), BpeTokenizer(['b a', 'd o'], ('eot', 'pad', 'bos', 'eos'))
    model = GPT(GPTConfig(vocab_size=theirs.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8, tie_weights=tied)).eval()
    idx = torch.randint(theirs.vocab_size, (2, 8))
    before = model(idx)[0]
    pretrained.resize_token_embeddings(model, more, theirs, 'data/x')
    after = model(idx)[0]
    assert after.shape[-1] == more.vocab_size == model.config.vocab_size and torch.equal(after[..., :theirs.vocab_size], before)
    torch.testing.assert_close(after[..., -3:], before.mean(-1, keepdim=True).expand(2, 8, 3))
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    model(torch.full((1, 2), more.end), torch.full((1, 2), more.end))[1].backward()
    with pytest.raises(UserError, match='another tokenizer'):
        pretrained.resize_token_embeddings(model, BpeTokenizer(['d o', 'b a']), theirs, 'data/x')


@pytest.mark.skipif(not getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', bool)(), reason='this CPU has no bfloat16')
@pytest.mark.parametrize('head', [nn.Linear(64, 48), nn.Linear(64, 48, bias=False), Head(GPTConfig(vocab_size=48, n_head=2, n_embd=64, softcap=0.5))])
def test_packed_equals_plain(head):
    head = head.to(torch.bfloat16)
    with torch.no_grad():
        for shape in ((1, 64), (3, 1, 64), (2, 40, 64)):
            x = torch.randn(shape).bfloat16()
            torch.testing.assert_close(PackedLinear(head)(x), head(x), atol=0.02, rtol=0.02)


@pytest.mark.skipif(not getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', bool)(), reason='this CPU has no bfloat16')
@pytest.mark.parametrize('bits, limit', [(None, 0.02), (8, 0.05)])
def test_a_packed_model_in_bfloat16_with_its_float32_cache(mine, bits, limit):
    """… has the logits of the plain one without a cache, whatever was read at once, to what bfloat16 and 8 bits can hold."""
    path = mine.root / 'out' / 'mine' / 'best.pt'
    model, tok = checkpoint.build(checkpoint.load(path), path)
    idx = torch.tensor(tok.encode(toy_text(300, seed=1))[:24]).view(2, 12)
    with torch.inference_mode():
        plain = model(idx)[0]
        prepare_for_decoding(model.to(torch.bfloat16), bits)
        cache = model.new_cache(2, 12)
        assert cache.k.dtype == torch.float32
        got = torch.cat([model(part, cache=cache)[0] for part in idx.split((5, 1, 1, 5), dim=1)], dim=1)
    assert (got - plain).norm() < limit * plain.norm()


@pytest.mark.parametrize('fbgemm', [True, False])
def test_int8(mine, fbgemm, monkeypatch):
    """Within what rounding weights, and with FBGEMM inputs, can do to each output; and the same perplexity to a percent."""
    if not fbgemm:
        monkeypatch.delattr(torch, 'quantize_per_channel')
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False)
    eight = Int8Linear(linear)
    assert eight.fbgemm == fbgemm or 'fbgemm' not in torch.backends.quantized.supported_engines
    step = linear.weight.abs().amax(dim=1) / 127
    for rows in (1, 3, 40):
        x = torch.randn(rows, 64) * torch.logspace(-2, 2, rows)[:, None]  # rows of very different size
        limit = 0.5 * x.abs().sum(1, keepdim=True) * step                 # half a step for each weight
        if eight.fbgemm:                                                  # half a step of 1/127 of the range of a row; twice that without VNNI
            limit = limit + 2.1 / 127 * x.abs().amax(1, keepdim=True) * (linear.weight.abs().sum(1) + 64 * step / 2)
        assert ((eight(x) - linear(x)).abs() <= limit + 1e-5).all()
        assert (eight(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    path = mine.root / 'out' / 'mine' / 'best.pt'
    model, tok = checkpoint.build(checkpoint.load(path), path)
    ids = torch.tensor(tok.encode(toy_text(3000, seed=1))[:640]).view(40, 16)
    with torch.no_grad():
        before = model(ids[:, :-1], ids[:, 1:])[1]
        prepare_for_decoding(model, bits=8)
        assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 5
        after = nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(math.exp(after - before) - 1) < 0.01
    assert mine.run('sample.py', '--out_dir=out/mine', '--quantize=int8', '--start=ba', '--max_new_tokens=5')[0].startswith('ba')
