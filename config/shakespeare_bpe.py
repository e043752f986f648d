# Tiny Shakespeare by 4,096 byte pairs, for two CPU cores: 2.23 M parameters, 819,200 tokens, val 4.3449 (2.159 bits a byte;
# shakespeare_char_cpu, 0.94 M parameters, reaches 2.229). A token is 3.3 characters. Without dropout it overfits after step 300.
dataset = 'shakespeare_bpe'
block_size = 64
n_layer = 3
n_head = 2
n_embd = 160
dropout = 0.1
batch_size = 32
max_iters = 400
learning_rate = 1e-2
muon_lr = 0.015
muon_momentum = 0.85
warmup_iters = 2
eval_interval = 80
