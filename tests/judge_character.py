"""
How often does the bundled character reply on topic, to prompts that it was not trained on?

    python tests/judge_character.py                              sample.py's temperature, 0.8
    python tests/judge_character.py --temperature=0
    python tests/judge_character.py --out_dir=out/character      another model

It prints every reply, with an X before those that hold none of the prompt's keywords; the [topic]
before a reply does not count. That is not the whole matter: a reply can miss the keywords and be
good, or hold one and be nonsense. So read them.
"""
import json
import re
import sys
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

out_dir = 'pocket/bundled/plunkett'        # a run or a checkpoint
prompts = 'tests/character_prompts.json'   # 20 topics of three prompts, and some conversations
temperature = 0.8                          # [0, inf) 0: the most probable token
seed = 1337                                # [0, inf) of each reply
LONGEST_WHOLE_WORD = 3   # such a keyword has to be a word of its own: 'he' is not in 'hello'


def holds_keyword(reply, keywords):
    """Whether a reply, without its [topic], has one of the keywords, as a word or as the beginning
    of one.

    >>> holds_keyword('It rained.', ['rain', 'wet'])
    True
    >>> holds_keyword('Hello!', ['he'])
    False
    >>> holds_keyword('[rain] Hello!', ['rain'])
    False
    """
    reply = re.sub(r'^\[.*?\] ', '', reply)
    for keyword in keywords:
        end = r'\b' if len(keyword) <= LONGEST_WHOLE_WORD else ''
        if re.search(rf'\b{re.escape(keyword)}{end}', reply, re.I):
            return True
    return False


if __name__ == '__main__':
    configure(__file__, globals())
    from pocket.chat import load
    from pocket.files import find_path

    model = load(out_dir)
    judged = json.loads(find_path(prompts).read_text(encoding='utf-8'))

    def reply_to(prompt, turns=()):
        return model(prompt, turns, seed=seed, temperature=temperature, top_k=200).strip()

    # One prompt by itself
    right = total = 0
    for topic, entries in judged['prompts'].items():
        for entry in entries:
            reply = reply_to(entry['prompt'])
            is_on_topic = holds_keyword(reply, entry['keywords'])
            right += is_on_topic
            total += 1
            print(' ' if is_on_topic else 'X', f'{topic} | {entry["prompt"]} | {reply}')

    # Conversations: does it still answer the last question?
    right_at_the_end = 0
    for conversation in judged['conversations']:
        turns = []
        print()
        for prompt in conversation['turns']:
            reply = reply_to(prompt, turns)
            turns += [(model.template.user, prompt), (model.template.assistant, reply)]
            print(f'    {prompt} | {reply}')
        right_at_the_end += holds_keyword(reply, conversation['keywords'])
    print(f'\non topic: {right} of {total}; the last reply of a conversation: {right_at_the_end} '
          f'of {len(judged["conversations"])}')
