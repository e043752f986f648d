# The well-known run: Tiny Shakespeare by characters, nanoGPT's shape and batch, 10.6 M parameters. 16,384 tokens a step are
# 4 s on two CPU cores: 300 steps took 25 minutes there, to val 1.5125 (before token_shift). All 1,000 are for a GPU, not yet run.
dataset = 'shakespeare_char'
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
batch_size = 64
max_iters = 1000
learning_rate = 5e-3
warmup_iters = 5
eval_interval = 50
log_interval = 10
