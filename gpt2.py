"""
GPT-2's weights in our GPT, and a GPT of ours where Hugging Face's tools read it.

    fetch('gpt2')                     the folder of a public model, downloaded once into the cache that those tools share
    load('gpt2', block_size=512)      (GPT, model_args): from such a name, or from any folder with a GPT-2 in it
    load_tokenizer('gpt2', 50257)     the tokenizer that belongs to it
    export(model, tok, folder)        the other way, see export.py
"""
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.overrides import TorchFunctionMode

import tokenizer
from configurator import UserError, find
from files import download, make_folder, write_whole
from model import GPT, GPTConfig

NAMES = {  # repository, commit, sha256 of its model.safetensors
    'gpt2': ('openai-community/gpt2', '607a30d783dfa663caf39e06633721c8d4cfcd7e',
             '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': ('openai-community/gpt2-medium', '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
                    'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': ('openai-community/gpt2-large', '32b71b12589c2f8d625668d2335a01cac3249519',
                   '5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce'),
    'gpt2-xl': ('openai-community/gpt2-xl', '15ea56dee5df4983c59b2538573817e1667135e2',
                '0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a'),
    'distilgpt2': ('distilbert/distilgpt2', '2290a62682d06624634c1f46a6ad5be0f47f38aa',
                   'e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b'),
}
SIZES = {'vocab_size': 'vocab_size', 'n_positions': 'block_size', 'n_embd': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head'}
ACTS = {'gelu_new': 'gelu', 'gelu': 'gelu_erf', 'relu': 'relu'}  # their names: ours
ONLY = {'model_type': 'gpt2', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
        'reorder_and_upcast_attn': False, 'add_cross_attention': False}  # what our GPT has no other part for
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # they keep these as (in, out), nn.Linear as (out, in)


def cache_of(repo):
    """Where Hugging Face's tools keep what they download of a repository: environment variables and defaults are theirs."""
    home = os.environ.get('HF_HOME') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'huggingface')
    hub = os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE') or Path(home, 'hub')
    return Path(os.path.expandvars(hub)).expanduser() / f'models--{repo.replace("/", "--")}'


def fetch(name):
    """The folder of a model in NAMES, downloaded where the cache lacks it. Raises UserError.

    The layout is huggingface_hub's as it is on Windows, without links: what either of us has downloaded, the other finds.
    """
    repo, commit, sha256 = NAMES[name]
    for cache in (cache_of(name), cache_of(repo)):  # the first is how these repositories were called until 2024
        main = cache / 'refs' / 'main'
        for snapshot in {commit, main.read_text(encoding='utf-8').strip() if main.is_file() else commit}:
            folder = cache / 'snapshots' / snapshot
            try:
                read_json(folder / 'config.json')
                find_tensors(folder)
                return folder
            except UserError:  # not there, or cut short
                pass
    folder, endpoint = cache / 'snapshots' / commit, (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    advice = 'Without a network, name a folder with a GPT-2 in Hugging Face\'s format instead: --init_from=FOLDER'
    for path in (folder, main.parent):
        make_folder(path, 'the environment variable HF_HOME')
    for file, sha in (('model.safetensors', sha256), ('config.json', None)):  # that without a known sha256 last, and always anew
        (folder / 'config.json').unlink(missing_ok=True)
        download([f'{endpoint}/{repo}/resolve/{commit}/{file}'], folder / file, sha, advice)
    read_json(folder / 'config.json')  # or a proxy's page in its place
    if not main.is_file():
        write_whole(main, lambda f: f.write(commit.encode()))
    return folder


def locate(name):
    """One of NAMES, or the path of a folder, to a folder that has a config.json. Raises UserError."""
    folder = fetch(name) if name in NAMES else find(name)
    if not (folder / 'config.json').is_file():
        raise UserError(f'{str(name)!r} is neither one of {", ".join(NAMES)} nor a folder with a GPT-2 as Hugging Face\'s tools '
                        f'write it: a config.json and a model.safetensors')
    return folder


def read_json(path):
    """A JSON object as a dict. Raises UserError where the file holds none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a JSON object: it is cut short or something else')
    return content


def read_config(path, overrides):
    """Their config.json to a GPTConfig. Raises UserError where it asks for what our GPT has no part for."""
    theirs = {'activation_function': 'gelu_new', 'model_type': None} | read_json(path)
    problems = [f'{k} is {theirs[k]!r}, only {v!r} can be read' for k, v in ONLY.items() if theirs.get(k, v) != v]
    if (act := str(theirs['activation_function'])) not in ACTS:
        problems.append(f'activation_function is {act!r}, only {", ".join(ACTS)} can be read')
    sizes = {ours: theirs.get(k, getattr(GPTConfig, ours)) for k, ours in SIZES.items()}
    problems += [f'{k} is {v!r}, not a whole number' for k, v in sizes.items() if type(v) is not int]
    if not problems and overrides.get('block_size', 0) > sizes['block_size']:
        problems.append(f'the model has {sizes["block_size"]} positions, fewer than --block_size={overrides["block_size"]}')
    args = {'n_inner': theirs.get('n_inner'), 'act': ACTS.get(act), 'tie_weights': theirs.get('tie_word_embeddings', True),
            'dropout': theirs.get('resid_pdrop', 0.1), 'attn_dropout': theirs.get('attn_pdrop', 0.1)}
    try:
        if not problems:
            return GPTConfig(**{**sizes, **args, **overrides})
    except (TypeError, ValueError) as e:
        problems.append(str(e))
    raise UserError(f'{path}: {"; ".join(problems)}')


def find_tensors(folder):
    """{name without transformer.: (path, key)} of the tensors in model.safetensors or in the shards that its index names.

    A safetensors file says how long it must be, so one that is cut short is found out here. Raises UserError.
    """
    paths, index, tensors = [folder / 'model.safetensors'], folder / 'model.safetensors.index.json', {}
    if not paths[0].is_file() and index.is_file():
        shards = read_json(index).get('weight_map')
        shards = sorted(map(str, shards.values())) if isinstance(shards, dict) else []
        if not shards or any(Path(s).name != s for s in shards):
            raise UserError(f'{index} must have a weight_map that names files beside it, and nothing else')
        paths = [folder / s for s in dict.fromkeys(shards)]
    for path in paths:
        try:
            with safe_open(path, 'pt') as f:
                tensors |= {key.removeprefix('transformer.'): (path, key) for key in f.keys()}
        except (OSError, SafetensorError) as e:
            why = 'it is not there, and weights are read from no other format' if isinstance(e, FileNotFoundError) else e
            raise UserError(f'cannot read {path} as a safetensors file: {why}') from None
    return tensors


class Blank(TorchFunctionMode):
    """Modules built in its scope have weights that are shapes only, without memory or random numbers; tables are as ever."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__.endswith(('normal_', 'uniform_')):  # on the device meta their first call costs a second, for imports
            return None
        return func(*args, **(kwargs or {}) | ({'device': 'meta'} if func is torch.empty else {}))


def load(name, dtype=torch.float32, **overrides):
    """(GPT in eval mode, its model_args) from one of NAMES or a folder; its parameters are dtype, whatever the file holds.

    overrides: fields of GPTConfig: dropout, attn_dropout, gradient_checkpointing, a smaller block_size. Raises UserError.
    """
    folder = locate(name)
    c, tensors, state = read_config(folder / 'config.json', overrides), find_tensors(folder), {}
    if f'h.{c.n_layer - 1}.ln_1.weight' not in tensors:  # before a config.json that is wrong has us build a million layers
        raise UserError(f'{folder} has no weights for the {c.n_layer} layers that its config.json speaks of')
    with Blank():
        model = GPT(c)
    shapes = {key: t.shape for key, t in model.state_dict().items() if key != 'lm_head.weight' or not c.tie_weights}
    ours = {key.removeprefix('transformer.') for key in shapes} | {'lm_head.weight'}
    problems = [f'{key} is surplus' for key in tensors if key not in ours and not key.endswith(('.attn.bias', '.attn.masked_bias'))]
    for key, shape in shapes.items():
        path, theirs = tensors.get(key.removeprefix('transformer.'), (None, None))
        if path is None:
            problems.append(f'{key} is missing')
            continue
        with safe_open(path, 'pt') as f:  # opened anew for each tensor, so that the pages of those copied are given back
            t = f.get_tensor(theirs)
        t = t.t() if key.endswith(CONV1D) and t.ndim == 2 else t[:c.block_size] if key.endswith('wpe.weight') else t
        if t.shape != shape or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            problems.append(f'{theirs} makes {tuple(t.shape)} of {t.dtype}, not {tuple(shape)}')
        elif not problems:
            state[key] = torch.nn.Parameter(torch.empty(shape, dtype=dtype).copy_(t))
    if problems:
        raise UserError(f'the weights in {folder} do not fit its config.json: {"; ".join(problems[:3])}{" …" * (len(problems) > 3)}')
    if c.tie_weights:
        state['lm_head.weight'] = state['transformer.wte.weight']
    model.load_state_dict(state, assign=True)
    return model.eval(), asdict(c)


def load_tokenizer(name, vocab_size):
    """The tokenizer of a model that load() reads: GPT-2's. Raises UserError where the model has another vocabulary."""
    path = locate(name) / 'tokenizer.json'
    tok = tokenizer.make('gpt2')
    theirs = read_json(path).get('model') if path.is_file() else None
    raise NotImplementedError(tok, theirs)


def export(model, tok, folder):
    """Write a GPT and its tokenizer as a folder that transformers loads with AutoModelForCausalLM. Raises UserError.

    A model without biases gets zeros, which compute the same; one with parts that GPT-2 lacks is refused, with their list.
    """
    c, folder, acts = model.config, Path(folder), {ours: k for k, ours in ACTS.items()}
    parts = {'pos': ['learned'], 'norm': ['layernorm'], 'norm_position': ['pre'], 'act': acts, 'qk_norm': [False], 'softcap': [0]}
    if foreign := [f'{part}={getattr(c, part)}' for part, theirs in parts.items() if getattr(c, part) not in theirs]:
        raise UserError(f'GPT-2 has no {", ".join(foreign)}: this model can\'t be written in its format')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already: name a new folder, or remove it')
    tensors = {}
    for key, t in model.state_dict().items():
        if key != 'lm_head.weight' or not c.tie_weights:
            tensors[key] = (t.t() if key.endswith(CONV1D) else t).float().cpu().contiguous()
        if not c.bias and key.startswith(('transformer.h.', 'transformer.ln_f.')):
            tensors[key.removesuffix('weight') + 'bias'] = torch.zeros(t.size(0))
    ends = {'bos_token_id': tok.start, 'eos_token_id': tok.end}
    config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], **{k: getattr(c, ours) for k, ours in SIZES.items()},
              'n_ctx': c.block_size, 'n_inner': c.n_inner, 'activation_function': acts[c.act], 'layer_norm_epsilon': 1e-5,
              'tie_word_embeddings': c.tie_weights, 'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.attn_dropout,
              'torch_dtype': 'float32', **ends}
    make_folder(folder, '--to=FOLDER')
    for file, content in {'config.json': config, 'generation_config.json': ends}.items():
        text = json.dumps(content, ensure_ascii=False, indent=1).encode('utf-8')
        write_whole(folder / file, lambda f, text=text: f.write(text))
    write_whole(folder / 'model.safetensors', lambda f: f.write(save(tensors, {'format': 'pt'})))  # last: no model without it
