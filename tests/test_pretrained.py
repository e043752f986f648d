"""
Other people's models in: pocket/pretrained.py. transformers is the reference, and a local server
plays Hugging Face. The way out is in test_export.py.

Run it alone: pytest -n 0 tests/test_pretrained.py
"""
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
from pocket import pretrained
from pocket.errors import UserError
from pocket.tokenizer import BpeTokenizer, make_tokenizer

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def make_reference(folder, seed=0, **config):
    """Save a random GPT-2 of transformers: odd sizes, weights so large that each part matters."""
    transformers = pytest.importorskip('transformers')  # here: it is slow to import
    torch.manual_seed(seed)
    shape = {'vocab_size': 997, 'n_positions': 48, 'n_embd': 24, 'n_layer': 2, 'n_head': 3,
             'initializer_range': 0.3, 'bos_token_id': 60, 'eos_token_id': 60}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **config})).eval()
    for name, parameter in model.named_parameters():
        if 'bias' in name or 'ln_' in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """For models this small, more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """(folder, its model): to look at, not to change."""
    folder = tmp_path_factory.mktemp('small') / 'modell ü'
    return folder, make_reference(folder)


def assert_same_model(ours, theirs, tolerance=1e-5):
    """The same logits, and the same greedy continuation, ours with its cache."""
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=tolerance, rtol=tolerance)
        idx = IDX
        for _ in range(25):
            next_id = theirs(idx).logits[:, -1:].argmax(-1)
            idx = torch.cat((idx, next_id), dim=1)
    assert ours.generate(IDX, 25, temperature=0).tolist() == idx.tolist()


def copy_of(folder, new_folder):
    """A copy of a model's folder, to be changed."""
    shutil.copytree(folder, new_folder, dirs_exist_ok=True)
    return new_folder


# --------------------------------------------------------------------------------------------------
# Weights in

def test_a_gpt2_is_loaded_as_transformers_computes_it(small):
    folder, theirs = small
    ours, args = pretrained.load(folder)
    assert_same_model(ours, theirs)
    expected = GPTConfig(48, 997, 2, 3, 24, dropout=0.1, attn_dropout=0.1)
    assert args == expected.__dict__
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert not ours.training
    for parameter in ours.parameters():
        assert parameter.is_contiguous()
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32

    loss = ours.train()(IDX, IDX)[1]
    loss.backward()


@pytest.mark.parametrize('config', [
    {'n_inner': 40, 'tie_word_embeddings': False},
    {'activation_function': 'gelu', 'n_head': 1, 'n_layer': 3},
    {'activation_function': 'relu'},
    {'activation_function': 'gelu_pytorch_tanh', 'layer_norm_epsilon': 1e-2},
    {'activation_function': 'gelu_fast', 'vocab_size': 1024},  # rounded up
], ids=str)
def test_a_gpt2_with_other_switches_is_loaded(tmp_path, config):
    theirs = make_reference(tmp_path, **config)
    ours, _ = pretrained.load(tmp_path)
    assert_same_model(ours, theirs)


def test_weights_in_several_files_are_loaded(tmp_path, small):
    _, theirs = small
    theirs.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    ours, _ = pretrained.load(tmp_path)
    assert_same_model(ours, theirs)


def test_names_without_prefix_and_saved_masks_are_understood(tmp_path, small):
    """As in openai-community/gpt2."""
    _, theirs = small
    theirs.transformer.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = load_file(path)
    assert 'wte.weight' in tensors
    for layer in range(2):
        tensors[f'h.{layer}.attn.bias'] = torch.ones(1, 1, 48, 48)
        tensors[f'h.{layer}.attn.masked_bias'] = torch.ones(1, 1, 48, 48)
    tensors['lm_head.weight'] = tensors['wte.weight'].clone()
    save_file(tensors, path)
    ours, _ = pretrained.load(tmp_path)
    assert_same_model(ours, theirs)


def test_overrides_reach_the_model(small):
    folder, theirs = small
    ours, args = pretrained.load(folder, block_size=12, dropout=0.0, gradient_checkpointing=True)
    assert ours.config.block_size == args['block_size'] == 12
    assert args['dropout'] == 0
    assert args['gradient_checkpointing']
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match='48 positions, too few for --block_size=49'):
        pretrained.load(folder, block_size=49)


