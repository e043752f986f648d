"""
Conversations as people have them, in files of all kinds, and as ids to train on.

    conversations, report = read_conversations(path, me='Ann')
    ids, mask = encode_conversation_to_learn(tok, template, conversations[0])

A conversation is a list of messages, [{'role': 'user', 'content': 'Hi!'}, …], where the role is
'system', 'user' or 'assistant'. The assistant is who the model learns to be. First come the
readers, one for each format, which only read; then what is the same for all of them.
"""
import json
import re
from collections import Counter
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path

import numpy as np

from pocket import tables
from pocket.errors import UserError, short_repr
from pocket.template import (
    ChatTemplate,
    JinjaTemplate,
    encode_piece,
    format_turn,
    reply_start_ids,
)

# What roles and columns are called elsewhere
ROLES = {
    'system': 'system', 'developer': 'system',
    'user': 'user', 'human': 'user', 'prompter': 'user', 'you': 'user',
    'assistant': 'assistant', 'gpt': 'assistant', 'bot': 'assistant', 'chatbot': 'assistant',
    'model': 'assistant', 'chatgpt': 'assistant', 'ai': 'assistant', 'bing': 'assistant',
    'q': 'user', 'question': 'user', 'a': 'assistant', 'answer': 'assistant',
}
MESSAGES = ('messages', 'conversations', 'conversation', 'items')
USER_COLUMNS = ('source', 'question', 'prompt', 'instruction', 'user', 'input', 'q', 'said',
                'human', 'context')
ASSISTANT_COLUMNS = ('target', 'answer', 'response', 'output', 'completion', 'assistant', 'a',
                     'reply', 'replied', 'bot')
PAUSE = timedelta(hours=6)  # after so much silence a new conversation begins
LONGEST = 50                # messages of a chat without such pauses, which is cut for that reason


class Report:
    """What a reader has found: the format, and how much was left out, and why."""

    def __init__(self, path, skip_bad=False):
        self.path = path
        self.skip_bad = skip_bad
        self.format = ''
        self.left_out = Counter()  # {why: how many}
        self.unread = {}           # the names of columns that are not read, as keys

    def bad(self, place, problem):
        """Note a bad entry if they are to be skipped. Raises UserError if not."""
        self.bad_row(f'{self.path}, {place}: {problem}')

    def bad_row(self, message):
        """The same, with all of the message: for tables.read_table()."""
        if not self.skip_bad:
            raise UserError(f'{message}; --skip_bad leaves it out')
        self.left_out['bad entries'] += 1


# --------------------------------------------------------------------------------------------------
# JSON: OpenAI's messages, ShareGPT, Telegram, and rows with two columns


