"""Tiny Shakespeare with a byte-pair tokenizer of its own, learned from the train part alone: the split is shakespeare_char's.

Beside the dataset come vocab.txt, the vocabulary to read, and tokenizer.json, which Hugging Face's libraries load.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import SHAKESPEARE_SHA256, SHAKESPEARE_URLS, dataset_folder, input_text, write_stream
from pocket.files import atomic_write
from pocket.tokenizer import make_tokenizer

vocab_size = 4096            # 256 bytes, merges, and a token for the end of a text
input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # tried in this order
configure(__file__, globals())

folder = dataset_folder(data_dir, 'shakespeare_bpe')
text, source = input_text(input, urls, SHAKESPEARE_SHA256, folder)
n = int(len(text) * 0.9)
tokenizer = make_tokenizer('bpe', [text[:n]], vocab_size)
train, val = tokenizer.encode_batch([text[:n], text[n:]])
write_stream(folder, tokenizer, train, val, source, 'first 90 % / last 10 % of the characters')
atomic_write(folder / 'vocab.txt', lambda f: f.write(tokenizer.vocabulary_listing().encode('utf-8')))
atomic_write(folder / 'tokenizer.json', lambda f: f.write(tokenizer.tokenizer_json().encode('utf-8')))
print('next: python train.py config/shakespeare_bpe.py' + (f' --data_dir={data_dir}' if data_dir else ''))
