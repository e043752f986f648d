# A character to chat with, made from the text file that describes it: Plunkett, a lost umbrella,
# until you write another. 1.31 M parameters: 2.6 MB in bfloat16, few enough to bundle.
dataset = 'character'      # prepare/character.py
block_size = 256           # about six questions and their replies
n_layer = 2                # two wide layers learn more per minute than four narrow ones
n_head = 4
n_embd = 256
n_inner = 256
tie_weights = True         # one table for tokens in and out: twice the vocabulary at the same size
batch_tokens = 8192
max_iters = 640
muon_momentum = 0.85
warmup_iters = 10
eval_interval = 320
sample_min_p = 0.7         # replies keep to what the model is sure of, and still vary
