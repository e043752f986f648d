"""
Conversations of one's own: reading them, learning the replies alone, training and chatting.

    pytest -n 0 tests/test_conversations.py
"""
import json

import numpy as np
import pytest
import torch
from runs import same_run

from pocket.conversations import (
    chat_template_for,
    encode_conversation_to_learn,
    read_conversations,
)
from pocket.data import Chats, load_meta
from pocket.errors import UserError
from pocket.template import JinjaTemplate
from pocket.tokenizer import make_tokenizer

ASKED = ['What is red?', 'What is blue?', 'What is green?', 'What is black?', 'What is white?']
REPLIED = ['A rose.', 'The sea.', 'A leaf.', 'The night.', 'Snow.']


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def read(tmp_path, name, content, **options):
    """The conversations of a file with this content."""
    path = tmp_path / name
    path.write_text(content, encoding='utf-8')
    conversations, _ = read_conversations(path, **options)
    return conversations


# --------------------------------------------------------------------------------------------------
# Reading

OPENAI = '{"messages": [{"role": "system", "content": "Be brief."}, ' \
         '{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'


def test_openai_messages(tmp_path):
    got = read(tmp_path, 'a.jsonl', OPENAI)
    assert got == [[{'role': 'system', 'content': 'Be brief.'}, user('Hi'), assistant('Hello!')]]


def test_sharegpt(tmp_path):
    content = [{'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yes?'},
                                  {'from': 'human', 'value': 'Bye'}, {'from': 'gpt', 'value': 'Bye.'}]}]
    got = read(tmp_path, 'a.json', json.dumps(content))
    assert got == [[user('Hi'), assistant('Yes?'), user('Bye'), assistant('Bye.')]]


@pytest.mark.parametrize('name, header, delimiter', [
    ('a.csv', 'question,answer', ','), ('a.csv', 'Answer;Question', ';'), ('a.tsv', 'prompt\tresponse', '\t'),
])
def test_tables_with_two_columns(tmp_path, name, header, delimiter):
    first_is_reply = header.lower().startswith('answer')
    rows = [header]
    for asked, replied in zip(ASKED, REPLIED):
        cells = [replied, asked] if first_is_reply else [asked, replied]
        rows.append(delimiter.join(cells))
    got = read(tmp_path, name, '\n'.join(rows) + '\n')
    assert got == [[user(asked), assistant(replied)] for asked, replied in zip(ASKED, REPLIED)]


def test_columns_that_are_not_read_are_told(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('id,question,answer,\n1,Hi,Hello,x\n2,Bye,Farewell,y\n', encoding='utf-8')
    conversations, report = read_conversations(path)
    assert conversations[0] == [user('Hi'), assistant('Hello')]
    assert list(report.unread) == ['id', 'a column without a name']
    alpaca = [{'instruction': 'Add', 'input': more, 'output': 'x'} for more in ('1 and 2', '')]
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(alpaca), encoding='utf-8')
    assert not read_conversations(path)[1].unread


def test_commas_of_a_text_make_no_table(tmp_path):
    with pytest.raises(UserError, match='a.txt is no conversation that can be read'):
        read(tmp_path, 'a.txt', 'Hello, this is prose.\nAnd another line, too.\n' * 9)
    assert read(tmp_path, 'b.txt', 'question,answer\n"Hi, you","Yes, me"\n') == [
        [user('Hi, you'), assistant('Yes, me')]]


def test_transcript_of_two_people(tmp_path):
    text = 'Ann: Hello.\nAnn: Are you there?\nBob: I am.\nAnn: Good.\nBob: Indeed\nit is.\n'
    got = read(tmp_path, 'a.txt', text, me='Bob')
    assert got == [[user('Hello.\nAre you there?'), assistant('I am.'), user('Good.'),
                    assistant('Indeed\nit is.')]]


