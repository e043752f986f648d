# DailyDialog and ProsocialDialog as chat (prepare/dialog.py), the small GPT of many tutorials: 8 layers, 384 wide, context 128,
# 32,000 sentencepieces with an adaptive softmax, stopped after three epochs without progress: 28.4 M parameters. 420 steps, a
# quarter of an epoch, took two CPU cores 13.7 minutes and 4.7 GB: val 4.442, 1.571 bits a byte. Ten epochs have not been run.
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
token_shift = False                # what stands above was measured so
