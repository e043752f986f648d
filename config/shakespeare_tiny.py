# The bundled model (pocket/bundled/shakespeare): character-level Tiny Shakespeare in 1.4 M
# parameters, few enough to commit. 19 minutes on one core of a busy CPU, peak memory 0.7 GB, val
# 1.4224; after rounding the weights to bfloat16, 1.4223.
dataset = 'shakespeare_char'
block_size = 256
n_layer = 5
n_head = 2
n_embd = 152
dropout = 0.15
batch_size = 16
max_iters = 2400
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 200
