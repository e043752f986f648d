"""
The pairs of office.py in GPT-2's tokens, 50,260 ids, in data/office_gpt2: what
config/office_encdec_paper.py trains on. It takes the options of office.py.
"""
import runpy
import sys
from pathlib import Path

# Run office.py as if these two options had been typed first. Of an option that is given twice the
# last value counts, so what was really typed overrules them.
office = str(Path(__file__).with_name('office.py'))
sys.argv = [office, '--tokenizer=gpt2', '--name=office_gpt2', *sys.argv[1:]]
runpy.run_path(office, run_name='__main__')
