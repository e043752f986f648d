"""
A GPT of ours as a .gguf file: one file with weights, tokenizer and chat template, from which
llama.cpp, ollama and whatever else is built on llama.cpp generate.

    export_gguf(model, tok, 'model.gguf', template)       needs the package gguf

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp has a name of its
own for each tensor, and code of its own for each architecture: gpt2, llama, qwen2 and qwen3, the
same as in pocket/pretrained.py, which says whether a model is one of these.
"""
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from model import position_angles
from pocket.errors import UserError
from pocket.files import make_folder
from pocket.pretrained import (
    gpt2_tensors,
    jinja_source,
    llama_tensors,
    model_type_of,
    special_ids,
    special_texts,
    tokenizer_json,
)
from pocket.tokenizer import CharTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, printable

# --------------------------------------------------------------------------------------------------
# The file


def export_gguf(model, tok, path, template=None, gguf_type='f16'):
    """Write a GPT with its tokenizer and chat template as a .gguf file.

    gguf_type: f32, f16 or q8_0, of the matrices: 8-bit numbers in blocks of 32 that share a scale.
    template: the ChatTemplate or JinjaTemplate it was trained with, or None. Raises UserError if
    llama.cpp can't compute the model or encode as its tokenizer does, or if the file exists.
    """
    try:
        import gguf
    except ImportError:
        raise UserError('--to=FILE.gguf needs one more package: pip install gguf') from None
    path = Path(path)
    if path.exists():
        raise UserError(f'{path} is there already: name a new file with --to=, or remove it')

    architecture = model_type_of(model)
    check_llama_cpp_can_compute(model.config, architecture)
    metadata = model_metadata(model.config, architecture)
    metadata |= tokenizer_metadata(tok, model.config.vocab_size)
    metadata |= special_metadata(tok, template)
    metadata['general.name'] = path.stem
    metadata['general.file_type'] = gguf.LlamaFileType[FILE_TYPES[gguf_type]].value
    metadata['general.quantization_version'] = gguf.GGML_QUANT_VERSION
    if template is not None:
        metadata['tokenizer.chat_template'] = jinja_source(template, tok)

    # Beside its place first, so that the file is complete or not there
    make_folder(path.parent, '--to=…')
    temporary = path.with_name(path.name + '.tmp')
    writer = gguf.GGUFWriter(temporary, architecture)
    for key, value in metadata.items():
        add_metadata(writer, key, value)
    for name, tensor in gguf_tensors(model, architecture).items():
        array = tensor.numpy()
        kind = tensor_type(name, array.shape, gguf_type)
        kind = gguf.GGMLQuantizationType[kind.upper()]
        array = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}: {e.strerror}; free some space or choose another '
                        f'folder') from None


FILE_TYPES = {'f32': 'ALL_F32', 'f16': 'MOSTLY_F16', 'q8_0': 'MOSTLY_Q8_0'}


