"""
A model as one HTML file: a page that generates text by itself, without server, network or library.

    python -m pocket.export --out_dir=out/RUN --to=bard.html    write one (docs/page.md)
    python -m pocket.page                                       write docs/index.html, which has
                                                                the bundled model

The page is page.html with three things put in: page_engine.js, which is the model in JavaScript and
runs in a Web Worker; page_ui.js, which shows it; and the payload that pack() makes, which holds
weights, tokenizer and chat template.
"""
import base64
import gzip
import html
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F

from pocket.errors import UserError, show_user_errors
from pocket.files import ROOT, atomic_write, make_folder
from pocket.template import ChatTemplate, template_from_dict
from pocket.tokenizer import BytePairTokenizer, ByteTokenizer, CharTokenizer

FOLDER = Path(__file__).parent
BUNDLED = ROOT / 'pocket' / 'bundled'
CODE = 'github:'  # a page on GitHub Pages finds the address of its repository itself


def export_page(model, tok, template, path, weights='int8', name=None, start='', links=(),
                about='', examples=(), settings=None):
    """Write a GPT, its tokenizer and its ChatTemplate (None: plain text) as one HTML file.

    weights: 'int8', each output channel with a scale of its own, or 'float32'. name: the page's
    title; None: the file's name. start: the text that a page without conversations begins with.
    links: [(text, address)] to other pages; the address CODE is the repository. about: what the
    page says before anything is typed. examples: texts to click on. settings: {name: value} of
    those that the page begins with, as sample.py calls them. Raises UserError if the page can't run
    the model.
    """
    path = Path(path)
    check_model(model, tok, template, weights)
    info = {
        'name': name or path.stem,
        'num_params': model.num_params(),
        'weights': weights,
        'start': start,
        'links': list(links),
        'about': about,
        'examples': list(examples),
        'settings': settings or {},
    }
    payload = base64.b64encode(pack(model, tok, template, weights, info)).decode()
    page = fill_in((FOLDER / 'page.html').read_text(encoding='utf-8'), {
        'TITLE': html.escape(info['name']),
        'ENGINE': (FOLDER / 'page_engine.js').read_text(encoding='utf-8'),
        'UI': (FOLDER / 'page_ui.js').read_text(encoding='utf-8'),
        'PAYLOAD': payload,
    })
    make_folder(path.parent, '--to=…')
    atomic_write(path, lambda file: file.write(page.encode()))


def check_model(model, tok, template, weights):
    """Raise UserError if pages can't run the model, encode its text, or write its conversations."""
    other = 'sample.py --web serves it'
    if weights not in ('int8', 'float32'):
        raise UserError(f'the weights of a page are int8 or float32, not {weights!r}')
    if model.is_encoder_decoder:
        raise UserError(f'a page runs GPTs, but this is a Seq2Seq: {other}')
    if model.config.cutoffs:
        raise UserError('a page can\'t run adaptive softmax (cutoffs), which this model was '
                        f'trained with: {other}')
    if not isinstance(tok, (CharTokenizer, ByteTokenizer, BytePairTokenizer)):
        raise UserError('a page knows char, byte, bpe and tiktoken tokenizers, but this model\'s '
                        f'is of the kind {tok.kind}: {other}')
    if template is not None and not isinstance(template, ChatTemplate):
        raise UserError('a page can\'t run chat templates in Jinja, which this model\'s is: '
                        f'{other}')


def fill_in(page, parts):
    """Replace each {{NAME}} of a page by parts[NAME]."""
    return re.sub(r'\{\{([A-Z]+)\}\}', lambda match: parts[match[1]], page)


# --------------------------------------------------------------------------------------------------
# The payload


def pack(model, tok, template, weights, info):
    """All that the page needs to know as bytes, compressed by gzip; unpack() in page_engine.js.

    A header in JSON with its length before it, then the tensors, which the header lists.
    """
    tensors, data = pack_tensors(model, weights)
    header = {
        **info,
        'config': asdict(model.config),
        'tokenizer': describe_tokenizer(tok),
        'template': None if template is None else template.to_dict(),
        'tensors': tensors,
    }

    # The place of a tensor counts from the start of the payload, so it depends on how long the
    # header is, which depends on how many digits the places have: leave room for more of them
    length = len(encode_header(header)) + 24 * len(tensors)
    length += -(length + 4) % 16  # 4 bytes for the length itself
    for tensor in tensors:
        tensor['offset'] += length + 4
        if tensor['scales'] is not None:
            tensor['scales'] += length + 4
    encoded = encode_header(header).ljust(length)
    assert len(encoded) == length
    payload = length.to_bytes(4, 'little') + encoded + data
    # Without the time, the same model always gives the same file
    return gzip.compress(payload, compresslevel=6, mtime=0)


def encode_header(header):
    """A header as bytes."""
    return json.dumps(header, ensure_ascii=False).encode('utf-8', 'replace')


