"""
Tiny Shakespeare, one token per character: 1,003,854 train and 111,540 val ids.

The split is nanoGPT's: the first 90 % of the text is train, the last 10 % val.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.shakespeare import SHAKESPEARE_SHA256, SHAKESPEARE_URLS

tokenizer = 'char'           # or that of a model: smollm2, a folder or out/RUN; then choose a name
name = 'shakespeare_char'    # of the dataset: it is written to data/NAME
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

# Get the text
folder = dataset_folder(data_dir, name)
text, source = read_or_download(input, urls, SHAKESPEARE_SHA256, folder)

# The vocabulary: every character that occurs in it
tok, _ = make_dataset_tokenizer(tokenizer, [text])

# Split, encode and write
n = int(len(text) * 0.9)
write_stream(folder, tok, text[:n], text[n:], source, 'first 90 % / last 10 %')
config = 'config/shakespeare_char_cpu.py'
print_next_step(config if name == 'shakespeare_char' else f'--dataset={name}', data_dir)
