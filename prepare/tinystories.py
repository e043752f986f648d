"""
TinyStories (Eldan and Li 2023, arXiv:2305.07759): short stories in the words of a small child,
written by GPT-4 (version 2: 2.2 GB, about 2.7 million stories). Small models learn to tell them.

The files come from Hugging Face. We do not know their sha256, so only their lengths are checked.
"""
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

input: str | None = None     # a folder with local copies of the two files (None: download them)
tokenizer = 'bpe'            # char, byte, bpe, sentencepiece, gpt2, smollm2, FOLDER or out/RUN
vocab_size = 4096            # of a bpe or sentencepiece, which are trained here
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
endpoint: str | None = None  # a mirror of https://huggingface.co (None: $HF_ENDPOINT, or itself)
configure(__file__, globals())

from pocket.datasets import (
    dataset_folder,
    file_size,
    hugging_face_url,
    make_dataset_tokenizer,
    print_next_step,
    read_documents,
    training_sample,
    write_corpus,
)
from pocket.files import download

FILES = {'train': 'TinyStoriesV2-GPT4-train.txt', 'val': 'TinyStoriesV2-GPT4-valid.txt'}

# Get the files
folder = dataset_folder(data_dir, 'tinystories')
url = hugging_face_url('roneneldan/TinyStories', endpoint)
advice = ('The same command resumes the download; or give a folder with copies of both files: '
          '--input=FOLDER')
paths = {}
for split, file in FILES.items():
    if input:
        paths[split] = Path(input) / file
    else:
        paths[split] = download([url + file], folder / file, None, advice)
sizes = {split: file_size(path) for split, path in paths.items()}


# Read them story by story
def train_pieces():
    for text, ends in read_documents(paths['train'], separator='<|endoftext|>'):
        yield 'train', text, ends


def val_pieces():
    for text, ends in read_documents(paths['val'], separator='<|endoftext|>'):
        yield 'val', text, ends


# Train the tokenizer on the first stories of train, then encode and write all of them
shards = [train_pieces, val_pieces]
tok, _ = make_dataset_tokenizer(tokenizer, training_sample(shards), vocab_size)
source = {'source': 'roneneldan/TinyStories', 'bytes': sizes}
write_corpus(folder, tok, shards, source, 'the official one', characters=sum(sizes.values()))
print_next_step('--dataset=tinystories', data_dir)
