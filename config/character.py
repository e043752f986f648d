# A character to chat with, made from the text file that describes it: Plunkett, a lost umbrella,
# until you write another. 1.44 M parameters: 2.9 MB in bfloat16, few enough to bundle.
dataset = 'character'      # prepare/character.py
block_size = 256           # about six questions and their replies
n_layer = 2                # two wide layers learn more per minute than four narrow ones
n_head = 4
n_embd = 256
n_inner = 384
tie_weights = True         # one table for tokens in and out: twice the vocabulary at the same size
max_iters = 1000
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 500
sample_min_p = 0.3         # replies keep to what the model is sure of, and still vary
