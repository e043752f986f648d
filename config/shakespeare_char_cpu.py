# Character-level Tiny Shakespeare in 41 seconds on two CPU cores with AMX, 70 to 90 on slower ones:
# 0.94 M parameters, val 1.4991.
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
