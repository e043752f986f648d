"""
A character in one text file, and the conversations that one may have with it.

    character = read_character('prepare/characters/plunkett.txt')
    conversations = make_conversations(character, 40_000, seed=1)

The file says what people ask, in many ways, and what the character replies; its first lines explain
the format. A conversation is a list of messages, as in conversations.py.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pocket.datasets import read_text
from pocket.errors import UserError

MARKS = ('first', 'last', 'often', 'why', 'which', 'tells', 'after', 'before')
MARKS_WITH_A_LIST = ('tells', 'after', 'before')   # [tells name] is about the list [name]
PHRASES = Path(__file__).parent / 'phrases.txt'   # what stands around the words of a topic
LOOSE_QUESTIONS = 0.5   # how many of a topic's questions are made around its words (= and *)
INVENTED_VALUES = 0.2   # how many of the names that a reply repeats are invented


# ---- Reading


@dataclass
class Topic:
    """What people ask about one thing, and what the character replies."""

    name: str
    subject: str                                    # what it is called when one refers back to it
    marks: dict = field(default_factory=dict)       # {'often': '2', 'tells': 'name', …}
    words: list = field(default_factory=list)       # what points to it in any question
    things: list = field(default_factory=list)      # what it is called, for questions of [frame]
    questions: list = field(default_factory=list)   # templates, as are the others
    replies: list = field(default_factory=list)
    more: list = field(default_factory=list)        # what the character adds when asked why


@dataclass
class Character:
    """A name, lists of words to fill in, and topics.

    says: what the character says, with {reply} in it and, if it is to name the topic, {topic}.
    """

    name: str = ''
    says: str = '{reply}'
    lists: dict = field(default_factory=dict)
    topics: list = field(default_factory=list)


def read_character(path):
    """The Character in a file. Raises UserError that names the line with a mistake."""
    character = Character()
    character.lists['invented'] = invent_words(2000, Random(1))
    for file in (PHRASES, path):
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            problem = add_line(character, line.strip())
            if problem:
                raise UserError(f'{file}, line {number}: {problem}')
    problem = find_omission(character)
    if problem:
        raise UserError(f'{path}: {problem}')
    return character


def add_line(character, line):
    """Add what a line of the file says; returns what is wrong with it, or None."""
    sign, _, rest = line.partition(' ')
    if not line or sign == '#':
        return None
    if line.startswith('name:'):
        character.name = line.removeprefix('name:').strip()
        return None
    if line.startswith('says:'):
        character.says = line.removeprefix('says:').strip()
        slots = set(re.findall(r'\{(.*?)\}', character.says))
        if 'reply' not in slots or slots - {'topic', 'reply'}:
            return 'says: needs {reply} and may have {topic}, such as says: [{topic}] {reply}'
        return None
    if line.startswith('['):
        return add_list(character, line)
    if sign == '##':
        return add_topic(character, rest)
    if sign not in ('=', '*', '?', '-', '+') or not rest.strip():
        return (f'{line[:40]!r} is no line of a topic: '
                f'it begins with "? ", "- ", "+ ", "= " or "* "')
    if not character.topics:
        return 'this line belongs to no topic: begin one above it, such as ## rain: the rain'

    topic = character.topics[-1]
    if sign in ('=', '*'):
        words = topic.words if sign == '=' else topic.things
        words += split_words(rest)
        return find_problem(rest, sign, topic, character.lists)
    lines = {'?': topic.questions, '-': topic.replies, '+': topic.more}[sign]
    lines.append(rest.strip())
    return find_problem(rest, sign, topic, character.lists)


def add_list(character, line):
    """Add [name] one | another; returns what is wrong with it, or None."""
    name, _, rest = line[1:].partition(']')
    words = split_words(rest)
    if not name or not words:
        return f'{line[:40]!r} is no list: write [thing] keys | wallet'
    character.lists.setdefault(name, []).extend(words)
    return None


def split_words(text):
    """The list in 'keys | left shoe'."""
    return [word.strip() for word in text.split('|') if word.strip()]


def add_topic(character, heading):
    """Add the topic of a heading, 'rain: the weather [often]'; returns what is wrong, or None."""
    marks = {}
    for mark in re.findall(r'\[(.*?)\]', heading):
        word, _, value = mark.partition(' ')
        if word not in MARKS:
            return f'[{mark}] is no mark: there are {", ".join(MARKS)}'
        if word in MARKS_WITH_A_LIST and value not in character.lists:
            return f'[{mark}] needs the name of a list after {word}, such as [{word} name]'
        if word == 'often':
            value = value or '2'
            if not value.isdecimal() or int(value) == 0:
                return f'[{mark}] needs a number of times after often, such as [often 3]'
        marks[word] = value
    name, _, subject = re.sub(r'\[.*?\]', '', heading).partition(':')
    name = name.strip()
    if not name:
        return 'a topic needs a name: ## rain: the rain'
    character.topics.append(Topic(name, subject.strip() or name, marks))
    return None


def find_problem(template, sign, topic, lists):
    """What is wrong with a question (sign ?) or another line of a topic, or None."""
    slots = re.findall(r'\{(.*?)\}', template)
    for slot in slots:
        is_subject = slot == 'subject' and 'which' in topic.marks
        if slot not in lists and not is_subject:
            return f'{{{slot}}} is not a list: write [{slot}] one | another above the topics'
    told = topic.marks.get('tells')
    if sign == '?' and told and told not in slots:
        return f'each question of a topic with [tells {told}] holds {{{told}}}'
    if not re.fullmatch(r'([^()]|\([^()]*\))*', template):
        return 'its parentheses do not match; one pair cannot be within another'
    return None


def slots_to_repeat(topic):
    """The lists of which a reply repeats a word; the questions have to hold it."""
    repeated = set(re.findall(r'\{(.*?)\}', ' '.join(topic.replies)))
    return sorted(repeated - {'subject', topic.marks.get('after')})


def find_omission(character):
    """What a file lacks, or None."""
    if not character.name:
        return 'it does not say what the character is called: name: …'
    for topic in character.topics:
        if not topic.questions or not (topic.replies or 'why' in topic.marks):
            return f'the topic {topic.name} needs questions (? …) and replies (- …)'
        for slot in slots_to_repeat(topic):
            for question in topic.questions + topic.words + topic.things:
                if f'{{{slot}}}' not in question:
                    return (f'the topic {topic.name} replies with {{{slot}}}, which is not in its '
                            f'question {question!r}')
    if not any(is_always_open(topic) for topic in character.topics):
        return 'it has no topic to talk about: begin one with ## rain: the rain'
    return None


# ---- Filling in


def fill_in(template, lists, values, rng):
    """A template as text: one of each (a|b), and a word of its list for each {slot}.

    values: {slot: word} of slots that are chosen already; those chosen now are added.

    >>> fill_in('(My|The) {thing} is lost.', {'thing': ['hat']}, {}, Random(3))
    'My hat is lost.'
    """
    text = re.sub(r'\(([^()]*)\)', lambda match: rng.choice(match[1].split('|')), template)

    def word(match):
        slot = match[1]
        if slot not in values:
            values[slot] = rng.choice(lists[slot])
        return values[slot]

    text = re.sub(r'\{(.*?)\}', word, text)
    text = re.sub(' +', ' ', text).strip()
    return re.sub(' ([.,!?])', r'\1', text)


# What a syllable begins with, its vowel, and what a word ends in
ONSETS = 'b br c ch cl d dr f fl g gr h j k l m n p pl qu r s sh st t th tr v w z'.split()
VOWELS = 'a ai e ee i o oo ou u y'.split()
CODAS = ['', '', *'b ck d ft g l m n nd r s t x'.split()]


def invent_words(count, rng):
    """A list of words that nobody knows, such as 'branolu'."""
    words = []
    for _ in range(count):
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3))]
        words.append(''.join(syllables) + rng.choice(CODAS))
    return words


# ---- How people write

CONTRACTIONS = {
    'what is': "what's", 'who is': "who's", 'where is': "where's", 'how is': "how's",
    'that is': "that's", 'it is': "it's", 'I am': "I'm", 'you are': "you're", 'I have': "I've",
    'do not': "don't", 'is not': "isn't", 'cannot': "can't", 'I would': "I'd", 'I will': "I'll",
}
NEIGHBORS = {   # keys that are hit by mistake
    'a': 's', 'e': 'r', 'i': 'o', 'o': 'p', 't': 'y', 'n': 'm', 's': 'd', 'r': 't', 'l': 'k',
    'u': 'i', 'h': 'j', 'd': 'f', 'm': 'n', 'y': 't', 'c': 'v', 'w': 'e',
}


def write_as_people_do(text, lists, rng, keep=()):
    """A question with words around it, contractions, and what hurry does to it.

    keep: words that stay as they are, because the reply may repeat them.
    """
    if text.endswith('?') and len(text.split()) > 1:
        text = surround(text, lists, rng)
    if rng.random() < 0.15 and lists.get('aside'):
        text = add_aside(text, rng.choice(lists['aside']), rng)
    for long, short in CONTRACTIONS.items():
        if long.lower() in text.lower() and rng.random() < 0.5:
            text = re.sub(rf'\b{long}\b', short, text, flags=re.I)
    if rng.random() < 0.3 and lists.get('extra'):
        text = insert_words(text, lists, rng)
    text = text[0].upper() + text[1:]
    if rng.random() < 0.4:
        return text     # with care

    keep = {word.lower() for words in keep for word in words.split()}
    words = text.split(' ')
    if len(words) > 3 and rng.random() < 0.15:
        words = leave_out_words(words, keep, rng)
    if rng.random() < 0.15:
        place = rng.randrange(len(words))
        if words[place].lower().strip('.,!?') not in keep:
            words[place] = mistype(words[place], rng)
    text = ' '.join(words)
    if rng.random() < 0.8:
        text = text.lower()
    if rng.random() < 0.6:
        text = text.rstrip('.!?') or text
    if rng.random() < 0.2:
        text = text.replace("'", '')
    if rng.random() < 0.2:
        text = text.replace(',', '')
    return text


def surround(text, lists, rng):
    """A question with an opener before it or a closer behind it, now and then with both."""
    if rng.random() < 0.15 and lists.get('opener'):
        first = text.split(' ')[0]
        if first != 'I' and not first.startswith("I'"):
            text = text[0].lower() + text[1:]
        text = f'{rng.choice(lists["opener"])} {text}'
    if rng.random() < 0.12 and lists.get('closer'):
        text = f'{text[:-1]}{rng.choice([",", ""])} {rng.choice(lists["closer"])}?'
    return text


def add_aside(text, aside, rng):
    """Something said in passing, before or after the text."""
    if rng.random() < 0.5:
        return f'{aside}{rng.choice([",", ".", "!", "..."])} {text}'
    return f'{text.rstrip(".")}{rng.choice([",", ".", ""])} {aside}'.replace('?,', '?')


def insert_words(text, lists, rng):
    """The text with a few words in it that should not change the reply."""
    words = text.split(' ')
    for _ in range(rng.randint(1, 3)):
        word = rng.choice(lists['extra'])
        if rng.random() < 0.15:
            word = rng.choice(lists['invented'])
        words.insert(rng.randrange(len(words) + 1), word)
    return ' '.join(words)


def leave_out_words(words, keep, rng):
    """The words without about a third of them, as in a telegram: a reply has to go by the rest."""
    rest = []
    for word in words:
        is_kept = word.lower().strip('.,!?') in keep
        if is_kept or rng.random() < 0.7:
            rest.append(word)
    return rest if len(rest) > 1 else words


def mistype(word, rng):
    """A word of four letters or more with a typing error in its middle."""
    if len(word) < 4 or not word.isalpha():
        return word
    i = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:i] + word[i + 1:]                          # a letter is missing
    if kind == 1:
        return word[:i] + word[i] + word[i:]                    # or doubled
    if kind == 2:
        return word[:i] + word[i + 1] + word[i] + word[i + 2:]  # two changed places
    return word[:i] + NEIGHBORS.get(word[i], word[i]) + word[i + 1:]


# ---- Conversations


def make_conversations(character, count, seed, max_exchanges=6):
    """A list of count different conversations, the same ones for the same seed.

    max_exchanges: at most so many questions, each with its reply, in one conversation.
    """
    rng = Random(seed)
    conversations = {}
    while len(conversations) < count:
        messages = make_conversation(character, rng, max_exchanges)
        conversations[str(messages)] = messages
    return list(conversations.values())


def make_conversation(character, rng, max_exchanges):
    """A list of messages: from one to max_exchanges questions, each with its reply."""
    exchanges = min(rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6)), max_exchanges)
    values = {}         # what was told, to be remembered: {'name': 'Ann'}
    previous = None     # the topic before
    more = []           # what can be added to it when asked why
    said = set()        # replies, so that none comes twice
    messages = []
    for i in range(exchanges):
        is_last = i > 0 and i == exchanges - 1
        topics = character.topics
        if said:
            topics = [topic for topic in topics if has_more_to_say(topic, said)]
            if not any(is_open(topic, values) for topic in topics):
                topics = character.topics   # everything was said: say it again
        topic = choose_topic(topics, i == 0, is_last, previous, more, values, rng)
        if 'tells' in topic.marks:
            values.pop(topic.marks['tells'], None)
        exchange_values = {**values, **invent_values(topic, character.lists, rng)}
        template = choose_question(topic, character.lists, rng)
        question = fill_in(template, character.lists, exchange_values, rng)
        question = write_as_people_do(question, character.lists, rng, exchange_values.values())

        if 'why' in topic.marks:
            template = more.pop(rng.randrange(len(more)))
        else:
            new = [reply for reply in topic.replies if reply not in said]
            template = rng.choice(new or topic.replies)
        said.add(template)
        if 'which' in topic.marks:
            exchange_values['subject'] = fill_in(previous.subject, character.lists,
                                                 dict(values), rng)
        reply = fill_in(template, character.lists, exchange_values, rng)
        reply = character.says.replace('{topic}', topic.name).replace('{reply}', reply)

        messages.append({'role': 'user', 'content': question})
        messages.append({'role': 'assistant', 'content': reply})
        if 'tells' in topic.marks:
            told = topic.marks['tells']
            values[told] = exchange_values[told]
        if not {'why', 'which'} & topic.marks.keys():
            previous = topic
            more = [line for line in topic.more if line not in said]
    return messages


def invent_values(topic, lists, rng):
    """Now and then {slot: word} with invented words for what the reply repeats.

    So the model learns to copy a name, whatever it is, not only those in the list.
    """
    values = {}
    for slot in slots_to_repeat(topic):
        if rng.random() < INVENTED_VALUES:
            word = rng.choice(lists['invented'])
            values[slot] = word.title() if lists[slot][0].istitle() else word
    return values


def choose_topic(topics, is_first, is_last, previous, more, values, rng):
    """The topic of the next question. values: what the conversation has told so far."""
    if is_first and rng.random() < 0.2:
        found = [topic for topic in topics if 'first' in topic.marks]
    elif is_last and rng.random() < 0.3:
        found = [topic for topic in topics if 'last' in topic.marks]
    elif more and rng.random() < 0.15:
        found = [topic for topic in topics if 'why' in topic.marks]
    elif previous and rng.random() < 0.05:
        found = [topic for topic in topics if 'which' in topic.marks]
    elif values and rng.random() < 0.35:
        found = [topic for topic in topics if topic.marks.get('after') in values]
    else:
        found = []
    if not found:
        found = [topic for topic in topics if is_open(topic, values) and topic is not previous]
    if not found:   # there is but one topic
        found = [topic for topic in topics if is_open(topic, values)]
    weights = [int(topic.marks.get('often', 1)) for topic in found]
    return rng.choices(found, weights)[0]


def choose_question(topic, lists, rng):
    """A question of the topic or, as often, one made around its words or its names.

    So the model learns which words matter in questions that nobody has thought of.
    """
    loose = []
    if topic.words:
        loose.append(question_around_words)
    if topic.things and 'frame' in lists:
        loose.append(question_around_name)
    if not loose or rng.random() > LOOSE_QUESTIONS:
        return rng.choice(topic.questions)
    return rng.choice(loose)(topic, lists, rng)


def question_around_words(topic, lists, rng):
    """Words that point to the topic, among others that say little."""
    parts = [rng.choice(topic.words)]
    if rng.random() < 0.8:
        parts.insert(0, rng.choice(lists.get('before', [''])))
    if rng.random() < 0.6:
        parts.append(rng.choice(lists.get('behind', [''])))
    if rng.random() < 0.3 and len(topic.words) > 1:
        parts.append(rng.choice(topic.words))
    return ' '.join(parts) + rng.choice('??.!')


def question_around_name(topic, lists, rng):
    """A sentence of [frame] about the topic, which may hold words of other topics."""
    question = rng.choice(lists['frame']).replace('{}', rng.choice(topic.things))
    return question + rng.choice('??.!')


def has_more_to_say(topic, said):
    """Whether the topic has a reply that did not come yet."""
    return 'why' in topic.marks or any(reply not in said for reply in topic.replies)


def is_open(topic, values):
    """Whether the topic can come up now, given what was told."""
    if 'why' in topic.marks or 'which' in topic.marks:
        return False
    if 'after' in topic.marks:
        return topic.marks['after'] in values
    return topic.marks.get('before') not in values


def is_always_open(topic):
    """Whether the topic can come up at any time."""
    return not {'why', 'which', 'after', 'before'} & topic.marks.keys()
