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
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from model import GPT, GPTConfig
from pocket.checkpoint import all_finite, build_on_meta, check_config
from pocket.errors import UserError
from pocket.files import atomic_write, download, find_path, make_folder
from pocket.template import JinjaTemplate
from pocket.tokenizer import (
    BpeTokenizer,
    HuggingFaceTokenizer,
    make_tokenizer,
    printable,
    special_token_name,
)

# --------------------------------------------------------------------------------------------------
# Fetch: the folder of a model

class Repository(NamedTuple):
    """A model on huggingface.co, at one commit: everybody gets the same weights, later, too."""
    name: str
    commit: str = 'main'  # the newest: for those whose weights we have never seen
    sha256: str | None = None  # of model.safetensors


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

    repository = NAMES.get(name) or Repository(name)
    for folder in cached_folders(repository):
        try:
            read_json(folder / 'config.json')
            find_tensors(folder)
            return folder
        except UserError:  # not there, or truncated
            pass
    return download_model(repository)


def cache_folder(repository_name):
    """Where Hugging Face's tools cache a repository; the variables and defaults are theirs."""
    cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    home = os.environ.get('HF_HOME') or Path(cache, 'huggingface')
    hub = (os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE')
           or Path(home, 'hub'))
    hub = Path(os.path.expandvars(hub)).expanduser()
    return hub / f'models--{repository_name.replace("/", "--")}'


def cached_folders(repository):
    """Yield the folders that may hold a downloaded model: the newest snapshot, then our commit."""
    former_name = repository.name.split('/')[1]  # until 2024 these repositories had no owner
    for repository_name in (former_name, repository.name):
        cache = cache_folder(repository_name)
        main = cache / 'refs' / 'main'  # holds the commit of the newest snapshot
        if main.is_file():
            yield cache / 'snapshots' / main.read_text(encoding='utf-8').strip()
        yield cache / 'snapshots' / repository.commit


OPTIONAL_FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
                  'chat_template.jinja')


def download_model(repository):
    """Download a model into the cache and return its folder. Raises UserError.

    Hugging Face's tools put links to blobs into a snapshot; on Windows, plain files. We do as on
    Windows everywhere, which they read just as well.
    """
    cache = cache_folder(repository.name)
    folder = cache / 'snapshots' / repository.commit
    main = cache / 'refs' / 'main'
    for needed in (folder, main.parent):
        make_folder(needed, 'the environment variable HF_HOME')

    endpoint = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    url = f'{endpoint}/{repository.name}/resolve/{repository.commit}'
    advice = ('Does it exist, and can anybody download it? Without a network, name a folder with a '
              'model in Hugging Face\'s format: --init_from=FOLDER')
    is_gpt2 = repository.sha256 is not None  # whose tokenizer we have from tiktoken
    if not is_gpt2:
        for file in OPTIONAL_FILES:
            download_optional(f'{url}/{file}', folder / file, advice)
    weights = ['model.safetensors']
    if not is_gpt2:
        index = folder / 'model.safetensors.index.json'
        if download_optional(f'{url}/{index.name}', index, advice):  # a large model, in shards
            weights = [path.name for path in weight_files(folder)]
    config = folder / 'config.json'
    config.unlink(missing_ok=True)  # its sha256 is not known: download() would keep a damaged one
    for file in weights:
        download([f'{url}/{file}'], folder / file, repository.sha256, advice)
    download([f'{url}/config.json'], config, None, advice)  # last: now the folder is complete
    read_json(config)  # it may be the page of a proxy

    if not main.is_file():
        atomic_write(main, lambda f: f.write(repository.commit.encode()))
    return folder


def download_optional(url, path, advice):
    """Download a file that not every model has. Returns whether it is there. Raises UserError."""
    import requests
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
    'gelu_pytorch_tanh': 'gelu',
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
    problems = architecture.problems(theirs)
    if problems:
        raise UserError(f'{path}: {"; ".join(problems)}')
    fields = architecture.fields(theirs)

    # Check their values first: a block_size that is not a number has no larger or smaller.
    try:
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


def gpt2_problems(theirs):
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
}


