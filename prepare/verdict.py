"""The Verdict, a short story by Edith Wharton (1908), with GPT-2's tokens: small enough to look at everything.

First 90 % / last 10 % of the characters: 4,612 train and 534 val ids. Uncut it is 5,145: the cut falls into a token.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, input_text, write_stream
from pocket.tokenizer import make_tokenizer

input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt',
    'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/ch02/01_main-chapter-code/the-verdict.txt')  # tried in this order
configure(__file__, globals())

folder = dataset_folder(data_dir, 'verdict')
text, source = input_text(input, urls, 'b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f', folder)
tokenizer = make_tokenizer('gpt2')
n = int(len(text) * 0.9)
train, val = tokenizer.encode_batch([text[:n], text[n:]])
write_stream(folder, tokenizer, train, val, source, 'first 90 % / last 10 % of the characters')
print('next: python train.py --dataset=verdict' + (f' --data_dir={data_dir}' if data_dir else ''))
