# An encoder-decoder for chats. With DailyDialog alone and a vocabulary of 8,192: 7.6 M parameters,
# 20.5 minutes on two CPU cores, peak memory 2.3 GB, val 3.652 nats per token, 1.439 bits per byte.
#     python prepare/dialog.py --corpora=daily --tokenizer=bpe --vocab_size=8192 --name=daily
#     python train.py config/dialog_encdec.py --dataset=daily
# Without --dataset=daily it uses prepare/dialog.py's defaults: both corpora, 32,000 tokens, 13.7 M
# parameters. The run above had no token shift, so it is off here.
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
