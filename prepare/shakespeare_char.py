"""Tiny Shakespeare, a character a token: 1,003,854 train and 111,540 val ids, split as nanoGPT does (first 90 % / last 10 %)."""
from common import UserError, dataset_folder, download, read_text, sha256_of, write_stream
from configurator import configure
from tokenizer import CharTokenizer

input: str | None = None     # a local copy of the text (None: download it)
data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
urls: tuple[str, ...] = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                         'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
                         'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt')  # tried in this order
configure(__file__, globals())

SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

folder = dataset_folder(data_dir, 'shakespeare_char')
ADVICE = 'Without a network, give a local copy with --input=FILE, or train on the default dataset: python train.py'
path = input or download(urls, folder / 'input.txt', SHA256, ADVICE)
text = read_text(path)
if len(text) < 20:
    raise UserError(f'{path} has only {len(text)} characters: that is too little to train on')
tokenizer = CharTokenizer.train(text)
ids = tokenizer.encode_to_numpy(text)
n = int(len(ids) * 0.9)
write_stream(folder, tokenizer, ids[:n], ids[n:], {'source': str(path), 'sha256': sha256_of(path)}, 'first 90 % / last 10 %')
print('next: python train.py config/shakespeare_char_cpu.py' + (f' --data_dir={data_dir}' if data_dir else ''))
