"""GPT-2 in and out: transformers is the reference, and a server of our own plays Hugging Face."""
import copy
import hashlib
import http.server
import json
import os
import shutil
import signal
import threading

import pytest
import torch
from conftest import SHARED, Project, toy_text
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from pocket import checkpoint, pretrained
from pocket.errors import UserError
from pocket.tokenizer import make_tokenizer

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def reference(folder, seed=0, **config):
    """A random GPT-2 of transformers, saved in folder; odd sizes, and weights large enough that every part matters."""
    transformers = pytest.importorskip('transformers')  # here, so that collecting the tests stays quick
    torch.manual_seed(seed)
    shape = dict(vocab_size=997, n_positions=48, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3, bos_token_id=60, eos_token_id=60)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **config})).eval()
    for name, p in model.named_parameters():
        if 'bias' in name or 'ln_' in name:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Models this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """(folder, its model): look at it, don't change it."""
    folder = tmp_path_factory.mktemp('small') / 'modell ü'
    return folder, reference(folder)


def same(ours, theirs, tolerance=1e-5):
    """Whether two models give the same logits and the same greedy continuation, ours with its cache."""
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=tolerance, rtol=tolerance)
        idx = IDX
        for _ in range(25):
            idx = torch.cat((idx, theirs(idx).logits[:, -1:].argmax(-1)), dim=1)
    assert ours.generate(IDX, 25, temperature=0).tolist() == idx.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# in

def test_a_plain_model(small):
    folder, theirs = small
    ours, args = pretrained.load(folder)
    same(ours, theirs)
    assert args == {**GPTConfig(48, 997, 2, 3, 24).__dict__, 'dropout': 0.1, 'attn_dropout': 0.1}
    assert ours.lm_head.weight is ours.transformer.wte.weight and not ours.training
    assert all(p.is_contiguous() and p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    ours.train()(IDX, IDX)[1].backward()  # and it can be trained


@pytest.mark.parametrize('config', [dict(n_inner=40, tie_word_embeddings=False), dict(activation_function='gelu', n_head=1, n_layer=3),
                                    dict(activation_function='relu')])
def test_odd_models(tmp_path, config):
    same(pretrained.load(tmp_path)[0] if (theirs := reference(tmp_path, **config)) else None, theirs)


def test_shards_and_names_without_prefix_and_masks(tmp_path, small):
    _, theirs = small
    theirs.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    same(pretrained.load(tmp_path / 'shards')[0], theirs)
    theirs.transformer.save_pretrained(tmp_path / 'bare')  # as openai-community/gpt2 is
    path = tmp_path / 'bare' / 'model.safetensors'
    tensors = load_file(path)
    assert 'wte.weight' in tensors
    masks = {f'h.{i}.attn.{name}': torch.ones(1, 1, 48, 48) for i in range(2) for name in ('bias', 'masked_bias')}
    save_file({**tensors, **masks, 'lm_head.weight': tensors['wte.weight'].clone()}, path)
    same(pretrained.load(tmp_path / 'bare')[0], theirs)


def test_what_may_be_chosen(small, tmp_path):
    folder, theirs = small
    ours, args = pretrained.load(folder, block_size=12, dropout=0.0, gradient_checkpointing=True)
    assert ours.config.block_size == args['block_size'] == 12 and args['dropout'] == 0 and args['gradient_checkpointing']
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match='48 positions, too few for --block_size=49'):
        pretrained.load(folder, block_size=49)
    copy.deepcopy(theirs).half().save_pretrained(tmp_path)
    halves, _ = pretrained.load(tmp_path)
    assert halves.lm_head.weight.dtype == torch.float32 and halves.lm_head.weight[5, 5] == ours.lm_head.weight[5, 5].half()
    assert {p.dtype for p in pretrained.load(folder, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('change, said', [
    ({'model_type': 'llama'}, "model_type is 'llama', only 'gpt2'"), ({'activation_function': 'silu'}, "'silu', only 'gelu_new' or 'gelu' or 'relu'"),
    ({'activation_function': ['x']}, 'activation_function is'), ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon is 1e-06, only 1e-05'),
    ({'scale_attn_weights': False}, 'scale_attn_weights is False'), ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by'),
    ({'reorder_and_upcast_attn': True}, 'reorder_and_upcast'), ({'add_cross_attention': True}, 'add_cross_attention'),
    ({'n_layer': '2'}, "n_layer is '2', not a whole number"), ({'n_embd': None}, 'n_embd is None'), ({'n_head': 5}, 'divisible by n_head'),
    ({'n_layer': 10**9}, 'n_layer must be from 1 to 1,024, got 1000000000'), ({'n_layer': 1}, 'h.1.[a-z_1.]* is surplus'), ({'n_inner': 'x'}, 'config.json'),
    ({'vocab_size': 998}, r'wte.weight makes \(997, 24\) of torch.float32, not \(998, 24\)'), ({'tie_word_embeddings': False}, 'lm_head.weight is missing'),
    ({'resid_pdrop': 3}, 'dropout must be')])
def test_other_models_are_refused(small, tmp_path, change, said):
    shutil.copytree(small[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}), encoding='utf-8')
    with pytest.raises(UserError, match=said):
        pretrained.load(tmp_path)


@pytest.mark.parametrize('damage, said', [
    (lambda t: t.pop('transformer.h.1.mlp.c_fc.bias'), 'c_fc.bias is missing'), (lambda t: t.update({'score.weight': torch.ones(3)}), 'score.weight is surplus'),
    (lambda t: t.update({'transformer.wpe.weight': torch.ones(48)}), r'not \(48, 24\)'),
    (lambda t: t.update({'transformer.h.0.attn.c_attn.weight': torch.ones(72, 24)}), r'\(24, 72\) of torch.float32, not \(72, 24\)'),
    (lambda t: t.update({'transformer.h.0.mlp.c_fc.weight': torch.ones(24, 96, dtype=torch.int8)}), 'torch.int8')])
def test_weights_that_do_not_fit(small, tmp_path, damage, said):
    shutil.copytree(small[0], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / 'model.safetensors')
    damage(tensors)
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=said):
        pretrained.load(tmp_path)


