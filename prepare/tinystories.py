"""
TinyStories: short stories in the words of a small child, written by GPT-4 (V2: 2.2 GB, about 2.7 million of them).

Small models learn to tell them. Hugging Face has the files; their sha256 is not known to us, so their lengths are checked.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, download, hugging_face, read_documents, size_of, train_texts, write_corpus
from pocket.tokenizer import make_tokenizer

input: str | None = None     # a folder with local copies of the two files (None: download them)
tokenizer = 'bpe'            # char, byte, bpe, sentencepiece, or one of tiktoken's, such as gpt2
vocab_size = 4096            # of a bpe or sentencepiece, which are trained here
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
endpoint: str | None = None  # a mirror of https://huggingface.co (None: what the variable HF_ENDPOINT says, or that itself)
configure(__file__, globals())

FILES = {'train': 'TinyStoriesV2-GPT4-train.txt', 'val': 'TinyStoriesV2-GPT4-valid.txt'}
ADVICE = 'The same command goes on from there; or give a folder with copies of both files with --input=FOLDER'

folder = dataset_folder(data_dir, 'tinystories')
url = hugging_face(endpoint, 'roneneldan/TinyStories')
paths = {split: Path(input) / file if input else download([url + file], folder / file, None, ADVICE)
         for split, file in FILES.items()}
sizes = {split: size_of(path) for split, path in paths.items()}


def stories(split):
    """One of the files in pieces (see corpus.py)."""
    return lambda: ((split, text, ends) for text, ends in read_documents(paths[split], '<|endoftext|>'))


shards = [stories(split) for split in FILES]
tok = make_tokenizer(tokenizer, train_texts(shards), vocab_size)
write_corpus(folder, tok, shards, {'source': 'roneneldan/TinyStories', 'bytes': sizes}, 'the official one', sum(sizes.values()))
print('next: python train.py --dataset=tinystories' + (f' --data_dir={data_dir}' if data_dir else ''))
