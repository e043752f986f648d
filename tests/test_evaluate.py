"""
pocket/evaluate.py: which replies are compared with what, and the scores of text without spaces.

Run it alone: pytest -n 0 tests/test_evaluate.py
"""
from types import SimpleNamespace

import pytest
import torch

from pocket import evaluate
from pocket.checkpoint import TrainState
from pocket.data import Pairs, load_meta
from pocket.datasets import write_pairs
from pocket.errors import UserError
from pocket.evaluate import Reply, generate_replies, pick_bleu_tokenize, score_replies
from pocket.template import ChatTemplate, reply_start_ids
from pocket.tokenizer import make_tokenizer

TEMPLATE = ChatTemplate()
CHINESE = ['我今天去公园散步，谢谢你问我。', '他的车坏了。', '我们明天早上八点出发。']
JAPANESE = ['今日は公園に行きました。', 'とても楽しかったです。']
THAI = ['วันนี้ฉันไปเดินเล่นในสวนสาธารณะ', 'ขอบคุณที่ถาม']
ENGLISH = ['I went to the park today, thank you.', 'His car broke down this morning.']


def perfect(references, is_cut=False):
    return [Reply('', reference, reference, is_cut) for reference in references]


def scores(lines):
    """{name: number} of the lines that begin with a name and a number."""
    found = {}
    for line in lines:
        name, number, *_ = line.split(' ')
        if number.replace('.', '').isdigit():
            found[name] = float(number)
    return found


# --- Whole references, and room for replies -------------------------------------------------------