def test_files_that_are_something_else(small, tmp_path):
    with pytest.raises(UserError, match="'nowhere' is neither one of gpt2, gpt2-medium.* nor a folder"):
        pretrained.load('nowhere')
    shutil.copytree(small[0], tmp_path, dirs_exist_ok=True)
    path, whole = tmp_path / 'model.safetensors', (tmp_path / 'model.safetensors').read_bytes()
    for content in (whole[:-1], whole[:100], b'', b'\xff' * 100, (2**62).to_bytes(8, 'little') + whole[8:], whole + b'more'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='cannot read .*model.safetensors as a safetensors file'):
            pretrained.load(tmp_path)
    path.unlink()
    for index, said in ((b'{"weight_map": {"a": "../x.safetensors"}}', 'names files beside it'), (b'{"weight_map": ["a"]}', 'names files beside it'),
                        (b'{"weight_map": {"a": "\\ud800"}}', 'as a safetensors file'),
                        (b'{', 'not a JSON object'), (b'{"weight_map": {"a": "x.safetensors"}}', 'x.safetensors as a safetensors file: it is not there'),
                        (None, 'model.safetensors as a safetensors file: it is not there')):
        if index:
            (tmp_path / 'model.safetensors.index.json').write_bytes(index)
        else:
            (tmp_path / 'model.safetensors.index.json').unlink()
        with pytest.raises(UserError, match=said):
            pretrained.load(tmp_path)
    (tmp_path / 'config.json').write_bytes(b'[1]')
    with pytest.raises(UserError, match='config.json is not a JSON object'):
        pretrained.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# the hub

