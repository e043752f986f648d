"""
The Verdict, a short story by Edith Wharton (1908), in GPT-2's tokens: small enough to read it all.

The first 90 % of the characters is train, the last 10 % val: 4,612 and 534 ids. The uncut story has
5,145, one fewer, because the cut falls inside a token.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

tokenizer = 'gpt2'           # or that of a model: smollm2, a folder or out/RUN; then choose a name
name = 'verdict'             # of the dataset: it is written to data/NAME
input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt',
    'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/ch02/01_main-chapter-code/the-verdict.txt',
)  # where to download it, tried in this order
configure(__file__, globals())

from pocket.datasets import (
    dataset_folder,
    make_dataset_tokenizer,
    print_next_step,
    read_or_download,
    write_stream,
)

SHA256 = 'b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f'

# Get the text and the tokenizer
folder = dataset_folder(data_dir, name)
text, source = read_or_download(input, urls, SHA256, folder)
tok, _ = make_dataset_tokenizer(tokenizer)

# Split, encode and write
n = int(len(text) * 0.9)
how_split = 'first 90 % / last 10 % of the characters'
write_stream(folder, tok, text[:n], text[n:], source, how_split)
print_next_step(f'--dataset={name}', data_dir)