def test_parameters_have_the_dtype_asked_for(small, tmp_path):
    folder, theirs = small
    in_bfloat16, _ = pretrained.load(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in in_bfloat16.parameters()} == {torch.bfloat16}

    copy.deepcopy(theirs).half().save_pretrained(tmp_path)  # a file in float16
    from_half, _ = pretrained.load(tmp_path)
    assert from_half.lm_head.weight.dtype == torch.float32
    assert torch.equal(from_half.lm_head.weight, theirs.lm_head.weight.half().float())


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'bert'}, "model_type is 'bert', only gpt2, llama"),
    ({'model_type': 'llama'}, 'hidden_size is None, not a whole number'),
    ({'activation_function': 'silu'}, "'silu', only 'gelu_new' or 'gelu_pytorch_tanh'"),
    ({'activation_function': ['x']}, 'activation_function is'),
    ({'layer_norm_epsilon': -1.0}, 'norm_eps must be above 0, got -1.0'),
    ({'scale_attn_weights': False}, 'scale_attn_weights is False'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by'),
    ({'reorder_and_upcast_attn': True}, 'reorder_and_upcast'),
    ({'add_cross_attention': True}, 'add_cross_attention'),
    ({'n_layer': '2'}, "n_layer is '2', not a whole number"),
    ({'n_embd': None}, 'n_embd is None'),
    ({'n_head': 5}, 'divisible by n_head'),
    ({'n_layer': 10**9}, 'n_layer must be from 1 to 1,024, got 1000000000'),
    ({'n_layer': 1}, 'h.1.[a-z_1.]* is surplus'),
    ({'n_inner': 'x'}, 'config.json'),
    ({'vocab_size': 998}, r'wte.weight makes \(997, 24\), not \(998, 24\)'),
    ({'tie_word_embeddings': False}, 'lm_head.weight is missing'),
    ({'resid_pdrop': 3}, 'dropout must be'),
])
def test_models_that_ours_cannot_be_are_refused(small, tmp_path, change, message):
    folder = copy_of(small[0], tmp_path)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text(json.dumps({**config, **change}), encoding='utf-8')
    with pytest.raises(UserError, match=message):
        pretrained.load(folder)


@pytest.mark.parametrize('key, tensor, message', [
    ('transformer.h.1.mlp.c_fc.bias', None, 'c_fc.bias is missing'),
    ('score.weight', torch.ones(3), 'score.weight is surplus'),
    ('transformer.wpe.weight', torch.ones(48), r'not \(48, 24\)'),
    ('transformer.wpe.weight', torch.ones(()), 'wpe.weight are of different widths'),
    ('transformer.h.0.attn.c_attn.weight', torch.ones(72, 24),
     r'\(24, 72\), not \(72, 24\)'),
    ('transformer.h.0.mlp.c_fc.weight', torch.ones(24, 96, dtype=torch.int8), 'torch.int8'),
])
def test_weights_that_do_not_fit_are_refused(small, tmp_path, key, tensor, message):
    folder = copy_of(small[0], tmp_path)
    tensors = load_file(folder / 'model.safetensors')
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(UserError, match=message):
        pretrained.load(folder)


def test_a_name_that_is_neither_known_nor_a_folder_is_refused():
    message = "'nowhere' is neither one of smollm2, gpt2, gpt2-medium.* nor a folder"
    with pytest.raises(UserError, match=message):
        pretrained.load('nowhere')


def test_damaged_safetensors_are_refused(small, tmp_path):
    folder = copy_of(small[0], tmp_path)
    path = folder / 'model.safetensors'
    whole = path.read_bytes()
    huge_header = (2**62).to_bytes(8, 'little') + whole[8:]
    for content in (whole[:-1], whole[:100], b'', b'\xff' * 100, huge_header, whole + b'more'):
        path.write_bytes(content)
        message = 'cannot read .*model.safetensors as a safetensors file'
        with pytest.raises(UserError, match=message):
            pretrained.load(folder)


@pytest.mark.parametrize('index, message', [
    (b'{"weight_map": {"a": "../x.safetensors"}}', 'names files beside it'),
    (b'{"weight_map": ["a"]}', 'names files beside it'),
    (b'{"weight_map": {}}', 'names files beside it'),
    (b'{"weight_map": {"a": "\\ud800"}}', 'as a safetensors file'),
    (b'{', 'not a JSON object'),
    (b'{"weight_map": {"a": "x.safetensors"}}',
     'x.safetensors as a safetensors file: it is not there'),
    (None, 'model.safetensors as a safetensors file: it is not there'),
])
def test_missing_weights_and_wrong_indexes_are_refused(small, tmp_path, index, message):
    folder = copy_of(small[0], tmp_path)
    (folder / 'model.safetensors').unlink()
    if index is not None:
        (folder / 'model.safetensors.index.json').write_bytes(index)
    with pytest.raises(UserError, match=message):
        pretrained.load(folder)


