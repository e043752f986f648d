# Character-level Tiny Shakespeare, our lowest loss so far: 2.7 M parameters, val 1.4184, the mean
# of three seeds (1.4182, 1.4157, 1.4213; nanoGPT's published loss is 1.4697). 26 minutes on one
# core of a busy CPU, peak memory 0.9 GB.
dataset = 'shakespeare_char'
block_size = 1024
n_layer = 6
n_head = 3
n_embd = 192
dropout = 0.15
batch_size = 4
max_iters = 2000
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 200
