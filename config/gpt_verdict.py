# A large model and a tiny text: GPT-2 124M, from nothing, on The Verdict, 5,145 tokens of GPT-2's
# BPE. As the learning rate falls, so does the loss, to val 6.08 at the end.
dataset = 'verdict'
block_size = 256
n_layer = 12
n_head = 12
n_embd = 768
bias = True
attn_bias = False
pos = 'learned'
act = 'gelu'
qk_norm = False
token_shift = False
zero_init = False
tie_weights = True
dropout = 0.1
batch_size = 1
max_epochs = 10
optimizer = 'adamw'
learning_rate = 3e-4
beta2 = 0.999
warmup_iters = 10
eval_interval = 10
log_interval = 10