def add_metadata(writer, key, value):
    """Add a value to a GGUFWriter, in the type that llama.cpp expects for Python's."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# --------------------------------------------------------------------------------------------------
# The model


def check_llama_cpp_can_compute(config, architecture):
    """Raise UserError for the little that llama.cpp lacks and transformers has."""
    problem = None
    if architecture == 'gpt2' and config.act != 'gelu':
        problem = f'act={config.act} in a GPT-2: train with --act=gelu'
    scaling = config.rope_scaling
    if architecture in ('qwen2', 'qwen3') and scaling and scaling['rope_type'] == 'llama3':
        problem = 'rope_scaling of the type llama3 in a Qwen'
    if problem:
        raise UserError(f'llama.cpp can\'t compute {problem}')


def model_metadata(config, architecture):
    """{key: value} of what llama.cpp must know of a model, besides its tensors."""
    metadata = {
        'context_length': config.block_size,
        'vocab_size': config.vocab_size,
        'embedding_length': config.n_embd,
        'block_count': config.n_layer,
        'feed_forward_length': config.n_inner or 4 * config.n_embd,
        'attention.head_count': config.n_head,
    }
    if architecture == 'gpt2':
        metadata['attention.layer_norm_epsilon'] = config.norm_eps
    else:
        metadata |= {
            'attention.head_count_kv': config.num_kv_heads,
            'attention.key_length': config.head_size,
            'attention.value_length': config.head_size,
            'attention.layer_norm_rms_epsilon': config.norm_eps,
            'rope.dimension_count': config.head_size,
            'rope.freq_base': float(config.rope_theta),
        }
        scaling = config.rope_scaling
        if scaling and scaling['rope_type'] == 'linear':  # llama3 is a tensor: see rope_factors()
            metadata |= {
                'rope.scaling.type': 'linear',
                'rope.scaling.factor': float(scaling['factor']),
            }
    return {f'{architecture}.{key}': value for key, value in metadata.items()}


# Their names of tensors, in a block and outside, and llama.cpp's
GPT2_NAMES = {
    'transformer.wte': 'token_embd',
    'transformer.wpe': 'position_embd',
    'transformer.ln_f': 'output_norm',
    'lm_head': 'output',
    'ln_1': 'attn_norm',
    'attn.c_attn': 'attn_qkv',
    'attn.c_proj': 'attn_output',
    'ln_2': 'ffn_norm',
    'mlp.c_fc': 'ffn_up',
    'mlp.c_proj': 'ffn_down',
}
LLAMA_NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}


def gguf_tensors(model, architecture):
    """The weights of a GPT as llama.cpp keeps them: {name: float32 tensor on the CPU}."""
    config = model.config
    if architecture == 'gpt2':
        theirs = gpt2_tensors(model, transposed=False)
        names = GPT2_NAMES
    else:
        theirs = llama_tensors(model)
        names = LLAMA_NAMES

    tensors = {}
    for key, tensor in theirs.items():
        if architecture == 'llama' and '.q_proj.' in key:
            tensor = interleave_halves(tensor, config.n_head)
        if architecture == 'llama' and '.k_proj.' in key:
            tensor = interleave_halves(tensor, config.num_kv_heads)
        tensors[gguf_name(key, names)] = tensor
    if config.rope_scaling and config.rope_scaling['rope_type'] == 'llama3':
        tensors['rope_freqs.weight'] = rope_factors(config)
    return tensors


def gguf_name(key, names):
    """llama.cpp's name for a tensor.

    >>> gguf_name('model.layers.3.mlp.up_proj.weight', LLAMA_NAMES)
    'blk.3.ffn_up.weight'
    """
    module, kind = key.rsplit('.', 1)
    if module in names:
        return f'{names[module]}.{kind}'
    _, _, layer, rest = module.split('.', 3)  # transformer.h.3.mlp.c_fc, or as above
    return f'blk.{layer}.{names[rest]}.{kind}'


def interleave_halves(weight, n_head):
    """The rows of q or k in the order in which llama.cpp rotates those of a Llama.

    rotate() in model.py pairs channel i with i + D/2, as transformers and Qwen do. Llama's own
    code, and llama.cpp for this architecture, pair 2i with 2i + 1. As long as queries and keys
    change places alike, their products stay the same. weight: (n_head * D, …).
    """
    halves = weight.unflatten(0, (n_head, 2, -1))  # (n_head, 2, D/2, …)
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(config):
    """(D/2,) float32: by how much rope_scaling slows each pair of channels down."""
    angles = position_angles(2, config.head_size, config.rope_theta)[1]
    slowed = position_angles(2, config.head_size, config.rope_theta, config.rope_scaling)[1]
    return angles / slowed


def tensor_type(name, shape, gguf_type):
    """The type for a tensor: f32 for what is small, and no 8-bit blocks where 32 do not fit.

    Norms and biases hardly count in a file's size, and llama.cpp wants them in float32; the same
    holds for the table of positions.
    """
    if len(shape) == 1 or name.startswith('position_embd'):
        return 'f32'
    if gguf_type == 'q8_0' and shape[-1] % 32:
        return 'f16'
    return gguf_type


# --------------------------------------------------------------------------------------------------
# The tokenizer


class TokenType:
    """What llama.cpp calls the kinds of tokens."""
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special tokens: never made from text, never shown
    USER_DEFINED = 4  # tokens that were added, but are shown
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """A tokenizer in llama.cpp's terms."""
    model: str  # gpt2: byte-pair encoding, llama: sentencepiece's, rwkv: the longest match
    tokens: list  # as this kind of model writes them, one per id
    types: list  # TokenType of each
    more: dict  # what else this kind needs, {key: value}


def tokenizer_metadata(tok, vocab_size):
    """{key: value} of a tokenizer. vocab_size: of the model, which may have more ids.

    Raises UserError if llama.cpp has no tokenizer that encodes as this one does.
    """
    if isinstance(tok, CharTokenizer):
        vocabulary = char_vocabulary(tok)
    elif isinstance(tok, SentencePieceTokenizer):
        vocabulary = sentencepiece_vocabulary(tok)
    else:
        vocabulary = bpe_vocabulary(tok)

    unused = range(len(vocabulary.tokens), vocab_size)
    metadata = {
        'model': vocabulary.model,
        'tokens': vocabulary.tokens + [f'[PAD{token_id}]' for token_id in unused],
        'token_type': vocabulary.types + [TokenType.UNUSED] * len(unused),
        **vocabulary.more,
    }
    if 'scores' in metadata:
        metadata['scores'] = metadata['scores'] + [-1e6] * len(unused)
    return {f'tokenizer.ggml.{key}': value for key, value in metadata.items()}


