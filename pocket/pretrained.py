"""
Other people's weights in, and a GPT of ours out, as folders in Hugging Face's format.

    fetch('smollm2')                  the folder of a public model, downloaded once
    load('gpt2', block_size=512)      (GPT, model_args) from such a name, OWNER/NAME, or any folder
    load_tokenizer('gpt2')            the tokenizer that belongs to it
    load_template('smollm2')          its chat template, if it has one
    export_folder(model, tok, folder) the way out; see export.py

A folder in Hugging Face's format has

    config.json             shape and switches, under their names
    model.safetensors       the weights, or several files of them and an index
    tokenizer.json          the tokenizer
    tokenizer_config.json   optional: its special tokens, and the chat template
    generation_config.json  optional: the ids that end a reply

The steps below come in this order: fetch the folder, read the config, read the tensors, read the
tokenizer and the chat template, make room for more tokens, export. What is particular to an
architecture is in a table of its own: GPT2, and LLAMA for Llama, Mistral, Qwen2 and Qwen3.
"""
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from model import GPT, GPTConfig
from pocket.checkpoint import all_finite, build_on_meta, check_config
from pocket.errors import UserError, short_repr
from pocket.files import atomic_write, download, find_path, make_folder
from pocket.template import JinjaTemplate
from pocket.tokenizer import (
    GPT2_SPLIT,
    BpeTokenizer,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    make_tokenizer,
    printable,
    special_token_name,
    special_token_text,
)

# --------------------------------------------------------------------------------------------------
# Fetch: the folder of a model

class Repository(NamedTuple):
    """A model on huggingface.co, pinned to one commit or, if we have never seen it, its newest."""
    name: str
    commit: str | None = None
    sha256: str | None = None  # of model.safetensors

    @property
    def is_pinned(self):
        """Whether we know its weights. These are GPT-2's, whose tokenizer we have from tiktoken."""
        return self.sha256 is not None


NAMES = {
    'smollm2': Repository(name='HuggingFaceTB/SmolLM2-135M-Instruct'),
    'gpt2': Repository(
        name='openai-community/gpt2',
        commit='607a30d783dfa663caf39e06633721c8d4cfcd7e',
        sha256='248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707',
    ),
    'gpt2-medium': Repository(
        name='openai-community/gpt2-medium',
        commit='6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
        sha256='fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd',
    ),
    'gpt2-large': Repository(
        name='openai-community/gpt2-large',
        commit='32b71b12589c2f8d625668d2335a01cac3249519',
        sha256='5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce',
    ),
    'gpt2-xl': Repository(
        name='openai-community/gpt2-xl',
        commit='15ea56dee5df4983c59b2538573817e1667135e2',
        sha256='0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a',
    ),
    'distilgpt2': Repository(
        name='distilbert/distilgpt2',
        commit='2290a62682d06624634c1f46a6ad5be0f47f38aa',
        sha256='e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b',
    ),
}


def fetch(name):
    """The folder of a model: one of NAMES or OWNER/NAME, downloaded if it is not cached, or a path.

    The cache is that of Hugging Face's own tools: they find what we download, and we what they did.
    Raises UserError.
    """
    name = str(name)
    if name not in NAMES:
        folder = find_path(name)
        if (folder / 'config.json').is_file():
            return folder
        if folder.exists() or not re.fullmatch(r'[\w-]+(\.[\w-]+)*/[\w-]+(\.[\w-]+)*', name):
            raise UserError(
                f'{name!r} is neither one of {", ".join(NAMES)}, nor OWNER/NAME of a model on '
                f'huggingface.co, nor a folder in its format, with a config.json and a '
                f'model.safetensors')

    # A folder without a tokenizer is what Hugging Face's tools leave if they loaded a model alone
    repository = NAMES.get(name) or Repository(name)
    found = [folder for folder in cached_folders(repository) if is_model(folder)]
    for folder in found:
        if repository.is_pinned or (folder / 'tokenizer.json').is_file():
            return folder
    try:
        return download_model(repository)
    except UserError:
        if found:
            return found[0]
        raise


def is_model(folder):
    """Whether a folder has a config and weights, all of them complete."""
    try:
        read_json(folder / 'config.json')
        find_tensors(folder)
        return True
    except UserError:  # not there, or truncated
        return False


def cache_folder(repository_name):
    """Where Hugging Face's tools cache a repository; the variables and defaults are theirs."""
    cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    home = os.environ.get('HF_HOME') or Path(cache, 'huggingface')
    hub = (os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE')
           or Path(home, 'hub'))
    hub = Path(os.path.expandvars(hub)).expanduser()
    return hub / f'models--{repository_name.replace("/", "--")}'


def cached_folders(repository):
    """Yield the folders that may hold a downloaded model: the newest snapshot, then our commit.

    A snapshot's folder is named after its commit; refs/main holds the newest one.
    """
    repository_names = [repository.name]
    if repository.is_pinned:  # until 2024 these repositories had no owner
        repository_names.insert(0, repository.name.split('/')[1])
    for repository_name in repository_names:
        cache = cache_folder(repository_name)
        main = cache / 'refs' / 'main'
        if main.is_file():
            yield cache / 'snapshots' / main.read_text(encoding='utf-8', errors='replace').strip()
        if repository.commit is not None:
            yield cache / 'snapshots' / repository.commit


WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'  # of a large model, whose weights are in several files
OPTIONAL_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'generation_config.json', 'chat_template.jinja', 'vocab.json', 'merges.txt', 'vocab.txt',
)


def download_model(repository):
    """Download a model into the cache and return its folder. Raises UserError.

    Hugging Face's tools put links to blobs into a snapshot; on Windows, plain files. We do as on
    Windows everywhere, which they read just as well.
    """
    endpoint = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    commit = repository.commit or newest_commit(repository.name, endpoint)
    cache = cache_folder(repository.name)
    folder = cache / 'snapshots' / commit
    main = cache / 'refs' / 'main'
    for needed in (folder, main.parent):
        make_folder(needed, 'the environment variable HF_HOME')

    url = f'{endpoint}/{repository.name}/resolve/{commit}'
    advice = ('Without a network, name a folder with a model in Hugging Face\'s format: '
              '--init_from=FOLDER')
    weights = [WEIGHTS]
    if not repository.is_pinned:
        for file in OPTIONAL_FILES:
            download_optional(f'{url}/{file}', folder / file, advice)
        if download_optional(f'{url}/{INDEX}', folder / INDEX, advice):
            weights = [path.name for path in weight_files(folder)]

    # A file whose sha256 is not known is kept by download(): remove those that are damaged
    config = folder / 'config.json'
    config.unlink(missing_ok=True)
    for file in weights:
        if repository.sha256 is None and not is_safetensors(folder / file):
            (folder / file).unlink(missing_ok=True)
        download([f'{url}/{file}'], folder / file, repository.sha256, advice)
    download([f'{url}/config.json'], config, None, advice)  # last: now the folder is complete
    read_json(config)  # it may be the page of a proxy

    if repository.commit is None or not main.is_file():
        atomic_write(main, lambda f: f.write(commit.encode()))
    return folder