def test_a_config_that_is_no_json_object_is_refused(small, tmp_path):
    folder = copy_of(small[0], tmp_path)
    (folder / 'config.json').write_bytes(b'[1]')
    with pytest.raises(UserError, match='config.json is not a JSON object'):
        pretrained.load(folder)


# --------------------------------------------------------------------------------------------------
# Downloads and the cache

class Hub(http.server.BaseHTTPRequestHandler):
    """Plays huggingface.co, which redirects requests for weights; misbehaves on request."""
    files = {}  # {name: content}
    commit = None  # what its headers say, None: nothing
    seen = []  # (path, first byte) of each request for a file
    trouble = ''  # what is wrong, or the status of every answer

    def do_GET(self):
        first = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        name = self.path.split('/')[-1]
        if self.command == 'GET':
            self.seen.append((self.path, first))
        if self.trouble.startswith('40'):
            status, _, error_code = self.trouble.partition(' ')
            self.send_response(int(status))
            self.send_header('X-Error-Code', error_code)
            self.end_headers()
            return
        if name not in self.files:
            self.send_response(404)
            self.end_headers()
            return
        if name.endswith('.safetensors') and not self.path.startswith('/cdn/'):
            self.send_response(302)
            self.send_header('Location', '/cdn' + self.path)
            self.send_commit()
            self.end_headers()
            return

        body = self.files[name]
        if self.trouble == 'wrong':
            body = body[::-1]
        if self.trouble == 'proxy' and name == 'config.json':
            body = b'<html>please log in</html>'
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(body) - first))
        self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_commit()
        self.end_headers()

        is_cut = self.trouble == 'cut' or (self.trouble == 'cut once' and first == 0)
        end = len(body)
        if is_cut and len(body) > 100_000:
            end = first + 70_000
        if self.command == 'GET':
            self.wfile.write(body[first:end])

    do_HEAD = do_GET

    def send_commit(self):
        if self.commit is not None:
            self.send_header('X-Repo-Commit', self.commit)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_address(tmp_path, monkeypatch):
    """Start the Hub, the cache empty: the folder of the cache."""
    Hub.files = {}
    Hub.seen = []
    Hub.trouble = ''
    Hub.commit = None
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{httpd.server_port}/')
    yield tmp_path / 'hf' / 'hub'
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def hub(small, hub_address, monkeypatch):
    """Serve the small model as 'gpt2', the cache empty; its folder in the cache."""
    folder, _ = small
    for name in ('config.json', 'model.safetensors'):
        Hub.files[name] = (folder / name).read_bytes()

    commit = 'c0ffee' * 6 + 'cafe'
    sha256 = hashlib.sha256(Hub.files['model.safetensors']).hexdigest()
    pinned = pretrained.NAMES['gpt2']._replace(commit=commit, sha256=sha256)
    monkeypatch.setitem(pretrained.NAMES, 'gpt2', pinned)
    return hub_address / 'models--openai-community--gpt2' / 'snapshots' / commit


NO_NETWORK = 'http://127.0.0.1:9'


def test_a_model_is_downloaded_once_and_found_by_hugging_faces_tools(hub, small, monkeypatch):
    from huggingface_hub import try_to_load_from_cache

    # Cut once, the download resumes
    Hub.trouble = 'cut once'
    ours, _ = pretrained.load('gpt2', block_size=16)
    assert torch.equal(ours.lm_head.weight, small[1].lm_head.weight)
    weights = f'/cdn/openai-community/gpt2/resolve/{hub.name}/model.safetensors'
    first_bytes = [first for path, first in Hub.seen if path == weights]
    assert len(first_bytes) == 2
    assert first_bytes[0] == 0 < first_bytes[1] <= 70_000

    # Both of us find it
    assert sorted(path.name for path in hub.iterdir()) == ['config.json', 'model.safetensors']
    for name in ('config.json', 'model.safetensors'):
        found = try_to_load_from_cache('openai-community/gpt2', name, cache_dir=hub.parents[2])
        assert found == str(hub / name)
    monkeypatch.setenv('HF_ENDPOINT', NO_NETWORK)
    assert pretrained.fetch('gpt2') == hub

    # A file that was damaged since is not taken for complete
    path = hub / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-9])
    message = 'could not download model.safetensors .*ConnectionError.*--init_from=FOLDER'
    with pytest.raises(UserError, match=message):
        pretrained.fetch('gpt2')