def special_metadata(tok, template):
    """{key: value} of which ids begin and end a text."""
    ids = special_ids(tok, template)
    metadata = {}
    if ids.get('pad_token') is not None:
        metadata['padding_token_id'] = ids['pad_token']
    if tok.eos_ids:
        metadata['eos_token_id'] = tok.eos_ids[0]
        metadata['bos_token_id'] = ids.get('bos_token', tok.eos_ids[0])
    if len(tok.eos_ids) > 1:
        metadata['eot_token_id'] = tok.eos_ids[1]

    # Does a text begin with a token of its own?
    metadata['add_bos_token'] = False
    if isinstance(tok, HuggingFaceTokenizer):
        begun = tok.encode_prompt('x')
        if len(begun) > len(tok.encode('x')):
            metadata['add_bos_token'] = True
            metadata['bos_token_id'] = begun[0]
    return {f'tokenizer.ggml.{key}': value for key, value in metadata.items()}


# Byte-pair encoding


def bpe_vocabulary(tok):
    """The Vocabulary of our BPE, OpenAI's, or a tokenizer.json. Raises UserError."""
    content = json.loads(tokenizer_json(tok))
    model = content['model']
    is_byte_level = 'ByteLevel' in json.dumps(content.get('decoder'))
    is_bpe = model.get('type', 'BPE') == 'BPE'
    if not tok.eos_ids:
        raise no_end(tok)
    if not is_bpe or not (is_byte_level or model.get('byte_fallback')):
        raise UserError(f'of Hugging Face\'s tokenizers, pocketGPT can write those of byte-pair '
                        f'encoding with bytes for llama.cpp: this one is a {model.get("type")} of '
                        f'another kind')

    tokens, types = hugging_face_tokens(content, tok.vocab_size)
    merges = []
    for merge in model['merges']:
        if isinstance(merge, str):  # older files: one text
            merge = merge.split(' ')
        merges.append(merge)
    if not is_byte_level:
        return byte_fallback_vocabulary(tok, content, tokens, types, merges)
    more = {
        'merges': [' '.join(merge) for merge in merges] or NO_MERGES,
        'pre': pre_tokenizer_name(content.get('pre_tokenizer')),
    }
    return Vocabulary('gpt2', tokens, types, more)


def hugging_face_tokens(content, size):
    """(tokens, types) of the content of a tokenizer.json: two lists of this size."""
    tokens = [f'[UNUSED{token_id}]' for token_id in range(size)]
    types = [TokenType.UNUSED] * size
    for token, token_id in content['model']['vocab'].items():
        tokens[token_id] = token
        types[token_id] = TokenType.NORMAL
    for added in content.get('added_tokens', ()):
        tokens[added['id']] = added['content']
        types[added['id']] = TokenType.CONTROL if added['special'] else TokenType.USER_DEFINED
    return tokens, types


# llama.cpp wants at least one. This character never occurs in byte-level tokens
NO_MERGES = ['▁ ▁']

# How a text is cut into words, as tokenizer.json says it, and llama.cpp's name for that
BY_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
BY_LLAMA3 = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
             " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
PRE_TOKENIZERS = {
    (BY_GPT2,): 'gpt-2',
    ('digits', BY_GPT2): 'smollm',
    (BY_LLAMA3,): 'llama-bpe',
    (BY_LLAMA3.replace('{1,3}', ''),): 'qwen2',
}
SAME_SPLITS = {  # regular expressions that cut every text alike: another spelling, and ours above
    "'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s":
        BY_GPT2,
    "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++"
    "[\\r\\n]*+|\\s++$|\\s*[\\r\\n]|\\s+(?!\\S)|\\s":
        BY_LLAMA3,
}