def newest_commit(name, endpoint):
    """The commit that a repository's main branch is at. Raises UserError if we can't have it."""
    import requests
    url = f'{endpoint}/{name}/resolve/main/config.json'
    try:
        response = requests.head(url, allow_redirects=True, timeout=30)
    except requests.RequestException as e:
        raise UserError(f'could not download {name}: {endpoint} does not answer '
                        f'({type(e).__name__}). Without a network, name a folder with a model in '
                        f'Hugging Face\'s format: --init_from=FOLDER') from None
    answers = [*response.history, response]  # it may send us on to another server
    refusal = ' '.join(answer.headers.get('X-Error-Code', '') for answer in answers)
    status = response.status_code
    page = f'{endpoint}/{name}'
    if 'GatedRepo' in refusal or status == 403:
        raise UserError(f'{name} is gated (status {status}): ask for access at {page}, download it '
                        f'with "hf download {name}", and try again')
    if status == 401:  # what the hub says of any name that it doesn't show to everybody
        raise UserError(f'{name} does not exist, or is private (status 401): check the name at '
                        f'{page}, or, if it is yours, download it with "hf download {name}"')
    if status == 404:
        raise UserError(f'there is no model {name}, or it has no config.json (status 404): check '
                        f'the name at {page}')

    for answer in answers:
        if is_commit(answer.headers.get('X-Repo-Commit')):
            return answer.headers['X-Repo-Commit']
    try:
        content = requests.get(f'{endpoint}/api/models/{name}', timeout=30).json()
        if is_commit(content['sha']):
            return content['sha']
    except (requests.RequestException, ValueError, KeyError, TypeError):
        pass
    return 'main'  # a server that doesn't say


def is_commit(text):
    """Whether this is the name of a commit, which becomes the name of a folder."""
    return isinstance(text, str) and re.fullmatch('[0-9a-f]{40}', text) is not None


def download_optional(url, path, advice):
    """Download a file that not every model has. Returns whether it is there. Raises UserError."""
    import requests
    if path.is_file():
        return True
    try:
        if requests.head(url, allow_redirects=True, timeout=30).status_code == 404:
            return False
    except requests.RequestException:
        pass  # download() will say what is wrong
    download([url], path, None, advice)
    return True


def read_json(path):
    """Read a JSON object as a dict. Raises UserError if the file does not hold one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a JSON object: it is cut short or something else')
    return content


# --------------------------------------------------------------------------------------------------
# Config: their config.json to a GPTConfig

GPT2_SIZES = {  # their names: ours
    'vocab_size': 'vocab_size',
    'n_positions': 'block_size',
    'n_embd': 'n_embd',
    'n_layer': 'n_layer',
    'n_head': 'n_head',
}
GPT2_ACTIVATIONS = {  # their names: ours
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',  # three names for the same formula
    'gelu_fast': 'gelu',
    'gelu': 'gelu_erf',
    'relu': 'relu',
}
GPT2_SUPPORTED = {  # the values that our GPT can compute, the default first
    'model_type': ['gpt2'],
    'activation_function': list(GPT2_ACTIVATIONS),
    'scale_attn_weights': [True],
    'scale_attn_by_inverse_layer_idx': [False],
    'reorder_and_upcast_attn': [False],
    'add_cross_attention': [False],
}


def read_config(path, overrides):
    """Read their config.json as a GPTConfig. Raises UserError if our GPT can't be such a model.

    overrides: fields of GPTConfig to replace; block_size may only become smaller.
    """
    theirs = read_json(path)
    architecture = architecture_of(theirs, path)
    problems = architecture.problems(theirs, overrides.get('block_size'))
    if problems:
        raise UserError(f'{path}: {"; ".join(problems)}')

    # Check their values first: a block_size that is not a number has no larger or smaller.
    try:
        fields = architecture.fields(theirs)
        config = GPTConfig(**fields)
        check_config(config)
        wanted = overrides.get('block_size', 1)
        if wanted > config.block_size:
            raise ValueError(f'the model has {config.block_size} positions, too few for '
                             f'--block_size={wanted}')
        fields.update(overrides)
        config = GPTConfig(**fields)
        check_config(config)
    except (TypeError, ValueError) as e:
        raise UserError(f'{path}: {e}') from None
    return config


def gpt2_problems(theirs, block_size=None):
    """What a config.json asks for that our GPT has no part for: a list of messages."""
    problems = []
    for key, supported in GPT2_SUPPORTED.items():
        value = theirs.get(key, supported[0])
        if value not in supported:
            choices = ' or '.join(repr(choice) for choice in supported)
            problems.append(f'{key} is {value!r}, only {choices} can be read')
    for key in GPT2_SIZES:
        if key in theirs and type(theirs[key]) is not int:
            problems.append(f'{key} is {theirs[key]!r}, not a whole number')
    return problems


def gpt2_fields(theirs):
    """The fields of GPTConfig that describe the same model as GPT-2's config.json."""
    fields = {
        'act': GPT2_ACTIVATIONS[theirs.get('activation_function', 'gelu_new')],
        'n_inner': theirs.get('n_inner'),
        'dropout': theirs.get('resid_pdrop', 0.1),
        'attn_dropout': theirs.get('attn_pdrop', 0.1),
        'tie_weights': theirs.get('tie_word_embeddings', True),
        'norm_eps': theirs.get('layer_norm_epsilon', 1e-5),
    }
    for key, ours in GPT2_SIZES.items():
        if key in theirs:  # else the default, which is GPT-2 124M in both
            fields[ours] = theirs[key]
    return fields


