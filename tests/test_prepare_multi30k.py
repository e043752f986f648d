"""
prepare/multi30k.py: captions in two languages, from copies of the files and from a server.

Run it alone: pytest -n 0 tests/test_prepare_multi30k.py
"""
import gzip

import pytest
from conftest import Project
from prepared import pair_texts, read_pairs, serve_folder

ENGLISH = ['A dog runs.', 'Two men sit.', 'A girl reads a book.']
GERMAN = ['Ein Hund rennt.', 'Zwei Männer sitzen.', 'Ein Mädchen liest ein Buch.']
SMALL = ['prepare/multi30k.py', '--vocab_size=300']


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'clone übung')


@pytest.fixture
def captions(tmp_path):
    """A folder with six files of three captions: those of train compressed."""
    folder = tmp_path / 'captions'
    folder.mkdir()
    for language, lines in (('en', ENGLISH), ('de', GERMAN)):
        content = ''.join(f'{line}\n' for line in lines).encode('utf-8')
        (folder / f'train.{language}.gz').write_bytes(gzip.compress(content))
        (folder / f'val.{language}').write_bytes(content)
        (folder / f'test_2016_flickr.{language}').write_bytes(content)
    return folder


def test_pairs_of_three_splits_either_way(project, captions):
    out, _ = project.run(*SMALL, f'--input={captions}')
    assert '3 train and 3 val and 3 test pairs' in out and 'config/multi30k.py' in out
    meta, tok, pairs = read_pairs(project.root / 'data' / 'multi30k')
    for split in ('train', 'val', 'test'):
        assert pair_texts(tok, pairs[split]) == list(zip(ENGLISH, GERMAN))
    assert meta['languages'] == ['en', 'de'] and meta['vocab_size'] <= 300

    project.run(*SMALL, f'--input={captions}', '--source=de', '--target=en', '--name=back')
    _, tok, pairs = read_pairs(project.root / 'data' / 'back')
    assert pair_texts(tok, pairs['test']) == list(zip(GERMAN, ENGLISH))


def test_tokenized_text_is_a_dataset_of_its_own(project, captions):
    for path in list(captions.iterdir()):
        name = path.name.removesuffix('.gz')
        split, language = name.rsplit('.', 1)
        suffix = '.gz' if path.suffix == '.gz' else ''
        path.rename(captions / f'{split}.lc.norm.tok.{language}{suffix}')
    out, _ = project.run(*SMALL, f'--input={captions}', '--text=tok')
    assert '--dataset=multi30k_tok' in out


def test_mistakes_in_files_and_options(project, captions, tmp_path):
    err = project.fails(*SMALL, '--source=de')
    assert 'must be two languages' in err
    (captions / 'val.de').write_bytes(b'Eins.\n')
    err = project.fails(*SMALL, f'--input={captions}')
    assert 'val.en has 3 lines' in err and 'val.de has 1' in err
    (captions / 'val.de').write_bytes(b'\xff\n')
    assert 'val.de' in project.fails(*SMALL, f'--input={captions}')
    (captions / 'train.de.gz').write_bytes(b'no gzip')
    assert 'train.de.gz' in project.fails(*SMALL, f'--input={captions}')
    (captions / 'val.en').unlink()
    (captions / 'train.de.gz').write_bytes(gzip.compress(b'Eins.\nZwei.\nDrei.\n'))
    assert 'neither val.en nor val.en.gz' in project.fails(*SMALL, f'--input={captions}')

    # Downloads are verified
    (tmp_path / 'raw').mkdir()
    for name in ('train.en.gz', 'train.de.gz'):
        (tmp_path / 'raw' / name).write_bytes(gzip.compress(b'Something else.\n'))
    with serve_folder(tmp_path) as url:
        err = project.fails(*SMALL, f'--urls={url}')
    assert 'wrong sha256' in err and '--input=FOLDER' in err