def test_whatsapp_without_dates_media_and_notices(tmp_path):
    lines = [
        '[31/12/23, 10:00:00 PM] Ann: Messages and calls are end-to-end encrypted.',
        '[31/12/23, 10:00:02 PM] Ann: \u200eimage omitted',
        '[31/12/23, 10:00:09 PM] Ann: see you',
        'at eight?',
        '[31/12/23, 10:01:00 PM] Bob: Yes!',
        '[31/12/23, 10:01:05 PM] Bob: Bring cake',
        '[31/12/23, 10:02:00 PM] Ann: sure',
        '[31/12/23, 10:03:00 PM] Bob: thanks',
    ]
    got = read(tmp_path, 'chat.txt', '\n'.join(lines), me='Bob')
    assert [message['role'] for message in got[0]] == ['user', 'assistant', 'user', 'assistant']
    assert got[0][0]['content'].endswith('see you\nat eight?')
    assert 'omitted' not in got[0][0]['content']
    assert got[0][1] == assistant('Yes!\nBring cake')


def test_telegram(tmp_path):
    said = [('Ann', 'Hi Bob'), ('Bob', ['see ', {'type': 'link', 'text': 'http://x.y'}]), ('Ann', 'ok'),
            ('Bob', 'bye')]
    messages = [{'id': i, 'type': 'message', 'from': name, 'text': text}
                for i, (name, text) in enumerate(said)]
    messages.insert(1, {'id': 9, 'type': 'service', 'actor': 'Ann', 'action': 'phone_call', 'text': ''})
    export = {'name': 'Ann', 'type': 'personal_chat', 'id': 1, 'messages': messages}
    got = read(tmp_path, 'result.json', json.dumps(export), me='Bob')
    assert got == [[user('Hi Bob'), assistant('see http://x.y'), user('ok'), assistant('bye')]]


def test_a_telegram_export_of_all_chats_may_have_some_without_me(tmp_path):
    def chat(*said):
        return {'messages': [{'type': 'message', 'from': name, 'text': text,
                              'date': '2024-05-01T10:00:00+02:00'} for name, text in said]}

    chats = [chat(('Bob', 'Hi'), ('Ann', 'Ho')), chat(('News', 'Rain')), chat(('Carl', 'a'), ('Ann', 'b'))]
    got = read(tmp_path, 'all.json', json.dumps({'chats': {'list': chats}}), me='Ann')
    assert got == [[user('Hi'), assistant('Ho')], [user('a'), assistant('b')]]


@pytest.mark.parametrize('chats', [None, [5], [{'messages': None}], [{'messages': [5]}]])
def test_a_broken_telegram_export_is_a_sentence(tmp_path, chats):
    content = json.dumps({'chats': {'list': chats}})
    if chats is not None:
        with pytest.raises(UserError, match='chat 1.*--skip_bad'):
            read(tmp_path, 'all.json', content, me='Ann')
    assert read(tmp_path, 'all.json', content, me='Ann', skip_bad=True) == []


def test_what_stands_beside_the_messages_of_sharegpt_and_alpaca_is_read(tmp_path):
    content = [{'system': 'Purr.', 'conversations': [{'from': 'human', 'value': 'Hi'},
                                                     {'from': 'gpt', 'value': 'Miaow'}]}]
    assert read(tmp_path, 'a.json', json.dumps(content)) == [
        [{'role': 'system', 'content': 'Purr.'}, user('Hi'), assistant('Miaow')]]
    rows = [{'instruction': 'Add.', 'input': '1, 2', 'output': '3'},
            {'instruction': 'Sing.', 'input': '', 'output': 'La'}]
    assert read(tmp_path, 'a.json', json.dumps(rows)) == [
        [user('Add.\n1, 2'), assistant('3')], [user('Sing.'), assistant('La')]]


def test_a_row_without_text_is_named(tmp_path):
    rows = [{'question': 'Red?', 'answer': 'Rose'}, {'question': 'Blue?', 'answer': None}]
    with pytest.raises(UserError, match='entry 2: answer is None, not text; --skip_bad'):
        read(tmp_path, 'a.json', json.dumps(rows))
    assert len(read(tmp_path, 'a.json', json.dumps(rows), skip_bad=True)) == 1


