# An encoder-decoder for a laptop, on 8,863 pairs from The Office (prepare/office.py): what somebody
# said, and what Michael Scott answered. 7.6 M parameters, 13 minutes on one CPU core, peak memory
# 1.7 GB, val 3.7211 nats per token, 1.617 bits per byte.
dataset = 'office'
arch = 'seq2seq'
block_size = 64
src_block_size = 192
n_layer = 3
n_encoder_layer = 3
n_head = 4
n_embd = 256
tie_weights = True
dropout = 0.3
batch_tokens = 2048
max_epochs = 5
learning_rate = 3e-3
muon_lr = 0.01
warmup_iters = 50
eval_interval = 0
patience = 3