@pytest.mark.skipif(os.name == 'nt', reason='links need a privilege on Windows')
@pytest.mark.parametrize('repository', ['openai-community--gpt2', 'gpt2'])
def test_what_hugging_faces_tools_downloaded_is_used(hub, monkeypatch, tmp_path, repository):
    """Links to blobs, a snapshot of another commit, the former name of the repository."""
    monkeypatch.setenv('HF_ENDPOINT', NO_NETWORK)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'elsewhere'))
    cache = tmp_path / 'elsewhere' / f'models--{repository}'
    for folder in ('blobs', 'refs', 'snapshots/abc'):
        (cache / folder).mkdir(parents=True)
    (cache / 'refs' / 'main').write_text('abc', encoding='utf-8')
    for name, content in Hub.files.items():
        (cache / 'blobs' / name).write_bytes(content)
        (cache / 'snapshots' / 'abc' / name).symlink_to(f'../../blobs/{name}')
    assert pretrained.fetch('gpt2') == cache / 'snapshots' / 'abc'
    assert not Hub.seen


@pytest.fixture
def small_file_limit():
    """No file of this process may become larger than 20,000 bytes, as if the disk were full."""
    resource = pytest.importorskip('resource')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)

    yield lift
    lift()


def assert_fetched(folder):
    assert pretrained.fetch('gpt2') == folder
    assert (folder / 'model.safetensors').read_bytes() == Hub.files['model.safetensors']


@pytest.mark.parametrize('trouble, message', [
    ('cut', 'could not download model.safetensors'),
    ('404', 'status 404'),
    ('wrong', 'wrong sha256'),
    ('proxy', 'config.json is not a JSON object'),
])
def test_a_failed_download_is_not_taken_for_complete(hub, trouble, message):
    Hub.trouble = trouble
    with pytest.raises(UserError, match=message) as caught:
        pretrained.fetch('gpt2')
    assert '\n' not in str(caught.value)
    if trouble != 'proxy':  # there the weights are good
        assert not (hub / 'model.safetensors').exists()

    Hub.trouble = ''  # and the next try succeeds
    assert_fetched(hub)


def test_a_download_onto_a_full_disk_is_not_taken_for_complete(hub, small_file_limit):
    with pytest.raises(UserError, match='cannot write .*File too large') as caught:
        pretrained.fetch('gpt2')
    assert '\n' not in str(caught.value)
    assert not (hub / 'model.safetensors').exists()

    small_file_limit()  # lifted
    assert_fetched(hub)


COMMIT = 'beef' * 10
TOKENIZER = {
    'version': '1.0',
    'added_tokens': [{'id': 0, 'content': '<|end|>', 'special': True, 'single_word': False,
                      'lstrip': False, 'rstrip': False, 'normalized': False}],
    'pre_tokenizer': {'type': 'Whitespace'},
    'model': {'type': 'WordLevel', 'vocab': {'<|end|>': 0, 'hi': 1}, 'unk_token': '<|end|>'},
}


