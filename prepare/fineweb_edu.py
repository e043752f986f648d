"""
FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557): web pages that teach something. This is its
sample of 10 billion (GPT-2) tokens, in 14 files of about 2 GB; one is plenty.

To read them, pip install pyarrow. We do not know their sha256, so only their lengths are checked.
"""
import functools
import sys
import zlib
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

shards = 1                   # [1, 14] how many of the 14 files to use
input: tuple[str, ...] = ()  # local copies of such files instead; may be given several times
tokenizer = 'gpt2'           # byte, bpe, sentencepiece, gpt2, smollm2, FOLDER or out/RUN
vocab_size = 32768           # of a bpe or sentencepiece, which are trained here
val_every = 1000             # [2, inf) about one page in this many is val, by a hash of its text
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
endpoint: str | None = None  # a mirror of https://huggingface.co (None: $HF_ENDPOINT, or itself)
configure(__file__, globals())

from pocket.datasets import (
    dataset_folder,
    file_size,
    hugging_face_url,
    make_dataset_tokenizer,
    print_next_step,
    training_sample,
    write_corpus,
)
from pocket.errors import UserError
from pocket.files import download

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    raise UserError('reading .parquet files takes a package that is not installed: '
                    'pip install pyarrow') from None

folder = dataset_folder(data_dir, 'fineweb_edu')
url = hugging_face_url('HuggingFaceFW/fineweb-edu', endpoint) + 'sample/10BT/'


def read_pages(file):
    """Yield the pages of a file as pieces, each one a document. It is read a group of rows at a
    time, and downloaded when its turn comes."""
    if input:
        path = Path(file)
    else:
        advice = 'The same command resumes the download; or give local copies: --input=FILE'
        path = download([url + file], folder / file, None, advice)
    try:
        with parquet.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=['text'])
                for text in rows.column('text').to_pylist():
                    is_val = zlib.crc32(text.encode()) % val_every == 0
                    yield 'val' if is_val else 'train', text, True
    except (OSError, KeyError, pyarrow.ArrowInvalid) as e:
        raise UserError(f'cannot read {path} as a .parquet file with a column named text: '
                        f'{e}') from None


# The files, and the sizes of local ones: another file of the same name is another source
if input:
    files = {file: file_size(file) for file in input}
else:
    files = {f'{i:03}_00000.parquet': None for i in range(shards)}

# Train the tokenizer on the first pages of train, then encode and write all of them
parts = [functools.partial(read_pages, file) for file in files]
tok, _ = make_dataset_tokenizer(tokenizer, training_sample(parts), vocab_size)
source = {'source': 'HuggingFaceFW/fineweb-edu, sample 10BT', 'files': files}
how_split = f'a hash of its text puts about 1 page in {val_every:,} into val'
write_corpus(folder, tok, parts, source, how_split)
print_next_step('--dataset=fineweb_edu', data_dir)
