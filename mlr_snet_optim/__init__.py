"""What an optimizer's step does, and how a trial step is undone. mlr_snet uses it; it needs torch only.

directions.py: d_t. rates.py: the learning rates of parameter groups. restoring.py: copies, bit for bit. average.py: a
running average of weights. loop.py: hooks and checks in the training loop. ranks.py: means over the ranks, and
other numbers.
"""
