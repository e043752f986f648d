"""
FineWeb-Edu: web pages that teach something. The sample of 10 billion (GPT-2) tokens, in 14 files of about 2 GB; one is plenty.

Reading them takes one more package: pip install pyarrow. Their sha256 is not known to us, so their lengths are checked.
"""
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, download, hugging_face, size_of, train_texts, write_corpus
from pocket.errors import UserError
from pocket.tokenizer import make_tokenizer

shards = 1                      # how many of the 14 files
input: tuple[str, ...] = ()     # local copies of such files, instead; may be given several times
tokenizer = 'gpt2'              # byte, bpe, sentencepiece, or one of tiktoken's
vocab_size = 32768              # of a bpe or sentencepiece, which are trained here
val_every = 1000                # about one document in so many is val: a hash of its text decides
data_dir: str | None = None     # where datasets live (None: data/ beside the scripts)
endpoint: str | None = None     # a mirror of https://huggingface.co (None: what the variable HF_ENDPOINT says, or that itself)
configure(__file__, globals())

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    raise UserError('reading .parquet files takes a package that is not installed: pip install pyarrow') from None
if not 1 <= shards <= 14 or val_every < 2:
    raise UserError(f'shards must be 1 to 14 and val_every 2 or more, got {shards} and {val_every}')
folder = dataset_folder(data_dir, 'fineweb_edu')
url = hugging_face(endpoint, 'HuggingFaceFW/fineweb-edu') + 'sample/10BT/'
ADVICE = 'The same command goes on from there; or give local copies with --input=FILE'


def pages(file):
    """A function that gives the pages of a file; it is downloaded when its turn comes, and read by groups of rows."""
    def read():
        path = Path(file) if input else download([url + file], folder / file, None, ADVICE)
        try:
            with parquet.ParquetFile(path) as table:
                for group in range(table.num_row_groups):
                    for text in table.read_row_group(group, columns=['text']).column('text').to_pylist():
                        yield 'train' if zlib.crc32(text.encode()) % val_every else 'val', text, True
        except (OSError, KeyError, pyarrow.ArrowInvalid) as e:
            raise UserError(f'cannot read {path} as a .parquet file with a column named text: {e}') from None
    return read


files = input or [f'{i:03}_00000.parquet' for i in range(shards)]
parts = [pages(file) for file in files]
tok = make_tokenizer(tokenizer, train_texts(parts), vocab_size)
source = {'source': 'HuggingFaceFW/fineweb-edu, sample 10BT', 'files': {f: size_of(f) if input else None for f in files}}
write_corpus(folder, tok, parts, source, f'a hash of its text puts about 1 page in {val_every:,} into val')
print('next: python train.py --dataset=fineweb_edu' + (f' --data_dir={data_dir}' if data_dir else ''))
