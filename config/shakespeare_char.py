# The classic: character-level Tiny Shakespeare with nanoGPT's shape and batch, 10.7 M parameters.
# A step of 16,384 tokens takes 4 s on two CPU cores. 300 steps took 25 minutes there and reached
# val 1.5125 (without token shift). All 1,000 steps are meant for a GPU, and have not been run yet.
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
