"""The pairs of office.py with GPT-2's BPE, 50,260 ids, in data/office_gpt2: what config/office_encdec_paper.py trains on."""
import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ['--tokenizer=gpt2', '--name=office_gpt2']  # what was typed comes behind, and so overrules
runpy.run_path(str(Path(__file__).with_name('office.py')), run_name='__main__')