@pytest.fixture
def pairs(tmp_path):
    """Pairs whose targets have 10, 60 and 300 bytes."""
    tok = make_tokenizer('byte', special_tokens=('pad', 'bos', 'eos'))
    rows = [(f'poem {n}', 'abcde fghi' * (n // 10)) for n in (10, 60, 300)]
    write_pairs(tmp_path, tok, {'train': rows, 'val': rows}, {'source': 'made up'}, 'none')
    return tmp_path, tok, dict(rows)


def replies_of_parrot(monkeypatch, pairs, block_size, max_new_tokens=None, **options):
    """The replies of a model that always knows the right one, if it may write enough."""
    folder, tok, rows = pairs
    data = Pairs(folder, load_meta(folder), 'val', reply_start_ids(tok, TEMPLATE), block_size)
    limits = []

    def generate_stream(model, prompts, limit, *args, **others):
        limits.append(limit)
        known = [[*tok.encode(rows[tok.decode(prompt)]), tok.eos_id] for prompt in prompts]
        for i in range(limit):
            column = [row[i] if i < len(row) else -1 for row in known]
            if max(column) < 0:
                return
            yield torch.tensor(column)

    monkeypatch.setattr(evaluate, 'generate_stream', generate_stream)
    config = SimpleNamespace(block_size=block_size, vocab_size=tok.vocab_size)
    model = SimpleNamespace(config=config, is_encoder_decoder=False, eval=lambda: None)
    replies = generate_replies(model, tok, TEMPLATE, data, 3, max_new_tokens, **options)
    return replies, limits


def test_right_replies_score_100_if_they_fit_the_context(monkeypatch, pairs, capsys):
    replies, _ = replies_of_parrot(monkeypatch, pairs, block_size=320)
    assert [reply.text for reply in replies] == [reply.reference for reply in replies]
    assert not any(reply.is_cut for reply in replies)
    assert scores(score_replies(replies))['BLEU'] == 100


def test_references_are_whole_and_cut_replies_are_counted(monkeypatch, pairs):
    _, _, rows = pairs
    replies, _ = replies_of_parrot(monkeypatch, pairs, block_size=64)
    assert [reply.reference for reply in replies] == list(rows.values())
    assert [reply.is_cut for reply in replies] == [False, True, True]
    assert len(replies[2].text) == 55  # of 56, which is 64 + 1 - 9 of the prompt: a space ends it
    lines = score_replies(replies)
    assert any(line.startswith('2 of 3 replies were cut off') for line in lines)
    assert scores(lines)['BLEU'] < 50
    assert scores(lines)['length'] == pytest.approx((1 + 55 / 60 + 55 / 300) / 3, abs=0.03)


def test_replies_are_no_longer_than_anybody_speaks(monkeypatch, pairs):
    _, limits = replies_of_parrot(monkeypatch, pairs, block_size=4096)
    assert max(limits) == 2 * 301


def test_samples_in_training_keep_their_length(monkeypatch, pairs):
    replies, limits = replies_of_parrot(monkeypatch, pairs, block_size=64, max_new_tokens=20)
    assert max(limits) == 20 and len(replies[2].text) == 20


def test_a_bar_in_what_is_said_does_not_end_it():
    tok = make_tokenizer('byte', special_tokens=('pad', 'bos', 'eos'))
    turn = [tok.eos_id, *tok.encode('this |  that\nor | nothing'), tok.eos_id]
    ids = [*turn, *tok.encode('Fine.'), tok.eos_id]
    chats = SimpleNamespace()  # no Pairs
    assert evaluate.source_text(tok, chats, ids) == 'this | that or | nothing'
    assert evaluate.source_text(tok, chats, [tok.eos_id]) == ''
    assert evaluate.readable(tok, ids) == 'this |  that\nor | nothing | Fine.'


# --- BLEU -----------------------------------------------------------------------------------------

def test_tokenized_text_is_compared_word_by_word(caplog):
    references = ['ein mann , der läuft .', 'zwei hunde spielen im schnee .'] * 60
    replies = perfect(references)
    replies[0].text = 'eine frau , die läuft .'
    [line] = [line for line in score_replies(replies, 'none') if line.startswith('BLEU')]
    assert 'tok:none' in line and 98 < scores([line])['BLEU'] < 100
    assert not caplog.records   # sacrebleu warns about text that looks tokenized


@pytest.fixture
def model_of_replies(monkeypatch):
    """A model whose replies are all right, and a list of what was asked of it."""
    pytest.importorskip('sacrebleu')
    asked = []

    def generate_replies(model, tok, template, data, count, num_beams, length_penalty, stopped):
        if stopped():
            return None
        asked.append((count, num_beams, length_penalty))
        return perfect(ENGLISH * 3)

    monkeypatch.setattr(evaluate, 'generate_replies', generate_replies)
    return SimpleNamespace(train=lambda: asked.append('train')), asked


def test_bleu_in_training(model_of_replies, capsys):
    model, asked = model_of_replies
    config = {'eval_bleu': 6, 'num_beams': 2, 'length_penalty': 1.2, 'bleu_tokenize': 'auto'}
    bleu = evaluate.bleu_of(model, None, TEMPLATE, None, config)
    assert bleu == pytest.approx(100)
    assert asked == [(6, 2, 1.2), 'train']
    out = capsys.readouterr().out
    assert out.count('  -> ') == 3 and 'BLEU 100.00 of 6 replies\n' in out


def test_bleu_in_training_can_be_stopped(model_of_replies, capsys):
    model, asked = model_of_replies
    config = {'eval_bleu': 6, 'num_beams': 2, 'length_penalty': 1.2, 'bleu_tokenize': 'auto'}
    assert evaluate.bleu_of(model, None, TEMPLATE, None, config, stopped=lambda: True) is None
    assert asked == ['train']
    assert capsys.readouterr().out == ''


def test_replies_stop_between_batches(monkeypatch, pairs):
    answers = iter([False, True])
    replies, limits = replies_of_parrot(monkeypatch, pairs, block_size=320, batch_size=1,
                                        stopped=lambda: next(answers))
    assert replies is None and len(limits) == 1


def test_bleu_in_training_says_how_many_replies_are_cut(model_of_replies, monkeypatch, capsys):
    model, _ = model_of_replies
    replies = perfect(ENGLISH)
    replies[0].is_cut = True
    monkeypatch.setattr(evaluate, 'generate_replies', lambda *args, **kwargs: replies)
    config = {'eval_bleu': len(replies), 'num_beams': 1, 'length_penalty': 0.6,
              'bleu_tokenize': 'auto'}
    evaluate.bleu_of(model, None, TEMPLATE, None, config)
    assert 'replies, 1 of them cut off' in capsys.readouterr().out


def test_bleu_can_decide_which_evaluation_is_best():
    state = TrainState()
    assert state.record_evaluation(4.0, bleu=0.0)   # the first is the best so far, whatever it is
    assert state.record_evaluation(3.0, bleu=0.0)   # a tie: the lower loss
    assert not state.record_evaluation(3.2, bleu=0.0)
    assert state.record_evaluation(3.5, bleu=20.0)
    assert not state.record_evaluation(2.0, bleu=19.0)
    assert (state.best, state.best_bleu, state.bad_evals) == (3.5, 20.0, 1)
    assert state.record_evaluation(1.9)             # the loss decides from here on
    assert (state.best, state.best_bleu) == (1.9, 0.0)


@pytest.mark.parametrize('changes, kind, message', [
    ({'best_by': 'bleu'}, 'pairs', 'add --eval_bleu'),
    ({'eval_bleu': 9}, 'stream', 'plain text'),
])
def test_mistakes_in_options_of_bleu(changes, kind, message):
    config = {'dataset': 'toy', 'best_by': 'loss', 'eval_bleu': 0, 'bleu_tokenize': 'auto'}
    evaluate.check_bleu_options(config, {'kind': kind})
    with pytest.raises(UserError, match=message):
        evaluate.check_bleu_options({**config, **changes}, {'kind': kind})


# --- Text without spaces --------------------------------------------------------------------------

@pytest.mark.parametrize('references, names', [
    (ENGLISH, ['13a']),
    (CHINESE, ['zh']),
    (JAPANESE, ['ja-mecab', 'char']),
    (THAI, ['char']),
    (['안녕하세요, 오늘은 공원에 갔어요.'], ['13a']),
    ([*ENGLISH * 5, '公园'], ['13a']),
    ([], ['13a']),
])
def test_bleu_finds_words_by_the_script(references, names):
    name, note = pick_bleu_tokenize(references)
    assert name in names
    assert (note is None) == (name == '13a')


def test_a_tokenizer_that_needs_spaces_is_warned_about():
    assert pick_bleu_tokenize(CHINESE, 'char') == ('char', None)
    assert pick_bleu_tokenize(ENGLISH, '13a') == ('13a', None)
    name, note = pick_bleu_tokenize(CHINESE, '13a')
    assert name == '13a' and 'no spaces between words' in note


@pytest.mark.parametrize('references', [ENGLISH, CHINESE, THAI])
def test_perfect_replies_score_100_in_any_script(references):
    found = scores(score_replies(perfect(references)))
    assert found['BLEU'] == 100 and found['chrF2'] == 100 and found['length'] == 1
    assert found['distinct-1'] > 0.4 and found['distinct-2'] > 0.6


def test_one_wrong_character_is_not_worth_nothing():
    references = CHINESE * 5
    replies = [Reply('', text, text.replace('我', '他'), False) for text in references]
    assert 40 < scores(score_replies(replies))['BLEU'] < 100
    assert scores(score_replies(replies, '13a'))['BLEU'] < 40


def test_distinct_counts_words_where_there_are_spaces():
    lines = score_replies([Reply('', 'a b', 'a b a b', False), Reply('', 'a b', 'a b', False)])
    assert 'distinct-1 0.3333 (6 in 2 replies)' in lines
    assert 'distinct-2 0.5000 (4 in 2 replies)' in lines
