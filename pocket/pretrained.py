"""
GPT-2's weights in, and a GPT of ours out, as a folder for Hugging Face's tools.

    fetch('gpt2')                     the folder of a public model, downloaded once
    load('gpt2', block_size=512)      (GPT, model_args) from such a name, or from any GPT-2 folder
    load_tokenizer('gpt2')            the tokenizer that belongs to it
    export_folder(model, tok, folder) the way out; see export.py

A folder in Hugging Face's format has

    config.json          shape and switches, under their names
    model.safetensors    the weights, or several files of them and an index
    tokenizer.json       optional: the tokenizer

The steps below come in this order: fetch the folder, read the config, read the tensors, read the
tokenizer, make room for more tokens, export. What is particular to GPT-2 is in the tables and
functions that begin with GPT2 or gpt2.
"""
import json
import os
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
from pocket.tokenizer import BpeTokenizer, make_tokenizer, printable, special_token_name

# --------------------------------------------------------------------------------------------------
# Fetch: the folder of a model

class Repository(NamedTuple):
    """A model on huggingface.co, at one commit: everybody gets the same weights, later, too."""
    name: str
    commit: str
    sha256: str  # of model.safetensors


NAMES = {
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
    """Return the folder of a model: one of NAMES, downloaded if it is not cached, or a path.

    The cache is that of Hugging Face's own tools: they find what we download, and we what they did.
    Raises UserError.
    """
    if name not in NAMES:
        folder = find_path(name)
        if (folder / 'config.json').is_file():
            return folder
        raise UserError(
            f'{str(name)!r} is neither one of {", ".join(NAMES)} nor a folder with a GPT-2 in '
            f'Hugging Face\'s format, which has a config.json and a model.safetensors')

    repository = NAMES[name]
    for folder in cached_folders(repository):
        try:
            read_json(folder / 'config.json')
            find_tensors(folder)
            return folder
        except UserError:  # not there, or cut short
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
    advice = ('Without a network, name a folder with a GPT-2 in Hugging Face\'s format instead: '
              '--init_from=FOLDER')
    config = folder / 'config.json'
    config.unlink(missing_ok=True)  # its sha256 is not known: download() would keep a damaged one
    download([f'{url}/model.safetensors'], folder / 'model.safetensors', repository.sha256, advice)
    download([f'{url}/config.json'], config, None, advice)
    read_json(config)  # it may be the page of a proxy

    if not main.is_file():
        atomic_write(main, lambda f: f.write(repository.commit.encode()))
    return folder


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
    'gelu': 'gelu_erf',
    'relu': 'relu',
}
GPT2_SUPPORTED = {  # the values that our GPT can compute, the default first
    'model_type': ['gpt2'],
    'activation_function': list(GPT2_ACTIVATIONS),
    'layer_norm_epsilon': [1e-5],
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
    problems = gpt2_problems(theirs)
    if problems:
        raise UserError(f'{path}: {"; ".join(problems)}')
    fields = gpt2_fields(theirs)

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
    }
    for key, ours in GPT2_SIZES.items():
        if key in theirs:  # else the default, which is GPT-2 124M in both
            fields[ours] = theirs[key]
    return fields


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
    tensors = find_tensors(folder)

    # Build the model without memory, to learn what it needs
    try:
        model = build_on_meta(GPT, config)
    except (RuntimeError, TypeError) as e:
        raise UserError(f'{folder / "config.json"} asks for an impossible model: {e}') from None
    needed = model.state_dict()
    if config.tie_weights:  # then the head is the token embedding, whether it was saved or not
        del needed['lm_head.weight']
        tensors.pop('lm_head.weight', None)
    missing = [f'{name} is missing' for name in needed if name not in tensors]
    surplus = [f'{name} is surplus' for name in tensors if name not in needed]
    if missing or surplus:
        raise does_not_fit(folder, missing + surplus)

    # Then copy tensor by tensor, so that never more than one is held twice
    state = {}
    for name, empty in needed.items():
        path, key = tensors[name]
        weight = gpt2_weight(name, read_tensor(path, key), config)
        check_weight(weight, empty.shape, folder, path, key)
        state[name] = nn.Parameter(torch.empty(empty.shape, dtype=dtype).copy_(weight))
    if config.tie_weights:
        state['lm_head.weight'] = state['transformer.wte.weight']
    model.load_state_dict(state, assign=True)
    return model.eval(), asdict(config)


def find_tensors(folder):
    """Return {our name: (path, their key)} of the tensors in a folder, without reading them.

    A safetensors file states its length, so a file that is cut short is found here. Raises
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
            name = gpt2_name(key)
            if name is not None:
                tensors[name] = (path, key)
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


def gpt2_name(key):
    """Our name for a tensor of GPT-2, or None for one that is no weight."""
    if key.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks, saved with some models
        return None
    if key.startswith(('transformer.', 'lm_head.')):
        return key
    return f'transformer.{key}'  # saved without the head, as openai-community/gpt2 is


def gpt2_weight(name, tensor, config):
    """A tensor of GPT-2 in the shape that our parameter of this name has."""
    if name.endswith(GPT2_TRANSPOSED) and tensor.ndim == 2:
        return tensor.t()
    if name.endswith('wpe.weight') and tensor.ndim == 2:
        return tensor[:config.block_size]  # positions beyond a smaller block_size
    return tensor


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


def check_weight(weight, shape, folder, path, key):
    """Raise UserError if a tensor is not a floating-point weight of this shape, or not finite."""
    is_float = weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if weight.shape != shape or not is_float:
        problem = f'{key} makes {tuple(weight.shape)} of {weight.dtype}, not {tuple(shape)}'
        raise does_not_fit(folder, [problem])
    if not all_finite(weight):
        raise UserError(f'{key} in {path} has values that are infinite or no numbers (NaN): '
                        f'download it anew')


def does_not_fit(folder, problems):
    """A UserError that says what is wrong with the tensors of a folder."""
    return UserError(f'the weights in {folder} do not fit its config.json: '
                     f'{"; ".join(problems[:3])}')


# --------------------------------------------------------------------------------------------------
# Tokenizer

def load_tokenizer(name):
    """Load the tokenizer of a model: GPT-2's, or a BPE of ours that export_folder() wrote.

    Raises UserError if the folder has another one.
    """
    folder = fetch(name)
    vocab_size = read_json(folder / 'config.json').get('vocab_size', 50257)
    candidates = []
    if vocab_size == 50257:
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
    raise UserError(f'{folder} has a vocabulary of {vocab_size} of its own: only GPT-2\'s, and a '
                    f'BPE that pocketGPT wrote, can be read')


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
