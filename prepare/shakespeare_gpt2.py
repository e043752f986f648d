"""Tiny Shakespeare with GPT-2's tokens, to go on training GPT-2 with: 301,966 train and 36,059 val ids, split as nanoGPT does."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import SHAKESPEARE_SHA256, SHAKESPEARE_URLS, dataset_folder, input_text, write_stream
from pocket.tokenizer import make_tokenizer

input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # tried in this order
configure(__file__, globals())

folder = dataset_folder(data_dir, 'shakespeare_gpt2')
text, source = input_text(input, urls, SHAKESPEARE_SHA256, folder)
tokenizer, n = make_tokenizer('gpt2'), int(len(text) * 0.9)
train, val = tokenizer.encode_batch([text[:n], text[n:]])
write_stream(folder, tokenizer, train, val, source, 'first 90 % / last 10 % of the characters')
print('next: python train.py config/finetune_gpt2.py' + (f' --data_dir={data_dir}' if data_dir else ''))