@pytest.fixture(params=['in one file', 'in shards'])
def chat_model_on_hub(request, tmp_path, hub_address):
    """Serve a small Llama with a tokenizer, and nothing else of what such folders may have."""
    transformers = pytest.importorskip('transformers')
    config = transformers.LlamaConfig(vocab_size=2000, hidden_size=32, intermediate_size=32,
                                      num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    shard_size = '200KB' if request.param == 'in shards' else '1GB'
    model.save_pretrained(tmp_path / 'served', max_shard_size=shard_size)
    for path in (tmp_path / 'served').iterdir():
        if path.name != 'generation_config.json':
            Hub.files[path.name] = path.read_bytes()
    Hub.files['tokenizer.json'] = json.dumps(TOKENIZER).encode()
    Hub.commit = COMMIT
    return hub_address, model


@pytest.mark.parametrize('name, repository', [
    ('smollm2', 'HuggingFaceTB/SmolLM2-135M-Instruct'),
    ('some-one/a_model-1.5', 'some-one/a_model-1.5'),
])
def test_a_repository_is_downloaded_once_at_its_newest_commit(
        chat_model_on_hub, monkeypatch, name, repository):
    from huggingface_hub import try_to_load_from_cache
    cache, theirs = chat_model_on_hub
    Hub.trouble = 'cut once'
    ours, _ = pretrained.load(name)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    resumed = [path for path, first in Hub.seen if first > 0 and path.startswith('/cdn/')]
    assert resumed
    assert resumed[0].startswith(f'/cdn/{repository}/resolve/{COMMIT}/')
    assert pretrained.load_tokenizer(name).encode('hi') == [1]
    assert pretrained.load_template(name) is None

    # Hugging Face's tools find it: the newest snapshot has the name of a commit
    folder = cache / f'models--{repository.replace("/", "--")}' / 'snapshots' / COMMIT
    assert sorted(path.name for path in folder.iterdir()) == sorted(Hub.files)
    for file in Hub.files:
        assert try_to_load_from_cache(repository, file, cache_dir=cache) == str(folder / file)

    # From now on without a network
    requests = len(Hub.seen)
    monkeypatch.setenv('HF_ENDPOINT', NO_NETWORK)
    assert pretrained.fetch(name) == folder
    assert len(Hub.seen) == requests


def test_what_is_damaged_or_missing_in_the_cache_is_downloaded_again(chat_model_on_hub):
    cache, _ = chat_model_on_hub
    folder = pretrained.fetch('o/n')
    weights = sorted(folder.glob('*.safetensors'))[0]
    for path in (weights, folder / 'tokenizer.json', folder / 'config.json'):
        content = path.read_bytes()
        path.unlink()
        if path == weights:
            path.write_bytes(content[:-9])
        assert pretrained.fetch('o/n') == folder
        assert path.read_bytes() == content


def test_the_commit_may_come_from_the_api_or_not_at_all(chat_model_on_hub):
    from huggingface_hub import try_to_load_from_cache
    cache, _ = chat_model_on_hub
    Hub.commit = None
    assert pretrained.fetch('o/none').name == 'main'
    assert try_to_load_from_cache('o/none', 'config.json', cache_dir=cache)
    Hub.files['api'] = json.dumps({'sha': COMMIT}).encode()  # asked for as /api/models/o/api
    assert pretrained.fetch('o/api').name == COMMIT


@pytest.mark.parametrize('trouble, message', [
    ('401 GatedRepo', 'o/n is gated .status 401.: ask for access at http'),
    ('403 GatedRepo', 'o/n is gated .status 403.'),
    ('401 RepoNotFound', 'o/n does not exist, or is private .status 401.: check the name'),
    ('404 RepoNotFound', 'there is no model o/n, or it has no config.json .status 404.'),
])
def test_a_gated_or_missing_repository_is_a_sentence(chat_model_on_hub, trouble, message):
    Hub.trouble = trouble
    with pytest.raises(UserError, match=message) as caught:
        pretrained.fetch('o/n')
    assert '\n' not in str(caught.value)


def test_a_repository_without_safetensors_is_refused(chat_model_on_hub):
    for name in list(Hub.files):
        if 'safetensors' in name:
            del Hub.files[name]
    with pytest.raises(UserError, match='could not download model.safetensors .*status 404'):
        pretrained.fetch('o/n')


def test_without_a_network_a_repository_is_a_sentence(hub_address, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', NO_NETWORK)
    with pytest.raises(UserError, match='127.0.0.1:9 does not answer .*--init_from=FOLDER'):
        pretrained.fetch('smollm2')


def test_another_owners_model_is_not_taken_for_gpt2(hub_address, small):
    """models--gpt2 in the cache is OpenAI's, from before repositories had owners."""
    old = hub_address / 'models--gpt2' / 'snapshots' / COMMIT
    copy_of(small[0], old)
    (old.parents[1] / 'refs').mkdir()
    (old.parents[1] / 'refs' / 'main').write_text(COMMIT, encoding='utf-8')
    assert pretrained.fetch('gpt2') == old
    with pytest.raises(UserError, match='there is no model somebody/gpt2'):
        pretrained.fetch('somebody/gpt2')


def test_public_models_are_pinned():
    pinned = {name: repository for name, repository in pretrained.NAMES.items()
              if repository.is_pinned}
    assert set(pretrained.NAMES) - set(pinned) == {'smollm2'}  # its weights we have never seen
    for name, repository in pinned.items():
        assert repository.name.endswith(f'/{name}')
        assert len(repository.commit) == 40
        assert len(repository.sha256) == 64
        assert set(repository.commit + repository.sha256) <= set('0123456789abcdef')


# --------------------------------------------------------------------------------------------------
# Tokenizers

@pytest.fixture
def gpt2_tokenizer_cached(tmp_path, monkeypatch):
    """The files of tiktoken's gpt2, in a copy, as tiktoken deletes what it does not like."""
    if not SHARED.is_dir():
        pytest.skip('GPT-2\'s tokenizer is not beside this checkout')
    shutil.copytree(SHARED / 'tiktoken_cache', tmp_path / 'cache')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))