LLAMA_SIZES = {  # their names: ours
    'vocab_size': 'vocab_size',
    'max_position_embeddings': 'block_size',
    'hidden_size': 'n_embd',
    'intermediate_size': 'n_inner',
    'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head',
    'num_key_value_heads': 'n_kv_head',
    'head_dim': 'head_dim',
}
LLAMA_SUPPORTED = {  # the values that our GPT can compute, the default first
    'hidden_act': ['silu'],
    'mlp_bias': [False],
    'pretraining_tp': [1],
    'partial_rotary_factor': [1],
}


def llama_problems(theirs, block_size=None):
    """What the config.json of a Llama asks for that our GPT has no part for: a list of messages.

    block_size: how many positions are wanted, None for all.
    """
    problems = []
    for key, supported in LLAMA_SUPPORTED.items():
        value = theirs.get(key, supported[0])
        if value not in supported:
            problems.append(f'{key} is {value!r}, only {supported[0]!r} can be read')
    for key in LLAMA_SIZES:
        optional = key in ('num_key_value_heads', 'head_dim')
        if type(theirs.get(key)) is not int and not (optional and theirs.get(key) is None):
            problems.append(f'{key} is {theirs.get(key)!r}, not a whole number')
    if theirs.get('quantization_config'):
        problems.append('its weights are quantized (quantization_config), only float32, float16 '
                        'and bfloat16 can be read')

    # A sliding window: tokens attend to the latest few only. If it is as long as the context, it is
    # none
    window = theirs.get('sliding_window')
    length = block_size or theirs.get('max_position_embeddings')
    if uses_window(theirs) and type(window) is int and type(length) is int and window < length:
        problems.append(f'sliding_window is {window} with {length} positions, but pocketGPT '
                        f'attends to all of them: only a --block_size of at most {window} can be '
                        f'read')
    rope = rope_of(theirs)
    theta = rope.get('rope_theta') if isinstance(rope, dict) else None
    theta = theirs.get('rope_theta', 10000.0) if theta is None else theta
    if type(theta) not in (int, float):
        problems.append(f'rope_theta is {theta!r}, not a number')
    rope_type = rope_type_of(rope)
    if rope_type not in ('default', 'linear', 'llama3'):
        problems.append(f'rope_scaling is of type {rope_type!r}, only linear and llama3 can be '
                        f'read')
    return problems


def uses_window(theirs):
    """Whether any layer has the sliding window that the config.json of a Llama speaks of."""
    if theirs.get('model_type') == 'mistral':
        return True
    if not theirs.get('use_sliding_window'):
        return False
    if isinstance(theirs.get('layer_types'), list):
        return 'sliding_attention' in theirs['layer_types']
    full_layers = theirs.get('max_window_layers', 28)  # the first so many have none
    num_layers = theirs.get('num_hidden_layers')
    return not (type(full_layers) is type(num_layers) is int and full_layers >= num_layers)


def rope_of(theirs):
    """The dict that describes rotary positions: rope_parameters in newer configs; {} if none."""
    return theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}


def rope_type_of(scaling):
    """The kind of a rope_scaling: 'rope_type', which was called 'type' in older configs."""
    if not isinstance(scaling, dict):
        return repr(scaling)
    return scaling.get('rope_type', scaling.get('type', 'default'))


def llama_fields(theirs):
    """The fields of GPTConfig that describe the same model as the config.json of a Llama."""
    model_type = theirs['model_type']
    has_bias = theirs.get('attention_bias', False)
    rope = rope_of(theirs)
    fields = {
        'pos': 'rotary',
        'rope_theta': float(rope.get('rope_theta', theirs.get('rope_theta', 10000.0))),
        'norm': 'rmsnorm',
        'norm_eps': theirs.get('rms_norm_eps', 1e-6),
        'act': 'swiglu',
        'bias': False,
        'attn_bias': has_bias,
        'qkv_bias': True if model_type == 'qwen2' else has_bias,
        'qk_norm': 'rmsnorm' if model_type == 'qwen3' else False,
        'tie_weights': theirs.get('tie_word_embeddings', False),
        'attn_dropout': theirs.get('attention_dropout', 0.0),
    }
    if rope_type_of(rope) != 'default':
        fields['rope_scaling'] = {**rope, 'rope_type': rope_type_of(rope)}
    for key, ours in LLAMA_SIZES.items():
        fields[ours] = theirs.get(key)
    return fields


def architecture_of(theirs, path):
    """The Architecture of a config.json. Raises UserError if it is none that we can compute."""
    model_type = theirs.get('model_type', 'gpt2')
    experts = theirs.get('num_local_experts') or theirs.get('num_experts')
    if experts:
        raise UserError(f'{path}: model_type is {model_type!r}, a mixture of {experts} experts, '
                        f'which pocketGPT does not have')
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ', '.join(ARCHITECTURES)
        raise UserError(f'{path}: model_type is {model_type!r}, only {known} can be read')
    return ARCHITECTURES[model_type]


# --------------------------------------------------------------------------------------------------
# Tensors: their files to our state_dict

# GPT-2's code keeps these as (in, out), nn.Linear keeps its weight as (out, in)
GPT2_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


def load(name, dtype=torch.float32, **overrides):
    """Load (GPT in eval mode, its model_args) from one of NAMES or from a folder.

    dtype: of the parameters, whatever the file holds. overrides: fields of GPTConfig, such as
    dropout, gradient_checkpointing or a smaller block_size. Raises UserError.
    """
    folder = fetch(name)
    config = read_config(folder / 'config.json', overrides)
    architecture = architecture_of(read_json(folder / 'config.json'), folder)
    tensors = find_tensors(folder)

    # Build the model without memory, to learn what it needs
    try:
        model = build_on_meta(GPT, config)
    except (RuntimeError, TypeError) as e:
        raise UserError(f'{folder / "config.json"} asks for an impossible model: {e}') from None
    needed = model.state_dict()
    if config.tie_weights:  # then the head is the token embedding, whether it was saved or not
        del needed['lm_head.weight']
    sources = {name: architecture.sources(name, tensors) for name in needed}
    used = {key for keys in sources.values() for key in keys}
    missing = [f'{key} is missing' for key in sorted(used) if key not in tensors]
    surplus = [f'{key} is surplus' for key in tensors
               if key not in used and not architecture.is_no_weight(key)]
    if missing or surplus:
        raise does_not_fit(folder, missing + surplus)

    # Then copy tensor by tensor, so that never more than one is held twice
    state = {}
    for name, empty in needed.items():
        parts = []
        for key in sources[name]:
            tensor = read_tensor(tensors[key], key)
            check_floats(tensor, folder, tensors[key], key)
            parts.append(architecture.weight(name, tensor, config))
        weight = join_parts(parts, empty.shape, folder, sources[name])
        state[name] = nn.Parameter(torch.empty(empty.shape, dtype=dtype).copy_(weight))
    if config.tie_weights:
        state['lm_head.weight'] = state['transformer.wte.weight']
    model.load_state_dict(state, assign=True)
    return model.eval(), asdict(config)


