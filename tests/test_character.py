"""
Characters: the text file that describes one, the conversations that are made of it, and the bundled
one to chat with.

    pytest -n 0 tests/test_character.py
"""
import doctest
import json
import re
import shutil
from random import Random

import pytest
from conftest import CHECKOUT
from prepared import read_dataset

from pocket import characters
from pocket.characters import make_conversations, read_character, write_as_people_do
from pocket.errors import UserError

PLUNKETT = CHECKOUT / 'prepare' / 'characters' / 'plunkett.txt'
BUNDLED = CHECKOUT / 'pocket' / 'bundled' / 'plunkett'

KETTLE = """
name: Kettle
[drink] tea | coffee
[name] Ann | Bo
[before] is it | so
[behind] today

## hello: saying hello [first]
? (Hello|Hi)(!|.)
- Good morning. I am nearly at the boil.
- Hello! Mind the steam.
= evening, Kettle
* the morning

## drinks: {drink}
? Do you like {drink}?
? What about {drink}?
- {drink}? I sing for it.
+ It is the steam in me.

## your name: your name [tells name]
? I am {name}.
- Pleased to meet you, {name}.
- {name}! I shall whistle it.

## say my name: your name [after name]
? Who am I?
- You are {name}.
- {name}, still.

## no name yet: your name [before name]
? Who am I?
- You have not said.

## why: why [why]
? Why?

## which: the topic [which]
? What was that about?
- About {subject}.

## goodbye: goodbye [last]
? Bye.
- Come back before I am cold.
"""


@pytest.fixture
def kettle(tmp_path):
    """A character with two lists and eight topics."""
    path = tmp_path / 'kettle.txt'
    path.write_text(KETTLE, encoding='utf-8')
    return read_character(path)


# --------------------------------------------------------------------------------------------------
# Reading


def test_a_character_is_read(kettle):
    assert kettle.name == 'Kettle' and kettle.says == '{reply}'
    assert kettle.lists['drink'] == ['tea', 'coffee'] and kettle.lists['name'] == ['Ann', 'Bo']
    hello, drinks, your_name = kettle.topics[:3]
    assert hello.marks == {'first': ''} and len(hello.replies) == 2
    assert hello.words == ['evening, Kettle'] and hello.things == ['the morning']
    assert drinks.subject == '{drink}' and drinks.more == ['It is the steam in me.']
    assert your_name.marks == {'tells': 'name'}


TOPIC = '## rain: the rain\n? Rain?\n- Yes.\n'


@pytest.mark.parametrize('text, line, sentence', [
    ('name: A\nhello\n' + TOPIC, 2, 'begins with "? "'),
    ('name: A\n?no space\n' + TOPIC, 2, 'begins with "? "'),
    ('name: A\n- Hello.\n' + TOPIC, 2, 'belongs to no topic'),
    ('name: A\nsays: [{topic}]\n' + TOPIC, 2, 'needs {reply}'),
    ('name: A\nsays: [{topics}] {reply}\n' + TOPIC, 2, 'may have {topic}'),
    ('name: A\n[thing] |\n' + TOPIC, 2, 'is no list'),
    ('name: A\n## :\n', 2, 'needs a name'),
    ('name: A\n## rain [offen]\n', 2, '[offen] is no mark'),
    ('name: A\n## rain [often now]\n', 2, 'a number of times'),
    ('name: A\n## rain [tells]\n', 2, 'needs the name of a list'),
    ('name: A\n## rain [after name]\n', 2, 'needs the name of a list'),
    ('name: A\n## rain\n? Is it {wet}?\n', 3, '{wet} is not a list'),
    ('name: A\n## rain\n? It is (wet|dry.\n', 3, 'parentheses'),
    ('name: A\n## rain\n? It is (wet (or|and) dry).\n', 3, 'parentheses'),
    ('name: A\n[name] Bo\n## rain [tells name]\n? I am here.\n', 4, 'holds {name}'),
    ('name: A\n## rain\n? Rain?\n- {subject}.\n', 4, '{subject} is not a list'),
    ('name: A\n[wet] fog | dew\n## rain\n? Fog?\n- {wet}.\n', None, "not in its question 'Fog?'"),
    (TOPIC, None, 'name: …'),
    ('name: A\n', None, 'no topic'),
    ('name: A\n## rain\n? Rain?\n', None, 'replies (- …)'),
    ('name: A\n## rain\n- Rain.\n', None, 'questions (? …)'),
    ('name: A\n## more [why]\n? Why?\n', None, 'no topic to talk about'),
])
def test_mistakes_are_named_by_line(tmp_path, text, line, sentence):
    path = tmp_path / 'a.txt'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(UserError) as error:
        read_character(path)
    message = str(error.value)
    assert sentence in message and '\n' not in message
    assert (f'line {line}:' in message) == (line is not None)


