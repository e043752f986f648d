"""
GPT-2's weights in our GPT, and a GPT of ours where Hugging Face's tools read it.

    fetch('gpt2')                     the folder of a public model, downloaded once into the cache that those tools share
    load('gpt2', block_size=512)      (GPT, model_args): from such a name, or from any folder with a GPT-2 in it
    load_tokenizer('gpt2')            the tokenizer that belongs to it
    export(model, tok, folder)        the other way, see export.py
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model import GPT, GPTConfig
from pocket.checkpoint import blank, finite
from pocket.errors import UserError
from pocket.files import atomic_write, download, find_path, make_folder
from pocket.tokenizer import BpeTokenizer, make_tokenizer, printable

NAMES = {  # commit, and sha256 of its model.safetensors
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519 5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2 0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a',
    'distilgpt2': '2290a62682d06624634c1f46a6ad5be0f47f38aa e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b',
}
SIZES = {'vocab_size': 'vocab_size', 'n_positions': 'block_size', 'n_embd': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head'}
ACTS = {'gelu_new': 'gelu', 'gelu': 'gelu_erf', 'relu': 'relu'}  # their names: ours
ONLY = {'model_type': ['gpt2'], 'activation_function': [*ACTS], 'layer_norm_epsilon': [1e-5], 'scale_attn_weights': [True],
        'scale_attn_by_inverse_layer_idx': [False], 'reorder_and_upcast_attn': [False], 'add_cross_attention': [False]}
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # they keep these as (in, out), nn.Linear as (out, in)


def cache_of(repo):
    """Where Hugging Face's tools keep what they download of a repository: environment variables and defaults are theirs."""
    home = os.environ.get('HF_HOME') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'huggingface')
    hub = os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE') or Path(home, 'hub')
    return Path(os.path.expandvars(hub)).expanduser() / f'models--{repo.replace("/", "--")}'


def fetch(name):
    """The folder of a model: one of NAMES, downloaded where the cache lacks it, or a folder's own path. Raises UserError.

    The cache is huggingface_hub's, laid out as on Windows, without links: what either of us has downloaded, the other finds.
    """
    if name not in NAMES:
        if (find_path(name) / 'config.json').is_file():
            return find_path(name)
        raise UserError(f'{str(name)!r} is neither one of {", ".join(NAMES)} nor a folder with a GPT-2 as Hugging Face\'s tools '
                        f'write it, with a config.json and a model.safetensors')
    repo, (commit, sha256) = ('distilbert/' if name == 'distilgpt2' else 'openai-community/') + name, NAMES[name].split()
    for cache in (cache_of(name), cache_of(repo)):  # the first is how these repositories were called until 2024
        main = cache / 'refs' / 'main'
        for snapshot in (main.read_text(encoding='utf-8').strip() if main.is_file() else commit, commit):
            folder = cache / 'snapshots' / snapshot
            try:
                read_json(folder / 'config.json')
                find_tensors(folder)
                return folder
            except UserError:  # not there, or cut short
                pass
    endpoint = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    advice = 'Without a network, name a folder with a GPT-2 in Hugging Face\'s format instead: --init_from=FOLDER'
    for path in (folder, main.parent):
        make_folder(path, 'the environment variable HF_HOME')
    for file, sha in (('model.safetensors', sha256), ('config.json', None)):
        (folder / 'config.json').unlink(missing_ok=True)  # without a known sha256 it can't be kept
        download([f'{endpoint}/{repo}/resolve/{commit}/{file}'], folder / file, sha, advice)
    read_json(folder / 'config.json')  # or some proxy's page in its place
    if not main.is_file():
        atomic_write(main, lambda f: f.write(commit.encode()))
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
    theirs = read_json(path)
    problems = [f'{k} is {theirs[k]!r}, only {" or ".join(map(repr, ok))} can be read' for k, ok in ONLY.items()
                if theirs.get(k, ok[0]) not in ok]
    problems += [f'{k} is {theirs[k]!r}, not a whole number' for k in SIZES if type(theirs.get(k, 1)) is not int]
    try:
        if not problems:
            c = GPTConfig(**{ours: theirs[k] for k, ours in SIZES.items() if k in theirs}, n_inner=theirs.get('n_inner'),
                          act=ACTS[theirs.get('activation_function', 'gelu_new')], dropout=theirs.get('resid_pdrop', 0.1),
                          attn_dropout=theirs.get('attn_pdrop', 0.1), tie_weights=theirs.get('tie_word_embeddings', True))
            if overrides.get('block_size', 1) <= c.block_size:
                return GPTConfig(**asdict(c) | overrides)
            problems = [f'the model has {c.block_size} positions, too few for --block_size={overrides["block_size"]}']
    except (TypeError, ValueError) as e:
        problems = [str(e)]
    raise UserError(f'{path}: {"; ".join(problems)}')


