"""Tiny Shakespeare: where it is, for the scripts in prepare/ that make datasets of it."""

SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SHAKESPEARE_URLS = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
    'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt',
)
