# The well-known run: Tiny Shakespeare by characters, nanoGPT's shape and batch, 10.6 M parameters. 16,384 tokens a step are
# 4 s on two CPU cores: --max_iters=300 takes 20 minutes there and reaches val 1.51. All 1,000 steps are for a GPU, not yet run.
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