def test_plunkett_has_no_line_twice():
    """A question that two topics share would get the reply of either."""
    topics = read_character(PLUNKETT).topics
    questions = [line for topic in topics if topic.name != 'no name yet'
                 for line in topic.questions]
    replies = [line for topic in topics for line in topic.replies]
    for lines in (questions, replies):
        twice = {line for line in lines if lines.count(line) > 1}
        assert not twice


# --------------------------------------------------------------------------------------------------
# Conversations


def exchanges(messages):
    """[(question, reply), …] of a conversation."""
    contents = [message['content'] for message in messages]
    return list(zip(contents[::2], contents[1::2]))


def test_conversations_are_the_same_for_the_same_seed(kettle):
    first = make_conversations(kettle, 200, seed=1)
    assert first == make_conversations(kettle, 200, seed=1)
    assert first != make_conversations(kettle, 200, seed=2)
    assert len({json.dumps(messages) for messages in first}) == 200


def test_every_question_has_a_reply(kettle):
    for messages in make_conversations(kettle, 300, seed=1):
        assert [message['role'] for message in messages[:2]] == ['user', 'assistant']
        assert len(messages) % 2 == 0 and len(messages) <= 2 * 6
        for question, reply in exchanges(messages):
            assert question and reply
            assert not set('{}()|') & set(question + reply)


def test_a_name_is_remembered_from_when_it_was_told(kettle):
    remembered = unknown = 0
    names = set()
    for messages in make_conversations(kettle, 500, seed=3):
        name = None
        for _, reply in exchanges(messages):
            if reply.startswith('Pleased to meet you') or 'whistle' in reply:
                name = re.search(r'to meet you, (.+)\.|(.+)! I shall', reply)
                name = name[1] or name[2]
                names.add(name)
            elif reply.startswith('You are') or reply.endswith('still.'):
                remembered += 1
                assert name is not None and name in reply
            elif reply == 'You have not said.':
                unknown += 1
                assert name is None
    assert remembered > 20 and unknown > 20
    assert {'Ann', 'Bo'} < names and len(names) > 20    # the others are invented


def test_which_names_the_topic_before(kettle):
    """What it was about: the {drink} of another moment may be any."""
    replies = [reply for messages in make_conversations(kettle, 500, seed=3)
               for _, reply in exchanges(messages) if reply.startswith('About')]
    assert 'About saying hello.' in replies
    assert {'About tea.', 'About coffee.'} <= set(replies)


def test_plunkett_does_not_repeat_himself():
    plunkett = read_character(PLUNKETT)
    for messages in make_conversations(plunkett, 1000, seed=5):
        replies = [reply for _, reply in exchanges(messages)]
        assert len(set(replies)) == len(replies)


def test_a_reply_may_begin_with_its_topic(kettle):
    kettle.says = '[{topic}] {reply}'
    replies = [reply for messages in make_conversations(kettle, 200, seed=1)
               for _, reply in exchanges(messages)]
    assert '[hello] Hello! Mind the steam.' in replies
    names = {topic.name for topic in kettle.topics}
    assert {re.match(r'\[(.+?)\] .', reply)[1] for reply in replies} == names