def is_safetensors(path):
    """Whether a file is there and, by the length that its header states, complete."""
    try:
        with safe_open(path, 'pt'):
            return True
    except (OSError, SafetensorError):
        return False


def find_tensors(folder):
    """{their key: path} of the tensors in a folder, without reading them.

    A safetensors file states its length, so a file that is truncated is found here. Raises
    UserError.
    """
    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, 'pt') as f:
                keys = list(f.keys())
        except FileNotFoundError:
            raise UserError(f'cannot read {path} as a safetensors file: it is not there, and '
                            f'weights are read from no other format') from None
        except (OSError, SafetensorError, ValueError) as e:  # ValueError: no file has such a name
            raise UserError(f'cannot read {path} as a safetensors file: {e}') from None
        for key in keys:
            tensors[key] = path
    return tensors


def weight_files(folder):
    """The paths of model.safetensors or, if there is none, of the files that its index names."""
    single = folder / WEIGHTS
    index = folder / INDEX
    if single.is_file() or not index.is_file():
        return [single]

    weight_map = read_json(index).get('weight_map')  # {tensor: file}
    files = set()
    if isinstance(weight_map, dict):
        files = {str(file) for file in weight_map.values()}
    if not files or any(Path(file).name != file for file in files):
        raise UserError(f'{index} must have a weight_map that names files beside it, '
                        f'and nothing else')
    return [folder / file for file in sorted(files)]


def gpt2_sources(name, tensors):
    """Their keys of the tensors that make our parameter of this name: one for a GPT-2."""
    short = name.removeprefix('transformer.')  # openai-community/gpt2 was saved without the head
    if name not in tensors and short in tensors:
        return [short]
    return [name]


def gpt2_is_no_weight(key):
    """Whether a tensor is a causal mask, saved with some models, or the head of a tied model."""
    return key.endswith(('.attn.bias', '.attn.masked_bias')) or key == 'lm_head.weight'


def gpt2_weight(name, tensor, config):
    """A tensor of GPT-2 in the shape that our parameter of this name has."""
    if name.endswith(GPT2_TRANSPOSED) and tensor.ndim == 2:
        return tensor.t()
    if name.endswith('wpe.weight') and tensor.ndim == 2:
        return tensor[:config.block_size]  # positions beyond a smaller block_size
    return tensor


# Our names in a block, and theirs. What they keep apart, we keep in one matrix: one product instead
# of three, or two
LLAMA_BLOCK = {
    'ln_1.weight': ['input_layernorm.weight'],
    'attn.c_attn.weight': ['self_attn.q_proj.weight', 'self_attn.k_proj.weight',
                           'self_attn.v_proj.weight'],
    'attn.c_attn.bias': ['self_attn.q_proj.bias', 'self_attn.k_proj.bias', 'self_attn.v_proj.bias'],
    'attn.c_proj.weight': ['self_attn.o_proj.weight'],
    'attn.c_proj.bias': ['self_attn.o_proj.bias'],
    'attn.q_norm.weight': ['self_attn.q_norm.weight'],
    'attn.k_norm.weight': ['self_attn.k_norm.weight'],
    'ln_2.weight': ['post_attention_layernorm.weight'],
    'mlp.c_fc.weight': ['mlp.gate_proj.weight', 'mlp.up_proj.weight'],
    'mlp.c_proj.weight': ['mlp.down_proj.weight'],
}
LLAMA_TOP = {
    'transformer.wte.weight': ['model.embed_tokens.weight'],
    'transformer.ln_f.weight': ['model.norm.weight'],
    'lm_head.weight': ['lm_head.weight'],
}


def llama_sources(name, tensors):
    """Their keys of the tensors that make our parameter of this name, in the order of its rows."""
    if name in LLAMA_TOP:
        keys = LLAMA_TOP[name]
    else:
        _, _, layer, rest = name.split('.', 3)  # transformer.h.0.attn.c_attn.weight
        keys = [f'model.layers.{layer}.{key}' for key in LLAMA_BLOCK[rest]]

    short = [key.removeprefix('model.') for key in keys]  # some were saved without the head
    if keys[0] not in tensors and short[0] in tensors:
        return short
    return keys


def llama_is_no_weight(key):
    """Whether a tensor is a table of frequencies, saved with old models, or a tied head."""
    return key.endswith('.rotary_emb.inv_freq') or key == 'lm_head.weight'


class Architecture(NamedTuple):
    """What is particular to a family of models."""
    problems: object  # config.json, block_size -> what we can't compute, a list of messages
    fields: object  # config.json -> fields of GPTConfig
    sources: object  # our parameter's name, {their key: path} -> their keys
    is_no_weight: object  # their key -> whether it is to be passed over
    weight: object  # our parameter's name, their tensor, config -> our tensor


GPT2 = Architecture(gpt2_problems, gpt2_fields, gpt2_sources, gpt2_is_no_weight, gpt2_weight)
LLAMA = Architecture(llama_problems, llama_fields, llama_sources, llama_is_no_weight,
                     weight=lambda name, tensor, config: tensor)
ARCHITECTURES = {'gpt2': GPT2, 'llama': LLAMA, 'mistral': LLAMA, 'qwen2': LLAMA, 'qwen3': LLAMA}


def read_tensor(path, key):
    """Read one tensor of a safetensors file. Raises UserError."""
    # The file is mapped into memory. Opened anew for each tensor, the pages of those that were
    # copied before are given back.
    try:
        with safe_open(path, 'pt') as f:
            return f.get_tensor(key)
    except (OSError, SafetensorError, RuntimeError, TypeError, AttributeError) as e:
        # the last three: a data type that this PyTorch lacks
        raise UserError(f'cannot read {key} in {path}: {e}') from None


