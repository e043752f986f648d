"""
Tiny Shakespeare with a byte-pair encoding of its own, trained on the train part alone.

The split is that of shakespeare_char.py. Beside the dataset it writes vocab.txt, the vocabulary to
read, and tokenizer.json, which Hugging Face's libraries load.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.shakespeare import SHAKESPEARE_SHA256, SHAKESPEARE_URLS

tokenizer = 'bpe'            # or that of a model: smollm2, a folder or out/RUN; then choose a name
name = 'shakespeare_bpe'     # of the dataset: it is written to data/NAME
vocab_size = 4096            # 256 bytes, then the merges, then an end-of-text token
input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # where to download it, tried in this order
configure(__file__, globals())

from pocket.datasets import (
    dataset_folder,
    make_dataset_tokenizer,
    print_next_step,
    read_or_download,
    write_bytes,
    write_stream,
)

# Get the text and split it
folder = dataset_folder(data_dir, name)
text, source = read_or_download(input, urls, SHAKESPEARE_SHA256, folder)
n = int(len(text) * 0.9)
train_text = text[:n]
val_text = text[n:]

# Train the tokenizer; val has no say in it
tok, _ = make_dataset_tokenizer(tokenizer, [train_text], vocab_size)

# Encode and write
how_split = 'first 90 % / last 10 % of the characters'
write_stream(folder, tok, train_text, val_text, source, how_split)
if tokenizer == 'bpe':
    write_bytes(folder / 'vocab.txt', tok.vocabulary_listing().encode('utf-8'))
    write_bytes(folder / 'tokenizer.json', tok.tokenizer_json().encode('utf-8'))
config = 'config/shakespeare_bpe.py'
print_next_step(config if name == 'shakespeare_bpe' else f'--dataset={name}', data_dir)
