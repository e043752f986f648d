"""Tiny Shakespeare, a character a token: 1,003,854 train and 111,540 val ids, split as nanoGPT does (first 90 % / last 10 %)."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import SHAKESPEARE_SHA256, SHAKESPEARE_URLS, dataset_folder, input_text, write_stream
from pocket.tokenizer import CharTokenizer

input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = SHAKESPEARE_URLS  # tried in this order
configure(__file__, globals())

folder = dataset_folder(data_dir, 'shakespeare_char')
text, source = input_text(input, urls, SHAKESPEARE_SHA256, folder)
tokenizer = CharTokenizer.train(text)
ids = tokenizer.encode_to_numpy(text)
n = int(len(ids) * 0.9)
write_stream(folder, tokenizer, ids[:n], ids[n:], source, 'first 90 % / last 10 %')
print('next: python train.py config/shakespeare_char_cpu.py' + (f' --data_dir={data_dir}' if data_dir else ''))
