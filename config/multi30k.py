# Translation: Multi30k's captions, English to German (prepare/multi30k.py). 5.2 M parameters; test
# BLEU with --text=tok: 41.33, the mean of three seeds, an hour on one core each. See
# docs/results.md.
dataset = 'multi30k'
arch = 'seq2seq'
block_size = 64
src_block_size = 64
n_layer = 3
n_encoder_layer = 3
n_head = 4
n_embd = 256
n_inner = 512
tie_weights = True
token_shift = False
dropout = 0.25
label_smoothing = 0.1
batch_tokens = 4096
gradient_accumulation_steps = 2
max_iters = 3000
learning_rate = 3e-3
muon_lr = 0.01
warmup_iters = 100
eval_interval = 300