def test_parts_of_a_message_that_are_no_text_are_left_out(tmp_path):
    parts = [{'type': 'image_url'}, {'text': 'What '}, None, 3, {'text': None}, 'is this?']
    content = json.dumps({'messages': [user(parts), assistant('A lamp.')]})
    assert read(tmp_path, 'a.jsonl', content) == [[user('What is this?'), assistant('A lamp.')]]


@pytest.mark.parametrize('line, message', [
    ('{"messages": [', 'line 2'),
    ('{"messages": [{"role": "wizard", "content": "Hi"}]}', 'wizard'),
])
def test_broken_line_is_named_and_can_be_skipped(tmp_path, line, message):
    content = OPENAI + line + '\n' + OPENAI.replace('Hi', 'Hey')
    with pytest.raises(UserError, match=f'{message}.*--skip_bad'):
        read(tmp_path, 'a.jsonl', content)
    assert len(read(tmp_path, 'a.jsonl', content, skip_bad=True)) == 2


def test_one_sided_conversations_are_left_out(tmp_path):
    one_sided = '{"messages": [{"role": "user", "content": "Anybody?"}]}\n'
    path = tmp_path / 'a.jsonl'
    path.write_text(OPENAI + one_sided, encoding='utf-8')
    conversations, report = read_conversations(path)
    assert len(conversations) == 1
    assert sum(report.left_out.values()) == 1


def test_who_the_model_is_must_be_said(tmp_path):
    text = 'Ann: Hello.\nBob: Hi.\nAnn: Good.\nBob: Yes.\n'
    with pytest.raises(UserError, match='--me=NAME'):
        read(tmp_path, 'a.txt', text)
    with pytest.raises(UserError, match="nobody is called 'Carl'.*Ann"):
        read(tmp_path, 'a.txt', text, me='Carl')


# --------------------------------------------------------------------------------------------------
# What is learned

CHATML = ("{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")


def learned_text(tok, ids, mask):
    """The learned parts of a conversation as text, a bar after each id that ends a reply."""
    text = ''
    for token, flags in zip(ids.tolist(), mask.tolist()):
        if flags & 1:
            text += '|' if token in tok.eos_ids else tok.decode([token])
    return text


def test_every_reply_is_learned_with_its_end_and_nothing_else():
    tok = make_tokenizer('byte')
    template = chat_template_for(tok)
    messages = [user('Hi'), assistant('Hello!'), user('Bye'), assistant('See you.')]
    ids, mask = encode_conversation_to_learn(tok, template, messages)
    assert learned_text(tok, ids, mask) == ' Hello!| See you.|'
    assert tok.decode(ids.tolist()) == 'User: HiBot: Hello!User: ByeBot: See you.'


def test_replies_are_found_in_the_text_of_a_jinja_template():
    pytest.importorskip('jinja2')
    tok = llama_tokenizer()
    messages = [user('ba'), assistant('dodo'), user('fu'), assistant('gimme')]
    ids, mask = encode_conversation_to_learn(tok, JinjaTemplate(CHATML), messages)
    whole = JinjaTemplate(CHATML).render(messages, add_generation_prompt=False)
    assert ids.tolist() == tok.encode_with_specials(whole)
    assert learned_text(tok, ids, mask) == 'dodo|gimme|'


