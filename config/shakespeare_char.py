# The well-known run: Tiny Shakespeare by characters, nanoGPT's shape and batch, 16,384 tokens a step.
dataset = 'shakespeare_char'
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
batch_size = 64
max_iters = 1000
learning_rate = 1e-2
eval_interval = 100
log_interval = 10