def check_floats(tensor, folder, path, key):
    """Raise UserError if a tensor is not of floating-point numbers, or not finite."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise does_not_fit(folder, [f'{key} is of {tensor.dtype}'])
    if not all_finite(tensor):
        raise UserError(f'{key} in {path} has values that are infinite or no numbers (NaN): '
                        f'download it anew')


def join_parts(parts, shape, folder, keys):
    """The rows of some tensors below each other, of this shape. Raises UserError if they are
    not."""
    same_width = {part.shape[1:] for part in parts}
    if len(same_width) != 1 or any(part.ndim == 0 for part in parts):
        raise does_not_fit(folder, [f'{" and ".join(keys)} are of different widths'])
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    if weight.shape != shape:
        problem = f'{" and ".join(keys)} makes {tuple(weight.shape)}, not {tuple(shape)}'
        raise does_not_fit(folder, [problem])
    return weight


def does_not_fit(folder, problems):
    """A UserError that says what is wrong with the tensors of a folder."""
    return UserError(f'the weights in {folder} do not fit its config.json: '
                     f'{"; ".join(problems[:3])}')


# --------------------------------------------------------------------------------------------------
# Tokenizer

def load_tokenizer(name):
    """The tokenizer of a model: GPT-2's, a BPE that export_folder() wrote, or theirs as it is.

    Raises UserError if the folder has none that can be read.
    """
    folder = fetch(name)
    if str(name) in NAMES and NAMES[str(name)].is_pinned:
        return make_tokenizer('gpt2')

    vocab_size = read_json(folder / 'config.json').get('vocab_size', 50257)
    if (folder / 'tokenizer.json').is_file():
        tok = own_tokenizer(folder, vocab_size)
        # Ours knows one id that ends a text, and a chat template may write any special token
        ends = eos_ids_of(folder)
        if tok is not None and ends in ([], tok.eos_ids) and template_source(folder) is None:
            return tok
        return huggingface_tokenizer(folder, vocab_size)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        return huggingface_tokenizer(folder, vocab_size)

    if (folder / 'vocab.json').is_file() and is_gpt2_vocabulary(read_json(folder / 'vocab.json')):
        return make_tokenizer('gpt2')

    # A size alone says little about a tokenizer: GPT-2's is taken only if there is no sign of
    # another. 50,304 is its size rounded up, which computes faster
    others = [file.name for pattern in ('vocab.*', 'merges.txt', '*.model', 'dict.*', 'added_*')
              for file in sorted(folder.glob(pattern))]
    for file in ('tokenizer_config.json', 'config.json'):
        if (folder / file).is_file():
            kind = read_json(folder / file).get('tokenizer_class')
            if kind not in (None, 'GPT2Tokenizer', 'GPT2TokenizerFast'):
                others.append(f'a {short_repr(kind)} in {file}')
    if vocab_size in (50257, 50304) and not others:
        print(f'{folder} has no tokenizer: taking GPT-2\'s, as its vocabulary has that size',
              file=sys.stderr)
        return make_tokenizer('gpt2')
    kind = f'only {others[0]}' if others else 'none'
    raise UserError(f'{folder} has {vocab_size} ids of its own, but no tokenizer.json that says '
                    f'what they mean ({kind}): make one with transformers, '
                    f'AutoTokenizer.from_pretrained(…).save_pretrained({str(folder)!r})')


def is_gpt2_vocabulary(vocab):
    """Whether the content of a vocab.json, {token: id}, is GPT-2's. It is enough to tell."""
    if len(vocab) != 50257:
        return False
    tok = make_tokenizer('gpt2')
    ids = {printable(token): i for i, token in enumerate(tok.tokens) if token}
    return ids.items() <= vocab.items()


def own_tokenizer(folder, vocab_size):
    """GPT-2's tokenizer or a BpeTokenizer, if that is what a tokenizer.json says; else None.

    Datasets that were prepared with them then fit the model.
    """
    theirs = read_json(folder / 'tokenizer.json')
    vocab = vocab_of(theirs)
    candidates = []
    bpe = bpe_of(theirs)
    if bpe is not None:
        candidates.append(bpe)
    if vocab_size == 50257 == len(vocab):
        try:
            candidates.append(make_tokenizer('gpt2'))
        except UserError:  # its files are not here, and there is no network
            pass

    # The same size is not enough: each id must stand for the same token, and texts must be cut
    # into the same words
    for tok in candidates:
        if tok.vocab_size != vocab_size or not splits_like(tok, theirs):
            continue
        ids = {printable(token): i for i, token in enumerate(tok.tokens) if token}
        if ids.items() <= vocab.items():
            return tok
    return None


def splits_like(tok, theirs):
    """Whether the content of a tokenizer.json cuts texts into words as a BytePairTokenizer does."""
    if theirs.get('normalizer') is not None:
        return False
    ours = json.loads(tok.tokenizer_json())['pre_tokenizer']
    theirs = theirs.get('pre_tokenizer')
    if theirs == ours:
        return True
    gpt2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    return isinstance(theirs, dict) and gpt2 | theirs == gpt2 and tok.split == GPT2_SPLIT


def huggingface_tokenizer(folder, vocab_size):
    """The HuggingFaceTokenizer of a folder. Raises UserError if it doesn't fit the model."""
    path = folder / 'tokenizer.json'
    try:
        if path.is_file():
            text = path.read_text(encoding='utf-8')
        else:
            path = folder / 'vocab.json'
            text = json.dumps(tokenizer_json_of_gpt2(folder), ensure_ascii=False)
        tok = HuggingFaceTokenizer(text, eos_ids=eos_ids_of(folder))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read {path}: {e}') from None
    if tok.vocab_size > vocab_size:
        raise UserError(f'{path} has ids up to {tok.vocab_size - 1}, but the model knows only '
                        f'{vocab_size}: they do not belong together')
    return tok


def tokenizer_json_of_gpt2(folder):
    """The content of a tokenizer.json for GPT-2's older vocab.json and merges.txt, as a dict."""
    vocab = read_json(folder / 'vocab.json')
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith('#version')]

    # What is special, and what was added to the vocabulary later
    added = {}
    if (folder / 'added_tokens.json').is_file():
        added = read_json(folder / 'added_tokens.json')
    special = set(special_token_texts(folder).values()) | {'<|endoftext|>'}
    ids = {text: vocab[text] for text in sorted(special) if text in vocab} | added
    added_tokens = []
    for text, token_id in sorted(ids.items(), key=lambda item: item[1]):
        added_tokens.append({
            'id': token_id, 'content': text, 'special': text in special, 'single_word': False,
            'lstrip': False, 'rstrip': False, 'normalized': text not in special,
        })
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': True}
    return {
        'version': '1.0',
        'added_tokens': added_tokens,
        'pre_tokenizer': byte_level,
        'decoder': byte_level,
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges},
    }