def make_tokenizer_folder(folder, file=None, content=None):
    """A folder with the config.json of a GPT-2 and, beside it, one JSON file."""
    folder.mkdir()
    (folder / 'config.json').write_text('{"vocab_size": 50257}', encoding='utf-8')
    if file is not None:
        (folder / file).write_text(json.dumps(content), encoding='utf-8')
    return folder


@pytest.mark.slow
def test_gpt2s_tokenizer_is_recognized(tmp_path, gpt2_tokenizer_cached):
    tok = pretrained.load_tokenizer(make_tokenizer_folder(tmp_path / 'bare'))
    assert tok.encode('Hello world') == [15496, 995]
    assert tok.eos_id == 50256

    content = json.loads(tok.tokenizer_json())
    vocab = content['model']['vocab']
    for file, described in (('tokenizer.json', content), ('vocab.json', vocab)):
        folder = make_tokenizer_folder(tmp_path / file, file, described)
        assert pretrained.load_tokenizer(folder).to_dict() == tok.to_dict()

    # As large, but with other ids: it is read as it is, never taken for GPT-2's
    pytest.importorskip('tokenizers')
    assert (vocab['Ġthe'], vocab['Ġt']) == (262, 256)
    vocab['Ġthe'] = 256
    vocab['Ġt'] = 262
    folder = make_tokenizer_folder(tmp_path / 'other', 'tokenizer.json', content)
    assert pretrained.load_tokenizer(folder).encode(' the') == [256]
    no_vocabulary = {'model': {'vocab': [1], 'merges': 5}}
    wrong = [('tokenizer.json', no_vocabulary, 'cannot read'),
             ('tokenizer.json', {'model': 5}, 'cannot read'),
             ('vocab.json', vocab, 'has 50257 ids of its own, but no tokenizer.json')]
    for number, (file, described, message) in enumerate(wrong):
        folder = make_tokenizer_folder(tmp_path / f'wrong {number}', file, described)
        with pytest.raises(UserError, match=message):
            pretrained.load_tokenizer(folder)


def make_byte_level_bpe(folder, eos='<|endoftext|>'):
    """Save a GPT-2 tokenizer of transformers, learned from a made-up text in another language."""
    tokenizers = pytest.importorskip('tokenizers')
    transformers = pytest.importorskip('transformers')
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([toy_text(3000) + 'größer als Äpfel'], 280, show_progress=False,
                                special_tokens=[eos])
    folder.mkdir()
    library.save_model(str(folder))  # vocab.json and merges.txt, as GPT-2 had
    tok = transformers.GPT2TokenizerFast(str(folder / 'vocab.json'), str(folder / 'merges.txt'),
                                         eos_token=eos, bos_token=eos, unk_token=eos)
    tok.add_tokens(['dodobaba'])
    tok.add_special_tokens({'pad_token': '<pad>'})
    return tok


OTHER_TEXTS = ['gimme  ein größer Bär 🐻 fu dodo', 'x = dodobaba(12)\n\n\treturn', '', ' a', "it's"]


