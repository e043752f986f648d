# Character-level Tiny Shakespeare, as good as it gets in seven minutes on two CPU cores: 1.8 M
# parameters, val 1.4343, the mean of three seeds (1.4445, 1.4299, 1.4286; 1,301 to 1,415 steps,
# depending on how fast the machine was), peak memory 0.75 GB.
dataset = 'shakespeare_char'
max_minutes = 7
block_size = 256
n_layer = 4
n_head = 3
n_embd = 192
dropout = 0.1
batch_size = 16
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 250