def tokenizer_settings(folder):
    """tokenizer_config.json, and before it the special_tokens_map.json of older folders: a dict."""
    settings = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    return settings


def special_token_texts(folder):
    """{role: text} of a folder's special tokens, such as {'eos_token': '<|im_end|>'}."""
    texts = {}
    for role, token in tokenizer_settings(folder).items():
        if isinstance(token, dict):  # with its flags
            token = token.get('content')
        if role.endswith('_token') and isinstance(token, str):
            texts[role] = token
    return texts


def eos_ids_of(folder):
    """The ids that end a reply: a list of int, from the first file that says so."""
    for name in ('generation_config.json', 'config.json'):
        if (folder / name).is_file():
            ids = read_json(folder / name).get('eos_token_id')
            if isinstance(ids, int):
                return [ids]
            if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
                return ids

    eos_token = special_token_texts(folder).get('eos_token')
    path = folder / 'tokenizer.json'
    added = read_json(path).get('added_tokens') if path.is_file() else None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get('content') == eos_token is not None:
            return [token['id']] if type(token.get('id')) is int else []
    return []


def load_sampling(name):
    """How its makers sample from a model: {option of SamplingParams: value}.

    generation_config.json says so, if do_sample is true: transformers obeys it as well.
    """
    folder = fetch(name)
    path = folder / 'generation_config.json'
    if not path.is_file():
        return {}
    generation = read_json(path)
    if generation.get('do_sample') is not True:
        return {}
    sampling = {}
    for option in ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'):
        value = generation.get(option)
        if value is None:
            continue
        if type(value) not in (int, float):
            raise UserError(f'{path}: {option} must be a number, got {value!r}')
        sampling[option] = value
    if sampling.get('top_k') == 0:  # there it means all tokens
        sampling['top_k'] = None
    return sampling


def load_template(name):
    """The chat template of a model: a JinjaTemplate, or None if it has none. Raises UserError."""
    folder = fetch(name)
    source = template_source(folder)
    if source is None:
        return None
    try:
        return JinjaTemplate(source, special_token_texts(folder))
    except ValueError as e:
        raise UserError(f'cannot use the chat template in {folder}: {e}') from None


def template_source(folder):
    """The chat template of a folder as text, None if it has none. Raises UserError."""
    source = tokenizer_settings(folder).get('chat_template')
    if isinstance(source, list):  # several by name: the default is for chat
        defaults = [entry.get('template') for entry in source
                    if isinstance(entry, dict) and entry.get('name') == 'default']
        source = defaults[0] if defaults else None
    if (folder / 'chat_template.jinja').is_file():  # where newer folders have it
        source = (folder / 'chat_template.jinja').read_text(encoding='utf-8', errors='replace')
    return source if isinstance(source, str) and source.strip() else None


def vocab_of(tokenizer_json):
    """{token: id} from the content of a tokenizer.json; {} if it has none."""
    try:
        vocab = tokenizer_json['model']['vocab']
    except (KeyError, TypeError):
        return {}
    return vocab if isinstance(vocab, dict) else {}


def bpe_of(tokenizer_json):
    """The BpeTokenizer that a tokenizer.json describes, or None if it describes something else.

    Its ids are right only if they follow the order of the merges, as ours do: see load_tokenizer().
    """
    try:
        merges = []
        for merge in tokenizer_json['model']['merges']:
            if not isinstance(merge, str):  # newer files: a list of two
                merge = ' '.join(merge)
            merges.append(merge)
        special_tokens = []
        for token in tokenizer_json['added_tokens']:
            special_tokens.append((token['id'], special_token_name(token['content'])))
        special_tokens.sort()
        return BpeTokenizer(merges, [special_name for _, special_name in special_tokens])
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------
# Resize: room for more tokens

def resize_token_embeddings(model, tok, model_tok, folder):
    """Add rows to a loaded model for the special tokens that only a dataset's tokenizer has.

    tok: the dataset's tokenizer. model_tok: the model's own. folder: of the dataset, for the
    message. The new rows are the mean of all others: they know nothing, but are no outliers either.
    Raises UserError if the ids mean something else to the model.
    """
    if tok.tokens[:len(model_tok.tokens)] != model_tok.tokens:
        raise UserError(f'{folder} has another tokenizer than this model: prepare it with '
                        f'--tokenizer=NAME, the same that --init_from names, or take another '
                        f'dataset')
    new_rows = tok.vocab_size - model.config.vocab_size
    if new_rows <= 0:
        return

    add_mean_rows(model.transformer.wte, new_rows)
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    else:
        add_mean_rows(model.lm_head, new_rows)
    model.config.vocab_size = tok.vocab_size
    model.transformer.wte.num_embeddings = tok.vocab_size
    model.lm_head.out_features = tok.vocab_size


def add_mean_rows(module, count):
    """Append to a module's weight so many rows, each the mean of those it has."""
    weight = module.weight.data
    mean = weight.mean(dim=0, keepdim=True)
    module.weight = nn.Parameter(torch.cat((weight, mean.expand(count, -1))))


# --------------------------------------------------------------------------------------------------
# Export: ours to theirs

# What a GPT must be made of to be one of these, by the names of its switches: the values that they
# can compute, the one to recommend first
GPT2_SWITCHES = {
    'pos': ['learned'],
    'norm': ['layernorm'],
    'norm_position': ['pre'],
    'act': list(dict.fromkeys(GPT2_ACTIVATIONS.values())),
    'qk_norm': [False],
    'token_shift': [False],
    'softcap': [0],
    'cutoffs': [()],
    'head_bias': [False],
}
LLAMA_SWITCHES = {
    'pos': ['rotary'],
    'norm': ['rmsnorm'],
    'norm_position': ['pre'],
    'act': ['swiglu'],
    'bias': [False],
    'qk_norm': [False, 'rmsnorm'],
    'token_shift': [False],
    'softcap': [0],
    'cutoffs': [()],
    'head_bias': [False],
}
LLAMA_CLASSES = {  # model_type: the class in transformers
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
}