class Hub(http.server.BaseHTTPRequestHandler):
    """Plays huggingface.co: weights come from another address, to which it sends on; misbehaves on request."""
    files, seen, trouble = {}, [], ''

    def do_GET(self):
        have, name = int(self.headers.get('Range', 'bytes=0-')[6:-1]), self.path.split('/')[-1]
        self.seen.append((self.path, have))
        if self.trouble == '404':
            return self.send_error(404)
        if name == 'model.safetensors' and not self.path.startswith('/cdn/'):
            self.send_response(302)
            self.send_header('Location', '/cdn' + self.path)
            return self.end_headers()
        body = self.files[name]
        if self.trouble == 'wrong':
            body = body[::-1]
        if self.trouble == 'proxy' and name == 'config.json':
            body = b'<html>please log in</html>'
        self.send_response(206 if have else 200)
        self.send_header('Content-Length', str(len(body) - have))
        self.end_headers()
        cut = len(body) > 100_000 and (self.trouble == 'cut' or self.trouble == 'cut once' and not have)
        self.wfile.write(body[have:have + 70_000] if cut else body[have:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(small, tmp_path, monkeypatch):
    """A server that has our small model as 'gpt2', and an empty cache; the cache's folder of that model."""
    folder, _ = small
    Hub.files, Hub.seen, Hub.trouble = {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')}, [], ''
    commit = 'c0ffee' * 6 + 'cafe'
    monkeypatch.setitem(pretrained.NAMES, 'gpt2', f'{commit} {hashlib.sha256(Hub.files["model.safetensors"]).hexdigest()}')
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{httpd.server_port}/')
    yield tmp_path / 'hf' / 'hub' / 'models--openai-community--gpt2' / 'snapshots' / commit
    httpd.shutdown()
    httpd.server_close()


def test_fetched_once_and_found_by_both(hub, small, monkeypatch):
    from huggingface_hub import try_to_load_from_cache
    Hub.trouble = 'cut once'
    ours, _ = pretrained.load('gpt2', block_size=16)
    assert torch.equal(ours.lm_head.weight, small[1].lm_head.weight)
    commit = hub.name
    weights = [have for path, have in Hub.seen if path == f'/cdn/openai-community/gpt2/resolve/{commit}/model.safetensors']
    assert weights[0] == 0 < weights[1] <= 70_000 and len(weights) == 2
    assert sorted(p.name for p in hub.iterdir()) == ['config.json', 'model.safetensors']
    for name in ('config.json', 'model.safetensors'):
        assert try_to_load_from_cache('openai-community/gpt2', name, cache_dir=hub.parents[2]) == str(hub / name)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert pretrained.fetch('gpt2') == hub
    path = hub / 'model.safetensors'  # a file that was damaged since is not taken for whole
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match='could not download model.safetensors .*ConnectionError.*--init_from=FOLDER'):
        pretrained.fetch('gpt2')


@pytest.mark.skipif(os.name == 'nt', reason='links need a privilege on Windows')
@pytest.mark.parametrize('repo', ['openai-community--gpt2', 'gpt2'])
def test_what_their_tools_downloaded_is_used(hub, small, monkeypatch, tmp_path, repo):
    """Links to blobs, in a snapshot of another commit; and in the folder of the name that the repository once had."""
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'elsewhere'))
    cache = tmp_path / 'elsewhere' / f'models--{repo}'
    for folder in ('blobs', 'refs', 'snapshots/abc'):
        (cache / folder).mkdir(parents=True)
    (cache / 'refs' / 'main').write_text('abc', encoding='utf-8')
    for name, content in Hub.files.items():
        (cache / 'blobs' / name).write_bytes(content)
        (cache / 'snapshots' / 'abc' / name).symlink_to(f'../../blobs/{name}')
    assert pretrained.fetch('gpt2') == cache / 'snapshots' / 'abc' and not Hub.seen


@pytest.mark.parametrize('trouble, said', [('cut', 'could not download model.safetensors'), ('404', 'status 404'), ('wrong', 'wrong sha256'),
                                           ('proxy', 'config.json is not a JSON object'), ('full', 'cannot write .*File too large')])
def test_nothing_passes_for_whole(hub, trouble, said):
    Hub.trouble = trouble
    if trouble == 'full':
        resource = pytest.importorskip('resource')
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=said) as caught:
            pretrained.fetch('gpt2')
    finally:
        if trouble == 'full':
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    assert '\n' not in str(caught.value) and (trouble == 'proxy' or not (hub / 'model.safetensors').exists())
    Hub.trouble = ''
    assert pretrained.fetch('gpt2') == hub and (hub / 'model.safetensors').read_bytes() == Hub.files['model.safetensors']  # and the next try mends it


def test_the_public_names():
    for name, pins in pretrained.NAMES.items():
        commit, sha256 = pins.split()
        assert len(commit) == 40 and len(sha256) == 64 and not set(commit + sha256) - set('0123456789abcdef'), name


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers, and out

