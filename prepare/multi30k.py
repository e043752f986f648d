"""
Multi30k: captions of pictures in English and German, to translate from one into the other.

    python prepare/multi30k.py                            English to German, ordinary text
    python prepare/multi30k.py --text=tok                 lowercased and tokenized: for papers' BLEU
    python prepare/multi30k.py --source=de --target=en    German to English
    python prepare/multi30k.py --input=FOLDER             from copies of its files, .gz or not

29,000 pairs for train, 1,014 for val, and 1,000 for test, the pictures of 2016: the dataset's own
split. Both languages share one tokenizer, which learns from train. Evaluate on test:

    python train.py config/multi30k.py --eval_only --eval_split=test --eval_replies=1000 \
        --num_beams=5

Elliott et al. 2016, https://arxiv.org/abs/1605.00459. The captions are for research: cite it.
"""
import gzip
import sys
from pathlib import Path
from typing import Literal

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

text: Literal['raw', 'tok'] = 'raw'  # tok: lowercased, normalized and tokenized by Moses' scripts
source: Literal['en', 'de'] = 'en'   # the language to translate from
target: Literal['en', 'de'] = 'de'   # the language to translate into
tokenizer = 'bpe'            # char, byte, bpe, sentencepiece, gpt2, smollm2, FOLDER or out/RUN
vocab_size = 5000            # of a bpe or sentencepiece, which are trained on both languages
input: str | None = None     # a folder with local copies of the six files (None: download them)
name: str | None = None      # the dataset is data/NAME (None: multi30k, or multi30k_tok)
data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
urls: tuple[str, ...] = (
    'https://raw.githubusercontent.com/multi30k/dataset/master/data/task1',
    'https://cdn.jsdelivr.net/gh/multi30k/dataset@master/data/task1',
)  # folders with raw/ and tok/, tried in this order
configure(__file__, globals())

from pocket.datasets import dataset_folder, make_dataset_tokenizer, print_next_step, write_pairs
from pocket.errors import UserError
from pocket.files import download, find_path, sha256_of

# {split: what its files' names begin with}
SPLITS = {'train': 'train', 'val': 'val', 'test': 'test_2016_flickr'}

# {file: sha256 of its content}, uncompressed
SHA256 = {
    'train.en': '460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6',
    'train.de': '2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72',
    'val.en': '1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227',
    'val.de': '660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660',
    'test_2016_flickr.en': '399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182',
    'test_2016_flickr.de': '4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16',
    'train.lc.norm.tok.en': '08925f8e0572bcd5a006702fc5fe20e2d77c6917d4eebd576fc20de6693c2119',
    'train.lc.norm.tok.de': 'cb5a23529b65ec2061f1dc446192a9c37382b63cc75f81a0be59d34894b3a505',
    'val.lc.norm.tok.en': '46573ce391ae227f1c72f873392436a20ef18e0a6d518098cfbd70b77c8572ec',
    'val.lc.norm.tok.de': '97232bd273eceb7207f689527386a97e4be2616b18ada47576bdaf96c8ae1f00',
    'test_2016_flickr.lc.norm.tok.en':
        '5b7f32627cf99eced828311b955dae9800bb52bc8b91cf8b6526829e605b29d2',
    'test_2016_flickr.lc.norm.tok.de':
        'c6a33d39d48f9f510de147651316cd9d918e09ad0219df734a2f16b6baccacc4',
}

# {file: sha256 of the compressed file that is downloaded}
SHA256_GZ = {
    'train.en.gz': 'd79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f',
    'train.de.gz': '726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6',
    'val.en.gz': '14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28',
    'val.de.gz': 'f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a',
    'test_2016_flickr.en.gz': '611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9',
    'test_2016_flickr.de.gz': '9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8',
}


def file_name(split, language):
    """The name of one of the files, uncompressed.

    The repository has tokenized files as they are, and the others compressed.
    """
    if text == 'tok':
        return f'{SPLITS[split]}.lc.norm.tok.{language}'
    return f'{SPLITS[split]}.{language}'


def find_file(file):
    """Path of a file: in the folder that --input names, compressed or not, or downloaded."""
    if input:
        for path in (find_path(input) / file, find_path(input) / f'{file}.gz'):
            if path.is_file():
                return path
        raise UserError(f'{input} has neither {file} nor {file}.gz: give a folder with copies of '
                        f'the files of Multi30k, or omit --input to download them')

    advice = ('Without a network, give a folder with copies of its files: '
              'python prepare/multi30k.py --input=FOLDER')
    stored = file if text == 'tok' else f'{file}.gz'
    candidates = [f'{url}/{text}/{stored}' for url in urls]
    sha256 = SHA256[file] if text == 'tok' else SHA256_GZ[stored]
    return download(candidates, folder / stored, sha256, advice)


def read_captions(path):
    r"""The lines of a file. Only \n ends one: other line ends must not shift the pairs."""
    open_file = gzip.open if path.suffix == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            content = file.read().decode('utf-8')
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read {path}: {e}') from None
    return [line.strip() for line in content.removesuffix('\n').split('\n')]


def read_pairs(split):
    """[(source, target), …] of a split, and the paths of the two files."""
    paths = [find_file(file_name(split, language)) for language in (source, target)]
    sources, targets = map(read_captions, paths)
    if len(sources) != len(targets):
        raise UserError(f'{paths[0]} has {len(sources):,} lines, {paths[1]} has {len(targets):,}: '
                        'line n of one must translate that of the other')
    return list(zip(sources, targets)), paths


# Check the options
if source == target:
    raise UserError(f'source and target must be two languages, got {source} for both')
if name is None:
    name = 'multi30k_tok' if text == 'tok' else 'multi30k'
folder = dataset_folder(data_dir, name)

# Read the pairs
splits = {}
files = []
for split in SPLITS:
    splits[split], paths = read_pairs(split)
    files += paths

# A tokenizer learns from train alone, but a char tokenizer could not write the rest without all
# of the characters
learned = splits['train']
if tokenizer == 'char':
    learned = [pair for pairs in splits.values() for pair in pairs]
captions = [caption for pair in learned for caption in pair]
tok, _ = make_dataset_tokenizer(tokenizer, captions, vocab_size,
                                special_tokens=('pad', 'bos', 'eos'))
if tok.eos_id is None or tok.decoder_start_id is None:
    raise UserError(f'--tokenizer={tokenizer} has no special tokens to begin and end translations '
                    'with: choose another')

# Encode and write
about = {
    'source': [str(file) for file in files],
    'sha256': [sha256_of(file) for file in files],
    'languages': [source, target],
}
write_pairs(folder, tok, splits, about, "the dataset's own")
arguments = 'config/multi30k.py'
if name != 'multi30k':
    arguments += f' --dataset={name}'
print_next_step(arguments, data_dir)