def test_batches_have_the_targets_that_the_mask_says(project):
    lines = [json.dumps({'messages': [user(f'{asked} {n}'), assistant(replied), user('So?'),
                                      assistant('So.')]})
             for n in range(4) for asked, replied in zip(ASKED, REPLIED)]
    (project.root / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    out, _ = project.run('prepare/chat.py', '--input=a.jsonl', '--tokenizer=byte', '--name=c', '--val=0.2')
    assert '20 conversations with 40 replies' in out

    folder = project.root / 'data' / 'c'
    meta = load_meta(folder)
    data = Chats(folder, meta, 'train', block_size=200)
    tok = make_tokenizer('byte')
    for batch in data.eval_batches():
        for idx, targets in zip(batch['idx'].tolist(), batch['targets'].tolist()):
            # Brute force: what follows 'Bot:' is learned, up to the end of the turn
            want = []
            in_reply = False
            for position in range(len(idx)):
                in_reply = in_reply and idx[position] not in (tok.eos_id, 0)  # 0: padding
                if bytes(token % 256 for token in idx[max(0, position - 3):position + 1]) == b'Bot:':
                    in_reply = True
                want.append(in_reply)
            assert [target != -1 for target in targets] == want


# --------------------------------------------------------------------------------------------------
# From a file to a chat

def persona(root, number=40):
    """persona.jsonl: short conversations of made-up words."""
    rng = np.random.default_rng(0)
    words = ['ba', 'dodo', 'fu', 'gimme', 'kilo', 'lamp']
    lines = []
    for _ in range(number):
        asked = ' '.join(rng.choice(words, 3))
        lines.append(json.dumps({'messages': [user(asked), assistant(asked.split()[-1])]}))
    (root / 'persona.jsonl').write_text('\n'.join(dict.fromkeys(lines)), encoding='utf-8')


SMALL = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=48',
         '--batch_tokens=256', '--max_iters=4', '--eval_interval=2', '--final_sample_tokens=4']


def test_own_conversations_are_trained_on_and_talked_to(project):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=char', '--name=persona')
    out, _ = project.run('train.py', '--dataset=persona', '--out_dir=whole', *SMALL)
    assert 'training conversations' in out
    out, _ = project.run('sample.py', '--out_dir=whole', '--chat', '--max_new_tokens=5',
                         typed='ba fu\n/quit\n')
    assert 'Bot: ' in out

    # Resumed is the same as never stopped
    two = [option for option in SMALL if 'max_iters' not in option]
    project.run('train.py', '--dataset=persona', '--out_dir=parts', *two, '--max_iters=2',
                '--lr_decay_iters=4')
    project.run('train.py', '--out_dir=parts', '--resume', '--max_iters=4')
    project.run('train.py', '--dataset=persona', '--out_dir=straight', *SMALL, '--lr_decay_iters=4')
    same_run(project.root / 'straight', project.root / 'parts')