@pytest.mark.parametrize('files', ['tokenizer.json', 'vocab.json and merges.txt'])
@pytest.mark.parametrize('rows', [282, 320])  # 320: rounded up
def test_a_gpt2_with_a_tokenizer_of_its_own_is_read(tmp_path, files, rows):
    """Special tokens first, and tokens that were added later."""
    folder = tmp_path / 'theirs'
    theirs = make_byte_level_bpe(folder)
    theirs.save_pretrained(folder)
    assert len(theirs) == 282
    if files != 'tokenizer.json':
        (folder / 'tokenizer.json').unlink()
    make_reference(folder, vocab_size=rows, eos_token_id=0, bos_token_id=0)

    ours = pretrained.load_tokenizer(folder)
    model, _ = pretrained.load(folder)
    assert ours.vocab_size == 282 <= model.config.vocab_size == rows
    assert ours.eos_ids == [0]
    assert ours.special_tokens == {'eot': 0, 'pad': 281}
    for text in OTHER_TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)
    with_special = 'a<|endoftext|>b<pad>'
    assert ours.encode_with_specials(with_special) == theirs.encode(with_special)
    assert not {0, 281} & set(ours.encode(with_special))


def test_a_folder_of_gpt2s_size_with_another_tokenizer_is_refused(tmp_path, capsys):
    """BERT's vocab.txt, a sentencepiece model: never guessed to be GPT-2's."""
    files = {'vocab.txt': 'a\nb\n', 'spiece.model': 'a\nb\n', 'merges.txt': 'a\nb\n',
             'dict.txt': 'a 1\n', 'tokenizer_config.json': '{"tokenizer_class": "BertTokenizer"}'}
    for number, (file, content) in enumerate(files.items()):
        folder = make_tokenizer_folder(tmp_path / str(number))
        (folder / file).write_text(content, encoding='utf-8')
        message = f'has 50257 ids of its own, but no tokenizer.json .*only .*{file}.*save_pretrained'
        with pytest.raises(UserError, match=message):
            pretrained.load_tokenizer(folder)


def test_a_folder_of_gpt2s_size_without_any_tokenizer_gets_gpt2s_and_a_word(
        tmp_path, capsys, gpt2_tokenizer_cached):
    for size in (50257, 50304):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / 'config.json').write_text(f'{{"vocab_size": {size}}}', encoding='utf-8')
        assert pretrained.load_tokenizer(folder).encode('Hello world') == [15496, 995]
        assert 'has no tokenizer: taking GPT-2\'s' in capsys.readouterr().err


def test_shakespeare_in_gpt2s_tokens_is_as_long_as_nanogpts(tmp_path, gpt2_tokenizer_cached):
    project = Project(tmp_path / 'pocket')
    text = SHARED / 'tinyshakespeare.txt'
    out, _ = project.run('prepare/shakespeare_gpt2.py', f'--input={text}')
    assert '301,966 train and 36,059 val ids' in out  # nanoGPT's data/shakespeare


def test_a_bpe_like_ours_keeps_the_ends_and_the_template_of_its_folder(tmp_path):
    """It is read as ours only if nothing gets lost: ours has one id that ends a text."""
    tok = make_tokenizer('bpe', [toy_text(2000)], vocab_size=300, special_tokens=('eos', 'end'))
    eos, end = tok.special_tokens.values()
    (tmp_path / 'tokenizer.json').write_text(tok.tokenizer_json(), encoding='utf-8')

    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content), encoding='utf-8')

    write('config.json', {'vocab_size': tok.vocab_size})
    assert type(pretrained.load_tokenizer(tmp_path)) is type(tok)

    for ids in ([eos], [end], [end, eos]):
        write('generation_config.json', {'eos_token_id': ids})
        found = pretrained.load_tokenizer(tmp_path)
        assert found.eos_ids == ids
        assert (type(found) is type(tok)) == (ids == [eos])

    write('generation_config.json', {'eos_token_id': eos})
    write('tokenizer_config.json', {'chat_template': '{{ messages[0].content }}<|end|>'})
    text = pretrained.load_template(tmp_path).render([{'role': 'user', 'content': 'ba'}])
    assert pretrained.load_tokenizer(tmp_path).encode_with_specials(text) == [*tok.encode('ba'), end]


