# An encoder-decoder for chats (prepare/dialog.py): 7.6 M parameters, a vocabulary of 8,192.
# On DailyDialog alone: 20.5 minutes on two CPU cores, peak memory 2.3 GB, val 3.652 nats per token,
# 1.439 bits per byte. That was without token shift, so it is off here.
dataset = 'dialog'
arch = 'seq2seq'
block_size = 64
src_block_size = 160
n_layer = 3
n_encoder_layer = 3
n_head = 4
n_embd = 256
tie_weights = True
dropout = 0.1
batch_tokens = 4096
max_iters = 2400
learning_rate = 3e-3
muon_lr = 0.01
warmup_iters = 50
eval_interval = 800
token_shift = False
