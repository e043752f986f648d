"""
Tiny Shakespeare in GPT-2's tokens, to fine-tune GPT-2 on: 301,966 train and 36,059 val ids.

The split is nanoGPT's: the first 90 % of the text is train, the last 10 % val.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.shakespeare import SHAKESPEARE_SHA256, SHAKESPEARE_URLS

tokenizer = 'gpt2'           # or that of a model: smollm2, a folder or out/RUN; then choose a name
name = 'shakespeare_gpt2'    # of the dataset: it is written to data/NAME
input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # where to download it, tried in this order
configure(__file__, globals())

from pocket.datasets import (
    dataset_folder,
    make_dataset_tokenizer,
    print_next_step,
    read_or_download,
    write_stream,
)

# Get the text and the tokenizer
folder = dataset_folder(data_dir, name)
text, source = read_or_download(input, urls, SHAKESPEARE_SHA256, folder)
tok, _ = make_dataset_tokenizer(tokenizer)

# Split, encode and write
n = int(len(text) * 0.9)
how_split = 'first 90 % / last 10 % of the characters'
write_stream(folder, tok, text[:n], text[n:], source, how_split)
config = 'config/finetune_gpt2.py'
print_next_step(config if name == 'shakespeare_gpt2' else f'--dataset={name}', data_dir)