@pytest.mark.parametrize('tied', [True, False])
def test_new_special_tokens_leave_the_logits_of_the_old_ones_alone(tied):
    """Pairs need some that GPT-2 lacks."""
    torch.manual_seed(0)
    model_tok = BpeTokenizer(['b a', 'd o'])
    tok = BpeTokenizer(['b a', 'd o'], ('eot', 'pad', 'bos', 'eos'))
    config = GPTConfig(vocab_size=model_tok.vocab_size, block_size=8, n_layer=1, n_head=2,
                       n_embd=8, tie_weights=tied)
    model = GPT(config).eval()
    idx = torch.randint(model_tok.vocab_size, (2, 8))
    before = model(idx)[0]
    pretrained.resize_token_embeddings(model, tok, model_tok, 'data/x')
    after = model(idx)[0]

    assert after.shape[-1] == tok.vocab_size == model.config.vocab_size
    assert torch.equal(after[..., :model_tok.vocab_size], before)
    mean = before.mean(-1, keepdim=True).expand(2, 8, 3)
    torch.testing.assert_close(after[..., -3:], mean)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied

    new_ids = torch.full((1, 2), tok.eos_id)  # they can be trained
    loss = model(new_ids, new_ids)[1]
    loss.backward()
    with pytest.raises(UserError, match='another tokenizer'):
        pretrained.resize_token_embeddings(model, BpeTokenizer(['d o', 'b a']), model_tok, 'data/x')


# --------------------------------------------------------------------------------------------------
# The whole way: prepare, train, export, sample from the folder, train on from it

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A Project with a GPT-2-shaped run out/mine on a made-up text, exported to the folder hf."""
    project = Project(tmp_path_factory.mktemp('exported'))
    (project.root / 'my text.txt').write_text(toy_text(20_000), encoding='utf-8')
    project.run('prepare/text.py', '--input=my text.txt', '--tokenizer=bpe', '--vocab_size=300')
    gpt2_shape = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--pos=learned',
                  '--act=gelu', '--norm=layernorm', '--qk_norm=False', '--token_shift=False',
                  '--zero_init=False', '--bias=True']
    project.run('train.py', '--dataset=mine', *gpt2_shape, '--batch_size=8', '--max_iters=60',
                '--eval_interval=60', '--log_interval=50', '--optimizer=adamw', '--device=cpu',
                '--dtype=float32', '--out_dir=out/mine')
    project.out, _ = project.run('-m', 'pocket.export', '--out_dir=out/mine', '--to=hf')
    return project


def test_an_exported_folder_generates_the_same_text(exported):
    assert 'tokenizer.json' in exported.out and 'model.safetensors' in exported.out
    greedy = ['--start=ba do', '--max_new_tokens=20', '--temperature=0']
    from_run, _ = exported.run('sample.py', '--out_dir=out/mine', *greedy)
    from_folder, _ = exported.run('sample.py', '--init_from=hf', *greedy)
    assert from_run == from_folder
    assert from_run.startswith('ba do')


FROM_FOLDER = ['--init_from=hf', '--dataset=mine', '--batch_size=8', '--device=cpu']
FROM_FOLDER_ADAMW = [*FROM_FOLDER, '--dtype=float32', '--optimizer=adamw', '--dropout=0']


def test_training_starts_from_an_exported_folder_and_resumes_from_its_own_checkpoint(exported):
    # A step with learning rate 0: the same loss as before
    exported.run('train.py', *FROM_FOLDER_ADAMW, '--max_iters=1', '--learning_rate=0',
                 '--out_dir=out/on')
    before = exported.checkpoint('mine', 'best.pt')
    after = exported.checkpoint('on', 'best.pt')
    assert abs(before['best'] - after['best']) < 1e-5
    assert after['model_args']['n_embd'] == 32
    assert after['model_args']['pos'] == 'learned'

    # --eval_only evaluates the folder as it is
    out, _ = exported.run('train.py', '--eval_only', *FROM_FOLDER)
    last_line = out.splitlines()[-1]
    assert last_line.startswith('hf: val loss ')
    assert abs(float(last_line.split()[3]) - before['best']) < 1e-3

    # --resume takes last.pt, not the folder again
    exported.run('train.py', '--resume', '--out_dir=out/on', '--max_iters=2')
    assert exported.checkpoint('on')['step'] == 2


def test_options_that_contradict_an_exported_folder_are_refused(exported):
    error = exported.fails('train.py', *FROM_FOLDER_ADAMW, '--n_layer=3', '--out_dir=out/no')
    assert 'n_layer' in error and 'shape' in error
    error = exported.fails('train.py', *FROM_FOLDER_ADAMW, '--arch=seq2seq', '--out_dir=out/no')
    assert 'is a gpt' in error and '--arch=seq2seq' in error

    exported.run('prepare/text.py', '--input=my text.txt', '--tokenizer=byte', '--name=bytes')
    error = exported.fails('train.py', '--init_from=hf', '--dataset=bytes', '--out_dir=out/no')
    assert 'has another tokenizer than hf' in error