@pytest.mark.skipif(not SHARED.is_dir(), reason='GPT-2\'s tokenizer is not beside this checkout')
def test_gpt2s_tokenizer(tmp_path, monkeypatch):
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')  # a copy: tiktoken deletes what it does not like
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    (tmp_path / 'config.json').write_text('{"vocab_size": 50257}', encoding='utf-8')
    tok = pretrained.load_tokenizer(tmp_path)
    assert tok.encode('Hello world') == [15496, 995] and tok.eos_id == 50256
    (tmp_path / 'tokenizer.json').write_text(tok.tokenizer_json(), encoding='utf-8')
    assert pretrained.load_tokenizer(tmp_path).to_dict() == tok.to_dict()
    out, _ = Project(tmp_path / 'pocket').run('prepare/shakespeare_gpt2.py', f'--input={SHARED / "tinyshakespeare.txt"}')
    assert '301,966 train and 36,059 val ids' in out  # nanoGPT's data/shakespeare
    content = json.loads(tok.tokenizer_json())
    vocab = content['model']['vocab']
    assert vocab['Ġthe'] == 262
    vocab['Ġthe'], vocab['Ġ t'] = 257, 262  # as large, but another language's
    for name, wrong in (('tokenizer.json', content), ('tokenizer.json', {'model': {'vocab': [1], 'merges': 5}}), ('vocab.json', vocab)):
        for old in tmp_path.glob('*.json'):
            old.unlink()
        (tmp_path / 'config.json').write_text('{"vocab_size": 50257}', encoding='utf-8')
        (tmp_path / name).write_text(json.dumps(wrong), encoding='utf-8')
        with pytest.raises(UserError, match='vocabulary of 50257 of its own: only GPT-2\'s'):
            pretrained.load_tokenizer(tmp_path)


@pytest.mark.parametrize('switches', [dict(bias=False, tie_weights=False, n_inner=40, act='gelu_erf'), dict(act='relu', dropout=0.1)])
def test_export_is_what_transformers_reads(tmp_path, switches):
    tok = make_tokenizer('bpe', [toy_text(3000)], 300, ('eot', 'sep'))
    torch.manual_seed(1)
    ours = GPT(GPTConfig(48, tok.vocab_size, 2, 3, 24, **switches)).eval()
    for p in ours.parameters():
        p.data += 0.3 * torch.randn_like(p)
    folder = tmp_path / 'modell ü'
    pretrained.export_folder(ours, tok, folder)
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json']
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == 'GPT2LMHeadModel' and theirs.generation_config.eos_token_id == tok.eos_id
    same(ours, theirs)
    text = 'gimme  ein Bär 🐻 fu dodo<|sep|>'
    their_tok = transformers.AutoTokenizer.from_pretrained(folder)
    assert their_tok.encode(text) == tok.encode(text[:-7]) + [tok.special_tokens['sep']] and their_tok.vocab_size <= tok.vocab_size == len(their_tok)
    back, _ = pretrained.load(folder)
    assert torch.equal(back(IDX)[0], ours(IDX)[0])
    assert pretrained.load_tokenizer(folder).to_dict() == tok.to_dict()
    with pytest.raises(UserError, match='is there already'):
        pretrained.export_folder(ours, tok, folder)


def test_export_without_a_bpe(tmp_path):
    project, tok = Project(tmp_path / 'pocket'), make_tokenizer('char', ['abc'])
    (project.root / 'out' / 'run').mkdir(parents=True)
    checkpoint.save(project.root / 'out' / 'run' / 'best.pt', checkpoint.model_state(GPT(GPTConfig(48, 61, 2, 3, 24)), tok, {}))
    out, _ = project.run('export.py', '--out_dir=out/run', '--to=new')
    assert 'no tokenizer.json, which can\'t describe a char tokenizer' in out
    assert sorted(p.name for p in (project.root / 'new').iterdir()) == ['config.json', 'generation_config.json', 'model.safetensors']
    transformers = pytest.importorskip('transformers')
    assert transformers.AutoModelForCausalLM.from_pretrained(project.root / 'new').config.eos_token_id is None
    with pytest.raises(UserError, match='vocabulary of 61'):
        pretrained.load_tokenizer(project.root / 'new')


def test_export_refuses_what_gpt2_lacks(tmp_path):
    modern = GPT(GPTConfig(48, 61, 2, 3, 24, pos='rotary', norm='rmsnorm', act='swiglu', qk_norm=True, softcap=15.0))
    with pytest.raises(UserError, match='GPT-2 has no pos=rotary, norm=rmsnorm, act=swiglu, qk_norm=True, softcap=15.0: '):
        pretrained.export_folder(modern, make_tokenizer('byte'), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
