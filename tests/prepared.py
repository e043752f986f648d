"""Reading datasets that prepare/ made, byte by byte as docs/data.md describes them, and serving files for it to download."""
import functools
import http.server
import json
import threading
from contextlib import contextmanager

import numpy as np

from pocket.tokenizer import tokenizer_from_dict


def read_dataset(folder):
    """(meta.json, its tokenizer, {split: array of ids}) of a dataset, which must be complete and tidy."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    ids = {split: np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in meta['counts']}
    assert meta['format'] == 1
    assert meta['counts'] == {split: len(array) for split, array in ids.items()}
    left_over = [path.name for pattern in ('*.tmp', '*.bin.part', '.progress.json') for path in folder.glob(pattern)]
    assert not left_over
    return meta, tokenizer_from_dict(meta['tokenizer']), ids


def read_documents(folder):
    """{split: list of texts} of a token stream in which each document has its end id."""
    _, tok, ids = read_dataset(folder)
    documents = {}
    for split, array in ids.items():
        ends = np.flatnonzero(array == tok.eos_id) + 1
        *whole, rest = np.split(array, ends)
        assert len(rest) == 0
        documents[split] = [tok.decode(document.tolist()) for document in whole]
    return documents


def read_pairs(folder):
    """(meta.json, its tokenizer, {split: list of (source ids, target ids)}) of a dataset of pairs."""
    meta, tok, ids = read_dataset(folder)
    assert meta['kind'] == 'pairs'
    pairs = {}
    for split, array in ids.items():
        offsets = np.fromfile(folder / f'{split}.idx', dtype='<i8').tolist()
        assert offsets[0] == 0 and offsets[-1] == len(array) and offsets == sorted(offsets)
        assert len(offsets) == 2 * meta['pairs'][split] + 1
        sides = [array[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
        pairs[split] = list(zip(sides[::2], sides[1::2]))
    return meta, tok, pairs


def pair_texts(tok, pairs):
    """[(source, target)] as text. Each target must end with the end id."""
    for source, target in pairs:
        assert target[-1] == tok.eos_id and tok.eos_id not in source + target[:-1]
    return [(tok.decode(source), tok.decode(target)) for source, target in pairs]


@contextmanager
def serve(handler):
    """The address of a server on this machine, http://127.0.0.1:PORT."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def serve_folder(folder):
    """serve() with the files of a folder."""
    return serve(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder)))