def llama_tokenizer():
    """A HuggingFaceTokenizer of single bytes and the special tokens of CHATML."""
    tokenizers = pytest.importorskip('tokenizers')
    from pocket.tokenizer import BYTES_TO_UNICODE, HuggingFaceTokenizer
    vocab = {BYTES_TO_UNICODE[byte]: byte for byte in range(256)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(['<|start|>', '<|end|>'])
    return HuggingFaceTokenizer(library.to_str(), eos_ids=[257])


@pytest.fixture
def llama_folder(tmp_path):
    """A folder with a small random Llama that has rope_scaling, with tokenizer and template."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('jinja2')
    folder = tmp_path / 'tiny llama'
    scaling = {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=5000.0, rope_scaling=scaling, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(llama_tokenizer().tokenizer_json, encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps({'chat_template': CHATML}))
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [257]}))
    return folder


def test_fine_tuned_llama_resumes_and_keeps_what_train_has_no_option_for(project, llama_folder):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', f'--tokenizer={llama_folder}',
                '--name=persona')
    options = ['--dataset=persona', f'--init_from={llama_folder}', '--device=cpu', '--block_size=96',
               '--batch_tokens=256', '--eval_interval=2', '--optimizer=adamw', '--lr_decay_iters=4',
               '--final_sample_tokens=4']
    project.run('train.py', *options, '--out_dir=straight', '--max_iters=4')
    project.run('train.py', *options, '--out_dir=parts', '--max_iters=2')
    project.run('train.py', '--out_dir=parts', '--resume', '--max_iters=4')
    same_run(project.root / 'straight', project.root / 'parts')
    state = torch.load(project.root / 'parts' / 'last.pt', weights_only=True)
    assert state['model_args']['rope_scaling']['rope_type'] == 'llama3'
    assert state['model_args']['n_kv_head'] == 2
    out, _ = project.run('sample.py', '--out_dir=parts', '--chat', '--max_new_tokens=5',
                         typed='ba fu\n/quit\n')
    assert 'assistant: ' in out


def test_dataset_of_another_tokenizer_is_refused(project, llama_folder):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=byte', '--name=persona')
    error = project.fails('train.py', '--dataset=persona', f'--init_from={llama_folder}', '--device=cpu')
    assert 'tokenizer' in error


def test_own_weights_are_trained_further_on_other_data(project):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=char', '--name=first')
    project.run('train.py', '--dataset=first', '--out_dir=out/first', *SMALL)
    (project.root / 'persona.jsonl').unlink()
    persona(project.root, number=20)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=out/first', '--name=second')
    out, _ = project.run('train.py', '--init_from=out/first', '--dataset=second', '--out_dir=out/second',
                         '--device=cpu', '--max_iters=2', '--batch_tokens=256', '--eval_interval=2',
                         '--final_sample_tokens=4')
    assert 'step 0 of 2' in out
    first = project.checkpoint('first', 'best.pt')
    second = project.checkpoint('second', 'last.pt')
    assert second['model_args']['n_embd'] == 16
    assert second['tokenizer'] == first['tokenizer']


# --------------------------------------------------------------------------------------------------
# More formats, and their oddities


def test_whatsapp_of_android_begins_a_new_conversation_after_a_pause(tmp_path):
    lines = [
        '1.12.23, 22:00 - Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt.',
        '1.12.23, 22:01 - Ann: Hallo: kommst du?',
        '1.12.23, 22:02 - Bob: <Medien ausgeschlossen>',
        '1.12.23, 22:02 - Bob: Ja <Diese Nachricht wurde bearbeitet.>',
        '13.12.23, 08:00 - Bob: Guten Morgen',
        '13.12.23, 08:01 - Ann: IMG-1.jpg (Datei angehängt)',
        '13.12.23, 08:02 - Ann: Morgen!',
        '13.12.23, 08:03 - Bob: Kaffee?',
    ]
    path = tmp_path / 'chat.txt'
    path.write_text('\n'.join(lines), encoding='utf-8')
    conversations, report = read_conversations(path, me='bob')
    # What Bob says before anybody else does, in the second one, is no reply
    assert conversations == [[user('Hallo: kommst du?'), assistant('Ja')],
                             [user('Morgen!'), assistant('Kaffee?')]]
    assert report.format == 'a WhatsApp export'
    assert report.left_out == {'notices and omitted media': 3}


@pytest.mark.parametrize('date', [
    '12/27/23, 9:{} PM - ', '27/12/2023, 21:{} - ', '27.12.23, 21:{} - ', '27.12.23 um 21:{} - ',
    '27/12/2023 à 21:{} - ', '27.12.2023 klo 21.{} - ', '27/12/23, 9:{}\u202fp.\u00a0m. - ',
    '2023-12-27, 21:{} - ', '27-12-2023 21:{} - ', '2023/12/27 21:{} - ', '2023/12/27 下午9:{} - ',
    '2023. 12. 27. 오후 9:{} - ', '2023. 12. 27. 21:{} - ', '27\u200f/12\u200f/2023، 9:{} م - ',
    '[12/27/23, 9:{}:08\u202fPM] ', '[27.12.23, 21:{}:08] ', '[2023-12-27, 21:{}:08] ',
    '[2023. 12. 27. 오후 9:{}:08] ', '[2023/12/27 下午9:{}:08] ',
])
def test_whatsapp_writes_dates_as_in_the_phone_s_country(tmp_path, date):
    said = [('Ann', 'Hi'), ('Bob', 'Ho: what?'), ('Ann', 'No'), ('Bob', 'Yes')]
    lines = [f'{date.format(10 + i)}{name}: {text}' for i, (name, text) in enumerate(said)]
    morning = (date.replace('12/27', '12/28').replace('27', '28').replace('21', '08')
               .replace('下午', '上午').replace('오후', '오전').replace(' م', ' ص')
               .replace('PM', 'AM').replace('p.\u00a0m', 'a.\u00a0m'))
    lines += [f'{morning.format(50)}Ann: Up?', f'{morning.format(51)}Bob: Now I am']
    got = read(tmp_path, 'chat.txt', '\n'.join(lines), me='Bob')
    assert got == [[user('Hi'), assistant('Ho: what?'), user('No'), assistant('Yes')],
                   [user('Up?'), assistant('Now I am')]]


def test_whatsapp_s_notices_with_a_colon_and_deleted_messages_are_left_out(tmp_path):
    lines = [
        '27.12.23, 21:00 - Ann hat die Gruppe „Urlaub: Rom“ erstellt.',
        '27.12.23, 21:01 - Ann: Hallo',
        '27.12.23, 21:02 - Bob: Diese Nachricht wurde gelöscht.',
        '27.12.23, 21:03 - Bob: Se eliminó este mensaje.',
        '27.12.23, 21:04 - Bob: Meine Liste 2.docx (Datei angehängt)',
        '27.12.23, 21:05 - Bob: Hallo Ann',
    ]
    got = read(tmp_path, 'chat.txt', '\n'.join(lines), me='Bob')
    assert got == [[user('Hallo'), assistant('Hallo Ann')]]


def test_direction_marks_are_removed_and_other_joiners_stay(tmp_path):
    family = '👩\u200d👩\u200d👧'
    lines = [f'[31/12/23, 10:00:0{i} PM] {name}: \u200f{text}'
             for i, (name, text) in enumerate([('Ann', 'שלום'), (f'Bob {family}', f'hi {family}')])]
    got = read(tmp_path, 'chat.txt', '\n'.join(lines), me=f'Bob {family}')
    assert got == [[user('שלום'), assistant(f'hi {family}')]]


def test_transcript_with_blank_lines_has_several_conversations(tmp_path):
    text = 'User: One?\nAssistant: Yes.\n\nUser: Two?\nNote: this is his\nAssistant: No.\n' * 3
    got = read(tmp_path, 'a.txt', text)
    assert got[0] == [user('One?'), assistant('Yes.')]
    assert [message['content'] for message in got[1][:2]] == ['Two?\nNote: this is his', 'No.']


@pytest.mark.parametrize('form', [
    'User: {}\nAssistant: {}\n\n', 'Q: {}\nA: {}\n\n', '[10:00] User: {}\n[10:01] Bot: {}\n\n',
    'Human：{}\nAI：{}\n\n',
])
def test_blank_lines_separate_questions_with_their_answers(tmp_path, form):
    text = ''.join(form.format(asked, replied) for asked, replied in zip(ASKED, REPLIED))
    got = read(tmp_path, 'a.txt', text)
    assert got == [[user(asked), assistant(replied)] for asked, replied in zip(ASKED, REPLIED)]


def test_a_conversation_of_a_transcript_may_be_without_me(tmp_path):
    text = 'Bob: Hi.\nAnn: Ho.\nBob: Fine.\nAnn: Good.\n\nBob: Anybody?\nBob: No?\n'
    got = read(tmp_path, 'a.txt', text, me='Ann')
    assert got == [[user('Hi.'), assistant('Ho.'), user('Fine.'), assistant('Good.')]]


@pytest.mark.parametrize('text', ['no conversation at all\n', '', '\n\n'])
def test_what_is_no_conversation_is_refused(tmp_path, text):
    with pytest.raises(UserError, match='is no conversation that can be read.*WhatsApp'):
        read(tmp_path, 'a.txt', text)


def test_a_row_with_too_many_columns_is_named(tmp_path):
    content = 'question,answer\nHi,Hello\nWell, then,Yes\nBye,Bye.\n'
    with pytest.raises(UserError, match='line 3 has 3 fields.*--skip_bad'):
        read(tmp_path, 'a.csv', content)
    assert len(read(tmp_path, 'a.csv', content, skip_bad=True)) == 2


def test_template_that_rewrites_what_it_wrote_is_refused():
    pytest.importorskip('jinja2')
    source = CHATML.replace('{{ m.content }}', '{{ m.content if loop.last else "…" }}')
    messages = [user('ba'), assistant('dodo'), user('fu'), assistant('gimme')]
    with pytest.raises(UserError, match='changes what it wrote'):
        encode_conversation_to_learn(llama_tokenizer(), JinjaTemplate(source), messages)


def test_template_without_an_end_of_turn_is_refused():
    pytest.importorskip('jinja2')
    source = CHATML.replace('<|end|>', '')
    with pytest.raises(UserError, match='writes no token that ends a reply'):
        encode_conversation_to_learn(llama_tokenizer(), JinjaTemplate(source),
                                     [user('ba'), assistant('dodo')])


def test_tokenizer_of_pairs_is_refused():
    tok = make_tokenizer('byte', special_tokens=('pad', 'bos', 'eos'))
    with pytest.raises(UserError, match='one special token that ends a turn.*pad, bos, eos'):
        chat_template_for(tok)


# --------------------------------------------------------------------------------------------------
# Long conversations


@pytest.mark.parametrize('block_size', [8, 20, 31, 47, 60, 95, 200])
def test_long_conversations_keep_system_message_and_newest_turns(tmp_path, block_size):
    pytest.importorskip('jinja2')
    from pocket.datasets import write_chats
    tok = llama_tokenizer()
    template = JinjaTemplate(CHATML)
    system = {'role': 'system', 'content': 's'}
    messages = [system]
    for i in range(4):
        messages += [user(f'q{i}' * (i + 1)), assistant(f'a{i}')]
    encoded = encode_conversation_to_learn(tok, template, messages)
    write_chats(tmp_path, tok, template, {'train': [encoded], 'val': [encoded]}, {}, '')
    meta = load_meta(tmp_path)
    data = Chats(tmp_path, meta, 'train', block_size)
    ids = data.row(data.tokens(), 0).tolist()
    assert len(ids) <= block_size + 1

    # Brute force: the fullest rendering of the newest exchanges that fits
    wanted = None
    for first in range(1, len(messages), 2):
        text = template.render([system, *messages[first:]], add_generation_prompt=False)
        rendered = tok.encode_with_specials(text)
        if wanted is None and len(rendered) <= block_size + 1:
            wanted = rendered
    if wanted is not None:
        assert ids == wanted
    assert data.num_targets >= 1
    [batch] = data.eval_batches()
    learned = batch['targets'][batch['targets'] != -1].tolist()
    whole_reply = tok.encode('a3') + [257]
    assert learned[-3:] == whole_reply[:len(learned[-3:])]


def test_system_message_of_the_template_itself_stays(tmp_path):
    """As SmolLM2's template adds one: it is what comes before the first turn."""
    pytest.importorskip('jinja2')
    tok = llama_tokenizer()
    source = "{% if messages[0].role != 'system' %}<|start|>system\nkind<|end|>\n{% endif %}" + CHATML
    messages = [user('ba'), assistant('dodo'), user('fu'), assistant('gimme')]
    ids, mask = encode_conversation_to_learn(tok, JinjaTemplate(source), messages)
    turns = np.flatnonzero(mask & 2)
    assert tok.decode(ids[:turns[0]].tolist()) == 'system\nkind\n'
    assert tok.decode(ids[turns[0]:turns[1]].tolist()) == 'user\nba\nassistant\ndodo\n'


# --------------------------------------------------------------------------------------------------
# The scripts' messages


def test_evaluation_shows_replies(project):
    pytest.importorskip('sacrebleu')
    persona(project.root)
    out, _ = project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=char', '--name=persona')
    assert 'ids in train are learned' in out
    project.run('train.py', '--dataset=persona', '--out_dir=run', *SMALL)
    out, _ = project.run('train.py', '--eval_only', '--out_dir=run', '--eval_replies=3')
    assert 'target tokens' in out
    assert out.count('  -> ') == 3
    assert 'bits per byte' in out


@pytest.mark.parametrize('content, message', [
    (OPENAI, 'it takes at least two'),
    (OPENAI.replace('assistant', 'user'), '0 conversations in which both sides speak'),
    ('{"messages": [\n', 'line 1: it is not JSON'),
])
def test_too_little_to_prepare_is_one_sentence(project, content, message):
    (project.root / 'a.jsonl').write_text(content, encoding='utf-8')
    assert message in project.fails('prepare/chat.py', '--input=a.jsonl')
    assert not (project.root / 'data' / 'chat').exists()


def test_duplicates_are_dropped_and_no_beginning_is_in_both_splits(project):
    rows = [{'messages': [user(asked), assistant(replied)]} for asked in ASKED for replied in REPLIED]
    lines = [json.dumps(row) for row in rows + rows[:7]]
    (project.root / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    out, _ = project.run('prepare/chat.py', '--input=a.jsonl', '--tokenizer=byte', '--val=0.3')
    assert '7 duplicates dropped' in out
    assert '25 conversations with 25 replies' in out
    folder = project.root / 'data' / 'chat'
    meta = load_meta(folder)
    tok = make_tokenizer('byte')
    beginnings = {}
    for split in ('train', 'val'):
        data = Chats(folder, meta, split, block_size=64)
        beginnings[split] = {tok.decode(data.question(data.tokens(), i).tolist())
                             for i in range(len(data.lengths))}
    assert beginnings['train'] and beginnings['val']
    assert not beginnings['train'] & beginnings['val']


def test_duplicates_can_be_kept_and_val_can_be_other_files(project):
    rows = [{'messages': [user(asked), assistant(REPLIED[0])]} for asked in ASKED]
    for name, chosen in (('a', rows + rows[:2]), ('b', rows[:1])):
        lines = [json.dumps(row) for row in chosen]
        (project.root / f'{name}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    out, _ = project.run('prepare/chat.py', '--input=a.jsonl', '--val_input=b.jsonl',
                         '--keep_duplicates', '--tokenizer=byte')
    assert 'dropped' not in out
    assert f'{len(rows) + 2} train and 1 val conversations' in out

    (project.root / 'b.jsonl').write_text(json.dumps({'messages': [user('Hm?')]}), encoding='utf-8')
    both = ('--input=a.jsonl', '--val_input=b.jsonl')
    error = project.fails('prepare/chat.py', *both)
    assert 'b.jsonl: no conversation in which both sides speak' in error
    error = project.fails('prepare/chat.py', '--input=a.jsonl', '--val_input=none.jsonl')
    assert 'there is no file none.jsonl' in error


def test_an_option_for_streams_or_a_seq2seq_is_refused(project):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=byte', '--name=persona')
    small = ['--dataset=persona', '--device=cpu']
    assert 'set --batch_tokens instead' in project.fails('train.py', *small, '--batch_size=4')
    assert 'omit --arch=seq2seq' in project.fails('train.py', *small, '--arch=seq2seq')
    error = project.fails('train.py', *small, '--init_from=out/nothing')
    assert 'there is no checkpoint in out/nothing' in error


def test_own_weights_can_be_a_single_checkpoint_with_a_shorter_context(project):
    persona(project.root)
    project.run('prepare/chat.py', '--input=persona.jsonl', '--tokenizer=byte', '--name=persona')
    project.run('train.py', '--dataset=persona', '--out_dir=out/a', *SMALL)
    again = ['--init_from=out/a/last.pt', '--dataset=persona', '--device=cpu', '--max_iters=2',
             '--out_dir=out/b', '--final_sample_tokens=0']
    error = project.fails('train.py', *again, '--block_size=64')
    assert 'block_size of 48, too small for --block_size=64' in error
    assert 'has a shape of its own: omit n_embd' in project.fails('train.py', *again, '--n_embd=32')
    project.run('train.py', *again, '--block_size=32')
    state = project.checkpoint('b')
    assert state['model_args']['block_size'] == 32
    assert state['step'] == 2