def export_folder(model, tok, folder, template=None):
    """Write a GPT as a folder that transformers.AutoModelForCausalLM and AutoTokenizer load.

    template: the ChatTemplate or JinjaTemplate it was trained with, or None. Raises UserError if
    no architecture of theirs can hold this model, or if the folder is not new or empty.
    """
    folder = Path(folder)
    model_type = model_type_of(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already: name a new folder, or remove it')

    if model_type == 'gpt2':
        config = gpt2_config(model.config)
        tensors = gpt2_tensors(model)
    else:
        config = llama_config(model.config, model_type)
        tensors = llama_tensors(model)

    # Which ids begin and end a text is told twice: to whoever reads the model, or generates with it
    special = special_ids(tok, template)
    generation = {
        'bos_token_id': special.get('bos_token'),
        'eos_token_id': tok.eos_ids[0] if len(tok.eos_ids) == 1 else tok.eos_ids or None,
        'pad_token_id': special.get('pad_token'),
    }
    texts = {
        'config.json': json.dumps(config | generation, indent=1),
        'generation_config.json': json.dumps(generation, indent=1),
    }
    content = tokenizer_json(tok)
    if content is not None:  # not every kind of tokenizer fits that format
        settings = tokenizer_config(tok, template, model.config.block_size)
        texts['tokenizer.json'] = content
        texts['tokenizer_config.json'] = json.dumps(settings, indent=1)
    write_folder(folder, texts, tensors)


# Which architecture


def model_type_of(model):
    """The model_type of a GPT in Hugging Face's format: gpt2, llama, qwen2 or qwen3.

    Raises UserError, with the options to change, if it has parts that none of them has.
    """
    if not isinstance(model, GPT):
        raise UserError('only a GPT can be written for other tools, and this is an '
                        'encoder-decoder: train with --arch=gpt, as config/llama_small.py does, or '
                        'export it for sample.py with --to=FILE.pt')
    config = model.config
    not_in_gpt2 = foreign_switches(config, GPT2_SWITCHES | gpt2_extra_switches(config))
    not_in_llama = foreign_switches(config, LLAMA_SWITCHES | llama_bias_switches(config))
    if not not_in_gpt2:
        return 'gpt2'
    if not not_in_llama:
        if config.qk_norm:
            return 'qwen3'
        has_only_qkv_bias = config.qkv_bias and not config.attn_bias
        return 'qwen2' if has_only_qkv_bias else 'llama'

    # Name what is nearer
    family, foreign = 'Llama', not_in_llama
    if len(not_in_gpt2) < len(not_in_llama):
        family, foreign = 'GPT-2', not_in_gpt2
    found = ', '.join(f'{name}={getattr(config, name)}' for name in foreign)
    options = ' '.join(f'--{name}={value}' for name, value in foreign.items())
    raise UserError(f'{family}, the nearest that other tools can compute, has no {found}: train '
                    f'with {options}, or as config/llama_small.py does, or export it for sample.py '
                    f'with --to=FILE.pt')


def foreign_switches(config, switches):
    """{name: value to set instead} of the switches of a config that are not as they must be."""
    foreign = {}
    for name, values in switches.items():
        if getattr(config, name) not in values:
            foreign[name] = values[0]
    return foreign


def gpt2_extra_switches(config):
    """GPT-2 has biases everywhere or, which computes the same, zeros; and heads of one kind."""
    return {
        'attn_bias': [None, config.bias],
        'qkv_bias': [None, config.bias],
        'n_kv_head': [None, config.n_head],
        'head_dim': [None, config.n_embd // config.n_head],
    }


def llama_bias_switches(config):
    """Llama may have biases in all projections of attention; Qwen2 in all but the last."""
    if config.attn_bias:
        return {'qkv_bias': [None, True]}
    if config.qk_norm:
        return {'qkv_bias': [None, False]}
    return {}


# Config and tensors


def gpt2_config(config):
    """GPT-2's config.json for a GPTConfig, as a dict."""
    theirs = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel']}
    for key, ours in GPT2_SIZES.items():
        theirs[key] = getattr(config, ours)
    their_activation = {}
    for key, ours in GPT2_ACTIVATIONS.items():
        their_activation.setdefault(ours, key)
    theirs |= {
        'n_ctx': config.block_size,
        'n_inner': config.n_inner,
        'activation_function': their_activation[config.act],
        'layer_norm_epsilon': config.norm_eps,
        'resid_pdrop': config.dropout,
        'embd_pdrop': config.dropout,
        'attn_pdrop': config.attn_dropout,
        'torch_dtype': 'float32',
        'tie_word_embeddings': config.tie_weights,
    }
    return theirs


def gpt2_tensors(model, transposed=True):
    """The weights of a GPT as GPT-2 keeps them: {name: float32 tensor on the CPU}.

    transposed: linear layers as (in, out), as transformers has them, instead of (out, in).
    """
    config = model.config
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == 'lm_head.weight' and config.tie_weights:
            continue
        outputs = weight.size(0)
        if transposed and name.endswith(GPT2_TRANSPOSED):
            weight = weight.t()
        tensors[name] = weight.float().cpu().contiguous()

        # GPT-2 has biases everywhere; those of zero compute the same as none
        if not config.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(outputs)
    return tensors


def llama_config(config, model_type):
    """The config.json of a Llama, Qwen2 or Qwen3 for a GPTConfig, as a dict."""
    theirs = {'model_type': model_type, 'architectures': [LLAMA_CLASSES[model_type]]}
    for key, ours in LLAMA_SIZES.items():
        theirs[key] = getattr(config, ours)
    theirs |= {
        'intermediate_size': config.n_inner or 4 * config.n_embd,
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_size,
        'hidden_act': 'silu',
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta,
        'rope_scaling': config.rope_scaling,
        'attention_bias': bool(config.attn_bias),
        'attention_dropout': config.attn_dropout,
        'mlp_bias': False,
        'torch_dtype': 'float32',
        'tie_word_embeddings': config.tie_weights,
    }
    return theirs


def llama_tensors(model):
    """The weights of a GPT as a Llama keeps them: {name: float32 tensor on the CPU}."""
    config = model.config
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == 'lm_head.weight' and config.tie_weights:
            continue
        rows = [len(weight)]
        if '.c_attn.' in name:  # what we keep in one matrix, they keep apart
            kv_rows = config.num_kv_heads * config.head_size
            rows = [config.n_head * config.head_size, kv_rows, kv_rows]
        if '.c_fc.' in name:
            rows = [len(weight) // 2] * 2
        for key, part in zip(llama_sources(name, tensors), weight.float().cpu().split(rows)):
            tensors[key] = part.contiguous()
    return tensors


# Tokenizer and chat template


def tokenizer_json(tok):
    """The content of a tokenizer.json that encodes as tok does, or None if that is impossible.

    One difference remains: Hugging Face's libraries read a typed <|endoftext|> as the special
    token.
    """
    if isinstance(tok, HuggingFaceTokenizer):
        return tok.tokenizer_json
    if isinstance(tok, BytePairTokenizer):
        return tok.tokenizer_json()
    if isinstance(tok, ByteTokenizer):  # byte-pair encoding that has not learned anything
        return BpeTokenizer([], list(tok.special_tokens)).tokenizer_json()
    if isinstance(tok, CharTokenizer):
        return char_tokenizer_json(tok)
    return None


def char_tokenizer_json(tok):
    """The content of a tokenizer.json for a CharTokenizer: every character is a word.

    As with ours, a character that is not in the vocabulary is an error. None if the vocabulary has
    surrogates, which no other tool can read.
    """
    vocab = {character: token_id for token_id, character in enumerate(tok.chars)}
    if any('\ud800' <= character <= '\udfff' for character in vocab):
        return None
    added_tokens = []
    for name, token_id in tok.special_tokens.items():
        vocab[special_token_text(name)] = token_id
        added_tokens.append({'id': token_id, 'content': special_token_text(name), 'special': True,
                             'single_word': False, 'lstrip': False, 'rstrip': False,
                             'normalized': False})
    content = {
        'version': '1.0',
        'added_tokens': added_tokens,
        'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'},
                          'behavior': 'Isolated', 'invert': False},
        'decoder': {'type': 'Fuse'},  # without spaces in between
        'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<|unknown|>'},
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


def tokenizer_config(tok, template, block_size):
    """The content of a tokenizer_config.json, as a dict."""
    texts = special_texts(tok)
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'padding_side': 'left',  # generation continues each row of a batch at its right end
        'clean_up_tokenization_spaces': False,
        'model_input_names': ['input_ids', 'attention_mask'],
    }
    for role, token_id in special_ids(tok, template).items():
        config[role] = texts[token_id]
    if template is not None:
        config['chat_template'] = jinja_source(template, tok)
    return config