def test_words_of_a_topic_stand_among_others(kettle):
    """A third of the questions of a topic with = are made around its words."""
    questions = [question for messages in make_conversations(kettle, 500, seed=3)
                 for question, reply in exchanges(messages) if 'steam' in reply.lower()]
    loose = [question for question in questions if 'evening, kettle' in question.lower()]
    assert len(loose) > 5
    assert any('today' in question for question in loose)


def test_names_of_a_topic_stand_in_sentences_of_any_character(kettle):
    """Those of [frame] in pocket/phrases.txt, to which a character's own are added."""
    assert len(kettle.lists['frame']) > 50
    assert {'What about', 'is it'} <= {*kettle.lists['about'], *kettle.lists['before']}
    kettle.topics[1].things = ['the spout']
    asked = [question for messages in make_conversations(kettle, 2000, seed=3)
             for question, _ in exchanges(messages)]
    assert any('old is the spout' in question for question in asked)


def test_people_write_carelessly_but_not_beyond_recognition():
    rng = Random(1)
    written = {write_as_people_do('What is your name?', {}, rng) for _ in range(300)}
    assert {'What is your name?', "What's your name?", 'what is your name'} <= written
    assert all(4 <= len(text) <= 20 for text in written)


def test_examples_in_docstrings():
    result = doctest.testmod(characters)
    assert result.attempted and not result.failed


# --------------------------------------------------------------------------------------------------
# The script, and the bundled character


def test_another_character_becomes_a_dataset(project):
    """One data file makes another persona: its name is in the chat template."""
    (project.root / 'kettle.txt').write_text(KETTLE, encoding='utf-8')
    out, _ = project.run('prepare/character.py', '--character=kettle.txt', '--conversations=300',
                         '--beginnings=300', '--vocab_size=300', '--save=chats.jsonl')
    assert 'Kettle: 8 topics, 300 conversations' in out
    assert 'next: python train.py config/character.py' in out
    meta, _, _ = read_dataset(project.root / 'data' / 'character')
    assert meta['kind'] == 'chats' and meta['chat']['me'] == 'Kettle'
    rows = (project.root / 'chats.jsonl').read_text(encoding='utf-8').splitlines()
    assert len(rows) == 300
    assert json.loads(rows[0])['messages'][1]['role'] == 'assistant'


def test_an_unknown_character_is_refused(project):
    error = project.fails('prepare/character.py', '--character=nobody')
    assert 'nobody.txt' in error and 'copy' in error and 'plunkett' in error


def test_bundled_character_chats(project):
    """`python sample.py --chat` before anything was trained."""
    shutil.copytree(BUNDLED, project.root / 'pocket' / 'bundled' / 'plunkett')
    out, err = project.run('sample.py', '--chat', '--device=cpu', '--temperature=0',
                           typed='What are you?\n/quit\n')
    assert 'bundled' in err
    assert 'umbrella' in out


def test_bundled_character_is_small_and_described():
    assert (BUNDLED / 'best.pt').stat().st_size < 3e6
    last = (BUNDLED / 'log.csv').read_text(encoding='utf-8').splitlines()[-1]
    val_loss = float(last.split(',')[4])
    assert f'{val_loss:.4f}' in (BUNDLED / 'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['character_prompts.json', 'character_prompts_2.json'])
def test_held_out_prompts_are_not_in_the_data(name):
    """The prompts that judge the character: three in each of 20 topics, none a question of his."""
    prompts = json.loads((CHECKOUT / 'tests' / name).read_text(encoding='utf-8'))['prompts']
    assert len(prompts) == 20 and all(len(entries) == 3 for entries in prompts.values())

    def plain(text):
        return ''.join(c for c in text.lower() if c.isalnum())

    held_out = {plain(entry['prompt']) for entries in prompts.values() for entry in entries}
    plunkett = read_character(PLUNKETT)
    asked = {plain(question) for messages in make_conversations(plunkett, 3000, seed=1)
             for question, _ in exchanges(messages)}
    assert not held_out & asked
