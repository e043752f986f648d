# Character-level Tiny Shakespeare in 70 to 90 seconds on two CPU cores: 0.94 M parameters,
# val 1.4980.
dataset = 'shakespeare_char'
block_size = 128
n_layer = 3
n_head = 2
n_embd = 160
batch_size = 16
max_iters = 800
learning_rate = 1e-2
muon_lr = 0.015
muon_momentum = 0.85
warmup_iters = 2
eval_interval = 160