def llama_problems(theirs):
    """What the config.json of a Llama asks for that our GPT has no part for: a list of messages."""
    problems = []
    for key, supported in LLAMA_SUPPORTED.items():
        value = theirs.get(key, supported[0])
        if value not in supported:
            problems.append(f'{key} is {value!r}, only {supported[0]!r} can be read')
    for key in LLAMA_SIZES:
        optional = key in ('num_key_value_heads', 'head_dim')
        if type(theirs.get(key)) is not int and not (optional and theirs.get(key) is None):
            problems.append(f'{key} is {theirs.get(key)!r}, not a whole number')
    experts = theirs.get('num_local_experts') or theirs.get('num_experts')
    if experts:
        problems.append(f'it is a mixture of {experts} experts, which pocketGPT does not have')

    # Sliding windows: attention to the latest tokens only. One that is as long as the context is
    # none
    window = theirs.get('sliding_window')
    uses_window = theirs.get('use_sliding_window', theirs.get('model_type') == 'mistral')
    length = theirs.get('max_position_embeddings')
    if window and uses_window and isinstance(length, int) and window < length:
        problems.append(f'sliding_window is {window} with {length} positions: pocketGPT attends to '
                        f'all of them')
    scaling = theirs.get('rope_scaling')
    if scaling is not None and rope_type_of(scaling) not in ('default', 'linear', 'llama3'):
        problems.append(f'rope_scaling is {rope_type_of(scaling)!r}, only linear and llama3 can be '
                        f'read')
    return problems


def rope_type_of(scaling):
    """The kind of a rope_scaling: 'rope_type', which was called 'type' in older configs."""
    if not isinstance(scaling, dict):
        return repr(scaling)
    return scaling.get('rope_type', scaling.get('type'))


def llama_fields(theirs):
    """The fields of GPTConfig that describe the same model as the config.json of a Llama."""
    model_type = theirs['model_type']
    has_bias = theirs.get('attention_bias', False)
    fields = {
        'pos': 'rotary',
        'rope_theta': float(theirs.get('rope_theta', 10000.0)),
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
    scaling = theirs.get('rope_scaling')
    if scaling is not None and rope_type_of(scaling) != 'default':
        fields['rope_scaling'] = {**scaling, 'rope_type': rope_type_of(scaling)}
    for key, ours in LLAMA_SIZES.items():
        fields[ours] = theirs.get(key)
    return fields


def architecture_of(theirs, path):
    """The Architecture of a config.json. Raises UserError if it is none that we can compute."""
    model_type = theirs.get('model_type', 'gpt2')
    if model_type not in ARCHITECTURES:
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
    single = folder / 'model.safetensors'
    index = folder / 'model.safetensors.index.json'
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
        return LLAMA_TOP[name]
    _, _, layer, rest = name.split('.', 3)  # transformer.h.0.attn.c_attn.weight
    return [f'model.layers.{layer}.{key}' for key in LLAMA_BLOCK[rest]]


def llama_is_no_weight(key):
    """Whether a tensor is a table of frequencies, saved with old models, or a tied head."""
    return key.endswith('.rotary_emb.inv_freq') or key == 'lm_head.weight'


class Architecture(NamedTuple):
    """What is particular to a family of models."""
    problems: object  # config.json -> what we can't compute, a list of messages
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
    vocab_size = read_json(folder / 'config.json').get('vocab_size', 50257)
    candidates = []
    if vocab_size == 50257 and not (folder / 'vocab.txt').is_file():
        candidates.append(make_tokenizer('gpt2'))

    # What the folder itself says of its tokens, if anything. The older vocab.json has no merges,
    # but is enough to tell whether the tokens are GPT-2's.
    vocab = None
    if (folder / 'tokenizer.json').is_file():
        theirs = read_json(folder / 'tokenizer.json')
        vocab = vocab_of(theirs)
        bpe = bpe_of(theirs)
        if bpe is not None:
            candidates.append(bpe)
    elif (folder / 'vocab.json').is_file():
        vocab = read_json(folder / 'vocab.json')

    # The same size is not enough: each id must stand for the same token
    for tok in candidates:
        if tok.vocab_size != vocab_size:
            continue
        ids = {printable(token): i for i, token in enumerate(tok.tokens) if token}
        if vocab is None or ids.items() <= vocab.items():
            return tok
    if (folder / 'tokenizer.json').is_file():
        return huggingface_tokenizer(folder, vocab_size)
    raise UserError(f'{folder} has a vocabulary of {vocab_size} of its own, but no tokenizer.json '
                    f'that says what its ids mean')


def huggingface_tokenizer(folder, vocab_size):
    """The HuggingFaceTokenizer of a folder. Raises UserError if it doesn't fit the model."""
    path = folder / 'tokenizer.json'
    try:
        text = path.read_text(encoding='utf-8')
        tok = HuggingFaceTokenizer(text, eos_ids=eos_ids_of(folder))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read {path}: {e}') from None
    if tok.vocab_size > vocab_size:
        raise UserError(f'{path} has {tok.vocab_size} ids, but the model\'s embedding only '
                        f'{vocab_size}')
    return tok


def eos_ids_of(folder):
    """The ids that end a reply: a list of int, from generation_config.json or else config.json."""
    for name in ('generation_config.json', 'config.json'):
        if (folder / name).is_file():
            ids = read_json(folder / name).get('eos_token_id')
            if isinstance(ids, int):
                return [ids]
            if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
                return ids
    return []


def load_template(name):
    """The chat template of a model: a JinjaTemplate, or None if it has none. Raises UserError."""
    folder = fetch(name)
    path = folder / 'tokenizer_config.json'
    settings = read_json(path) if path.is_file() else {}
    source = settings.get('chat_template')
    if isinstance(source, list):  # several by name: the default is for chat
        named = {entry.get('name'): entry.get('template') for entry in source
                 if isinstance(entry, dict)}
        source = named.get('default')
    if (folder / 'chat_template.jinja').is_file():  # where newer folders have it
        source = (folder / 'chat_template.jinja').read_text(encoding='utf-8', errors='replace')
    if not isinstance(source, str):
        return None
    special = {}
    for role in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        token = settings.get(role)
        if isinstance(token, dict):  # with its flags
            token = token.get('content')
        if isinstance(token, str):
            special[role] = token
    try:
        return JinjaTemplate(source, special)
    except ValueError as e:
        raise UserError(f'cannot use the chat template in {folder}: {e}') from None


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
                        f'--tokenizer=gpt2, or take --dataset=shakespeare_gpt2')
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