def find_tensors(folder):
    """{our name: (path, key)} of the tensors in model.safetensors or in the shards that its index names.

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
                for key in f.keys():
                    if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks, saved with some models
                        tensors[key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}'] = path, key
        except (OSError, SafetensorError, ValueError) as e:  # ValueError: a name that no file can have
            why = 'it is not there, and weights are read from no other format' if isinstance(e, FileNotFoundError) else e
            raise UserError(f'cannot read {path} as a safetensors file: {why}') from None
    return tensors


def load(name, dtype=torch.float32, **overrides):
    """(GPT in eval mode, its model_args) from one of NAMES or a folder; its parameters are dtype, whatever the file holds.

    overrides: fields of GPTConfig: dropout, attn_dropout, gradient_checkpointing, a smaller block_size. Raises UserError.
    """
    folder = fetch(name)
    c, tensors, state = read_config(folder / 'config.json', overrides), find_tensors(folder), {}
    try:
        model = blank(GPT, c)
    except (RuntimeError, TypeError) as e:
        raise UserError(f'{folder / "config.json"} asks for what can\'t be: {e}') from None
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    if c.tie_weights:
        del shapes['lm_head.weight']
        tensors.pop('lm_head.weight', None)
    problems = [f'{key} is missing' for key in shapes if key not in tensors]
    problems += [f'{key} is surplus' for key in tensors if key not in shapes]
    for key, shape in shapes.items() if not problems else ():
        path, theirs = tensors[key]
        try:
            with safe_open(path, 'pt') as f:  # mapped anew for each tensor, so that the pages of those copied are given back
                t = f.get_tensor(theirs)
        except (OSError, SafetensorError, RuntimeError, TypeError, AttributeError) as e:  # types that this PyTorch lacks
            raise UserError(f'cannot read {theirs} in {path}: {e}') from None
        t = t.t() if key.endswith(CONV1D) and t.ndim == 2 else t[:c.block_size] if key.endswith('wpe.weight') else t
        if t.shape != shape or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            problems.append(f'{theirs} makes {tuple(t.shape)} of {t.dtype}, not {tuple(shape)}')
            break
        if not finite(t):
            raise UserError(f'{theirs} in {path} has values that are infinite or no numbers (NaN): download it anew')
        state[key] = torch.nn.Parameter(torch.empty(shape, dtype=dtype).copy_(t))
    if problems:
        raise UserError(f'the weights in {folder} do not fit its config.json: {"; ".join(problems[:3])}')
    if c.tie_weights:
        state['lm_head.weight'] = state['transformer.wte.weight']
    model.load_state_dict(state, assign=True)
    return model.eval(), asdict(c)


def load_tokenizer(name):
    """The tokenizer of a model: GPT-2's where it has none of its own, else what its tokenizer.json says. Raises UserError."""
    folder = fetch(name)
    path, size = folder / 'tokenizer.json', read_json(folder / 'config.json').get('vocab_size', 50257)
    theirs = read_json(path) if path.is_file() else {}
    older = folder / 'vocab.json'  # has no more than the tokens: enough to see that they are GPT-2's
    vocab = read_json(older) if older.is_file() and not theirs else None
    candidates = [make_tokenizer('gpt2')] if size == 50257 else []
    try:
        vocab = theirs['model']['vocab'] if theirs else vocab
        merges = [m if isinstance(m, str) else ' '.join(m) for m in theirs['model']['merges']]
        added = sorted((t['id'], t['content'].strip('<|>').replace('endoftext', 'eot')) for t in theirs['added_tokens'])
        candidates.append(BpeTokenizer(merges, [special for _, special in added]))  # if its ids are in our order
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    for tok in candidates:
        ids = {printable(token): i for i, token in enumerate(tok.tokens) if token}
        if tok.vocab_size == size and (vocab is None or isinstance(vocab, dict) and ids.items() <= vocab.items()):
            return tok
    raise UserError(f'{folder} has a vocabulary of {size} of its own: only GPT-2\'s, and a BPE that pocketGPT wrote, can be read')