def special_texts(tok):
    """{id: text} of the special tokens, as other tools write them."""
    texts = {}
    for name, token_id in tok.special_tokens.items():
        texts[token_id] = special_token_text(name)
        if isinstance(tok, HuggingFaceTokenizer):
            texts[token_id] = tok.library.id_to_token(token_id)
    return texts


def special_ids(tok, template):
    """The ids of bos_token, eos_token and pad_token, and whatever else a JinjaTemplate names."""
    ids = {
        'bos_token': tok.decoder_start_id,  # what a generation without a prompt begins with
        'eos_token': tok.eos_id,
        'pad_token': tok.special_tokens.get('pad', tok.eos_id),
    }
    texts = special_texts(tok)
    if isinstance(template, JinjaTemplate):
        id_of = {text: token_id for token_id, text in texts.items()}
        for role, text in template.special.items():
            ids[role] = id_of.get(text)
    return {role: token_id for role, token_id in ids.items() if token_id in texts}


def jinja_source(template, tok):
    """A chat template in Jinja that writes messages as the template does.

    For a ChatTemplate: the newest max_turns of them, then what a reply begins with. It knows no
    system messages: one at the beginning is left out.
    """
    if isinstance(template, JinjaTemplate):
        return template.source

    texts = special_texts(tok)
    reply_start = texts[tok.decoder_start_id] + template.reply_prefix
    return ''.join([
        '{% if messages and messages[0]["role"] == "system" %}',
        '{% set messages = messages[1:] %}',
        '{% endif %}',
        f'{{{{ {jinja_piece(template.bos, tok)} }}}}',
        f'{{% for message in messages[-{template.max_turns}:] %}}',
        f'{{% if not loop.first %}}{{{{ {jinja_piece(template.separator, tok)} }}}}{{% endif %}}',
        f'{{{{ {jinja_turn(template)} }}}}',
        '{% endfor %}',
        '{% if add_generation_prompt %}',
        f'{{{{ {jinja_string(reply_start)} }}}}',
        '{% endif %}',
    ])


def jinja_string(text):
    """A text as Jinja code, which has Python's escapes: JSON's are among them."""
    return json.dumps(text, ensure_ascii=False)


def jinja_piece(text, tok):
    """Jinja code for a text or, for '<name>', for the special token of that name."""
    name = text[1:-1]
    if text == f'<{name}>' and name in tok.special_tokens:
        text = special_texts(tok)[tok.special_tokens[name]]
    return jinja_string(text)


def jinja_turn(template):
    """Jinja code for one turn of a ChatTemplate, whose speaker follows from the message's role.

    >>> from pocket.template import ChatTemplate
    >>> jinja_turn(ChatTemplate(turn='A: {text}'))
    '"A: " ~ message["content"]'
    """
    speaker = (f'({jinja_string(template.user)} if message["role"] == "user" '
               f'else {jinja_string(template.assistant)})')
    code = []
    for part in re.split('({speaker}|{text})', template.turn):
        if part == '{speaker}':
            code.append(speaker)
        elif part == '{text}':
            code.append('message["content"]')
        elif part:
            code.append(jinja_string(part))
    return ' ~ '.join(code)


# Files


def write_folder(folder, texts, tensors):
    """Write a new folder, which appears complete or not at all. texts: {name of a file: content}.

    Into an empty folder that is there already, the files go in order, the weights last.
    """
    folder = folder.resolve()
    if folder.is_dir():
        write_files(folder, texts, tensors)
        return

    temporary = folder.with_name(f'.{folder.name}.export.tmp')
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed export has left
    try:
        write_files(temporary, texts, tensors)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder, texts, tensors):
    """Write texts, {name: content}, and weights to a folder, which is made if it is missing."""
    make_folder(folder, '--to=FOLDER')
    for name, text in texts.items():
        content = text.encode('utf-8')
        atomic_write(folder / name, lambda f, content=content: f.write(content))
    atomic_write(folder / WEIGHTS, lambda f: write_safetensors(f, tensors))


def write_safetensors(file, tensors):
    """Write {name: float32 tensor on the CPU} to a file in the format safetensors.

    Its own save() holds all weights in memory two times more. The format is a header in JSON, the
    length of the header before it, and the tensors after it:
    https://huggingface.co/docs/safetensors
    """
    header = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + tensor.nbytes
        header[name] = {
            'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [start, end],
        }
    content = json.dumps(header).encode('utf-8')
    content += b' ' * (-len(content) % 8)  # tensors begin at a multiple of 8 bytes

    file.write(len(content).to_bytes(8, 'little'))
    file.write(content)
    for tensor in tensors.values():
        file.write(tensor.numpy())
