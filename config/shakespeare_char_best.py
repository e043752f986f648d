# Character-level Tiny Shakespeare, our lowest loss so far: 2.7 M parameters, val 1.3940, the mean
# of three seeds (1.3943, 1.3957, 1.3919). 25 to 35 minutes on one core of a busy CPU, peak memory
# 1.0 GB. With nanoGPT's windows, --block_size=256 --batch_size=16, val is 1.4184 (nanoGPT: 1.4697).
# The difference is context alone: read 256 characters at a time, the weights above have 1.4188.
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
