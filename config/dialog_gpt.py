# The small GPT of many tutorials on DailyDialog and ProsocialDialog as chats (prepare/dialog.py):
# 8 layers, 384 wide, context 128, a sentencepiece vocabulary of 32,000 with an adaptive softmax,
# early stopping after three epochs without progress. 28.4 M parameters.
# 420 steps, a quarter of an epoch: 13.7 minutes on two CPU cores, peak memory 4.7 GB, val 4.442
# nats per token, 1.571 bits per byte, without token shift. The full ten epochs have not been run.
dataset = 'dialog'
block_size = 128
n_layer = 8
n_head = 6
n_embd = 384
n_inner = 1536
cutoffs = (2000, 8000)
dropout = 0.1
batch_tokens = 4096
max_epochs = 10
learning_rate = 3e-3
muon_lr = 0.01
eval_interval = 0
patience = 3
token_shift = False
