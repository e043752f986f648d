"""
Tiny Shakespeare, one token per character: 1,003,854 train and 111,540 val ids.

The split is nanoGPT's: the first 90 % of the text is train, the last 10 % val.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.datasets import (
    SHAKESPEARE_SHA256,
    SHAKESPEARE_URLS,
    dataset_folder,
    print_next_step,
    read_or_download,
    write_stream,
)
from pocket.tokenizer import make_tokenizer

input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # where to download it, tried in this order
configure(__file__, globals())

# Get the text
folder = dataset_folder(data_dir, 'shakespeare_char')
text, source = read_or_download(input, urls, SHAKESPEARE_SHA256, folder)

# The vocabulary: every character that occurs in it
tokenizer = make_tokenizer('char', [text])

# Split, encode and write
n = int(len(text) * 0.9)
write_stream(folder, tokenizer, text[:n], text[n:], source, 'first 90 % / last 10 %')
print_next_step('config/shakespeare_char_cpu.py', data_dir)
