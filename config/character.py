# A character of your own to chat with, from the text file that describes it: Plunkett, a lost
# umbrella, as long as nobody writes another. 1.44 M parameters.
dataset = 'character'      # prepare/character.py
block_size = 256           # about six questions and their replies
n_layer = 4
n_head = 2
n_embd = 160
n_inner = 560
max_iters = 1000
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 500