def read_json(text, report):
    """Conversations of a JSON or JSONL file."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return read_json_entries(parse_lines(text, report), report)
    if isinstance(content, dict):
        if isinstance(content.get('chats'), dict):  # Telegram: all chats
            return read_telegram(content['chats'].get('list'), report)
        if is_telegram(content):
            return read_telegram([content], report)
        content = [content]
    entries = [(f'entry {number}', entry) for number, entry in enumerate(content, start=1)]
    return read_json_entries(entries, report)


def parse_lines(text, report):
    """[(place, value)] of the lines of a JSONL file."""
    entries = []
    for number, line in enumerate(text.split('\n'), start=1):
        if not line.strip():
            continue
        try:
            entries.append((f'line {number}', json.loads(line)))
        except (ValueError, RecursionError) as e:
            report.bad(f'line {number}', f'it is not JSON ({e})')
    return entries


def read_json_entries(entries, report):
    """Conversations of [(place, value)]: an entry each."""
    conversations = []
    for place, entry in entries:
        messages = entry
        if isinstance(entry, dict):
            messages = next((entry[name] for name in MESSAGES if name in entry), None)
        if isinstance(messages, list):
            report.format = report.format or 'messages with roles'
            messages = read_messages(messages, place, report)
            system = entry.get('system') if isinstance(entry, dict) else None
            if messages is not None and isinstance(system, str):  # beside the messages
                messages.insert(0, {'role': 'system', 'content': system})
        elif isinstance(entry, dict):
            report.format = report.format or 'rows with two columns'
            messages = read_row(entry, place, report)
        else:
            report.bad(place, f'it is not a conversation: {str(entry)[:60]}')
            continue
        if messages is not None:
            conversations.append(messages)
    return conversations


def read_messages(messages, place, report):
    """One conversation: OpenAI's {role, content} or ShareGPT's {from, value}. None if it is bad."""
    found = []
    for message in messages:
        if not isinstance(message, dict):
            return report.bad(place, f'{str(message)[:60]!r} is not a message')
        name = message.get('role', message.get('from', message.get('speaker')))
        role = ROLES.get(str(name).lower())
        if role is None:
            return report.bad(place, f'unknown role {name!r}: there are system, user and assistant '
                                     f'(in ShareGPT human and gpt)')
        content = message.get('content', message.get('value', message.get('text')))
        found.append({'role': role, 'content': text_of(content)})
    return found


def text_of(content):
    """The text of a message, which may be in parts: [{'type': 'text', 'text': …}, 'more']."""
    if isinstance(content, list):
        parts = [part.get('text') if isinstance(part, dict) else part for part in content]
        return ''.join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ''


def read_row(row, place, report):
    """One conversation of a row {column: text}: what is said, and the reply. None if it is bad."""
    columns = {str(name).strip().lower(): value for name, value in row.items()}
    asked = next((name for name in USER_COLUMNS if name in columns), None)
    replied = next((name for name in ASSISTANT_COLUMNS if name in columns), None)
    if asked is None or replied is None:
        return report.bad(place, f'no messages, and no columns such as question and answer, but '
                                 f'{", ".join(list(columns)[:6]) or "nothing"}')
    for name in (asked, replied):
        if not isinstance(columns[name], str):
            return report.bad(place, f'{name} is {short_repr(columns[name])[:60]}, not text')
    question, answer = columns[asked], columns[replied]
    used = {asked, replied, 'system'}
    if asked == 'instruction':
        used.add('input')  # Alpaca has what an instruction is about in a column of its own
        more = columns.get('input')
        if isinstance(more, str) and more.strip():
            question += '\n' + more
    for name in columns:
        if name not in used:
            report.unread[name or 'a column without a name'] = True
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    if isinstance(columns.get('system'), str):
        messages.insert(0, {'role': 'system', 'content': columns['system']})
    return messages


# --------------------------------------------------------------------------------------------------
# Tables


def read_table(path, report):
    """Conversations of a table, a row each: two columns, or those whose names are known."""
    report.format = 'a table'
    header, rows = tables.read_table(Path(path), report.bad_row)
    names = [name.strip().lower() for name in header]
    has_names = bool(set(names) & set(USER_COLUMNS) and set(names) & set(ASSISTANT_COLUMNS))
    if not has_names:
        if len(header) != 2:
            raise UserError(f'{path} has {len(header)} columns ({", ".join(header)[:80]}): '
                            f'name two of them question and answer in its first line')
        report.format = 'a table without known names of columns, read from its first line on'
        rows = chain([(1, header)], rows)
        names = ['question', 'answer']

    conversations = []
    for line, row in rows:
        messages = read_row(dict(zip(names, row)), f'line {line}', report)
        if messages is not None:
            conversations.append(messages)
    return conversations


def looks_like_a_table(text):
    """Whether nearly all of the first lines have a tab in them, or a semicolon, or a comma.

    If spaces follow these they are punctuation, unless the first line is a header.

    >>> looks_like_a_table('Hi,Hello'), looks_like_a_table('Hi, you'), looks_like_a_table('q,a')
    (True, False, True)
    """
    lines = [line for line in text.split('\n')[:50] if line.strip()]
    for delimiter in tables.DELIMITERS:
        found = sum(line.count(delimiter) for line in lines)
        spaced = sum(line.count(f'{delimiter} ') for line in lines)
        divided = sum(delimiter in line for line in lines)
        if not found or delimiter not in lines[0] or divided < 0.9 * len(lines):
            continue
        if spaced <= found / 2 or tables.is_header(lines[0].split(delimiter)):
            return True
    return False


# --------------------------------------------------------------------------------------------------
# WhatsApp


DIRECTION_MARKS = dict.fromkeys(map(ord, '\u200e\u200f\u202a\u202b\u202c\u202d\u202e'
                                         '\u2066\u2067\u2068\u2069\ufeff'))
SPACES = {0xa0: ' ', 0x202f: ' '}  # of fixed width, such as before PM
# The date is written as in the phone's country: 2/13/24, 13.02.24, 2024-02-13, 2024. 2. 13. Words
# may stand before the time (um, à, 下午) and after it (PM, p. m.)
WHATSAPP_LINE = re.compile(
    r'\[?(?P<date>\d{1,4}[./-] ?\d{1,2}[./-] ?\d{1,4})\.?[,،]? '
    r'(?P<before>[^\W\d_]{1,4} ?)?(?P<time>\d{1,2}[:.]\d\d([:.]\d\d)?)'
    r'(?P<after> ?([AaPp]\.? ?[Mm]\.?|[^\W\d_]{1,4}))?'
    r'\]?( -)? (?P<rest>.*)')
AFTERNOON = re.compile(r'p\.? ?m\.?|下午|오후|午後|م', re.IGNORECASE)
FORENOON = re.compile(r'a\.? ?m\.?|上午|오전|午前|ص', re.IGNORECASE)
WHATSAPP_NOTICE = re.compile(r'\] [^:]*: \u200e')
NO_TEXT = re.compile(
    r'<[^<>]{1,60}>'                                     # <Media omitted>, in any language
    r'|\S+\.\w{2,4} \([^()]+\)'                          # IMG-1.jpg (file attached)
    r'|.+\.\w{2,5} \((file attached|datei angehängt|fichier joint|archivo adjunto'
    r'|arquivo anexado|file allegato|bestand bijgevoegd)\)'
    r'|(image|video|audio|sticker|gif|document|contact card) omitted.*'
    r'|(you deleted this message|this message was deleted'
    r'|du hast diese nachricht gelöscht|diese nachricht wurde gelöscht'
    r'|(vous avez|tu as) supprimé ce message|ce message a été supprimé'
    r'|eliminaste este mensaje|se eliminó este mensaje|este mensaje fue eliminado'
    r'|você apagou esta mensagem|(mensagem apagada|(esta|essa) mensagem foi apagada)'
    r'|hai eliminato questo messaggio|questo messaggio è stato eliminato'
    r'|je hebt dit bericht verwijderd|dit bericht is verwijderd)\.?'
    r'|missed (voice|video|group) .*call.*|null'
    r'|messages and calls are end-to-end encrypted.*', re.IGNORECASE)
EDITED = re.compile(r' *<[^<>]*(edited|bearbeitet|editad|modifi)[^<>]*>$', re.IGNORECASE)


def read_whatsapp(text, me, report):
    """Conversations of a WhatsApp export, of Android or of an iPhone.

    What WhatsApp itself says there begins with a mark of direction on an iPhone, and has no name on
    Android.
    """
    report.format = 'a WhatsApp export'
    spoken = []  # [name, text, time]
    for line in text.split('\n'):
        plain = line.translate(SPACES).translate(DIRECTION_MARKS).rstrip('\r')
        match = WHATSAPP_LINE.fullmatch(plain)
        if match is None:
            if spoken and spoken[-1] is not None:  # a message of several lines
                spoken[-1][1] += '\n' + plain
            continue
        name, colon, said = match['rest'].partition(': ')
        # Ann created group "Fun: a group" is a notice, too
        is_notice = (not colon or re.search('["“„«]', name)
                     or WHATSAPP_NOTICE.search(line.translate(SPACES)))
        if is_notice or NO_TEXT.fullmatch(said.strip()):
            report.left_out['notices and omitted media'] += 1
            spoken.append(None)
            continue
        words = (match['before'] or '') + (match['after'] or '')
        spoken.append([name.strip(), said, (match['date'], match['time'], words.strip())])

    spoken = [message for message in spoken if message is not None]
    day_first = first_number_is_day([when[0] for _, _, when in spoken])
    chat = [(name, EDITED.sub('', said), parse_time(when, day_first))
            for name, said, when in spoken]
    return conversations_of([chat], me, report)


def first_number_is_day(dates):
    """Whether dates such as 3/12/23 begin with the day: unless a second number is above 12."""
    return not any(int(re.split('[./-]', date)[1]) > 12 for date in dates)


def parse_time(when, day_first):
    """The datetime of (date, time, words beside it), None if there is no such time."""
    date, time, words = when
    numbers = [int(number) for number in re.split('[./-]', date)]
    if numbers[0] > 31:
        year, month, day = numbers
    elif day_first:
        day, month, year = numbers
    else:
        month, day, year = numbers
    hour, minute = (int(number) for number in re.split('[:.]', time)[:2])
    if FORENOON.fullmatch(words):
        hour = hour % 12
    if AFTERNOON.fullmatch(words):
        hour = hour % 12 + 12
    try:
        return datetime(year if year > 99 else 2000 + year, month, day, hour, minute)
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------
# Telegram


def is_telegram(content):
    """Whether a JSON object is one chat of a Telegram export."""
    messages = content.get('messages')
    return (isinstance(messages, list) and len(messages) > 0 and isinstance(messages[0], dict)
            and 'type' in messages[0] and 'role' not in messages[0])


def read_telegram(chats, report):
    """The chats of an export: not yet with roles, but a list of (name, text, time) each."""
    report.format = 'a Telegram export'
    found = []
    for number, chat in enumerate(chats if isinstance(chats, list) else [], start=1):
        messages = chat.get('messages') if isinstance(chat, dict) else None
        if not isinstance(messages, list):
            report.bad(f'chat {number}', 'it has no list of messages')
            continue
        spoken = []
        for message in messages:
            if not isinstance(message, dict):
                report.bad(f'chat {number}', f'{str(message)[:60]!r} is not a message')
                continue
            said = text_of(message.get('text'))
            if message.get('type') != 'message' or not message.get('from') or not said.strip():
                report.left_out['notices and omitted media'] += 1
                continue
            try:
                time = datetime.fromisoformat(str(message.get('date')))
                time = time.replace(tzinfo=None)  # exports tell the local time
            except ValueError:
                time = None
            spoken.append((str(message['from']), said, time))
        found.append(spoken)
    return found


# --------------------------------------------------------------------------------------------------
# Transcripts


TRANSCRIPT_LINE = re.compile(
    r'([\[(]?\d{1,2}:\d\d(:\d\d)?[\])]? (- )?)?'                   # optional: when
    r'(?P<name>[^\s:\d"\'(\[{<#*-][^:：]{0,39})(:[ \t]+|：[ \t]*)(?P<said>\S.*)')  # who, what


def speakers_of(lines):
    """Who speaks in a transcript: User and Assistant, if they do; otherwise names that occur at
    least twice, or all of them if it is short."""
    matches = [TRANSCRIPT_LINE.fullmatch(line) for line in lines]
    counts = Counter(match['name'].strip() for match in matches if match)
    known = {name for name in counts if name.lower() in ROLES}
    if {'user', 'assistant'} <= {ROLES[name.lower()] for name in known}:
        return known
    if sum(counts.values()) < 10:
        return set(counts)
    return {name for name, count in counts.items() if count > 1}


def read_transcript(text, me, report):
    """Conversations of lines such as 'Ann: Hello.'; other lines continue the message before.

    Blank lines separate conversations, unless there is one after most messages.
    """
    report.format = 'a transcript'
    lines = [line.translate(DIRECTION_MARKS).rstrip() for line in text.split('\n')]
    speakers = speakers_of(lines)
    chats = [[]]
    num_messages = 0
    for line in lines:
        match = TRANSCRIPT_LINE.fullmatch(line)
        if match and match['name'].strip() in speakers:
            chats[-1].append([match['name'].strip(), match['said'], None])
            num_messages += 1
        elif re.fullmatch(r'\s*|[-=*_#]{3,}', line):
            if chats[-1]:
                chats.append([])
        elif chats[-1]:
            chats[-1][-1][1] += '\n' + line
    chats = [chat for chat in chats if chat]
    if len(chats) > num_messages / 2:
        chats = [[message for chat in chats for message in chat]]
    return conversations_of(chats, me, report)


# --------------------------------------------------------------------------------------------------
# People to roles


def conversations_of(chats, me, report):
    """Conversations of chats, each [(name, text, time)]: cut at pauses, with roles.

    Raises UserError.
    """
    names = Counter(name for chat in chats for name, _, _ in chat)
    roles = {name: ROLES.get(name.lower()) for name in names}
    if me is not None:
        wanted = {name for name in names if name.lower() == me.strip().lower()}
        if names and not wanted:
            raise UserError(f'{report.path}: nobody is called {me!r}, there are '
                            f'{", ".join(list(names)[:10])}: --me=NAME says who the model is to be')
        roles = {name: 'assistant' if name in wanted else 'user' for name in names}
    elif None in roles.values():
        raise UserError(f'{report.path}: {", ".join(list(names)[:10])} speak here: say with '
                        f'--me=NAME who of them the model is to be')

    conversations = []
    for chat in chats:
        conversations.append([])
        before = None
        for name, said, time in chat:
            is_pause = time is not None and before is not None and abs(time - before) > PAUSE
            is_too_long = len(conversations[-1]) >= LONGEST and roles[name] == 'user'
            if is_pause or is_too_long:
                conversations.append([])
            conversations[-1].append({'role': roles[name], 'content': said})
            before = time or before
    return [messages for messages in conversations if messages]


# --------------------------------------------------------------------------------------------------
# What is the same for all formats


def read_conversations(path, me=None, skip_bad=False):
    """(conversations, Report) of a file whose format is found by looking at it. Raises UserError.

    me: the name that the model is to speak under, in chats of people with names. skip_bad: leave
    out lines and entries that can't be read, instead of raising an error.
    """
    report = Report(path, skip_bad)
    text = read_any_text(path)
    stripped = text.lstrip('\ufeff \r\n\t')
    lines = text.split('\n')
    plain_lines = [line.translate(SPACES).translate(DIRECTION_MARKS).rstrip('\r')
                   for line in lines[:200]]
    is_table = Path(path).suffix.lower() in tables.TABLE_SUFFIXES
    may_be_table = is_table or looks_like_a_table(text.removeprefix('\ufeff'))

    has_time_in_brackets = any(pattern.fullmatch(plain_lines[0])  # [10:00] Ann: Hi!
                               for pattern in (WHATSAPP_LINE, TRANSCRIPT_LINE))
    if stripped.startswith(('{', '[')) and not has_time_in_brackets:
        conversations = read_json(text.removeprefix('\ufeff'), report)
        if report.format == 'a Telegram export':
            conversations = conversations_of(conversations, me, report)
    elif sum(bool(WHATSAPP_LINE.fullmatch(line)) for line in plain_lines) >= 0.2 * len(plain_lines):
        conversations = read_whatsapp(text, me, report)
    elif may_be_table and (is_table or not speakers_of(plain_lines)):
        conversations = read_table(path, report)
    elif speakers_of(plain_lines):
        conversations = read_transcript(text.removeprefix('\ufeff'), me, report)
    else:
        raise UserError(f'{path} is no conversation that can be read: it takes messages in JSON '
                        f'(OpenAI, ShareGPT), a table with two columns, lines such as "Ann: Hi!", '
                        f'or an export of WhatsApp or Telegram')
    tidied = [tidy(messages) for messages in conversations]
    return [messages for messages in tidied if is_complete(messages, report)], report


def read_any_text(path):
    """The text of a file in UTF-8, or in UTF-16 if it says so. Raises UserError."""
    try:
        content = Path(path).read_bytes()
        encoding = 'utf-8'
        if content.startswith((b'\xff\xfe', b'\xfe\xff')):
            encoding = 'utf-16'
        return content.decode(encoding).replace('\r\n', '\n')
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 text: byte {e.object[e.start]:#04x} at position '
                        f'{e.start:,}; save it as UTF-8') from None


def tidy(messages):
    """A conversation in which the roles alternate: it begins with the user (or a system message)
    and ends with the assistant.

    Consecutive messages of one role are joined, a line each. What the assistant says before anybody
    else does is no reply, and what gets no reply teaches nothing: both are left out.
    """
    tidied = []
    for message in messages:
        content = message['content'].translate(DIRECTION_MARKS).strip()
        if not content:
            continue
        if tidied and tidied[-1]['role'] == message['role']:
            tidied[-1]['content'] += '\n' + content
        elif message['role'] == 'system' and tidied:  # in the middle there are none
            continue
        elif message['role'] == 'assistant' and not any(m['role'] == 'user' for m in tidied):
            continue
        else:
            tidied.append({'role': message['role'], 'content': content})
    while tidied and tidied[-1]['role'] != 'assistant':
        tidied.pop()
    return tidied


def is_complete(messages, report):
    """Whether a tidy conversation has a question and a reply. If not, the report counts it."""
    if not messages:
        report.left_out['conversations that are empty or one-sided'] += 1
    return bool(messages)


# --------------------------------------------------------------------------------------------------
# Conversations to ids


def chat_template_for(tok):
    """The ChatTemplate of conversations for a tokenizer of ours. Raises UserError.

    The same token ends each turn, a person's and the model's: so a conversation as it is learned
    and one as it is continued are the same ids.
    """
    names = {token_id: name for name, token_id in tok.special_tokens.items()}
    if tok.eos_id not in names or tok.decoder_start_id != tok.eos_id:
        raise UserError('conversations need a tokenizer with one special token that ends a turn, '
                        'eos or eot, and no bos or sep: this one has '
                        f'{", ".join(tok.special_tokens) or "none"}')
    return ChatTemplate(turn='{speaker}: {text}', separator=f'<{names[tok.eos_id]}>', max_turns=100,
                        user='User', assistant='Bot', reply_prefix='Bot:')


def encode_conversation_to_learn(tok, template, messages):
    """(ids, mask) of a conversation: (T,) uint32 and uint8 arrays. For the mask see pocket/data.py.

    Learned are the assistant's replies, all of them, each with the token that ends it. messages:
    tidy ones. Raises UserError if the template makes that impossible.
    """
    if isinstance(template, JinjaTemplate):
        return encode_with_jinja(tok, template, messages)
    return encode_with_names(tok, template, messages)


def encode_with_names(tok, template, messages):
    """encode_conversation_to_learn() with a ChatTemplate, which knows no system messages."""
    from pocket.data import LEARN, TURN
    if (encode_piece(tok, template.separator) != [tok.eos_id]
            or tok.decoder_start_id != tok.eos_id or not template.max_turns > 1):
        raise UserError('this chat template is not for whole conversations: the token between '
                        'turns must be the one that ends a reply; prepare them with another '
                        'tokenizer')
    ids = encode_piece(tok, template.bos)
    mask = [0] * len(ids)
    for message in messages:
        if message['role'] == 'user':
            turn = tok.encode(format_turn(template, template.user, message['content']))
            turn += reply_start_ids(tok, template)
            mask += [TURN] + [0] * (len(turn) - 1)
        elif message['role'] == 'assistant':
            text = format_turn(template, template.assistant, message['content'])
            turn = tok.encode(text.removeprefix(template.reply_prefix)) + [tok.eos_id]
            mask += [LEARN] * len(turn)
        else:
            continue
        ids += turn
    return np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)


def encode_with_jinja(tok, template, messages):
    """encode_conversation_to_learn() with a JinjaTemplate.

    A template is a program, so what the assistant says is found by running it on the beginnings of
    the conversation. Each text must begin as the one before it; the pieces between their ends are,
    in turn, what the model is given, and what it has to write.
    """
    from pocket.data import LEARN, TURN

    def render(count, add_generation_prompt=False):
        try:
            return template.render(messages[:count], add_generation_prompt)
        except ValueError as e:
            raise UserError(str(e)) from None

    whole = render(len(messages))
    ids = []
    mask = []
    done = ''  # of the text
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        before = render(i, add_generation_prompt=True)
        after = render(i + 1)
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise UserError('this chat template changes what it wrote once a conversation goes on '
                            '(as those do that leave out earlier thoughts), so its replies can\'t '
                            'be told from the rest: prepare the data with another tokenizer')
        given = tok.encode_with_specials(before[len(done):])
        turn = 0
        if not done:
            turn = length_of_head(tok, template, messages[:i + 1], given)
        given_mask = [0] * len(given)
        given_mask[turn] = TURN

        reply = tok.encode_with_specials(after[len(before):])
        ends = [place for place, token_id in enumerate(reply) if token_id in tok.eos_ids]
        if not ends:
            raise UserError('this chat template writes no token that ends a reply '
                            '(eos_token_id of generation_config.json), so a model would not learn '
                            'to stop: prepare the data with another tokenizer')
        learned = ends[0] + 1  # what follows, such as a line break, comes by itself
        ids += given + reply
        mask += given_mask + [LEARN] * learned + [0] * (len(reply) - learned)
        done = after
    return np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)


def length_of_head(tok, template, messages, ids):
    """How many of the first ids come before the first turn, such as a system message.

    messages: of a conversation up to its first reply; ids: up to where that begins. Some templates
    add a system message of their own: so the head is what the first turn has that the same words,
    said later, have not.
    """
    *head, question, reply = messages
    try:
        first = template.render([*head, question], add_generation_prompt=False)
        answered = template.render([*head, question, reply], add_generation_prompt=False)
        again = template.render([*head, question, reply, question], add_generation_prompt=False)
    except ValueError:
        return 0
    turn = again[len(answered):]
    if not turn or not again.startswith(answered) or not first.endswith(turn):
        return 0
    head_ids = tok.encode_with_specials(first.removesuffix(turn))
    is_prefix = len(head_ids) < len(ids) and ids[:len(head_ids)] == head_ids
    return len(head_ids) if is_prefix else 0
