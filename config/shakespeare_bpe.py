# Tiny Shakespeare with a BPE of 4,096 tokens, 6 layers, 256 wide, as in many tutorials: 6.8 M
# parameters. Not yet run to the end. With 3 layers, 160 wide, and 2 heads (2.23 M) the same 400
# steps reached val 4.2962, 2.135 bits per byte (shakespeare_char_cpu: 2.164).
dataset = 'shakespeare_bpe'
block_size = 64
n_layer = 6
n_head = 4
n_embd = 256
dropout = 0.1
batch_size = 32
max_iters = 400
learning_rate = 1e-2
muon_lr = 0.015
muon_momentum = 0.85
warmup_iters = 2
eval_interval = 80
