# Tiny Shakespeare with a BPE of 4,096 tokens, 6 layers, 256 wide, as in many tutorials: 6.8 M
# parameters, 3.5 minutes on one CPU core with AMX, peak memory 0.8 GB, val 4.2635 nats per token,
# 2.119 bits per byte (shakespeare_char_cpu: 2.163). With 3 layers, 160 wide, and 2 heads (2.23 M)
# the same 400 steps reached 4.2962, 2.135 bits per byte.
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
