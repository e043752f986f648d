# Tiny Shakespeare by characters, what two CPU cores do in seven minutes.
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
