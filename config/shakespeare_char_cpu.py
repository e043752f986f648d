dataset = 'shakespeare_char'
block_size = 128
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 16
max_iters = 800
eval_interval = 200
