"""Tiny Shakespeare with a byte-pair tokenizer of its own, learned from the train part alone: the split is shakespeare_char's.

Beside the dataset come vocab.txt, the vocabulary to read, and tokenizer.json, which Hugging Face's libraries load.
"""
from common import SHAKESPEARE_SHA256, SHAKESPEARE_URLS, dataset_folder, input_text, write_stream
from configurator import configure
from files import write_whole
from tokenizer import make

vocab_size = 4096            # 256 bytes, merges, and a token for the end of a text
input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # tried in this order
configure(__file__, globals())

folder = dataset_folder(data_dir, 'shakespeare_bpe')
text, source = input_text(input, urls, SHAKESPEARE_SHA256, folder)
n = int(len(text) * 0.9)
tokenizer = make('bpe', [text[:n]], vocab_size)
train, val = tokenizer.encode_batch([text[:n], text[n:]])
write_stream(folder, tokenizer, train, val, source, 'first 90 % / last 10 % of the characters')
write_whole(folder / 'vocab.txt', lambda f: f.write(tokenizer.listing().encode('utf-8')))
write_whole(folder / 'tokenizer.json', lambda f: f.write(tokenizer.tokenizer_json().encode('utf-8')))
print('next: python train.py config/shakespeare_bpe.py' + (f' --data_dir={data_dir}' if data_dir else ''))