def pre_tokenizer_name(pre_tokenizer):
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json. Raises UserError."""
    steps = [pre_tokenizer]
    if pre_tokenizer and pre_tokenizer['type'] == 'Sequence':
        steps = pre_tokenizer['pretokenizers']

    splits = []
    for step in steps:
        kind = step and step['type']
        if kind == 'ByteLevel':
            if step.get('use_regex', True):
                splits.append(BY_GPT2)
        elif kind == 'Digits' and step.get('individual_digits'):
            splits.append('digits')
        elif kind == 'Split' and 'Regex' in step['pattern']:
            regex = step['pattern']['Regex']
            splits.append(SAME_SPLITS.get(regex, regex))
        else:
            splits.append(kind)
    if tuple(splits) not in PRE_TOKENIZERS:
        raise UserError(f'this tokenizer cuts a text into words by {splits}, and llama.cpp\'s name '
                        f'for that is unknown to us: known are those of GPT-2, SmolLM, Llama 3 and '
                        f'Qwen')
    return PRE_TOKENIZERS[tuple(splits)]


# The way Llama 2 and Mistral have it


def byte_fallback_vocabulary(tok, content, tokens, types, merges):
    """The Vocabulary of a byte-pair encoding of characters, with bytes for those it does not know.

    Such tokenizers were made by sentencepiece, and are that for llama.cpp: the earlier a token is
    merged, the higher its score. Raises UserError.
    """
    steps = json.dumps([content.get('normalizer'), content.get('pre_tokenizer')])
    kinds = set(re.findall(r'"type": "(\w+)"', steps))
    unknown = kinds - {'Sequence', 'Prepend', 'Replace', 'Metaspace'}
    if unknown:
        raise UserError(f'llama.cpp has no {", ".join(sorted(unknown))} in a tokenizer like this')

    ranks = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(''.join(merge), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    more = {'scores': scores, 'add_space_prefix': tokens[tok.encode('x')[0]].startswith('▁')}
    for token_id, token in enumerate(tokens):
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            types[token_id] = TokenType.BYTE
        if token == content['model'].get('unk_token'):
            types[token_id] = TokenType.UNKNOWN
            more['unknown_token_id'] = token_id
    return Vocabulary('llama', tokens, types, more)


# Characters


def char_vocabulary(tok):
    """The Vocabulary of a CharTokenizer.

    llama.cpp has no tokenizer of characters. Two of its others do the same with the right tokens:
    byte-pair encoding whose merges put the bytes of characters together, and RWKV's, which takes
    the longest token that fits. The first wants a token that ends a text; the second does not come
    back from some characters that it does not know, unless all that it knows are ASCII. Raises
    UserError if neither does.
    """
    types = [TokenType.NORMAL] * len(tok.chars)
    texts = special_texts(tok)
    special = [texts[token_id] for token_id in sorted(texts)]
    types += [TokenType.CONTROL] * len(special)
    if tok.eos_ids:
        tokens = [printable(token) for token in tok.tokens[:len(tok.chars)]]
        merges = {}  # a dict keeps the order, and each merge once
        for token in tokens:
            for length in range(1, len(token)):
                merges[f'{token[:length]} {token[length]}'] = None
        more = {'merges': list(merges) or NO_MERGES, 'pre': 'gpt-2'}
        return Vocabulary('gpt2', tokens + special, types, more)

    if not tok.chars.isascii():
        raise no_end(tok)
    tokens = []
    for character in tok.chars:
        if character.isprintable() and character != '\\':
            tokens.append(character)
        else:
            tokens.append(f'\\x{ord(character):02x}')
    return Vocabulary('rwkv', tokens + special, types, {})


def no_end(tok):
    """A UserError that says what llama.cpp needs."""
    kind = tok.to_dict()['kind']
    return UserError(f'this {kind} tokenizer has no special token that ends a text, which '
                     f'llama.cpp needs: prepare the data with --tokenizer=bpe or byte')


# sentencepiece


def sentencepiece_vocabulary(tok):
    """The Vocabulary of a SentencePieceTokenizer of the kind bpe. Raises UserError."""
    tokens = []
    types = []
    scores = []
    for token_id in range(tok.vocab_size):
        tokens.append(tok.sp.id_to_piece(token_id))
        scores.append(float(tok.sp.get_score(token_id)))
        if tok.sp.is_unknown(token_id):
            types.append(TokenType.UNKNOWN)
        elif tok.sp.is_control(token_id):
            types.append(TokenType.CONTROL)
        elif tok.sp.is_byte(token_id):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)

    # The scores of its byte-pair encoding are ranks, those of unigram models logarithms
    if not all(score.is_integer() for score in scores):
        raise UserError('llama.cpp can\'t encode as this sentencepiece_unigram tokenizer does: '
                        'prepare the data with --tokenizer=bpe or sentencepiece')
    if not tok.eos_ids:
        raise no_end(tok)
    more = {'scores': scores, 'add_space_prefix': False, 'unknown_token_id': tok.sp.unk_id()}
    return Vocabulary('llama', tokens, types, more)