def export_folder(model, tok, folder):
    """Write a GPT and its tokenizer as a folder that transformers.AutoModelForCausalLM loads.

    Raises UserError if GPT-2's format can't hold this model, or if the folder is not new or empty.
    """
    folder = Path(folder)
    check_is_gpt2(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already: name a new folder, or remove it')

    # The end-of-text token is also what generation begins with
    ends = {'bos_token_id': tok.decoder_start_id, 'eos_token_id': tok.eos_id}
    config = gpt2_config(model.config) | ends
    files = {
        'config.json': json.dumps(config, indent=1).encode(),
        'generation_config.json': json.dumps(ends).encode(),
    }
    if hasattr(tok, 'tokenizer_json'):  # not every kind of tokenizer fits that format
        files['tokenizer.json'] = tok.tokenizer_json().encode('utf-8')
    files['model.safetensors'] = save(gpt2_tensors(model), {'format': 'pt'})
    write_folder(folder, files)


def check_is_gpt2(model):
    """Raise UserError, with a list, if a model has parts that GPT-2 lacks."""
    if not isinstance(model, GPT):
        raise UserError('GPT-2 has no encoder: this model can\'t be written in its format')
    config = model.config
    gpt2 = {
        'pos': ['learned'],
        'norm': ['layernorm'],
        'norm_position': ['pre'],
        'act': list(GPT2_ACTIVATIONS.values()),
        'qk_norm': [False],
        'token_shift': [False],
        'softcap': [0],
        'cutoffs': [()],
        'head_bias': [False],
        'attn_bias': [None, config.bias],
    }
    foreign = []
    for name, values in gpt2.items():
        value = getattr(config, name)
        if value not in values:
            foreign.append(f'{name}={value}')
    if foreign:
        raise UserError(f'GPT-2 has no {", ".join(foreign)}: '
                        f'this model can\'t be written in its format')


def gpt2_config(config):
    """GPT-2's config.json for a GPTConfig, as a dict."""
    theirs = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel']}
    for key, ours in GPT2_SIZES.items():
        theirs[key] = getattr(config, ours)
    their_activation = {ours: key for key, ours in GPT2_ACTIVATIONS.items()}
    theirs |= {
        'n_ctx': config.block_size,
        'n_inner': config.n_inner,
        'activation_function': their_activation[config.act],
        'layer_norm_epsilon': 1e-5,
        'resid_pdrop': config.dropout,
        'embd_pdrop': config.dropout,
        'attn_pdrop': config.attn_dropout,
        'torch_dtype': 'float32',
        'tie_word_embeddings': config.tie_weights,
    }
    return theirs


def gpt2_tensors(model):
    """The weights of a GPT as GPT-2 keeps them: {name: float32 tensor on the CPU}."""
    config = model.config
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == 'lm_head.weight' and config.tie_weights:
            continue
        outputs = weight.size(0)
        if name.endswith(GPT2_TRANSPOSED):
            weight = weight.t()
        tensors[name] = weight.float().cpu().contiguous()

        # GPT-2 has biases everywhere; those of zero compute the same as none
        if not config.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(outputs)
    return tensors


def write_folder(folder, files):
    """Write {name: bytes} to a new folder, which appears complete or not at all.

    Into an empty folder that is there already, the files go in order, the weights last.
    """
    folder = folder.resolve()
    if folder.is_dir():
        write_files(folder, files)
        return

    temporary = folder.with_name(f'.{folder.name}.export.tmp')
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed export has left
    try:
        write_files(temporary, files)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder, files):
    """Write {name: bytes} to a folder, which is made if it is missing."""
    make_folder(folder, '--to=FOLDER')
    for name, content in files.items():
        atomic_write(folder / name, lambda f, content=content: f.write(content))
