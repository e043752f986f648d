# The classic: character-level Tiny Shakespeare with nanoGPT's shape and batch, 10.7 M parameters.
# 15 minutes on two CPU cores with AMX, peak memory 3.8 GB, val 1.448, the mean of three seeds
# (nanoGPT: 1.4697).
dataset = 'shakespeare_char'
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
batch_size = 64
max_iters = 500
learning_rate = 5e-3
warmup_iters = 5
eval_interval = 100
log_interval = 10