def resize_token_embeddings(model, tok, theirs, folder):
    """Make room in a loaded model for the special tokens that a dataset's tokenizer has beside those of the model's own.

    Their rows are the mean of all others: unknown, but no outliers. Raises UserError where the ids mean something else.
    """
    if tok.tokens[:len(theirs.tokens)] != theirs.tokens:
        raise UserError(f'{folder} has another tokenizer than this model: prepare it with --tokenizer=gpt2, or take '
                        f'--dataset=shakespeare_gpt2')
    new, tied = tok.vocab_size - model.config.vocab_size, model.config.tie_weights
    for module in (model.transformer.wte, *([] if tied else [model.lm_head])) if new > 0 else ():
        w = module.weight.data
        module.weight = torch.nn.Parameter(torch.cat((w, w.mean(dim=0, keepdim=True).expand(new, -1))))
    if new > 0:
        model.lm_head.weight = model.transformer.wte.weight if tied else model.lm_head.weight
        model.config.vocab_size = model.transformer.wte.num_embeddings = model.lm_head.out_features = tok.vocab_size


def export(model, tok, folder):
    """Write a GPT and its tokenizer as a folder that transformers loads with AutoModelForCausalLM. Raises UserError.

    A model without biases gets zeros, which compute the same; one with parts that GPT-2 lacks is refused, with their list.
    """
    c, folder, acts = model.config, Path(folder), {ours: k for k, ours in ACTS.items()}
    if not isinstance(model, GPT):
        raise UserError('GPT-2 has no encoder: this model can\'t be written in its format')
    parts = {'pos': ['learned'], 'norm': ['layernorm'], 'norm_position': ['pre'], 'act': acts, 'qk_norm': [False],
             'token_shift': [False], 'softcap': [0], 'cutoffs': [()], 'head_bias': [False], 'attn_bias': [None, c.bias]}
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
    ends = {'bos_token_id': tok.decoder_start_id, 'eos_token_id': tok.eos_id}
    config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], **{k: getattr(c, ours) for k, ours in SIZES.items()},
              'n_ctx': c.block_size, 'n_inner': c.n_inner, 'activation_function': acts[c.act], 'layer_norm_epsilon': 1e-5,
              'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.attn_dropout, 'torch_dtype': 'float32',
              'tie_word_embeddings': c.tie_weights, **ends}
    files = {'config.json': json.dumps(config, indent=1), 'generation_config.json': json.dumps(ends)}
    files |= {'tokenizer.json': tok.tokenizer_json()} if hasattr(tok, 'tokenizer_json') else {}
    folder = folder.resolve()  # a new folder is whole or not there; in an empty one the model comes last
    unfinished = folder if folder.is_dir() else folder.with_name(f'.{folder.name}.export.tmp')
    if unfinished != folder:  # what a killed export has left
        shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished, '--to=FOLDER')
    try:
        for file, text in files.items():
            atomic_write(unfinished / file, lambda f, text=text: f.write(text.encode('utf-8')))
        atomic_write(unfinished / 'model.safetensors', lambda f: f.write(save(tensors, {'format': 'pt'})))
        if unfinished != folder:
            unfinished.rename(folder)
    finally:
        if unfinished != folder:
            shutil.rmtree(unfinished, ignore_errors=True)