def pack_tensors(model, weights):
    """The model's tensors as a list of dicts, and as bytes.

    A dict has name, shape, type, offset (in the bytes) and, for int8, scales: the offset of the
    float32 scales of each output channel, or None.
    """
    tensors = []
    data = bytearray()

    def append(array):
        """Add an array at a multiple of 16 bytes, and return where it lies."""
        data.extend(b'\0' * (-len(data) % 16))
        offset = len(data)
        data.extend(array.tobytes())
        return offset

    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and model.config.tie_weights:
            tensors.append({**tensors[0], 'name': name})  # the same bytes as the token embedding
            continue
        tensor = tensor.detach().float().cpu()
        described = {'name': name, 'shape': list(tensor.shape), 'type': 'float32', 'scales': None}
        if weights == 'int8' and tensor.dim() == 2:
            quantized, scale = quantize(tensor)
            described['type'] = 'int8'
            described['scales'] = append(scale.numpy().astype('<f4'))
            described['offset'] = append(pad_rows(quantized).numpy())
        else:
            described['offset'] = append(pad_rows(tensor).numpy().astype('<f4'))
        tensors.append(described)
    return tensors, bytes(data)


def pad_rows(tensor):
    """A tensor with zeros at the ends of its rows, up to the multiple of 16 that kernels read."""
    return F.pad(tensor, (0, -tensor.size(-1) % 16))


def quantize(weight):
    """weight (out, in) as int8, and the scale (out,) of each output channel: see Int8Linear."""
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def describe_tokenizer(tok):
    """A tokenizer as page_engine.js takes it: its tokens, with a character for each byte."""
    split = None
    if isinstance(tok, BytePairTokenizer):
        split = to_javascript(tok.split)
    return {
        'kind': 'bpe' if split else tok.kind,
        'tokens': [token.decode('latin-1') for token in tok.tokens],
        'split': split,
        'special_tokens': tok.special_tokens,
        'eos_ids': tok.eos_ids,
        'decoder_start_id': tok.decoder_start_id,
    }


def to_javascript(pattern):
    r"""The regular expression of a tokenizer in JavaScript's dialect (with the flag u).

    It has no quantifiers that never backtrack. In the patterns of OpenAI's encodings and ours,
    backtracking finds the same matches, because nothing that follows could match what it gives
    back. \s is another set of characters there. And letters can't ignore case in a part of a
    pattern, so each is written twice.

        >>> to_javascript(r'(?i:[sd]|ll)|\s++$')
        '(?:[sdSDſ]|[lL][lL])|\\p{White_Space}+$'
    """
    pattern = re.sub(r'([*+?}])\+', r'\1', pattern)
    pattern = pattern.replace(r'\s', r'\p{White_Space}').replace(r'\S', r'\P{White_Space}')
    return re.sub(r'\(\?i:([^)]*)\)', lambda match: f'(?:{both_cases(match[1])})', pattern)


def both_cases(pattern):
    """A pattern of letters that also matches their capitals, without the flag i."""
    pieces = re.findall(r'\[[a-z]*\]|.', pattern)
    written = ''
    for piece in pieces:
        letters = piece.strip('[]')
        if letters.isalpha():
            letters += letters.upper()
            if 's' in letters:
                letters += 'ſ'  # the long s of old prints is an s, too
            written += f'[{letters}]'
        else:
            written += piece
    return written


# --------------------------------------------------------------------------------------------------
# The pages in docs/

ABOUT = {  # by the name of the model: what its page says before anything is typed
    'plunkett': 'Plunkett is an umbrella in a lost and found office. He learned to talk in minutes '
                'on two CPU cores. Ask him something.',
    'shakespeare': 'It writes in the style of Shakespeare, one character at a time. Enter: it '
                   'continues your text. Shift+Enter: a new line.',
}
EXAMPLES = {  # texts to click on
    'plunkett': ('Hello, who are you?', 'How did you get lost?', 'Do you like the rain?',
                 'Do you have wifi there?'),
    'shakespeare': ('JULIET:\n', 'KING RICHARD III:\n', 'First Citizen:\nWhat news'),
}


def main():
    """Write the pages of the bundled models.

    docs/index.html, which GitHub Pages shows first, is the character; docs/shakespeare.html is a
    click away. As long as no character is bundled, Shakespeare comes first.
    """
    names = sorted(path.parent.name for path in BUNDLED.glob('*/best.pt'))
    characters = [name for name in names if name != 'shakespeare']
    code = ('Code', CODE)
    if not characters:
        export_bundled('shakespeare', 'index.html', links=[code])
        return
    name = characters[0]
    export_bundled(name, 'index.html', links=[('Shakespeare', 'shakespeare.html'), code])
    export_bundled('shakespeare', 'shakespeare.html', links=[(name.title(), 'index.html'), code])


def export_bundled(name, file, links):
    """Write docs/FILE with the bundled model of that name."""
    from pocket import checkpoint

    source = BUNDLED / name / 'best.pt'
    state = checkpoint.load(source)
    model, tok = checkpoint.build(state, source)
    template = None if state.get('chat') is None else template_from_dict(state['chat'])
    target = ROOT / 'docs' / file
    start = 'ROMEO:\n' if name == 'shakespeare' else ''
    export_page(model, tok, template, target, name=name.title(), start=start, links=links,
                about=ABOUT.get(name, ''), examples=EXAMPLES.get(name, ()),
                settings=checkpoint.sampling_of(state))
    print(f'{target}: {target.stat().st_size / 1e6:.2f} MB')


if __name__ == '__main__':
    show_user_errors('pocket/page.py')
    if sys.argv[1:]:
        raise UserError('this command takes no options, it writes the pages in docs/: a page of '
                        'your own is made by python -m pocket.export --out_dir=out/RUN '
                        '--to=FILE.html')
    main()
